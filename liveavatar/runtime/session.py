"""One client's side of a stream: push audio, take pictures, change what is shown. Made by Engine.open; it never touches the chain.

Every call that changes something waits until its message is on the road; audio waits while `runtime.queued_seconds` of it are queued.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from liveavatar import core
from liveavatar.conditioning.framing import Fitted
from liveavatar.conditioning.prompt import clean
from liveavatar.config import Config
from liveavatar.core import Geometry, InputError, LiveAvatarError, Message, SessionClosed
from liveavatar.runtime.intake import Intake, as_poses
from liveavatar.runtime.observing import Observation
from liveavatar.runtime.scheduler import Candidate, Playout, candidate
from liveavatar.runtime.sources import StageSource
from liveavatar.runtime.timeline import Output, Timeline
from liveavatar.telemetry import NoTrace, Trace


class Head(Protocol):
    """What a session needs of the engine it belongs to. failure: why the chain is gone, None while it runs."""

    config: Config
    source: StageSource
    geometry: Geometry
    trace: Trace | NoTrace
    clock: Callable[[], float]
    failure: LiveAvatarError | None

    def wake(self) -> None:
        """Something changed: the pump looks again."""

    async def send(self, message: Message) -> None:
        """Put a control message on the road, before the next block; returns when it is on its way."""

    async def fitted(self, picture) -> Fitted:
        """A portrait in the engine's size. Raises InputError."""


