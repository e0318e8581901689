"""The causal video VAE with its streaming state outside of it (model.md section 12).

The module inside is an unmodified diffusers `AutoencoderKLWan`. Its own `decode` clears its cache on
every call and so cannot stream; its decoder, however, takes the cache as an argument, and that cache
is what a `DecoderState` holds, one per session. Any number of sessions share one module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify

from liveavatar.core import InputError, WeightsError
from liveavatar.models import tensorfiles

SETTLED = 2  # latents after which the cache of a stream keeps its shapes (model.md section 12)


def count_causal_convs(module: torch.nn.Module) -> int:
    """Convolutions of `module` that remember their last two input frames: the length of its cache."""
    return sum(isinstance(part, WanCausalConv3d) for part in module.modules())


class DecoderState:
    """What one session's decoder remembers: one cache entry per causal convolution.

    An entry is None before the first latent, a marker string for temporal upsamplers after it, then a
    tensor [1,c,<=2,h,w]. Owned by the session; `decode` is the only writer.
    """

    def __init__(self, entries: int):
        self.cache: list[torch.Tensor | str | None] = [None] * entries
        self.latents = 0  # latent frames decoded since the start or the last reset

    def reset(self) -> None:
        """Forget everything: the next latent is the first of a stream again (it makes one picture)."""
        self.cache = [None] * len(self.cache)
        self.latents = 0

    def clone(self) -> DecoderState:
        """An independent copy that continues from here."""
        return self._copy(lambda tensor: tensor.clone())

    def to(self, device: torch.device | str) -> DecoderState:
        """A copy whose tensors live on `device`."""
        return self._copy(lambda tensor: tensor.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of all cached tensors."""
        return sum(entry.nbytes for entry in self.cache if isinstance(entry, torch.Tensor))

    def _copy(self, each) -> DecoderState:
        copy = DecoderState(len(self.cache))
        copy.cache = [each(entry) if isinstance(entry, torch.Tensor) else entry for entry in self.cache]
        copy.latents = self.latents
        return copy


