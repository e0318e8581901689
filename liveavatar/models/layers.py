"""Layers of the causal S2V transformer under their official tensor names (model.md sections 3-7).

All functions take a batch axis. Tokens are ordered latent-major, then row, then column. G is the
number of modulation groups: tokens are split evenly into G runs that share one timestep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from liveavatar import ops

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class BlockModulation(NamedTuple):
    """AdaLN-zero parameters of one layer, each fp32 [B, G, D]; official order of the six rows."""

    shift1: torch.Tensor
    scale1: torch.Tensor
    gate1: torch.Tensor
    shift2: torch.Tensor
    scale2: torch.Tensor
    gate2: torch.Tensor


class HeadModulation(NamedTuple):
    """Shift and scale of the output head, each fp32 [B, G, D]."""

    shift: torch.Tensor
    scale: torch.Tensor


# ---------------------------------------------------------------- rotation


def rope_widths(head_dim: int) -> tuple[int, int, int]:
    """Rotary widths (time, rows, columns) of a head, e.g. 128 -> (44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def axis_angles(positions: torch.Tensor, width: int) -> torch.Tensor:
    """cos and sin of one axis for integer positions without any upper limit.

    positions: int64 [T], negative allowed. Returns fp32 [2, T, width/2] on the same device. Angles in float64: a table would
    end (the reference's ends at 7,200 s) and float32 products lose the fraction beyond 2^24.
    """
    j = torch.arange(width // 2, dtype=torch.float64, device=positions.device)
    angle = positions[:, None].double() * torch.pow(10000.0, -2.0 * j / width)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rope_angles(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """positions: int64 [T, 3] (latent, row, column) -> fp32 [2, T, head_dim/2]: axis_angles of the three, side by side."""
    parts = [axis_angles(positions[:, axis], width) for axis, width in enumerate(rope_widths(head_dim))]
    return torch.cat(parts, dim=2)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device` without waiting for it: from pageable memory torch would."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)


rotate = ops.rotate  # known here under the name of the field


# ---------------------------------------------------------------- patches


def patchify(x: torch.Tensor, kernel: tuple[int, int, int]) -> torch.Tensor:
    """Cut [B, C, T, H, W] into non-overlapping patches: [B, tokens, C*kt*kh*kw].

    A remainder at the far edges is dropped, as a convolution with kernel = stride does. A matmul on
    the result equals that convolution and avoids a bf16 Conv3d fault of oneDNN (model.md section 4).
    """
    kt, kh, kw = kernel
    b, c, t, h, w = x.shape
    nt, nh, nw = t // kt, h // kh, w // kw
    x = x[:, :, : nt * kt, : nh * kh, : nw * kw].reshape(b, c, nt, kt, nh, kh, nw, kw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, nt * nh * nw, c * kt * kh * kw)


def embed_patches(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """Apply a kernel = stride Conv3d as one matmul. x: [B, C, T, H, W] -> [B, tokens, D]."""
    weight = conv.weight.flatten(1)
    return F.linear(patchify(x, conv.kernel_size).to(weight.dtype), weight, conv.bias)


def patch_conv(in_dim: int, dim: int, kernel: tuple[int, int, int]) -> nn.Conv3d:
    """A convolution whose stride is its kernel: only a holder of official weights, see embed_patches."""
    return nn.Conv3d(in_dim, dim, kernel_size=kernel, stride=kernel)


# ---------------------------------------------------------------- norms


def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without parameters, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a weight, in fp32, result in the input's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


# ---------------------------------------------------------------- attention


def takes(linear: nn.Module) -> torch.dtype:
    """What a linear wants its input in: its weights' dtype. An FP8 one is spared a pass where its input is made so (ops.Rounded)."""
    return linear.weight.dtype


class Attention(nn.Module):
    """q, k, v, o linears with RMS norms of q and k over the whole width, before heads are split."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def pack(self, qkv: nn.Module) -> None:
        """From here on one linear makes q, k and v of one input; its rows are those of the three, which are gone (fast.pack)."""
        self.qkv = qkv
        del self.q, self.k, self.v

    @property
    def takes(self) -> torch.dtype:
        """Of `project` and `queries`."""
        return takes(self.qkv if "qkv" in self._modules else self.q)

    def project(self, x: torch.Tensor | ops.Rounded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T, D] -> q, k (normed, not rotated) and v of self-attention, each [B, T, heads, d]."""
        if "qkv" not in self._modules:
            return self.queries(x), *self.keys_values(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.split(self.norm_q(q)), self.split(self.norm_k(k)), self.split(v)

    def queries(self, x: torch.Tensor | ops.Rounded) -> torch.Tensor:
        """[B, T, D] -> [B, T, heads, d], normed, not rotated."""
        return self.split(self.norm_q(self.q(x)))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, D] -> k (normed, not rotated), v, each [B, T, heads, d]."""
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))

    def cross(self, x: torch.Tensor | ops.Rounded, keys: torch.Tensor, values: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """Attention of x [B, T, D] over ready keys and values [B * groups, Tk, heads, d], no rope, no mask: each of so many equal runs of
        tokens has its own."""
        q = self.queries(x).unflatten(1, (groups, -1)).flatten(0, 1)
        attended = ops.attention(q, keys.to(q.dtype), values.to(q.dtype))
        return self.o(attended.unflatten(0, (-1, groups)).flatten(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """One layer (model.md section 7). How keys are kept is the caller's business: `attend`."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = Attention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = Attention(dim, heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.ffn[0].bias.dtype  # an FP8 weight has another

    def modulate(self, e0: torch.Tensor) -> BlockModulation:
        """e0: fp32 [B, G, 6, D] from time_projection -> six rows [B, G, D]."""
        return BlockModulation(*(self.modulation.float()[:, None] + e0).unbind(2))

    def text_keys_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """text: [B, T, D] -> what `forward` takes as text. A method of the block, so that a sharded block gathers its weights for it."""
        return self.cross_attn.keys_values(text)

    def forward(self, x: torch.Tensor, m: BlockModulation, attend: Attend, text: tuple[torch.Tensor, torch.Tensor]):
        """x: [B, T, D]; attend(q, k, v) gets un-rotated heads and returns [B, T, heads, d]; text: k, v.

        Residuals and gates in fp32, matmuls in the weights' dtype, output in that dtype.
        """
        return self.after(x, attend(*self.before(x, m)), m, text)

    def before(self, x: torch.Tensor, m: BlockModulation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `attend` takes."""
        return self.self_attn.project(ops.norm_modulate(x, m.shift1, m.scale1, self.eps, self.self_attn.takes))

    def after(self, x: torch.Tensor, attended: torch.Tensor, m: BlockModulation, text: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Everything behind `attend`."""
        dtype = self.dtype
        x = ops.gate_residual(x, self.self_attn.o(attended.flatten(2)), m.gate1, torch.float32)
        h = ops.layer_norm(x, self.norm3.weight, self.norm3.bias, self.eps, self.cross_attn.takes)
        x = x + self.cross_attn.cross(h, *text)
        wide, _, narrow = self.ffn
        h = wide(ops.norm_modulate(x, m.shift2, m.scale2, self.eps, takes(wide)))
        return ops.gate_residual(x, narrow(ops.gelu(h, takes(narrow))), m.gate2, dtype)

    def prefill(self, x: torch.Tensor, m: BlockModulation, angles: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor]):
        """The sink's way through the layer, its tokens x [B, S, D] among themselves: (x, k un-rotated, v [B, S, heads, d]).

        All that gradients come back to is returned: what left by a side door would not be seen by the hooks of a sharded
        block. For the same reason `forward` is called as it stands here, inside a method that has been announced.
        """
        kept = []

        def attend(q, k, v):
            kept[:] = k, v  # written over, not added to, where a backward pass computes the layer again
            return ops.attention(rotate(q, angles), rotate(k, angles), v)

        return self.forward(x, m, attend, text), *kept


class Head(nn.Module):
    """Output projection; computed in fp32 (model.md section 17)."""

    def __init__(self, dim: int, out_dim: int, patch_size: tuple[int, int, int], eps: float):
        super().__init__()
        self.eps, self.out_dim, self.patch_size = eps, out_dim, patch_size
        self.head = nn.Linear(dim, out_dim * patch_size[0] * patch_size[1] * patch_size[2])
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def modulate(self, e: torch.Tensor) -> HeadModulation:
        """e: fp32 [B, G, D] from time_embedding (not e0)."""
        return HeadModulation(*(self.modulation.float()[:, None] + e[:, :, None]).unbind(2))

    def forward(self, x: torch.Tensor, m: HeadModulation, grid: tuple[int, int, int]) -> torch.Tensor:
        """x: [B, T, D], grid (latents, rows, columns) of tokens -> fp32 [B, out, latents, h, w]."""
        h = ops.norm_modulate(x, m.shift, m.scale, self.eps, torch.float32)
        y = fp32_linear(self.head, h)
        (t, r, c), (pt, pr, pc) = grid, self.patch_size
        y = y.reshape(x.shape[0], t, r, c, pt, pr, pc, self.out_dim)  # channel fastest
        return y.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], self.out_dim, t * pt, r * pr, c * pc)


def fp32_linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear computed in fp32 whatever dtype its weights are stored in, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), linear.weight.float(), linear.bias.float())


class AdaInLinear(nn.Module):
    """Holder of `injector_adain_layers.J.linear`."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)


class AudioInjector(nn.Module):
    """Audio-driven AdaIN and attention after some layers (model.md section 7, "Audio injection")."""

    def __init__(self, dim: int, heads: int, count: int, eps: float):
        super().__init__()
        self.injector = nn.ModuleList(Attention(dim, heads, eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AdaInLinear(dim) for _ in range(count))

    def forward(self, j: int, x: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """x: [B, F*tok, D]; tokens: [B, F, A, D]; pooled: [B, F, D]. Returns x plus the injected residual."""
        attention, adain = self.injector[j], self.injector_adain_layers[j].linear
        dtype = adain.bias.dtype  # an FP8 weight has another
        frames = pooled.shape[1]
        shift, scale = adain(F.silu(pooled).to(dtype)).float().chunk(2, dim=-1)
        z = ops.norm_modulate(x, shift, scale, 1e-5, attention.takes)  # 1e-5 here, 1e-6 everywhere else
        k, v = attention.keys_values(tokens.to(dtype).flatten(0, 1))
        return x + attention.cross(z, k, v, frames)
