"""Destinations without a server: what they show of themselves, when they give up and try again (EGR-1, EGR-2, EGR-5, BP-1)."""

from __future__ import annotations

import ast
import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from liveavatar.core import ConfigError, LiveAvatarError
from liveavatar.serving import destination, egress
from liveavatar.serving.egress import Destination
from liveavatar.serving.packets import H264, Packet
from liveavatar.serving.settings import OutputsConfig
from liveavatar.serving.targets import Target
from liveavatar.serving.writer import Writer

PICTURE = Packet(codec=H264, data=b"x", pts=0, duration=3600, rate=90_000, keyframe=True, epoch=0, made=0.0)


@pytest.mark.parametrize("kind, url, shown, secrets", [
    ("rtmp", "rtmp://me:pass@live.example:1936/app/k3y-1?auth=t0k3n", "rtmp://live.example:1936/app/***", ("pass", "k3y-1", "t0k3n")),
    ("rtmp", "rtmps://live.example/app/inst/k3y1/2", "rtmps://live.example/app/***", ("k3y1", "inst")),
    ("rtmp", "rtmp://live.example/onlykey", "rtmp://live.example/***", ()),
    ("whip", "https://sfu.example/whip/k3y2?sig=s1gn", "https://sfu.example/***", ("k3y2", "s1gn")),
])  # fmt: skip
def test_what_is_shown_holds_no_secret(kind, url, shown, secrets):
    target = Target(kind=kind, url=url, token="b3arer" if kind == "whip" else None)
    assert target.shown == shown
    hidden = (*secrets, "b3arer") if kind == "whip" else secrets
    said = target.redact(f"cannot open '{url}': {hidden} refused")
    for text in (said, repr(target), shown):
        assert not [secret for secret in hidden if secret in text]
    assert "refused" in said


@pytest.mark.parametrize("wrong", [
    {"kind": "rtmp", "url": "http://live.example/app/key"}, {"kind": "rtmp", "url": "rtmp:///app/key"}, {"kind": "whip", "url": "file:///etc/passwd"},
    {"kind": "rtmp", "url": "rtmp://live.example:99999/app/key"}, {"kind": "whip", "url": "http://sfu.example/a\r\nX: y"},
    {"kind": "hls", "url": "/no/such/folder"}, {"kind": "srt", "url": "srt://live.example"},
    {"kind": "whip", "url": "http://sfu.example/a", "token": "a\r\nHost: b"},
])  # fmt: skip
def test_a_target_that_cannot_be_is_refused_without_repeating_it(wrong):
    with pytest.raises(ConfigError) as error:
        Target(**wrong)
    assert "key" not in str(error.value) and "passwd" not in str(error.value)


@pytest.mark.parametrize("url, address, opened", [
    ("rtmp://me:pass@live.example:1936/app/key", "192.0.2.7", "rtmp://me:pass@192.0.2.7:1936/app/key"),
    ("rtmp://live.example/app/key?a=b", "2001:db8::7", "rtmp://[2001:db8::7]/app/key?a=b"),
    ("rtmp://live.example/app/key", None, "rtmp://live.example/app/key"),
    ("rtmps://live.example/app/key", "192.0.2.7", "rtmps://live.example/app/key"),  # TLS must hear the name
])  # fmt: skip
def test_the_checked_address_is_the_one_connected_to(url, address, opened):
    assert Target(kind="rtmp", url=url).job(address, 64, 64, 0)["url"] == opened


def test_the_writing_process_is_light():
    """It starts in a moment because it imports PyAV and the standard library alone (torch takes seconds and a GB)."""
    nodes = list(ast.walk(ast.parse(Path(destination.__file__).read_text())))
    found = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert found - sys.stdlib_module_names == {"av"}


def report(n: int, size: int, held: int = 0, heard: bool = False) -> dict:
    return {"n": n, "bytes": size, "held": held, "heard": heard}


