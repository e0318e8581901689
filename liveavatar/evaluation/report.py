"""What a judgement is made of: measures, items, gates, the report, and how two reports are compared.

A `Measure` is one number with everything needed to trust it: unit, direction, how many, an interval, the
procedure and weights behind it, or the reason why there is none. Nothing is ever zero or blank for want of
a file (evaluation.md section 1). `report.json` has the schema eval/1; `tables` writes the same as Markdown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from liveavatar.config import build, one_of
from liveavatar.core import ConfigError, InputError

SCHEMA = "eval/1"
DRAWS, SEED = 1000, 0  # of every bootstrap
BETTER = ("higher", "lower", "target")
STATUS = ("measured", "not_measured", "failed", "rejected")
FEW_ITEMS = 2  # fewer items than this give no interval over items


# ---------------------------------------------------------------- one number


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number, or why there is none.

    better: which way is good; "target": neither, a gate says what is wanted. n: what was averaged or counted
    (pictures, events, windows). interval: 95 %, or None where it cannot be known. backend: the procedure or
    package; weights_sha256: of the weights behind it, several joined by +, None for none. reason: required unless measured.
    """

    name: str
    value: float | None
    unit: str
    better: str
    status: str = "measured"
    n: int = 0
    interval: tuple[float, float] | None = None
    backend: str = ""
    weights_sha256: str | None = None
    reason: str = ""

    def __post_init__(self):
        one_of(f"{self.name}: better", self.better, BETTER)
        one_of(f"{self.name}: status", self.status, STATUS)
        if (self.status == "measured") != (self.value is not None):
            raise ConfigError(f"measure {self.name}: status {self.status} with value {self.value}")
        if self.value is None and (not self.reason or self.interval is not None):
            raise ConfigError(f"measure {self.name}: {self.status} needs a reason and has no interval")
        if any(not math.isfinite(v) for v in (*(self.interval or ()), *([] if self.value is None else [self.value]))):
            raise ConfigError(f"measure {self.name}: {self.value} {self.interval} is not finite")

    @property
    def measured(self) -> bool:
        return self.status == "measured"

    def __str__(self) -> str:
        """The value with its interval, or the status in words."""
        if not self.measured:
            return f"{self.status.replace('_', ' ')} ({self.reason})"
        unit = f" {self.unit}" if self.unit else ""
        spread = "" if self.interval is None else f" [{number(self.interval[0])}, {number(self.interval[1])}]"
        return f"{number(self.value)}{unit}{spread}"


def number(value: float) -> str:
    """Four significant digits, without an exponent where people expect none."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def absent(name: str, reason: str, *, unit: str = "", better: str = "higher", backend: str = "", status: str = "not_measured") -> Measure:
    """A measure without a value. reason: e.g. "needs syncnet_v2.pth", "too short"."""
    return Measure(name=name, value=None, unit=unit, better=better, status=status, backend=backend, reason=reason)


def bootstrap(samples, statistic: Callable = np.mean, draws: int = DRAWS, seed: int = SEED) -> tuple[float, float] | None:
    """95 % percentile interval of `statistic` over resampled rows of samples [n, ...]; None where n < 2.

    For series whose neighbours depend on each other, rows are blocks. Draws on which the statistic is not finite
    do not count; when fewer than half are left there is no interval.
    """
    samples = np.asarray(samples)
    if len(samples) < FEW_ITEMS:
        return None
    picks = np.random.default_rng(seed).integers(0, len(samples), (draws, len(samples)))
    values = np.array([statistic(samples[pick]) for pick in picks], float)
    values = values[np.isfinite(values)]
    if len(values) < draws / 2:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------- the report


@dataclass(frozen=True, kw_only=True)
class System:
    """Who made what is judged. driver: the audio model behind the pictures, with the hash of its weights (EVA-7)."""

    name: str
    engine: str = "unknown"
    commit: str = "unknown"
    config_sha256: str | None = None
    weights: dict = field(default_factory=dict)  # file name -> SHA-256
    driver: str = "unknown"
    driver_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What was judged against: a suite by its hash, or one file."""

    name: str
    version: str = ""
    sha256: str = ""
    synthetic: bool = False  # rendered heads: printed beside every number (EVA-5)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One judged video. picture: width, height, fps, codec, seconds, crop of the file as it was (EVA-6); kinds: what sort of item it
    is, e.g. framing -> small."""

    id: str
    video: str = ""
    sha256: str = ""
    picture: dict = field(default_factory=dict)
    kinds: dict = field(default_factory=dict)
    measures: tuple[Measure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A demand on a measure. low, high: inclusive limits, None for none. ok: None when it could not be judged."""

    name: str
    low: float | None = None
    high: float | None = None
    value: float | None = None
    ok: bool | None = None
    reason: str = ""

    @property
    def demand(self) -> str:
        low, high = (None if v is None else number(v) for v in (self.low, self.high))
        return f"{low} to {high}" if low and high else f">= {low}" if low else f"<= {high}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One order a metric must show before it is printed (evaluation.md section 3). needs: e.g. "A > B"."""

    metric: str
    needs: str
    ok: bool | None  # None: the variants could not be judged
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of one judgement. Everything but date and host is the same when it is run again."""

    kind: str  # suite | video | drift | trace | human
    system: System
    origin: Origin
    command: str
    date: str
    host: dict
    schema: str = SCHEMA
    seeds: dict = field(default_factory=dict)
    metrics: tuple[Measure, ...] = ()
    gates: tuple[Gate, ...] = ()
    sanity: tuple[Check, ...] = ()
    items: tuple[Item, ...] = ()
    exclusions: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()  # relative to report.json
    details: dict = field(default_factory=dict)  # what a kind adds: windows of drift, a histogram

    @property
    def failed(self) -> bool:
        """A gate was judged and not met."""
        return any(gate.ok is False for gate in self.gates)

    def measure(self, name: str) -> Measure | None:
        return next((m for m in self.metrics if m.name == name), None)


def write_json(report: Report, path: Path) -> None:
    """report.json. Refuses a number that JSON does not have."""
    path.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """A report.json. Raises InputError when it is none, or of another schema."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the report ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{path}: not a report.json") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise InputError(f"{path}: no report of schema {SCHEMA}: made by `liveavatar evaluate`?")
    try:
        return build(Report, value, str(path))
    except ConfigError as error:
        raise InputError(str(error)) from None


