"""`liveavatar serve`: one process that is a studio and its doors, put together from the settings."""

from __future__ import annotations

import asyncio
import fcntl
import math
import signal
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog
from fastapi import FastAPI

from liveavatar import __version__
from liveavatar.core import LiveAvatarError
from liveavatar.serving import listen, logs, spans
from liveavatar.serving.app import create_app
from liveavatar.serving.audit import FILE
from liveavatar.serving.badge import Badge
from liveavatar.serving.durable import private_folder
from liveavatar.serving.inspection import Inspector, Judge
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.monitor import watch_dates, watch_outputs, watch_studio
from liveavatar.serving.probes import find_gpus
from liveavatar.serving.reloading import differing, merged
from liveavatar.serving.role import Role
from liveavatar.serving.services import Services
from liveavatar.serving.settings import MonitoringConfig, ServeConfig
from liveavatar.serving.stages import Stages
from liveavatar.serving.studio import Mark, Studio
from liveavatar.serving.watermark import Watermark, server_key
from liveavatar.telemetry import now as monotonic

STANDBY_SECONDS = 0.1  # between two looks whether the other server is gone
PORT_SECONDS = 10.0  # for its ports; whoever has them after that is somebody else

log = structlog.get_logger("liveavatar.server")


def run(settings: ServeConfig, say: Callable[[str], None] = print, reread: Callable[[], ServeConfig] | None = None, standby: bool = False) -> None:
    """Serve until told to end. say: lines for the person who started it: the address, and once the first key. reread: the
    settings as their file says now, for SIGHUP; None: it is not heard. standby: see stand_by.

    Raises LiveAvatarError (weights, memory, files), OSError for a port that is taken.
    """
    logs.configure(settings.monitoring.log_level, settings.monitoring.log_format)
    asyncio.run(_serve(settings, say, reread, standby))


async def _serve(settings: ServeConfig, say: Callable[[str], None], reread: Callable[[], ServeConfig] | None, standby: bool) -> None:
    listening = None if standby else listen.bind(settings)
    provider = spans.provider(settings.monitoring.otlp, __version__) if settings.monitoring.otlp else None
    studio, stages = _studio(settings, [spans.Spans(provider.get_tracer("liveavatar")).note] if provider else [])
    if standby and not await stand_by(studio, say):
        return
    app, inspector = _application(settings, studio, stages)
    services: Services = app.state.services
    if (key := services.access.first_key()) is not None:
        say(f"first key, shown this once (scopes: all): {key}")
    if reread is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload, services, reread)
    looking = asyncio.create_task(inspector.run())
    looking.add_done_callback(_stopped)
    try:
        await listen.serve(app, settings, opened=lambda url: say(f"listening on {url}"), listening=listening)
    finally:
        looking.cancel()
        if provider is not None:
            provider.shutdown()


