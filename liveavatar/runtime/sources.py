"""What a run is made of: a checkpoint folder or a parity fixture, seen through one interface.

Opening a source reads names and JSON only. The head asks it for sizes; each rank asks it for the weights its
roles need, and for nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from liveavatar import ops
from liveavatar.conditioning.audio_features import WAV2VEC_LOOKAHEAD, AudioFrontEnd, build_front_end
from liveavatar.conditioning.behaviour import LIDS, LIDS_AND_HEAD
from liveavatar.conditioning.framing import Framing
from liveavatar.conditioning.identity import output_size
from liveavatar.config import Config, build
from liveavatar.core import ConfigError, Geometry, InputError, WeightsError
from liveavatar.diffusion.schedule import sigmas, timesteps_of
from liveavatar.models import tensorfiles, weights
from liveavatar.models.fast import prepare
from liveavatar.models.folders import open_folder
from liveavatar.models.s2v import CausalS2V, S2VConfig

FIXTURE_SUFFIXES = (".json", ".safetensors")
SHIFT = 3.0  # of the sampler; a checkpoint's own levels were made with it
REFRESH_BLOCK, SINK_DISTANCE = 4, 30  # where neither config nor checkpoint says otherwise (model.md 14 and 5)
AREA_CAP = 720 * 400  # pixels; the reference's usual size
KEPT_ENCODER_BYTES = 1 << 30  # a larger text encoder is freed after each new prompt
SAMPLER_KEYS = {"sigmas", "sink_distance", "refresh_block"}


class StageSource(Protocol):
    """What build_stage and the head need to know.

    chain: role names. sigmas: levels, ending in 0; timesteps: one per step. sink_policy: a distance or
    "random". refresh_block: 0 is never; swap_block: the first to see the new sink, later where it is prefilled in slices.
    lookahead_samples: of the audio front end. vae_config: diffusers mapping, None without a VAE. observe: every step reports its
    latents (parity). lids: the transformer is told when to blink. head_motion: degrees that it is told to let its head
    drift by, None: it is not. framing: how portraits are cut, None: not at all.
    """

    model_config: S2VConfig
    geometry: Geometry
    chain: tuple[str, ...]
    sigmas: list[float]
    timesteps: list[float]
    sink_policy: int | str
    refresh_block: int
    swap_block: int
    lookahead_samples: int
    vae_config: Mapping | None
    text_encoder_bytes: int
    observe: bool
    lids: bool
    head_motion: tuple[float, float, float] | None
    framing: Framing | None

    @property
    def has_vae(self) -> bool: ...

    def dtype(self, device: torch.device) -> torch.dtype: ...

    def transformer(self, dtype: torch.dtype, device: torch.device) -> CausalS2V: ...

    def vae(self, dtype: torch.dtype, device: torch.device): ...

    def front_end(self, device: torch.device) -> AudioFrontEnd | None: ...

    def prompt_encoder(self, dtype: torch.dtype, device: torch.device) -> Callable[[str], torch.Tensor] | None: ...


def open_source(config: Config) -> StageSource:
    """What config.model.path names: a fixture (by its suffix) or a checkpoint folder. Raises WeightsError, ConfigError."""
    if Path(config.model.path).suffix in FIXTURE_SUFFIXES:
        return FixtureSource(config.model.path)
    return FolderSource(config)


# ---------------------------------------------------------------- checkpoint folder


class FolderSource:
    """A checkpoint folder of any layout with what the config says about size and sampler on top."""

    observe = False

    def __init__(self, config: Config):
        self.config, self.folder = config, open_folder(config.model.path)
        self.model_config = weights.transformer_config(self.folder)
        self.vae_config = _vae_config(self.folder.need("vae"))
        self.geometry = _geometry(config, self.folder.geometry, spatial_stride(self.vae_config), str(self.folder.path))
        sampler = self._sampler()
        self.chain, self.sigmas = config.chain, _levels(config, sampler.get("sigmas"))
        self.timesteps = timesteps_of(self.sigmas)
        said = config.sampler.sink_distance
        self.sink_policy = sampler.get("sink_distance", SINK_DISTANCE) if said == "checkpoint" else said
        said = config.sampler.refresh_block
        self.refresh_block = sampler.get("refresh_block", REFRESH_BLOCK) if said is None else said
        self.swap_block = self.refresh_block and self.refresh_block + config.sampler.refresh_slices - 1
        self.lookahead_samples = self._lookahead()
        self.text_encoder_bytes = self._text_encoder_bytes()
        lids, head = self._controls()
        self.lids, self.head_motion = lids and config.sampler.blinks, config.sampler.head_motion if head else None
        self.framing = self._framing() if config.video.face_crop == "auto" else None

    has_vae = True

    def _sampler(self) -> dict:
        unknown = self.folder.sampler.keys() - SAMPLER_KEYS
        if unknown:
            raise WeightsError(f"{self.folder.path}: sampler section with unknown key(s) {', '.join(sorted(unknown))}; "
                               f"known: {', '.join(sorted(SAMPLER_KEYS))}")
        return self.folder.sampler

    def _controls(self) -> tuple[bool, bool]:
        """Whether the transformer is told of lids, and of the head."""
        control = self.folder.control
        if control not in ({}, LIDS, LIDS_AND_HEAD):
            raise WeightsError(f"{self.folder.path}: control section {control}: this version knows {LIDS}, {LIDS_AND_HEAD}, or none")
        return bool(control), control == LIDS_AND_HEAD

    def _framing(self) -> Framing | None:
        if not self.folder.framing:
            return None
        try:
            return build(Framing, self.folder.framing, str(self.folder.path), "framing")
        except ConfigError as error:
            raise WeightsError(str(error)) from None

    def _lookahead(self) -> int:
        if self.folder.audio.get("kind") != "wav2vec2":
            return self.front_end(torch.device("cpu")).lookahead_samples
        return self.folder.audio.get("lookahead_samples", WAV2VEC_LOOKAHEAD)  # the head shall not load the encoder to ask it

    def _text_encoder_bytes(self) -> int:
        path = self.folder.need("text_encoder")
        return tensorfiles.open_file(tensorfiles.find_weights(path) if path.is_dir() else path).nbytes

    def dtype(self, device: torch.device) -> torch.dtype:
        """config.model.dtype on `device`; auto: bfloat16 on a GPU or a CPU that is fast at it."""
        said = self.config.model.dtype
        if said != "auto":
            return getattr(torch, said)
        fast = device.type == "cuda" or ops.cpu_is_fast_at_bfloat16()
        return torch.bfloat16 if fast else torch.float32

    def transformer(self, dtype: torch.dtype, device: torch.device) -> CausalS2V:
        fast = self.config.model.fast
        return prepare(weights.load_transformer(self.folder.path, dtype, device, self.config.model.lora, fast.fp8), fast)

    def vae(self, dtype: torch.dtype, device: torch.device):
        vae = weights.load_vae(self.folder.path, dtype, device)
        if self.config.model.fast.compile:
            from liveavatar.models.vae import compile_decoder

            compile_decoder(vae)
        return vae

    def front_end(self, device: torch.device) -> AudioFrontEnd:
        hearing = weights.load_hearing(self.folder.path, device)
        return build_front_end({**self.folder.audio, "block_frames": self.geometry.frames_per_block}, hearing)

    def prompt_encoder(self, dtype: torch.dtype, device: torch.device) -> Callable[[str], torch.Tensor]:
        """prompt -> rows [n, text_dim]. A large encoder is freed after use: prompts are rare, memory is not."""
        def load():
            return weights.load_text_encoder(self.folder.path, dtype, device)

        rows = self.model_config.text_len
        if self.text_encoder_bytes > KEPT_ENCODER_BYTES:
            return lambda prompt: load().encode(prompt, rows)
        encoder = load()
        return lambda prompt: encoder.encode(prompt, rows)


def _vae_config(path: Path) -> dict:
    """The VAE's diffusers config; Wan2.1_VAE.pth comes without one and has the class's defaults."""
    return tensorfiles.read_json(path / "config.json") if path.is_dir() else {}


def spatial_stride(vae_config: Mapping) -> int:
    """Pixels per latent cell: one halving per level after the first, times the patch."""
    return 2 ** (len(vae_config.get("dim_mult", (1, 2, 4, 4))) - 1) * (vae_config.get("patch_size") or 1)


def _geometry(config: Config, stored: Mapping, stride: int, where: str) -> Geometry:
    known = ("height", "width", "block_latents", "ring_blocks", "motion_frames")
    unknown = sorted(stored.keys() - set(known))
    if unknown:
        raise WeightsError(f"{where}: geometry section with unknown key(s) {', '.join(unknown)}; known: {', '.join(known)}")
    height, width = config.video.height, config.video.width
    if (height is None) != (width is None):
        raise ConfigError("video.height and video.width go together: set both or neither")
    sizes = dict(stored) if height is None else {**stored, "height": height, "width": width}
    if "height" not in sizes or "width" not in sizes:
        raise ConfigError(f"{where}: the checkpoint names no picture size: set video.height and video.width")
    made = Geometry(spatial_stride=stride, anchor_blocks=config.sampler.anchor_blocks, **sizes)
    return replace(made, first_block=config.sampler.first_position // made.block_latents)


def _levels(config: Config, stored: list[float] | None) -> list[float]:
    """The checkpoint's own levels if they are for as many steps, else the table; cut by finish_after."""
    s = config.sampler
    own = stored is not None and len(stored) == s.steps + 1 and s.shift == SHIFT
    levels = [float(level) for level in stored] if own else sigmas(s.steps, s.shift)
    return levels[: config.steps_run] + [0.0]


