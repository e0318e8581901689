"""What is read of a studio at each scrape; what happens in between is told to Metrics where it happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from liveavatar.serving.live import LiveSession
from liveavatar.serving.metrics import SINKS, Level, Metrics, sink_kind
from liveavatar.serving.outputs import Outputs
from liveavatar.serving.probes import watch_process
from liveavatar.serving.settings import MODES
from liveavatar.serving.studio import GROUP, Studio
from liveavatar.telemetry import now as monotonic


def watch_studio(metrics: Metrics, studio: Studio, folder: str | Path) -> None:
    """Sessions, viewers, waiting speech, draining; memory, tasks, and the disk of `folder` (storage.folder, which exists)."""
    live, watch = studio.sessions, metrics.watch
    watch("sessions_active", lambda: [((mode,), sum(session.mode == mode for session in tuple(live.values()))) for mode in MODES])
    watch("sessions_capacity", lambda: [((GROUP,), studio.capacity)])
    watch("viewers_active", lambda: [((kind,), count) for kind, count in _viewers(live).items()])
    watch("filler_active", lambda: [((sink_kind(sink), session.broadcast.filler), 1) for session in tuple(live.values())
                                    for sink in session.broadcast.sinks if session.broadcast.filler is not None])  # fmt: skip
    watch("draining", lambda: [((), studio.draining)])
    metrics.edge("audio_in", lambda: _fullest(live))
    for name in ("audio_buffered_seconds", "degradation_step"):
        watch(name, lambda name=name: [((GROUP,), session.stats()[name]) for session in tuple(live.values())])
    watch_process(metrics, folder)


def watch_outputs(metrics: Metrics, outputs: Outputs, clock: Callable[[], float] = monotonic, wall: Callable[[], float] = time.time) -> None:
    """Destinations and recordings by kind. What they sent and how often they came back is counted when it is read."""
    counted: dict[str, tuple[int, int]] = {}  # of an output: bytes, reconnects

    def up() -> list:
        running = outputs.running()
        for output in running:
            status, (size, reconnects) = output.status, counted.get(output.id, (0, 0))
            metrics.output_sent(output.kind, status.bytes - size)
            metrics.count("output_reconnects_total", status.reconnects - reconnects, output.kind)
            counted[output.id] = status.bytes, status.reconnects
        for gone in counted.keys() - {output.id for output in running}:
            del counted[gone]
        return [((output.kind,), output.status.state == "live") for output in running]

    metrics.watch("output_up", up)
    metrics.watch("output_last_progress_timestamp_seconds", lambda: [
        ((output.kind,), output.status.progress - clock() + wall()) for output in outputs.running() if output.status.progress is not None
    ])  # fmt: skip


def _viewers(live: Mapping[str, LiveSession]) -> Counter:
    counts = Counter(dict.fromkeys(SINKS, 0))
    counts.update(sink_kind(sink) for session in tuple(live.values()) for sink in session.broadcast.sinks)
    return counts


def _fullest(live: Mapping[str, LiveSession]) -> Level:
    """Speech of the session with the most, seconds; what does not fit is refused, not dropped."""
    return max((Level(session.speech.waiting, session.speech.limit, 0) for session in tuple(live.values())), default=Level(0.0, 1.0, 0))
