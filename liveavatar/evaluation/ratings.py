"""What people said: win rates, strengths, mean opinions, agreement (evaluation.md section 7).

Only raters who pass the rule written in the key before collection count. A model's opinion is never a rating.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liveavatar.config import build
from liveavatar.core import ConfigError, InputError
from liveavatar.evaluation.closure import wilson
from liveavatar.evaluation.human import EXACT, GROSS, QUESTIONS, Key
from liveavatar.evaluation.report import DRAWS, SEED, Measure, absent

SCHEMA = "ratings/1"
GRADES = (*QUESTIONS, "overall")
ENOUGH_RATERS, ENOUGH_PER_PAIR = 24, 5  # fewer is a pilot
BACKEND = "people"
PRIOR = 0.1  # wins each way that keep a strength finite where one system never lost


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A rater's file."""

    schema: str
    study: str
    sheet: int
    rater: str
    answers: tuple[dict, ...]


@dataclass(frozen=True)
class Choice:
    """One pair seen by one rater. won: question -> 1 first better, 0 second better, 0.5 no difference."""

    rater: str
    item: str
    first: str
    second: str
    won: dict
    repeat: bool = False


@dataclass(frozen=True)
class Grade:
    """One clip rated by one rater; values: question -> 1..5, or slide_... -> 0..100."""

    rater: str
    item: str
    system: str
    values: dict


@dataclass(frozen=True)
class Collected:
    """All ratings of those who count. excluded: one line for each who does not."""

    choices: tuple[Choice, ...]
    grades: tuple[Grade, ...]
    consistency: tuple[float, ...]  # share of equal answers to repeated pairs, per rater
    excluded: tuple[str, ...]
    raters: tuple[str, ...]


# ---------------------------------------------------------------- reading


def collect(key: Key, paths: Sequence[Path]) -> Collected:
    """Read raters' files against the key. Raises InputError on a file of another study, a forged or a second one."""
    seen, choices, grades, same, excluded, counted = {}, [], [], [], [], []
    for path in paths:
        answers = _read(path, key)
        if answers.rater in seen:
            raise InputError(f"{path}: rater {answers.rater} is in {seen[answers.rater]} already")
        seen[answers.rater] = path
        own = _choices(key, answers)
        reason = _excluded(own, answers)
        if reason:
            excluded.append(f"rater {answers.rater}: {reason}")
            continue
        counted.append(answers.rater)
        choices += own
        grades += _grades(key, answers)
        same += _consistency(key, answers, own)
    return Collected(tuple(choices), tuple(grades), tuple(same), tuple(excluded), tuple(counted))


def _read(path: Path, key: Key) -> Answers:
    try:
        answers = build(Answers, json.loads(path.read_text(encoding="utf-8")), str(path))
        trials = key.trials(answers.sheet)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ConfigError as error:
        raise InputError(str(error)) from None
    except KeyError:
        raise InputError(f"{path}: the key knows no such sheet") from None
    except ValueError:
        raise InputError(f"{path}: not a rater's file") from None
    if answers.schema != SCHEMA or answers.study != key.study:
        raise InputError(f"{path}: of study {answers.study!r} and schema {answers.schema!r}, the key is of {key.study!r} and {SCHEMA}")
    for number, (trial, given) in enumerate(zip(trials, answers.answers, strict=False)):
        if (given.get("left"), given.get("right")) != (trial.left, trial.right) or not _valid(given, bool(trial.right)):
            raise InputError(f"{path}: answer {number + 1} does not fit its sheet")
    if len(answers.answers) > len(trials):
        raise InputError(f"{path}: more answers than its sheet has screens")
    return answers


def _valid(given: dict, pair: bool) -> bool:
    questions, allowed = (QUESTIONS, ("A", "B", "same")) if pair else (GRADES, ("1", "2", "3", "4", "5"))
    answered = [given[q] for q in questions if q in given]
    slides = [v for name, v in given.items() if name.startswith("slide_")]
    return bool(answered) and all(a in allowed for a in answered) and all(isinstance(v, (int, float)) and 0 <= v <= 100 for v in slides)