def sized(config: Config, picture: torch.Tensor) -> Config:
    """config with a picture size: its own, the checkpoint's, or by the size rule from uint8 `picture` [3, H0, W0].

    The rule (model.md section 10) is used when video.area_cap is set or nobody names a size. Raises
    ConfigError, InputError, WeightsError.
    """
    video = config.video
    if video.height is not None or Path(config.model.path).suffix in FIXTURE_SUFFIXES:
        return config
    if video.area_cap is None and "height" in open_folder(config.model.path).geometry:
        return config
    height, width = output_size(picture.shape[1], picture.shape[2], video.area_cap or AREA_CAP)
    return replace(config, video=replace(video, height=height, width=width))


# ---------------------------------------------------------------- parity fixture


class Fixture:
    """A fixture of shared/parity: NAME.json and NAME.safetensors; `path` may carry either suffix or none.

    Tensors stored in bf16 are given as fp32. Raises InputError when a file is absent or not what it should be.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        stem = path.with_suffix("") if path.suffix in FIXTURE_SUFFIXES else path
        self.json_path, self.tensor_path = (stem.with_name(stem.name + suffix) for suffix in FIXTURE_SUFFIXES)
        try:
            self.facts: dict = json.loads(self.json_path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{self.json_path}: no readable fixture: {error}") from None
        if not isinstance(self.facts, dict):
            raise InputError(f"{self.json_path}: no fixture: the top level must be a mapping")
        self.entries = tensorfiles.open_file(self.tensor_path).entries if self.tensor_path.is_file() else {}

    @property
    def name(self) -> str:
        return self.json_path.stem

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor; floating ones in fp32."""
        if name not in self.entries:
            raise InputError(f"{self.tensor_path}: no tensor {name!r}")
        value = tensorfiles.read(self.entries[name])
        return value.float() if value.is_floating_point() else value

    def weights(self) -> tensorfiles.TensorSource:
        """The tensors under `weights.`, by their official names."""
        prefix = "weights."
        own = {name.removeprefix(prefix): entry for name, entry in self.entries.items() if name.startswith(prefix)}
        return tensorfiles.TensorSource(str(self.tensor_path), own)

    def model_config(self) -> S2VConfig:
        """Sizes of a causal fixture; the number of audio layers is a tensor's shape."""
        source = self.weights().entries
        layers = source["casual_audio_encoder.weights"].shape[1] if "casual_audio_encoder.weights" in source else 25
        return S2VConfig.from_dict({"audio_layers": layers, **self.facts["config"]})

    def geometry(self) -> Geometry:
        """Sizes of a causal fixture's stream; latents are what it has, pixels are what they would be."""
        (h, w), block = self.facts["latent_hw"], self.facts["block_latents"]
        ring, rest = divmod(self.facts["ring_latents"], block)
        if rest:
            raise InputError(f"{self.json_path}: ring_latents={self.facts['ring_latents']} is no multiple of block_latents={block}")
        return Geometry(height=8 * h, width=8 * w, block_latents=block, ring_blocks=ring)

    def model(self, device: torch.device | str = "cpu") -> CausalS2V:
        """The transformer with the fixture's weights, fp32, strictly."""
        with torch.device("meta"):
            empty = CausalS2V(self.model_config())
        return tensorfiles.LoadPlan(empty, self.weights(), "a causal parity fixture").load(tensorfiles.cast_to(torch.float32, device))


