"""Students that were trained apart: Stage 2 from every start, so that ablations compare what training made, not what it was fed.

Each has a folder RUN/ablations/START of its own, with links to what it reads; a killed one goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.models.encoders import TextEncoder
from liveavatar.training.checkpoints import checkpoint_path
from liveavatar.training.dmd import STARTS, DmdConfig, train_dmd
from liveavatar.training.forcing import ForcingConfig

READS = ("latents", "vae")  # besides checkpoints
PAPERS = {"forcing": "LiveTalk, no initialisation: Sync-C 3.53", "ode": "LiveTalk, ODE to convergence: Sync-C 4.15",
          "consistency": "Causal-Forcing: consistency in the place of ODE"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StudentsConfig:
    """starts: stages whose averages a student begins with; iterations: of Stage 2, None for as many as dmd.loop says."""

    starts: tuple[str, ...] = STARTS
    iterations: int | None = None

    def __post_init__(self):
        for start in self.starts:
            one_of("students.starts", start, STARTS)
        if not self.starts or len(set(self.starts)) < len(self.starts) or (self.iterations is not None and self.iterations < 1):
            raise ConfigError(f"students: starts={self.starts}: one of each at least; iterations={self.iterations}: at least 1")


def name_of(start: str) -> str:
    """How the table calls a student."""
    return f"student from {start}"


def train_students(config: StudentsConfig, dmd: DmdConfig, forcing: ForcingConfig, sigmas: Sequence[float], run: Path, seed: int, text: TextEncoder,
                   default_identity: int) -> dict[str, Path]:
    """Train (or go on training) a student from every start that the run has; returns their folders by start."""
    folders = {}
    for start in config.starts:
        folder = run / "ablations" / start
        if not checkpoint_path(run, start).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*READS, f"{start}.pt", f"{dmd.teacher}.pt"):
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(run.resolve() / name)  # not where that points to: older checkpoints are deleted
        loop = dmd.loop if config.iterations is None else replace(dmd.loop, iterations=config.iterations)
        train_dmd(replace(dmd, start=start, loop=loop), forcing, sigmas, folder, seed, text, default_identity)
        folders[start] = folder
    return folders