def _choices(key: Key, answers: Answers) -> list[Choice]:
    found, worth = [], {"A": 1.0, "B": 0.0, "same": 0.5}
    for trial, given in zip(key.trials(answers.sheet), answers.answers, strict=False):
        if trial.right:
            one, two = key.clip(trial.left), key.clip(trial.right)
            won = {q: worth[given[q]] for q in QUESTIONS if q in given}
            if two.system < one.system:  # first and second in one order, wherever they stood
                one, two, won = two, one, {q: 1 - w for q, w in won.items()}
            found.append(Choice(answers.rater, one.item, one.system, two.system, won, trial.repeat >= 0))
    return found


def _grades(key: Key, answers: Answers) -> list[Grade]:
    found = []
    for trial, given in zip(key.trials(answers.sheet), answers.answers, strict=False):
        if not trial.right:
            clip = key.clip(trial.left)
            values = {q: float(v) for q, v in given.items() if q in GRADES or q.startswith("slide_")}
            found.append(Grade(answers.rater, clip.item, clip.system, values))
    return found


def _excluded(own: Sequence[Choice], answers: Answers) -> str:
    """The rule: misses both gross anchors, or plays nothing."""
    if not any(sum(given.get("played", [])) for given in answers.answers):
        return "played nothing"
    gross = [c for c in own if {c.first, c.second} & {f"anchor:{g}" for g in GROSS} and EXACT in (c.first, c.second)]
    kinds = {(c.first if c.second == EXACT else c.second): False for c in gross}
    for c in gross:
        right = c.won.get("sync") == (1.0 if c.first == EXACT else 0.0)
        kinds[c.first if c.second == EXACT else c.second] |= right
    return "missed both gross anchors" if len(kinds) == len(GROSS) and not any(kinds.values()) else ""


def _consistency(key: Key, answers: Answers, own: Sequence[Choice]) -> list[float]:
    """1 for every question of a repeated pair that was answered as the first time, else 0; the mean of each pair."""
    trials = key.trials(answers.sheet)
    pairs = [k for k, t in enumerate(trials[: len(answers.answers)]) if t.right]
    by_trial = dict(zip(pairs, own, strict=True))
    found = []
    for k in pairs:
        first = by_trial.get(trials[k].repeat)
        if trials[k].repeat >= 0 and first is not None:
            found.append(float(np.mean([first.won[q] == w for q, w in by_trial[k].won.items() if q in first.won])))
    return found


# ---------------------------------------------------------------- arithmetic


def bradley_terry(systems: Sequence[str], wins: dict[tuple[str, str], float]) -> dict[str, float]:
    """Log strengths with mean 0 from wins[a, b] (a over b; ties half each way), by Hunter's iteration (2004)."""
    index = {name: k for k, name in enumerate(systems)}
    table = np.full((len(systems), len(systems)), PRIOR) * (1 - np.eye(len(systems)))
    for (a, b), count in wins.items():
        table[index[a], index[b]] += count
    strength, games = np.ones(len(systems)), table + table.T
    for _ in range(500):
        fresh = table.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        fresh /= np.exp(np.log(fresh).mean())
        if np.abs(np.log(fresh / strength)).max() < 1e-9:
            break
        strength = fresh
    return dict(zip(systems, np.log(strength).tolist(), strict=True))


def krippendorff(units: Sequence[Sequence[float]], metric: str = "ordinal") -> float | None:
    """Alpha of units, each the values its raters gave; "nominal" or "ordinal". None where no two values can be compared, or all are equal."""
    units = [u for u in units if len(u) > 1]
    values = sorted({v for u in units for v in u})
    if len(values) < 2:
        return None
    place = {v: k for k, v in enumerate(values)}
    coincidence = np.zeros((len(values), len(values)))
    for unit in units:
        for a, b in itertools.permutations(unit, 2):
            coincidence[place[a], place[b]] += 1 / (len(unit) - 1)
    count = coincidence.sum(1)
    distance = _ordinal(count) if metric == "ordinal" else 1.0 - np.eye(len(values))
    expected = (np.outer(count, count) * distance).sum() / (count.sum() - 1)
    return float(1 - (coincidence * distance).sum() / expected)