class FixtureSource:
    """The chain of a rollout fixture: no VAE, no encoders; everything else comes with the messages."""

    observe, has_vae, vae_config, lids, head_motion, framing = True, False, None, False, None, None
    sink_policy, lookahead_samples, text_encoder_bytes = SINK_DISTANCE, 0, 0

    def __init__(self, path: str | Path):
        self.fixture = Fixture(path)
        facts = self.fixture.facts
        if "sigmas" not in facts or "blocks" not in facts:
            raise InputError(f"{self.fixture.json_path}: not a rollout fixture (no sigmas, no blocks): it has no chain to run")
        self.model_config, self.geometry = self.fixture.model_config(), self.fixture.geometry()
        self.sigmas, self.timesteps = facts["sigmas"], facts["stage_timesteps"]
        self.chain = ("condition", *(f"step{k}" for k in range(len(self.timesteps))))
        self.refresh_block = self.swap_block = facts.get("sink_reprefill_before_block") or 0

    def dtype(self, device: torch.device) -> torch.dtype:
        return torch.float32

    def transformer(self, dtype: torch.dtype, device: torch.device) -> CausalS2V:
        return self.fixture.model(device)

    def vae(self, dtype: torch.dtype, device: torch.device):
        raise AssertionError("a rollout fixture has no VAE")

    def front_end(self, device: torch.device) -> None:
        return None

    def prompt_encoder(self, dtype: torch.dtype, device: torch.device) -> None:
        return None
