"""Recordings that survive: fragmented mp4 of the packets that were sent, one process a file (REC-1 to REC-4).

    <id>.mp4.part   grows by whole groups of pictures; readable at any moment, also after SIGKILL of everything
    <id>.json       the side-car: who, when, which epochs and segments, whose consent; from the first picture on
    <id>.mp4        the file once it is finished, signed and hashed; its side-car says "complete": true

Nothing here waits for the disk but the writing process and a thread of the recorder's own; the queue before them is
bounded, and when it is full pictures up to the next keyframe are missing in the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from liveavatar.core import FPS, LiveAvatarError
from liveavatar.serving.durable import flush_folder, private_folder, replace_file
from liveavatar.serving.egress import EDGE_SECONDS, OutputStatus, longest_wait
from liveavatar.serving.packets import AAC, H264, Edge, Level, Packet, Tick
from liveavatar.serving.settings import OutputsConfig, StorageConfig
from liveavatar.serving.writer import Writer
from liveavatar.telemetry import now

OPTIONS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}  # unflushed, a kill costs seconds
PART = ".part"
RECORDINGS = "recordings"  # folder of storage.folder
CUT_PACKETS = 60  # after the cut, until the sound has come up to it: about a second, then the cut is made without
BOX = struct.Struct(">I4s")  # of mp4: length with this header, kind

Sign = Callable[[Path, str], None]  # replaces a finished mp4 by its signed copy; path, title. Raises LiveAvatarError


@dataclass
class Segment:
    """A run of speech. start, end: seconds of the session; end None: not over yet."""

    number: object
    start: float
    end: float | None = None
    interrupted: bool = False


@dataclass
class File:
    """One recording while it is made. start, end: seconds of the session's clock; epochs: (epoch, second it began)."""

    name: str
    began: str  # UTC
    start: float
    end: float
    pictures: int = 0
    epochs: list[tuple[int, float]] = field(default_factory=list)

    def take(self, packet: Packet) -> None:
        """Count what was handed to the process."""
        if not self.epochs or packet.epoch > self.epochs[-1][0]:
            self.epochs.append((packet.epoch, packet.seconds))
        if packet.codec == H264:
            self.pictures += 1
            self.end = packet.seconds + 1 / FPS

    def facts(self, segments: Iterable[Segment]) -> dict:
        """For the side-car; times from the start of the file."""
        return {
            "file": self.name, "began": self.began, "seconds": round(self.end - self.start, 3), "pictures": self.pictures,
            "epochs": [{"epoch": epoch, "at": round(max(0.0, at - self.start), 3)} for epoch, at in self.epochs],
            "segments": [
                {"segment": s.number, "start": round(max(0.0, s.start - self.start), 3),
                 "end": None if s.end is None or s.end > self.end else round(s.end - self.start, 3), "interrupted": s.interrupted}
                for s in segments if s.start < self.end and (s.end is None or s.end > self.start)
            ],
        }  # fmt: skip


