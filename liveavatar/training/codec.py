"""Stage `vae`: the causal video codec, an unmodified diffusers AutoencoderKLWan trained on our heads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify

from liveavatar.conditioning.behaviour import closure_of
from liveavatar.core import ConfigError
from liveavatar.models.vae import StreamingVAE, count_causal_convs
from liveavatar.training import losses, shards
from liveavatar.training.loop import Draws, LoopConfig, Trainer, load_average

SHUT = 0.5  # closure of a lid from which an eye is called shut


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """loop: length and speed; decoder: the same of a second part that trains the decoder alone. crop: side of the square pieces, pixels; pictures: 1 + 4n of a piece."""

    loop: LoopConfig
    decoder: LoopConfig | None = None
    base_dim: int = 16
    decoder_base_dim: int = 24
    dim_mult: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 1
    residual: bool = False  # parameter-free shortcuts round every down- and up-sampling: learns 2-3x faster
    patch: int = 2
    z_dim: int = 16
    crop: int = 64
    pictures: int = 9
    pieces_per_clip: int = 2
    still_iterations: int = 0  # begin with so many iterations on single pictures, still_factor times the batch
    still_factor: int = 3
    kl: float = 1e-4
    noise: float = 0.1  # fixed spread around the mean; learning it from 1 downwards took most of the training
    gradient: float = 0.5
    motion: float = 0.0  # weight of how much patches change from picture to picture: latents are four pictures, and without it they are seen to begin
    detail: float = 4.0  # extra weight of mouth and eyes
    blinks: float = 0.0  # of the pieces that can show shut eyes: they are a picture in 25, and a codec that sees them so rarely smears them
    statistics_clips: int = 64

    def __post_init__(self):
        if self.pictures % 4 != 1 or self.pictures < 5:
            raise ConfigError(f"vae.pictures={self.pictures}: must be 1 + 4n, at least 5")
        if not 0 <= self.blinks <= 1:
            raise ConfigError(f"vae.blinks={self.blinks}: must be in 0..1")
        if self.motion < 0:
            raise ConfigError(f"vae.motion={self.motion}: must not be negative")
        if self.crop % self.spatial_stride:
            raise ConfigError(f"vae.crop={self.crop}: must be a multiple of the codec's spatial stride")
        for name, loop in (("loop", self.loop), ("decoder", self.decoder)):
            if loop is not None and loop.batch % self.pieces_per_clip:
                raise ConfigError(f"vae.{name}.batch={loop.batch}: must be a multiple of pieces_per_clip")

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.dim_mult) - 1) * self.patch


def module_config(config: CodecConfig) -> dict:
    """The diffusers config of the codec; statistics of the latents are filled in after training."""
    levels = len(config.dim_mult) - 1
    channels = 3 * config.patch**2
    return {"base_dim": config.base_dim, "decoder_base_dim": config.decoder_base_dim, "z_dim": config.z_dim,
            "dim_mult": list(config.dim_mult), "num_res_blocks": config.res_blocks, "attn_scales": [],
            "temperal_downsample": [i >= levels - 2 for i in range(levels)], "in_channels": channels,
            "out_channels": channels, "patch_size": config.patch, "scale_factor_temporal": 4,
            "scale_factor_spatial": 2**levels * config.patch, "is_residual": config.residual,
            "latents_mean": [0.0] * config.z_dim, "latents_std": [1.0] * config.z_dim}


def new_module(config: CodecConfig, seed: int) -> AutoencoderKLWan:
    """A fresh codec, channels last (twice as fast on CPUs)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = AutoencoderKLWan(**module_config(config))
    inflate(module)
    # A fresh codec would send means near 0 under noise of 1, and learn to ignore them: start sure.
    with torch.no_grad():
        module.quant_conv.weight[config.z_dim :] *= 0.1
        module.quant_conv.bias[config.z_dim :] = -5.0
    return channels_last(module)


@torch.no_grad()
def inflate(module: AutoencoderKLWan) -> None:
    """Start as a codec of stills: only the newest temporal tap of every convolution acts, and the
    temporal samplers pass the newest frame on. Motion is learned on top of what stills have taught."""
    for name, part in module.named_modules():
        if isinstance(part, WanCausalConv3d) and part.weight.shape[2] == 3:
            part.weight[:, :, :-1] = 0
            if name.endswith("time_conv"):
                width = part.weight.shape[1]
                copies = part.weight.shape[0] // width  # an upsampler makes two frames of one
                part.weight[:, :, -1, 0, 0] = torch.eye(width).repeat(copies, 1)
                part.bias.zero_()


