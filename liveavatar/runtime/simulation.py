"""A chain of known stage times, played through in simulated seconds: what `liveavatar plan` predicts with.

The head is the real one: Timeline, Scheduler and Playout decide here as they do under sockets. Only the ranks are replaced, by
servers that hold a message for so many seconds and serve in order, or move blocks on together as their register would. Two
consumers: "offline" takes every block at once; "live" plays 25 pictures a second and asks as serving does (live.py), so its
underruns and the wait from speech to picture are those of a viewer, without encoder and network.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch

from liveavatar.core import FPS, Audio, CleanLatent, Frames, Geometry, Message, Refresh
from liveavatar.runtime.placement import blocks_inside, steps_of
from liveavatar.runtime.register import must_wait
from liveavatar.runtime.scheduler import PipeTime, Playout, Scheduler, candidate, prepare
from liveavatar.runtime.timeline import Timeline

NO_PICTURES = torch.zeros(12, 1, 1, 3, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of one block. roles: by name ("condition", "step0", ..., "decode"). hop: from rank to rank. refresh: a step
    needs to prefill another sink. batch: seconds of n blocks in one forward of a step, over those of one; index n - 1; more than it
    has go one lot after the other (pipeline.md section 6)."""

    roles: Mapping[str, float]
    hop: float = 0.0
    refresh: float = 0.0
    batch: tuple[float, ...] = (1.0,)

    def together(self, blocks: int) -> float:
        """Seconds of so many blocks in one forward, over those of one."""
        lots, rest = divmod(blocks, len(self.batch))
        return lots * self.batch[-1] + (self.batch[rest - 1] if rest else 0.0)


@dataclass
class Made:
    """A block of a session: when it was admitted, when its pictures reached the head, when its first one was shown.
    source: samples of speech it begins with."""

    session: str
    index: int
    admitted: float
    ready: float
    shown: float
    source: tuple[int, int]


@dataclass
class Rank:
    """A stage as a server. register: whether its steps move blocks on together (register.py), `under_way` with how many steps each has
    been through, in order of entry. queue: messages that wait; busy: seconds of work so far."""

    roles: tuple[str, ...]
    register: bool = False
    under_way: list[tuple[Audio, int]] = field(default_factory=list)
    queue: list[Message] = field(default_factory=list)
    working: bool = False
    busy: float = 0.0

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(role for role in self.roles if role.startswith("step"))

    @property
    def before(self) -> tuple[str, ...]:
        """Roles before the steps, there are some."""
        return self.roles[: self.roles.index(self.steps[0])]

    @property
    def behind(self) -> tuple[str, ...]:
        """Roles behind the steps, there are some."""
        return self.roles[self.roles.index(self.steps[-1]) + 1 :]


class _Session:
    def __init__(self, timeline: Timeline, live: bool):
        self.name, self.live, self.asked = timeline.session, live, 0.0
        self.timeline, self.playout = timeline, Playout()
        self.admitted: dict[int, float] = {}
        self.plays_until, self.last_idle, self.underrun = 0.0, True, 0.0


