"""What a server leaves out when it is too slow for those who are here, rung by rung, and when (BP-2). Pure: time is an argument.

The real-time factor of a session is seconds of fresh pictures that left per second of the clock: it falls below 1 for a chain that is
late and for an encoder that is. The lowest of all sessions moves the whole server, for they share the chain and the cores.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from liveavatar.serving.packets import TICK_SECONDS

WINDOW = 125  # ticks a factor looks back on
PERSIST_SECONDS = 6.0  # so long it must be low before anything is left out: longer than the window, so that one hitch is forgiven
CALM_SECONDS, CALMEST_SECONDS = 15.0, 240.0  # so long all must be well before a rung is given back; doubled when that was too early
IN_TIME = 0.98  # a factor at which all is well: two pictures of the window may be missing


@dataclass(frozen=True, slots=True)
class Rung:
    """step: its number in events and metrics. what: is left out. below: factor under which that is less than what is lost anyway."""

    step: int
    what: str
    below: float


GROUND = Rung(0, "nothing", 1.0)
FEWER_STEPS = Rung(1, "last denoising step", 0.97)  # pipeline.md section 4
LOWER_FPS = Rung(2, "every second picture", 0.9)
SMALLER = Rung(3, "half the width and height", 0.9)
# 4 is a cheap mode that moves the lips alone: a block is denoised and decoded whole, so a body that stands still saves nothing (docs/api.md)
IDLE_LOOP = Rung(5, "new pictures of who does not speak", 0.8)


class Factor:
    """The real-time factor of one session over its last WINDOW ticks; 1 until something is lost."""

    def __init__(self):
        self._ticks: deque[tuple[float, bool]] = deque()  # when, whether something was missing
        self._missing = 0

    def tick(self, now: float, missing: bool) -> None:
        """A tick left at `now`; missing: an old picture stood in because no new one was there."""
        self._ticks.append((now, missing))
        self._missing += missing
        if len(self._ticks) > WINDOW:
            self._missing -= self._ticks.popleft()[1]

    @property
    def value(self) -> float:
        """Seconds per second."""
        behind = self._ticks[-1][0] - self._ticks[0][0] - (len(self._ticks) - 1) * float(TICK_SECONDS) if self._ticks else 0.0
        return (1 - self._missing / WINDOW) / (1 + max(0.0, behind) / (WINDOW * float(TICK_SECONDS)))


class Ladder:
    """The rung a server stands on. rungs: those that do something here, in order.

    It goes up one rung where the factor has been below that rung's for PERSIST_SECONDS, and down one after CALM_SECONDS in
    which all was well; a rung that was given back too early is kept twice as long the next time.
    """

    def __init__(self, rungs: tuple[Rung, ...]):
        self._rungs, self._place = (GROUND, *rungs), 0
        self._since: dict[str, float | None] = {"slow": None, "well": None}
        self._given_back, self._patience = -math.inf, CALM_SECONDS

    @property
    def rung(self) -> Rung:
        """What is left out now, with all before it."""
        return self._rungs[self._place]

    def look(self, now: float, factor: float | None) -> bool:
        """factor: of the session that is worst off; None: nobody is there. Returns whether `rung` changed."""
        before = self._place
        if factor is None:
            self._place = 0
        elif self._for(now, "slow", self._place + 1 < len(self._rungs) and factor < self._rungs[self._place + 1].below) >= PERSIST_SECONDS:
            self._up(now)
        elif self._for(now, "well", self._place > 0 and factor >= IN_TIME) >= self._patience:
            self._place, self._given_back = self._place - 1, now
        if self._place != before:
            self._since = {"slow": None, "well": None}
        return self._place != before

    def _for(self, now: float, name: str, true: bool) -> float:
        """Seconds for which this has been true without a break."""
        since = self._since[name] = (now if self._since[name] is None else self._since[name]) if true else None
        return -math.inf if since is None else now - since

    def _up(self, now: float) -> None:
        if self._given_back > -math.inf:
            early = now - self._given_back < 2 * self._patience
            self._patience, self._given_back = min(CALMEST_SECONDS, 2 * self._patience) if early else CALM_SECONDS, -math.inf
        self._place += 1
