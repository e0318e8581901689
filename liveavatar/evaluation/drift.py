"""Does a stream change over time? The same words in every window, compared with the first (evaluation.md section 5).

A plan says what is spoken when: the probe, always the same recording, in every window; between windows phrases in an
order that does not come back, and pauses. Whoever makes the video, us or others, makes it from the plan's sound, and
the windows are then judged where the plan says. Windows are read out of the file as they are, nothing is cut anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from liveavatar.config import build
from liveavatar.core import SAMPLE_RATE, ConfigError, InputError
from liveavatar.evaluation.clips import VideoFile, write_sound
from liveavatar.evaluation.provenance import sha256
from liveavatar.evaluation.report import Gate, Measure, absent, bootstrap
from liveavatar.evaluation.trend import FEWEST_POINTS, theil_sen

SCHEMA = "drift/1"
WINDOW = 10.0  # seconds
STARTS = (0.0, 95.0, 995.0, 9995.0)  # of the windows that are compared with published ones
EVERY = 60.0  # seconds between probes, for the trend
SHORT = 300.0  # seconds; a shorter plan has its probes closer together, three at least
PAUSES, LONG_PAUSE = (0.5, 3.0), 20.0  # seconds between phrases; a long silence comes once in ten
PHRASE_GAP, PHRASE_LEVEL = 0.15, 0.01  # seconds below this level part two phrases
SAMPLE_EVERY = 0.5  # seconds between the pictures whose colours are looked at
BACKEND = "drift"
GATES = {"identity": 0.05, "colour": 2.0, "lag_ms": 20.0, "sharpness": 0.10}  # most change allowed, see `gates`


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When the probe is spoken. starts: seconds of each window; sha256: of the sound, so that a judgement knows its test."""

    schema: str = SCHEMA
    seconds: float
    window: float
    seed: int
    starts: tuple[float, ...]
    audio: str = "audio.wav"
    sha256: str = ""
    text: str = ""  # of the probe, where it is known

    def __post_init__(self):
        if self.schema != SCHEMA:
            raise ConfigError(f"schema {self.schema!r}: must be {SCHEMA}")
        late = [s for s in self.starts if s < 0 or s + self.window > self.seconds]
        if late or not self.starts or list(self.starts) != sorted(self.starts):
            raise ConfigError(f"starts {self.starts}: must be in order and end within {self.seconds} s")


def window_starts(seconds: float, window: float = WINDOW) -> tuple[float, ...]:
    """Where probes are spoken in a stream of so many seconds. Raises ConfigError when three do not fit."""
    if seconds < 3 * window:
        raise ConfigError(f"{seconds:g} s: a drift run needs at least three windows of {window:g} s")
    every = EVERY if seconds >= SHORT else (seconds - window) / math.ceil((seconds - window) / EVERY + 1)
    fixed = [s for s in STARTS if s + window <= seconds] if seconds >= SHORT else [0.0]
    trend = np.arange(1, math.floor((seconds - window) / every + 1e-9) + 1) * every
    free = [float(t) for t in trend if all(abs(t - s) >= window for s in fixed)]
    return tuple(sorted([*fixed, *(round(t, 3) for t in free)]))