class StreamingVAE:
    """Pictures <-> normalised latents; the decoder in pieces of any size.

    Strides, channel count, mean and std are read from the module's config. `module` is the wrapped
    `AutoencoderKLWan`, for whoever trains it.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self.module = vae
        self._compiled: Callable | None = None  # of module.decoder, for streams that run
        self.config = vae.config
        self.z_dim: int = vae.config.z_dim
        self.patch = vae.config.patch_size or 1
        self.spatial_stride = 2 ** (len(vae.config.dim_mult) - 1) * self.patch
        self.temporal_stride = 2 ** sum(vae.config.temperal_downsample)
        self._statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32).view(2, -1, 1, 1, 1)
        assert self._statistics.shape[1] == self.z_dim, "latents_mean and latents_std need z_dim values"

    @classmethod
    def from_module(cls, vae: AutoencoderKLWan) -> StreamingVAE:
        """Wrap a module that the caller built or loaded; it stays the caller's (train or eval mode too)."""
        return cls(vae)

    @classmethod
    def from_folder(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> StreamingVAE:
        """Load a diffusers folder (config.json, diffusion_pytorch_model.safetensors), strictly.

        Raises WeightsError naming the file when config or tensors do not fit.
        """
        return cls(plan_vae_folder(Path(path)).load(stored_as(dtype, device)))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures float [-1,1] [3,T,H,W] -> latents fp32 [z,1+(T-1)/4,h,w] = (mu - mean)/std.

        The first picture makes a latent alone, every further group of 4 another. Raises InputError when
        T is not 1 + 4n or a side is no multiple of the spatial stride.
        """
        self._check_pictures(pictures)
        x = patchify(pictures[None].to(self.device, self.dtype), self.patch)
        cache: list = [None] * count_causal_convs(self.module.encoder)
        groups = x.split([1] + [self.temporal_stride] * (x.shape[2] // self.temporal_stride), dim=2)
        encoded = [self.module.encoder(group, feat_cache=cache, feat_idx=[0]) for group in groups]
        mu = self.module.quant_conv(torch.cat(encoded, dim=2))[0, : self.z_dim].float()
        mean, std = self._mean_std()
        return (mu - mean) / std

    def new_state(self) -> DecoderState:
        """A fresh stream for `decode`."""
        return DecoderState(count_causal_convs(self.module.decoder))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, state: DecoderState) -> torch.Tensor:
        """The next latents of a stream [z,n,h,w] -> pictures fp32 [-1,1] [3,T,H,W]; advances `state`.

        The very first latent of a stream makes 1 picture, every other one 4; however the stream is cut
        into calls, the pictures are the same. `state` is untouched when the module raises.
        """
        assert latents.dim() == 4 and latents.shape[0] == self.z_dim and latents.shape[1] > 0, latents.shape
        z = latents.to(self.device, torch.float32)
        mean, std = self._mean_std()
        z = (z * std + mean).to(self.dtype)
        x = self.module.post_quant_conv(z[None])
        # Entries are replaced, never written into. A batch of one may have any stride, and a compiler would tell them apart.
        cache = [entry[0][None] if isinstance(entry, torch.Tensor) else entry for entry in state.cache]
        # The temporal upsamplers treat the first latent differently, so it must go in by itself.
        pieces = [x] if state.latents else [x[:, :, :1], x[:, :, 1:]]
        settled = self._compiled is not None and state.latents >= SETTLED
        decoder = self._compiled if settled else self.module.decoder
        decoded = []
        for i, piece in enumerate(pieces):
            if piece.shape[2]:
                first = state.latents == 0 and i == 0
                decoded.append(decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=first))
        state.cache, state.latents = cache, state.latents + latents.shape[1]
        pictures = unpatchify(torch.cat(decoded, dim=2), self.patch)
        return pictures[0].float().clamp_(-1.0, 1.0)

    def _mean_std(self) -> torch.Tensor:
        """fp32 [2, z, 1, 1, 1], copied to the device the first time it is asked for there."""
        if self._statistics.device != self.device:
            self._statistics = self._statistics.to(self.device)
        return self._statistics

    def _check_pictures(self, pictures: torch.Tensor) -> None:
        assert pictures.dim() == 4 and pictures.shape[0] == 3, pictures.shape
        frames, height, width = pictures.shape[1:]
        if frames < 1 or (frames - 1) % self.temporal_stride:
            raise InputError(
                f"{frames} pictures cannot be encoded: the causal VAE takes 1 + {self.temporal_stride}n of them"
            )
        if height % self.spatial_stride or width % self.spatial_stride:
            raise InputError(f"pictures of {width}x{height} cannot be encoded: both sides must be multiples of {self.spatial_stride}")


def compile_decoder(vae: StreamingVAE, **options) -> None:
    """torch.compile of the decoder for streams that run. options: of torch.compile.

    A stream's first call is not compiled: its caches are of other kinds until two latents are in, and in the runtime it primes with
    another number of latents than a block has. So one graph is made, and one more per other number of latents in a later call.
    """
    vae._compiled = torch.compile(vae.module.decoder, fullgraph=True, dynamic=False, **options)


def build_module(config: dict, where: str = "VAE config") -> AutoencoderKLWan:
    """An `AutoencoderKLWan` of a diffusers config mapping, on the current default device.

    where: the config's file, for the WeightsError when the class refuses the config.
    """
    try:
        return AutoencoderKLWan.from_config(config)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{where}: no config of an AutoencoderKLWan ({error})") from None


def stored_as(dtype: torch.dtype, device: torch.device | str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """How `LoadPlan.load` keeps a VAE's tensors: convolution weights channels last (on CPUs twice as fast)."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return lambda name, tensor: tensor.to(device, dtype).contiguous(
        memory_format=formats.get(tensor.dim(), torch.contiguous_format)
    )


