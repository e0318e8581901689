"""Which rank sits where: the stages of a chain in order, each with as many ranks as share it (runtime.shards)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liveavatar.config import Config
from liveavatar.core import ConfigError


@dataclass(frozen=True)
class Seat:
    """A rank's place. shard: which of the `shards` ranks of its stage it is; 0 leads: it talks to the stages around."""

    rank: int
    stage: int
    roles: tuple[str, ...]
    shard: int = 0
    shards: int = 1

    @property
    def leader(self) -> int:
        """Rank of the one that leads this stage."""
        return self.rank - self.shard

    @property
    def others(self) -> range:
        """Ranks of this stage that follow its leader."""
        return range(self.leader + 1, self.leader + self.shards)


def stages_of(config: Config) -> tuple[tuple[str, ...], ...]:
    """The cut of the chain, one tuple of role names per stage."""
    return config.stages or (config.chain,)


def seats_of(config: Config, stages: Sequence[Sequence[str]] | None = None) -> tuple[Seat, ...]:
    """Every rank's seat, by rank. stages: instead of the config's. Raises ConfigError unless runtime.shards fits the stages."""
    return seated(stages or stages_of(config), config.runtime.shards)


def seated(stages: Sequence[Sequence[str]], shards: Sequence[int] | None) -> tuple[Seat, ...]:
    """As seats_of, of a cut and its runtime.shards."""
    shards = shards or (1,) * len(stages)
    if len(shards) != len(stages):
        raise ConfigError(f"runtime.shards={list(shards)}: give one number for each of the {len(stages)} stages")
    seats: list[Seat] = []
    for stage, (roles, count) in enumerate(zip(stages, shards)):
        seats += [Seat(len(seats) + n, stage, tuple(roles), n, count) for n in range(count)]
    return tuple(seats)
