"""What is read of a studio at each scrape; what happens in between is told to Metrics where it happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from liveavatar.serving.consent import ConsentLog
from liveavatar.serving.live import LiveSession
from liveavatar.serving.metrics import SINKS, Metrics, sink_kind
from liveavatar.serving.outputs import Outputs
from liveavatar.serving.probes import watch_process
from liveavatar.serving.settings import MODES, ServeConfig
from liveavatar.serving.signing import CHAIN, expiry, read
from liveavatar.serving.store import AvatarStore
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
    for name in ("audio_buffered_seconds", "degradation_step"):
        watch(name, lambda name=name: [((GROUP,), session.stats()[name]) for session in tuple(live.values())])
    watch_process(metrics, folder)


def watch_outputs(metrics: Metrics, outputs: Outputs, clock: Callable[[], float] = monotonic, wall: Callable[[], float] = time.time) -> None:
    """Destinations and recordings by kind. What they sent and how often they came back is counted when it is read."""
    counted: dict[str, tuple[int, int]] = {}  # of an output: bytes, reconnects

    def up() -> list:
        known = outputs.known()  # also those that ended since the last scrape: what they sent counts
        for output in known:
            status, (size, reconnects) = output.status, counted.get(output.id, (0, 0))
            metrics.output_sent(output.kind, status.bytes - size)
            metrics.output_reconnected(output.kind, status.reconnects - reconnects)
            counted[output.id] = status.bytes, status.reconnects
        for gone in counted.keys() - {output.id for output in known}:
            del counted[gone]
        return [((output.kind,), output.status.state == "live") for output in outputs.running()]

    metrics.watch("output_up", up)
    metrics.watch("output_last_progress_timestamp_seconds", lambda: [
        ((output.kind,), output.status.progress - clock() + wall()) for output in outputs.running() if output.status.progress is not None
    ])  # fmt: skip


def watch_dates(metrics: Metrics, settings: ServeConfig, studio: Studio, store: AvatarStore, consents: ConsentLog) -> None:
    """When the certificates end that were loaded at start, and the first consent of the avatars that are shown. Raises ConfigError."""
    listen, signing = settings.listen, settings.provenance
    signed_with = signing.certificate or str(Path(settings.storage.folder) / CHAIN)
    for label, file in (("tls", listen.certificate), ("c2pa", signed_with if signing.sign else None)):
        if file is not None:
            metrics.gauge("certificate_expiry_timestamp_seconds", expiry(read(Path(file))), label)

    def consent() -> list:
        shown = {session.avatar for session in tuple(studio.sessions.values())}
        used = {avatar.consent for avatar in store.list(lambda owner: True) if avatar.id in shown}
        return [((), consent.expires) for consent in consents.all() if consent.id in used and consent.expires is not None]

    metrics.watch("consent_expiry_timestamp_seconds", consent)


def _viewers(live: Mapping[str, LiveSession]) -> Counter:
    counts = Counter(dict.fromkeys(SINKS, 0))
    counts.update(sink_kind(sink) for session in tuple(live.values()) for sink in session.broadcast.sinks)
    return counts
