"""The head's side of a chain: opens sessions (session.py), sends what they ask for, hands them what comes up. It never touches a model.

Three tasks share one event loop. The pump sends: control messages first, then the block the scheduler
names. The reader (a thread of its own, since Chain.receive blocks) hands what comes up to its session. The
client iterates. Bounds: audio not yet admitted (`runtime.queued_seconds`, push_audio waits); blocks
admitted and not yet taken (`runtime.in_flight`, admission waits); control messages (each call waits until
its message is on the way).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import torch

from liveavatar import core
from liveavatar.conditioning.framing import Fitted, fit_portrait
from liveavatar.conditioning.identity import as_picture
from liveavatar.conditioning.prompt import clean
from liveavatar.config import Config, one_of
from liveavatar.core import ConfigError, InputError, LiveAvatarError, Message, PlacementError, SessionClosed
from liveavatar.runtime import placement
from liveavatar.runtime.chains import Chain
from liveavatar.runtime.intake import whole
from liveavatar.runtime.launchers import launch
from liveavatar.runtime.roles import Recent
from liveavatar.runtime.scheduler import PACES, Scheduler, prepare
from liveavatar.runtime.seats import seats_of
from liveavatar.runtime.session import Session, Signal
from liveavatar.runtime.sources import StageSource, open_source
from liveavatar.runtime.tracing import open_trace
from liveavatar.telemetry import NoTrace, Trace
from liveavatar.telemetry import now as monotonic

POLL_SECONDS = 0.2  # the reader looks up this often to see whether it shall end


class Engine:
    """A running chain and its sessions. `await Engine.start(config)`; then open sessions; then aclose().

    finish_after: only so many denoising steps of every block that is admitted from now on: None (all) or placement.fewer_steps.
    """

    def __init__(self, config: Config, source: StageSource, chain, clock: Callable[[], float], trace: Trace | NoTrace):
        self.config, self.source, self.chain, self.clock, self.trace = config, source, chain, clock, trace
        self.geometry = source.geometry
        self.scheduler = Scheduler(credits=config.runtime.in_flight or placement.blocks_inside(config.stages, config.runtime.shift_register) + 1,
                                   longest=float(source.geometry.block_seconds))
        self.finish_after: int | None = None
        self.sessions: dict[str, Session] = {}
        self.failure: LiveAvatarError | None = None
        self._portraits, self._fitting = Recent(), threading.Lock()
        self._outbox: deque[tuple[Message, asyncio.Future]] = deque()
        self._work, self._opened_so_far, self._closing = Signal(), 0, False
        self._sender, self._receiver = ThreadPoolExecutor(1, "head-send"), ThreadPoolExecutor(1, "head-receive")
        self._tasks: list[asyncio.Task] = []
        self._clearing: set[asyncio.Task] = set()  # sessions whose opening was cancelled

    @classmethod
    async def start(cls, config: Config, launcher: str | None = None, clock: Callable[[], float] = monotonic,
                    watch: Callable[[dict], None] | None = None) -> Engine:
        """Load the chain of `config` onto its ranks.

        launcher: instead of config.runtime.launcher. watch: is given every line of the trace as it happens, with or
        without a file, and must return at once; spans come where runtime.spans or runtime.trace asks for them. Raises
        ConfigError, WeightsError, PlacementError (with numbers, when memory is too little) and RankFailure (a rank
        could not start).
        """
        config, source = resolve(config if launcher is None else with_launcher(config, launcher))
        trace = open_trace(config, source, clock, watch)
        return cls.over(config, source, await _launched(config), clock, trace)

    @classmethod
    def over(cls, config: Config, source: StageSource, chain: Chain, clock: Callable[[], float] = monotonic,
             trace: Trace | NoTrace | None = None) -> Engine:
        """The head of a chain that is ready, whoever made it. config: with its stages written out."""
        engine = cls(config, source, chain, clock, trace or NoTrace())
        engine._tasks = [asyncio.create_task(engine._pump()), asyncio.create_task(engine._read())]
        for task in engine._tasks:
            task.add_done_callback(engine._ended)
        return engine

    # ------------------------------------------------------------ sessions

    async def open(self, picture, *, prompt: str | None = None, seed: int | None = None, name: str | None = None,
                   pace: str = "offline") -> Session:
        """A new session, primed: block 0 can be asked for.

        picture: a path, bytes, uint8 [3, H0, W0] or what `fitted` gave. prompt, seed: None takes the config's. name: unique among
        live ones and part of the noise's seed; None: "session-0", ... in order of opening. pace: "offline", as
        fast as it goes, or "live", just in time and silence where audio is missing. Raises InputError,
        PlacementError when the chain is full, RankFailure.
        """
        self._check()
        one_of("pace", pace, PACES)
        if len(self.sessions) >= self.config.runtime.sessions:
            raise PlacementError(f"the chain holds {self.config.runtime.sessions} session(s) (runtime.sessions) and all are taken")
        name = self._name(name)
        self._opened_so_far += 1
        session = self.sessions[name] = Session(self, name, pace)
        self.trace.open(name, pace)
        try:
            fitted = await self.fitted(picture)
            message = core.Open(name, seed=whole(self.config.seed if seed is None else seed),
                                prompt=clean(self.config.prompt if prompt is None else prompt), picture=fitted.pixels)
            session._check()  # closed meanwhile: nothing may reach the chain behind its Close
            self.trace.portrait(name, fitted.box)
            await self.send(message)
            while not session.opened:
                session._check()
                await session.changed.wait()
        except LiveAvatarError:
            await self._discard(session)
            raise
        except asyncio.CancelledError:  # the caller is gone: clear up behind its back
            self._clearing.add(task := asyncio.create_task(self._discard(session)))
            task.add_done_callback(self._clearing.discard)
            raise
        self.wake()
        return session

    def _name(self, name: str | None) -> str:
        """`name`, or the next free "session-N". Raises InputError."""
        if name is None:
            numbered = (f"session-{n}" for n in count(self._opened_so_far))
            return next(free for free in numbered if free not in self.sessions)
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(f"session name {name!r}: must be text on one line")
        if not name or name in self.sessions:
            raise InputError(f"session name {name!r} is {'taken' if name else 'empty'}")
        return name

    async def _discard(self, session: Session) -> None:
        """Forget a session that could not open; whatever it left in the chain is cleared."""
        with contextlib.suppress(LiveAvatarError):  # the chain failed: nothing is left to clear
            await session.close()
        if self.sessions.get(session.name) is session:  # since its Closed came, another may have the name
            del self.sessions[session.name]

    async def fitted(self, picture) -> Fitted:
        """A portrait in this engine's size, cut as the checkpoint's framing asks for. Raises InputError."""
        return picture if isinstance(picture, Fitted) else await asyncio.to_thread(self._fit, picture)

    def _fit(self, picture) -> Fitted:
        """The same on a thread; the last few portraits are remembered, so that a face is looked for, and spoken of, once."""
        given, g = as_picture(picture).contiguous(), self.geometry
        key = given.shape, hashlib.blake2b(given.numpy()).digest()
        with self._fitting:
            return self._portraits.get(key, lambda: fit_portrait(given, g.height, g.width, self.source.framing))

    async def aclose(self) -> None:
        """Stop the chain; every session ends. No process or thread of the engine is left. May be called often."""
        if self._closing:
            return
        self._closing = True
        self._fail(SessionClosed("the engine was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.chain.stop)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in (self._sender, self._receiver):
            await asyncio.to_thread(executor.shutdown)
        self.trace.close()

    # ------------------------------------------------------------ sending

    def wake(self) -> None:
        """Something changed: the pump looks again."""
        self._work.fire()

    async def send(self, message: Message) -> None:
        """Put a control message on the road, before the next block; returns when it is on its way."""
        self._check()
        sent = asyncio.get_running_loop().create_future()
        self._outbox.append((message, sent))
        self.wake()
        await sent

    async def _pump(self) -> None:
        while True:
            if self._outbox:
                message, sent = self._outbox[0]  # stays until it is on its way: a failure meanwhile reaches its sender
                await self._put(message)
                if self.failure is None:
                    self._outbox.popleft()
                if not sent.done():
                    sent.set_result(None)
            else:
                await self._admit_or_wait()

    async def _admit_or_wait(self) -> None:
        now = self.clock()
        candidates = [c for s in self.sessions.values() if (c := s.candidate())]
        decision = self.scheduler.decide(now, candidates)
        chosen = decision.admit or decision.late
        if chosen is None:
            if not await self._renew():
                await self._work.wait(None if decision.wake is None else max(0.0, decision.wake - now))
            return
        session, waiting = self.sessions[chosen], self.sessions[chosen].timeline.queued_seconds
        if decision.late:
            session.timeline.idle()
        session.asked = now
        prepare(session.playout, session.timeline, now, self.scheduler.pipe_time.typical)
        messages = session.timeline.admit(now, self.finish_after)
        self.trace.admitted(messages, waiting, session.timeline.queued_seconds)
        session.changed.fire()  # there is room for audio again
        for message in messages:
            await self._put(message)

    async def _renew(self) -> bool:
        """Nothing may be admitted yet: send a new sink that is ready, so that no block waits for its prefill."""
        for session in self.sessions.values():
            if not session.closing and (refresh := session.timeline.renew()):
                self.trace.refresh(refresh)
                await self._put(refresh)
                return True
        return False

    async def _put(self, message: Message) -> None:
        await asyncio.get_running_loop().run_in_executor(self._sender, self.chain.send, message)

    # ------------------------------------------------------------ receiving

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing:
            message = await loop.run_in_executor(self._receiver, self.chain.receive, POLL_SECONDS)
            if isinstance(message, core.Span):
                self.trace.span(message)
            elif message is not None and message.session in self.sessions:
                self._received(self.sessions[message.session], message)

    def _received(self, session: Session, message: Message) -> None:
        for seen in session.observed:
            seen.take(message)
        match message:
            case core.Opened():
                session.opened = True
                self.trace.note("opened", session=session.name)
            case core.Closed():
                session.closed = True
                self.trace.closed(session.name)
                del self.sessions[session.name]
            case core.Failed():
                session.fail(InputError(message.reason))
            case core.CleanLatent():
                session.timeline.clean(message)
            case core.Frames():
                admitted = session.timeline.frames(message)
                self.scheduler.pipe_time.observe(self.clock() - admitted.at)
                self.trace.note("ready", session=session.name, epoch=admitted.epoch, block=message.index, count=admitted.pictures)
        session.changed.fire()
        self.wake()

    # ------------------------------------------------------------ failure

    def _ended(self, task: asyncio.Task) -> None:
        """The pump or the reader stopped: by aclose, or because the chain failed."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)
            self._sender.submit(self.chain.stop)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            for session in self.sessions.values():
                session.fail(error)
            while self._outbox:
                sent = self._outbox.popleft()[1]
                if not sent.done():
                    sent.set_exception(error)
            self.wake()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure


# ---------------------------------------------------------------- before the start


async def _launched(config: Config):
    """launch(config) on a thread; when cancelled (Ctrl-C while loading), what was started is stopped first."""
    starting = asyncio.get_running_loop().run_in_executor(None, launch, config)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        chain = await starting
        await asyncio.to_thread(chain.stop)
        raise


def with_launcher(config: Config, launcher: str) -> Config:
    """config with another runtime.launcher."""
    return replace(config, runtime=replace(config.runtime, launcher=launcher))


def resolve(config: Config) -> tuple[Config, StageSource]:
    """The config with its stages and size written out, and what it runs; refuses what cannot work.

    Raises ConfigError, WeightsError, PlacementError.
    """
    source = open_source(config)
    stages = config.stages or (source.chain,)
    placement.check_cut(stages, source.chain)
    placement.check_together(config, stages)
    placement.check_shards(config, stages, source.model_config, source.geometry)
    g = source.geometry
    config = replace(config, stages=stages, video=replace(config.video, height=g.height, width=g.width))
    least = float(g.block_seconds) + source.lookahead_samples / core.SAMPLE_RATE
    if config.runtime.queued_seconds < least:
        raise ConfigError(f"runtime.queued_seconds={config.runtime.queued_seconds}: a block and its look-ahead need {least:.3f}")
    if config.runtime.launcher != "ray":  # Ray places ranks on machines this process does not see
        plan_for(config, source).refuse()
    return config, source


def plan_for(config: Config, source: StageSource, devices: Sequence[placement.Device] | None = None) -> placement.Plan:
    """What every rank of `config` would load on `devices`; None: on this machine's."""
    stages = config.stages or (source.chain,)
    devices = devices or placement.local_devices(config.model.device, len(seats_of(config, stages)))
    return placement.plan(config, source.model_config, source.geometry, devices, stages=stages,
                          dtype=source.dtype(torch.device(devices[0].kind)), vae=source.vae_config,
                          text_encoder_bytes=source.text_encoder_bytes)
