"""HLS destinations: playable by ffprobe, counted on after a crash, killed when stuck (serving.md 8.1, EGR-1, EGR-2)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess

import pytest

from liveavatar.serving.egress import Destination
from liveavatar.serving.fragments import SideCar, accompany, fetched, folder_reader
from liveavatar.serving.settings import OutputsConfig
from liveavatar.serving.signing import AUTHORITY, Signer
from liveavatar.serving.targets import PLAYLIST, Target
from onair import Station, events

pytestmark = pytest.mark.skipif(not shutil.which("ffprobe"), reason="ffprobe is missing: apt-get install ffmpeg")


def probe(url: str) -> str:
    command = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_name,width,r_frame_rate", "-of", "compact", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def test_hls_plays_survives_a_crash_and_a_stop(tmp_path):
    asyncio.run(on_air(tmp_path))


async def on_air(folder):
    pytest.importorskip("c2pa", reason="signing needs liveavatar[serve]")
    station, seen = Station(), []
    config = OutputsConfig(stall_seconds=1.0, retry_seconds=0.1)
    out = Destination("web", Target(kind="hls", url=str(folder)), 64, 64, config, ask_keyframe=station.ask_keyframe,
                      report=lambda event, facts: seen.append((event, facts)))  # fmt: skip
    station.sinks.append(out)
    signer, unsigned = Signer(folder / "keys"), []
    running = asyncio.create_task(accompany(out.run(), SideCar(folder, {"stream": "web"}, signer.seal), unsigned.append))
    playlist = folder / PLAYLIST
    await station.play(lambda: playlist.exists() and playlist.read_text().count("EXTINF") >= 2)
    assert out.status.state == "live" and out.status.reconnects == 0
    await asyncio.to_thread(probe, str(playlist))

    os.kill(out.writer.pid, signal.SIGKILL)  # a crash
    await station.play(lambda: out.status.reconnects == 1)
    assert "exit status -9" in out.status.last_error

    os.kill(out.writer.pid, signal.SIGSTOP)  # stuck: nothing comes back
    await station.play(lambda: out.status.reconnects == 2)
    assert "no progress for 1." in out.status.last_error

    await station.play(lambda: playlist.read_text().count("\n2-") >= 2)
    out.close()
    await asyncio.wait_for(running, 5)
    text = playlist.read_text()
    assert "#EXT-X-ENDLIST" in text and "#EXT-X-DISCONTINUITY" in text and "#EXT-X-MEDIA-SEQUENCE:2000000000" in text  # it only grows
    assert not list(folder.glob("0-*")) and list(folder.glob("1-*"))  # what the last viewers may still want stays
    signed = fetched(folder_reader(folder), PLAYLIST, (folder / "keys" / AUTHORITY).read_bytes())  # through both crashes (19.4)
    assert signed.manifest.valid and signed.manifest.trusted and signed.checked == text.count("EXTINF") and not unsigned
    found = await asyncio.to_thread(probe, str(playlist))
    assert "codec_name=h264|width=64|r_frame_rate=25/1" in found and "codec_name=aac" in found
    assert out.status.state == "closed" and out.status.bytes > 0
    assert [event for event, _ in seen] == ["output.live", "output.down"] * 2 + ["output.live", "output.closed"]
    flashes, clicks = await asyncio.to_thread(events, str(playlist))
    assert clicks and all(min(abs(f - c) for f in flashes) < 1e-3 for c in clicks)  # the last sound may still be in the encoder