def plan_vae(config: dict, source: tensorfiles.TensorSource, layout: str, where: str) -> tensorfiles.LoadPlan:
    """How an `AutoencoderKLWan` of this diffusers config is filled. Raises WeightsError."""
    with torch.device("meta"):
        return tensorfiles.LoadPlan(build_module(config, where), source, layout)


def plan_vae_folder(folder: Path) -> tensorfiles.LoadPlan:
    """How the VAE of a diffusers folder is filled. Raises WeightsError."""
    config = tensorfiles.read_json(folder / "config.json")
    source = tensorfiles.open_file(tensorfiles.find_weights(folder, "diffusion_pytorch_model"))
    return plan_vae(config, source, "a diffusers AutoencoderKLWan folder", str(folder / "config.json"))


def plan_official_vae(path: Path) -> tensorfiles.LoadPlan:
    """How the VAE of the official Wan2.1_VAE.pth is filled; its names become diffusers' names. Raises WeightsError.

    The file has no config: Wan2.1's layout at whatever base width the first convolution has.
    """
    source = tensorfiles.open_file(path)
    first = source.entries.get("encoder.conv1.weight")
    if first is None:
        raise WeightsError(f"{path}: not Wan2.1_VAE.pth (no encoder.conv1.weight among its {len(source.entries)} tensors); fetch it again")
    return plan_named_by_wan({"base_dim": first.shape[0]}, source, "the official Wan2.1 VAE (names as in diffusers)", str(path))


def plan_named_by_wan(config: dict, source: tensorfiles.TensorSource, layout: str, where: str) -> tensorfiles.LoadPlan:
    """`plan_vae` for tensors under Wan's own names, whatever the config's sizes; diffusers' names pass unchanged. Raises WeightsError."""
    plan = plan_vae(config, source, layout, where)
    ours = {wan_name(name, plan.module.config): name for name in plan.module.state_dict()}
    return replace(plan, source=source.renamed(lambda name: ours.get(name, name)))


_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2", "quant_conv": "conv1", "post_quant_conv": "conv2"}
_INNER = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv_shortcut": "shortcut"}


def wan_name(name: str, config: Mapping) -> str:
    """What Wan's own files (2.1; 2.2 where config is_residual) call the tensor that AutoencoderKLWan calls `name`.

    diffusers' converter knows one layout only: four levels of two residual blocks, narrowing where 1, 2, 4, 4 does.
    """
    side, *path = name.split(".")
    blocks = config["num_res_blocks"]
    match path:
        case [kind] if side in _ENDS:
            return f"{_ENDS[side]}.{kind}"
        case ["conv_in" | "norm_out" | "conv_out" as end, *tail]:
            place = _ENDS[end]
        case ["mid_block", kind, index, *tail]:
            place = f"middle.{1 if kind == 'attentions' else 2 * int(index)}"
        case ["down_blocks", level, "resnets", index, *tail]:
            place = f"downsamples.{level}.downsamples.{index}"
        case ["down_blocks", level, "downsampler", *tail]:
            place = f"downsamples.{level}.downsamples.{blocks}"
        case ["down_blocks", index, *tail]:
            place = f"downsamples.{index}"
        case ["up_blocks", level, "resnets", index, *tail]:
            place = _up_place(int(level), int(index), blocks, config["is_residual"])
        case ["up_blocks", level, "upsampler", *tail] | ["up_blocks", level, "upsamplers", _, *tail]:
            place = _up_place(int(level), blocks + 1, blocks, config["is_residual"])
    return ".".join([side, place, _INNER.get(tail[0], tail[0]), *tail[1:]])


def _up_place(level: int, index: int, blocks: int, nested: bool) -> str:
    """Part `index` of a decoder level: its blocks + 1 residual blocks, then its upsampler; 2.1 counts through all levels."""
    return f"upsamples.{level}.upsamples.{index}" if nested else f"upsamples.{level * (blocks + 2) + index}"
