"""Sequence parallelism inside a step, after DeepSpeed-Ulysses: the ranks of one stage share every forward.

Outside attention a rank holds a band of the picture's rows; inside it holds all tokens of its share of the heads, and so
its share of sink and ring. Two all-to-alls a layer change one into the other. For the first frame's latency, and for
memory: weights, prompt and prefill are whole on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from liveavatar.core import ConfigError
from liveavatar.runtime.links import LinkBroken
from liveavatar.runtime.seats import Seat


class Bands:
    """The Exchange (models/rows.py) of one rank of a stage. group: torch.distributed's, of the ranks of this stage in order."""

    def __init__(self, group: dist.ProcessGroup, seat: Seat, device: torch.device):
        if device.type == "cuda" and dist.get_backend(group) != "nccl":
            raise ConfigError(f"runtime.shards: stage {seat.stage} needs a GPU for each of its {seat.shards} ranks")
        self.group, self.shard, self.shards = group, seat.shard, seat.shards
        self._peer = seat.leader + (seat.shard + 1) % seat.shards

    def band(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h, w] -> this rank's rows [..., h/P, w]."""
        return x.chunk(self.shards, dim=-2)[self.shard].contiguous()

    def order(self, angles: torch.Tensor, latents: int) -> torch.Tensor:
        """[2, n, d/2] by latent, row, column -> by band, latent, row, column, as to_heads puts tokens together."""
        return angles.unflatten(1, (latents, self.shards, -1)).transpose(1, 2).flatten(1, 3)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[..., heads, d] -> a copy of this rank's [..., heads/P, d]."""
        return x.chunk(self.shards, dim=-2)[self.shard].clone()

    def to_heads(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each [B, n/P, heads, d] -> [B, n, heads/P, d]; all parts travel together."""
        x = torch.stack(parts).unflatten(3, (self.shards, -1))  # [parts, B, n/P, P, heads/P, d]
        came = self._all_to_all(x.permute(3, 0, 1, 2, 4, 5))
        return came.permute(1, 2, 0, 3, 4, 5).flatten(2, 3).unbind(0)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, heads/P, d] -> [B, n/P, heads, d]."""
        came = self._all_to_all(x.unflatten(1, (self.shards, -1)).transpose(0, 1))
        return came.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h/P, w] -> [..., h, w]."""
        bands = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.shards)]
        self._together(lambda: dist.all_gather(bands, x.contiguous(), group=self.group))
        return torch.cat(bands, dim=-2)

    def _all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """[P, ...], part p for rank p of the stage -> [P, ...], part p from it. As bytes: gloo does not know every dtype."""
        x = x.contiguous()
        came = torch.empty_like(x)
        self._together(lambda: dist.all_to_all_single(came.view(torch.uint8), x.view(torch.uint8), group=self.group))
        return came

    def _together(self, act) -> None:
        try:
            act()
        except RuntimeError as error:
            raise LinkBroken(self._peer, error) from error
