"""LPIPS and tLPIPS (Zhang et al., CVPR 2018): AlexNet with the user's weights and the published heads, version 0.1."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in -1..1, before the network
TAPS = (64, 192, 384, 256, 256)  # channels after each convolution


class LPIPS(nn.Module):
    """Distance of two pictures in the feature space of AlexNet. `features` has the tensor names of the usual AlexNet file."""

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict({
            "0": nn.Conv2d(3, 64, 11, 4, 2), "3": nn.Conv2d(64, 192, 5, padding=2), "6": nn.Conv2d(192, 384, 3, padding=1),
            "8": nn.Conv2d(384, 256, 3, padding=1), "10": nn.Conv2d(256, 256, 3, padding=1),
        })  # fmt: skip
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in TAPS])

    def taps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [n, 3, H, W] in -1..1 -> activations of unit length over channels."""
        x, found = (x - x.new_tensor(SHIFT)[:, None, None]) / x.new_tensor(SCALE)[:, None, None], []
        for place, convolution in enumerate(self.features.values()):
            x = F.relu(convolution(F.max_pool2d(x, 3, 2) if place in (1, 2) else x))
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a, b [n, 3, H, W] in -1..1 -> [n]"""
        total = a.new_zeros(len(a))
        for head, one, two in zip(self.heads, self.taps(a), self.taps(b), strict=True):
            total += ((one - two) ** 2 * head[:, None, None]).sum(1).mean((1, 2))
        return total


@torch.inference_mode()
def lpips(net: LPIPS, a: np.ndarray, b: np.ndarray, batch: int = 8) -> np.ndarray:
    """Distances [n] of pictures a and b, uint8 [n, H, W, 3]."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8, (a.shape, b.shape)
    parts = [slice(k, k + batch) for k in range(0, len(a), batch)]
    return np.concatenate([net(*(_floats(x[part]) for x in (a, b))).numpy() for part in parts]) if len(a) else np.zeros(0)


def tlpips(net: LPIPS, pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How differently two videos of equal length change from picture to picture: |LPIPS(x_t, x_t-1) - LPIPS(y_t, y_t-1)|, [T - 1]."""
    return np.abs(lpips(net, pictures[1:], pictures[:-1]) - lpips(net, reference[1:], reference[:-1]))


def _floats(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