class Recorder:
    """A Sink (packets.Sink) that records; whoever makes it runs run() as a task until after close().

    facts: what the side-cars say of the session (session, avatar, consent, owner). sign: None leaves files unsigned.
    report(event, facts): recording_started, recording_finished, recording_failed, recording_unsigned. wall: UTC time.
    """

    name, wants = "record", frozenset({H264, AAC})

    def __init__(
        self, width: int, height: int, storage: StorageConfig, outputs: OutputsConfig, *, facts: dict | None = None, sign: Sign | None = None,
        ask_keyframe: Callable[[], None] = lambda: None, report: Callable[[str, dict], None] = lambda event, facts: None,
        clock: Callable[[], float] = now, wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):  # fmt: skip
        self.folder = private_folder(Path(storage.folder) / RECORDINGS)
        self.status = OutputStatus(name=self.name, kind=self.name, url="")
        self.writer: Writer | None = None
        self.left: Callable[[Packet], None] = lambda packet: None  # told of each as it leaves
        self._job = {"format": "mp4", "options": OPTIONS, "width": width, "height": height, "sound": AAC, "channels": 1}
        self._storage, self._outputs, self._facts, self._sign = storage, outputs, facts or {}, sign
        self._ask_keyframe, self._report, self._clock, self._wall = ask_keyframe, report, clock, wall
        self._closing, self._seconds, self._segments = asyncio.Event(), 0.0, list[Segment]()
        self._carried: deque[Packet] = deque()  # came before the cut was made and belong behind it
        self._edge = self._fresh_edge()
        self._disk, self._at_work = ThreadPoolExecutor(1, "recorder"), set[asyncio.Task]()

    # ---- the Sink

    def put(self, item: Packet | Tick) -> None:
        """Queue a packet."""
        self._edge.put(item)
        self._seconds = max(self._seconds, item.seconds)

    def flush(self, epoch: int) -> None:
        """Nothing: what was put has been shown, so it belongs in the record."""

    def close(self) -> None:
        """Finish the file, end run()."""
        self._closing.set()
        self._edge.close()

    def note(self, event: str, data: dict) -> None:
        """Take in an event of the session, now: speak.started and speak.finished become segments of the side-car."""
        if event == "speak.started":
            self._segments.append(Segment(data["segment"], self._seconds))
        elif event == "speak.finished":
            for segment in self._segments:
                if segment.end is None and segment.number == data["segment"]:
                    segment.end, segment.interrupted = self._seconds, bool(data.get("interrupted"))

    def level(self) -> Level:
        """Of the edge."""
        return self._edge.level()

    def _fresh_edge(self) -> Edge:
        edge = Edge(self.name, seconds=EDGE_SECONDS, sound_seconds=EDGE_SECONDS, ask_keyframe=self._ask_keyframe)
        if self._closing.is_set():
            edge.close()
        return edge

    # ---- files

    async def run(self) -> None:
        """Record file after file until close(); a file that fails is kept as far as it goes, and another begun later."""
        try:
            while (first := await self._first()) is not None:
                try:
                    await self._record(first)
                except (LiveAvatarError, OSError) as error:
                    self._failed(str(error))
                    await self._pause()
        finally:
            await asyncio.gather(*self._at_work)
            self._disk.shutdown(wait=False)
            self._set(state="closed")

    async def _first(self) -> Packet | None:
        """The keyframe that the next file begins with; None after close()."""
        if not self._carried:
            self._ask_keyframe()
        while (packet := await self._take()) is not None and not (packet.codec == H264 and packet.keyframe):
            pass
        return packet

    async def _take(self) -> Packet | None:
        return self._carried.popleft() if self._carried else await self._edge.get()

    async def _record(self, first: Packet) -> None:
        """One file, from `first` to the cut or the end."""
        file = File(f"{secrets.token_hex(16)}.mp4", self._wall().isoformat(timespec="milliseconds"), first.seconds, first.seconds)
        part, whole = self.folder / (file.name + PART), False
        self._on_disk(write_sidecar, part, {**self._facts, **file.facts(()), "complete": False})
        self.writer = Writer({**self._job, "url": str(part)}, self._outputs.stall_seconds, self._clock, self._progressed)
        self._set(url=file.name)
        self._report("recording_started", {"file": file.name})
        try:
            await self.writer.drive(lambda writer: self._feed(writer, file, first))
            whole = True
        finally:
            facts = {**self._facts, **file.facts(self._segments), "drops": self._edge.drops, "complete": whole}
            self._on_disk(finish, part, facts, self._sign)
            self._segments = [s for s in self._segments if s.end is None or s.end > file.end]

    async def _feed(self, writer: Writer, file: File, first: Packet) -> None:
        """Send until the first keyframe after recording_seconds; its picture and what follows open the next file.

        Sound lags behind pictures in the encoder: what belongs before the cut still comes after that keyframe.
        """
        origin, packet, ahead = first.pts * FPS // first.rate, first, []
        while packet is not None:
            behind = packet.codec == H264 or packet.seconds >= ahead[0].seconds if ahead else self._due(packet, file)
            if behind:
                ahead.append(packet)
                if packet.codec == AAC or len(ahead) == CUT_PACKETS:
                    break
            elif packet.seconds >= file.start:  # sound of before the first picture belongs to nothing
                await writer.send(packet, origin)
                self.left(packet)
                file.take(packet)
            packet = await self._take()
        self._carried.extendleft(reversed(ahead))
        writer.finish()

    def _due(self, packet: Packet, file: File) -> bool:
        return packet.codec == H264 and packet.keyframe and packet.seconds - file.start >= self._storage.recording_seconds

    # ---- what goes on beside

    def _on_disk(self, work: Callable[..., list[tuple[str, dict]]], *args) -> None:
        """Have `work` done on the recorder's thread, in order, and report what it gives."""
        task = asyncio.create_task(self._reported(asyncio.get_running_loop().run_in_executor(self._disk, work, *args)))
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)

    async def _reported(self, work: asyncio.Future) -> None:
        try:
            for event in await work:
                self._report(*event)
        except OSError as error:
            self._failed(error.strerror)

    def _set(self, **changes) -> None:
        self.status = replace(self.status, **changes)

    def _progressed(self, size: int) -> None:
        self._set(state="live", failures=0, bytes=self.status.bytes + size, progress=self._clock(), drops=self._edge.drops)

    def _failed(self, reason: str) -> None:
        self._set(state="waiting", failures=self.status.failures + 1, last_error=reason)
        self._report("recording_failed", {"file": self.status.url, "reason": reason})

    async def _pause(self) -> None:
        """After a failure; what came meanwhile is lost."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), longest_wait(self._outputs, self.status.failures))
        self._carried.clear()
        self._edge = self._fresh_edge()


# ---------------------------------------------------------------- on disk: these block


def sidecar(path: Path) -> Path:
    """Of a recording or its unfinished file."""
    return path.with_name(path.name.split(".")[0] + ".json")


def write_sidecar(path: Path, facts: dict) -> list[tuple[str, dict]]:
    """Say what is known of the recording `path`; gives no events."""
    replace_file(sidecar(path), json.dumps(facts, indent=1).encode())
    return []


def finish(part: Path, facts: dict, sign: Sign | None) -> list[tuple[str, dict]]:
    """Sign, hash and name a file that nobody writes any more; the events that tell of it. Raises OSError."""
    path = part.with_name(part.name.removesuffix(PART))
    if not _trimmed(part):
        part.unlink(missing_ok=True)
        sidecar(part).unlink(missing_ok=True)
        return []
    events = []
    if sign is not None:
        try:
            sign(part, path.name)
        except LiveAvatarError as error:
            events.append(("recording_unsigned", {"file": path.name, "reason": str(error)}))
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    facts = {**facts, "signed": sign is not None and not events, "bytes": part.stat().st_size, "sha256": digest}
    write_sidecar(part, facts)
    part.replace(path)
    flush_folder(path.parent)
    return [*events, ("recording_finished", {name: facts[name] for name in ("file", "seconds", "complete", "signed", "sha256")})]


def _trimmed(part: Path) -> bool:
    """Cut off the fragment that a kill or a full disk tore; whether any is left."""
    if not part.exists():
        return False
    with part.open("r+b") as file:
        size, at, end, whole = part.stat().st_size, 0, 0, False
        while len(box := file.read(BOX.size)) == BOX.size:
            length, kind = BOX.unpack(box)
            at += max(length, BOX.size)  # none of ours is so large that it says 1, or 0 for "to the end"
            if at <= size and kind == b"mdat":
                end, whole = at, True
            file.seek(at)
        if end and at > size:
            file.truncate(end)
    return whole


def recover(folder: Path, sign: Sign | None = None) -> list[tuple[str, dict]]:
    """At start: finish what a crash of the whole server left in `folder`; the events that tell of it. What cannot be finished waits."""
    events = []
    for part in sorted(folder.glob(f"*.mp4{PART}")):
        facts = {"file": part.name.removesuffix(PART), "seconds": None, "complete": False}
        if sidecar(part).exists():
            facts = json.loads(sidecar(part).read_bytes()) | facts
        try:
            events += finish(part, facts, sign)
        except OSError as error:
            events.append(("recording_failed", {"file": facts["file"], "reason": error.strerror}))
    return events


def expire(folder: Path, before: float) -> list[str]:
    """Remove recordings last written before this Unix time (REC-4); their names."""
    old = []
    for path in sorted(folder.glob("*.mp4")):
        with suppress(FileNotFoundError):  # its owner was quicker
            if path.stat().st_mtime < before:
                path.unlink()
                sidecar(path).unlink(missing_ok=True)
                old.append(path.name)
    return old