def _ordinal(count: np.ndarray) -> np.ndarray:
    """Squared distance of two grades: how many ratings lie from one to the other, both ends half."""
    reach = np.cumsum(count) - count / 2
    return (reach[:, None] - reach) ** 2


def twofold(rows: Sequence, statistic: Callable, draws: int = DRAWS) -> tuple[float, float] | None:
    """95 % interval of statistic(rows) over raters and items drawn anew, both at once; rows have .rater and .item."""
    raters, items = ({name: k for k, name in enumerate(sorted({getattr(r, what) for r in rows}))} for what in ("rater", "item"))
    if len(raters) < 2 or len(items) < 2:
        return None
    who, which = (np.array([names[getattr(r, what)] for r in rows]) for what, names in (("rater", raters), ("item", items)))
    rng, values = np.random.default_rng(SEED), []
    for _ in range(draws):
        weights = (np.bincount(rng.integers(0, len(n), len(n)), minlength=len(n)) for n in (raters, items))
        weight = next(weights)[who] * next(weights)[which]
        value = statistic(weight) if weight.sum() else math.nan
        values.append(value)
    values = np.array(values)[np.isfinite(values)]
    return tuple(float(v) for v in np.percentile(values, [2.5, 97.5])) if len(values) >= draws / 2 else None


# ---------------------------------------------------------------- the table


def score(key: Key, found: Collected) -> list[Measure]:
    """All measures of section 7."""
    if not found.raters:
        return [absent(name, "no ratings collected", backend=BACKEND) for name in ("win_rate", "strength", "MOS", "alpha")]
    pilot = _pilot(found)
    judged = [c for c in found.choices if not c.repeat and c.first in key.systems and c.second in key.systems]
    made = [*_wins(judged), *_strengths(key.systems, judged), *_opinions(found.grades), *_agreement(judged, found.grades), *_anchors(found)]
    return [m if not pilot or not m.measured else replace(m, reason="; ".join(p for p in (m.reason, pilot) if p)) for m in made]


def _pilot(found: Collected) -> str:
    """Why these numbers are a pilot only, or ""."""
    per_pair: dict[tuple, set] = defaultdict(set)
    for c in found.choices:
        if not c.repeat and not c.first.startswith("anchor:"):
            per_pair[c.item, c.first, c.second].add(c.rater)
    least = min((len(raters) for raters in per_pair.values()), default=0)
    if len(found.raters) >= ENOUGH_RATERS and least >= ENOUGH_PER_PAIR:
        return ""
    return f"pilot: {len(found.raters)} of {ENOUGH_RATERS} raters, {least} of {ENOUGH_PER_PAIR} ratings of the rarest pair"


def _measure(name: str, value: float, n: int, interval, unit: str = "", better: str = "higher", reason: str = "") -> Measure:
    return Measure(name=name, value=float(value), unit=unit, better=better, n=n, interval=interval, backend=BACKEND, reason=reason)


def _wins(judged: Sequence[Choice]) -> list[Measure]:
    """win_rate.QUESTION.A>B: wins of A among the decided; ties are counted beside it."""
    made = []
    for pair in sorted({(c.first, c.second) for c in judged}):
        for question in QUESTIONS:
            votes = [c.won[question] for c in judged if (c.first, c.second) == pair and question in c.won]
            decided, ties = [v for v in votes if v != 0.5], votes.count(0.5)
            name, note = f"win_rate.{question}.{pair[0]}>{pair[1]}", f"{ties} of {len(votes)} no difference"
            if decided:
                share = float(np.mean(decided))
                made.append(_measure(name, share, len(decided), wilson(share, len(decided)), better="target", reason=note))
            elif votes:
                made.append(absent(name, note, better="target", backend=BACKEND))
    return made


