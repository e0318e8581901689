"""What is read of a studio at each scrape; what happens in between is told to Metrics where it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from liveavatar.serving.live import LiveSession
from liveavatar.serving.metrics import SINKS, Level, Metrics, sink_kind
from liveavatar.serving.probes import watch_process
from liveavatar.serving.settings import MODES
from liveavatar.serving.studio import GROUP, Studio


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


def _viewers(live: Mapping[str, LiveSession]) -> Counter:
    counts = Counter(dict.fromkeys(SINKS, 0))
    counts.update(sink_kind(sink) for session in tuple(live.values()) for sink in session.broadcast.sinks)
    return counts


def _fullest(live: Mapping[str, LiveSession]) -> Level:
    """Speech of the session with the most, seconds; what does not fit is refused, not dropped."""
    return max((Level(session.speech.waiting, session.speech.limit, 0) for session in tuple(live.values())), default=Level(0.0, 1.0, 0))
