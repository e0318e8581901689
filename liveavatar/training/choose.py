"""Which checkpoint is the best, judged by the probe: Stage 2 has a peak and then degrades (training.md 2.5).

People the model does not know say a held-out voice's words. First come those that meet more of the gates on articulation
and head motion, then those of higher score, which multiplies how well the mouth follows, how close both come to the
truth's, and how close the pictures' features are. It also keeps Stage 2 from starting under a teacher that is worse than
its student.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liveavatar.core import ConfigError, InputError
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.probe import frechet
from liveavatar.training import data as corpus
from liveavatar.training import preview
from liveavatar.training.ablations import Arm, Bench
from liveavatar.training.checkpoints import checkpoint_path, keep_averages
from liveavatar.training.forcing import ForcingConfig
from liveavatar.training.teacher import TeacherConfig

GATES = {"aperture slope": (0.9, 1.1), "head motion ratio": (0.85, 1.15)}  # training.md 6.3


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """people: identity seeds, of nobody whom the gates judge by; blocks: 0.48 s each; probe: folder of the judge, "" for RUN/probe."""

    people: tuple[int, ...] = (1_000_500, 1_000_501)
    blocks: int = 14
    probe: str = ""

    def __post_init__(self):
        if not self.people or self.blocks < 1:
            raise ConfigError(f"choose: people={self.people}: at least one; blocks={self.blocks}: at least 1")


def score(row: dict[str, float]) -> float:
    """0..1 from a row of ablations.figures: r x closeness of slopes x closeness of head motion / (1 + probe_fd)."""
    def near(ratio: float) -> float:
        return max(0.0, min(ratio, 1 / ratio)) if ratio > 0 else 0.0

    return max(0.0, row["sync r"]) * near(row["aperture slope"]) * near(row["head motion ratio"]) / (1 + max(0.0, row["probe_fd"]))


def gates_met(row: dict[str, float]) -> int:
    """How many of GATES a row of ablations.figures meets."""
    return sum(low <= row[name] <= high for name, (low, high) in GATES.items())


def candidates(run: str | Path, stage: str, start: str) -> list[str]:
    """Names of what can be chosen from: where Stage 2 began, what it kept on the way, its end."""
    kept = sorted(p.stem for p in Path(run).glob(f"{stage}_[0-9]*.pt"))
    return [name for name in (start, *kept, stage) if checkpoint_path(run, name).exists()]


def choose(config: ChooseConfig, forcing: ForcingConfig, data: corpus.DataConfig, run: str | Path, seed: int, text: TextEncoder, stage: str, start: str,
           sigmas: Sequence[float]) -> list[dict]:
    """Judge every candidate, copy the best to RUN/chosen.pt and write all rows to RUN/choice.json, best first.
    Raises InputError without any, WeightsError without probe."""
    run = Path(run)
    names = candidates(run, stage, start)
    if not names:
        raise InputError(f"{run}: no checkpoint of {start} or {stage} to choose from")
    bench = Bench.build(config.people, config.blocks, config.probe, forcing, data, run, seed, text)
    rows = [bench.row(Arm(name=name, stage=name), run, stage, sigmas, seed) for name in names]
    ranked = sorted(({**row, "gates": gates_met(row), "score": score(row)} for row in rows), key=lambda row: (-row["gates"], -row["score"]))
    keep_averages(checkpoint_path(run, ranked[0]["stage"]), checkpoint_path(run, "chosen"))
    (run / "choice.json").write_text(json.dumps(ranked, indent=1))
    return ranked


def check_teacher(config: ChooseConfig, teach: TeacherConfig, forcing: ForcingConfig, data: corpus.DataConfig, run: str | Path, seed: int,
                  text: TextEncoder, start: str, sigmas: Sequence[float]) -> dict[str, float]:
    """probe_fd of the teacher's own clips and of the student's before Stage 2; written to RUN/teacher_check.json.
    Raises ConfigError where the student is the better one."""
    run = Path(run)
    bench = Bench.build(config.people, preview.CLIP_BLOCKS, config.probe, forcing, data, run, seed, text)
    models = {"teacher": preview.load_model(forcing, run, seed, "teacher")[0], "student": preview.load_model(forcing, run, seed, start)[0]}
    made = {"teacher": [preview.generate_whole(models["teacher"], bench.vae, bench.text, forcing, bench.front_end, teach, scene, seed)
                        for scene in bench.scenes],
            "student": [preview.generate(models["student"], bench.vae, rows, forcing, bench.front_end, scene, sigmas, seed)
                        for scene, rows in zip(bench.scenes, bench.captions)]}
    truth = np.concatenate([seen.features for seen in bench.truth])
    found = {name: frechet(np.concatenate([bench.probe.look(p).features for p in pictures]), truth) for name, pictures in made.items()}
    (run / "teacher_check.json").write_text(json.dumps({"probe_fd": found, "start": start}, indent=1))
    if found["student"] < found["teacher"]:
        raise ConfigError(f"dmd: the student ({start}) is better than its teacher, probe_fd {found['student']:.3f} against {found['teacher']:.3f}: "
                          "train the teacher longer, or take dmd.teacher=forcing")
    return found
