"""Exact gradients of a cached rollout with the activations of one block at a time (training.md 2.6).

History enters a block as a constant, so dL/dtheta is the sum over blocks of J_n^T g_n: the loss is taken
once for the whole clip, without a graph, and every block is then computed again alone. Needed where the
level-parallel order is not at hand: shared banks (clean, fixed, random) and a sink that is refreshed.
"""

from __future__ import annotations

import torch

from liveavatar.diffusion.rollout import Rolled, replay_block
from liveavatar.models.s2v import CausalS2V


def replay(model: CausalS2V, rolled: Rolled, gradient: torch.Tensor) -> None:
    """Add to the parameters' gradients those of a loss whose gradient at rolled.latents is `gradient` [B,C,F,h,w].

    Ranks of a group average after the last block, as after any backward: nothing is sent in between.
    """
    for block in reversed(range(rolled.blocks)):
        replay_block(model, rolled, block).backward(rolled.piece(gradient, block))