# ---------------------------------------------------------------- from items to a table


def aggregate(items: Sequence[Item]) -> tuple[Measure, ...]:
    """One measure per name over items, in order of first appearance: mean, bootstrap over items, n of items.

    Where one item alone was measured its own interval stays. Items without a value are counted in the reason.
    """
    names = list(dict.fromkeys(m.name for item in items for m in item.measures))
    return tuple(_over([m for item in items for m in item.measures if m.name == name]) for name in names)


def _over(measures: Sequence[Measure]) -> Measure:
    done, lost = [m for m in measures if m.measured], [m for m in measures if not m.measured]
    if not done:
        return next((m for m in lost if m.status == "failed"), lost[0])
    first = done[0]
    assert all((m.unit, m.backend, m.weights_sha256) == (first.unit, first.backend, first.weights_sha256) for m in done), first.name
    shared = first.reason if len({m.reason for m in done}) == 1 else ""  # what is said of one item alone is not said of all
    missing = f"{len(lost)} of {len(measures)} items {lost[0].status.replace('_', ' ')}: {lost[0].reason}" if lost else shared
    if len(done) == 1:
        return replace(first, reason=missing)
    values = [m.value for m in done]
    return replace(first, value=float(np.mean(values)), n=len(done), interval=bootstrap(values), reason=missing)


def grouped(items: Sequence[Item], metrics: Sequence[Measure], names: Sequence[str]) -> dict[str, dict[str, dict]]:
    """sort -> kind -> {"items": how many, measure: mean or None}, so that it shows where a system is bad. Sorts with one kind are left
    out, and so are those of `names` that `metrics`, of all items, have no value of."""
    names = [m.name for m in metrics if m.name in names and m.measured]
    groups = {}
    for sort in dict.fromkeys(sort for item in items for sort in item.kinds):
        kinds = dict.fromkeys(item.kinds[sort] for item in items if sort in item.kinds)
        if len(kinds) > 1:
            groups[sort] = {kind: _means([item for item in items if item.kinds.get(sort) == kind], names) for kind in kinds}
    return groups


def _means(items: Sequence[Item], names: Sequence[str]) -> dict:
    values = {name: [m.value for item in items for m in item.measures if m.name == name and m.measured] for name in names}
    return {"items": len(items), **{name: float(np.mean(found)) if found else None for name, found in values.items()}}


def rejected(metrics: Sequence[Measure], checks: Sequence[Check]) -> tuple[Measure, ...]:
    """metrics with those that failed an order of the sanity ranking rejected (EVA-4)."""
    broken = {check.metric: check for check in reversed(checks) if check.ok is False}
    return tuple(
        replace(m, value=None, interval=None, status="rejected", reason=f"sanity ranking: {broken[m.name].needs} does not hold")
        if m.measured and m.name in broken else m for m in metrics)  # fmt: skip