def channels_last(module: torch.nn.Module) -> torch.nn.Module:
    """Convolution weights in channels-last order, in place; values do not change."""
    for p in module.parameters():
        if p.dim() in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last if p.dim() == 4 else torch.channels_last_3d)
    return module


def encode(module: AutoencoderKLWan, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable batch encode: [B,3,1+4n,H,W] -> mean and log-variance [B,z,1+n,h,w].

    The first picture goes alone, all others together: the causal cache makes that equal to groups of 4.
    """
    x = patchify(pictures, module.config.patch_size).contiguous(memory_format=torch.channels_last_3d)
    cache: list = [None] * count_causal_convs(module.encoder)
    pieces = [p for p in (x[:, :, :1], x[:, :, 1:]) if p.shape[2]]
    out = torch.cat([module.encoder(p, feat_cache=cache, feat_idx=[0]) for p in pieces], dim=2)
    mean, log_variance = module.quant_conv(out).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(module: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Differentiable batch decode of raw (not normalised) latents [B,z,n,h,w] -> [B,3,1+4(n-1),H,W], not clamped."""
    z = module.post_quant_conv(latents)
    cache: list = [None] * count_causal_convs(module.decoder)
    pieces = [p for p in (z[:, :, :1], z[:, :, 1:]) if p.shape[2]]
    out = [module.decoder(p, feat_cache=cache, feat_idx=[0], first_chunk=i == 0) for i, p in enumerate(pieces)]
    return unpatchify(torch.cat(out, dim=2), module.config.patch_size)


# ---------------------------------------------------------------- pieces


def to_float(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T,H,W,3] -> float32 [-1,1] [3,T,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_bytes(pictures: torch.Tensor) -> np.ndarray:
    """float [-1,1] [3,T,H,W] -> uint8 [T,H,W,3]."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def corner(rng: np.random.Generator, side: int, crop: int, box: np.ndarray, near: float = 0.5) -> tuple[int, int]:
    """Top-left of a crop: so often around `box` (with play), else anywhere. Even numbers."""
    if rng.random() < near:
        centre = np.array([box[0] + box[2], box[1] + box[3]]) / 2 + rng.uniform(-crop / 5, crop / 5, 2)
        x, y = np.clip(centre - crop / 2, 0, side - crop)
    else:
        x, y = rng.integers(0, side - crop + 1, 2)
    return int(x) // 2 * 2, int(y) // 2 * 2


def cut_piece(clip: shards.Clip, config: CodecConfig, pictures: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A random piece [3,T,c,c] and its weights [1,T,c,c]; mirrored half of the time; 1 in 12 a still; `blinks` of them of an eye about a blink."""
    count, crop = len(clip.frames), config.crop
    shut = np.flatnonzero(closure_of(clip.lid) > SHUT) if rng.random() < config.blinks else ()
    start = int(rng.integers(0, count - pictures + 1))
    if len(shut):
        start = int(np.clip(rng.choice(shut) - rng.integers(pictures), 0, count - pictures))
    index = np.arange(start, start + pictures)
    if rng.random() < 1 / 12:  # the sink and the priming encode a picture that stands still
        index = np.full(pictures, start)
    mouth = not len(shut) and rng.random() < 0.6
    x, y = corner(rng, clip.frames.shape[1], crop, clip.mouth[start] if mouth else clip.eyes[start, 0], 1.0 if len(shut) else 0.5)
    frames = clip.frames[index][:, y : y + crop, x : x + crop]
    weight = losses.detail_weight(clip.mouth[index], clip.eyes[index], clip.frames.shape[1], config.detail)
    weight = torch.from_numpy(weight[:, y : y + crop, x : x + crop])[None]
    piece = to_float(frames)
    if rng.random() < 0.5:
        piece, weight = piece.flip(-1), weight.flip(-1)
    return piece, weight


class PieceReader:
    """Batches of `size` pieces; the list of finished clips is read again every 50 iterations."""

    def __init__(self, folder: str | Path, config: CodecConfig, size: int, still_iterations: int = 0):
        self.folder, self.config, self.size, self.still_iterations = folder, config, size, still_iterations
        self.paths: list[Path] = []

    def batch(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Pieces [B,3,T,c,c] and weights [B,1,T,c,c]."""
        if not self.paths or draws.iteration % 50 == 0:
            self.paths = shards.clip_paths(self.folder, "train")
            if not self.paths:
                raise ConfigError(f"{self.folder}: no clips yet; run the data stage first")
        still = draws.iteration < self.still_iterations
        pictures = 1 if still else self.config.pictures
        count = self.size // self.config.pieces_per_clip * (self.config.still_factor if still else 1)
        pieces = []
        for _ in range(count):
            clip = shards.read_clip(self.paths[int(draws.numpy.integers(len(self.paths)))])
            pieces += [cut_piece(clip, self.config, pictures, draws.numpy) for _ in range(self.config.pieces_per_clip)]
        video, weight = (torch.stack(list(column)) for column in zip(*pieces))
        return video, weight


# ---------------------------------------------------------------- the stage


def codec_loss(module: AutoencoderKLWan, config: CodecConfig, video: torch.Tensor, weight: torch.Tensor, draws: Draws,
               learn_latents: bool = True):
    """Weighted L1 + gradient L1 + motion + KL of latents with a fixed spread, and metrics. learn_latents: into the encoder too."""
    with torch.set_grad_enabled(learn_latents):
        mean, _ = encode(module, video)
    made = decode(module, mean + config.noise * torch.randn(mean.shape, generator=draws.torch).to(mean.device)).float()
    error = (made - video).abs()
    rec = (error * weight).mean()
    edges = losses.gradient_error(made, video, weight)
    kl = 0.5 * mean.square().mean()  # up to a constant, as the spread is fixed
    mse = F.mse_loss(made.detach().clamp(-1, 1), video)
    metrics = {"psnr": float(-10 * torch.log10(mse / 4)), "kl": float(kl.detach()), "l1": float(error.detach().mean())}
    loss = rec + config.gradient * edges + config.kl * kl
    if config.motion and made.shape[2] > 1:
        motion = losses.motion_error(made, video)
        loss, metrics["motion"] = loss + config.motion * motion, float(motion.detach())
    return loss, metrics


def train_codec(config: CodecConfig, data_folder: str, run: str | Path, seed: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) the codec; returns the losses of this call."""
    module = new_module(config, seed)
    reader = PieceReader(data_folder, config, config.loop.batch, config.still_iterations)
    trainer = Trainer("vae", module, config.loop, run, seed)
    channels_last(module)

    def loss_of(draws: Draws):
        return codec_loss(module, config, *(part.to(trainer.device) for part in reader.batch(draws)), draws)

    return trainer.run(loss_of, stop_after)


def decoder_parts(module: AutoencoderKLWan) -> torch.nn.ModuleDict:
    """What reads latents, by the names it has in the whole codec."""
    return torch.nn.ModuleDict({"post_quant_conv": module.post_quant_conv, "decoder": module.decoder})


def train_decoder(config: CodecConfig, data_folder: str, run: str | Path, seed: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) the decoder against the finished encoder: latents, and all that learns from them, stay as they are."""
    module = new_module(config, seed)
    load_average(module, Path(run) / "vae.pt")
    reader = PieceReader(data_folder, config, config.decoder.batch)
    trainer = Trainer("decoder", decoder_parts(module), config.decoder, run, seed)
    module.to(trainer.device)  # the encoder too

    def loss_of(draws: Draws):
        return codec_loss(module, config, *(part.to(trainer.device) for part in reader.batch(draws)), draws, learn_latents=False)

    return trainer.run(loss_of, stop_after)


@torch.no_grad()
def measure_statistics(module: AutoencoderKLWan, paths: list[Path]) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the latents of whole clips."""
    total, square, count = 0.0, 0.0, 0
    for path in paths:
        clip = shards.read_clip(path)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            mean, _ = encode(module, to_float(clip.frames)[None])
        flat = mean[0].double().flatten(1)
        total, square, count = total + flat.sum(1), square + flat.square().sum(1), count + flat.shape[1]
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-8).sqrt()
    return mean.tolist(), std.tolist()


def finish_codec(config: CodecConfig, data_folder: str, run: str | Path, seed: int, measured: bool = True) -> StreamingVAE:
    """EMA weights with latent statistics, saved as a diffusers folder RUN/vae; the decoder is the one trained alone where there is one.
    measured: False leaves the statistics as RUN/vae has them, for latents that others have learned from already."""
    module = new_module(config, seed)
    iterations = {"vae": load_average(module, Path(run) / "vae.pt")}
    paths = shards.clip_paths(data_folder, "train")
    if (Path(run) / "decoder.pt").exists():
        iterations["decoder"] = load_average(decoder_parts(module), Path(run) / "decoder.pt")
    module.eval().requires_grad_(False)
    if measured:
        mean, std = measure_statistics(module, paths[:: max(1, len(paths) // config.statistics_clips)])
    else:
        known = AutoencoderKLWan.load_config(Path(run) / "vae")
        mean, std = known["latents_mean"], known["latents_std"]
    module.register_to_config(latents_mean=mean, latents_std=std)
    module.save_pretrained(Path(run) / "vae")
    (Path(run) / "vae" / "training.json").write_text(json.dumps({"iterations": iterations, "clips": len(paths)}))
    return StreamingVAE.from_module(module)
