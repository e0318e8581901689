"""RTMP against nginx-rtmp on loopback: seen by ffprobe, back after a stop and a stall (EGR-1, EGR-2, serving.md 20, 22)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from liveavatar.serving.egress import Destination
from liveavatar.serving.settings import OutputsConfig
from liveavatar.serving.targets import Target
from liveavatar.telemetry import now
from onair import Station, free_port, tls_server

MODULE = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
pytestmark = pytest.mark.skipif(
    not (shutil.which("nginx") and MODULE.exists() and shutil.which("ffprobe")),
    reason="nginx with its RTMP module or ffprobe is missing: apt-get install nginx-light libnginx-mod-rtmp ffmpeg",
)
KEY = "s3cret-key"


@contextmanager
def nginx(folder: Path, port: int):
    """A server; yields the pid of its worker, which holds the connections."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "nginx.conf").write_text(
        f"load_module {MODULE}; daemon off; master_process on; pid nginx.pid; error_log error.log info; worker_processes 1; user root;\n"
        f"events {{ worker_connections 64; }} rtmp {{ server {{ listen 127.0.0.1:{port}; application live {{ live on; }} }} }}\n"
    )
    server = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder], stderr=subprocess.DEVNULL)
    try:
        deadline = now() + 5
        while not children(server.pid) or not accepts(port):
            assert server.poll() is None and now() < deadline, (folder / "error.log").read_text()
        yield children(server.pid)[0]
    finally:
        workers = children(server.pid)
        server.kill()
        server.wait()
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def accepts(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


async def packets_seen(url: str, seconds: float) -> tuple[list[float], list[str]]:
    """Presentation times of the pictures a viewer gets within `seconds`, and what ffprobe says of the streams."""
    command = ["ffprobe", "-v", "error", "-analyzeduration", "1000000", "-read_intervals", f"%+{seconds}", "-show_entries",
               "packet=pts_time,flags,codec_type", "-show_entries", "stream=codec_name,width,r_frame_rate", "-of", "compact", url]  # fmt: skip
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    lines = (await asyncio.wait_for(process.communicate(), 10))[0].decode().splitlines()
    pictures = [float(line.split("pts_time=")[1].split("|")[0]) for line in lines if line.startswith("packet|codec_type=video")]
    return pictures, [line for line in lines if line.startswith("stream")]


def test_rtmp_reaches_viewers_and_comes_back(tmp_path):
    asyncio.run(on_air(tmp_path))


async def on_air(folder):
    # noise makes 1.5 Mb/s, and the session is in its second hour
    station, seen, port = Station(size=256, noise=100, first=100_000, bitrate=1_500_000), [], free_port()
    url = f"rtmp://127.0.0.1:{port}/live/{KEY}"
    out = Destination("air", Target(kind="rtmp", url=url), 256, 256, OutputsConfig(stall_seconds=1.5, retry_seconds=0.4, retry_limit_seconds=1.0),
                      ask_keyframe=station.ask_keyframe, report=lambda event, facts: seen.append((event, facts)))  # fmt: skip
    station.sinks.append(out)
    running = asyncio.create_task(out.run())
    await station.play(lambda: out.status.failures >= 2 and out.status.state == "waiting")  # nobody listens yet
    assert out.status.state == "waiting" and "refused" in out.status.last_error

    with nginx(folder / "a", port):
        await station.play(lambda: out.status.state == "live")
        viewer = asyncio.create_task(packets_seen(url, 1.5))
        await station.play(viewer.done)
        pictures, streams = viewer.result()
        assert any("h264|width=256|r_frame_rate=25/1" in s for s in streams) and any("aac" in s for s in streams)
        before = pictures[-1]
        assert 0 <= before < 20 and len(pictures) > 15  # time begins with the destination, not with the session
    stopped = now()

    with nginx(folder / "b", port) as worker:
        await station.play(lambda: out.status.reconnects == 1)
        assert now() - stopped < 5  # the gate
        viewer = asyncio.create_task(packets_seen(url, 1.0))
        await station.play(viewer.done)
        pictures, _ = viewer.result()
        assert before + 0.3 < pictures[0] < before + 10  # and goes on along the session's clock, never reset (EGR-2)

        await station.play(lambda: out.status.bytes > 600_000)
        os.kill(worker, signal.SIGSTOP)  # stalled: sockets stay open and take data for a while
        stalled = now()
        lost = out.status.reconnects
        await station.play(lambda: "no progress" in out.status.last_error and out.status.state != "live")
        assert now() - stalled < 30  # long before TCP would say so
        assert out.status.reconnects == lost
        os.kill(worker, signal.SIGCONT)
        await station.play(lambda: out.status.reconnects == lost + 1)
        assert now() - stalled < 10  # the gate

        out.close()
        await asyncio.wait_for(running, 5)
    assert KEY not in repr(seen) + repr(out.status) + repr(out.target)
    assert out.status.url == f"rtmp://127.0.0.1:{port}/live/***"


@asynccontextmanager
async def behind_tls(context, port: int, flows: asyncio.Event):
    """A server with TLS before `port`, which reads nothing while `flows` is cleared; yields its own port."""

    async def pump(reader, writer):
        with suppress(ConnectionError):
            while await flows.wait() and (data := await reader.read(65_536)):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def carry(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with await asyncio.start_server(carry, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


def test_rtmps_reaches_whom_its_certificate_names_and_nobody_else(tmp_path, monkeypatch):
    """18.4: refused without the authority and for another name; a stall behind TLS shows as without it; nothing stays behind."""
    authority, context = tls_server(tmp_path, "live.test")

    async def here(url):
        return "127.0.0.1"

    async def scene():
        station, port, flows = Station(size=256, noise=100, bitrate=1_500_000), free_port(), asyncio.Event()
        flows.set()
        with nginx(tmp_path / "a", port):
            async with behind_tls(context, port, flows) as secure:
                config = OutputsConfig(stall_seconds=1.0, retry_seconds=0.2)
                outs = [Destination(name, Target(kind="rtmp", url=f"rtmps://{name}.test:{secure}/live/{name}"), 256, 256, config, check=here,
                                    ask_keyframe=station.ask_keyframe) for name in ("live", "other")]  # fmt: skip
                live, other = outs
                station.sinks += outs
                running = [asyncio.create_task(out.run()) for out in outs]
                await station.play(lambda: live.status.failures and other.status.failures)
                assert "certificate verify failed: unable to get local issuer" in live.status.last_error
                monkeypatch.setenv("SSL_CERT_FILE", str(authority))
                await station.play(lambda: live.status.state == "live" and "mismatch" in other.status.last_error)
                other.close()
                viewer = asyncio.create_task(packets_seen(f"rtmp://127.0.0.1:{port}/live/live", 1.0))
                await station.play(viewer.done)
                assert viewer.result()[0], "pictures come out of the server"
                flows.clear()
                stalled = now()
                await station.play(lambda: live.status.state == "waiting")
                assert now() - stalled < 30 and "no progress" in live.status.last_error, "long before TCP would say so"
                flows.set()
                await station.play(lambda: live.status.state == "live")
                helpers = children(live.writer.pid)
                live.close()
                await asyncio.wait_for(asyncio.gather(*running), 5)
                async with asyncio.timeout(2):
                    while helpers and any(map(alive, helpers)):
                        await asyncio.sleep(0.01)
                assert helpers

    asyncio.run(scene())


def alive(pid: int) -> bool:
    """Neither gone nor waiting to be noticed as gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
