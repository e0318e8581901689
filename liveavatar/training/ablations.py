"""Side stage `ablations`: what each part of the method is worth on the checkpoints of a run, as one table.

The same people say the same long speech under every arm. An arm changes one thing at inference (history, sink, rolling
positions, levels) or takes another checkpoint (with and without few-step initialisation and Stage 2). Directions of the
papers stand beside the figures; the scores are those of our own probe on rendered heads and compare arms with each other,
nothing else.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.audio_features import AudioFrontEnd
from liveavatar.config import one_of
from liveavatar.core import FPS, ConfigError
from liveavatar.diffusion.rollout import HistoryMode
from liveavatar.models.cache import StepCache
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.probe import Probe, Seen, frechet, identity_error, load_probe
from liveavatar.models.vae import StreamingVAE
from liveavatar.training import data as corpus
from liveavatar.training import preview
from liveavatar.training.checkpoints import checkpoint_path
from liveavatar.training.forcing import ForcingConfig
from liveavatar.training.levels import student_table
from liveavatar.training.progress import counted
from liveavatar.training.stored import front_end_of_run
from liveavatar.training.students import PAPERS, StudentsConfig, name_of
from liveavatar.training.synth.head import HeadRenderer

WINDOW = 60  # pictures at the start and at the end that are compared for drift


class NoSink(StepCache):
    """The ring alone."""

    def seen(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As StepCache.seen, without the sink."""
        keys, values = super().seen(layer)
        return keys[self.sink_tokens :], values[self.sink_tokens :]


class StillSink(StepCache):
    """The reference stays where prefill put it, while the blocks move on: no Rolling RoPE."""

    def roll_reference(self, layer: int, angles: torch.Tensor) -> None:
        """Nothing."""


SINKS = {"rolling": StepCache, "still": StillSink, "none": NoSink}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row. paper: what Live Avatar v5 or LiveTalk reports for the change. run: another run folder, below the recipe's where it
    is relative; "": the recipe's."""

    name: str
    stage: str = ""  # "": the one that is exported
    run: str = ""
    history: str = "per_step"
    sink: str = "rolling"
    refresh_block: int = 0
    steps: int | None = None  # of an evenly spaced table; None: the exported one
    paper: str = ""

    def __post_init__(self):
        one_of("arm.sink", self.sink, tuple(SINKS))
        HistoryMode.parse(self.history)


ARMS = (
    Arm(name="as shipped", paper="LA long: Sync-C 7.16, Dino-S .97, flicker .971"),
    Arm(name="clean history", history="clean", paper="worse: Sync-C 6.11, Dino-S .90, flicker .876"),
    Arm(name="history at fixed t 557", history="fixed:557", paper="worse: Sync-C 7.00, Dino-S .93, flicker .891"),
    Arm(name="history at random t", history="random:700", paper="history corruption against drift: without it Dino-S .81"),
    Arm(name="no sink", sink="none", paper="identity is lost"),
    Arm(name="sink at a fixed place", sink="still", paper="without Rolling RoPE: Dino-S .86"),
    Arm(name="own first latent as sink (AAS)", refresh_block=1, paper="without AAS: ASE 3.13 instead of 3.42, Dino-S -.01"),
    Arm(name="2 steps", steps=2, paper="Sync-C 6.41, Dino-S .94"),
    Arm(name="3 steps", steps=3, paper="Sync-C 6.58, Dino-S .95"),
    Arm(name="forcing alone", stage="forcing", paper="before few-step training"),
    Arm(name="with few-step initialisation, no Stage 2", stage="consistency", paper="LiveTalk, ODE to convergence: Sync-C 3.53 -> 4.15"),
)


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """people: identity seeds; blocks: length of the speech each of them says, 0.48 s a block."""

    people: tuple[int, ...] = (1_000_000, 1_000_001)
    blocks: int = 40
    probe: str = ""  # folder of the judge; "": RUN/probe
    arms: tuple[Arm, ...] = field(default=ARMS)
    students: StudentsConfig | None = None  # further rows: students that Stage 2 made of other starts, trained here first

    def __post_init__(self):
        if self.blocks * preview.BLOCK < 2 * WINDOW or not self.people or not self.arms:
            raise ConfigError(f"ablations: blocks={self.blocks}: at least {2 * WINDOW // preview.BLOCK}; at least one of people and arms")
        if len({arm.name for arm in self.arms_with_students}) < len(self.arms_with_students):
            raise ConfigError("ablations.arms: names must differ")

    @property
    def arms_with_students(self) -> tuple[Arm, ...]:
        """All rows. A student's checkpoint is found in a folder of the run, see students.py."""
        starts = self.students.starts if self.students else ()
        return (*self.arms, *(Arm(name=name_of(start), stage="dmd", run=f"ablations/{start}", paper=PAPERS[start]) for start in starts))


# ---------------------------------------------------------------- figures


