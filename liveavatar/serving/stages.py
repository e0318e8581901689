"""How fast the chain is, live: the engine's notes become block timing, real-time factor and the latency budget.

`Stages.note` is the `watch` of Engine.start: it is given every line of a trace (telemetry.FIELDS) as it happens, so a
trace file of yesterday can be played through it too. Spans need runtime.spans or runtime.trace; without them there is
no block timing and no real-time factor, and none is exported.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from liveavatar.runtime.seats import Seat, seated
from liveavatar.serving.metrics import STAGES, Metrics

WINDOW = 10.0  # s, over which work and media are weighed
BLOCKS_KEPT = 256  # that are on the way, or lately arrived
RECENT = 25  # blocks, and utterances, of which the budget is the median
HEARD = 64  # pieces of sound per session whose arrival is remembered
PRIMING = ("Open", "Opened", "Close")  # messages whose work is no block's
PARTS = ("audio_wait", "condition", "steps", "decode", "transit")  # of the budget, in their order


def stage_of(role: str) -> str:
    """Denoiser2 -> step2. Roles the table does not name are "other"."""
    stage = {"Conditioner": "condition", "Decoder": "decode"}.get(role, role.replace("Denoiser", "step"))
    return stage if stage in STAGES else "other"


@dataclass
class Rank:
    """What one rank does. work: (when it ended, seconds) within the window. rss, gpu: bytes, as last told."""

    work: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=4096))
    rss: int = 0
    gpu: int = 0


@dataclass
class _Journey:
    """A block on its way. Seconds; times are the engine's clock."""

    admitted: float
    ready: float | None = None
    rank: int = 0  # where it is, or waits
    stages: dict[str, float] = field(default_factory=dict)

    def parts(self) -> dict[str, float]:
        """Seconds per part of the budget but the first."""
        steps = sum(seconds for stage, seconds in self.stages.items() if stage.startswith("step"))
        worked = sum(self.stages.values())
        return {"condition": self.stages.get("condition", 0.0), "steps": steps, "decode": self.stages.get("decode", 0.0),
                "transit": max(0.0, self.ready - self.admitted - worked)}  # fmt: skip


