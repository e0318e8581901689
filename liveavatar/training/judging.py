"""Stage 2 over a base, judged by a command of the user's: DMD has a peak and then degrades (training.md 2.5).

What the student began with and what it is after every so many of its steps go out as the adapter that `export` would
write; the command says what it is worth. The best stays as RUN/best.pt, for export.stage=best.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from liveavatar.core import ConfigError
from liveavatar.training.adapters import BaseConfig
from liveavatar.training.checkpoints import checkpoint_path, keep_averages
from liveavatar.training.export import ExportConfig, write_adapter
from liveavatar.training.groups import decided, meet, rank_and_world
from liveavatar.training.progress import LOG

OF_THE_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # the command is no part of it


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """command: for a shell, on the first rank while the others wait; the path of the adapter is in $ADAPTER, the last line of its
    stdout is a number, the higher the better. every: so many steps of the student; patience: the stage ends after so many
    judgements in a row that are no better than the best, 0: never."""

    command: str
    every: int = 50
    patience: int = 0

    def __post_init__(self):
        if not self.command.strip() or self.every < 1 or self.patience < 0:
            raise ConfigError(f"dmd.judge: command={self.command!r}: must say something; every={self.every}: at least 1; "
                              f"patience={self.patience}: at least 0")


class Judge:
    """Judges checkpoints of a run, each once; RUN/judged.jsonl has the rows, a resumed run goes on with them."""

    def __init__(self, config: JudgeConfig, export: ExportConfig, base: BaseConfig, run: str | Path):
        self.config, self.export, self.base, self.run = config, export, base, Path(run)
        log = self.run / "judged.jsonl"
        self.rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def due(self, steps: int) -> bool:
        """Whether the student is judged after so many steps."""
        return steps % self.config.every == 0

    def __call__(self, stage: str) -> bool:
        """Judge RUN/STAGE.pt unless it was; True when patience is at its end. All ranks call it. Raises ConfigError where the command
        has never worked; later a failure costs its own judgement only."""
        if rank_and_world()[0] == 0 and stage not in [row["stage"] for row in self.rows]:
            self._add(stage)
        meet()
        return decided(self._over())

    def _add(self, stage: str) -> None:
        adapter = self.run / "judged" / "liveavatar.safetensors"
        write_adapter(adapter, checkpoint_path(self.run, stage), self.base, self.export.dtype)
        try:
            row = {"stage": stage, "score": self._score(adapter)}
            if row["score"] > max(self.scores, default=-math.inf):
                keep_averages(checkpoint_path(self.run, stage), checkpoint_path(self.run, "best"))
        except ConfigError as error:
            if not self.scores:
                raise
            row = {"stage": stage, "error": str(error)}
        LOG.info("judged: %s", row)
        self.rows.append(row)
        with open(self.run / "judged.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def _score(self, adapter: Path) -> float:
        around = {name: value for name, value in os.environ.items() if name not in OF_THE_GROUP} | {"ADAPTER": str(adapter.resolve())}
        done = subprocess.run(self.config.command, shell=True, env=around, capture_output=True, text=True)
        last = (done.stdout.splitlines() or [""])[-1]
        try:
            score = float(last)
        except ValueError:
            score = math.nan
        if done.returncode or not math.isfinite(score):
            said = " ".join(done.stderr.split())[-300:]
            raise ConfigError(f"dmd.judge.command ended with {done.returncode}, its last line is {last!r}, where a number belongs: {said}")
        return score

    @property
    def scores(self) -> list[float]:
        """Of all that could be judged, in order."""
        return [row["score"] for row in self.rows if "score" in row]

    def _over(self) -> bool:
        since = len(self.scores) - 1 - self.scores.index(max(self.scores)) if self.scores else 0
        return 0 < self.config.patience <= since
