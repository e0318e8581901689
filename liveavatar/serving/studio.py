"""The one chain of a server and the sessions on it. It outlives the chain: a dead one is started again underneath them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from liveavatar import __version__
from liveavatar.conditioning.framing import Fitted
from liveavatar.core import LiveAvatarError, RankFailure
from liveavatar.runtime.engine import Engine, Session, resolve
from liveavatar.runtime.placement import cut, fewer_steps
from liveavatar.runtime.scheduler import PipeTime
from liveavatar.serving.ladder import FEWER_STEPS, IDLE_LOOP, LOWER_FPS, SMALLER, Ladder
from liveavatar.serving.live import LiveSession
from liveavatar.serving.logs import about
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.problems import Capacity
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.testcard import start_test_card
from liveavatar.serving.traffic import watch_session
from liveavatar.telemetry import now as monotonic

WARM_BLOCKS = 6  # made before anybody is let in, to see how fast the chain is; its ranks are warm by then
WATCH_SECONDS = 0.05  # between two looks at the chain and at how the sessions do
PAUSES = (0.0, 1.0, 5.0, 15.0, 30.0)  # before starting a dead chain again, seconds; the last goes on for ever
GROUP = "0"  # the metrics' name of the one chain a studio has
TRIES_PER_CUT = 2  # failed starts before the chain is cut for one rank less (pipeline.md section 5, fold-down)

Mark = Callable[[np.ndarray], np.ndarray]


class Studio:
    """Sessions by id, on an engine that is kept alive.

    marker: makes what is drawn into a session's pictures: (session's role, height, width) -> uint8 [H, W, 3] -> the same.
    watch: told what happens to the chain: (name, data). notes: is given every line of the engine's trace as it happens.
    """

    def __init__(self, config: ServeConfig, *, marker: Callable[[Role, int, int], Mark] | None = None,
                 watch: Callable[[str, dict], None] = lambda name, data: None, notes: Callable[[dict], None] | None = None,
                 metrics: Metrics | None = None, clock: Callable[[], float] = monotonic):  # fmt: skip
        self.config, self.clock, self.watch, self.metrics = config, clock, watch, metrics or Metrics(version=__version__)
        self.sessions: dict[str, LiveSession] = {}
        self.engine: Engine | None = None
        self.draining, self.restarts, self.factor = False, 0, 0.0
        self.capacity = config.engine.runtime.sessions
        self.started_at = clock()
        self._marker = marker or (lambda role, height, width: lambda picture: picture)
        self._notes = notes
        self._encoding = ThreadPoolExecutor(4, "encode")
        self._up, self._reserved = asyncio.Event(), 0
        self._ladder = Ladder(())
        self._watching: asyncio.Task | None = None

    # ------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Load the chain and warm it; sessions are let in afterwards. Harmless the second time. Raises what Engine.start raises."""
        if self.engine is not None:
            return
        self.engine = await self._launch(self.config)
        await self._warm()
        if self.config.sessions.degrade:
            self._ladder = Ladder(((FEWER_STEPS,) if fewer_steps(self.engine.config) else ()) + (LOWER_FPS, SMALLER, IDLE_LOOP))
        self._alive(True)
        self._watching = asyncio.create_task(self._watch())

    async def _launch(self, config: ServeConfig) -> Engine:
        if config.engine_kind == "testcard":
            return start_test_card(config.engine, clock=self.clock, watch=self._notes)
        engine = config.engine if self._notes is None else replace(config.engine, runtime=replace(config.engine.runtime, spans=True))
        return await Engine.start(engine, clock=self.clock, watch=self._notes)

    async def _warm(self) -> None:
        """Before a chain is given to sessions: run a few blocks, measure how many times faster than real time they come (BP-4) and how long one takes alone."""
        g = self.engine.geometry
        session = await self.engine.open(Fitted(torch.full((3, g.height, g.width), 128, dtype=torch.uint8)), name="warm-up")
        await session.push_audio(np.zeros((WARM_BLOCKS + 1) * g.samples_per_block - 1, np.float32))  # the last one lacks its look-ahead
        times = [self.clock() for _ in range(WARM_BLOCKS) if await anext(session)]
        began = self.clock()
        await session.end_audio()
        await anext(session)
        self.engine.scheduler.pipe_time = PipeTime(initial=self.clock() - began)
        await session.close()
        self.factor = (len(times) - 1) * float(g.block_seconds) / max(1e-9, times[-1] - times[0])
        room = math.floor(self.factor * (1 - self.config.sessions.headroom))
        self.capacity = max(1, min(self.config.engine.runtime.sessions, room))  # one is let in even where it will be slow
        self.watch("warm", {"factor": self.factor, "capacity": self.capacity})

    @property
    def reasons(self) -> list[str]:
        """Why no session can be opened now; empty: ready."""
        why = [] if self._up.is_set() else ["the chain is not up"]
        why += ["draining"] if self.draining else []
        why += ["too slow already for the sessions that run"] if self._ladder.rung.step else []
        return why + ([] if self._room > 0 else [f"all {self.capacity} sessions are taken"])

    @property
    def alive(self) -> bool:
        """The chain runs."""
        return self._up.is_set()

    async def aclose(self) -> None:
        """End sessions and chain. May be called often."""
        self.draining = True
        await asyncio.gather(*(session.close("drain") for session in tuple(self.sessions.values())))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self.engine is not None:
            await self.engine.aclose()
        self._encoding.shutdown()

    # ------------------------------------------------------------ sessions

    @property
    def _room(self) -> int:
        return self.capacity - len(self.sessions) - self._reserved

    async def open(self, role: Role, *, mode: str | None = None, config: ServeConfig | None = None) -> LiveSession:
        """A running session. config: of its profile; None: the server's own. Raises Capacity (full, draining or no chain),
        InputError (portrait, prompt)."""
        if self.reasons:
            raise Capacity("; ".join(self.reasons), kind="draining" if self.draining else "capacity")
        self._reserved += 1
        began = self.clock()
        try:
            fitted = await self.engine.fitted(role.picture)
            still, role = fitted.pixels.permute(1, 2, 0).numpy(), replace(role, picture=fitted, prompt=role.prompt or self.config.engine.prompt)
            session = LiveSession(role, config or self.config, still, reopen=self._reopen, executor=self._encoding, mode=mode, clock=self.clock,
                                  metrics=self.metrics, marks=lambda role: self._marker(role, *still.shape[:2]))  # fmt: skip
            engine_session = await self._opened(role)  # last: whatever fails before leaves no place in the chain taken
        finally:
            self._reserved -= 1
        self.sessions[session.id] = session
        with about(session=session.id):
            session.start(engine_session)
        self.metrics.session_created(session.mode, self.config.engine_kind, self.clock() - began)
        session.on_end(lambda: self.sessions.pop(session.id, None))
        watch_session(self.metrics, session, lambda: self.engine)
        return session

    async def _opened(self, role: Role) -> Session:
        return await self.engine.open(role.picture, prompt=role.text, seed=role.seed, pace="live")

    async def _reopen(self, role: Role) -> Session:
        """An engine session in place of one whose chain died; waits for the next chain, however long that takes."""
        while True:
            await self._up.wait()
            if self.engine.failure is None:
                try:
                    return await self._opened(role)
                except RankFailure:
                    continue  # died again while it opened
            await asyncio.sleep(WATCH_SECONDS)  # the watcher has not seen it yet

    # ------------------------------------------------------------ a chain that died

    def _alive(self, alive: bool) -> None:
        (self._up.set if alive else self._up.clear)()
        self.metrics.engine_up(GROUP, alive)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self.engine.failure is not None:
                self._alive(False)
                self.watch("engine_lost", {"reason": str(self.engine.failure)})
                await self._revive()
            self._weigh()

    def _weigh(self) -> None:
        """Leave out more, or less, where the sessions say so (BP-2)."""
        factor = min((session.factor.value for session in self.sessions.values()), default=None)
        if self._ladder.look(self.clock(), factor):
            rung = self._ladder.rung
            self.watch("degraded", {"step": rung.step, "left_out": rung.what, "factor": factor})
            self._shorten()
            for session in self.sessions.values():
                session.degrade(rung)

    def _shorten(self) -> None:
        self.engine.finish_after = fewer_steps(self.engine.config) if self._ladder.rung.step >= FEWER_STEPS.step else None

    async def _revive(self) -> None:
        """Start the chain again, with growing pauses; where that keeps failing, on one rank less."""
        lost = self.clock()
        await self.engine.aclose()
        for attempt in range(1 << 30):
            await asyncio.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])
            try:
                self.engine = await self._launch(self._folded(attempt // TRIES_PER_CUT))
                await self._warm()  # on fewer ranks it is slower, and its blocks go so much earlier
            except LiveAvatarError as error:
                await self.engine.aclose()
                self.watch("engine_failed", {"reason": str(error), "attempt": attempt + 1})
                continue
            self._shorten()
            self.restarts += 1
            self._alive(True)
            self.metrics.engine_restarted(GROUP, "rank_failure")
            self.metrics.engine_restored(GROUP, self.clock() - lost)
            self.watch("engine_up", {"attempts": attempt + 1, "ranks": len(self.engine.config.stages)})
            return

    def _folded(self, fewer: int) -> ServeConfig:
        """The config with its chain cut for so many ranks less, at least one."""
        engine = self.config.engine
        if not fewer or self.config.engine_kind == "testcard":
            return self.config
        ranks = max(1, len(resolve(engine)[0].stages) - fewer)
        runtime = replace(engine.runtime, shards=None)  # they were said for the cut as it was
        return replace(self.config, engine=replace(engine, stages=cut(engine.chain, ranks), runtime=runtime))
