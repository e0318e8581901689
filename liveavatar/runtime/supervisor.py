"""Is every rank alive? What the head knows of each, the decision made from it, and the thread that acts.

`decide` is a pure function of what was seen and the time now. It blames the first rank whose fault was
seen; a broken link is blamed only when, after a moment, nothing better explains it, because a rank that
dies breaks its neighbours' links too.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liveavatar.config import RuntimeConfig
from liveavatar.core import RankFailure

PERIOD = 0.1  # s between looks
EXIT_WAIT = 0.3  # s a lost rank's exit status is waited for, to say how it ended
LINK_GRACE = 1.0  # s in which a broken link may turn out to be another rank's death
SLOW_SILENCE = 30.0  # s a rank may be silent while it loads: imports and weight files hold the interpreter
OWN_PAUSE = 1.0  # s: a longer gap between looks was the head's own (suspended, starved) and is nobody's fault


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Budgets in seconds; see RuntimeConfig."""

    heartbeat: float
    block: float
    start: float

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> Limits:
        return cls(heartbeat=runtime.heartbeat_seconds, block=runtime.block_seconds, start=runtime.start_seconds)


@dataclass(kw_only=True)
class RankView:
    """What the head knows of one rank. Times are the head's monotonic clock; None: has not happened.

    busy: what a role is at, and since when. slow: it loads, or may have to, and can be silent for long.
    held: its messages wait for room in the head's own queue.
    """

    rank: int
    roles: tuple[str, ...]
    started: float
    connected: bool = False
    ready: bool = False
    slow: bool = True
    held: bool = False
    seen: float | None = None  # last sign of life
    busy: tuple[str, float] | None = None
    error: tuple[float, str, str] | None = None  # when, one line, traceback
    broken: tuple[float, str] | None = None  # when, one line: a link of this rank
    lost: float | None = None  # its connection ended
    ended: tuple[float, str] | None = None  # when noticed, how its process ended

    def forgive(self, seconds: float) -> None:
        """Do not count `seconds` in which the head itself stood still."""
        self.started += seconds
        if self.seen is not None:
            self.seen += seconds
        if self.busy is not None:
            self.busy = (self.busy[0], self.busy[1] + seconds)


def describe_exit(code: int) -> str:
    """An exit status in words; negative: a signal."""
    return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with status {code}"


def decide(views: Sequence[RankView], limits: Limits, now: float) -> RankFailure | None:
    """The rank to blame at time `now` (s, monotonic) and why, or None while all is well."""
    found = [(when, view, reason) for view in views for when, reason in _faults(view, limits, now)]
    if not found:
        return None
    _, view, reason = min(found, key=lambda fault: fault[0])
    failure = RankFailure(view.rank, view.roles, reason)
    if view.error is not None:
        failure.add_note(f"rank {view.rank} said:\n{view.error[2]}")
    return failure


def _faults(view: RankView, limits: Limits, now: float) -> list[tuple[float, str]]:
    """(when it happened, reason) of what is certain about one rank; the first is the best explanation."""
    if view.error is not None:
        return [view.error[:2]]
    if view.lost is not None:
        if view.ended is None and now - view.lost < EXIT_WAIT:
            return []
        return [(view.lost, view.ended[1] if view.ended else "its process is gone (the connection to it ended)")]
    if view.ended is not None:
        return [view.ended if view.connected else (view.ended[0], f"{view.ended[1]} before it was ready")]
    return _overdue(view, limits, now)


def _overdue(view: RankView, limits: Limits, now: float) -> list[tuple[float, str]]:
    """Budgets that ran out, dated to the moment they did."""
    faults = []
    if not view.ready and now - view.started > limits.start:
        faults.append((view.started + limits.start, f"not ready after {limits.start:g} s (runtime.start_seconds)"))
    silence = max(limits.heartbeat, SLOW_SILENCE) if view.slow or not view.ready else limits.heartbeat
    if view.seen is not None and not view.held and now - view.seen > silence:
        faults.append((view.seen + silence, f"no heartbeat for {now - view.seen:.1f} s: its process is stopped or stuck"))
    if view.busy is not None and not view.held and now - view.busy[1] > limits.block:
        faults.append((view.busy[1] + limits.block,
                       f"hung: {view.busy[0]} has run for {now - view.busy[1]:.1f} s (runtime.block_seconds={limits.block:g})"))
    if view.broken is not None and now - view.broken[0] > LINK_GRACE:
        faults.append((view.broken[0] + LINK_GRACE, view.broken[1]))
    return faults


class Supervisor(threading.Thread):
    """Looks at the ranks every PERIOD until it has someone to blame or is stopped.

    look(now): refreshes the views. act(failure): called once, on this thread.
    """

    def __init__(self, views: Sequence[RankView], limits: Limits, look: Callable[[float], None],
                 act: Callable[[RankFailure], None], clock: Callable[[], float] = time.monotonic):
        super().__init__(name="supervisor", daemon=True)
        self.views, self.limits, self.look, self.act, self.clock = views, limits, look, act, clock
        self._done = threading.Event()

    def stop(self) -> None:
        """No verdict is acted upon after this returns, unless it is being acted upon already."""
        self._done.set()

    def run(self) -> None:
        last = self.clock()
        while not self._done.wait(PERIOD):
            now = self.clock()
            if now - last > OWN_PAUSE:
                for view in self.views:
                    view.forgive(now - last)
            last = now
            self.look(now)
            failure = decide(self.views, self.limits, now)
            if failure is not None and not self._done.is_set():
                self.act(failure)
                return
