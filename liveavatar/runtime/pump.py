"""The pump of a rank: messages from the inbox through the roles of its stage, one after the other.

Some roles are holders: they keep blocks for a while, so that several share a piece of work (register.py) or so that work
goes on beside the next block (beside.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import psutil
import torch

from liveavatar.core import UPWARD, Block, Message, Open, SetPrompt, SetReference, Span
from liveavatar.runtime.links import Link, LinkClosed, QueueLink
from liveavatar.runtime.worktime import Work, Worktimes, mark


def describe(message: Message) -> str:
    """A message in words for errors and heartbeats."""
    index, step = getattr(message, "index", None), getattr(message, "step", None)
    what = type(message).__name__ if index is None else f"{type(message).__name__} {index}"
    at = "" if step is None else f" at step {step}"
    return f"{what}{at} of session {message.session!r}"


LOOK_SECONDS = 0.002  # between two looks at whether a device has done what a holder keeps, if no message comes
SLOW = (Open, SetPrompt, SetReference)  # may load an encoder, and hold the interpreter for seconds


class Holder(Protocol):
    """A role that keeps messages for a while: what it was given comes out when it is advanced.

    The Pump advances holders whenever nothing waits in the inbox, and before a message they hold back, so a holder decides
    who shares a piece of work and never how long anybody waits for company. It waits for a device only where there is no room
    for more, and what one has done leaves between any two roles.
    """

    def __call__(self, message: Message) -> list[Message]: ...

    def under_way(self) -> Sequence[tuple[Callable, Message]]:
        """(who, what) of the next advance, oldest first; empty: nothing is kept."""

    def done(self) -> bool | None:
        """Whether a device has done what the next advance gives out; if not, it would wait. None: the work itself is left to advance."""

    def holds_back(self, message: Message) -> bool:
        """Whether it must advance before it can take `message`."""

    def beside(self) -> Work | None:
        """The work of the next advance where a stream of its own did it; None: advance does it as any role does."""

    def advance(self) -> list[Message]:
        """One piece of work; what is done comes out in order."""


class Pump:
    """Inbox -> roles one after the other -> next stage; what is meant for the head goes up at once.

    busy: (role, message, monotonic time it began) while a role runs, else None. Time spent waiting for
    a full link is not busy time: the blame belongs to whoever does not empty it. After a role raised it
    still says which and at what. announce: called before and after a SLOW message. traced: the rank's
    number if the head wants a Span of every role's work, else None; of what a GPU works on it comes when that is over. followers:
    links to the ranks that share this stage; they are given every message before it is worked on.
    """

    def __init__(self, roles: Sequence[Callable], inbox: QueueLink, down: Link | None, up: Callable[[Message], None],
                 announce: Callable[[], None] = lambda: None, traced: int | None = None, followers: Sequence[Link] = ()):
        self.roles, self.inbox, self.down, self.up, self.announce = tuple(roles), inbox, down, up, announce
        self.traced, self.followers = traced, tuple(followers)
        self.holders: dict[int, Holder] = {place: role for place, role in enumerate(self.roles) if hasattr(role, "advance")}
        self.busy: tuple[str, Message, float] | None = None
        self._worktimes = Worktimes()
        self._stopping = False

    @torch.no_grad()
    def run(self) -> None:
        """Until stop(), or the inbox is closed. Raises LinkBroken and whatever a role raises."""
        while not self._stopping:
            try:
                message = self.inbox.receive(self._patience())
            except LinkClosed:
                return
            self._worktimes.read()
            if message is not None:
                for follower in self.followers:
                    follower.send(message)
                self._pass(message)
            for place in self._under_way() if message is None else ():
                if self.holders[place].done() is not False:
                    self._advance(place)

    def stop(self) -> None:
        """End run() after the message at hand."""
        self._stopping = True
        self.inbox.close()

    def doing(self) -> tuple[str, float] | None:
        """What a role is at, in words, and for how many seconds."""
        busy = self.busy
        return (f"{busy[0]} on {describe(busy[1])}", time.monotonic() - busy[2]) if busy else None

    def slow(self) -> bool:
        """Whether a role is at a SLOW message."""
        busy = self.busy
        return busy is not None and isinstance(busy[1], SLOW)

    def _patience(self) -> float | None:
        """Seconds to wait for a message: as long as it takes where nothing is kept, a little where only devices are at work."""
        kept = [self.holders[place] for place in self._under_way()]
        if any(holder.done() is not False for holder in kept):
            return 0.0
        if kept:
            role, message = kept[0].under_way()[0]
            self.busy = self.busy or (type(role).__name__, message, time.monotonic())  # a device that never ends hangs like a role
        return LOOK_SECONDS if kept or self._worktimes else None

    def _under_way(self) -> list[int]:
        """Places of the holders that keep something."""
        return [place for place, holder in self.holders.items() if holder.under_way()]

    def _pass(self, message: Message, place: int = 0) -> None:
        """`message` through the roles from `place` on, and whatever it leads to, one after the other."""
        if isinstance(message, UPWARD):
            self.up(message)
        elif place < len(self.roles):
            self._give_out(place)
            while place in self.holders and self.holders[place].holds_back(message):
                self._advance(place)
            role = self.roles[place]
            # a block that is taken in is no work yet: its span comes from the advance
            who = () if place in self.holders and isinstance(message, Block) else ((role, message),)
            self._onward(place, self._work(role, message, lambda: role(message), who))
        elif self.down is not None:
            self.down.send(message)

    def _give_out(self, place: int) -> None:
        """What devices have done behind `place`."""
        for later, holder in self.holders.items():
            if later > place and holder.under_way() and holder.done():
                self._advance(later)

    def _advance(self, place: int) -> None:
        holder = self.holders[place]
        who = tuple(holder.under_way())
        self._onward(place, self._work(*who[0], holder.advance, who, holder.beside()))

    def _onward(self, place: int, made: list[Message]) -> None:
        for out in made:
            self._pass(out, place + 1)

    def _tell(self, who: Sequence[tuple[Callable, Message]], rss: int, gpu: int, start: float, end: float) -> None:
        """Spans of work from start to end; blocks that shared it have an equal part each, so that a rank's spans add up to what it
        worked."""
        each = (end - start) / len(who)
        for n, (role, item) in enumerate(who):
            step = getattr(role, "index", None)
            self.up(Span(item.session, what=type(item).__name__, index=getattr(item, "index", None), rank=self.traced,
                         role=type(role).__name__ + ("" if step is None else str(step)), start=start + n * each, end=start + (n + 1) * each,
                         rss=rss, gpu=gpu))

    def _work(self, role: Callable, message: Message, act: Callable[[], list[Message]], who: Sequence[tuple[Callable, Message]],
              beside: Work | None = None) -> list[Message]:
        """act(), known as the work of `role` on `message` while it lasts and traced as that of all in `who`. beside: if another stream
        has done the work already."""
        self.busy = (type(role).__name__, message, time.monotonic())
        if isinstance(message, SLOW):
            self.announce()
        began = None if self.traced is None else mark()
        made = act()
        if self.traced is not None and who:
            gpu = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
            told = partial(self._tell, who, psutil.Process().memory_info().rss, gpu)
            self._worktimes.add(beside or Work(began, began and mark(), self.busy[2]), told)
        self.busy = None
        if isinstance(message, SLOW):
            self.announce()
        return made
