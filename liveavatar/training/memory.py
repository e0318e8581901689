"""Less memory for activations: blocks of the transformer computed again in the backward pass."""

from __future__ import annotations

import contextvars
import functools

from torch.utils.checkpoint import checkpoint

from liveavatar.models.s2v import CausalS2V


def compute_blocks_again(model: CausalS2V) -> None:
    """Keep only what enters each block; its inside is computed again when gradients need it, under the same adapter."""
    for block in model.blocks:
        if "forward" not in vars(block):
            block.forward = functools.partial(_again, block.forward)


def _again(forward, *args):
    # The backward pass may run elsewhere, in another thread or after other roles' forwards: take the context along.
    context = contextvars.copy_context()
    return checkpoint(lambda *a: context.copy().run(forward, *a), *args, use_reentrant=False, preserve_rng_state=False)
