"""Latency, throughput and steadiness of a run, from its trace alone (evaluation.md section 6).

The format is telemetry.FIELDS. Every figure has one definition, written at the function that makes it. Warm-up is
the first `warmup` blocks of each stream: not in block latencies, intervals and rates; the first block stands apart.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from liveavatar.core import InputError
from liveavatar.evaluation.report import Measure, absent, bootstrap
from liveavatar.evaluation.trend import quantile, theil_sen
from liveavatar.telemetry import FIELDS, TRACE_SCHEMA

BACKEND = "trace"
WARMUP = 2  # blocks
QUIET = 0.5  # seconds without speech that make what follows a new utterance
WINDOW = 10.0  # seconds over which the worst rate is looked for
TREND_SECONDS = 60.0  # less says nothing about a slope
RESERVE = 1.15  # rtf at which a stream counts as served
ENOUGH = {50: 1, 95: 100, 99: 1000}  # percentile -> samples it needs


# ---------------------------------------------------------------- reading


@dataclass
class Stream:
    """One session of a trace: its lines by event, in order of time."""

    name: str
    pace: str
    opened: float
    lines: dict[str, list[dict]] = field(default_factory=lambda: {event: [] for event in FIELDS})

    def __getitem__(self, event: str) -> list[dict]:
        return self.lines[event]

    def arrival(self, sample: int) -> float | None:
        """When sample number `sample` was received."""
        index = bisect_right([line["start"] for line in self["received"]], sample) - 1
        line = self["received"][index] if index >= 0 else None
        return line["t"] if line and sample < line["stop"] else None

    def block_of(self, sample: int) -> dict | None:
        """The admitted block that speaks this sample; None: forgotten, or not yet sent down."""
        return next((line for line in self["admitted"] if line["start"] <= sample < line["stop"]), None)

    def leaving(self, block: int, picture: int) -> float | None:
        """When picture number `picture` of a block was sent, or what was sent of it in its place later."""
        for line in self["sent"]:
            if line["block"] == block:
                picture -= line["count"]
                if picture < 0:
                    return line["t"]
        return None

    def steps(self) -> list[tuple[float, str]]:
        """(seconds of the stream, what) of everything that changed on the way."""
        shown = {line["block"]: line["pts"] for line in reversed(self["sent"])}  # of a block's first picture
        found = []
        for step in self["step"]:
            block = next((line["block"] for line in self["admitted"] if line["t"] >= step["t"]), None)
            if block in shown:
                found.append((shown[block], step["what"]))
        return found


@dataclass(frozen=True)
class Recording:
    """A whole trace. head: its first line."""

    head: dict
    streams: tuple[Stream, ...]

    @property
    def paced(self) -> bool:
        """Somebody kept time: pictures had to leave at some moment."""
        return any(line["due"] is not None for s in self.streams for line in s["sent"]) or any(s["repeated"] for s in self.streams)


def read_trace(path: Path) -> Recording:
    """Raises InputError naming the line that is no line of a trace."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the trace ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a trace: not UTF-8 text") from None
    if not lines:
        raise InputError(f"{path}: the trace is empty")
    records = [_record(text, f"{path}:{number}") for number, text in enumerate(lines, 1)]
    head = records[0]
    if head["event"] != "trace" or head["schema"] != TRACE_SCHEMA:
        raise InputError(f"{path}:1: the first line must be the event trace of schema {TRACE_SCHEMA}")
    streams: dict[str, Stream] = {}
    every: list[Stream] = []
    for number, record in enumerate(records[1:], 2):
        if record["event"] == "open":  # a name may be used again after its session closed
            streams[record["session"]] = Stream(record["session"], record["pace"], record["t"])
            every.append(streams[record["session"]])
        elif record.get("session") not in streams:
            raise InputError(f"{path}:{number}: session {record.get('session')!r} was never opened")
        else:
            streams[record["session"]][record["event"]].append(record)
    return Recording(head, tuple(every))


def _record(text: str, where: str) -> dict:
    try:
        record = json.loads(text)
    except ValueError:
        raise InputError(f"{where}: not JSON: a trace has one object on each line") from None
    event = record.get("event") if isinstance(record, dict) else None
    if event not in FIELDS:
        raise InputError(f"{where}: event {event!r} is none of {', '.join(FIELDS)}")
    wrong = set(record) ^ {"event", "t", *FIELDS[event]}
    if wrong or not isinstance(record["t"], (int, float)):
        raise InputError(f"{where}: {event} must have t and {', '.join(FIELDS[event]) or 'nothing else'}; wrong: {', '.join(sorted(wrong)) or 't'}")
    return record


