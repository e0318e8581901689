"""`liveavatar serve`: one process that is a studio and its doors, put together from the settings."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from pathlib import Path

import structlog

from liveavatar import __version__
from liveavatar.serving import listen, logs, spans
from liveavatar.serving.app import create_app
from liveavatar.serving.badge import Badge
from liveavatar.serving.durable import private_folder
from liveavatar.serving.live import Role
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.monitor import watch_outputs, watch_studio
from liveavatar.serving.probes import find_gpus
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.stages import Stages
from liveavatar.serving.studio import Mark, Studio
from liveavatar.serving.watermark import Watermark, server_key

log = structlog.get_logger("liveavatar.server")


def run(settings: ServeConfig, say: Callable[[str], None] = print) -> None:
    """Serve until told to end. say: lines for the person who started it: the address, and once the first key.

    Raises LiveAvatarError (weights, memory, files), OSError for a port that is taken.
    """
    logs.configure(settings.monitoring.log_level, settings.monitoring.log_format)
    asyncio.run(_serve(settings, say))


async def _serve(settings: ServeConfig, say: Callable[[str], None]) -> None:
    listening = listen.bind(settings)
    gpus = find_gpus()
    metrics = Metrics(version=__version__, gpus=gpus.names if gpus else ())
    stages = Stages(metrics, engine=settings.engine_kind)
    provider = spans.provider(settings.monitoring.otlp, __version__) if settings.monitoring.otlp else None
    watchers = [stages.note] + ([spans.Spans(provider.get_tracer("liveavatar")).note] if provider else [])

    def notes(line: dict) -> None:
        for watcher in watchers:
            watcher(line)

    studio = Studio(settings, marker=marker(settings), metrics=metrics, notes=notes, watch=lambda name, data: log.info(name, **data))
    watch_studio(metrics, studio, private_folder(Path(settings.storage.folder)))
    if gpus is not None:
        gpus.watch(metrics)
    app = create_app(studio, settings, metrics=metrics, stages=stages)
    watch_outputs(metrics, app.state.services.outputs)
    if (key := app.state.services.access.first_key()) is not None:
        say(f"first key, shown this once (scopes: all): {key}")
    try:
        await listen.serve(app, settings, opened=lambda url: say(f"listening on {url}"), listening=listening)
    finally:
        if provider is not None:
            provider.shutdown()


def marker(settings: ServeConfig) -> Callable[[Role, int, int], Mark]:
    """What is drawn into the pictures of a session: the badge, then the watermark. What is switched off is logged."""
    provenance = settings.provenance
    for name in ("watermark", "badge", "sign"):
        if not getattr(provenance, name):
            log.warning("provenance_off", what=name)
    said, folder = provenance.watermark_key_file, Path(settings.storage.folder)
    key = server_key(folder, Path(said) if said else None) if provenance.watermark else b""

    def made(role: Role, height: int, width: int) -> Mark:
        steps = [Badge(provenance.badge_text, height, width).draw] if provenance.badge else []
        steps += [Watermark(key, payload(role), height, width).mark] if provenance.watermark else []

        def mark(picture):
            for step in steps:
                picture = step(picture)
            return picture

        return mark

    return made


def payload(role: Role) -> int:
    """What the watermark of a session says, 32 bits: a checksum of owner and avatar, which a server can find again in its logs."""
    return zlib.crc32(f"{role.owner}\n{role.avatar}".encode())

