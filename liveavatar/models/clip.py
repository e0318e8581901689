"""What a batch of whole clips is generated from: the conditions of training, as a stream's messages are those of serving."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clip:
    """Conditions of B clips of N blocks, and where they stand in their streams.

    features [B,L,Ca,4F]; context: text rows [n,text_dim] per clip; reference [B,16,1,h,w]; motion [B,16,M,h,w], oldest first.
    Block n sees the sink, itself and the window_blocks - 1 blocks before it. first_block: number of the clip's first block in its
    stream (positions only). refresh_block: from this block of the clip on the sink is its own first latent (AAS); 0: never, and only
    the cached order can. causal: False lets every block see the whole clip, one sink for all: the bidirectional teacher.
    """

    features: torch.Tensor
    context: list[torch.Tensor]
    reference: torch.Tensor
    motion: torch.Tensor
    window_blocks: int = 4
    sink_distance: int = 30
    first_block: int = 0
    refresh_block: int = 0
    causal: bool = True
