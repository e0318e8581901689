"""Muon for matrices, AdamW for the rest: one torch optimiser, so that its state is stored and resumed as one.

Muon (K. Jordan 2024) replaces a matrix' momentum by the nearest semi-orthogonal matrix; scaled to the
root mean square of an AdamW step (Moonlight, arXiv 2502.16982), so one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Quintic iteration that drives singular values towards 1 (Jordan's coefficients): steep at 0, loose at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MATCH_RMS = 0.2  # of an AdamW step


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the matrix [m, n], in bf16 precision."""
    a, b, c = QUINTIC
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that lies here, as a view; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Optimiser(torch.optim.Optimizer):
    """Groups with "muon": True hold weights of two or more axes, taken as [out, rest]; the others get AdamW.

    Sharded parameters are updated shard by shard, which AdamW does not notice and Muon, which needs whole
    matrices, cannot do (strategy.py refuses it). Their state is sharded alike.
    """

    def __init__(self, groups: list[dict], lr: float, beta1: float = 0.95, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        super().__init__(groups, {"lr": lr, "beta1": beta1, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False, "factor": 1.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    here = local(p)
                    here.mul_(1 - group["lr"] * group["weight_decay"])
                    here.sub_(group["lr"] * update(p, self.state[p], group))

    def _muon(self, p: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 1 - group["beta1"])
        ahead = p.grad.lerp(momentum, group["beta1"])
        flat = ahead.flatten(1)
        return (orthogonal(flat) * MATCH_RMS * max(flat.shape) ** 0.5).view_as(p)

    def _adam(self, p: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        if not state:
            state.update(step=torch.zeros(()), first=torch.zeros_like(p), second=torch.zeros_like(p))
        state["step"] += 1
        (one, two), n = group["betas"], float(state["step"])
        first, second, gradient = local(state["first"]), local(state["second"]), local(p.grad)
        first.lerp_(gradient, 1 - one)
        second.lerp_(gradient.square(), 1 - two)
        return first / (1 - one**n) / ((second / (1 - two**n)).sqrt() + group["eps"])


def is_matrix(p: torch.Tensor) -> bool:
    """More than one row and more than one column, all axes but the first taken together."""
    return p.dim() >= 2 and min(p.shape[0], p.shape[1:].numel()) > 1


PRETRAINED = ("audio_injector.", "encoder.")  # of a transformer, and of a speech encoder on a recogniser


def groups_of(named: Mapping[str, nn.Parameter], weight_decay: float, muon: bool, audio_factor: float = 1.0) -> list[dict]:
    """Parameters in groups: matrices (to Muon when asked for, with decay), then everything of one axis or one row. Where
    the PRETRAINED learn at another rate, theirs follow. "factor": of the learning rate."""
    audio = {name for name in named if name.startswith(PRETRAINED) and audio_factor != 1}
    groups = []
    for names, factor in ((named.keys() - audio, 1.0), (audio, audio_factor)):
        own = [p for name, p in named.items() if name in names]
        groups += [{"params": [p for p in own if is_matrix(p)], "weight_decay": weight_decay, "muon": muon, "factor": factor},
                   {"params": [p for p in own if not is_matrix(p)], "factor": factor}]
    return [group for group in groups if group["params"]]