def judge_gates(metrics: Sequence[Measure], demands: dict) -> tuple[Gate, ...]:
    """demands: name -> {"min": x, "max": y}, one or both. Raises ConfigError on another form."""
    known, gates = {m.name: m for m in metrics}, []
    for name, demand in demands.items():
        numbers = isinstance(demand, dict) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in demand.values())
        if not numbers or not demand or set(demand) - {"min", "max"}:
            raise ConfigError(f"gate {name}: {demand!r}: give min: NUMBER, max: NUMBER or both")
        gates.append(_gate(name, known.get(name), demand.get("min"), demand.get("max")))
    return tuple(gates)


def _gate(name: str, measure: Measure | None, low: float | None, high: float | None) -> Gate:
    limits = {"low": None if low is None else float(low), "high": None if high is None else float(high)}
    if measure is None:
        return Gate(name=name, **limits, reason="no such measure in this report")
    if not measure.measured:
        return Gate(name=name, **limits, reason=str(measure))
    ok = (low is None or measure.value >= low) and (high is None or measure.value <= high)
    return Gate(name=name, **limits, value=measure.value, ok=ok)


# ---------------------------------------------------------------- two reports


@dataclass(frozen=True, kw_only=True)
class Difference:
    """b - a of one measure. verdict: better | worse | same | differs | not comparable. n: items or windows in both."""

    name: str
    unit: str
    a: str
    b: str
    value: float | None
    interval: tuple[float, float] | None
    n: int
    verdict: str
    reason: str = ""


def compare(a: Report, b: Report) -> tuple[Difference, ...]:
    """Differences b - a: paired by item or by window of a stream and bootstrapped over them; where there are not two, as if both values
    erred independently within their own intervals; else without one. Raises InputError on different suites."""
    if (a.kind, a.origin.sha256) != (b.kind, b.origin.sha256):
        raise InputError(f"not comparable: {a.kind} {a.origin.name} ({a.origin.sha256[:12] or 'no hash'}) against "
                         f"{b.kind} {b.origin.name} ({b.origin.sha256[:12] or 'no hash'}): judge both on the same suite")
    names = list(dict.fromkeys(m.name for report in (a, b) for m in report.metrics))
    return tuple(_difference(name, a, b) for name in names)


def _difference(name: str, a: Report, b: Report) -> Difference:
    one, two = a.measure(name), b.measure(name)
    shown = {"name": name, "unit": (one or two).unit, "a": str(one or "absent"), "b": str(two or "absent")}
    blank = {"value": None, "interval": None, "n": 0, "verdict": "not comparable"}
    if one is None or two is None or not (one.measured and two.measured):
        return Difference(**shown, **blank, reason="not measured in both")
    if (one.unit, one.backend, one.weights_sha256) != (two.unit, two.backend, two.weights_sha256):
        return Difference(**shown, **blank, reason="another procedure or other weights under the same name")
    steps = _paired(name, a, b)
    value, interval, reason = float(np.mean(steps)) if steps else two.value - one.value, bootstrap(steps), ""
    if a.kind == "drift" and steps:
        reason = f"mean over {len(steps)} windows"
    if interval is None and value:
        interval = _independent(value, one.interval, two.interval)
        reason = "no interval: one value each" if interval is None else "interval as if both erred independently"
    return Difference(**shown, value=value, interval=interval, n=len(steps), verdict=_verdict(value, interval, one.better), reason=reason)


def _independent(value: float, *intervals: tuple[float, float] | None) -> tuple[float, float] | None:
    if None in intervals:
        return None
    reach = math.hypot(*((high - low) / 2 for low, high in intervals))
    return value - reach, value + reach


def _paired(name: str, a: Report, b: Report) -> list[float]:
    """b - a for every item, or window of a stream, that has the measure in both."""
    values = [{item.id: m.value for item in report.items for m in item.measures if m.name == name and m.measured} for report in (a, b)]
    for found, report in zip(values, (a, b), strict=True):
        found.update({w["start"]: w[name] for w in report.details.get("windows", ()) if isinstance(w.get(name), (int, float))})
    return [values[1][key] - values[0][key] for key in values[0] if key in values[1]]


def _verdict(value: float, interval: tuple[float, float] | None, better: str) -> str:
    """Without an interval nothing can be said but that they differ."""
    if value == 0 or (interval is not None and interval[0] <= 0 <= interval[1]):
        return "same"
    if interval is None or better == "target":
        return "differs"
    return "better" if (value > 0) == (better == "higher") else "worse"