class Stages:
    """Watches one chain. group: its label. clock: the engine's. wall: Unix time."""

    def __init__(self, metrics: Metrics, *, group: str = "0", engine: str = "model", clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time):  # fmt: skip
        self._metrics, self._group, self._engine, self._clock, self._wall = metrics, group, engine, clock, wall
        self._fps = 25
        self._seats: tuple[Seat, ...] = ()
        self.ranks: dict[int, Rank] = {}
        self._made: deque[tuple[float, str, float]] = deque(maxlen=4096)  # when, session, media seconds
        self._journeys: OrderedDict[tuple[str, int], _Journey] = OrderedDict()
        self._heard: dict[str, deque[tuple[int, float]]] = {}  # session -> (samples received until then, when)
        self._idle: dict[str, bool] = {}  # session -> its last block had no sound
        self._waits: deque[float] = deque(maxlen=RECENT)
        metrics.watch("realtime_factor", self._factor)
        metrics.watch("process_resident_bytes", lambda: [((f"rank{n}",), rank.rss) for n, rank in self.ranks.items()])
        metrics.watch("rank_gpu_bytes", lambda: [((f"rank{n}",), rank.gpu) for n, rank in self.ranks.items()])

    def note(self, line: dict) -> None:
        """A line of the trace; events that say nothing about speed pass by."""
        handle = getattr(self, f"_on_{line['event']}", None)
        if handle is not None:
            handle(line)

    # ------------------------------------------------------------ events

    def _on_trace(self, line: dict) -> None:
        """A chain starts; one before it is gone with all that was on the way."""
        facts = line["facts"]
        self._fps, self._seats = line["fps"], seated(facts["stages"], facts.get("shards")) if facts.get("stages") else ()
        for state in (self.ranks, self._made, self._journeys, self._heard, self._idle):
            state.clear()

    def _on_open(self, line: dict) -> None:
        self._heard[line["session"]], self._idle[line["session"]] = deque(maxlen=HEARD), True

    def _on_closed(self, line: dict) -> None:
        self._heard.pop(line["session"], None)
        self._idle.pop(line["session"], None)

    def _on_received(self, line: dict) -> None:
        if line["session"] in self._heard:
            self._heard[line["session"]].append((line["stop"], line["t"]))

    def _on_interrupt(self, line: dict) -> None:
        self._idle[line["session"]] = True

    def _on_admitted(self, line: dict) -> None:
        session, idle = line["session"], line["stop"] == line["start"]
        self._journeys[session, line["block"]] = _Journey(line["t"])
        while len(self._journeys) > BLOCKS_KEPT:
            self._journeys.popitem(last=False)
        if self._idle.get(session) and not idle:  # an utterance begins: what waited longest in its block was its first sample
            came = next((when for stop, when in self._heard.get(session, ()) if stop > line["start"]), None)
            if came is not None:
                self._waits.append(line["t"] - came)
        self._idle[session] = idle

    def _on_span(self, line: dict) -> None:
        rank, seconds = self.ranks.setdefault(line["rank"], Rank()), line["end"] - line["start"]
        rank.rss, rank.gpu = line["rss"], line["gpu"]
        if line["what"] in PRIMING:
            return
        rank.work.append((line["t"], seconds))
        if line["block"] is not None and line["what"] in ("Audio", "Block"):
            stage = stage_of(line["role"])
            self._metrics.block_stage(self._group, stage, seconds)
            if journey := self._journeys.get((line["session"], line["block"])):
                journey.stages[stage] = journey.stages.get(stage, 0.0) + seconds
                journey.rank = self._after(line["rank"], stage)

    def _after(self, rank: int, stage: str) -> int:
        """Where a block is that `rank`, the leader of its stage, has done `stage` of: there still, or on the way to the next leader."""
        seat = self._seats[rank] if rank < len(self._seats) else None
        return rank if seat is None or stage != seat.roles[-1] else rank + seat.shards

    def _on_ready(self, line: dict) -> None:
        self._metrics.frames_generated(self._engine, line["count"])
        self._metrics.gauge("engine_last_progress_timestamp_seconds", self._wall(), self._group)
        self._made.append((line["t"], line["session"], line["count"] / float(self._fps)))
        if journey := self._journeys.get((line["session"], line["block"])):
            journey.ready = line["t"]

    # ------------------------------------------------------------ what follows

    def _recent(self, entries: Iterable[tuple]) -> list[tuple]:
        oldest = self._clock() - WINDOW
        return [entry for entry in entries if entry[0] >= oldest]

    def throughput(self) -> float | None:
        """Media seconds the chain could make in a second, all sessions together: media made per second its busiest rank worked (BP-4)."""
        made = sum(seconds for _, _, seconds in self._recent(self._made))
        busiest = max((sum(seconds for _, seconds in self._recent(rank.work)) for rank in self.ranks.values()), default=0.0)
        return made / busiest if made and busiest else None

    def realtime_factor(self) -> float | None:
        """throughput() for each session at work (BP-2). None: nothing was made lately, or nobody reports spans."""
        working, throughput = len({session for _, session, _ in self._recent(self._made)}), self.throughput()
        return None if throughput is None else throughput / working

    def _factor(self) -> list[tuple[tuple[str, ...], float]]:
        factor = self.realtime_factor()
        return [] if factor is None else [((self._group,), factor)]

    def budget(self) -> dict[str, float | None]:
        """Median seconds from speech received to pictures at the head, by part; None: not measured.

        audio_wait: of an utterance's first sample until its block goes (a block and its look-ahead are collected).
        condition, steps, decode: roles at work. transit: between roles and in queues. Encoder and network come after.
        """
        journeys = [journey.parts() for journey in self._journeys.values() if journey.ready is not None and journey.stages][-RECENT:]
        rest = {part: statistics.median(j[part] for j in journeys) if journeys else None for part in PARTS[1:]}
        return {PARTS[0]: statistics.median(self._waits) if self._waits else None, **rest}

    def load(self) -> list[dict]:
        """The chain as the console draws it, by rank: roles, share of the last seconds at work, bytes held, blocks there or waiting."""
        def share(rank: Rank) -> float:
            return min(1.0, sum(seconds for _, seconds in self._recent(rank.work)) / WINDOW)

        here = Counter(journey.rank for (session, _), journey in self._journeys.items() if journey.ready is None and session in self._heard)
        return [{"rank": n, "roles": list(self._seats[n].roles) if n < len(self._seats) else [], "busy": share(rank), "rss": rank.rss,
                 "gpu": rank.gpu, "blocks": here[n]}
                for n, rank in sorted(self.ranks.items())]  # fmt: skip
