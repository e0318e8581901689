"""Conversations on a server: sessions whose viewers talk with the avatar instead of through it.

Recogniser, mind and voice are one for all; ears, turns and memory are a session's own and end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from liveavatar.serving.ears import Ears, Recogniser
from liveavatar.serving.live import LiveSession
from liveavatar.serving.minds import Mind
from liveavatar.serving.problems import Conflict
from liveavatar.serving.talk import Talk
from liveavatar.serving.voices import Voice
from liveavatar.serving.webrtc import Heard


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every conversation of a server needs; see ears, minds and voices."""

    mind: Mind
    voice: Voice
    recogniser: Recogniser


class Conversations:
    """By session. ears: makes a listener; the model behind it costs 1 MB and 10 ms to load."""

    def __init__(self, parts: Parts, ears: Callable[[], Ears] = Ears):
        self._parts, self._ears = parts, ears
        self._talks: dict[str, Talk] = {}
        self._ending = set[asyncio.Task]()

    async def begin(self, session: LiveSession) -> Talk:
        """From now on microphones of this session are heard, not repeated. Raises Conflict where that is so already."""
        if session.id in self._talks:
            raise Conflict("this session is a conversation already")
        talk = Talk(session, mind=self._parts.mind, voice=self._parts.voice, recogniser=self._parts.recogniser, ears=self._ears(),
                    tell=lambda name, data: session.happenings.add(name, **data))  # fmt: skip
        self._talks[session.id] = talk
        await talk.__aenter__()
        session.on_end(lambda: self._end_soon(session.id))
        return talk

    def get(self, session_id: str) -> Talk:
        """Raises Conflict where nobody talks."""
        if session_id not in self._talks:
            raise Conflict("this session is no conversation: begin it first")
        return self._talks[session_id]

    async def end(self, session_id: str) -> None:
        """The avatar only repeats again. May be called often."""
        talk = self._talks.pop(session_id, None)
        if talk is not None:
            await talk.__aexit__()

    def _end_soon(self, session_id: str) -> None:
        task = asyncio.create_task(self.end(session_id))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def aclose(self) -> None:
        """End all."""
        await asyncio.gather(*(self.end(session_id) for session_id in tuple(self._talks)), *self._ending)

    def microphone(self, otherwise: Callable[[LiveSession], Heard]) -> Callable[[LiveSession], Heard]:
        """For the WHEP routes: who gets a microphone's sound, which may change while it is open. otherwise: without a conversation."""

        def of(session: LiveSession) -> Heard:
            repeat = otherwise(session)

            async def heard(pcm: np.ndarray, rate: int) -> None:
                talk = self._talks.get(session.id)
                await (repeat(pcm, rate) if talk is None else talk.hear(pcm, rate))

            return heard

        return of