# ---------------------------------------------------------------- the judgement


def judge_trace(run: Recording, *, warmup: int = WARMUP, price: float | None = None, again: Recording | None = None) -> list[Measure]:
    """All figures of section 6. price: per hour of the machine, in any currency. again: a second run of the same."""
    return [*flow(run, warmup), *_offsets(run), *_memory(run), _determinism(run, again), _cost(run, price, warmup)]


def flow(run: Recording, warmup: int = WARMUP) -> list[Measure]:
    """What several runs can be judged by together: waits, turns, latencies, rates, underruns, floor."""
    waits = [*_waits(run), *_turns(run)]
    return [*waits, *_latency(run, warmup), *_rates(run, warmup), *_underruns(run), _floor(run, warmup)]


def _wait(name: str, seconds: Sequence[float], missing: str) -> Measure:
    """Median of waits in seconds with a bootstrap over them."""
    if not seconds:
        return absent(name, missing, unit="s", better="lower", backend=BACKEND)
    return Measure(name=name, value=float(np.median(seconds)), unit="s", better="lower", n=len(seconds),
                   interval=bootstrap(seconds, np.median), backend=BACKEND)


def percentiles(name: str, values: Sequence[float], unit: str, missing: str, better: str = "lower") -> list[Measure]:
    """name.p50, .p95, .p99, .max; a percentile with too few samples behind it is not measured."""
    made = [_percentile(f"{name}.p{share}", values, share, unit, missing, better) for share in ENOUGH]
    if not len(values):
        return [*made, absent(f"{name}.max", missing, unit=unit, better=better, backend=BACKEND)]
    return [*made, Measure(name=f"{name}.max", value=float(np.max(values)), unit=unit, better=better, n=len(values), backend=BACKEND)]


def _percentile(name: str, values: Sequence[float], share: int, unit: str, missing: str, better: str) -> Measure:
    if len(values) < ENOUGH[share]:
        reason = f"too few: {len(values)} of {ENOUGH[share]}" if len(values) else missing
        return absent(name, reason, unit=unit, better=better, backend=BACKEND)
    value, interval = quantile(values, share / 100)
    return Measure(name=name, value=value, unit=unit, better=better, n=len(values), interval=interval, backend=BACKEND)


# ---------------------------------------------------------------- waiting for the first picture


@dataclass(frozen=True)
class Onset:
    """Speech begins. sample: the first of it; heard: when it was received; ready: when all was received that its
    first block needs; shown: when the first picture of it was sent; idle: pictures flowed already."""

    heard: float
    ready: float
    shown: float
    idle: bool


def onsets(run: Recording, stream: Stream) -> list[Onset]:
    """Every utterance of a stream whose first picture was sent; of an unpaced one only the first, the rest was queued."""
    found = [onset for sample in _starts(stream, run.head["sample_rate"]) if (onset := _onset(run, stream, sample)) is not None]
    return found if stream.pace == "live" else found[:1]


def _starts(stream: Stream, rate: int) -> list[int]:
    """Samples, `rate` a second, at which speech begins after QUIET, by what was received, or (live) by the time of receiving."""
    starts, last_sample, last_time = [], -np.inf, -np.inf
    quiet = QUIET * rate
    for line in stream["received"]:
        if line["speech"] is None:
            continue
        first, last = line["speech"]
        if first - last_sample > quiet or (stream.pace == "live" and line["t"] - last_time > QUIET + (line["stop"] - line["start"]) / rate):
            starts.append(first)
        last_sample, last_time = last, line["t"]
    return starts


