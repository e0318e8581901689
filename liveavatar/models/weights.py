"""Loading, saving and inspecting checkpoints: strict, lazy, one error that says everything (model.md 15).

A load is planned first (module on the meta device, headers of the files), judged, then read. `inspect_folder`
stops after the judging, so what it promises is what a load does.

vae.py and encoders.py bring in diffusers and transformers (seconds, hundreds of MB): they are imported
where they are used, so a rank that only denoises never pays for them.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from liveavatar import ops
from liveavatar.core import ConfigError, WeightsError, latents_of
from liveavatar.models import tensorfiles
from liveavatar.models.fast import fp8_linears, with_scales
from liveavatar.models.folders import FORMAT, SETTINGS_FILE, CheckpointFolder, open_folder, resolve
from liveavatar.models.lora import lora_targets, merge_lora, merged, read_lora
from liveavatar.models.s2v import FAR_WEIGHT, NEAR_LATENTS, CausalS2V, S2VConfig, stored_dtype
from liveavatar.models.tensorfiles import Entry, LoadPlan, TensorSource
from liveavatar.models.viseme_encoder import MoonshineVisemes, VisemeEncoder, load_viseme_encoder, plan_viseme_encoder, sections_of

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

    from liveavatar.models.encoders import TextEncoder
    from liveavatar.models.vae import StreamingVAE

__all__ = [
    "FolderReport", "PartReport", "inspect_folder", "load_hearing", "load_text_encoder", "load_transformer", "load_vae",
    "load_wav2vec", "merge_lora", "save_folder", "save_viseme_encoder", "transformer_config",
]  # fmt: skip

LAYOUTS = {
    "ours": "our checkpoint folder",
    "official": "the official Wan2.2-S2V layout",
    "repack": "a diffusers-style repack with official tensor names",
}


# ---------------------------------------------------------------- transformer


def transformer_config(folder: CheckpointFolder) -> S2VConfig:
    """The transformer's sizes as the folder states them. Raises WeightsError naming the config file."""
    try:
        return S2VConfig.from_dict(folder.config)
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{folder.transformer_config}: {error}") from None


def plan_transformer(folder: CheckpointFolder) -> LoadPlan:
    """How a CausalS2V is filled. Raises WeightsError, also when the config contradicts the tensors."""
    config = transformer_config(folder)
    source = tensorfiles.open_file(folder.transformer)
    if folder.layout == "ours":
        source = tensorfiles.from_int8(source)
    conflicts = _contradictions(config, source)
    if conflicts:
        raise WeightsError(f"{folder.transformer_config} contradicts {source.label}: " + "; ".join(conflicts))
    with torch.device("meta"):
        model = CausalS2V(config)
    if FAR_WEIGHT not in source.entries and folder.layout == "ours" and _holds_still(folder.geometry):
        shape = tuple(model.get_parameter(FAR_WEIGHT).shape)
        zeros = Entry(shape, "float32", folder.transformer, lambda: torch.zeros(shape), stored=("nothing", 0))
        source = TensorSource(source.label, {**source.entries, FAR_WEIGHT: zeros})
    return LoadPlan(model, source, LAYOUTS[folder.layout])


def _holds_still(geometry: Mapping) -> bool:
    """Whether a checkpoint's motion never reaches the weight that save_folder then leaves out: 3 of 17 MB of the embedded avatar."""
    frames = geometry.get("motion_frames")
    return isinstance(frames, int) and latents_of(frames) <= NEAR_LATENTS


