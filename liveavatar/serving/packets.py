"""The nouns of serving: what a session sends out, raw and encoded, and who takes it.

One clock: tick n of a session is one picture and the 40 ms of sound that belong to it, both at n / 25 s. Whatever
is encoded keeps that time: a picture's pts is n / 25 s, a sample's m / 48,000 s, both from the session's start, for
weeks (64-bit positions; whoever has a field that wraps wraps it himself).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from liveavatar.core import FPS

SOUND_RATE = 48_000  # Hz, of all sound that leaves
TICK_SAMPLES = SOUND_RATE // FPS  # of sound to one picture: 1,920
TICK_SECONDS = Fraction(1, FPS)
VIDEO_RATE = 90_000  # Hz, of the time stamps of encoded pictures
H264, OPUS, AAC = CODECS = ("h264", "opus", "aac")


@dataclass(frozen=True, slots=True)
class Mark:
    """A segment of speech began ("started") or ended ("finished"). position_ms: how much of it was heard."""

    name: str
    segment: int
    position_ms: int = 0
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """One picture and its sound, as they leave the session.

    index: ticks since the session began. epoch: raised by every interruption. kind: "speech", "idle" (the engine
    made it of silence) or "filler" (the engine gave nothing: an old picture). picture: uint8 [H, W, 3] RGB, marked.
    sound: int16 [1920], 48 kHz mono. late: seconds after its deadline. marks: segments that began with this tick's
    sound, or ended with it. block: the engine's that it comes from; -1: none.
    """

    index: int
    epoch: int
    kind: str
    picture: np.ndarray
    sound: np.ndarray
    late: float = 0.0
    marks: tuple[Mark, ...] = ()
    block: int = -1


@dataclass(frozen=True, slots=True)
class Packet:
    """An encoded piece of one track.

    codec: "h264" (an access unit, Annex B, SPS and PPS before each IDR), "opus" (20 ms) or "aac" (raw, 1,024
    samples; the AudioSpecificConfig is the encoder's `extradata`). pts, duration: units of 1/rate s; rate: 90,000 of
    pictures, 48,000 of sound. keyframe: decodable without what came before. epoch: of its tick. made: clock seconds
    at which its tick left the playout.
    """

    codec: str
    data: bytes
    pts: int
    duration: int
    rate: int
    keyframe: bool
    epoch: int
    made: float

    @property
    def seconds(self) -> float:
        """pts in seconds."""
        return self.pts / self.rate


class Sink(Protocol):
    """Takes what a session sends. Every call comes from the event loop and must return at once.

    wants: codecs it takes, or {"raw"} for Ticks. The session calls `put` with each Packet (or Tick) of those, `flush`
    after an interruption (nothing of an epoch older than `epoch` may leave any more), `close` when the session ends.
    """

    name: str
    wants: frozenset[str]

    def put(self, item: Packet | Tick) -> None: ...

    def flush(self, epoch: int) -> None: ...

    def close(self) -> None: ...


class Level(NamedTuple):
    """A queue now, for the metrics. depth, capacity: items (seconds, of speech that waits). Since it was made, drops: thrown away
    for want of room; stale: thrown away because an interruption made them worthless."""

    depth: float
    capacity: float
    drops: int = 0
    stale: int = 0


class Edge:
    """A bounded queue between a session and one consumer, with the policy of its kind.

    seconds: of video it holds at most. When full: pictures up to the next keyframe are dropped (what follows a gap
    cannot be decoded) and a keyframe is asked for; sound is kept up to `sound_seconds`, then the oldest goes. Raw
    ticks count as keyframes, so of those just the oldest goes, and its marks move on to the next. `drops` counts what was thrown
    away for want of room, `stale` what was forgotten with its epoch.
    """

    def __init__(self, name: str, *, seconds: float = 0.2, sound_seconds: float = 0.2, ask_keyframe: Callable[[], None] = lambda: None):
        self.name, self.seconds, self.sound_seconds = name, seconds, sound_seconds
        self.drops, self.stale, self.closed = 0, 0, False
        self._ask_keyframe, self._waiting = ask_keyframe, asyncio.Event()
        self._items: deque[Packet | Tick] = deque()
        self._broken = False  # pictures are missing: nothing decodes until a keyframe

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Packet | Tick) -> None:
        """Append, within the bound."""
        if self.closed:
            return
        if _is_picture(item) and self._broken:
            if not _is_key(item):
                self.drops += 1
                return
            self._broken = False
        self._items.append(item)
        self._bound()
        self._waiting.set()

    def _bound(self) -> None:
        for picture, limit in ((True, self.seconds), (False, self.sound_seconds)):
            kept = [item for item in self._items if _is_picture(item) == picture]
            over = max(0, len(kept) - max(1, round(limit / _seconds(kept[-1])))) if kept else 0
            if over:
                self._drop(kept, over, picture)

    def _drop(self, kept: list, over: int, picture: bool) -> None:
        if picture:  # the rest of a broken run is of no use: up to the next key picture all goes
            while over < len(kept) and not _is_key(kept[over]):
                over += 1
            if over == len(kept):
                self._broken = True
                self._ask_keyframe()
        gone = {id(item) for item in kept[:over]}
        self._items = deque(item for item in self._items if id(item) not in gone)
        if marks := tuple(mark for item in kept[:over] if isinstance(item, Tick) for mark in item.marks):
            self._items[0] = replace(self._items[0], marks=marks + self._items[0].marks)
        self.drops += over

    def flush(self, epoch: int) -> None:
        """Forget what is older than `epoch`; pictures of the past epoch that go leave a gap, so a keyframe is asked for."""
        stale = [item for item in self._items if item.epoch < epoch]
        if any(_is_picture(item) and isinstance(item, Packet) for item in stale):
            self._broken = True
            self._ask_keyframe()
        self._items = deque(item for item in self._items if item.epoch >= epoch)
        self.stale += len(stale)

    def level(self) -> Level:
        """Pictures that wait, and how many may."""
        return Level(sum(map(_is_picture, self._items)), round(self.seconds * FPS), self.drops, self.stale)

    def close(self) -> None:
        """What is inside can still be taken; then get() returns None."""
        self.closed = True
        self._waiting.set()

    async def get(self) -> Packet | Tick | None:
        """The next item; None after close()."""
        while not self._items:
            if self.closed:
                return None
            self._waiting.clear()
            await self._waiting.wait()
        return self._items.popleft()


def _is_picture(item: Packet | Tick) -> bool:
    return isinstance(item, Tick) or item.codec == H264


def _is_key(item: Packet | Tick) -> bool:
    return isinstance(item, Tick) or item.keyframe


def _seconds(item: Packet | Tick) -> float:
    return float(TICK_SECONDS) if isinstance(item, Tick) else item.duration / item.rate