def within(judged: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> tuple[float, float]:
    """(r, slope) of judged on true values, every clip around its own mean."""
    y, x = (np.concatenate([v - v.mean() for v in side]) for side in (judged, truth))
    return float(np.corrcoef(x, y)[0, 1]), float((x @ y) / (x @ x))


def corner_flicker(pictures: np.ndarray) -> float:
    """Mean change between neighbouring pictures of the two upper corners (an eighth of the side), grey levels."""
    side = pictures.shape[1] // 8
    corners = np.concatenate([pictures[:, :side, :side], pictures[:, :side, -side:]], axis=2).astype(np.float32)
    return float(np.abs(np.diff(corners, axis=0)).mean())


def figures(made: list[np.ndarray], seen: list[Seen], truth: list[Seen], scenes: list[preview.Scene], references: list[np.ndarray]) -> dict[str, float]:
    """The row of an arm. made: pictures per person; references: identity embedding of each portrait."""
    r, slope = within([s.aperture for s in seen], [scene.aperture for scene in scenes])
    away = [identity_error(s.identity, e) for s, e in zip(seen, references)]
    moved = [np.mean([np.std(getattr(s, axis)) for s in side for axis in ("yaw", "pitch", "roll")]) for side in (seen, truth)]
    return {"sync r": r, "aperture slope": slope, "probe_id start": float(np.mean([a[:WINDOW].mean() for a in away])),
            "probe_id end": float(np.mean([a[-WINDOW:].mean() for a in away])),
            "probe_fd": frechet(*(np.concatenate([s.features for s in side]) for side in (seen, truth))),
            "head motion ratio": float(moved[0] / moved[1]), "corner flicker": float(np.mean([corner_flicker(m) for m in made]))}


# ---------------------------------------------------------------- the stage


@dataclass(frozen=True)
class Bench:
    """What all arms share, read once."""

    forcing: ForcingConfig
    vae: StreamingVAE
    front_end: AudioFrontEnd
    probe: Probe
    scenes: list[preview.Scene]
    text: TextEncoder

    @functools.cached_property
    def captions(self) -> list[torch.Tensor]:
        """Text rows of the scenes."""
        return [self.text.encode(scene.caption) for scene in self.scenes]

    @functools.cached_property
    def truth(self) -> list[Seen]:
        """What the probe reads off the true pictures of the scenes."""
        return [self.probe.look(scene.truth) for scene in self.scenes]

    @functools.cached_property
    def portraits(self) -> list[np.ndarray]:
        """Identity embedding [E] of each scene's portrait."""
        return [self.probe.look(scene.reference[None]).identity[0] for scene in self.scenes]

    @classmethod
    def build(cls, people: Sequence[int], blocks: int, probe: str, forcing: ForcingConfig, data: corpus.DataConfig, run: Path, seed: int,
              text: TextEncoder) -> "Bench":
        """Render so many BLOCKs of each of `people` (the slow part) and load codec and judge. probe: its folder, "" for RUN/probe."""
        renderer, said = HeadRenderer(data.size, data.supersample), preview.spoken(blocks, seed + 11)
        scenes = [preview.make_scene(renderer, person, said, blocks, seed + i) for i, person in enumerate(people)]
        judge = load_probe(probe or run / "probe")[0]
        return cls(forcing, StreamingVAE.from_folder(run / "vae"), front_end_of_run(forcing.model, run), judge, scenes, text)

    def row(self, arm: Arm, run: Path, stage: str, sigmas: Sequence[float], seed: int) -> dict:
        """Generate and judge one arm of RUN."""
        started = time.monotonic()
        model, iteration = preview.load_model(self.forcing, run / arm.run, seed, arm.stage or stage)
        table = student_table(arm.steps, 5.0) if arm.steps else sigmas
        how = {"history": HistoryMode.parse(arm.history), "refresh_block": arm.refresh_block, "kind": SINKS[arm.sink]}
        made = [preview.generate(model, self.vae, rows, self.forcing, self.front_end, scene, table, seed, **how)
                for scene, rows in zip(self.scenes, self.captions)]
        seen = [self.probe.look(pictures) for pictures in made]
        return {"arm": arm.name, "stage": arm.stage or stage, "iteration": iteration, **figures(made, seen, self.truth, self.scenes, self.portraits),
                "seconds": round(time.monotonic() - started, 1), "paper": arm.paper}


def ablate(config: AblationConfig, forcing: ForcingConfig, data: corpus.DataConfig, run: str | Path, seed: int, text: TextEncoder, stage: str,
           sigmas: Sequence[float]) -> list[dict]:
    """Run every arm whose checkpoint is there and write RUN/ablations/table.{json,md}; arms without one say so in the table.
    Raises WeightsError without codec or probe."""
    run = Path(run)
    bench, rows = Bench.build(config.people, config.blocks, config.probe, forcing, data, run, seed, text), []
    folder = run / "ablations"
    folder.mkdir(exist_ok=True)
    for arm in counted(config.arms_with_students, "rows"):
        there = checkpoint_path(run / arm.run, arm.stage or stage).exists()
        rows.append(bench.row(arm, run, stage, sigmas, seed) if there else {"arm": arm.name, "stage": arm.stage or stage, "paper": arm.paper})
        (folder / "table.json").write_text(json.dumps({"people": config.people, "blocks": config.blocks, "seed": seed, "rows": rows}, indent=1))
        (folder / "table.md").write_text(table_text(config, rows), encoding="utf-8")
    return rows


def table_text(config: AblationConfig, rows: Sequence[dict]) -> str:
    """The table in Markdown."""
    names = [name for row in rows for name, value in row.items() if isinstance(value, float) and name != "seconds"]
    columns = list(dict.fromkeys(names))
    lines = [f"Ablations: {len(config.people)} rendered people unknown to the model, {config.blocks * preview.BLOCK / FPS:.0f} s each, held-out voice. Scores of our own probe; "
             "the papers' columns are other metrics on other data and show a direction only.", "",
             "| arm | checkpoint | " + " | ".join(columns) + " | papers |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        cells = [f"{row[name]:.3f}" if name in row else "not measured (no checkpoint)" for name in columns]
        lines.append(f"| {row['arm']} | {row['stage']} {row.get('iteration', '')} | " + " | ".join(cells) + f" | {row['paper']} |")
    return "\n".join(lines) + "\n"
