"""Sink and ring: keys and values a denoising step attends to (model.md sections 5 and 7).

One preallocated buffer per step holds [sink | ring] for all layers. Attention reads a slice of it;
nothing is shifted or concatenated, because the order of keys does not matter to softmax. Training cannot
write in place into what a graph still needs: ClipHistory takes StepCache's place there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from liveavatar import ops


@dataclass(frozen=True)
class Sink:
    """Keys (after the RMS norm, before rotation) and values of the sink tokens of every layer.

    k, v: [layers, S, heads, d]. It does not depend on the step: one prefill serves all steps.
    """

    k: torch.Tensor
    v: torch.Tensor


def cache_bytes(layers: int, heads: int, head_dim: int, sink_tokens: int, ring_tokens: int, anchor_tokens: int, dtype: torch.dtype) -> int:
    """Bytes one StepCache allocates: K and V of sink and ring, K of anchors; the un-rotated sink is shared by a rank's steps."""
    head = head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == ops.E4M3 else 0)
    return layers * heads * (2 * (sink_tokens + ring_tokens) + anchor_tokens) * head


def _stored(layers: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor | ops.Rounded:
    """Zeros [layers, tokens, heads, d]."""
    shape = (layers, tokens, heads, head_dim)
    return ops.Rounded.zeros(*shape, device=device) if dtype == ops.E4M3 else torch.zeros(shape, dtype=dtype, device=device)


def _along_tokens(x: torch.Tensor | ops.Rounded) -> torch.Tensor | ops.Rounded:
    """FP8 values so that the tokens of a head lie side by side, as FP8 matrix units read them (attention_fp8); a shape does not change."""
    if isinstance(x, torch.Tensor):
        return x
    layers, tokens, heads, size = x.shape
    return ops.Rounded(x.values.view(layers, heads, size, tokens).permute(0, 3, 1, 2), x.scale)


class StepCache:
    """[sink | ring] of one session at one step, at that step's own noise level.

    Allocated once at `layers x (sink + ring) x heads x d` for keys and for values; dtype E4M3: as FP8 with a scale for every token
    and head, and what attention takes is Rounded. anchor_blocks: so many first
    blocks never leave the ring and stand right before the newest ones (Anchor-Heavy Identity Sinks, LiveTalk; their
    keys are turned along so that distances stay those of a plain ring, which the paper's short clips do not need).
    """

    def __init__(self, *, layers: int, heads: int, head_dim: int, sink_tokens: int, block_tokens: int,
                 ring_blocks: int, dtype: torch.dtype, device: torch.device | str, anchor_blocks: int = 0):
        rest = {"heads": heads, "head_dim": head_dim, "dtype": dtype, "device": device}
        self.sink_tokens, self.block_tokens, self.ring_blocks = sink_tokens, block_tokens, ring_blocks
        self.k = _stored(layers, sink_tokens + ring_blocks * block_tokens, **rest)
        self.v = _along_tokens(_stored(layers, sink_tokens + ring_blocks * block_tokens, **rest))
        self.anchors: list[int] = []  # numbers of the blocks that stay
        self.anchor_blocks = anchor_blocks
        self.anchor_k = _stored(layers, anchor_blocks * block_tokens, **rest)
        self.sink: Sink | None = None
        self.written = 0  # blocks written since the last reset; their order in the ring is by this, not by block index

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.anchor_k.nbytes

    def reset(self) -> None:
        """Forget history and sink; keeps the memory."""
        self.sink = None
        self.forget()

    def forget(self) -> None:
        """Forget history; the sink stays."""
        self.written, self.anchors = 0, []

    def set_sink(self, sink: Sink, angles: torch.Tensor) -> None:
        """Take a new sink. angles: fp32 [2, S, d/2] rotation of the sink tokens at this moment."""
        assert sink.k.shape[1] == self.sink_tokens, (sink.k.shape, self.sink_tokens)
        self.sink = sink
        for layer in range(self.k.shape[0]):
            ops.rotate_into(sink.k[layer], angles, self.k[layer, : self.sink_tokens])
            ops.put(sink.v[layer], self.v[layer, : self.sink_tokens])

    def attended(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: torch.Tensor,
                 reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate this block's q, k [1, block_tokens, heads, d], put k and v over the oldest slot: what attention takes.

        angles: fp32 [2, block_tokens, d/2]; reference: fp32 [2, tok, d/2], where the reference stands for this block. Returns
        q and the keys and values of all that the block attends to, views [1, sink + active, heads, d], Rounded where the cache is.
        """
        self.roll_reference(layer, reference)
        first = self.sink_tokens + self.slot() * self.block_tokens
        own = self.k[layer, first : first + self.block_tokens]
        q = ops.rope_cache(q[0], k[0], v[0], angles, own, self.v[layer, first : first + self.block_tokens])
        if self.written < self.anchor_blocks:
            ops.put(own, self.anchor_k[layer, self.written * self.block_tokens :][: self.block_tokens])
        keys, values = self.seen(layer)
        return q[None], keys[None], values[None]

    def roll_reference(self, layer: int, angles: torch.Tensor) -> None:
        """Rotate the reference keys again; angles: fp32 [2, tok, d/2]. The motion keys never move."""
        tok = angles.shape[1]
        ops.rotate_into(self.sink.k[layer, :tok], angles, self.k[layer, :tok])

    def seen(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [sink + active, heads, d] of the keys and values the block attends to once its own are there."""
        end = self.sink_tokens + self.active() * self.block_tokens
        return self.k[layer, :end], self.v[layer, :end]

    def active(self) -> int:
        """Blocks in the ring, the one that is being computed included."""
        return min(self.written + 1, self.ring_blocks)

    def slot(self) -> int:
        """Where in the ring the next block goes; the slots of anchors are written once."""
        if self.written < self.ring_blocks:
            return self.written
        rolling = self.ring_blocks - self.anchor_blocks
        return self.anchor_blocks + (self.written - self.anchor_blocks) % rolling

    @property
    def place(self) -> tuple[int, int]:
        """Where the next block is written and how much it sees: what is constant in a captured forward."""
        return self.slot(), self.active()

    def anchor_moves(self, block: int) -> list[int]:
        """How many blocks every anchor has to come along, so that it stands where a plain ring's oldest blocks would."""
        return [max(0, block - (self.ring_blocks - 1) + i - number) for i, number in enumerate(self.anchors)]

    def roll_anchors(self, layer: int, turns: Sequence[torch.Tensor]) -> None:
        """Turn the keys of the anchors by fp32 [2, 1, d/2] each, from where they were written."""
        for i, angles in enumerate(turns):
            first = i * self.block_tokens
            own = ops.restored(self.anchor_k[layer, first : first + self.block_tokens], torch.float32)
            ops.rotate_into(own, angles.expand(-1, self.block_tokens, -1).contiguous(), self.k[layer, self.sink_tokens + first :][: self.block_tokens])

    def advance(self, block: int) -> None:
        """Block number `block` is complete in every layer."""
        if self.written < self.anchor_blocks:
            self.anchors.append(block)
        self.written += 1

    def ring(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ring part [ring_tokens, heads, d] of k (rotated) and v, in slot order."""
        return self.k[layer, self.sink_tokens :], self.v[layer, self.sink_tokens :]


class ClipHistory:
    """[sink | newest blocks] of a batch of clips, tensors in and tensors out: what a StepCache is to a stream.

    Keys and values of past blocks are kept without gradients, and all of them are kept, although a block sees
    the newest window_blocks - 1 only: `before` gives the history any block had, so that one block after the
    other can be computed again with gradients (training.md 2.6). The sink keeps its graph.
    """

    def __init__(self, window_blocks: int):
        self.window_blocks = window_blocks
        self.blocks: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # per block and layer: rotated k, v
        self.sink: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._angles: torch.Tensor | None = None
        self._own: list[tuple[torch.Tensor, torch.Tensor]] = []

    def set_sink(self, sink: list[tuple[torch.Tensor, torch.Tensor]], angles: torch.Tensor) -> None:
        """sink: un-rotated k and v [B, S, heads, d] of every layer; angles: fp32 [2, S, d/2]."""
        self.sink, self._angles = sink, angles

    def before(self, block: int) -> "ClipHistory":
        """The history as block number `block` of the clip found it, without a sink."""
        earlier = ClipHistory(self.window_blocks)
        earlier.blocks = self.blocks[:block]
        return earlier

    def attended(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: torch.Tensor,
                 reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As StepCache.attended, for [B, block_tokens, heads, d]."""
        q, k = ops.rotate(q, angles), ops.rotate(k, angles)
        self._own = [] if layer == 0 else self._own
        self._own.append((k.detach(), v.detach()))
        sink_k, sink_v = self.sink[layer]
        sink_k = ops.rotate(sink_k, torch.cat([reference, self._angles[:, reference.shape[1] :]], dim=1))
        seen = [block[layer] for block in self.blocks[max(0, len(self.blocks) - self.window_blocks + 1) :]]
        keys = torch.cat([sink_k.to(k.dtype), *(past for past, _ in seen), k], dim=1)
        return q, keys, torch.cat([sink_v.to(v.dtype), *(past for _, past in seen), v], dim=1)

    def anchor_moves(self, block: int) -> list[int]:
        """None: anchors are for streams."""
        return []

    def advance(self, block: int) -> None:
        """The block is complete in every layer and later blocks will see it."""
        self.blocks.append(self._own)
