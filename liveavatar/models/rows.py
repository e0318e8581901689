"""Several blocks in one forward, each at its own step and with its own history: one read of the weights for all of them.

Rows differ in everything a step or a session decides (modulation, audio, prompt, ring, position); the linears see them
as a batch. Attention goes row by row, because rings differ in length and lie in buffers of their own. An `Exchange`
lets several processes share the forward: each computes a band of the picture and, inside attention, a share of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from liveavatar import ops
from liveavatar.models.audio_encoder import AudioTokens
from liveavatar.models.cache import StepCache
from liveavatar.models.s2v import CausalS2V, StepModulation, TextCache


@dataclass(frozen=True)
class Row:
    """One block at one step. x: [16, F, h, w]; audio, text: of a batch of one; cache: of this session at this step, with its sink."""

    x: torch.Tensor
    audio: AudioTokens
    text: TextCache
    cache: StepCache
    block: int
    sink_distance: int
    pose: torch.Tensor | None = None  # like x; of all rows of a forward or of none


class Exchange(Protocol):
    """What P processes that share a forward say to each other (runtime/bands.py)."""

    shards: int

    def band(self, x: torch.Tensor) -> torch.Tensor:
        """This process's rows of a picture, [..., h, w] -> [..., h/P, w]."""

    def order(self, angles: torch.Tensor, latents: int) -> torch.Tensor:
        """Angles of all tokens [2, n, d/2] in the order that to_heads gives."""

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """This process's share, [..., heads, d] -> [..., heads/P, d]."""

    def to_heads(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each [B, n/P, heads, d] -> [B, n, heads/P, d]: all tokens of this process's heads."""

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The way back of to_heads."""

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The picture of all bands, [..., h/P, w] -> [..., h, w], in every process."""


class Alone:
    """The Exchange of a process that computes everything."""

    shards = 1

    def band(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def order(self, angles: torch.Tensor, latents: int) -> torch.Tensor:
        return angles

    def to_heads(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return parts

    own_heads = to_tokens = whole = band


ALONE = Alone()


def stack_modulations(modulations: Sequence[StepModulation]) -> StepModulation:
    """Those of several steps as one of a batch; compute it once per set of steps."""
    blocks = tuple(type(same[0])(*(torch.cat(part) for part in zip(*same))) for same in zip(*(m.blocks for m in modulations)))
    heads = [m.head for m in modulations]
    return StepModulation(blocks, type(heads[0])(*(torch.cat(part) for part in zip(*heads))))


def forward_rows(model: CausalS2V, rows: Sequence[Row], modulation: StepModulation, exchange: Exchange = ALONE) -> torch.Tensor:
    """Velocities of all rows, fp32 [R, 16, F, h, w]; leaves each block's keys and values in its own cache, as CausalS2V.forward does.

    modulation: of the rows in their order (stack_modulations). All rows have one size.
    """
    assert all(row.cache.sink is not None for row in rows), "prefill before the first block"
    x = exchange.band(torch.stack([row.x for row in rows]).to(model.device))
    pose = None if rows[0].pose is None else exchange.band(torch.stack([row.pose for row in rows]).to(model.device))
    latents, h, w = x.shape[-3:]
    whole_h = rows[0].x.shape[-2]
    places = [_Place(model, row, exchange, latents, whole_h, w) for row in rows]
    audio = AudioTokens(*(torch.cat(parts) for parts in zip(*(row.audio for row in rows))))

    def attend(i, q, k, v):
        q, k, v = exchange.to_heads(q, k, v)
        seen = [place.attend(i, q[n : n + 1], k[n : n + 1], v[n : n + 1]) for n, place in enumerate(places)]
        return exchange.to_tokens(torch.cat(seen))

    layers = range(len(model.blocks))
    attends, texts = [partial(attend, i) for i in layers], (_texts(rows, i) for i in layers)
    tokens = model.through_layers(model.noisy_tokens(x, pose), modulation, attends, texts, audio)
    for row in rows:
        row.cache.advance(row.block)
    return exchange.whole(model.head(tokens, modulation.head, (latents, h // 2, w // 2)))


class _Place:
    """Where a row's block stands in its stream, and how it attends."""

    def __init__(self, model: CausalS2V, row: Row, exchange: Exchange, latents: int, h: int, w: int):
        self.cache, self.at = row.cache, model.places(row.block, latents, h, w, row.sink_distance, row.cache.anchor_moves(row.block))
        self.block = exchange.order(self.at.block, latents)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[1, n, heads, d] of this row, un-rotated -> the same shape."""
        if self.at.turns:
            self.cache.roll_anchors(layer, self.at.turns)
        return ops.attention(*self.cache.attended(layer, q, k, v, self.block, self.at.reference))


def _texts(rows: Sequence[Row], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the prompts, [R, text_len, heads, d]; nothing is copied where all rows are of one session."""
    first = rows[0].text.layers[layer]
    if all(row.text is rows[0].text for row in rows):
        return tuple(part.expand(len(rows), -1, -1, -1) for part in first)
    return tuple(torch.cat(parts) for parts in zip(*(row.text.layers[layer] for row in rows)))
