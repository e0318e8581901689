"""What happens to a session, numbered, kept for a while so that a client that was away can catch up (12.1)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

KEPT = 1000  # events; older ones are gone, and a reader that far behind is told so


@dataclass(frozen=True, slots=True)
class Event:
    """number: 1, 2, ... of its session. name: see serving.md 12.1. t: clock seconds."""

    number: int
    name: str
    data: dict
    t: float


class Happenings:
    """Append-only, with any number of readers; each reads at its own pace."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._events = clock, deque[Event](maxlen=KEPT)
        self._last, self._over, self._waiting = 0, False, set[asyncio.Future]()

    @property
    def last(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._last

    def __iter__(self):
        """Those that are kept, oldest first."""
        return iter(tuple(self._events))

    def add(self, name: str, **data) -> Event:
        """It happens now."""
        self._last += 1
        event = Event(self._last, name, data, self._clock())
        self._events.append(event)
        self._wake()
        return event

    def close(self) -> None:
        """Nothing more will happen: readers end after the last event."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def read(self, after: int = 0) -> AsyncIterator[Event]:
        """Every event with a number above `after`, those of the past first; "lost" in place of what is no longer kept."""
        while True:
            fresh = [event for event in self._events if event.number > after]
            if fresh and fresh[0].number > after + 1:
                yield Event(fresh[0].number - 1, "lost", {"events": fresh[0].number - after - 1}, fresh[0].t)
            for event in fresh:
                after = event.number
                yield event
            if not fresh:
                if self._over:
                    return
                future = asyncio.get_running_loop().create_future()
                self._waiting.add(future)
                try:
                    await future
                finally:
                    self._waiting.discard(future)