def phrases(pcm: np.ndarray) -> list[np.ndarray]:
    """float32 [n] -> its phrases: what lies between pauses, in order."""
    piece = round(0.01 * SAMPLE_RATE)
    levels = np.abs(pcm[: len(pcm) // piece * piece]).reshape(-1, piece).max(1) > PHRASE_LEVEL
    found, begin, last = [], None, -math.inf
    for place in np.flatnonzero(levels):
        if begin is None or (place - last) * 0.01 > PHRASE_GAP:
            if begin is not None:
                found.append(pcm[begin * piece : (last + 1) * piece])
            begin = place
        last = place
    return [*found, pcm[begin * piece : (last + 1) * piece]] if begin is not None else []


def sound(starts: Sequence[float], seconds: float, window: float, seed: int, probe: np.ndarray, filler: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """float32 pieces of the whole plan, in order: the probe (cut or filled up to `window`) at every start, filler between."""
    size, total, at = round(window * SAMPLE_RATE), round(seconds * SAMPLE_RATE), 0
    spoken = np.pad(probe[:size], (0, max(0, size - len(probe)))).astype(np.float32)
    more = _filler(filler, np.random.default_rng(seed))
    for start in (*(round(s * SAMPLE_RATE) for s in starts), total):
        while at < start:
            piece = next(more)[: start - at]
            at += len(piece)
            yield piece
        if start < total:
            at += size
            yield spoken


def _filler(parts: Sequence[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Phrases and pauses without end: every round has all phrases in a new order and at a new level."""
    while True:
        for index in rng.permutation(len(parts)):
            pause = LONG_PAUSE if rng.random() < 0.1 else rng.uniform(*PAUSES)
            yield np.zeros(round(pause * SAMPLE_RATE), np.float32)
            yield (parts[index] * rng.uniform(0.7, 1.0)).astype(np.float32)


def write_plan(folder: Path, seconds: float, seed: int, probe: np.ndarray, filler: np.ndarray, *, window: float = WINDOW, text: str = "") -> Plan:
    """audio.wav (16 kHz, 16 bit, mono) and plan.json in `folder`. filler float32 [n]: speech to take phrases from. Raises InputError, ConfigError."""
    starts, parts = window_starts(seconds, window), phrases(filler)
    if len(parts) < 2:
        raise InputError("the speech between probes must have at least two phrases with a pause between them")
    folder.mkdir(parents=True, exist_ok=True)
    write_sound(folder / "audio.wav", sound(starts, seconds, window, seed, probe, parts))
    plan = Plan(seconds=seconds, window=window, seed=seed, starts=starts, sha256=sha256(folder / "audio.wav"), text=text)
    (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
    return plan


def read_plan(path: Path) -> Plan:
    """A plan.json. Raises InputError."""
    try:
        return build(Plan, json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read the plan ({error.strerror})") from None
    except ConfigError as error:
        raise InputError(str(error)) from None
    except ValueError:
        raise InputError(f"{path}: not a plan.json") from None


# ---------------------------------------------------------------- windows of a file


class Window(VideoFile):
    """The seconds [start, start + seconds) of a video as if they were a file of their own, from 0."""

    def __init__(self, video: VideoFile, start: float, seconds: float):
        self.__dict__.update({name: value for name, value in vars(video).items()})
        self.start, self.seconds = start, seconds

    def frames(self, start: float = 0.0, end: float = math.inf) -> Iterator[tuple[float, np.ndarray]]:
        for at, picture in super().frames(self.start + start, self.start + min(end, self.seconds)):
            yield at - self.start, picture

    def sound(self, start: float = 0.0, end: float = math.inf) -> np.ndarray:
        return super().sound(self.start + start, self.start + min(end, self.seconds))


COLOURS = ("picture_L", "picture_a", "picture_b", "picture_std", "picture_luma", "picture_saturation", "picture_sharpness")


def colours(window: Window) -> list[Measure]:
    """Means over pictures half a second apart: CIE Lab and its spread, luma, saturation, variance of the Laplacian."""
    rows, due = [], 0.0
    for at, picture in window.frames():
        if at >= due - 1e-6:
            rows.append(_colour(picture))
            due += SAMPLE_EVERY
    if not rows:
        raise InputError(f"{window.path}: no picture at {window.start:g} s: the video is shorter than its plan")
    table = np.array(rows)
    return [Measure(name=name, value=float(column.mean()), unit="", better="target", n=len(table), interval=bootstrap(column), backend=BACKEND)
            for name, column in zip(COLOURS, table.T, strict=True)]


def _colour(picture: np.ndarray) -> tuple[float, ...]:
    import cv2

    scaled = picture.astype(np.float32) / 255
    lab, grey = cv2.cvtColor(scaled, cv2.COLOR_RGB2LAB), cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    saturation = cv2.cvtColor(scaled, cv2.COLOR_RGB2HSV)[..., 1]
    return (*lab.mean((0, 1)), lab.std((0, 1)).mean(), grey.mean(), saturation.mean(), cv2.Laplacian(grey, cv2.CV_64F).var())


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One window. measures: what was found in it, by name."""

    start: float
    measures: dict[str, Measure] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        found = self.measures.get(name)
        return found.value if found is not None else None


def probes(video: VideoFile, plan: Plan, judge: Callable[[Window], Sequence[Measure]] = lambda window: ()) -> list[Probe]:
    """Every window of the plan, judged. judge: all further measures of a window, e.g. judge.judge_video's."""
    if video.seconds and video.seconds < plan.starts[-1] + plan.window - 0.5:
        raise InputError(f"{video.path}: {video.seconds:.1f} s long, its plan ends at {plan.starts[-1] + plan.window:g} s")
    found = []
    for start in plan.starts:
        window = Window(video, start, plan.window)
        found.append(Probe(start=start, measures={m.name: m for m in (*colours(window), *judge(window))}))
    return found


def change(first: Measure, later: Measure) -> Measure:
    """later - first; the interval as if both erred independently."""
    halves = [None if m.interval is None else (m.interval[1] - m.interval[0]) / 2 for m in (first, later)]
    value = later.value - first.value
    reach = None if None in halves else math.hypot(*halves)
    return Measure(name=f"{first.name}.change", value=value, unit=first.unit, better="target", n=min(first.n, later.n), backend=first.backend,
                   weights_sha256=first.weights_sha256, interval=None if reach is None else (value - reach, value + reach))


def trends(found: Sequence[Probe]) -> list[Measure]:
    """For every measure of the first window: its change in the worst window, and its Theil-Sen slope per 1000 s."""
    made = []
    for name, first in found[0].measures.items():
        later = [(p.start, p.measures[name]) for p in found[1:] if name in p.measures and p.measures[name].measured]
        if not first.measured or not later:
            continue
        start, worst = max(later, key=lambda pair: abs(pair[1].value - first.value))
        made.append(replace(change(first, worst), reason=f"largest at {start:g} s"))
        slope = theil_sen([found[0].start, *(s for s, _ in later)], [first.value, *(m.value for _, m in later)])
        label = {"name": f"{name}.slope", "unit": f"{first.unit}/1000 s", "better": "target", "backend": BACKEND}
        if slope is None:
            made.append(absent(reason=f"needs {FEWEST_POINTS} windows", **label))
        else:
            made.append(Measure(value=1000 * slope[0], n=1 + len(later), interval=(1000 * slope[1][0], 1000 * slope[1][1]), **label))
    return made


def colour_distance(a: Probe, b: Probe) -> float:
    """Delta E (1976) between the mean colours of two windows."""
    return math.dist([a.value(n) for n in ("picture_L", "picture_a", "picture_b")], [b.value(n) for n in ("picture_L", "picture_a", "picture_b")])


def gates(found: Sequence[Probe], slopes: Sequence[Measure]) -> tuple[Gate, ...]:
    """Worst change over all windows against what is allowed: distance of identity, Delta E, lag, sharpness (relative), and no
    trend of the audio-visual offset."""
    first, rest = found[0], found[1:]
    judged = [
        _gate("identity", [_step(first, p, "id_dlib") for p in rest]), _gate("colour", [colour_distance(first, p) for p in rest]),
        _gate("lag_ms", [_step(first, p, "lag_ms") for p in rest]),
        _gate("sharpness", [abs(p.value("picture_sharpness") / max(first.value("picture_sharpness"), 1e-9) - 1) for p in rest]),
    ]
    slope = next((m for m in slopes if m.name == "lag_ms.slope" and m.measured), None)
    if slope is None:
        return (*judged, Gate(name="offset trend", low=0.0, high=0.0, reason=f"no lag was measured in {FEWEST_POINTS} windows"))
    steady = slope.interval[0] <= 0 <= slope.interval[1]
    return (*judged, Gate(name="offset trend", low=0.0, high=0.0, value=slope.value, ok=steady, reason="0 within the interval"))


def _step(first: Probe, later: Probe, name: str) -> float | None:
    values = first.value(name), later.value(name)
    return None if None in values else abs(values[1] - values[0])


def _gate(name: str, steps: Sequence[float | None]) -> Gate:
    known = [s for s in steps if s is not None]
    if not known:
        return Gate(name=f"{name} change", high=GATES[name], reason="not measured in two windows")
    return Gate(name=f"{name} change", high=GATES[name], value=max(known), ok=max(known) <= GATES[name])


def worst(found: Sequence[Probe]) -> Probe:
    """The window whose identity, colour, sharpness and lag have gone farthest, each in units of what is allowed."""
    def far(probe: Probe) -> float:
        sharpness = abs(probe.value("picture_sharpness") / max(found[0].value("picture_sharpness"), 1e-9) - 1)
        steps = {"identity": _step(found[0], probe, "id_dlib"), "colour": colour_distance(found[0], probe),
                 "lag_ms": _step(found[0], probe, "lag_ms"), "sharpness": sharpness}
        return max((step or 0.0) / GATES[name] for name, step in steps.items())

    return max(found[1:], key=far)


def seam(video: VideoFile, at: float, around: float = 1.0) -> float:
    """How much larger the change of the picture across `at` seconds is than the usual one around it; about 1 without a seam."""
    pictures = [(t, picture.astype(np.int16)) for t, picture in video.frames(max(0.0, at - around), at + around)]
    steps = [(b[0], np.abs(b[1] - a[1]).mean()) for a, b in pairwise(pictures)]
    across = next((step for t, step in steps if t >= at - 1e-6), None)
    if across is None:
        raise InputError(f"{video.path}: no picture at {at:g} s")
    return float(across / max(np.median([step for _, step in steps]), 1e-3))