def test_watchdog_wants_progress_at_the_far_end():
    """EGR-1: success of mux() alone is not progress; each case by hand on a clock of its own."""
    grown = []
    writer = Writer({"format": "flv"}, stall_seconds=5.0, on_progress=grown.append)
    writer.sent = 1
    assert not writer.stalled(10.0) and writer.stalled(10.1)  # connecting takes longer than that
    writer.reported(report(1, 100), 10.0)
    assert not writer.stalled(100.0)  # nothing is under way
    writer.sent = 3
    assert not writer.stalled(15.0) and writer.stalled(15.1) == "no progress for 5.1 s"  # mux() does not come back
    writer.reported(report(3, 900, held=800), 15.0)  # it came back, the far end took nothing
    assert writer.stalled(15.2)
    writer.reported(report(3, 900, held=500), 15.3)
    assert not writer.stalled(20.2) and writer.stalled(20.4) and (writer.delivered, grown) == (400, [100, 300])
    writer.reported(report(3, 900), 20.4)
    assert not writer.stalled(1000.0)
    writer.sent = 5
    writer.reported(report(4, 10_900, held=10_000), 1001.0)  # a tenth was read: rounding
    assert writer.delivered == 900 and writer.stalled(1001.0)

    datagrams = Writer({"format": "whip"}, stall_seconds=5.0)
    datagrams.reported(report(1, 100), 0.0)
    datagrams.reported(report(50, 5000), 10.0)  # UDP takes everything
    assert not datagrams.stalled(15.0) and "nothing heard" in datagrams.stalled(15.1)
    datagrams.reported(report(51, 5100, heard=True), 15.2)
    assert not datagrams.stalled(30.2)


class Dice:
    """A random source that takes no time and remembers what it was asked."""

    def __init__(self):
        self.longest = []

    def uniform(self, low: float, high: float) -> float:
        assert low == 0.0
        self.longest.append(high)
        return 0.0


def test_back_off_doubles_with_full_jitter_and_alerts_once():
    dice, seen, url = Dice(), [], "rtmp://live.example/app/k3y"

    async def refuse(asked: str) -> str:
        if len(dice.longest) == 8:
            out.close()
        raise LiveAvatarError(f"{asked} is not allowed")

    async def scene():
        await out.run()

    out = Destination("air", Target(kind="rtmp", url=url), 64, 64, OutputsConfig(), check=refuse, rng=dice, report=lambda *event: seen.append(event))
    asyncio.run(asyncio.wait_for(scene(), 5))
    assert dice.longest == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert [name for name, _ in seen] == ["output.down"] * 5 + ["output.failing"] + ["output.down"] * 4 + ["output.closed"]
    assert out.status.failures == 9 and out.status.state == "closed" and out.status.last_error == "rtmp://live.example/app/*** is not allowed"
    assert "k3y" not in repr(seen)
    out.put(PICTURE)  # after the end: forgotten
    assert out.level().depth == 0


def test_sound_waits_for_the_first_keyframe_and_time_starts_there(monkeypatch):
    """What a process gets: an IDR first, time from it on, the second join with what is fresh; FLV's field never overflows."""
    lives = []

    class Tape:
        """Takes what a Writer would send."""

        count, pid = 1, None

        def __init__(self, job, *rest):
            self.begun, self.sent, self.done = asyncio.Event(), [], asyncio.Event()
            lives.append(self)

        async def drive(self, feed):
            await feed(self)

        async def send(self, packet, origin):
            self.sent.append((packet.codec, packet.seconds, origin))
            self.begun.set()

        def finish(self):
            self.done.set()

    monkeypatch.setattr(egress, "Writer", Tape)
    picture = lambda n, key=False: replace(PICTURE, pts=n * 3600, keyframe=key)  # noqa: E731
    sound = lambda n: replace(PICTURE, codec="aac", pts=n * 1920, rate=48_000)  # noqa: E731

    async def scene():
        out = Destination("air", Target(kind="rtmp", url="rtmp://live.example/app/key"), 64, 64, OutputsConfig())
        running = asyncio.create_task(out.run())

        async def put(*packets):
            for packet in packets:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                out.put(packet)
                for _ in range(5):
                    await asyncio.sleep(0)

        await put(picture(100), sound(101), picture(102, True))  # opens the connection
        await put(picture(103), sound(104), picture(105, True), sound(104), sound(105), picture(106))
        far = 105 + egress.FLV_SECONDS * 25
        await put(picture(far + 5, True), picture(far + 10, True), picture(far + 11, True), sound(far + 12))  # a planned reconnect
        out.close()
        await asyncio.wait_for(running, 5)
        return far

    far = asyncio.run(scene())
    first, second = [[(codec, round(seconds * 25), origin) for codec, seconds, origin in life.sent] for life in lives]
    assert first == [("h264", 102, 102), ("h264", 105, 102), ("aac", 105, 102), ("h264", 106, 102)]
    assert second == [("h264", far + 10, far + 10), ("h264", far + 11, far + 10), ("aac", far + 12, far + 10)]