def _onset(run: Recording, stream: Stream, sample: int) -> Onset | None:
    block = stream.block_of(sample)
    if block is None:
        return None
    per_picture = run.head["sample_rate"] // run.head["fps"]
    shown = stream.leaving(block["block"], (sample - block["start"]) // per_picture)
    if shown is None:
        return None
    end = block["start"] + run.head["samples_per_block"] + run.head["lookahead"]
    total = stream["received"][-1]["stop"]
    ready = stream.arrival(min(end, total) - 1)
    if end > total and stream["ended"]:  # what was missing never came: the end of the audio said so
        ready = max(ready, stream["ended"][0]["t"])
    heard = stream.arrival(sample)
    return Onset(heard, ready, shown, idle=any(line["t"] < heard for line in stream["sent"]))


def _waits(run: Recording) -> list[Measure]:
    """ttff_total: first speech sample received -> first picture of it sent. ttff_compute: from the last sample that
    picture's block needs. ttff_cold: from the start of the process. open_to_idle: from asking for the session to
    its first picture. All for the first utterance of each stream."""
    first = [found[0] for s in run.streams if (found := onsets(run, s))]
    none, started = "no speech whose picture was sent", run.head["started"]
    idle = [s["sent"][0]["t"] - s.opened for s in run.streams if s["sent"]]
    cold = [min(o.shown for o in first) - started] if first else []
    return [_wait("ttff_total", [o.shown - o.heard for o in first], none), _wait("ttff_compute", [o.shown - o.ready for o in first], none),
            _wait("ttff_cold", cold, none), _wait("open_to_idle", idle, "no picture was sent"),
            absent("ttff_glass", "needs a viewer that films a painted clock", unit="s", better="lower", backend=BACKEND)]


def _turns(run: Recording) -> list[Measure]:
    """turn_latency: as ttff_total, where pictures flowed before. time_to_silence: interrupt -> end of the last stale
    sound played. time_to_fresh: interrupt -> first picture of the new epoch sent."""
    turns = [o.shown - o.heard for s in run.streams if s.pace == "live" for o in onsets(run, s) if o.idle]
    silences = [_silence(s, line) for s in run.streams if s["played"] for line in s["interrupt"]]
    fresh = [sent for s in run.streams for line in s["interrupt"] if (sent := _fresh(s, line)) is not None]
    none = "no speech began in a stream that was already flowing"
    return [*percentiles("turn_latency", turns, "s", none)[:2], _wait("time_to_silence", silences, "needs interrupts and played sound"),
            _wait("time_to_fresh", fresh, "no interrupt"),
            absent("mouth_closed", "needs the pictures: judge the recorded stream", unit="s", better="lower", backend=BACKEND)]


def _silence(stream: Stream, interrupt: dict) -> float:
    ends = [line["t"] + line["seconds"] for line in stream["played"] if line["epoch"] < interrupt["epoch"]]
    return max(0.0, max(ends, default=0.0) - interrupt["t"])


def _fresh(stream: Stream, interrupt: dict) -> float | None:
    return next((line["t"] - interrupt["t"] for line in stream["sent"] if line["epoch"] >= interrupt["epoch"]), None)


# ---------------------------------------------------------------- speed


def _latency(run: Recording, warmup: int) -> list[Measure]:
    """warmup_latency: admission of a stream's first block -> its pictures at the head. block_latency: the same after
    warm-up; block_latency.ROLE: work of one role on one block. frame_interval: between pictures sent."""
    firsts, rest = [], []
    for stream in run.streams:
        begun = {line["block"]: line["t"] for line in stream["admitted"]}
        for line in stream["ready"]:
            (firsts if line["block"] == 0 else rest if line["block"] >= warmup else []).append(line["t"] - begun[line["block"]])
    roles: dict[str, list[float]] = {}
    for span in (span for s in run.streams for span in s["span"] if span["block"] is not None and span["block"] >= warmup):
        roles.setdefault(span["role"], []).append(span["end"] - span["start"])
    return [_wait("warmup_latency", firsts, "no block came through"), *percentiles("block_latency", rest, "s", "no block after warm-up"),
            *(m for role, values in roles.items() for m in percentiles(f"block_latency.{role}", values, "s", "")),
            *_intervals(run, warmup)]


def _intervals(run: Recording, warmup: int) -> list[Measure]:
    after = [[line for line in s["sent"] if line["block"] >= warmup] for s in run.streams]
    steps = [b["t"] - a["t"] for lines in after for a, b in pairwise(lines)]
    single = all(line["count"] == 1 for lines in after for line in lines)
    return percentiles("frame_interval" if single else "block_interval", steps, "s", "no pictures after warm-up")


def _rates(run: Recording, warmup: int) -> list[Measure]:
    """rtf: media seconds per wall second at the head, above 1 is good; mean, and the worst 10 s. fps: pictures sent
    per wall second, decode and encode inside. Both between the first and the last block after warm-up."""
    fps, made = run.head["fps"], []
    for pace in sorted({s.pace for s in run.streams}):
        name = "rtf_paced" if pace == "live" else "rtf_unpaced"
        ready = [_after(s["ready"], warmup) for s in run.streams if s.pace == pace]
        made += [_rate(name, [r / fps for t in ready if (r := _mean_rate(t)) is not None], "x", "fewer than two blocks after warm-up"),
                 _rate(f"{name}.worst_10s", [r / fps for t in ready if (r := _worst_rate(t)) is not None], "x", f"shorter than {WINDOW:g} s")]
    sent = [r for s in run.streams if (r := _mean_rate(_after(s["sent"], warmup))) is not None]
    return [*made, _rate("fps", sent, "1/s", "fewer than two blocks sent after warm-up")]


def _after(lines: Sequence[dict], warmup: int) -> list[tuple[float, int]]:
    return [(line["t"], line["count"]) for line in lines if line["block"] >= warmup]


def _mean_rate(points: Sequence[tuple[float, int]]) -> float | None:
    """Pictures per second from the first to the last of (time, pictures)."""
    wall = points[-1][0] - points[0][0] if points else 0.0
    return sum(count for _, count in points[1:]) / wall if wall > 0 else None


def _worst_rate(points: Sequence[tuple[float, int]]) -> float | None:
    """Smallest rate over the shortest stretches of at least WINDOW seconds."""
    times, counts = [t for t, _ in points], np.cumsum([0, *(count for _, count in points)])
    rates, end = [], 0
    for begin, time in enumerate(times):
        while end < len(times) and times[end] - time < WINDOW:
            end += 1
        if end == len(times):
            break
        rates.append((counts[end + 1] - counts[begin + 1]) / (times[end] - time))
    return float(min(rates)) if rates else None


def _rate(name: str, values: Sequence[float], unit: str, missing: str) -> Measure:
    """Mean over streams."""
    if not values:
        return absent(name, missing, unit=unit, backend=BACKEND)
    return Measure(name=name, value=float(np.mean(values)), unit=unit, better="higher", n=len(values), interval=bootstrap(values), backend=BACKEND)


# ---------------------------------------------------------------- steadiness


def _count(name: str, value: float, unit: str, n: int) -> Measure:
    return Measure(name=name, value=float(value), unit=unit, better="lower", n=n, backend=BACKEND)


def _underruns(run: Recording) -> list[Measure]:
    """underruns: playout slots with no fresh picture. gaps: stretches of such slots. drops: fresh pictures not shown."""
    names = {"underruns": "slots", "underrun_gaps": "", "underruns_per_hour": "1/h", "underrun_total": "ms", "underrun_longest": "ms", "drops": ""}
    if not run.paced:
        return [absent(name, "nobody paced this run", unit=unit, better="lower", backend=BACKEND) for name, unit in names.items()]
    gaps = [gap for s in run.streams for gap in _gaps(s)]
    slots, shown = sum(gaps), sum(line["count"] for s in run.streams for line in s["sent"])
    hours = (shown + slots) / run.head["fps"] / 3600
    frame = 1000 / run.head["fps"]
    drops = sum(line["count"] for s in run.streams for line in s["dropped"])
    values = [slots, len(gaps), slots / hours if hours else 0.0, slots * frame, max(gaps, default=0) * frame, drops]
    return [_count(name, value, unit, shown + slots) for (name, unit), value in zip(names.items(), values, strict=True)]


def _gaps(stream: Stream) -> list[int]:
    """Lengths in slots of stretches in which old pictures were repeated."""
    gaps, inside = [], False
    for line in sorted((*stream["sent"], *stream["repeated"]), key=lambda line: line["t"]):
        if line["event"] == "sent":
            inside = False
        elif inside:
            gaps[-1] += line["count"]
        else:
            gaps, inside = [*gaps, line["count"]], True
    return gaps


def _offsets(run: Recording) -> list[Measure]:
    """av_offset: delay of the sound less delay of the picture at equal times, by pts; positive: sound is late.
    av_drift: its slope (Theil-Sen). Of the stream with most sound played."""
    stream = max(run.streams, key=lambda s: len(s["played"]), default=None)
    if stream is None or len(stream["played"]) < 2 or not stream["sent"]:
        missing = "needs sound and pictures with their times of leaving"
        return [absent(name, missing, unit=unit, better="target", backend=BACKEND)
                for name, unit in (("av_offset.p50", "ms"), ("av_offset.p95", "ms"), ("av_drift", "ms/min"))]
    heard, pictures = ([(line["t"], line["t"] - line["pts"]) for line in stream[event]] for event in ("played", "sent"))
    times, delays = np.array(pictures).T
    inside = (times >= heard[0][0]) & (times <= heard[-1][0])
    offsets = 1000 * (np.interp(times, *np.array(heard).T) - delays)[inside]
    return [*percentiles("av_offset", offsets, "ms", "sound and pictures never overlap", "target")[:2], _drift(times[inside], offsets)]


def _drift(times: np.ndarray, offsets: np.ndarray) -> Measure:
    return _slope("av_drift", times, times / 60, offsets, "ms/min", "target")


def _slope(name: str, times: np.ndarray, x: np.ndarray, y: np.ndarray, unit: str, better: str) -> Measure:
    """Theil-Sen slope of y on x; times: seconds, which must reach far enough."""
    fitted = theil_sen(x, y) if len(times) and times[-1] - times[0] >= TREND_SECONDS else None
    if fitted is None:
        return absent(name, f"shorter than {TREND_SECONDS:g} s or too few points", unit=unit, better=better, backend=BACKEND)
    return Measure(name=name, value=fitted[0], unit=unit, better=better, n=len(times), interval=fitted[1], backend=BACKEND)


def _memory(run: Recording) -> list[Measure]:
    """Bytes of the process (rss) and of tensors on the GPU (gpu) of the rank that holds most: at first, at most, slope."""
    spans = sorted((span for s in run.streams for span in s["span"]), key=lambda span: span["t"])
    return [m for what in ("rss", "gpu") for m in _held(what, spans)]


def _held(what: str, spans: Sequence[dict]) -> list[Measure]:
    names, units = (f"memory_{what}.start", f"memory_{what}.peak", f"memory_{what}.slope"), ("MB", "MB", "MB/h")
    if not any(span[what] for span in spans):
        reason = "no GPU was used" if what == "gpu" and spans else "the trace has no spans"
        return [absent(name, reason, unit=unit, better="lower", backend=BACKEND) for name, unit in zip(names, units, strict=True)]
    rank = max(spans, key=lambda span: span[what])["rank"]
    times, held = np.array([(span["t"], span[what] / 1e6) for span in spans if span["rank"] == rank]).T
    made = [_count(name, value, "MB", len(held)) for name, value in zip(names, (held[0], held.max()), strict=False)]
    return [*made, _slope(names[2], times, times / 3600, held, "MB/h", "lower")]


# ---------------------------------------------------------------- about the whole run


def _determinism(run: Recording, again: Recording | None) -> Measure:
    """1 when the first pictures of two runs are the same, bit for bit."""
    mine, theirs = ([(line["pictures"], line["sha256"]) for s in r.streams for line in s["digest"]] if r else [] for r in (run, again))
    if not mine or not theirs:
        reason = "needs a second trace of the same run" if again is None else "a trace has no digest: it was cut off"
        return absent("determinism", reason, unit="1: equal", backend=BACKEND)
    return Measure(name="determinism", value=float(mine == theirs), unit="1: equal", better="higher", n=len(mine), backend=BACKEND)


def _floor(run: Recording, warmup: int) -> Measure:
    """The least a speaker waits: a block, the look-ahead and one pass down the chain."""
    one = next(m for m in _latency(run, warmup) if m.name == "block_latency.p50")
    if not one.measured:
        return absent("floor", one.reason, unit="s", better="lower", backend=BACKEND)
    waiting = (run.head["samples_per_block"] + run.head["lookahead"]) / run.head["sample_rate"]
    return Measure(name="floor", value=waiting + one.value, unit="s", better="lower", n=one.n,
                   interval=tuple(waiting + v for v in one.interval), backend=BACKEND)


def _cost(run: Recording, price: float | None, warmup: int) -> Measure:
    """Price of a stream-minute: price per hour / 60 / streams that ran at once with rtf of 1.15 or more."""
    fast = [s for s in run.streams if (_mean_rate(_after(s["ready"], warmup)) or 0.0) >= RESERVE * run.head["fps"]]
    if price is None or not fast:
        reason = "needs the price of the machine per hour" if price is None else "no stream ran at rtf 1.15"
        return absent("cost", reason, unit="per stream-minute", better="lower", backend=BACKEND)
    edges = sorted([(s["ready"][0]["t"], 1) for s in fast] + [(s["ready"][-1]["t"], -1) for s in fast])
    streams = int(np.max(np.cumsum([step for _, step in edges])))
    return Measure(name="cost", value=price / 60 / streams, unit="per stream-minute", better="lower", n=streams, backend=BACKEND)
