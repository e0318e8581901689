"""The causal S2V transformer (Wan2.2-S2V-14B layout) with official tensor names; model.md.

One set of layers, three ways to attend: `prefill` (sink tokens among themselves), `forward` (a block
over its step's [sink | ring] cache: the streaming path) and `forward_clip` (all blocks of a clip at
once: the training path, equal to the streaming path at the same noise levels).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from liveavatar import ops
from liveavatar.core import ConfigError
from liveavatar.models import layers as L
from liveavatar.models.audio_encoder import AudioTokens, CausalAudioEncoder
from liveavatar.models.cache import ClipHistory, Sink, StepCache
from liveavatar.models.clip import Clip
from liveavatar.models.positions import REFERENCE_POSITION, grid_positions, reference_position, spread

MOTION_LATENTS = 19  # capacity of the frame packer: buckets of 1, 2 and 16
NEAR_LATENTS, FAR_WEIGHT = 3, "frame_packer.proj_4x.weight"  # with no more motion than that, the bucket of 16 holds zeros: its weight does nothing
# Tensors kept in fp32 in a bf16 model (model.md section 17); everything else is cast.
FP32_PARTS = ("time_embedding.", "time_projection.", "casual_audio_encoder.", "head.")
# Official keys that only matter for training or for parts this layout does not have.
_IGNORED = {"zero_init", "window_size", "trainable_token_pos_emb", "model_type", "motion_token_num", "motioner_dim",
            "motioner_num_heads", "motioner_num_layers", "motioner_patch_size", "motioner_use_flag", "audio_inject_mode"}
_REQUIRED_VALUES = {"enable_adain": True, "adain_mode": "attn_norm", "zero_timestep": True, "enable_framepack": True,
                    "framepack_drop_mode": "padd", "add_last_motion": True, "enable_motioner": False,
                    "enable_tsm": False, "qk_norm": True, "cross_attn_norm": True}


@dataclass(frozen=True, kw_only=True)
class S2VConfig:
    """Sizes of the transformer; defaults are Wan2.2-S2V-14B (model.md section 2)."""

    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    num_heads: int = 40
    num_layers: int = 40
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cond_dim: int = 16
    audio_dim: int = 1024
    audio_layers: int = 25
    num_audio_token: int = 4
    audio_inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)

    def __post_init__(self):
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigError(f"dim={self.dim}, num_heads={self.num_heads}: the head size must be an even integer")
        if self.dim % 4:
            raise ConfigError(f"dim={self.dim}: must be a multiple of 4 (audio encoder)")
        if tuple(self.patch_size) != (1, 2, 2):
            raise ConfigError(f"patch_size={tuple(self.patch_size)}: only (1, 2, 2) is known")
        bad = [i for i in self.audio_inject_layers if not 0 <= i < self.num_layers]
        if bad or len(set(self.audio_inject_layers)) != len(self.audio_inject_layers):
            raise ConfigError(f"audio_inject_layers={self.audio_inject_layers}: distinct layers below {self.num_layers}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_dict(cls, mapping: dict) -> "S2VConfig":
        """From a `config.json`, official or ours. Raises ConfigError on unknown keys and unsupported values."""
        known = {f.name for f in fields(cls)}
        chosen = {}
        for key, value in mapping.items():
            if key in known:
                chosen[key] = tuple(value) if isinstance(value, list) else value
            elif key in _REQUIRED_VALUES:
                if value != _REQUIRED_VALUES[key]:
                    raise ConfigError(f"transformer config: {key}={value!r} is not supported, only {_REQUIRED_VALUES[key]!r}")
            elif not key.startswith("_") and key not in _IGNORED:
                near = difflib.get_close_matches(key, known, n=1)
                raise ConfigError(f"transformer config: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return cls(**chosen)

    def to_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class TextCache(NamedTuple):
    """Keys and values of the prompt per layer, each [B, text_len, heads, d]."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class StepModulation(NamedTuple):
    """Everything a timestep decides; a constant of a step."""

    blocks: tuple[L.BlockModulation, ...]
    head: L.HeadModulation


