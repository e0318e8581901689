"""A 24/7 channel as its owner wants it, and its schedule: what is due at a time is a pure function of what was said before.

No clock, no task, no disk. `due` says what is to be said now, `upcoming` what comes next and when; `begun` and `ended` are
what has happened, to be kept (channel_store.py), so that a server that comes back goes on where it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from liveavatar.serving.outputs import Wanted
from liveavatar.serving.problems import Unprocessable

MODE = "livestream"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing to be said. text: by the server's voice, or sound: id of one of the channel's. prompt: while it lasts.

    at: Unix seconds; None: when its turn in the list comes. every: seconds to its next time; None: once.
    """

    name: str
    text: str | None = None
    sound: str | None = None
    prompt: str | None = None
    at: float | None = None
    every: float | None = None

    def __post_init__(self):
        if (self.text is None) == (self.sound is None):
            raise Unprocessable(f"entry {self.name!r}: give text or sound, and not both")
        if self.every is not None and self.at is None:
            raise Unprocessable(f"entry {self.name!r}: every needs at, the first time")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Entries without `at` are said in the order of the list, again and again with `loop`, with a pause of gap_seconds before each.

    One with `at` comes before them: at its time, or after what is on air then, but not at all if that is late_seconds later.
    """

    entries: tuple[Entry, ...] = ()
    loop: bool = True
    gap_seconds: float = 0.0
    late_seconds: float = 60.0

    def __post_init__(self):
        _distinct("entries", (entry.name for entry in self.entries))

    def find(self, name: str | None) -> Entry | None:
        """The entry of this name."""
        return next((entry for entry in self.entries if entry.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Filler:
    """Between two entries the face goes on moving. prompts: one after the other, `seconds` each; none: the channel's own."""

    prompts: tuple[str, ...] = ()
    seconds: float = 30.0

    def prompt(self, rested: float) -> str | None:
        """So many seconds after the last entry."""
        return self.prompts[int(rested // self.seconds) % len(self.prompts)] if self.prompts else None


@dataclass(frozen=True, kw_only=True)
class SoundFile:
    """A recording that entries may name. seconds: of sound. bytes: on the disk."""

    id: str
    seconds: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Where a channel's events are posted (webhooks.py). secret: signs them."""

    url: str
    secret: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Channel:
    """id: 128 random bits, of its folder. name: one of its owner's. key: prefix of the server key whose quotas count.

    avatar, mode, prompt: as of a session. outputs: each with a name. started: it belongs on air. created: Unix seconds.
    """

    id: str
    name: str
    owner: str
    key: str
    created: float
    avatar: str
    mode: str = MODE
    prompt: str = ""
    schedule: Schedule = field(default_factory=Schedule)
    filler: Filler = field(default_factory=Filler)
    outputs: tuple[Wanted, ...] = ()
    sounds: tuple[SoundFile, ...] = ()
    started: bool = False
    webhook: Hook | None = None

    def __post_init__(self):
        _distinct("outputs", (output.name for output in self.outputs))
        known = {sound.id for sound in self.sounds}
        for entry in self.schedule.entries:
            if entry.sound is not None and entry.sound not in known:
                raise Unprocessable(f"entry {entry.name!r}: the channel has no such sound")


def _distinct(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Unprocessable(f"{what}: the name {twice[0]!r} stands there twice")


# ---------------------------------------------------------------- what is due


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What was said so far. after: the last entry of the order. spoken: of an entry with `at`, its last time that had its turn.

    until: the pause before the next of the order ends then, Unix seconds. jump: what the operator wants next.
    """

    after: str | None = None
    spoken: dict[str, float] = field(default_factory=dict)
    until: float = 0.0
    jump: str | None = None


@dataclass(frozen=True)
class Turn:
    """An entry whose turn it is. slot: the time it was meant for; None: no time was."""

    entry: Entry
    slot: float | None = None


def due(schedule: Schedule, progress: Progress, now: float) -> Turn | None:
    """What is to be said at `now` (Unix seconds) if nothing is: the operator's wish, then what has its time, then the order."""
    if (wish := schedule.find(progress.jump)) is not None:
        return Turn(wish)
    timed = [Turn(entry, slot) for entry in schedule.entries if (slot := _slots(entry, now)[0]) is not None
             and now - slot <= schedule.late_seconds and not slot <= progress.spoken.get(entry.name, -math.inf) <= now]  # fmt: skip
    if timed:
        return min(timed, key=lambda turn: turn.slot)
    following = _following(schedule, progress.after)
    return None if following is None or _pausing(schedule, progress, now) else Turn(following)


def upcoming(schedule: Schedule, progress: Progress, now: float) -> tuple[Entry, float] | None:
    """What is said next if nothing is now, and when; None: nothing ever."""
    if (turn := due(schedule, progress, now)) is not None:
        return turn.entry, now
    coming = [(entry, slot) for entry in schedule.entries if (slot := _slots(entry, now)[1]) is not None]
    if (following := _following(schedule, progress.after)) is not None:
        coming.append((following, progress.until))
    return min(coming, key=lambda pair: pair[1], default=None)  # at equal times what has a time comes first: it stands first


def begun(schedule: Schedule, progress: Progress, turn: Turn) -> Progress:
    """This turn was taken."""
    entry, known = turn.entry, {entry.name for entry in schedule.entries}
    spoken = {name: slot for name, slot in progress.spoken.items() if name in known}
    if turn.slot is not None:
        spoken[entry.name] = turn.slot
    return replace(progress, jump=None, spoken=spoken, after=entry.name if entry.at is None else progress.after)


def ended(schedule: Schedule, progress: Progress, now: float) -> Progress:
    """It was heard to its end, or cut, at `now`."""
    return replace(progress, until=now + schedule.gap_seconds)


def _following(schedule: Schedule, after: str | None) -> Entry | None:
    """What comes after this entry in the order; the first where there is no such entry (any more)."""
    ordered = [entry for entry in schedule.entries if entry.at is None]
    names = [entry.name for entry in ordered]
    place = names.index(after) + 1 if after in names else 0
    if place == len(ordered) and schedule.loop:
        place = 0
    return ordered[place] if place < len(ordered) else None


def _pausing(schedule: Schedule, progress: Progress, now: float) -> bool:
    """A pause that is longer than any, by more than a second, is one that a clock set back has made."""
    return 0 < progress.until - now <= schedule.gap_seconds + 1


def _slots(entry: Entry, now: float) -> tuple[float | None, float | None]:
    """Of the times an entry is meant for: the last at or before `now`, the first after it."""
    if entry.at is None:
        return None, None
    if entry.at > now:
        return None, entry.at
    if entry.every is None:
        return entry.at, None
    past = math.floor((now - entry.at) / entry.every)  # so many times or one more or less, as the quotient was rounded
    while entry.at + past * entry.every <= now:
        past += 1
    while entry.at + (past - 1) * entry.every > now:
        past -= 1
    return entry.at + (past - 1) * entry.every, entry.at + past * entry.every
