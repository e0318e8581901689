"""A running server told to Metrics: the chain, its sessions, and every tick that leaves them.

Made before the studio and handed to it: Studio(config, watch=monitor.chain, notes=monitor.note, opened=monitor.opened);
then monitor.studio(studio). Nothing here decides anything: a server without a monitor runs the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from liveavatar.core import FPS
from liveavatar.serving.live import LiveSession
from liveavatar.serving.metrics import SINKS, Level, Metrics
from liveavatar.serving.packets import Sink, Tick
from liveavatar.serving.settings import MODES
from liveavatar.serving.stages import Stages
from liveavatar.serving.studio import Studio
from liveavatar.telemetry import now as monotonic

DEAD_BAND = 0.01  # s a picture may be late (CLK-2)
SETTLE_TICKS = FPS  # a session's counters are read so often, and when it ends
ENDS = {"closed": "closed", "draining": "drain", "the server stops": "drain"}  # reason of LiveSession.close -> label


def sink_kind(sink: Sink) -> str:
    """The label of a sink: what it has as `kind` or stands before the colon of its name ("webrtc:4f2a"); others are sockets."""
    kind = getattr(sink, "kind", None) or sink.name.split(":")[0]
    return kind if kind in SINKS else "socket"


@dataclass
class _Seen:
    """Of one session: what was counted already."""

    at: float | None = None  # clock seconds of its last tick
    filler: tuple[tuple[str, str], ...] = ()  # (output, reason) of now
    counted: Counter = field(default_factory=Counter)
    first_frame: float | None = None
    ticks: int = 0
    ends: list[Callable[[], None]] = field(default_factory=list)


class Monitor:
    """See the module. kind: of the engine (settings.ENGINES). spans: takes the engine's notes too (spans.Spans.note)."""

    def __init__(self, metrics: Metrics, kind: str, *, group: str = "0", spans: Callable[[dict], None] | None = None,
                 clock: Callable[[], float] = monotonic):  # fmt: skip
        self.metrics, self.kind, self.group, self.clock = metrics, kind, group, clock
        self.stages = Stages(metrics, group=group, engine=kind, clock=clock)
        self._spans, self._lost = spans, None
        self._seen: dict[str, _Seen] = {}

    def studio(self, studio: Studio) -> None:
        """Read its gauges at each scrape."""
        live, watch = studio.sessions, self.metrics.watch
        watch("sessions_active", lambda: [((mode,), sum(session.mode == mode for session in tuple(live.values()))) for mode in MODES])
        watch("sessions_capacity", lambda: [((self.group,), studio.capacity)])
        watch("viewers_active", lambda: [((kind,), count) for kind, count in self._viewers(live).items()])
        watch("audio_buffered_seconds", lambda: [((self.group,), session.speech.waiting) for session in tuple(live.values())])
        watch("filler_active", lambda: [(labels, 1) for seen in self._seen.values() for labels in seen.filler])
        watch("draining", lambda: [((), studio.draining)])

    def _viewers(self, live: Mapping[str, LiveSession]) -> Counter:
        counts = Counter(dict.fromkeys(SINKS, 0))
        counts.update(sink_kind(sink) for session in tuple(live.values()) for sink in session.broadcast.sinks)
        return counts

    # ------------------------------------------------------------ the chain

    def note(self, line: dict) -> None:
        """A line of the engine's trace."""
        self.stages.note(line)
        if self._spans is not None:
            self._spans(line)

    def chain(self, name: str, data: Mapping) -> None:
        """What Studio tells of its chain."""
        match name:
            case "warm":
                self.metrics.engine_up(self.group, True)
            case "engine_lost":
                self._lost = self.clock()
                self.metrics.engine_up(self.group, False)
            case "engine_failed":
                self.metrics.engine_restarted(self.group, "start")
            case "engine_up":
                self.metrics.engine_up(self.group, True)
                self.metrics.engine_restarted(self.group, "rank_failure")
                self.metrics.engine_restored(self.group, self.clock() - self._lost)
                self._lost = None

    # ------------------------------------------------------------ sessions

    def opened(self, session: LiveSession, seconds: float) -> None:
        """A session runs, so long after it was asked for."""
        self.metrics.session_created(session.mode, self.kind, seconds)
        seen = self._seen[session.id] = _Seen()
        seen.ends.append(self.metrics.edge("audio_in", lambda: Level(session.speech.waiting, session.speech.limit, 0)))
        session.broadcast.seen = lambda tick, sinks, encoded: self._ticked(session, tick, sinks, encoded)
        session.on_end(lambda: self._ended(session))

    def _ended(self, session: LiveSession) -> None:
        seen = self._seen.pop(session.id)
        self._settle(session, seen)
        for end in seen.ends:
            end()
        self.metrics.session_ended("failed" if session.state == "failed" else ENDS.get(session.reason, "closed"))

    def _ticked(self, session: LiveSession, tick: Tick, sinks: Iterable[Sink], encoded: Mapping[str, float]) -> None:
        """A tick left for these sinks; encoded: codec -> seconds it took."""
        seen, now = self._seen[session.id], self.clock()
        kinds = [sink_kind(sink) for sink in sinks]
        for kind in kinds:
            self.metrics.frames_sent(kind, interval=None if seen.at is None else now - seen.at, late=tick.late > DEAD_BAND)
        for codec, seconds in encoded.items():
            self.metrics.encoded(codec, seconds)
        seen.filler = ()
        if tick.kind == "filler":
            self._fill(seen, kinds)
        seen.at, seen.ticks = now, seen.ticks + 1
        if seen.ticks % SETTLE_TICKS == 0:
            self._settle(session, seen)

    def _fill(self, seen: _Seen, kinds: list[str]) -> None:
        reason = "restart" if self._lost is not None else "underrun" if kinds else "parked"
        self.metrics.frames_repeated(reason)
        seen.filler = tuple((kind, reason) for kind in sorted(set(kinds)))
        for kind in kinds:
            self.metrics.filler(kind, reason, 1 / FPS)

    def _settle(self, session: LiveSession, seen: _Seen) -> None:
        """Count what the session counted since the last time."""
        now = session.stats()
        for key, total, count in (
            ("interrupts", now["interrupts"], lambda n: self.metrics.count("interrupts_total", n, "api")),
            ("reanchors", now["reanchors"], lambda n: self.metrics.count("clock_reanchors_total", n, "late")),
            ("stale", now["playout"]["stale"], lambda n: self.metrics.stale_dropped("playout", n)),
            ("stale_pushes", now["stale_pushes"], lambda n: self.metrics.stale_dropped("audio_in", n)),
            ("skipped", now["playout"]["skipped"] + now["playout"]["hurried"], lambda n: self.metrics.frames_dropped("playout", n)),
        ):  # fmt: skip
            count(total - seen.counted[key])
            seen.counted[key] = total
        if (first := now["first_frame_seconds"]) is not None and first is not seen.first_frame:
            self.metrics.first_frame(self.kind, first)
            seen.first_frame = first