def _contradictions(config: S2VConfig, source: TensorSource) -> list[str]:
    """Config values that the shapes of the tensors speak against, one text each."""
    shape = {name: entry.shape for name, entry in source.entries.items()}

    def side(name: str, axis: int, scale: float = 1) -> int | None:
        return int(shape[name][axis] * scale) if len(shape.get(name, ())) > axis else None

    found = {
        "dim": side("patch_embedding.weight", 0),
        "ffn_dim": side("blocks.0.ffn.0.weight", 0),
        "freq_dim": side("time_embedding.0.weight", 1),
        "text_dim": side("text_embedding.0.weight", 1),
        "in_dim": side("patch_embedding.weight", 1),
        "out_dim": side("head.head.weight", 0, 1 / 4),
        "cond_dim": side("cond_encoder.weight", 1),
        "audio_dim": side("casual_audio_encoder.encoder.conv1_local.conv.weight", 1),
        "audio_layers": side("casual_audio_encoder.weights", 1),
        "num_layers": _count(shape, r"blocks\.(\d+)\."),
    }
    conflicts = [
        f"{key}={getattr(config, key)}, the tensors say {value}"
        for key, value in found.items()
        if value is not None and value != getattr(config, key)
    ]
    injectors = _count(shape, r"audio_injector\.injector\.(\d+)\.")
    if injectors is not None and injectors != len(config.audio_inject_layers):
        conflicts.append(f"{len(config.audio_inject_layers)} audio_inject_layers, the tensors say {injectors}")
    return conflicts


def _count(names: Mapping[str, object], pattern: str) -> int | None:
    """1 + the greatest number that `pattern` finds at the start of a name."""
    numbers = [int(match[1]) for match in (re.match(pattern, name) for name in names) if match]
    return 1 + max(numbers) if numbers else None