class Simulation:
    """One run. stages: the cut. credits: blocks of a session in the chain (None: as Engine). shift, batch: runtime.shift_register and
    runtime.batch. The clock starts at 0 with every session open and primed. After run(): `blocks` in the order they came up, `underrun`
    seconds of live pictures missing."""

    def __init__(self, stages: Sequence[Sequence[str]], costs: Costs, geometry: Geometry, *, lookahead: int = 0, refresh_block: int = 0,
                 refresh_slices: int = 1, credits: int | None = None, shift: bool = False, batch: int = 1):
        registers = [steps_of(roles) > 0 and (batch > 1 or (shift and steps_of(roles) > 1)) for roles in stages]
        self.ranks, self.costs, self.geometry = [Rank(tuple(roles), register) for roles, register in zip(stages, registers)], costs, geometry
        self.shift, self.batch = shift, batch
        self.timeline = {"lookahead": lookahead, "refresh_block": refresh_block, "refresh_slices": refresh_slices}
        self.scheduler = Scheduler(credits=credits or blocks_inside(stages, shift) + 1, longest=float(geometry.block_seconds),
                                   pipe_time=PipeTime(self.pass_seconds))  # fmt: skip
        self.steps = max((int(role[4:]) for roles in stages for role in roles if role.startswith("step")), default=0)
        self.sessions: dict[str, _Session] = {}
        self.blocks: list[Made] = []
        self.now, self._order, self._wake = 0.0, count(), None
        self._events: list[tuple] = []

    # ------------------------------------------------------------ what is asked

    @property
    def pass_seconds(self) -> float:
        """One block alone through the whole chain."""
        return sum(self._seconds_of(rank.roles) for rank in self.ranks) + self.costs.hop * (len(self.ranks) - 1)

    @property
    def fps(self) -> float:
        """Pictures per second of all sessions together, once the pipe is full: the middle half of the run."""
        ready = [block.ready for block in self.blocks]
        low, high = len(ready) // 4, len(ready) - 1 - len(ready) // 8
        return (high - low) * self.geometry.frames_per_block / (ready[high] - ready[low]) if high > low else 0.0

    @property
    def underrun(self) -> float:
        """Seconds in which a live session had no fresh picture."""
        return sum(session.underrun for session in self.sessions.values())

    def utilisation(self) -> list[float]:
        """Share of the run each rank was at work."""
        return [rank.busy / self.now if self.now else 0.0 for rank in self.ranks]

    # ------------------------------------------------------------ the run

    def offline(self, blocks: int, sessions: int = 1) -> Simulation:
        """Sessions whose audio of so many blocks each is there from the start, as fast as the chain goes."""
        for n in range(sessions):
            session = self._open(f"s{n}", live=False)
            session.timeline.push(np.ones(blocks * self.geometry.samples_per_block, np.float32))
            session.timeline.end()
        return self._run(float("inf"))

    def live(self, seconds: float, sessions: int = 1, speech: Sequence[tuple[float, int]] = ()) -> Simulation:
        """Sessions that play for so long; speech arrives in each as (when, samples), the last of it settled."""
        for n in range(sessions):
            name = self._open(f"s{n}", live=True).name
            for at, samples in speech:
                self._at(at, self._push, name, samples, (at, samples) == tuple(speech[-1]))
        return self._run(seconds)

    def _open(self, name: str, live: bool) -> _Session:
        session = self.sessions[name] = _Session(Timeline(name, self.geometry, **self.timeline), live)
        return session

    def _push(self, name: str, samples: int, last: bool) -> None:
        timeline = self.sessions[name].timeline
        timeline.push(np.ones(samples, np.float32))
        if last:
            timeline.settle()

    def _run(self, until: float) -> Simulation:
        self._admit()
        while self._events and self._events[0][0] <= until:
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
            self._admit()
        return self

    def _at(self, when: float, act, *arguments) -> None:
        heapq.heappush(self._events, (when, next(self._order), act, arguments))

    # ------------------------------------------------------------ the head

    def _admit(self) -> None:
        """As Engine._admit_or_wait, until nothing more may go now."""
        while True:
            asking = [c for s in self.sessions.values() if (c := candidate(s.name, s.timeline, s.playout, live=s.live, asked=s.asked))]
            decision = self.scheduler.decide(self.now, asking)
            chosen = decision.admit or decision.late
            if chosen is None:
                break
            session = self.sessions[chosen]
            if decision.late:
                session.timeline.idle()
            session.asked = self.now
            prepare(session.playout, session.timeline, self.now, self.scheduler.pipe_time.typical)
            for message in session.timeline.admit(self.now):
                if isinstance(message, Audio):
                    session.admitted[message.index] = self.now
                self._arrive(0, message)
        for session in self.sessions.values():  # as Engine._renew
            if refresh := session.timeline.renew():
                self._arrive(0, refresh)
        if decision.wake is not None and decision.wake != self._wake:
            self._wake = decision.wake
            self._at(max(self.now, decision.wake), lambda: None)

    def _take(self, message: Message) -> None:
        session = self.sessions[message.session]
        if isinstance(message, CleanLatent):
            session.timeline.clean(message)
            return
        self.scheduler.pipe_time.observe(self.now - session.timeline.frames(message).at)
        output = session.timeline.take()
        session.playout.shown(self.now, float(output.pts))
        shown = self._play(session, output) if session.live else self.now
        self.blocks.append(Made(session.name, output.index, session.admitted.pop(output.index), self.now, shown, output.source))

    def _play(self, session: _Session, output) -> float:
        """When the block's first picture is shown: behind those that wait, but speech goes before idle ones (serving/playout.py)."""
        idle = output.source[0] == output.source[1]
        if self.now > session.plays_until:
            session.underrun += self.now - session.plays_until
        shown = self.now if session.last_idle and not idle else max(self.now, session.plays_until)
        session.plays_until, session.last_idle = shown + len(output.pictures) / FPS, idle
        session.playout.paced(session.plays_until, float(session.timeline.shown))
        return shown

    # ------------------------------------------------------------ the ranks

    def _arrive(self, index: int, message: Message) -> None:
        self.ranks[index].queue.append(message)
        self._serve(index)

    def _serve(self, index: int) -> None:
        """Start on what a free rank does next, as Pump.run: a message that waits, or, before one that is held back and when none waits,
        a forward of the blocks under way in its register."""
        rank = self.ranks[index]
        if rank.working:
            return
        if rank.queue and not self._held_back(rank, rank.queue[0]):
            message = rank.queue.pop(0)
            if rank.register and isinstance(message, Audio):
                self._occupy(index, self._seconds_of(rank.before), self._enter, message)
            else:
                self._occupy(index, self._seconds(rank, message), self._leave, message)
                self._announce_clean(rank, message)
        elif rank.under_way:
            slowest = max(self.costs.roles[rank.steps[place]] for _, place in rank.under_way)
            self._occupy(index, slowest * self.costs.together(len(rank.under_way)), self._advance)

    def _occupy(self, index: int, seconds: float, then: Callable, *arguments) -> None:
        rank = self.ranks[index]
        rank.working, rank.busy = True, rank.busy + seconds
        self._at(self.now + seconds, self._free, index, then, arguments)

    def _free(self, index: int, then: Callable, arguments: tuple) -> None:
        self.ranks[index].working = False
        then(index, *arguments)
        self._serve(index)

    def _held_back(self, rank: Rank, message: Message) -> bool:
        """As Register.holds_back."""
        under_way = [(other.session, place) for other, place in rank.under_way]
        if isinstance(message, Audio):
            return must_wait(message.session, under_way, shift=self.shift, batch=self.batch)
        if isinstance(message, Refresh) and not message.complete:
            return False
        return any(session == message.session for session, _ in under_way)

    def _enter(self, index: int, message: Audio) -> None:
        self.ranks[index].under_way.append((message, 0))

    def _advance(self, index: int) -> None:
        """A forward of a register is over: every block under way has been through one more step; those through the last go on, one by one."""
        rank = self.ranks[index]
        moved = [(message, place + 1) for message, place in rank.under_way]
        for message, place in moved:
            if rank.steps[place - 1] == f"step{self.steps}":
                self._take(CleanLatent(message.session, index=message.index, latent=NO_PICTURES))
        rank.under_way = [item for item in moved if item[1] < len(rank.steps)]
        self._finish(index, [message for message, place in moved if place == len(rank.steps)])

    def _finish(self, index: int, done: list[Audio]) -> None:
        if done:
            self._occupy(index, self._seconds_of(self.ranks[index].behind), self._finished, done)

    def _finished(self, index: int, done: list[Audio]) -> None:
        self._leave(index, done[0])
        self._finish(index, done[1:])

    def _seconds(self, rank: Rank, message: Message) -> float:
        if isinstance(message, Audio):
            return self._seconds_of(rank.roles)
        return self.costs.refresh * len(rank.steps) / message.slices if isinstance(message, Refresh) else 0.0

    def _seconds_of(self, roles: Sequence[str]) -> float:
        return sum(self.costs.roles[role] for role in roles)

    def _announce_clean(self, rank: Rank, message: Message) -> None:
        """The last step tells the head its clean latent as soon as it has it, before the rank's other roles."""
        last = f"step{self.steps}"
        if isinstance(message, Audio) and last in rank.roles:
            delay = self._seconds_of(rank.roles[: rank.roles.index(last) + 1])
            self._at(self.now + delay, self._take, CleanLatent(message.session, index=message.index, latent=NO_PICTURES))

    def _leave(self, index: int, message: Message) -> None:
        if index + 1 < len(self.ranks):
            self._at(self.now + self.costs.hop, self._arrive, index + 1, message)
        elif isinstance(message, Audio):
            self._take(Frames(message.session, index=message.index, epoch=message.epoch, pictures=NO_PICTURES))


def turn_seconds(stages: Sequence[Sequence[str]], costs: Costs, geometry: Geometry, *, lookahead: int, microphone: bool, at: float = 10.0,
                 **together) -> float:
    """From the first sound of an answer to its first picture, in a session that was idle before.

    microphone: sound arrives as it is spoken, so a block and its look-ahead are waited for; otherwise all at once, as from a
    voice that is faster than real time. together: shift and batch of the Simulation. The worst of eight places within the idle blocks.
    """
    waits = []
    for part in range(8):
        begin = at + part * float(geometry.block_seconds) / 8
        samples = 4 * geometry.samples_per_block
        arriving = [(begin + n * 0.02, 320) for n in range(samples // 320)] if microphone else [(begin, samples)]
        run = Simulation(stages, costs, geometry, lookahead=lookahead, **together).live(begin + 20.0, speech=arriving)
        waits += [block.shown - begin for block in run.blocks if block.source[0] < block.source[1]][:1]
    return max(waits)
