"""Many blocks in sequence: the cached (streaming) rollout with one bank per level (training.md 2.4).

`denoise_block` is the step function: the runtime's Denoiser and this rollout both call it, so what is
trained and evaluated is what is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from liveavatar.diffusion.denoise import euler
from liveavatar.diffusion.schedule import timesteps_of
from liveavatar.models.audio_encoder import AudioTokens
from liveavatar.models.cache import StepCache
from liveavatar.models.s2v import CausalS2V, StepModulation, TextCache


@dataclass(frozen=True)
class Step:
    """One denoising step: its level, where it goes and its constant modulation."""

    sigma: float
    sigma_next: float
    modulation: StepModulation


def make_steps(model: CausalS2V, sigmas: Sequence[float]) -> list[Step]:
    """The steps of a table of levels that ends in 0."""
    times = timesteps_of(list(sigmas))
    return [Step(s, n, model.modulation(t)) for s, n, t in zip(sigmas, sigmas[1:], times)]


def denoise_block(model: CausalS2V, step: Step, x: torch.Tensor, audio: AudioTokens, text: TextCache, cache: StepCache, *,
                  block: int, sink_distance: int, pose: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One Euler step of one block. x: [16, F, h, w] in the hop dtype. Returns (x at sigma_next, fp32 velocity)."""
    v = model(x, step.modulation, audio, text, cache, block=block, sink_distance=sink_distance, pose=pose)
    return euler(x, v, step.sigma, step.sigma_next), v


@torch.no_grad()
def cached_rollout(model: CausalS2V, sigmas: Sequence[float], noises: Sequence[torch.Tensor], features: Sequence[torch.Tensor],
                   context: torch.Tensor, reference: torch.Tensor, motion: torch.Tensor, *, ring_blocks: int = 4,
                   sink_distance: int = 30, refresh_block: int = 0) -> Iterator[torch.Tensor]:
    """Clean latents [16, F, h, w] of block after block, per-level banks; noises: [16, F, h, w], features: [L, Ca, 4F]."""
    steps = make_steps(model, sigmas)
    h, w = reference.shape[-2:]
    text = model.encode_text(context)
    caches = [model.new_cache(h, w, noises[0].shape[1], ring_blocks) for _ in steps]
    first = None
    for block, (x, feature) in enumerate(zip(noises, features)):
        if block == 0 or (refresh_block and block == refresh_block):
            sink = model.prefill(reference if first is None else first, motion, text)
            for cache in caches:
                model.set_sink(cache, sink, h, w)
        audio = model.encode_audio(feature)
        for step, cache in zip(steps, caches):
            x, _ = denoise_block(model, step, x, audio, text, cache, block=block, sink_distance=sink_distance)
        first = x[:, :1] if first is None else first
        yield x
