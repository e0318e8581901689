"""Recordings and synthesised speech into a session, one after the other, as fast as it takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from liveavatar.core import SAMPLE_RATE
from liveavatar.serving.problems import BufferFull

WAITING = 8  # utterances; beyond: buffer_full
PIECE_SECONDS = 0.5  # pushed at once
AGAIN_SECONDS = 0.1  # after the session was full


@dataclass(slots=True)
class Utterance:
    """One segment to come. chunks: (int16 or float32 [n] mono, Hz). epoch: in which it was asked for."""

    chunks: AsyncGenerator[tuple[np.ndarray, int]]
    segment: int | None
    epoch: int
    end: bool = True


class Feeder:
    """Of one session. `failed(error)` is told when an utterance breaks off; the next one goes on.

    An interruption throws away what was asked for before it.
    """

    def __init__(self, session, failed: Callable[[Exception], None], *, errors: tuple[type[Exception], ...] = (),
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep):  # fmt: skip
        self._session, self._failed, self._errors, self._sleep = session, failed, errors, sleep
        self._waiting: deque[Utterance] = deque()
        self._something = asyncio.Event()
        self.busy = False

    def put(self, utterance: Utterance) -> None:
        """Append. Raises BufferFull."""
        if len(self._waiting) >= WAITING:
            raise BufferFull(f"{WAITING} utterances are waiting already")
        self._waiting.append(utterance)
        self._something.set()

    async def run(self) -> None:
        """Feed until cancelled."""
        while True:
            if not self._waiting:
                self.busy = False
                self._something.clear()
                await self._something.wait()
            self.busy = True
            utterance = self._waiting.popleft()
            try:
                async with aclosing(utterance.chunks):
                    await self._feed(utterance)
            except self._errors as error:
                self._failed(error)

    async def _feed(self, utterance: Utterance) -> None:
        rate, last = SAMPLE_RATE, np.zeros(0, np.int16)
        async for chunk, rate in self._made(utterance):
            step = max(1, round(PIECE_SECONDS * rate))
            for start in range(0, len(chunk), step):
                if utterance.epoch < self._session.epoch:
                    return
                await self._push(chunk[start : start + step], rate, utterance, end=False)
            last = chunk[:0]
        if utterance.end and utterance.epoch >= self._session.epoch:
            await self._push(last, rate, utterance, end=True)

    async def _made(self, utterance: Utterance) -> AsyncGenerator[tuple[np.ndarray, int], None]:
        """Its chunks; one that breaks off ends there, so that its segment ends, too."""
        try:
            async for chunk in utterance.chunks:
                yield chunk
        except self._errors as error:
            self._failed(error)

    async def _push(self, pcm: np.ndarray, rate: int, utterance: Utterance, end: bool) -> None:
        while utterance.epoch >= self._session.epoch:
            try:
                return await self._session.push_audio(pcm, rate, segment=utterance.segment, epoch=utterance.epoch, end=end)
            except BufferFull:
                await self._sleep(AGAIN_SECONDS)