class Signal:
    """Wakes everybody who waits; forgets at once."""

    def __init__(self):
        self._waiting: set[asyncio.Future] = set()

    def fire(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout: float | None = None) -> None:
        """Until the next fire(), or `timeout` seconds."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait([future], timeout=timeout)
        finally:
            self._waiting.discard(future)


class Session:
    """One stream with one avatar. Iterate it for Outputs; made by Engine.open."""

    def __init__(self, engine: Head, name: str, pace: str):
        self.name, self.pace = name, pace
        self.timeline = Timeline(name, engine.geometry, lookahead=engine.source.lookahead_samples,
                                 refresh_block=engine.source.refresh_block, refresh_slices=engine.config.sampler.refresh_slices)
        self.playout, self.asked = Playout(), 0.0
        self.error: LiveAvatarError | None = None
        self.opened = self.closing = self.closed = self.parked = False
        self.changed = Signal()
        self.observed: list[Observation] = []
        self._engine, self._intake, self._pushing = engine, Intake(), asyncio.Lock()

    # ------------------------------------------------------------ audio

    async def push_audio(self, pcm, rate: int = core.SAMPLE_RATE) -> None:
        """Append mono PCM, [n] float in -1..1 or int16, at `rate` Hz; waits while the queue is full.

        What is left when an interrupt comes is dropped. Raises InputError, SessionClosed, RankFailure.
        """
        self._check_audio()
        await self._queue(self._intake.push(pcm, rate))

    async def _queue(self, pcm) -> None:
        epoch, limit = self.timeline.epoch, self._engine.config.runtime.queued_seconds
        async with self._pushing:  # whole, in order of the calls, and an end after what was pushed before it
            while len(pcm) and epoch == self.timeline.epoch:
                self._check_audio()
                room = round((limit - self.timeline.queued_seconds) * core.SAMPLE_RATE)
                if room > 0:
                    self.timeline.push(pcm[:room])
                    self._engine.trace.received(self.name, epoch, pcm[:room])
                    pcm = pcm[room:]
                    self._engine.wake()
                else:
                    await self.changed.wait()

    async def end_audio(self) -> None:
        """No more audio: the last block is filled up with silence, iteration ends after its pictures."""
        self._check()
        if not self.timeline.ended:
            await self._queue(self._intake.flush())
            self.timeline.end()
            self._engine.trace.note("ended", session=self.name)
            self._engine.wake()
            self.changed.fire()

    async def end_utterance(self) -> None:
        """What was pushed so far is whole: a live session speaks its last, short block without waiting for more."""
        self._check_audio()
        await self._queue(self._intake.flush())
        self.timeline.settle()

    # ------------------------------------------------------------ the head

    def push_head(self, poses) -> None:
        """Turn the head: float [n,3], degrees of yaw (+ to the picture's right), pitch (+ up) and roll (+ clockwise) of the n pictures behind those
        that were said so far, on top of the drift that it has by itself (sampler.head_motion, [0,0,0]: none); back to that where they end, so
        let them end at 0. From the next block on; an interrupt leaves them.
        Raises InputError, also of a checkpoint that is not told, SessionClosed, RankFailure.
        """
        self._check()
        if self._engine.source.head_motion is None:
            raise InputError("the head cannot be turned: this checkpoint is not told how to hold it, or sampler.head_motion is null")
        self.timeline.push_head(as_poses(poses))

    def park(self, parked: bool = True) -> None:
        """A parked live session asks for no idle blocks: it costs nothing until it is pushed audio or woken (park(False))."""
        self.parked = parked
        self._engine.wake()

    # ------------------------------------------------------------ control, each at the next block boundary

    async def interrupt(self) -> int:
        """Forget audio not yet generated and pictures not yet taken; returns the new epoch."""
        self._check()
        message = self.timeline.interrupt()
        self.playout.calm()
        self._engine.trace.interrupt(self.name, message.epoch)
        self._intake = Intake()
        self.changed.fire()
        await self._engine.send(message)
        return message.epoch

    async def set_prompt(self, prompt: str) -> None:
        """New text. Raises InputError."""
        self._check()
        await self._engine.send(core.SetPrompt(self.name, prompt=clean(prompt)))
        self._engine.trace.note("step", session=self.name, what="prompt")

    async def set_reference(self, picture) -> None:
        """New portrait: a path, bytes, uint8 [3, H0, W0] or what Engine.fitted gave. Raises InputError."""
        self._check()
        fitted = await self._engine.fitted(picture)
        message = core.SetReference(self.name, picture=fitted.pixels)
        self._check()  # closed meanwhile: another session may have the name by now
        self.timeline.new_portrait()
        await self._engine.send(message)
        self._engine.trace.note("step", session=self.name, what="portrait")
        self._engine.trace.portrait(self.name, fitted.box)

    async def refresh(self) -> None:
        """Make the generated first latent the sink (AAS) now, or over the next blocks (sampler.refresh_slices), against drift."""
        self._check()
        self.timeline.refresh()
        self._engine.wake()

    async def close(self) -> None:
        """End the session; returns when all its state is gone along the chain. May be called often."""
        if not self.closing:
            self.closing = True
            self.changed.fire()
            if self._engine.failure is None:
                await self._engine.send(core.Close(self.name))
        while not self.closed and self._engine.failure is None:
            await self.changed.wait()

    # ------------------------------------------------------------ pictures

    def __aiter__(self) -> Session:
        return self

    async def __anext__(self) -> Output:
        """The next block in order. Raises InputError (this session was refused), RankFailure."""
        while True:
            output = None if self.closing else self.timeline.take()
            if output is not None:
                self.playout.shown(self._engine.clock(), float(output.pts))
                self._engine.wake()
                return output
            if self.error is not None:
                raise self.error
            if self.closing or self.timeline.done:
                raise StopAsyncIteration
            await self.changed.wait()

    async def observe(self) -> Observation:
        """What every step makes of the next block, and its pictures. Raises InputError where the chain has no steps."""
        self._check()
        seen = Observation(self.timeline.observe(), self._engine.config.stages)
        self.observed.append(seen)
        try:
            while not seen.whole:
                self._check()
                await self.changed.wait()
        finally:
            self.observed.remove(seen)
        return seen

    # ------------------------------------------------------------ for the engine

    def candidate(self) -> Candidate | None:
        """How the scheduler sees it; None when it has nothing to ask for."""
        if not self.opened or self.closing or self.error:
            return None
        return candidate(self.name, self.timeline, self.playout, live=self.pace == "live", asked=self.asked, parked=self.parked)

    def paced(self, due: float) -> None:
        """The consumer plays by its own clock: the block after the last one taken is due at `due` (clock seconds)."""
        self.playout.paced(due, float(self.timeline.shown))
        self._engine.wake()

    def fail(self, error: LiveAvatarError) -> None:
        """Every call and the iterator raise `error` from now on."""
        self.error = self.error or error
        self.changed.fire()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self.closing:
            raise SessionClosed(f"session {self.name!r} was closed")

    def _check_audio(self) -> None:
        self._check()
        if self.timeline.ended:
            raise SessionClosed(f"session {self.name!r}: audio was ended; open another session for more")
