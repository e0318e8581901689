"""The plots of a suite: its worst items from near, because a mean hides them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from liveavatar.conditioning.visemes import expected_mouth
from liveavatar.evaluation import plots, sync
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.landmarks import CHANNELS, Track
from liveavatar.evaluation.report import Item
from liveavatar.evaluation.suite import Suite, read_truth

HEADLINE = "sync_index"
MOST = 6


def draw(suite: Suite, videos: Path, items: Sequence[Item], folder: Path) -> tuple[str, ...]:
    """A contact sheet of the worst items, first those that could not be measured; lag curves of the worst of the others, mouth and
    response of the very worst; returns plots/NAME.svg of each."""
    return tuple(f"plots/{name}.svg" for name in _drawn(suite, videos, items, folder))


def _drawn(suite: Suite, videos: Path, items: Sequence[Item], folder: Path) -> Iterator[str]:
    """Names of the plots, as they are drawn."""
    ranked = sorted((item for item in items if item.picture), key=_headline)
    if not ranked:
        return
    known = {item.id: item for item in suite.manifest.items}
    synthetic = suite.manifest.synthetic
    sheet = {_caption(item): _middle(VideoFile(videos / f"{item.id}.mp4")) for item in ranked[:MOST]}
    plots.contacts(folder / "worst.svg", sheet, "Worst items by sync_index", synthetic)
    yield "worst"
    measured = [item.id for item in ranked if math.isfinite(_headline(item))][:MOST]  # a face in three pictures correlates with anything
    if not measured:
        return
    clips = {name: VideoFile(videos / f"{name}.mp4") for name in measured}
    tracks = {name: Track.through(clip) for name, clip in clips.items()}
    said_in = {name: sync.heard(clip.sound(), known[name].text)[0] for name, clip in clips.items()}
    plots.lag_curves(folder / "lag.svg", {name: sync.lag_curve(track, said_in[name]) for name, track in tracks.items()}, synthetic)
    yield "lag"
    worst = measured[0]
    track, said = tracks[worst], said_in[worst]
    wanted = dict(zip(("gap", "width"), expected_mouth(said, track.times), strict=True))
    plots.mouth(folder / "mouth.svg", track.times, {"gap": track.gap, "width": track.width}, wanted, synthetic)
    yield "mouth"
    motion = suite.path(known[worst], "gt_motion")
    if motion is None:
        return
    truth = read_truth(motion)
    asked = {name: truth.at(name, track.times) for name in CHANNELS if name in truth.channels}
    plots.response(folder / "response.svg", asked, {name: track.channel(name) for name in asked}, synthetic)
    yield "response"


def _headline(item: Item) -> float:
    return next((m.value for m in item.measures if m.name == HEADLINE and m.measured), -math.inf)


def _caption(item: Item) -> str:
    value = _headline(item)
    return f"{item.id}: {value:.2f}" if math.isfinite(value) else f"{item.id}: not measured"


def _middle(clip: VideoFile):
    return next(picture for at, picture in clip.frames() if at >= clip.seconds / 2 - 0.1)