async def stand_by(studio: Studio, say: Callable[[str], None]) -> bool:
    """Load and warm the chain beside the server that has the storage folder, and return when that one is gone, however it ended: then its
    channels go on air here (17.2). Until then nothing is opened, sent or listened to. False: told to end first. Raises what Studio.start raises."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    starting, ending, ours = asyncio.create_task(studio.start()), asyncio.create_task(told.wait()), False
    try:
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            folder = Path(studio.config.storage.folder)
            say(f"warm, standing by for {folder}")
            await _until(lambda: not _written(folder / FILE), ending)
            await _until(lambda: listen.free(studio.config), ending, PORT_SECONDS)  # the other's doors close a moment later
        ours = not told.is_set()
        return ours
    finally:
        for task in (starting, ending):
            task.cancel()
        await asyncio.gather(starting, ending, return_exceptions=True)
        if not ours:
            await studio.aclose()


async def _until(true: Callable[[], bool], ending: asyncio.Task, seconds: float = math.inf) -> None:
    """Until it is, or `ending` is over, or so many seconds have passed."""
    end = monotonic() + seconds
    while not true() and not ending.done() and monotonic() < end:
        await asyncio.wait({ending}, timeout=STANDBY_SECONDS)


def _written(audit: Path) -> bool:
    """Whether a server has this event log open: the kernel lets go of its lock when the process ends, even by kill -9."""
    try:
        with open(audit, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _stopped(looking: asyncio.Task) -> None:
    if not looking.cancelled():
        log.error("inspection_stopped", exc_info=looking.exception())


def assemble(settings: ServeConfig, watchers: Iterable[Callable[[dict], None]] = ()) -> tuple[FastAPI, Inspector]:
    """The application of one server with everything that is watched, and who looks at its pictures; nothing is started.

    watchers: are given every line of the engine's trace. Raises LiveAvatarError.
    """
    return _application(settings, *_studio(settings, watchers))


def _studio(settings: ServeConfig, watchers: Iterable[Callable[[dict], None]]) -> tuple[Studio, Stages]:
    """What needs nothing of the storage folder but the key of the mark."""
    gpus = find_gpus()
    metrics = Metrics(version=__version__, gpus=gpus.names if gpus else ())
    stages = Stages(metrics, engine=settings.engine_kind)
    noted = (stages.note, *watchers)

    def notes(line: dict) -> None:
        for watcher in noted:
            watcher(line)

    if gpus is not None:
        gpus.watch(metrics)
    return Studio(settings, marker=marker(settings), metrics=metrics, notes=notes, watch=lambda name, data: log.info(name, **data)), stages


def _application(settings: ServeConfig, studio: Studio, stages: Stages) -> tuple[FastAPI, Inspector]:
    """Opens the storage folder. Raises LiveAvatarError."""
    metrics = studio.metrics
    watch_studio(metrics, studio, private_folder(Path(settings.storage.folder)))
    app = create_app(studio, settings, metrics=metrics, stages=stages)
    services: Services = app.state.services
    watch_outputs(metrics, services.outputs)
    watch_dates(metrics, settings, studio, services.store, services.consents)
    return app, Inspector(metrics, studio, key=services.mark_key, payload=payload, judge=_judge(settings.monitoring, metrics))


def _judge(monitoring: MonitoringConfig, metrics: Metrics) -> Judge | None:
    """Who says whose face a picture shows, where one is configured. Raises WeightsError."""
    if monitoring.judge is None:
        return None
    from liveavatar.models.probe import load_probe

    probe, _ = load_probe(monitoring.judge)
    metrics.gauge("identity_similarity_floor", monitoring.identity_floor)
    return lambda picture: probe.look(picture[None]).identity[0]


def reload(services: Services, reread: Callable[[], ServeConfig]) -> None:
    """Take over what needs no restart from settings that are read again (SIGHUP, 17.4), and say what does; a mistake in them changes nothing."""
    had = services.settings
    try:
        fresh = reread()
        settings = merged(had, fresh)
    except (LiveAvatarError, OSError) as error:
        log.error("settings_refused", reason=str(error))
        return
    logs.set_level(settings.monitoring.log_level)
    if settings.monitoring.judge is not None:
        services.metrics.gauge("identity_similarity_floor", settings.monitoring.identity_floor)
    services.reload(settings)
    log.warning("settings_reloaded", changed=differing(had, settings), need_restart=differing(settings, fresh))


def marker(settings: ServeConfig) -> Callable[[Role, int, int], Mark]:
    """What is drawn into the pictures of a session: the badge, then the watermark. What is switched off is logged."""
    provenance = settings.provenance
    for name in ("watermark", "badge", "sign"):
        if not getattr(provenance, name):
            log.warning("provenance_off", what=name)
    said, folder = provenance.watermark_key_file, Path(settings.storage.folder)
    key = server_key(folder, Path(said) if said else None) if provenance.watermark else b""

    def made(role: Role, height: int, width: int) -> Mark:
        steps = [Badge(provenance.badge_text, height, width, provenance.badge_corner).draw] if provenance.badge else []
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

