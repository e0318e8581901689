"""Recordings: whole after a kill, cut without a gap, never in the way of the live picture (REC-1 to REC-4, serving.md 20)."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import resource
import shutil
import signal

import av

from liveavatar.core import LiveAvatarError
from liveavatar.serving.recorder import BOX, Recorder, expire, recover
from liveavatar.serving.settings import OutputsConfig, StorageConfig
from onair import EVENT_EVERY, SIZE, Station, events

GROUP = 10  # pictures from keyframe to keyframe
LAG = 3  # pictures that wait in the muxer for AAC, which comes up to 85 ms later


class Scene:
    """A station and its recorder; `seen`: the events it reported."""

    def __init__(self, folder, *, seconds=3600.0, sign=None, **station):
        self.seen, self.station = [], Station(keyframe_seconds=GROUP / 25, **station)
        storage, outputs = StorageConfig(folder=str(folder), recording_seconds=seconds), OutputsConfig(stall_seconds=1.0, retry_seconds=0.1)
        self.recorder = Recorder(SIZE, SIZE, storage, outputs,
                                 facts={"session": "s1", "consent": "c7"}, sign=sign, ask_keyframe=self.station.ask_keyframe,
                                 report=lambda *event: self.seen.append(event))  # fmt: skip
        self.station.sinks.append(self.recorder)
        self.running = asyncio.create_task(self.recorder.run())

    def named(self, name: str) -> list[dict]:
        return [facts for event, facts in self.seen if event == name]

    @property
    def part(self):
        return self.recorder.folder / f"{self.recorder.status.url}.part"

    async def written(self, pictures: int) -> None:
        """So many more pictures are played, and all of them have reached the file."""
        await self.station.play(lambda: self.recorder.status.state == "live")
        for _ in range(pictures):
            self.station.tick()
            await asyncio.sleep(0.01)
        while len(self.recorder._edge) or self.recorder.writer.count < self.recorder.writer.sent:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.recorder.close()
        await asyncio.wait_for(self.running, 10)


def pictures(path) -> list[float]:
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def sidecar(path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_a_kill_at_any_moment_costs_at_most_the_open_group(tmp_path):
    async def scene():
        scene = Scene(tmp_path)
        for kill, count in enumerate((13, 20, 38)):
            await scene.written(count)
            os.kill(scene.recorder.writer.pid, signal.SIGKILL)
            while len(scene.named("recording_finished")) <= kill:
                await asyncio.sleep(0.01)
        await scene.written(2 * GROUP)
        snapshot = tmp_path / "crash" / ("0" * 32 + ".mp4.part")  # what a kill of everything would leave
        snapshot.parent.mkdir()
        shutil.copy(scene.part, snapshot)
        shutil.copy(scene.part.with_name(scene.part.name.split(".")[0] + ".json"), snapshot.with_name("0" * 32 + ".json"))
        await scene.close()
        for facts in scene.named("recording_finished")[:3]:
            path = scene.recorder.folder / facts["file"]
            seen, said = pictures(path), sidecar(path)
            assert not said["complete"] and said["pictures"] - GROUP - LAG <= len(seen) <= said["pictures"]
            assert seen == [n / 25 for n in range(len(seen))]
        assert [facts["reason"] for facts in scene.named("recording_failed")] == ["the writing process ended (exit status -9)"] * 3

        ((event, facts),) = recover(snapshot.parent)
        path = snapshot.with_suffix("")
        assert event == "recording_finished" and pictures(path) and not snapshot.exists()
        assert sidecar(path)["consent"] == "c7" and facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert expire(snapshot.parent, path.stat().st_mtime + 1) == [path.name] and not list(snapshot.parent.iterdir())

    asyncio.run(scene())


def test_what_a_crash_left_is_finished_although_one_cannot_be(tmp_path):
    """A full disk at start neither hides the other recordings nor ends the housekeeping; an owner may erase while it looks."""
    boxes = BOX.pack(16, b"ftyp") + bytes(8) + BOX.pack(16, b"mdat") + bytes(8)
    for name in "abc":
        (tmp_path / f"{name}.mp4.part").write_bytes(boxes)

    def sign(path, title):
        if title == "a.mp4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events = recover(tmp_path, sign)
    assert [(event, facts["file"]) for event, facts in events] == [("recording_failed", "a.mp4"), *(("recording_finished", f"{n}.mp4") for n in "bc")]
    assert (tmp_path / "a.mp4.part").exists(), "it waits for the next start"
    (tmp_path / "b.mp4").unlink()
    (tmp_path / "b.mp4").symlink_to(tmp_path / "gone")  # as a file that goes between being found and being looked at
    assert expire(tmp_path, (tmp_path / "c.mp4").stat().st_mtime + 1) == ["c.mp4"]


def test_files_follow_each_other_without_a_gap(tmp_path):
    """REC-2: a cut on an IDR; every picture and every sound is in one file and in time. The side-car says what happened."""

    def sign(path, title):
        titles.append(title)
        if len(titles) == 2:
            raise LiveAvatarError("no key")
        with path.open("ab") as file:
            file.write(b"\0\0\0\x08free")

    async def play():
        nonlocal scene
        scene = Scene(tmp_path, seconds=1.0, sign=sign, first=90_007)
        await scene.written(5)
        scene.recorder.note("speak.started", {"segment": 4})
        scene.station.epoch = 3
        await scene.written(30)
        scene.recorder.note("speak.finished", {"segment": 4, "position_ms": 1200, "interrupted": True})
        await scene.written(30)
        await scene.close()

    scene, titles = None, []
    asyncio.run(play())
    files = [scene.recorder.folder / facts["file"] for facts in scene.named("recording_started")]
    assert [facts["signed"] for facts in scene.named("recording_finished")] == [True, False, True]
    assert titles == [path.name for path in files]
    assert scene.named("recording_unsigned") == [{"file": files[1].name, "reason": "no key"}]
    said, sound = [sidecar(path) for path in files], 0
    for path, facts in zip(files, said):
        assert facts["complete"] and facts["consent"] == "c7" and facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        times = pictures(path)
        assert times == [n / 25 for n in range(facts["pictures"])]
        flashes, clicks = events(str(path))
        assert len(clicks) >= max(len(times) // EVENT_EVERY, len(flashes) - 1) and all(abs(f - c) < 1e-3 for f, c in zip(flashes, clicks))
        with av.open(str(path)) as container:
            packets = [p for p in container.demux(audio=0) if p.size]
            sound += len(packets)
            assert {b.pts - a.pts for a, b in zip(packets[1:], packets[2:])} == {1024}  # FFmpeg stretches the first to the start
    counts = [facts["pictures"] for facts in said]
    assert sum(counts) >= 65 and counts[0] in (30, 31) and counts[1] == 30  # cut at the first IDR after 1 s
    assert abs(sound - sum(counts) * 1920 / 1024) < 4
    (first, second, *_) = said
    start = first["segments"][0]["start"]
    assert 0 < start < 1.2 and first["segments"] == [{"segment": 4, "start": start, "end": None, "interrupted": False}]
    assert second["segments"] == [{"segment": 4, "start": 0.0, "end": second["segments"][0]["end"], "interrupted": True}]
    assert [e["epoch"] for e in first["epochs"]] == [0, 3] and second["epochs"] == [{"epoch": 3, "at": 0.0}]
    assert abs(first["epochs"][1]["at"] - start) < 0.06
    assert not list(scene.recorder.folder.glob("*.part"))


def test_a_full_or_dead_disk_never_holds_the_picture_up(tmp_path):
    """REC-3: an event, the queue stays bounded, and recording goes on in a new file."""

    async def scene():
        scene = Scene(tmp_path, noise=40)
        await scene.written(15)
        size = scene.part.stat().st_size
        resource.prlimit(scene.recorder.writer.pid, resource.RLIMIT_FSIZE, (size + 1000, size + 1000))  # the disk is full
        await scene.station.play(lambda: scene.named("recording_finished"))
        assert "File too large" in scene.named("recording_failed")[0]["reason"]
        full = scene.recorder.folder / scene.named("recording_finished")[0]["file"]
        assert len(pictures(full)) >= 15 - GROUP

        await scene.written(15)
        os.kill(scene.recorder.writer.pid, signal.SIGSTOP)  # the disk hangs
        for _ in range(150):  # 6 s of media at once: the queue takes 2 s of each, the rest is dropped
            scene.station.tick()
            assert len(scene.recorder._edge) <= 2 * 25 + 2 * 47 + 2
        await scene.station.play(lambda: len(scene.named("recording_failed")) == 2)
        assert "no progress" in scene.named("recording_failed")[1]["reason"]
        await scene.written(15)
        await scene.close()
        assert sidecar(scene.recorder.folder / scene.named("recording_finished")[1]["file"])["drops"] > 200
        assert [facts["complete"] for facts in scene.named("recording_finished")] == [False, False, True]
        assert scene.recorder.status.state == "closed" and scene.recorder.status.bytes > 0

    asyncio.run(scene())
