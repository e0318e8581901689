"""Sink and ring: keys and values a denoising step attends to (model.md sections 5 and 7).

One preallocated buffer per step holds [sink | ring] for all layers. Attention reads a slice of it;
nothing is shifted or concatenated, because the order of keys does not matter to softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liveavatar.models.layers import rotate


@dataclass(frozen=True)
class Sink:
    """Keys (after the RMS norm, before rotation) and values of the sink tokens of every layer.

    k, v: [layers, S, heads, d]. It does not depend on the step: one prefill serves all steps.
    """

    k: torch.Tensor
    v: torch.Tensor


def cache_bytes(layers: int, dim: int, sink_tokens: int, ring_tokens: int, block_tokens: int, element_size: int) -> int:
    """Bytes one StepCache allocates: K and V of sink and ring; the un-rotated sink is shared by a rank's steps."""
    return 2 * layers * dim * (sink_tokens + ring_tokens) * element_size


class StepCache:
    """[sink | ring] of one session at one step, at that step's own noise level.

    Allocated once at `layers x (sink + ring) x heads x d` for keys and for values.
    """

    def __init__(self, *, layers: int, heads: int, head_dim: int, sink_tokens: int, block_tokens: int,
                 ring_blocks: int, dtype: torch.dtype, device: torch.device | str):
        shape = (layers, sink_tokens + ring_blocks * block_tokens, heads, head_dim)
        self.sink_tokens, self.block_tokens, self.ring_blocks = sink_tokens, block_tokens, ring_blocks
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.sink: Sink | None = None
        self.written = 0  # blocks written since the last reset; their order in the ring is by this, not by block index

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def reset(self) -> None:
        """Forget history and sink; keeps the memory."""
        self.sink, self.written = None, 0

    def set_sink(self, sink: Sink, angles: torch.Tensor) -> None:
        """Take a new sink. angles: fp32 [2, S, d/2] rotation of the sink tokens at this moment."""
        assert sink.k.shape[1] == self.sink_tokens, (sink.k.shape, self.sink_tokens)
        self.sink = sink
        for layer in range(self.k.shape[0]):
            self.k[layer, : self.sink_tokens] = rotate(sink.k[layer][None], angles)[0]
        self.v[:, : self.sink_tokens] = sink.v

    def roll_reference(self, layer: int, angles: torch.Tensor) -> None:
        """Rotate the reference keys again; angles: fp32 [2, tok, d/2]. The motion keys never move."""
        tok = angles.shape[1]
        self.k[layer, :tok] = rotate(self.sink.k[layer, :tok][None], angles)[0]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrite the oldest slot with this block's rotated k and v [block_tokens, heads, d].

        Returns views of everything the block attends to: [sink + active, heads, d] each.
        """
        slot = self.sink_tokens + (self.written % self.ring_blocks) * self.block_tokens
        self.k[layer, slot : slot + self.block_tokens] = k
        self.v[layer, slot : slot + self.block_tokens] = v
        end = self.sink_tokens + min(self.written + 1, self.ring_blocks) * self.block_tokens
        return self.k[layer, :end], self.v[layer, :end]

    def advance(self) -> None:
        """The block is complete in every layer."""
        self.written += 1

    def ring(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ring part [ring_tokens, heads, d] of k (rotated) and v, in slot order."""
        return self.k[layer, self.sink_tokens :], self.v[layer, self.sink_tokens :]
