"""What a session shows and sounds at each tick: a pure function of what was generated and what was asked.

No clock, no task, no socket. `Pacer` says when the next tick is due; `Playout` says what it is. Blocks come in with
their sound, so picture and sound of a tick are one slot and cannot part (CLK-1). Where nothing was generated the
picture goes on: the last one for a moment, then a loop of idle pictures, blended at both ends (ENG-4, 17.3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from liveavatar.serving.packets import SOUND_RATE, TICK_SAMPLES, TICK_SECONDS

LATE_SECONDS = 0.3  # later than this the clock is set anew, once, instead of a burst (CLK-2)
HOLD_TICKS = 5  # the last picture may stand for 200 ms (BP-3)
BLEND_TICKS = 4
LOOP_TICKS = 48  # idle pictures kept for when the engine is away
FADE_SAMPLES = round(0.008 * SOUND_RATE)  # of sound that is cut off


class Pacer:
    """Absolute deadlines t0 + n / 25 on the caller's clock; a stall moves t0 on instead of bursting.

    reanchors: how often that happened.
    """

    def __init__(self, now: float):
        self.origin, self.ticks, self.reanchors = now, 0, 0

    @property
    def due(self) -> float:
        """Clock seconds of the next tick."""
        return self.origin + float(self.ticks * TICK_SECONDS)

    def tick(self, now: float) -> float:
        """The next tick goes now; returns how many seconds it is late (0: in time)."""
        late = max(0.0, now - self.due)
        if late > LATE_SECONDS:
            self.origin += late
            self.reanchors += 1
        self.ticks += 1
        return late


@dataclass(frozen=True, slots=True)
class Slot:
    """One generated picture with its sound. source: pushed 16 kHz samples [start, stop) it says. block: it came from; -1: none."""

    epoch: int
    kind: str
    picture: np.ndarray  # uint8 [H, W, 3]
    sound: np.ndarray  # int16 [1920]
    source: tuple[int, int]
    block: int = -1


@dataclass
class Counts:
    """Of one session, in ticks. repeated: an old picture stood in; filled: the idle loop did; skipped: pictures not
    shown because their sound was played ahead; hurried: idle ones not shown because speech came; stale: slots of an
    older epoch that were thrown away."""

    fresh: int = 0
    repeated: int = 0
    filled: int = 0
    skipped: int = 0
    hurried: int = 0
    stale: int = 0


class Playout:
    """The queue between engine and viewers, and what is shown when it is empty.

    still: uint8 [H, W, 3], shown until something was generated. ahead(stop): int16 [1920] of sound that was pushed at
    and after the 16 kHz position `stop` and not yet generated, None where nothing or less than a tick was: in the midst
    of speech it goes on for up to HOLD_TICKS while the picture stands; a "livestream" then skips the pictures of that
    sound, a "conversation" is silent from the start and loses nothing. The queue itself has no bound: the engine's
    credits bound it (runtime.in_flight), since a taken block is at most one more.
    """

    def __init__(self, still: np.ndarray, *, mode: str = "conversation", ahead: Callable[[int], np.ndarray | None] = lambda stop: None):
        self.mode, self.counts, self.epoch = mode, Counts(), 0
        self._ahead, self._queue = ahead, deque[Slot]()
        self._last = Slot(0, "filler", still, silence(), (0, 0))
        self._loop = deque[np.ndarray](maxlen=LOOP_TICKS)
        self._missed, self._debt, self._blend_from, self._blend = 0, 0, still, 0
        self._tail: np.ndarray | None = None  # sound that was cut off, faded

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def can_loop(self) -> bool:
        """There are idle pictures enough to stand in for new ones."""
        return len(self._loop) >= LOOP_TICKS // 2

    @property
    def generated(self) -> int | None:
        """16 kHz position up to which pictures wait; None when none do."""
        return self._queue[-1].source[1] if self._queue else None

    def push(self, slots: list[Slot]) -> None:
        """One generated block; what is older than the epoch is dropped, so are pictures whose sound went ahead.

        Speech in a conversation does not wait behind idle pictures that nobody has seen yet: they go, and a blend hides it.
        """
        if self.mode == "conversation" and slots and slots[0].kind == "speech" and self._queue and self._queue[-1].kind == "idle":
            self.counts.hurried += self._hurry()
        for slot in slots:
            if slot.epoch < self.epoch:
                self.counts.stale += 1
            elif self._debt and slot.kind == "speech":
                self._debt -= 1
                self.counts.skipped += 1
            else:
                self._queue.append(slot)

    def _hurry(self) -> int:
        before = len(self._queue)
        while self._queue and self._queue[-1].kind == "idle":
            self._queue.pop()
        self._blend_from, self._blend = self._last.picture, BLEND_TICKS
        return before - len(self._queue)

    def interrupt(self, epoch: int) -> None:
        """Nothing older than `epoch` is shown or heard from now on; the sound that stops is faded out."""
        following = self._queue[0].sound if self._queue and self._last.kind == "speech" else None
        self.counts.stale += len(self._queue)
        self._queue.clear()
        self.epoch, self._debt = epoch, 0
        self._tail = None if following is None else faded(following)

    def next(self) -> Slot:
        """What the next tick shows."""
        slot = self._fresh(self._queue.popleft()) if self._queue else self._missing()
        self._last = slot
        return slot

    def _fresh(self, slot: Slot) -> Slot:
        if self._missed > HOLD_TICKS:  # coming back from the loop: no jump
            self._blend_from, self._blend = self._last.picture, BLEND_TICKS
        if self._tail is not None:  # the new epoch speaks at once: the old one still ends without a click
            slot = replace(slot, sound=np.clip(slot.sound.astype(np.int32) + self._tail, -32768, 32767).astype(np.int16))
        self._missed, self._tail = 0, None
        self.counts.fresh += 1
        if slot.kind == "idle":
            self._loop.append(slot.picture)
        return self._blended(slot)

    def _missing(self) -> Slot:
        self._missed += 1
        if self._missed <= HOLD_TICKS or not self._loop:
            self.counts.repeated += 1
            slot = replace(self._last, kind="filler", epoch=self.epoch, block=-1, sound=silence(), source=(self._last.source[1],) * 2)
            return self._spoken_ahead(slot)
        if self._missed == HOLD_TICKS + 1:
            self._blend_from, self._blend = self._last.picture, BLEND_TICKS
        self.counts.filled += 1
        step = self._missed - HOLD_TICKS - 1
        picture = self._loop[-1 - bounce(step, len(self._loop))]
        return self._blended(Slot(self.epoch, "filler", picture, silence(), (self._last.source[1],) * 2))

    def _spoken_ahead(self, slot: Slot) -> Slot:
        """Sound while the picture stands: the faded end of what was cut off, or speech that goes on."""
        if self._tail is not None:
            tail, self._tail = self._tail, None
            return replace(slot, sound=tail)
        if self.mode != "livestream" or self._missed > HOLD_TICKS or not self._saying:
            return slot
        stop = slot.source[1]
        sound = self._ahead(stop)
        if sound is None:
            return slot
        self._debt += 1
        return replace(slot, kind="speech", sound=sound, source=(stop, stop + len(sound) // 3))

    @property
    def _saying(self) -> bool:
        return self._last.kind == "speech"

    def _blended(self, slot: Slot) -> Slot:
        if not self._blend:
            return slot
        share = self._blend / (BLEND_TICKS + 1)
        self._blend -= 1
        mixed = slot.picture.astype(np.float32) * (1 - share) + self._blend_from.astype(np.float32) * share
        return replace(slot, picture=np.rint(mixed).astype(np.uint8))


def bounce(step: int, length: int) -> int:
    """0, 1, ..., length-1, length-2, ..., 0, 1, ...: a loop without a seam."""
    if length == 1:
        return 0
    place = step % (2 * length - 2)
    return min(place, 2 * length - 2 - place)


def silence() -> np.ndarray:
    """int16 [1920] of nothing."""
    return np.zeros(TICK_SAMPLES, np.int16)


def faded(sound: np.ndarray) -> np.ndarray:
    """int16 [1920]: the first FADE_SAMPLES of `sound`, faded to nothing."""
    tail = silence()
    tail[:FADE_SAMPLES] = (sound[:FADE_SAMPLES] * np.linspace(1, 0, FADE_SAMPLES)).astype(np.int16)
    return tail
