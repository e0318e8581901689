"""A real process on a real port: told to end, it lets sessions finish and leaves with 0; told twice, it leaves now (17.2)."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from api_server import bearer, on_port, settings
from liveavatar.config import Config, ModelConfig
from liveavatar.core import LiveAvatarError
from liveavatar.serving import listen
from liveavatar.serving import server as server_module
from liveavatar.serving.app import create_app
from liveavatar.serving.audit import FILE
from liveavatar.serving.eventlog import EventLog
from liveavatar.serving.settings import ListenConfig
from liveavatar.serving.studio import Studio

ROOT = Path(__file__).parents[1]
@pytest.fixture
def server(tmp_path):
    """(process, client of the operator): configs/serve_tiny.yaml with the test card in place of the model."""
    overrides = ["--engine", "testcard", "engine.runtime.sessions=4", "listen.port=0", f"storage.folder={tmp_path}", "sessions.drain_seconds=20"]
    command = [sys.executable, "-m", "liveavatar", "serve", str(ROOT / "configs" / "serve_tiny.yaml"), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    try:
        key, address = (first_word(process, start) for start in ("la_", "http://"))
        with httpx.Client(base_url=address, headers=bearer(key), timeout=10) as client:
            wait(lambda: client.get("/readyz").status_code == 200)
            yield process, client
    finally:
        process.kill()
        process.wait()


def first_word(process, start: str) -> str:
    """The first word that begins so in what the process says."""
    for line in process.stdout:
        for word in line.split():
            if word.startswith(start):
                return word
    raise AssertionError(f"it never said {start}")


def wait(until, seconds: float = 120.0) -> None:
    """Poll a process we cannot look into."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_drain_lets_sessions_finish(server):
    process, client = server
    session = client.post("/v1/sessions", json={}).json()["id"]
    process.send_signal(signal.SIGHUP)  # reads the settings again, and goes on (17.4)
    assert client.get("/startupz").status_code == client.get("/livez").status_code == 200
    process.send_signal(signal.SIGTERM)
    wait(lambda: client.get("/readyz").status_code == 503)
    assert client.get("/readyz").json()["reasons"] == ["draining"] and client.get("/livez").status_code == 200
    refused = client.post("/v1/sessions", json={})
    assert refused.status_code == 503 and refused.json()["type"].endswith("draining") and int(refused.headers["retry-after"]) > 0
    assert client.get(f"/v1/sessions/{session}").json()["state"] in ("ready", "idle")  # goes on
    assert client.delete(f"/v1/sessions/{session}").status_code == 204
    assert process.wait(60) == 0
    out = process.stdout.read()
    assert "settings_reloaded" in out and "draining" in out and session in out and not re.search(r"la_[0-9a-f]{12}_|Traceback|ERROR", out), out


def test_a_second_signal_ends_it_now(tmp_path):
    """In this process: a session that would have gone on for minutes ends."""

    async def story():
        config = settings(tmp_path)
        studio = Studio(config)
        app, said = create_app(studio, config), asyncio.Queue()
        key = app.state.services.access.first_key()
        serving = asyncio.create_task(listen.serve(app, config, opened=said.put_nowait))
        async with httpx.AsyncClient(base_url=await said.get(), headers=bearer(key)) as client:
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/sessions", json={})).status_code == 201
            os.kill(os.getpid(), signal.SIGTERM)
            while (await client.get("/readyz")).status_code != 503:
                await asyncio.sleep(0.01)
            assert len(studio.sessions) == 1 and not serving.done()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(10):
            await serving
        assert not studio.sessions

    asyncio.run(story())


def test_a_taken_port_is_said_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = settings(tmp_path, listen=ListenConfig(port=0, admin_port=taken.getsockname()[1]))
        studio = Studio(config)
        with pytest.raises(OSError, match="in use"):
            asyncio.run(listen.serve(create_app(studio, config), config))
        assert studio.engine is None


def test_a_spare_waits_for_log_and_ports_and_can_be_told_to_end(tmp_path):
    """`serve --standby` (17.2): the log's lock is the lease; the old server's doors close a moment after it lets go. SIGTERM ends the wait."""

    class Spare:
        engine = None

        def __init__(self, config):
            self.config, self.closed = config, False

        async def start(self):
            self.engine = object()

        async def aclose(self):
            self.closed = True

    async def story():
        config = replace(settings(tmp_path), listen=ListenConfig(port=0, admin_port=free_port()))
        lease, said = EventLog(tmp_path / FILE), asyncio.Queue()
        spare, told = Spare(config), Spare(config)
        waiting = asyncio.create_task(server_module.stand_by(spare, said.put_nowait))
        assert "standing by" in await said.get()
        with socket.create_server(("127.0.0.1", config.listen.admin_port)):
            lease.close()
            await asyncio.sleep(0.3)
            assert not waiting.done()
        assert await waiting and not spare.closed
        lease = EventLog(tmp_path / FILE)
        waiting = asyncio.create_task(server_module.stand_by(told, said.put_nowait))
        await said.get()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not await waiting and told.closed
        lease.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    asyncio.run(asyncio.wait_for(story(), 20))


def test_operators_have_a_door_of_their_own(tmp_path):
    """With listen.admin_port, metrics, probes and drain are there, without keys, and /metrics is nowhere else (18.1)."""

    async def story():
        config = replace(settings(tmp_path), listen=ListenConfig(port=0, admin_port=free_port()))
        async with on_port(config) as (server, port):
            admin = listen.admin_server(server.app, config)
            serving = asyncio.create_task(admin.serve())
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{config.listen.admin_port}") as client:
                while not admin.started:
                    await asyncio.sleep(0.01)
                assert b"liveavatar_sessions" in (await client.get("/metrics")).content
                assert (await server.http.get("/metrics")).status_code == 404
                assert (await client.get("/v1/sessions")).status_code == 404
                page = await client.post("/drain", headers={"Origin": "http://evil.example"})
                assert page.status_code == 403 and (await client.get("/readyz")).status_code == 200
                assert (await client.post("/drain")).status_code == 202 and (await client.get("/readyz")).status_code == 503
            admin.should_exit = True
            await serving

    asyncio.run(story())


def test_answers_do_not_wait_for_one_another(tmp_path):
    """asyncio switches Nagle's algorithm off for sockets whose protocol is named, and only for those."""
    with listen.bind(settings(tmp_path)) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_cannot_start_says_so_and_ends(tmp_path):
    async def story():
        config = replace(settings(tmp_path), engine_kind="model", engine=Config(model=ModelConfig(path=str(tmp_path / "nothing"))))
        with pytest.raises(LiveAvatarError):
            await listen.serve(create_app(Studio(config), config), config)

    asyncio.run(story())