def _strengths(systems: Sequence[str], judged: Sequence[Choice]) -> list[Measure]:
    """strength.QUESTION.SYSTEM: Bradley-Terry, log scale, mean 0."""
    made = []
    for question in QUESTIONS:
        rows = [c for c in judged if question in c.won]
        if not rows or len(systems) < 2:
            continue

        def strength(weight: np.ndarray, rows=rows, question=question) -> dict[str, float]:
            wins: dict[tuple[str, str], float] = defaultdict(float)
            for c, w in zip(rows, weight, strict=True):
                wins[c.first, c.second] += w * c.won[question]
                wins[c.second, c.first] += w * (1 - c.won[question])
            return bradley_terry(systems, wins)

        whole = strength(np.ones(len(rows)))
        for system in systems:
            interval = twofold(rows, lambda weight, system=system: strength(weight)[system], draws=DRAWS // 5)
            made.append(_measure(f"strength.{question}.{system}", whole[system], len(rows), interval))
    return made


def _opinions(grades: Sequence[Grade]) -> list[Measure]:
    """MOS.QUESTION.SYSTEM: mean of grades from 1 to 5; slide_QUESTION likewise from 0 to 100. Anchors too."""
    made = []
    for system in sorted({g.system for g in grades}):
        for question in sorted({q for g in grades for q in g.values}):
            rows = [g for g in grades if g.system == system and question in g.values]
            if rows:
                values = np.array([g.values[question] for g in rows])
                name = f"slider.{question.removeprefix('slide_')}.{system}" if question.startswith("slide_") else f"MOS.{question}.{system}"
                made.append(_measure(name, values.mean(), len(rows), twofold(rows, lambda w, values=values: float((w * values).sum() / w.sum()))))
    return made


def _agreement(judged: Sequence[Choice], grades: Sequence[Grade]) -> list[Measure]:
    """alpha.pairs.QUESTION (nominal) and alpha.MOS.QUESTION (ordinal): 1 is full agreement, 0 chance."""
    made = []
    for question in QUESTIONS:
        units: dict[tuple, list[float]] = defaultdict(list)
        for c in judged:
            if question in c.won:
                units[c.item, c.first, c.second].append(c.won[question])
        made.append(_alpha(f"alpha.pairs.{question}", units, "nominal"))
    for question in GRADES:
        units = defaultdict(list)
        for g in grades:
            if question in g.values:
                units[g.item, g.system].append(g.values[question])
        made.append(_alpha(f"alpha.MOS.{question}", units, "ordinal"))
    return made


def _alpha(name: str, units: dict, metric: str) -> Measure:
    value = krippendorff(list(units.values()), metric)
    n = sum(len(u) > 1 for u in units.values())
    return absent(name, "nothing was rated differently by two people", backend=BACKEND) if value is None else _measure(name, value, n, None)


def _anchors(found: Collected) -> list[Measure]:
    """anchor.KIND: share of raters' choices for the exact clip in lip sync. consistency: equal answers to repeated pairs."""
    made = []
    for kind in sorted({c.second for c in found.choices if c.first == EXACT and c.second.startswith("anchor:")}):
        votes = [c.won["sync"] for c in found.choices if (c.first, c.second) == (EXACT, kind) and not c.repeat and "sync" in c.won]
        right = sum(v == 1.0 for v in votes)
        made.append(_measure(f"anchor.{kind.removeprefix('anchor:')}", right / len(votes), len(votes), wilson(right / len(votes), len(votes))))
    if found.consistency:
        same, n = float(np.mean(found.consistency)), len(found.consistency)
        made.append(_measure("consistency", same, n, wilson(same, n)))
    return made
