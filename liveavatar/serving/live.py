"""One live session: speech in, a picture that never stops out, on one clock.

Three tasks. `_feed` hands pushed speech to the engine as it takes it. `_take` puts what the engine makes into the
playout, and asks for another engine session when the chain died. `_play` is the media clock: every 40 ms one tick, to
everybody who watches, whatever the other two are doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from liveavatar import __version__
from liveavatar.core import FPS, SAMPLE_RATE, InputError, LiveAvatarError, RankFailure, SessionClosed
from liveavatar.runtime.engine import Session, Signal
from liveavatar.runtime.observing import Observation
from liveavatar.runtime.timeline import Output
from liveavatar.serving.broadcast import Broadcast
from liveavatar.serving.gauges import Gauges
from liveavatar.serving.happenings import Event, Happenings
from liveavatar.serving.ladder import GROUND, IDLE_LOOP, LOWER_FPS, SMALLER, Factor, Rung
from liveavatar.serving.metrics import Metrics, sink_kind
from liveavatar.serving.packets import TICK_SAMPLES, Sink, Tick
from liveavatar.serving.playout import LATE_SECONDS, Pacer, Playout, Slot
from liveavatar.serving.problems import Conflict
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.utterances import Speech
from liveavatar.telemetry import now as monotonic

FEED_SAMPLES = SAMPLE_RATE // 2  # handed to the engine at a time
PER_TICK = SAMPLE_RATE // FPS  # 16 kHz samples to a picture
ENDS = ("idle", "length", "drain", "failed", "consent")  # reasons that sessions_ended_total knows; any other is "closed"


@dataclass(frozen=True, slots=True)
class Interrupted:
    """epoch: the new one. position_ms: what was heard of the segment that was being spoken."""

    epoch: int
    position_ms: int


class LiveSession:
    """See the module. Made by Studio.open; every call on the event loop.

    reopen: gives an engine session for a role, waiting until there is a chain. marks: what is drawn into every picture of a
    role (watermark, badge), uint8 [H, W, 3] -> the same. sleep: waits so many seconds.
    """

    def __init__(self, role: Role, config: ServeConfig, still: np.ndarray, *, reopen: Callable[[Role], Awaitable[Session]], executor: Executor,
                 marks: Callable[[Role], Callable[[np.ndarray], np.ndarray]], mode: str | None = None, metrics: Metrics | None = None,
                 clock: Callable[[], float] = monotonic, sleep: Callable[[float], Awaitable] = asyncio.sleep):  # fmt: skip
        self.metrics = metrics or Metrics(version=__version__)
        self.id, self.role, self.config, self.clock, self.mode = secrets.token_urlsafe(16), role, config, clock, mode or config.mode
        self.height, self.width = still.shape[0] * config.media.scale, still.shape[1] * config.media.scale
        self.epoch, self.state, self.reason, self.stale_pushes = 0, "creating", "", 0
        self.opened_at = self.used_at = clock()  # used: somebody watched or spoke
        self.speech = Speech(config.sessions.audio_seconds)
        self.spend: Callable[[float], AbstractContextManager] = nullcontext  # round the taking of so many seconds of sound: Desk counts them
        self.moderate: Callable[[str, str], Awaitable[None]] = _anything  # ("speech" or "prompt", text): raises what Moderation.check raises
        self.playout = Playout(still, mode=self.mode, ahead=self._ahead)
        self.broadcast = Broadcast(still.shape[1], still.shape[0], config.media, executor, clock, self.metrics)
        self.happenings = Happenings(clock)
        self.gauges, self.factor, self.rung = Gauges(), Factor(), GROUND
        self.resting: str | None = None  # why a channel lets it idle (metrics.FILLERS): schedule, between two entries; degraded, for want of one
        self._reopen, self._marks, self._mark, self._sleep = reopen, marks, marks(role), sleep
        self._engine: Session | None = None
        self._offset, self._pushed, self._asked = 0, Signal(), None  # offset: a position of speech less the engine's
        self._pacer: Pacer | None = None
        self._cut: float | None = None  # when it was interrupted, until that was heard
        self._flowing = False  # blocks come one after the other: one that is missing is late
        self._tasks: list[asyncio.Task] = []
        self._leaving: asyncio.Task | None = None  # gives the place in the chain back
        self._told: list[Callable[[], None]] = []

    @property
    def avatar(self) -> str:
        """Id of the avatar shown."""
        return self.role.avatar

    def on_end(self, told: Callable[[], None]) -> None:
        """Call this once when the session is closed or has failed."""
        self._told.append(told)

    def start(self, engine: Session) -> None:
        """Begin with an engine session that is open."""
        self._attach(engine)
        self._pacer = Pacer(self.clock())
        self._state("ready")
        self._tasks = [asyncio.create_task(run) for run in (self._play(), self._take(), self._feed())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    # ------------------------------------------------------------ speech in

    async def push_audio(self, pcm, rate: int, *, segment: int | None = None, epoch: int | None = None, end: bool = False) -> None:
        """Mono PCM [n], float or int16, at `rate` Hz, faster than it is spoken if you like; never waits for the GPU.

        segment: the run of speech it belongs to (None: the open one); end: that run is whole. epoch: of an older one
        it is dropped and counted, a newer one interrupts first. Raises BufferFull, RateLimited (quota), Conflict (closed), InputError.
        """
        self._check()
        if epoch is not None and epoch < self.epoch:
            self.stale_pushes += 1
            self.metrics.stale_dropped("audio_in")
            return
        if epoch is not None and epoch > self.epoch:
            await self.interrupt(epoch, reason="audio")
        with self.spend(len(pcm) / max(1, rate)):
            self.speech.push(pcm, rate, segment, end)
        if self.role.listening and len(pcm):
            await self.set_prompt(listening=False)  # whoever speaks does not listen, and opens the lips
        self.used_at = self.clock()
        if self._asked is None and not self._speaking:
            self._asked = self.clock()
        self._wake()

    @property
    def _speaking(self) -> bool:
        return self.state == "speaking"

    async def interrupt(self, epoch: int | None = None, *, reason: str = "api") -> Interrupted:
        """Silence now: what waits and what is being made is forgotten. reason: who asked, for the metrics. Raises Conflict (closed)."""
        self._check()
        done = Interrupted(self.epoch + 1 if epoch is None else max(epoch, self.epoch + 1), self.speech.position_ms)
        self.epoch, self._asked, self._flowing = done.epoch, None, False
        marks = self.speech.interrupt()
        self.playout.interrupt(self.epoch)
        self.broadcast.flush(self.epoch)
        self.happenings.add("epoch", epoch=self.epoch, position_ms=done.position_ms)
        self._announce(marks)
        self._settle_state(speaking=False)
        self.gauges.interrupts += 1
        self.metrics.interrupted(reason)
        self._cut = self.clock()
        engine = self._engine
        if engine is not None:
            with contextlib.suppress(RankFailure, SessionClosed):  # a dead chain has nothing to forget; _take mends it
                await engine.interrupt()
                self._pace(engine)  # nothing waits any more: the next block is due now
        return done

    # ------------------------------------------------------------ control

    async def set_prompt(self, prompt: str | None = None, *, emotion: str | None = None, listening: bool | None = None) -> None:
        """New text from the next block on, see Role; None: that part of it stays. Raises Conflict, InputError, and what moderate() raises."""
        self._check()
        said = (("prompt", prompt), ("emotion", emotion), ("listening", listening))
        changes = {name: value for name, value in said if value is not None and value != getattr(self.role, name)}
        if not changes:
            return
        if changes.keys() - {"listening"}:
            await self.moderate("prompt", replace(self.role, **changes).text)
        await self._tell(lambda engine: engine.set_prompt(replace(self.role, **changes).text))
        self.role = replace(self.role, **changes)
        self.happenings.add("session.updated", **changes)

    async def hears(self, somebody: bool) -> None:
        """Somebody begins or ends to speak to the avatar; where sessions.listening is on it shows. Raises Conflict."""
        if self.config.sessions.listening:
            await self.set_prompt(listening=somebody)

    async def set_reference(self, avatar: str, picture) -> None:
        """Another portrait from the next block on. Raises Conflict, InputError."""
        self._check()
        await self._tell(lambda engine: engine.set_reference(picture))
        self.role = replace(self.role, avatar=avatar, picture=picture)
        self._mark = self._marks(self.role)
        self.happenings.add("session.updated", avatar=avatar)

    async def observe(self) -> Observation:
        """The next block as each step of the chain leaves it. Raises Conflict, InputError (no steps), RankFailure."""
        self._check()
        if self._engine is None:
            raise Conflict("the engine is being restarted")
        self.used_at = self.clock()
        self._wake()
        return await self._engine.observe()

    async def _tell(self, order: Callable[[Session], Awaitable]) -> None:
        if self._engine is not None:
            with contextlib.suppress(RankFailure, SessionClosed):  # the session that takes its place is opened with the new role
                await order(self._engine)

    def add_sink(self, sink: Sink) -> None:
        """Somebody watches from the next tick on."""
        self._check()
        self.broadcast.add(sink)
        self._wake()

    def remove_sink(self, sink: Sink) -> None:
        """Somebody left. May be called often."""
        if sink in self.broadcast.sinks:
            self.broadcast.remove(sink)
            self.used_at = self.clock()

    def ask_keyframe(self) -> None:
        """A viewer cannot decode what it has."""
        self.broadcast.ask_keyframe()

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """What happens, from event number `after` + 1 on; ends with the session."""
        return self.happenings.read(after)

    async def close(self, reason: str = "closed") -> None:
        """End the session; returns when nothing of it is left. May be called often."""
        if self.state in ("closing", "closed", "failed"):
            return
        self.reason = reason
        self._state("closing")
        for task in self._tasks:
            task.remove_done_callback(self._ended)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.broadcast.close()
        await self._leave()
        self._over("closed")

    async def _leave(self) -> None:
        """Give the place in the chain back."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with contextlib.suppress(LiveAvatarError):  # the chain is gone and took the session with it
                await engine.close()

    # ------------------------------------------------------------ to the engine

    async def _feed(self) -> None:
        told = 0
        while True:
            engine = self._engine
            if engine is None or self.speech.cursor == self.speech.total and (not self.speech.settled or told == self.speech.cursor):
                await self._pushed.wait()
                continue
            with contextlib.suppress(RankFailure, SessionClosed):  # _take finds out and mends it; the cursor goes back then
                self._offset = self.speech.cursor - engine.timeline.received  # an interruption may have cut the last push short
                await engine.push_audio(self.speech.take(FEED_SAMPLES))
                if self.speech.settled and engine is self._engine:
                    told = self.speech.cursor
                    await engine.end_utterance()

    def _wake(self) -> None:
        if self._engine is not None:
            self._engine.park(False)
        self._pushed.fire()

    # ------------------------------------------------------------ from the engine

    async def _take(self) -> None:
        while True:
            engine = self._engine
            try:
                async for output in engine:
                    self.playout.push(self._slots(output))
                    self.gauges.blocks += 1
                    self._pace(engine)
                return  # the engine session was closed under us: the studio is closing
            except InputError:
                raise
            except LiveAvatarError as error:
                self._engine = None
                self.happenings.add("engine", state="lost", reason=str(error))
                self._attach(await self._reopen(self.role))
                self.happenings.add("engine", state="up")

    def _pace(self, engine: Session) -> None:
        engine.paced(self._pacer.due + len(self.playout) / FPS)

    def _attach(self, engine: Session) -> None:
        """Speech that was handed to an engine that died and not heard is handed over again."""
        generated = self.playout.generated
        self.speech.rewind(self.speech.heard if generated is None else generated)
        self._engine, self._offset = engine, self.speech.cursor
        self._pushed.fire()

    def _slots(self, output: Output) -> list[Slot]:
        start, stop = (position + self._offset for position in output.source)
        slots = []
        for n, picture in enumerate(output.pictures):
            low, high = (min(stop, start + PER_TICK * k) for k in (n, n + 1))
            sound = np.zeros(TICK_SAMPLES, np.int16)
            sound[: 3 * (high - low)] = self.speech.sound(low, high)
            slots.append(Slot(self.epoch, "speech" if high > low else "idle", picture, sound, (low, high), output.index))
        return slots

    def _ahead(self, stop: int) -> np.ndarray | None:
        """A tick of sound beyond what was generated; None where less was pushed."""
        return self.speech.sound(stop, stop + PER_TICK) if self.speech.total >= stop + PER_TICK else None

    # ------------------------------------------------------------ the media clock

    async def _play(self) -> None:
        while True:
            await self._sleep(max(0.0, self._pacer.due - self.clock()))
            index, late = self._pacer.ticks, self._pacer.tick(self.clock())
            slot = self.playout.next()
            marks = self.speech.hear(*slot.source)
            self._announce(marks)
            self._settle_state(speaking=slot.kind == "speech" or bool(self.speech.position_ms))
            self._rest()
            picture = self._mark(slot.picture) if self.broadcast.sinks else slot.picture
            self._count(slot.kind, late)
            tick = Tick(index, slot.epoch, slot.kind, picture, slot.sound, late, marks, slot.block)
            await self.broadcast.send(tick)
            self._count_silence(slot)

    def _count(self, kind: str, late: float) -> None:
        self.gauges.ticked(late, kind)
        if late > LATE_SECONDS:
            self.metrics.reanchored("late")
        standing = kind == "filler"
        filler = self._standing_in() if standing else self.resting if kind == "idle" else None
        if standing:
            if self.broadcast.filler is None and self._speaking and self.speech.waiting:
                self.metrics.audio_underrun(self.mode)
            self.metrics.frames_repeated(filler)
        self.broadcast.filler = filler
        self._flowing = not standing or self._flowing and filler == "underrun"
        self.factor.tick(self.clock(), missing=self._flowing and standing)

    def _standing_in(self) -> str:
        """Why an old picture does: a label of metrics.FILLERS."""
        if self._engine is None:
            return "restart"
        if not self._engine.parked:
            return "underrun"
        return "degraded" if self.broadcast.sinks else "parked"

    def _count_silence(self, slot: Slot) -> None:
        """How long an interruption took until what leaves is silent, or the new epoch's speech."""
        if self._cut is not None and (slot.kind == "speech" or not slot.sound.any()):
            for kind in {sink_kind(sink) for sink in self.broadcast.sinks}:
                self.metrics.silent_after(kind, self.clock() - self._cut)
            self._cut = None

    def _announce(self, marks) -> None:
        for mark in marks:
            if mark.name == "started":
                self.happenings.add("speak.started", segment=mark.segment)
            else:
                self.happenings.add("speak.finished", segment=mark.segment, position_ms=mark.position_ms, interrupted=mark.interrupted)

    def _settle_state(self, speaking: bool) -> None:
        if speaking and self._asked is not None:
            self.gauges.first_frame_seconds, self._asked = self.clock() - self._asked, None
            self.metrics.first_frame(self.config.engine_kind, self.gauges.first_frame_seconds)
        state = "speaking" if speaking else "idle"
        if self.state in ("ready", "idle", "speaking") and state != self.state:
            self._state(state)

    def degrade(self, rung: Rung) -> None:
        """The server leaves out what `rung` and those before it say (BP-2)."""
        self.rung = rung
        self.broadcast.every = 2 if rung.step >= LOWER_FPS.step else 1
        self.happenings.add("degraded", step=rung.step, left_out=rung.what)

    def _rest(self) -> None:
        """Nobody speaks, and nobody watches or the chain is needed elsewhere: no more blocks, until somebody does."""
        now, engine = self.clock(), self._engine
        if self.broadcast.sinks:
            self.used_at = now
        if engine is None or self._speaking or self.speech.waiting:
            return
        self.broadcast.small = self.rung.step >= SMALLER.step
        looped = self.rung.step >= IDLE_LOOP.step and self.playout.can_loop
        rest = looped or now - self.used_at > self.config.sessions.park_seconds
        if rest != engine.parked:
            engine.park(rest)

    # ------------------------------------------------------------ state

    def _state(self, state: str, **data) -> None:
        self.state = state
        self.happenings.add("state", state=state, **data)

    def _over(self, state: str) -> None:
        self._state(state, reason=self.reason)
        reason = "failed" if state == "failed" else self.reason
        self.metrics.session_ended(reason if reason in ENDS else "closed")
        self.happenings.close()
        while self._told:
            self._told.pop()()

    def _check(self) -> None:
        if self.state in ("closing", "closed", "failed"):
            raise Conflict(f"session {self.id} is {self.state}{f': {self.reason}' if self.reason else ''}")

    def _ended(self, task: asyncio.Task) -> None:
        """One of the three tasks stopped by itself: the session has failed."""
        if task.cancelled() or self.state in ("closing", "closed", "failed"):
            return
        error = task.exception()
        self.reason = str(error) if isinstance(error, LiveAvatarError) else "internal error" if error else "the engine closed the session"
        for other in self._tasks:
            other.cancel()
        self.broadcast.close()
        self._leaving = asyncio.create_task(self._leave())
        self._over("failed")
        if error is not None and not isinstance(error, LiveAvatarError):
            raise error

    def stats(self) -> dict:
        """Figures of this moment: ticks by kind, queues, lateness, latency in seconds by part."""
        g, engine = self.gauges, self._engine
        return {
            "state": self.state, "mode": self.mode, "epoch": self.epoch, "fps": g.fps(self.clock()), "ticks": dict(g.kinds), "late_seconds": g.late,
            "reanchors": self._pacer.reanchors if self._pacer else 0, "interrupts": g.interrupts, "viewers": len(self.broadcast.sinks),
            "playout": vars(self.playout.counts).copy(), "stale_pushes": self.stale_pushes, "first_frame_seconds": g.first_frame_seconds,
            "edges": {"audio_in": {"depth": self.speech.waiting, "capacity": self.speech.limit},
                      "playout": {"depth": len(self.playout) / FPS, "capacity": 2 * float(engine.timeline.geometry.block_seconds) if engine else None},
                      "engine": {"depth": engine.timeline.in_flight if engine else 0, "capacity": None}},
            "av_offset_seconds": 0.0, "av_drift_seconds": 0.0,  # by construction: a tick is one picture and its own sound
            "audio_buffered_seconds": self.speech.waiting, "realtime_factor": self.factor.value,
            "degradation_step": self.rung.step, "left_out": self.rung.what,
            "latency": {"audio wait": engine.timeline.queued_seconds if engine else 0.0, "encode": self.broadcast.encode_seconds,
                        "playout": len(self.playout) / FPS},
        }  # fmt: skip


async def _anything(what: str, text: str) -> None:
    """Nobody minds."""
