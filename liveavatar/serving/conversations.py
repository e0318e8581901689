"""Conversations on a server: sessions whose viewers talk with the avatar instead of through it.

Recogniser, mind and voice are one for all; ears, turns and memory are a session's own and end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog

from liveavatar.serving.ears import Ears, Recogniser
from liveavatar.serving.live import LiveSession
from liveavatar.serving.minds import Mind
from liveavatar.serving.problems import Conflict
from liveavatar.serving.talk import Talk
from liveavatar.serving.voices import Sound, Voice
from liveavatar.serving.webrtc import Heard

log = structlog.get_logger("liveavatar.talk")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every conversation of a server needs; see ears, minds and voices."""

    mind: Mind
    voice: Voice
    recogniser: Recogniser


class Counted:
    """A voice whose sound counts like any other speech. spoke: is told seconds; may raise RateLimited."""

    def __init__(self, voice: Voice, spoke: Callable[[float], None]):
        self._voice, self._spoke = voice, spoke

    async def speak(self, text: str) -> AsyncIterator[Sound]:
        """See Voice."""
        async for pcm, rate in self._voice.speak(text):
            self._spoke(len(pcm) / rate)
            yield pcm, rate


class Conversations:
    """By session. ears: makes a listener; the model behind it costs 1 MB and 10 ms to load."""

    def __init__(self, parts: Parts, ears: Callable[[], Ears] = Ears):
        self._parts, self._ears = parts, ears
        self._talks: dict[str, tuple[Talk, asyncio.Task]] = {}

    async def begin(self, session: LiveSession, spoke: Callable[[float], None] = lambda seconds: None) -> Talk:
        """From now on microphones of this session are heard, not repeated. Raises Conflict where that is so already.

        spoke: counts seconds of the voice, see Counted.
        """
        if session.id in self._talks:
            raise Conflict("this session is a conversation already")
        talk = Talk(session, mind=self._parts.mind, voice=Counted(self._parts.voice, spoke), recogniser=self._parts.recogniser, ears=self._ears(),
                    tell=lambda name, data: session.happenings.add(name, **data))  # fmt: skip
        task = asyncio.create_task(talk.run())
        self._talks[session.id] = talk, task
        task.add_done_callback(partial(self._over, session))
        return talk

    def _over(self, session: LiveSession, task: asyncio.Task) -> None:
        """It was ended, its session is over, or it broke: the avatar only repeats again."""
        if not task.cancelled() and task.exception() is not None:
            log.error("conversation_failed", session=session.id, exc_info=task.exception())
            session.happenings.add("talk.failed", reason="internal error")
        if self._talks.get(session.id, (None, None))[1] is task:
            del self._talks[session.id]

    def get(self, session_id: str) -> Talk:
        """Raises Conflict where nobody talks."""
        if session_id not in self._talks:
            raise Conflict("this session is no conversation: begin it first")
        return self._talks[session_id][0]

    async def end(self, session_id: str) -> None:
        """The avatar only repeats again. May be called often."""
        if (held := self._talks.pop(session_id, None)) is not None:
            held[1].cancel()
            await asyncio.wait([held[1]])

    async def aclose(self) -> None:
        """End all."""
        await asyncio.gather(*(self.end(session_id) for session_id in tuple(self._talks)))

    def microphone(self, otherwise: Callable[[LiveSession], Heard]) -> Callable[[LiveSession], Heard]:
        """For the WHEP routes: who gets a microphone's sound, which may change while it is open. otherwise: without a conversation."""

        def of(session: LiveSession) -> Heard:
            repeat, repeating = otherwise(session), True

            async def heard(pcm: np.ndarray, rate: int) -> None:
                nonlocal repeating
                talk, _ = self._talks.get(session.id, (None, None))
                if repeating and talk is not None:
                    await repeat(pcm[:0], rate)  # what was being repeated is over
                repeating = talk is None
                await (repeat(pcm, rate) if talk is None else talk.hear(pcm, rate) if len(pcm) else talk.hear_end())

            return heard

        return of
