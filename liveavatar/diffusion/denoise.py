"""One denoising step and the noise it starts from."""

from __future__ import annotations

import hashlib

import torch


def euler(x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """x + (sigma_next - sigma) * velocity, summed in fp32, in x's dtype (model.md section 13)."""
    return (x.float() + (sigma_next - sigma) * velocity.float()).to(x.dtype)


def draw_seed(*key: object) -> int:
    """A 63-bit seed that is a pure function of `key` on every machine."""
    digest = hashlib.blake2b("/".join(str(k) for k in key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def noise(seed: int, session: str, block: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal fp32 noise on the CPU, a function of (seed, session, block) and nothing else."""
    generator = torch.Generator().manual_seed(draw_seed("noise", seed, session, block))
    return torch.randn(shape, generator=generator)


def sink_distance(policy: int | str, seed: int, block: int) -> int:
    """rel of the rolling reference: the constant, or for "random" 4..30 as a function of (seed, block)."""
    if policy != "random":
        return int(policy)
    return 4 + draw_seed("sink", seed, block) % 27
