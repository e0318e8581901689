"""Which session's block goes next, and when: decisions only, time is an argument (pipeline.md sections 2 and 6).

Two paces. "offline": as fast as the chain goes; a block is admitted when its audio and a credit are
there. "live": just in time; a block is admitted when its deadline is near, never earlier, so that a full
pipe is never the flow control (4.2 s against 2.6 s from silence to speech in a model of the pipe).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liveavatar.runtime.timeline import Timeline

PACES = ("offline", "live")
RECENT = 8  # blocks of which the median is what the pipe takes as a rule: a change of load shows within a few


@dataclass(frozen=True)
class Candidate:
    """A session as the scheduler sees it.

    ready: audio of the next block is there. gated: it must wait for something else (a sink on its way).
    in_flight: blocks admitted and not yet taken by the consumer. live: paced by `deadline`, the time on the
    scheduler's clock (s) when the next block is due for playout; None before anything was sent: due now.
    asked: when the session last had a block admitted; among equals the longest waiting goes first.
    """

    session: str
    ready: bool
    in_flight: int
    live: bool = False
    deadline: float | None = None
    gated: bool = False
    asked: float = 0.0


@dataclass(frozen=True)
class Decision:
    """admit: the session whose next block goes now, or None. wake: look again then, seconds; None: only when
    something happens. late: the session whose audio is missing although its block must go now (live idle)."""

    admit: str | None = None
    wake: float | None = None
    late: str | None = None


def candidate(name: str, timeline: Timeline, playout: Playout, *, live: bool, asked: float, parked: bool = False) -> Candidate | None:
    """A session that is open as the scheduler sees it; None when it has nothing to ask for. parked: no idle blocks."""
    if timeline.queued_seconds == 0 and (timeline.ended or parked):
        return None
    due = playout.deadline(float(timeline.next_pts)) if live and not timeline.urgent else None
    return Candidate(name, timeline.has_audio, timeline.in_flight, live, due, timeline.gated, asked)


def prepare(playout: Playout, timeline: Timeline, now: float, pipe_seconds: float) -> None:
    """The next block goes now, down a pipe that takes so long."""
    playout.admitted(now, float(timeline.next_pts), pipe_seconds)
    if timeline.urgent:
        playout.hurry(now + pipe_seconds, float(timeline.next_pts))


class PipeTime:
    """How long blocks have been taking from admission to their pictures, lately. The window is short and one hitch in it counts
    for nothing: blocks that are admitted early for long after a hitch are what makes a talk slow."""

    def __init__(self, initial: float = 0.0, window: int = 24, percentile: float = 0.95):
        self.initial, self.percentile, self._seen = initial, percentile, deque(maxlen=window)

    def observe(self, seconds: float) -> None:
        """One more block took this long."""
        assert seconds >= 0, seconds
        self._seen.append(seconds)

    @property
    def typical(self) -> float:
        """The median of the last RECENT; the initial guess while nothing has been measured."""
        recent = sorted(list(self._seen)[-RECENT:])
        return recent[len(recent) // 2] if recent else self.initial

    @property
    def seconds(self) -> float:
        """The high percentile; the initial guess while nothing has been measured."""
        if not self._seen:
            return self.initial
        ordered = sorted(self._seen)
        place = math.ceil(self.percentile * len(ordered)) - 1
        return ordered[max(0, min(place, len(ordered) - 2))]


class Scheduler:
    """Earliest deadline first over sessions, at most `credits` blocks in flight per session.

    cushion: seconds a live block should be ready before it is due when the pipe is as slow as it gets. longest: seconds that
    a block is ready too early at most when the pipe is as it is as a rule, a block's length (CLK-4): what waits to be played is
    then a block and that, whatever hitches there were, since pictures made long ahead make an answer late (serving.md 4).
    """

    def __init__(self, *, credits: int, cushion: float = 0.12, longest: float = 0.48, pipe_time: PipeTime | None = None):
        assert credits >= 1 and 0 <= cushion <= longest, (credits, cushion, longest)
        self.credits, self.cushion, self.longest, self.pipe_time = credits, cushion, longest, pipe_time or PipeTime()

    @property
    def lead(self) -> float:
        """Seconds before it is due that a live block goes."""
        slow, typical = self.pipe_time.seconds, self.pipe_time.typical
        return typical + min(self.longest, max(0.0, slow - typical) + self.cushion)

    def latest_admission(self, candidate: Candidate) -> float:
        """Clock time (s) when the next block of a live candidate must go; -inf: now."""
        if candidate.deadline is None:
            return -math.inf
        return candidate.deadline - self.lead

    def decide(self, now: float, candidates: list[Candidate]) -> Decision:
        """What to do at time `now`. Ask again after every admission, arrival and at `wake`.

        Live sessions that are due come first, by deadline; then offline ones, longest waiting first.
        """
        free = [c for c in candidates if c.in_flight < self.credits and not c.gated]
        live = sorted((c for c in free if c.live), key=lambda c: (self.latest_admission(c), c.asked, c.session))
        for first in live[:1]:
            if self.latest_admission(first) <= now:
                return Decision(admit=first.session) if first.ready else Decision(late=first.session)
        wake = self.latest_admission(live[0]) if live else None
        offline = min((c for c in free if c.ready and not c.live), key=lambda c: (c.asked, c.session), default=None)
        return Decision(admit=offline.session if offline else None, wake=wake)


class Playout:
    """When a live session's blocks are due. The first picture shown sets the clock; an underrun moves it on.

    A consumer with a clock of its own says when its next block is due (`paced`). An answer that breaks into idle pictures is
    shown as soon as it is there, so what follows it is due earlier than those said (`hurry`).
    """

    def __init__(self):
        self.origin: float | None = None  # clock time (s) of pts 0
        self._hurried: float | None = None  # pts of an answer that is on its way
        self._expected: float | None = None  # the same, guessed until something was shown

    def admitted(self, now: float, pts: float, pipe_seconds: float) -> None:
        """A block that begins at `pts` was sent down a pipe that takes so long."""
        if self._expected is None:
            self._expected = now + pipe_seconds - pts

    def shown(self, now: float, pts: float) -> None:
        """Pictures that begin at `pts` seconds left at `now`."""
        at = now - pts
        self.origin = at if self.origin is None else max(self.origin, at)

    def paced(self, due: float, pts: float) -> None:
        """The consumer will show pictures that begin at `pts` at `due`."""
        if self._hurried is None or pts > self._hurried:
            self.origin, self._hurried = due - pts, None

    def hurry(self, at: float, pts: float) -> None:
        """Pictures that begin at `pts` are expected at `at` and go before what waits."""
        self.origin, self._hurried = at - pts if self.origin is None else min(self.origin, at - pts), pts

    def calm(self) -> None:
        """The answer will not come: it was interrupted."""
        self._hurried = None

    def deadline(self, pts: float) -> float | None:
        """When pictures that begin at `pts` are due; None before anything was sent."""
        origin = self._expected if self.origin is None else self.origin
        return None if origin is None else origin + pts
