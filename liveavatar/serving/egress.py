"""A session on air: RTMP, HLS and WHIP destinations, each written by a process of its own that may die (EGR-1 to EGR-4).

    session -> Edge (2 s, then drops to a keyframe) -> Writer -> destination.py: mux() -> server

The encoder never notices: a destination that fails is left for a while and joined again at a fresh IDR, with time stamps
that go on along the session's clock. Keys stay in the job of the process; what people and logs see is redacted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from liveavatar.core import FPS, LiveAvatarError
from liveavatar.serving.packets import H264, Edge, Level, Packet, Tick
from liveavatar.serving.settings import OutputsConfig
from liveavatar.serving.targets import FORMS, Target
from liveavatar.serving.writer import Writer
from liveavatar.telemetry import now

EDGE_SECONDS = 2.0  # of media that wait for a writer
STEADY_SECONDS = 10.0  # live for so long: the next failure is the first of its row
ALERT_FAILURES = 5  # in a row: operators are told
FLV_SECONDS = 20 * 86_400  # FLV counts milliseconds in 31 bits (24.8 days): before that a planned reconnect starts anew


@dataclass(frozen=True, kw_only=True)
class OutputStatus:
    """How a destination does, for API, console and metrics; holds no secret. Times are clock seconds.

    state: connecting, live, waiting (for the next try), closed. failures: in a row. reconnects: connections after the first.
    bytes: of media that the far end took. progress: when it last took some. drops: packets thrown away.
    """

    name: str
    kind: str
    url: str
    state: str = "connecting"
    reconnects: int = 0
    failures: int = 0
    last_error: str | None = None
    bytes: int = 0
    progress: float | None = None
    drops: int = 0


def longest_wait(config: OutputsConfig, failures: int) -> float:
    """Seconds until the next try, at most, after so many failures in a row (EGR-2)."""
    return min(config.retry_limit_seconds, config.retry_seconds * 2 ** min(failures - 1, 30))


class Destination:
    """A Sink (packets.Sink) that keeps a server or folder fed; whoever makes it runs run() as a task until after close().

    width, height: of the encoded pictures. check: url -> address to connect to, awaited before each connection (is the host still
    allowed, where is it?), raises LiveAvatarError. report(event, facts): output.live, output.down, output.failing, output.closed.
    """

    def __init__(
        self, name: str, target: Target, width: int, height: int, config: OutputsConfig, *, ask_keyframe: Callable[[], None] = lambda: None,
        check: Callable[[str], Awaitable[str]] | None = None, report: Callable[[str, dict], None] = lambda event, facts: None,
        clock: Callable[[], float] = now, rng: random.Random | None = None,
    ):  # fmt: skip
        self.name, self.target, self.form = name, target, FORMS[target.kind]
        self.wants = frozenset({H264, self.form.sound})
        self.status = OutputStatus(name=name, kind=target.kind, url=target.shown)
        self.writer: Writer | None = None
        self.left: Callable[[Packet], None] = lambda packet: None  # told of each as it leaves
        self._size, self._config, self._check = (width, height), config, check
        self._ask_keyframe, self._report, self._clock, self._rng = ask_keyframe, report, clock, rng or random.Random()
        self._edge: Edge | None = None  # None: nobody to send to
        self._origin: int | None = None  # tick that is 0 at the far end, the same for all connections
        self._connections, self._lives, self._dropped, self._stale, self._live_since = 0, 0, 0, 0, None
        self._closing = asyncio.Event()

    # ---- the Sink

    def put(self, item: Packet | Tick) -> None:
        """Queue a packet; forgotten while there is no connection."""
        if self._edge is not None:
            self._edge.put(item)

    def flush(self, epoch: int) -> None:
        """Nothing of an older epoch leaves any more."""
        if self._edge is not None:
            self._edge.flush(epoch)

    def close(self) -> None:
        """Send what is queued, say goodbye, end run()."""
        self._closing.set()
        if self._edge is not None:
            self._edge.close()

    def level(self) -> Level:
        """Of the edge; drops and stale packets of all there were."""
        edge = Level(0, EDGE_SECONDS * FPS) if self._edge is None else self._edge.level()
        return edge._replace(drops=self._dropped + edge.drops, stale=self._stale + edge.stale)

    # ---- connections

    async def run(self) -> None:
        """Connect, and connect again, until close()."""
        try:
            while not self._closing.is_set():
                try:
                    await self._connection()
                except (LiveAvatarError, OSError) as error:
                    await self._wait(self._failed(self.target.redact(str(error))))
        finally:
            self._set(state="closed")
            self._report("output.closed", self._facts())

    async def _connection(self) -> None:
        """One life of the writing process. Returns after close(), or when it is time for a new origin."""
        self._set(state="connecting")
        self._live_since = None
        address = None if self._check is None else await self._check(self.target.url)
        self.writer = Writer(self.target.job(address, *self._size, self._lives), self._config.stall_seconds, self._clock, self._progressed)
        try:
            await self.writer.drive(self._feed)
        finally:
            self._drop_edge()
            self._lives += 1

    async def _feed(self, writer: Writer) -> None:
        key = await self._join()
        if key is not None and self.form.live:  # the first packet opens the connection; what came meanwhile is old
            await self._send(writer, key)
            await writer.begun.wait()
            key = await self._join()
        if key is not None:
            await self._send(writer, key)
            await writer.begun.wait()
            self._went_live()
            while (packet := await self._edge.get()) is not None and not self._outlived(packet):
                if packet.seconds >= key.seconds:  # sound of before the first picture
                    await self._send(writer, packet)
        writer.finish()

    async def _join(self) -> Packet | None:
        """A fresh edge and the first keyframe that comes; None after close()."""
        self._drop_edge()
        self._edge = Edge(self.name, seconds=EDGE_SECONDS, sound_seconds=EDGE_SECONDS, ask_keyframe=self._ask_keyframe)
        if self._closing.is_set():
            self._edge.close()
        self._ask_keyframe()
        while (packet := await self._edge.get()) is not None and not (packet.codec == H264 and packet.keyframe):
            pass
        return packet

    async def _send(self, writer: Writer, packet: Packet) -> None:
        if self._origin is None:
            self._origin = packet.pts * FPS // packet.rate
        await writer.send(packet, self._origin)
        self.left(packet)

    def _outlived(self, packet: Packet) -> bool:
        """Whether the field of the time stamps is nearly full; then the next connection counts from its own start."""
        over = self.target.kind == "rtmp" and packet.keyframe and packet.codec == H264 and packet.seconds - self._origin / FPS > FLV_SECONDS
        self._origin = None if over else self._origin
        return over

    def _drop_edge(self) -> None:
        if self._edge is not None:
            self._dropped, self._stale = self._dropped + self._edge.drops, self._stale + self._edge.stale
        self._edge = None
        self._set(drops=self._dropped)

    # ---- what others see

    def _set(self, **changes) -> None:
        self.status = replace(self.status, **changes)

    def _facts(self) -> dict:
        return {"output": self.name, "kind": self.target.kind, "url": self.target.shown}

    def _progressed(self, size: int) -> None:
        self._set(bytes=self.status.bytes + size, progress=self._clock(), drops=self.level().drops)
        if self._live_since is not None and self.status.failures and self._clock() - self._live_since > STEADY_SECONDS:
            self._set(failures=0)

    def _went_live(self) -> None:
        self._connections, self._live_since = self._connections + 1, self._clock()
        self._set(state="live", reconnects=self._connections - 1)
        self.target.tidy(self._lives)
        self._report("output.live", {**self._facts(), "reconnects": self.status.reconnects})

    def _failed(self, reason: str) -> float:
        """Note a failure; the seconds to wait: exponential with full jitter (EGR-2)."""
        failures = self.status.failures + 1
        self._set(state="waiting", failures=failures, last_error=reason)
        self._report("output.down", {**self._facts(), "reason": reason, "failures": failures})
        if failures == ALERT_FAILURES:
            self._report("output.failing", {**self._facts(), "reason": reason, "failures": failures})
        return self._rng.uniform(0, longest_wait(self._config, failures))

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
