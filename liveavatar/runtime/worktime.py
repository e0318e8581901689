"""When a role worked, on a GPU too, and nobody waits for the GPU to know: events around its work, read once they have happened.

A GPU's clock is not the host's and drifts from it. So the time of an event is reckoned from the last one read, and kept between
what the host knows for certain: work begins after it was given to the GPU, and was over when it was seen to be.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Told = Callable[[float, float], None]
"""Takes start and end, monotonic seconds of the host."""


class Event(Protocol):
    """torch.cuda.Event with timing."""

    def query(self) -> bool: ...

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this to `end`; both have happened."""


def mark() -> Event | None:
    """Happens when all that was given to this thread's GPU and stream so far is done; None where no GPU is used."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class Work:
    """A piece of work. given: when the host began it, or began to give it to a GPU."""

    began: Event | None  # None: it was the host's alone
    ended: Event | None
    given: float


class Worktimes:
    """Work of one rank, in the order in which it was given."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._waiting, self._last = clock, deque[tuple[Work, Told]](), None

    def __len__(self) -> int:
        """How much has not been told."""
        return len(self._waiting)

    def add(self, work: Work, tell: Told) -> None:
        """Tell of `work` once it is over; at once if it was the host's alone."""
        if work.began is None:
            tell(work.given, self._clock())
        else:
            self._waiting.append((work, tell))
            self.read()

    def read(self) -> None:
        """Tell of what is over by now."""
        while self._waiting and self._waiting[0][0].ended.query():
            work, tell = self._waiting.popleft()
            seen, took = self._clock(), work.began.elapsed_time(work.ended) / 1000
            reckoned = seen if self._last is None else self._last[1] + self._last[0].elapsed_time(work.ended) / 1000
            end = max(work.given + took, min(seen, reckoned))
            self._last = work.ended, end
            tell(end - took, end)
