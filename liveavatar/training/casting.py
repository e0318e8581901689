"""Who plays student, critic and teacher: a transformer each, or adapters over one frozen base (training.md 2.8).

The stages ask for roles and never see which it is, so there is one implementation of every loss and rollout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.training.adapters import Base, BaseConfig, Role
from liveavatar.training.checkpoints import checkpoint_path, load_average

Transformer = CausalS2V | Role


class ModelConfig(Protocol):
    """What forcing.ForcingConfig says of the transformer: its sizes, or the frozen base that carries adapters."""

    model: dict
    base: BaseConfig | None


def new_model(config: ModelConfig, seed: int) -> CausalS2V:
    """A transformer of the recipe's size, randomly started."""
    model = CausalS2V(S2VConfig.from_dict(config.model))
    model.init_weights(seed)
    return model


class Copies:
    """Every role is a transformer of its own, all of it trained."""

    def __init__(self, config: ModelConfig, run: str | Path, seed: int):
        self.config, self.run, self.seed = config, run, seed

    def fresh(self, role: str) -> Transformer:
        """As training starts from nothing."""
        return new_model(self.config, self.seed)

    def averaged(self, stage: str, role: str) -> tuple[Transformer, int]:
        """With the averages of a stage's last checkpoint, and its iteration. Raises WeightsError without one."""
        model = self.fresh(role)
        return model.eval(), load_average(model, checkpoint_path(self.run, stage))

    def started(self, stage: str, start: str) -> Transformer:
        """What a stage begins to train: the averages of RUN/START.pt, or fresh where `start` is "". A stage that has a
        checkpoint of its own goes on from that."""
        begun = checkpoint_path(self.run, stage).exists()
        return self.averaged(start, "student")[0] if start and not begun else self.fresh("student")

    def critic(self, teacher: str) -> Transformer:
        """Starts as the teacher, the averages of stage `teacher`."""
        return self.averaged(teacher, "critic")[0]

    def teacher(self, stage: str) -> Transformer:
        """The averages of `stage`, frozen."""
        return self.averaged(stage, "teacher")[0].requires_grad_(False)


class Adapters(Copies):
    """One frozen base, which is what a `teacher` stage would train; every other role is an adapter over it."""

    def __init__(self, config: ModelConfig, run: str | Path, seed: int, base: Base | None = None):
        super().__init__(config, run, seed)
        self.base = base or Base.load(config.base, seed)

    def fresh(self, role: str) -> Transformer:
        """As the base, until its adapter is trained."""
        return self.base.as_(role)

    def critic(self, teacher: str) -> Transformer:
        return self.fresh("critic") if teacher == "teacher" else super().critic(teacher)

    def teacher(self, stage: str) -> Transformer:
        return self.base.as_(None) if stage == "teacher" else super().teacher(stage)


def cast_of(config: ModelConfig, run: str | Path, seed: int) -> Copies:
    """The recipe's transformers. Raises WeightsError when the base cannot be loaded."""
    return Adapters(config, run, seed) if config.base else Copies(config, run, seed)


def averaged_model(config: ModelConfig, run: str | Path, stage: str, seed: int) -> tuple[Transformer, int]:
    """The averaged transformer of a stage's last checkpoint by itself, and its iteration. Raises WeightsError without one."""
    return cast_of(config, run, seed).averaged(stage, "student")
