"""Recordings and synthesised speech into a session, one after the other, as fast as it takes them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from liveavatar.core import SAMPLE_RATE
from liveavatar.serving.problems import BufferFull

WAITING, WAITING_BYTES = 8, 80_000_000  # utterances, and sound of theirs that is there already; beyond: buffer_full
PIECE_SECONDS = 0.5  # pushed at once
AGAIN_SECONDS = 0.1  # after the session was full


@dataclass(slots=True)
class Utterance:
    """One segment to come. chunks: (int16 or float32 [n] mono, Hz). epoch: in which it was asked for. size: bytes that it holds."""

    chunks: AsyncGenerator[tuple[np.ndarray, int]]
    segment: int | None
    epoch: int
    end: bool = True
    size: int = 0


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
        if len(self._waiting) >= WAITING or self._waiting and sum(other.size for other in self._waiting) + utterance.size > WAITING_BYTES:
            raise BufferFull(f"{len(self._waiting)} utterances are waiting already")
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
            with contextlib.suppress(*self._errors):  # of the end: the session is over, and that was told
                async with aclosing(utterance.chunks):
                    await self._feed(utterance)

    async def _feed(self, utterance: Utterance) -> None:
        rate = SAMPLE_RATE
        try:
            async for chunk, rate in utterance.chunks:
                step = max(1, round(PIECE_SECONDS * rate))
                for start in range(0, len(chunk), step):
                    if utterance.epoch < self._session.epoch:
                        return
                    await self._push(chunk[start : start + step], rate, utterance, end=False)
        except self._errors as error:  # the voice broke off, or the session takes no more: its segment ends there
            self._failed(error)
        if utterance.end and utterance.epoch >= self._session.epoch:
            await self._push(np.zeros(0, np.int16), rate, utterance, end=True)

    async def _push(self, pcm: np.ndarray, rate: int, utterance: Utterance, end: bool) -> None:
        while utterance.epoch >= self._session.epoch:
            try:
                return await self._session.push_audio(pcm, rate, segment=utterance.segment, epoch=utterance.epoch, end=end)
            except BufferFull:
                await self._sleep(AGAIN_SECONDS)