def load_transformer(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", lora: str | Path | None = None,
    fp8: bool = False,
) -> CausalS2V:
    """The causal transformer of a checkpoint folder ("default": the embedded one), strictly, in eval mode.

    Each tensor is mapped, has its LoRA update added in fp32, and is rounded once to `dtype` (parts that
    compute in fp32 stay fp32). fp8: the linears of fast.FP8_PARTS go on to E4M3 one by one as they are read, so that only one of
    them at a time lies on the device in `dtype`. Raises WeightsError before reading when anything is missing, left over
    or of another shape, in the folder or in the LoRA file.
    """
    plan = plan_transformer(open_folder(path))
    plan.check()
    updates = read_lora(lora, lora_targets(plan.module)) if lora is not None else {}
    small, scales = set(fp8_linears(plan.module) if fp8 else ()), {}

    def convert(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor, linear = merged(updates, name, tensor.to(device)).to(stored_dtype(name, dtype)), name.removesuffix(".weight")
        if linear not in small:
            return tensor
        tensor, scales[linear] = ops.quantise_rows(tensor)
        return tensor

    model = plan.load(convert)
    with_scales(model, scales)
    return model


# ---------------------------------------------------------------- the other parts


def plan_vae(path: Path) -> LoadPlan:
    """How the VAE is filled, from a diffusers folder or Wan2.1_VAE.pth. Raises WeightsError."""
    from liveavatar.models.vae import plan_official_vae, plan_vae_folder

    return plan_vae_folder(path) if path.is_dir() else plan_official_vae(path)


def load_vae(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> StreamingVAE:
    """The VAE of a checkpoint folder. Raises WeightsError."""
    from liveavatar.models.vae import StreamingVAE, stored_as

    plan = plan_vae(open_folder(path).need("vae"))
    return StreamingVAE(plan.load(stored_as(dtype, device)))


def load_text_encoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TextEncoder:
    """The text encoder of a checkpoint folder with its tokenizer. Raises WeightsError."""
    from liveavatar.models import encoders

    folder = open_folder(path)
    plan = encoders.plan_text_encoder(folder.need("text_encoder"))
    tokenizer = encoders.load_tokenizer(_tokenizer_folder(folder))
    return encoders.TextEncoder(plan.load(tensorfiles.cast_to(dtype, device)), tokenizer)


def _tokenizer_folder(folder: CheckpointFolder) -> Path | None:
    """Only our own layout may go without tokenizer files: its default reads bytes."""
    return folder.tokenizer if folder.layout == "ours" else folder.need("tokenizer")


def load_wav2vec(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Wav2Vec2Model:
    """The speech encoder of a checkpoint folder. Raises WeightsError."""
    from liveavatar.models import encoders

    return encoders.load_wav2vec(open_folder(path).need("wav2vec"), dtype, device)


def load_hearing(path: str | Path, device: torch.device | str = "cpu") -> Wav2Vec2Model | VisemeEncoder | MoonshineVisemes | None:
    """The network that a checkpoint folder's "audio" section hears through, float32; None where it needs none. Raises WeightsError.

    A viseme encoder stays on the CPU: it is a few milliseconds of work a block, and every machine then hears the same."""
    folder = open_folder(path)
    if folder.audio.get("kind") == "wav2vec2":
        return load_wav2vec(path, torch.float32, device)
    return load_viseme_encoder(folder.need("viseme_encoder")) if folder.audio.get("kind") == "visemes" else None


# ---------------------------------------------------------------- saving


def save_folder(
    path: str | Path,
    *,
    transformer: CausalS2V,
    audio: Mapping,
    sampler: Mapping,
    geometry: Mapping,
    vae: StreamingVAE | None = None,
    text_encoder: TextEncoder | None = None,
    viseme_encoder: VisemeEncoder | MoonshineVisemes | None = None,
    framing: Mapping | None = None,
    control: Mapping | None = None,
    card: Mapping | None = None,
    dtype: torch.dtype = torch.float32,
    eight_bits: bool = False,
) -> Path:
    """Write "our" checkpoint folder and return its path; parts given as None are not written.

    audio, sampler, geometry, framing, control, card: sections of liveavatar.json, in plain JSON values. dtype: tensors are
    rounded to it (transformer parts that compute in fp32 stay fp32). eight_bits: the transformer's matrices, but for those parts, are stored
    as rows of eight bits. The weight of motion that this geometry has none of is not written.
    Each file appears whole or not at all, liveavatar.json last.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = transformer.state_dict()
    if _holds_still(geometry):
        del state[FAR_WEIGHT]
    stored = {name: tensor.to(stored_dtype(name, dtype)) for name, tensor in state.items()}
    if eight_bits:
        stored |= tensorfiles.as_int8({name: t for name, t in state.items() if t.dim() > 1 and stored_dtype(name, torch.int8) == torch.int8})
    _write_tensors(folder / "transformer.safetensors", stored)
    if vae is not None:
        config = json.loads(vae.module.to_json_string())
        config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
        _write_part(folder / "vae", "diffusion_pytorch_model.safetensors", vae.module, config, dtype)
    if text_encoder is not None:
        _write_text_encoder(folder / "text_encoder", text_encoder, dtype)
    if viseme_encoder is not None:
        save_viseme_encoder(folder / "viseme_encoder", viseme_encoder, dtype)
    sections = {"transformer": transformer.config.to_dict(), "audio": audio, "sampler": sampler, "geometry": geometry,
                **({"framing": framing} if framing else {}), "text": {"kind": "umt5"}, **({"control": control} if control else {}),
                "card": card or {}}  # fmt: skip
    _write_json(folder / SETTINGS_FILE, {"format": FORMAT, **{name: dict(value) for name, value in sections.items()}})
    return folder


def save_viseme_encoder(folder: str | Path, encoder: VisemeEncoder | MoonshineVisemes, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that load_viseme_encoder reads. Moonshine's layers are stored in eight bits, whatever `dtype` is: they are as large as the rest."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = encoder.state_dict()
    _write_tensors(folder / "model.safetensors", tensorfiles.as_int8(state) if isinstance(encoder, MoonshineVisemes)
                   else {name: t.to(dtype) for name, t in state.items()})  # fmt: skip
    _write_json(folder / "config.json", sections_of(encoder))


def _write_text_encoder(folder: Path, encoder: TextEncoder, dtype: torch.dtype) -> None:
    from liveavatar.models.encoders import TIED

    config = copy.deepcopy(encoder.module.config)
    config.architectures = ["UMT5EncoderModel"]
    _write_part(folder, "model.safetensors", encoder.module, config.to_dict(), dtype, tied=TIED)
    if encoder.needs_tokenizer_files:
        encoder.tokenizer.save_pretrained(folder)


def _write_part(folder: Path, name: str, module: torch.nn.Module, config: dict, dtype: torch.dtype, tied: Mapping[str, str] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    _write_tensors(folder / name, {key: t.to(dtype) for key, t in module.state_dict().items() if key not in (tied or {})})
    _write_json(folder / "config.json", config)


def _write_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: t.detach().to("cpu").contiguous() for name, t in state.items()}, partial, metadata={"format": "pt"})
    os.replace(partial, path)  # whoever has the old file mapped keeps it


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


# ---------------------------------------------------------------- inspecting


@dataclass(frozen=True)
class PartReport:
    """One part of a checkpoint. dtypes: tensors per stored type. problem: why it will not load, or None."""

    name: str
    path: Path
    tensors: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    problem: str | None = None

    def __str__(self) -> str:
        stored = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        size = f"{self.tensors} tensors, {self.nbytes / 1e6:,.1f} MB ({stored or 'none'})"
        return f"{self.name}: {self.path}: {size if self.problem is None else 'PROBLEM: ' + self.problem}"


@dataclass(frozen=True)
class FolderReport:
    """What a checkpoint folder holds and whether it will load. problems: all reasons why not."""

    path: Path
    layout: str | None  # "ours", "official", "repack"; None: not recognised
    parts: tuple[PartReport, ...]
    problems: tuple[str, ...]

    @property
    def will_load(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        head = f"{self.path}: {LAYOUTS[self.layout] if self.layout else 'not recognised'}"
        loose = [problem for problem in self.problems if problem not in [part.problem for part in self.parts]]
        verdict = "will load" if self.will_load else f"will NOT load: {len(self.problems)} problem(s)"
        return "\n".join([head, *map(str, self.parts), *loose, verdict])


def inspect_folder(path: str | Path, lora: str | Path | None = None) -> FolderReport:
    """Judge a checkpoint folder without reading tensors. Never raises for a broken folder: the report says why."""
    from liveavatar.models import encoders

    try:
        folder = open_folder(path)
    except WeightsError as error:
        return FolderReport(resolve(path), None, (), (str(error),))
    plans = {
        "transformer": lambda: plan_transformer(folder),
        "vae": lambda: plan_vae(folder.need("vae")),
        "text_encoder": lambda: encoders.plan_text_encoder(folder.need("text_encoder")),
    }
    if folder.wav2vec is not None or folder.audio.get("kind") == "wav2vec2":
        plans["wav2vec"] = lambda: encoders.plan_wav2vec(folder.need("wav2vec"))
    if folder.audio.get("kind") == "visemes":
        plans["viseme_encoder"] = lambda: plan_viseme_encoder(folder.need("viseme_encoder"))
    parts = [_inspect_part(name, getattr(folder, name) or folder.path, plan) for name, plan in plans.items()]
    if lora is not None:
        parts.append(_inspect_lora(folder, Path(lora)))
    problems = [part.problem for part in parts if part.problem]
    return FolderReport(folder.path, folder.layout, tuple(parts), tuple(problems + _tokenizer_problems(folder)))


def _inspect_part(name: str, path: Path, plan) -> PartReport:
    try:
        planned = plan()
        planned.check()
    except WeightsError as error:
        return PartReport(name, path, problem=str(error))
    return _report(name, path, planned.source)


def _inspect_lora(folder: CheckpointFolder, path: Path) -> PartReport:
    try:
        with torch.device("meta"):
            wanted = lora_targets(CausalS2V(transformer_config(folder)))
        read_lora(path, wanted)
        return _report("lora", path, tensorfiles.open_file(path))
    except WeightsError as error:
        return PartReport("lora", path, problem=str(error))


def _report(name: str, path: Path, source: TensorSource) -> PartReport:
    stored = [held for entry in source.entries.values() if (held := entry.stored or (entry.dtype, entry.nbytes))[1]]
    return PartReport(name, path, len(stored), sum(nbytes for _, nbytes in stored), dict(Counter(dtype for dtype, _ in stored).most_common()))


def _tokenizer_problems(folder: CheckpointFolder) -> list[str]:
    from liveavatar.models import encoders

    if folder.text_encoder is None:
        return []
    try:
        encoders.load_tokenizer(_tokenizer_folder(folder))
    except WeightsError as error:
        return [str(error)]
    return []
