"""Causal audio encoder of the S2V transformer (model.md section 8), computed in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.models.layers import fp32_linear, layer_norm

# Copies of the first feature frame put in front. The reference uses 73; two stride-2 convolutions of
# kernel 3 see 9 frames, so 5 copies (same phase: 73 = 5 mod 4) give the same numbers.
LEAD_FRAMES = 5


class AudioTokens(NamedTuple):
    """Audio of one block. tokens: fp32 [B, F, A, D], A learned tokens a latent; pooled: fp32 [B, F, D]."""

    tokens: torch.Tensor
    pooled: torch.Tensor


class CausalConv(nn.Module):
    """Conv1d of kernel 3 that looks back only; the first frame is replicated. [B, C, T] -> [B, C', T/stride]."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, 3, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (2, 0), mode="replicate")
        return F.conv1d(x, self.conv.weight.float(), self.conv.bias.float(), self.conv.stride)


def _norm_act(x: torch.Tensor) -> torch.Tensor:
    return F.silu(layer_norm(x.transpose(1, 2), 1e-6)).transpose(1, 2)


class _Convolutions(nn.Module):
    def __init__(self, audio_dim: int, dim: int, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.conv1_local = CausalConv(audio_dim, dim // 4 * num_tokens)
        self.conv1_global = CausalConv(audio_dim, dim // 4)
        self.conv2 = CausalConv(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def _tail(self, x: torch.Tensor) -> torch.Tensor:
        return _norm_act(self.conv3(_norm_act(self.conv2(_norm_act(x)))))

    def forward(self, x: torch.Tensor) -> AudioTokens:
        groups = self.conv1_local(x).unflatten(1, (self.num_tokens, -1)).flatten(0, 1)  # group-major channels
        local = self._tail(groups).unflatten(0, (-1, self.num_tokens)).permute(0, 3, 1, 2)
        padding = self.padding_tokens.float().expand(*local.shape[:2], 1, -1)
        pooled = fp32_linear(self.final_linear, self._tail(self.conv1_global(x)).transpose(1, 2))
        return AudioTokens(torch.cat([local, padding], dim=2), pooled)


class CausalAudioEncoder(nn.Module):
    """Learned layer mix, then strided causal convolutions: 4 feature frames -> 1 latent."""

    def __init__(self, audio_dim: int, dim: int, layers: int, num_tokens: int):
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, layers, 1, 1), 0.01))
        self.encoder = _Convolutions(audio_dim, dim, num_tokens)

    def forward(self, features: torch.Tensor, lead: int = LEAD_FRAMES) -> AudioTokens:
        """features: [B, layers, Ca, 4F] of one block -> tokens [B, F, A, D], pooled [B, F, D], fp32.

        There is no memory across blocks: `lead` copies of the block's first frame stand in front.
        """
        with torch.autocast(features.device.type, enabled=False):
            w = F.silu(self.weights.float())
            x = (features.float() * w).sum(1) / w.sum()
            x = torch.cat([x[..., :1].expand(-1, -1, lead), x], dim=-1)
            out = self.encoder(x)
        latents = features.shape[-1] // 4
        return AudioTokens(out.tokens[:, -latents:], out.pooled[:, -latents:])