class Places(NamedTuple):
    """Where a block stands: rotations fp32 [2, tokens, d/2], all that changes from block to block beside the data."""

    block: torch.Tensor  # of its own tokens
    reference: torch.Tensor  # of the rolling reference
    turns: tuple[torch.Tensor, ...]  # of each anchor, one token wide


class FramePacker(nn.Module):
    """Motion latents in buckets of 1, 2 and 16 (model.md section 4)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = L.patch_conv(in_dim, dim, (1, 2, 2))
        self.proj_2x = L.patch_conv(in_dim, dim, (2, 4, 4))
        self.proj_4x = L.patch_conv(in_dim, dim, (4, 8, 8))

    def forward(self, motion: torch.Tensor) -> torch.Tensor:
        """motion: [B, 16, 19, h, w], oldest first -> tokens [B, tok + (h/4)(w/4) + 4(h/8)(w/8), D]."""
        return torch.cat([L.embed_patches(self.proj, motion[:, :, 18:19]),
                          L.embed_patches(self.proj_2x, motion[:, :, 16:18]),
                          L.embed_patches(self.proj_4x, motion[:, :, 0:16])], dim=1)


class CausalS2V(nn.Module):
    """Block-causal speech-to-video transformer. See the module docstring for the three ways to run it."""

    def __init__(self, config: S2VConfig):
        super().__init__()
        c = self.config = config
        self.patch_embedding = L.patch_conv(c.in_dim, c.dim, c.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(L.TransformerBlock(c.dim, c.ffn_dim, c.num_heads, c.eps) for _ in range(c.num_layers))
        self.head = L.Head(c.dim, c.out_dim, c.patch_size, c.eps)
        self.cond_encoder = L.patch_conv(c.cond_dim, c.dim, c.patch_size)
        self.trainable_cond_mask = nn.Embedding(3, c.dim)
        self.frame_packer = FramePacker(c.in_dim, c.dim)
        self.casual_audio_encoder = CausalAudioEncoder(c.audio_dim, c.dim, c.audio_layers, c.num_audio_token)
        self.audio_injector = L.AudioInjector(c.dim, c.num_heads, len(c.audio_inject_layers), c.eps)
        self.cache_dtype: torch.dtype | None = None  # of the keys and values of streams; None: the model's
        self._injector_of = {layer: j for j, layer in enumerate(c.audio_inject_layers)}
        self._grids: dict[tuple, torch.Tensor] = {}  # rotations of rows and columns, by size and device: see angles_at

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def cast(self, dtype: torch.dtype) -> "CausalS2V":
        """Cast in place to the compute dtype; FP32_PARTS stay fp32."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(stored_dtype(name, dtype))
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random start for training from scratch; output head and injectors begin as identity."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("modulation"):
                p.copy_(torch.randn(p.shape, generator=generator) / self.config.dim**0.5)
            elif p.dim() > 1 and not name.endswith("casual_audio_encoder.weights"):
                fan_in, fan_out = p[0].numel(), p.shape[0]
                p.copy_(torch.randn(p.shape, generator=generator) * (2.0 / (fan_in + fan_out)) ** 0.5)
            elif name.endswith("bias"):
                p.zero_()
        nn.init.zeros_(self.head.head.weight)
        for attention in self.audio_injector.injector:
            nn.init.zeros_(attention.o.weight)

    # ------------------------------------------------------------ conditions

    def encode_text(self, context: torch.Tensor | Sequence[torch.Tensor]) -> TextCache:
        """Text rows [n, text_dim] (or a batch of such) -> K and V per layer.

        Rows are zero-padded to text_len and all of them are attended, without a mask (model.md 11).
        """
        batch = [context] if isinstance(context, torch.Tensor) and context.dim() == 2 else list(context)
        c, weight = self.config, self.text_embedding[0].weight
        padded = torch.zeros(len(batch), c.text_len, c.text_dim, dtype=weight.dtype, device=weight.device)
        for row, rows in zip(padded, batch):
            if rows.shape[0] > c.text_len or rows.shape[1] != c.text_dim:
                raise ConfigError(f"text rows {list(rows.shape)}: at most {c.text_len} rows of width {c.text_dim}")
            row[: rows.shape[0]] = rows.to(row)
        text = self.text_embedding(padded)
        return TextCache(tuple(block.text_keys_values(text) for block in self.blocks))

    def encode_audio(self, features: torch.Tensor) -> AudioTokens:
        """[layers, Ca, 4F] or [B, layers, Ca, 4F] features of one block -> AudioTokens, fp32, batched."""
        features = features[None] if features.dim() == 3 else features
        return self.casual_audio_encoder(features.to(self.device))

    def modulation(self, t: float | torch.Tensor) -> StepModulation:
        """Modulation of timestep(s) t in 0..1000: a float, or [B, G]. Compute once per step."""
        if not isinstance(t, torch.Tensor):
            t = torch.full((1, 1), t, dtype=torch.float64, device=self.device)
        t = t.to(self.device, torch.float64)
        half = self.config.freq_dim // 2
        f = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=t.device) / half)
        s = torch.cat([(t[..., None] * f).cos(), (t[..., None] * f).sin()], dim=-1).float()
        e = L.fp32_linear(self.time_embedding[2], F.silu(L.fp32_linear(self.time_embedding[0], s)))
        e0 = L.fp32_linear(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))
        return StepModulation(tuple(b.modulate(e0) for b in self.blocks), self.head.modulate(e))

    # ------------------------------------------------------------ tokens and positions

    def noisy_tokens(self, x: torch.Tensor, pose: torch.Tensor | None = None) -> torch.Tensor:
        """Latents and pose [B, 16, F, h, w] -> [B, F*tok, D]."""
        tokens = L.embed_patches(self.patch_embedding, x)
        # Without a pose the pose latents are zeros: only the bias of cond_encoder acts, and it must.
        pose_tokens = self.cond_encoder.bias if pose is None else L.embed_patches(self.cond_encoder, pose)
        return tokens + pose_tokens + self.trainable_cond_mask.weight[0]

    def _sink_tokens(self, reference: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
        missing = MOTION_LATENTS - motion.shape[2]
        if missing < 0:
            raise ConfigError(f"{motion.shape[2]} motion latents: the frame packer holds at most {MOTION_LATENTS}")
        motion = F.pad(motion, (0, 0, 0, 0, missing, 0)) if missing else motion
        mask = self.trainable_cond_mask.weight
        return torch.cat([L.embed_patches(self.patch_embedding, reference) + mask[1], self.frame_packer(motion) + mask[2]], dim=1)

    def sink_angles(self, h: int, w: int, reference: int = REFERENCE_POSITION) -> torch.Tensor:
        """Rotation of all sink tokens for latents of size h x w: fp32 [2, S, d/2]."""
        rows, columns = range(h // 2), range(w // 2)
        positions = [grid_positions([reference], rows, columns), grid_positions([-1], rows, columns)]
        for times, stride in (([-3], 4), ([-19, -14, -9, -4], 8)):
            positions.append(grid_positions(times, spread(h // 2, h // stride), spread(w // 2, w // stride)))
        return L.to_device(L.rope_angles(torch.cat(positions), self.config.head_dim), self.device)

    def angles_at(self, times: Sequence[int], h: int, w: int) -> torch.Tensor:
        """Rotation of whole latents of size h x w at these times (any 64-bit): fp32 [2, T*tok, d/2], nothing waits for the device.

        An axis at a time: rows and columns are those of every block, and a few hundred bytes of time travel to the device.
        """
        time, row, column = L.rope_widths(self.config.head_dim)
        key = (h, w, self.device)
        if key not in self._grids:
            with torch.inference_mode(False):  # it may meet a backward pass later
                rows = L.axis_angles(torch.arange(h // 2), row)[:, :, None].expand(-1, -1, w // 2, -1)
                columns = L.axis_angles(torch.arange(w // 2), column)[:, None].expand(-1, h // 2, -1, -1)
                self._grids[key] = torch.cat([rows, columns], dim=3).flatten(1, 2).to(self.device)
        grid = self._grids[key]
        along = L.to_device(L.axis_angles(torch.tensor(list(times), dtype=torch.int64), time), self.device)
        tokens = (-1, len(times), grid.shape[1], -1)
        return torch.cat([along[:, :, None].expand(tokens), grid[:, None].expand(tokens)], dim=3).flatten(1, 2)

    def block_angles(self, block: int, latents: int, h: int, w: int) -> torch.Tensor:
        """Rotation of the noisy tokens of a block: fp32 [2, latents*tok, d/2]. block: any 64-bit index."""
        return self.angles_at(range(block * latents, (block + 1) * latents), h, w)

    def time_angles(self, latents: int) -> torch.Tensor:
        """Rotation by so many latents in time alone: fp32 [2, 1, d/2]."""
        return L.to_device(L.rope_angles(torch.tensor([[latents, 0, 0]]), self.config.head_dim), self.device)

    def reference_angles(self, position: int, h: int, w: int) -> torch.Tensor:
        """Rotation of the reference tokens at time `position`: fp32 [2, tok, d/2]."""
        return self.angles_at([position], h, w)

    def places(self, block: int, latents: int, h: int, w: int, sink_distance: int, anchor_moves: Sequence[int]) -> Places:
        """Rotations of block number `block`; anchor_moves: of its cache."""
        reference = self.reference_angles(reference_position(block, latents, sink_distance), h, w)
        return Places(self.block_angles(block, latents, h, w), reference, tuple(self.time_angles(latents * moved) for moved in anchor_moves))

    # ------------------------------------------------------------ the three ways to run

    def new_cache(self, h: int, w: int, block_latents: int, ring_blocks: int, anchor_blocks: int = 0,
                  kind: type[StepCache] = StepCache) -> StepCache:
        """An empty StepCache (or of another kind) for latents of size h x w in cache_dtype and on the model's device."""
        tok = (h // 2) * (w // 2)
        sink = 2 * tok + (h // 4) * (w // 4) + 4 * (h // 8) * (w // 8)
        return kind(layers=self.config.num_layers, heads=self.config.num_heads, head_dim=self.config.head_dim,
                    sink_tokens=sink, block_tokens=block_latents * tok, ring_blocks=ring_blocks, anchor_blocks=anchor_blocks,
                    dtype=self.cache_dtype or self.dtype, device=self.device)

    def prefill(self, reference: torch.Tensor, motion: torch.Tensor, text: TextCache) -> Sink:
        """Keys and values of the sink at t = 0 (model.md section 7).

        reference: [16, 1, h, w]; motion: [16, M, h, w], M <= 19, oldest first (zeros are put in front).
        """
        reference, motion = reference.to(self.device)[None], motion.to(self.device)[None]
        k, v = self.prefill_batch(reference, motion, text)
        return Sink(torch.cat(k), torch.cat(v))

    def set_sink(self, cache: StepCache, sink: Sink, h: int, w: int) -> None:
        """Put a prefilled sink into a step's cache."""
        cache.set_sink(sink, self.sink_angles(h, w))

    def forward(self, x: torch.Tensor, modulation: StepModulation, audio: AudioTokens, text: TextCache,
                cache: StepCache | ClipHistory, *, block: int, sink_distance: int, pose: torch.Tensor | None = None,
                remember: bool = True) -> torch.Tensor:
        """Velocity of one block. x, pose: [16, F, h, w] over a StepCache, or [B, 16, F, h, w] over a ClipHistory; fp32, same shape.

        Leaves this block's keys and values in the cache (timestep forcing: those of the noisy input at
        this step's own noise level are what later blocks at this step see) unless `remember` is False.
        Needs cache.set_sink first.
        """
        assert cache.sink is not None, "prefill before the first block"
        if x.dim() == 4:
            pose = None if pose is None else pose[None]
            return self.forward(x[None], modulation, audio, text, cache, block=block, sink_distance=sink_distance, pose=pose,
                                remember=remember)[0]
        latents, h, w = x.shape[-3:]
        places = self.places(block, latents, h, w, sink_distance, cache.anchor_moves(block))
        velocity = self.velocity(x.to(self.device), places, modulation, audio, text, cache, None if pose is None else pose.to(self.device))
        if remember:
            cache.advance(block)
        return velocity

    def velocity(self, x: torch.Tensor, places: Places, modulation: StepModulation, audio: AudioTokens, text: TextCache,
                 cache: StepCache | ClipHistory, pose: torch.Tensor | None = None) -> torch.Tensor:
        """The device's part of `forward`: shapes are constant, nothing is read back, so it can be captured (runtime/graphs.py).

        x, pose: [B, 16, F, h, w] on the model's device. Writes the cache, does not advance it.
        """

        def attend(i, q, k, v):
            if places.turns:
                cache.roll_anchors(i, places.turns)
            return ops.attention(*cache.attended(i, q, k, v, places.block, places.reference))

        attends = [partial(attend, i) for i in range(len(self.blocks))]
        tokens = self.through_layers(self.noisy_tokens(x, pose), modulation, attends, text.layers, audio)
        latents, h, w = x.shape[-3:]
        return self.head(tokens, modulation.head, (latents, h // 2, w // 2))

    def through_layers(self, tokens: torch.Tensor, modulation: StepModulation, attends: Iterable[L.Attend],
                       texts: Iterable[tuple[torch.Tensor, torch.Tensor]], audio: AudioTokens) -> torch.Tensor:
        """tokens [B, T, D] through every layer and what audio injects behind some. attends, texts: a layer's, as it takes them."""
        for i, (layer, m, attend, text) in enumerate(zip(self.blocks, modulation.blocks, attends, texts, strict=True)):
            tokens = layer(tokens, m, attend, text)
            if i in self._injector_of:
                tokens = self.audio_injector(self._injector_of[i], tokens, audio.tokens, audio.pooled)
        return tokens

    def prefill_batch(self, reference: torch.Tensor, motion: torch.Tensor, text: TextCache) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """prefill of a batch, differentiable: reference [B, 16, 1, h, w], motion [B, 16, 19 or fewer, h, w] -> lists over
        layers of k (un-rotated) and v, [B, S, heads, d]."""
        keys, values = zip(*self.prefill_layers(reference, motion, text))
        return list(keys), list(values)

    def prefill_layers(self, reference: torch.Tensor, motion: torch.Tensor, text: TextCache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """prefill_batch layer by layer: each is computed when it is asked for, so that a stream can do so a few at a time."""
        tokens = self._sink_tokens(reference, motion)
        angles = self.sink_angles(*reference.shape[-2:])
        modulation = self.modulation(0.0)
        for i, layer in enumerate(self.blocks):
            tokens, k, v = layer.prefill(tokens, modulation.blocks[i], angles, text.layers[i])
            yield k, v

    def forward_clip(self, x: torch.Tensor, t: torch.Tensor, clip: Clip, *, pose: torch.Tensor | None = None, history_grad: bool = True) -> torch.Tensor:
        """All blocks of clips in one differentiable pass (training.md 2.1, 2.4 "level-parallel").

        x, pose: [B, 16, F, h, w]; t: [B, N] timesteps of the N blocks. history_grad: False stops gradients at the keys and values of
        other blocks. Returns fp32 [B, 16, F, h, w].
        """
        assert not clip.refresh_block, "a clip at once has one sink"
        latents, h, w = x.shape[-3:]
        blocks, text = t.shape[1], self.encode_text(clip.context)
        sink_k, sink_v = self.prefill_batch(clip.reference, clip.motion, text)
        audio, modulation = self._encode_clip_audio(clip.features, blocks), self.modulation(t)
        numbers, size = range(clip.first_block, clip.first_block + blocks), latents // blocks
        if clip.causal:
            attends = self._clip_attends(sink_k, sink_v, numbers, size, h, w, clip.window_blocks, clip.sink_distance, history_grad)
        else:
            attends = self._whole_attends(sink_k, sink_v, numbers, size, h, w, clip.sink_distance)
        tokens = self.through_layers(self.noisy_tokens(x, pose), modulation, attends, text.layers, audio)
        return self.head(tokens, modulation.head, (latents, h // 2, w // 2))

    def _encode_clip_audio(self, features: torch.Tensor, blocks: int) -> AudioTokens:
        batch = features.shape[0]
        per_block = features.unflatten(-1, (blocks, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        tokens, pooled = self.casual_audio_encoder(per_block)
        return AudioTokens(tokens.unflatten(0, (batch, blocks)).flatten(1, 2), pooled.unflatten(0, (batch, blocks)).flatten(1, 2))

    def _clip_attends(self, sink_k, sink_v, numbers: range, size: int, h: int, w: int, window: int, sink_distance: int,
                      history_grad: bool):
        """One attend function per layer: block n over [sink rotated for n | its window]; all blocks in one call."""
        angles = torch.cat([self.block_angles(n, size, h, w) for n in numbers], dim=1)
        positions = [reference_position(n, size, sink_distance) for n in numbers]
        sinks = torch.cat([self.sink_angles(h, w, p) for p in positions], dim=1)
        blocks, n_tokens, sink_tokens = len(numbers), angles.shape[1] // len(numbers), sinks.shape[1] // len(numbers)
        # Windows at the start of a clip reach before it: those keys are masked.
        age = torch.arange(blocks)[:, None] - torch.arange(window - 1, -1, -1)
        ring = (age >= 0).repeat_interleave(n_tokens, dim=1)
        allowed = F.pad(ring, (sink_tokens, 0), value=True)[:, None, None].to(self.device)  # [N, 1, 1, keys]

        def seen(sink, x):
            """[B, N, S, H, d] and [B, N*n, H, d] -> [B*N, S + window*n, H, d]: sink, past (zeros before the start), own."""
            past = F.pad(x if history_grad else x.detach(), (0, 0, 0, 0, (window - 1) * n_tokens, 0))
            past = past.unfold(1, window * n_tokens, n_tokens).movedim(-1, 2)[:, :, :-n_tokens]
            return torch.cat([sink.to(x.dtype), past, x.unflatten(1, (blocks, -1))], dim=2).flatten(0, 1)

        def make(sk, sv):
            def attend(q, k, v):
                batch = len(q)
                q, k = L.rotate(q, angles), L.rotate(k, angles)
                keys = seen(L.rotate(sk.repeat(1, blocks, 1, 1), sinks).unflatten(1, (blocks, -1)), k)
                values = seen(sv[:, None].expand(-1, blocks, -1, -1, -1), v)
                mask = allowed.repeat(batch, 1, 1, 1)
                out = ops.attention(q.unflatten(1, (blocks, -1)).flatten(0, 1), keys, values, mask)
                return out.unflatten(0, (batch, blocks)).flatten(1, 2)

            return attend

        return [make(k, v) for k, v in zip(sink_k, sink_v)]

    def _whole_attends(self, sink_k, sink_v, numbers: range, size: int, h: int, w: int, sink_distance: int):
        """One attend function per layer: every block over [sink rotated for the first | the whole clip]."""
        angles = torch.cat([self.block_angles(n, size, h, w) for n in numbers], dim=1)
        sink_angles = self.sink_angles(h, w, reference_position(numbers[0], size, sink_distance))

        def make(sk, sv):
            def attend(q, k, v):
                keys = torch.cat([L.rotate(sk, sink_angles).to(k.dtype), L.rotate(k, angles)], dim=1)
                return ops.attention(L.rotate(q, angles), keys, torch.cat([sv.to(v.dtype), v], dim=1))

            return attend

        return [make(k, v) for k, v in zip(sink_k, sink_v)]


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """dtype tensor `name` is kept in by a model that computes in `dtype`."""
    return torch.float32 if name.startswith(FP32_PARTS) else dtype
