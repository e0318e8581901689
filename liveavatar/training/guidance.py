"""Classifier-free guidance in one convention: u + s (c - u), where s = 1 is none (training.md 2.0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import ClipCondition, Velocity
from liveavatar.training.casting import Transformer

# What to add to a number of another project to get ours: s of u + s (c - u), where s = 1 is no guidance.
GUIDANCE_CONVENTIONS = {"conventional": 0.0, "fastvideo": 0.0, "fastvideo_legacy": 1.0, "self_forcing": 1.0, "livetalk": 1.0}


def conventional_guidance(value: float, convention: str) -> float:
    """A guidance number in our convention, from that of a project in GUIDANCE_CONVENTIONS. Raises ConfigError."""
    if convention not in GUIDANCE_CONVENTIONS:
        raise ConfigError(f"guidance convention {convention!r}: must be one of {', '.join(GUIDANCE_CONVENTIONS)}")
    return value + GUIDANCE_CONVENTIONS[convention]


def guided(chain: Sequence[Velocity], scales: Sequence[float]) -> Velocity:
    """Classifier-free guidance: u + s_1 (c_1 - u) + s_2 (c_2 - c_1) + ..., chain = (u, c_1, c_2, ...).

    All scales 1 is the last of the chain itself; equal scales leave out what lies between. Guiding the
    velocity guides the clean estimate alike, which is an affine function of it.
    """
    assert len(chain) == len(scales) + 1 > 1
    if len(set(scales)) == 1:
        chain, scales = (chain[0], chain[-1]), scales[:1]
    if scales[0] == 1 and len(scales) == 1:
        return chain[-1]

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        made = [v(x, sigma).float() for v in chain]
        return made[0] + sum(s * (c - u) for s, u, c in zip(scales, made, made[1:]))

    return velocity


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Scales of the teacher for text and audio. convention: whose numbers they are, see GUIDANCE_CONVENTIONS."""

    text: float = 2.0
    audio: float = 2.0
    convention: str = "conventional"

    def __post_init__(self):
        one_of("guidance.convention", self.convention, tuple(GUIDANCE_CONVENTIONS))
        if min(self.scales) < 0:
            raise ConfigError(f"guidance: text={self.text}, audio={self.audio}: must not be negative")

    @property
    def scales(self) -> tuple[float, float]:
        """(text, audio) in our convention."""
        return conventional_guidance(self.text, self.convention), conventional_guidance(self.audio, self.convention)

    def velocity(self, model: Transformer, condition: ClipCondition, silence: torch.Tensor, empty: torch.Tensor) -> Velocity:
        """The guided model. Unconditional is silence [L,Ca,1] and the rows [n,text_dim] of an empty prompt, then
        text comes, then speech; portrait and motion are always given."""
        with_text = replace(condition, features=silence.to(condition.features).expand_as(condition.features))
        nothing = replace(with_text, context=[empty] * len(condition.context))
        return guided([c.velocity(model) for c in (nothing, with_text, condition)], self.scales)
