"""Drawings of a report, as SVG whose bytes depend on their numbers alone. Rendered heads are labelled in every one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from liveavatar.core import ConfigError
from liveavatar.evaluation.drift import Plan, Probe
from liveavatar.evaluation.landmarks import CHANNELS
from liveavatar.evaluation.tables import SYNTHETIC
from liveavatar.evaluation.traces import WARMUP, Recording

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes
DRIFTING = ("id_dlib", "picture_L", "picture_a", "picture_b", "picture_sharpness", "r0", "lag_ms", "closure", "motion_speech", "flicker_mae")


@contextlib.contextmanager
def sheet(path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (8.0, 3.2), title: str = "",
          synthetic: bool = False) -> Iterator:
    """Axes [rows][columns] to draw on, written to `path` afterwards. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'liveavatar[eval]'") from None
    from matplotlib.figure import Figure  # no pyplot: nothing global, no screen

    settings = {"svg.hashsalt": path.name, "svg.fonttype": "none", "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "axes.grid": True,
                "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(f"{title} ({SYNTHETIC})" if synthetic else title)
        yield figure.subplots(rows, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def lag_curves(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], synthetic: bool = False) -> None:
    """C(l) of each item: (lag in ms, correlation)."""
    with sheet(path, title="Mouth against speech, by how late the sound is taken", synthetic=synthetic) as ((axes,),):
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="sound later than picture, ms", ylabel="C")
        axes.legend(fontsize=7)


def mouth(path: Path, times: np.ndarray, seen: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], synthetic: bool = False) -> None:
    """gap and width [T]: as seen, and what the speech or the truth asks for, each in its own standard deviations."""
    with sheet(path, len(seen), title="The mouth over time", size=(10, 2 * len(seen) + 0.6), synthetic=synthetic) as rows:
        for (axes,), (name, values) in zip(rows, seen.items(), strict=True):
            axes.plot(times, _standard(values), label=f"{name}, seen")
            axes.plot(times, _standard(wanted[name]), label=f"{name}, wanted", linewidth=0.9)
            axes.set(ylabel="standard deviations")
            axes.legend(fontsize=7, loc="upper right")
        rows[-1][0].set(xlabel="seconds")


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - np.nanmean(values)) / max(np.nanstd(values), 1e-9)


def response(path: Path, commanded: Mapping[str, np.ndarray], seen: Mapping[str, np.ndarray], synthetic: bool = False) -> None:
    """One field per channel: commanded motion across, tracked motion up."""
    names = [name for name in CHANNELS if name in commanded]
    if not names:
        return
    rows = -(-len(names) // 3)
    with sheet(path, rows, 3, title="Commanded (across) against seen (up)", size=(9, 2.7 * rows + 0.4), synthetic=synthetic) as fields:
        for axes in fields.flat[len(names) :]:
            axes.axis("off")
        for axes, name in zip(fields.flat, names, strict=False):
            axes.plot(commanded[name], seen[name], ".", markersize=2)
            axes.set(title=name)


def contacts(path: Path, pictures: Mapping[str, np.ndarray], title: str, synthetic: bool = False) -> None:
    """Pictures uint8 [H, W, 3] with what is to be said of each."""
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    with sheet(path, rows, columns, title=title, size=(1.9 * columns, 2.2 * rows + 0.4), synthetic=synthetic) as fields:
        for axes in fields.flat:
            axes.axis("off")
        for axes, (name, picture) in zip(fields.flat, pictures.items(), strict=False):
            axes.imshow(picture, interpolation="none")
            axes.set_title(name, fontsize=7)


# ---------------------------------------------------------------- drift


def drift(path: Path, plan: Plan, found: Sequence[Probe], marks: Sequence[tuple[float, str]] = (), synthetic: bool = False) -> None:
    """Every measure of DRIFTING over the stream with its interval; marks: (seconds, what happened then)."""
    names = [n for n in DRIFTING if sum(p.value(n) is not None for p in found) > 1]
    with sheet(path, len(names), title=f"Windows of {plan.window:g} s", size=(9, 1.5 * len(names) + 0.6), synthetic=synthetic) as rows:
        for (axes,), name in zip(rows, names, strict=True):
            points = [(p.start, p.measures[name]) for p in found if p.value(name) is not None]
            axes.plot([t for t, _ in points], [m.value for _, m in points], "o-", markersize=3)
            held = [(t, *m.interval) for t, m in points if m.interval]
            if held:
                axes.vlines(*zip(*held), color=COLOURS[0], alpha=0.5)
            for t, what in marks:
                axes.axvline(t, color=COLOURS[1], linestyle=":")
                axes.annotate(what, (t, 1), xycoords=("data", "axes fraction"), fontsize=6, rotation=90, va="top")
            axes.set(ylabel=name)
        rows[-1][0].set(xlabel="seconds of the stream")


# ---------------------------------------------------------------- traces


def latency(path: Path, run: Recording) -> None:
    """Share of blocks done within a time: the whole chain, and every role."""
    with sheet(path, title="Latency of a block") as ((axes,),):
        for name, values in _latencies(run).items():
            axes.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), label=name)
        axes.set(xlabel="seconds", ylabel="share of blocks")
        axes.legend(fontsize=7)


def _latencies(run: Recording) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for stream in run.streams:
        begun = {line["block"]: line["t"] for line in stream["admitted"]}
        for line in stream["ready"]:
            if line["block"] >= WARMUP:
                found.setdefault("chain", []).append(line["t"] - begun[line["block"]])
        for span in stream["span"]:
            if span["block"] is not None and span["block"] >= WARMUP:
                found.setdefault(span["role"], []).append(span["end"] - span["start"])
    return found


def timeline(path: Path, run: Recording) -> None:
    """Time between pictures sent, over the run; repeated pictures are marked."""
    with sheet(path, title="Interval between pictures sent") as ((axes,),):
        start = min((s.opened for s in run.streams), default=0.0)
        for stream in run.streams:
            sent = [(line["t"] - start, line["count"]) for line in stream["sent"]]
            steps = [(b[0], (b[0] - a[0]) / b[1]) for a, b in pairwise(sent)]
            if steps:
                axes.plot(*zip(*steps, strict=True), label=stream.name, linewidth=0.9)
            for line in stream["repeated"]:
                axes.axvline(line["t"] - start, color=COLOURS[1], alpha=0.5)
        axes.axhline(1 / run.head["fps"], color="black", linewidth=0.8)
        axes.set(xlabel="seconds", ylabel="seconds per picture")
