"""Sockets and signals: the application on its port, drained on SIGTERM, at once on a second one (17.2)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable

import structlog
import uvicorn
from fastapi import FastAPI

from liveavatar.serving.app import admin_app
from liveavatar.serving.desk import Desk
from liveavatar.serving.services import Services
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.stream_frames import MESSAGE_BYTES

PING_SECONDS = 20.0  # between signs of life on a socket, and to wait for one
GRACE_SECONDS = 3  # for answers under way when the server ends

log = structlog.get_logger("liveavatar.server")


class Server(uvicorn.Server):
    """uvicorn that leaves signals to `serve` and ends with exit status 0."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def bind(settings: ServeConfig) -> socket.socket:
    """The listening socket, so that its port is known before anything is started. Raises OSError."""
    return _listening(settings.listen.host, settings.listen.port)


def free(settings: ServeConfig) -> bool:
    """Whether its ports can be listened to."""
    listen = settings.listen
    doors = [(listen.host, listen.port)] + ([(listen.admin_host, listen.admin_port)] if listen.admin_port is not None else [])
    try:
        for host, port in doors:
            _listening(host, port).close()
    except OSError:
        return False
    return True


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: asyncio sets TCP_NODELAY on no other, 40 ms an answer
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen()  # who comes before the application is up waits
    return listening


def server(app, settings: ServeConfig) -> Server:
    """Not yet started."""
    listen = settings.listen
    return Server(uvicorn.Config(
        app, ssl_certfile=listen.certificate, ssl_keyfile=listen.key, log_config=None, access_log=False, server_header=False,
        proxy_headers=bool(listen.proxies), forwarded_allow_ips=list(listen.proxies),  # said, or uvicorn asks the environment
        ws_max_size=MESSAGE_BYTES, ws_ping_interval=PING_SECONDS, ws_ping_timeout=PING_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS,
    ))  # fmt: skip


async def serve(app: FastAPI, settings: ServeConfig, *, opened: Callable[[str], None] = lambda url: None,
                listening: socket.socket | None = None) -> None:  # fmt: skip
    """Listen, start the studio, and return when the server was told to end and all is closed.

    opened: told the URL as soon as requests are answered; /readyz says when sessions can be opened. Raises what
    Studio.start raises, OSError for a port that is taken.
    """
    at: Services = app.state.services
    listening = listening or bind(settings)
    main, admin = server(app, settings), admin_server(app, settings)
    door = _listening(settings.listen.admin_host, settings.listen.admin_port) if admin else None  # uvicorn would end the process if it is taken
    running = asyncio.create_task(main.serve([listening]))
    beside = asyncio.create_task(admin.serve([door])) if admin else None
    starting = asyncio.create_task(at.desk.studio.start())
    starting.add_done_callback(lambda task: _end_if_failed(task, main))
    with _signals(at.desk, main):
        opened(_url(settings, listening))
        await running
    if beside is not None:
        admin.should_exit = True
        await beside
    starting.cancel()
    outcome = (await asyncio.gather(starting, return_exceptions=True))[0]
    await at.desk.studio.aclose()
    if isinstance(outcome, Exception):
        raise outcome


def admin_server(app: FastAPI, settings: ServeConfig) -> Server | None:
    """The operator's own door, where one is configured: metrics and probes, without keys. Not for strangers' networks (18.1)."""
    listen = settings.listen
    if listen.admin_port is None:
        return None
    return Server(uvicorn.Config(admin_app(app), listen.admin_host, listen.admin_port, log_config=None, access_log=False, server_header=False,
                                 proxy_headers=False, lifespan="off"))  # fmt: skip


def _end_if_failed(starting: asyncio.Task, main: Server) -> None:
    if not starting.cancelled() and starting.exception() is not None:
        main.should_exit = True


def _url(settings: ServeConfig, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"{'https' if settings.listen.certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def _signals(desk: Desk, main: Server):
    """The first SIGTERM or SIGINT drains, the second ends it now."""
    loop, draining = asyncio.get_running_loop(), []

    async def drain() -> None:
        await desk.drain()
        main.should_exit = True

    def told() -> None:
        if not draining:
            draining.append(loop.create_task(drain()))
            return
        log.warning("ending_now", sessions=len(desk.studio.sessions))
        draining[0].cancel()
        main.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
