"""Tensor files: names, shapes and lazy reading; strict filling of a module built on the meta device.

A 14B checkpoint is 32.6 GB: files are memory mapped, each tensor is read once, cast and moved, and
becomes the parameter itself, so nothing is allocated twice (model.md section 15.1).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from liveavatar.core import WeightsError

LISTED = 20  # keys of each kind an error lists
PLAIN_FLOATS = ("float64", "float32", "float16", "bfloat16")  # anything else is quantised and needs scales
STORED_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One stored tensor: what the header says, and how to read it. stored: type and bytes in the file, where reading makes something else of it."""

    shape: tuple[int, ...]
    dtype: str  # torch's name, e.g. "bfloat16"
    file: Path
    read: Callable[[], torch.Tensor]
    stored: tuple[str, int] | None = None

    @property
    def nbytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class TensorSource:
    """Stored tensors by name. label: the file or index a message names."""

    label: str
    entries: Mapping[str, Entry]

    def renamed(self, rename: Callable[[str], str]) -> TensorSource:
        """The same tensors under other names. Raises WeightsError when two names become one."""
        entries = {rename(name): entry for name, entry in self.entries.items()}
        if len(entries) != len(self.entries):
            raise WeightsError(f"{self.label}: two stored names mean the same tensor; fetch the file again")
        return TensorSource(self.label, entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


# ---------------------------------------------------------------- opening


def read_json(path: Path) -> dict:
    """A JSON mapping. Raises WeightsError naming the file when it is absent or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; is this a complete checkpoint folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: cannot read JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: must hold a JSON mapping, holds a {type(value).__name__}")
    return value


def open_file(path: str | Path) -> TensorSource:
    """A .safetensors, or .pth/.pt/.bin file, or a sharded .index.json. Raises WeightsError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; check the path or fetch the checkpoint again")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def find_weights(folder: Path, stem: str = "") -> Path:
    """The one index, safetensors file or pytorch_model.bin of `folder` whose name starts with `stem`.

    Raises WeightsError when there is none, or several without an index.
    """
    for pattern in (f"{stem}*.safetensors.index.json", f"{stem}*.safetensors", "pytorch_model.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise WeightsError(f"{folder}: holds {len(found)} files {pattern} ({names}) and no index that joins them; fetch the .index.json too")
        if found:
            return found[0]
    raise WeightsError(f"{folder}: holds no {stem}*.safetensors and no index of shards; fetch the checkpoint again")


def _open_safetensors(path: Path) -> TensorSource:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        headers = {name: handle.get_slice(name) for name in handle.keys()}
        entries = {
            name: Entry(
                shape=tuple(header.get_shape()),
                dtype=_dtype_name(header.get_dtype(), path),
                file=path,
                read=lambda name=name: handle.get_tensor(name),
            )
            for name, header in headers.items()
        }
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
    return TensorSource(str(path), entries)


def _dtype_name(stored: str, path: Path) -> str:
    if stored not in STORED_DTYPES:
        raise WeightsError(f"{path}: holds tensors of type {stored}, which cannot be read; known: {', '.join(STORED_DTYPES)}")
    return STORED_DTYPES[stored]


def _open_index(path: Path) -> TensorSource:
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise WeightsError(f"{path}: has no weight_map; fetch the index again")
    shards = sorted(set(named.values()))
    absent = [shard for shard in shards if not (path.parent / shard).is_file()]
    if absent:
        raise WeightsError(f"{path}: names {len(absent)} absent shard(s) of {len(shards)}: {', '.join(absent)}; fetch them into {path.parent}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries |= _open_safetensors(path.parent / shard).entries
    difference = sorted(entries.keys() ^ named.keys())
    if difference:
        raise WeightsError(f"{path}: index and shards disagree about {len(difference)} tensors: {', '.join(difference[:LISTED])}")
    return TensorSource(str(path), entries)


def _open_pickle(path: Path) -> TensorSource:
    try:
        # Only the zip format can be mapped; older files are read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: not a readable torch weights file ({reason}); fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path}: must hold a mapping of names to tensors; this looks like another kind of file")
    entries = {
        name: Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), path, lambda tensor=tensor: tensor)
        for name, tensor in state.items()
    }
    return TensorSource(str(path), entries)


# ---------------------------------------------------------------- rows of eight bits

SCALE = ".scale"


def as_int8(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state in about a quarter of float32's bytes: tensors of two or more axes as int8, and for each an fp32 NAME.scale of one number per
    row (first axis), its greatest magnitude / 127. Vectors stay."""
    stored = {}
    for name, tensor in state.items():
        if tensor.dim() > 1:
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(1).clamp(min=1e-30) / 127
            stored[name + SCALE], tensor = scale, (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        stored[name] = tensor
    return stored


def from_int8(source: TensorSource) -> TensorSource:
    """What as_int8 made, as tensors of float32. An int8 tensor without its scale stays one, which a plan refuses."""
    entries = dict(source.entries)
    for name, entry in source.entries.items():
        scale = entries.get(name + SCALE)
        if entry.dtype == "int8" and scale is not None and scale.shape == entry.shape[:1]:
            del entries[name + SCALE]
            entries[name] = Entry(entry.shape, "float32", entry.file, lambda entry=entry, scale=scale: _times_scale(entry, scale),
                                  stored=("int8", entry.nbytes + scale.nbytes))  # fmt: skip
    return TensorSource(source.label, entries)


def _times_scale(entry: Entry, scale: Entry) -> torch.Tensor:
    return entry.read().float() * scale.read().view(-1, *[1] * (len(entry.shape) - 1))


# ---------------------------------------------------------------- strict filling


def expected_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's state; works on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def differences(expected: Mapping[str, tuple[int, ...]], source: TensorSource) -> list[str]:
    """One text per kind of disagreement (missing, unexpected, misshapen, quantised), empty when source fits exactly."""
    stored = source.entries
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    extra = [f"{name} {list(entry.shape)}" for name, entry in stored.items() if name not in expected]
    wrong = [
        f"{name} expected {list(shape)} found {list(stored[name].shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != tuple(shape)
    ]
    packed = [f"{name} {entry.dtype}" for name, entry in stored.items() if name in expected and entry.dtype not in PLAIN_FLOATS]
    kinds = (("missing", missing), ("unexpected", extra), ("wrongly shaped", wrong), ("quantised (unsupported)", packed))
    return [listing(kind, keys) for kind, keys in kinds if keys]


def listing(kind: str, keys: list[str]) -> str:
    rest = f", and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return f"{len(keys)} {kind}: " + ", ".join(keys[:LISTED]) + rest


@dataclass(frozen=True)
class LoadPlan:
    """A module on the meta device and the tensors that will become its parameters.

    layout: how the file was understood, for messages. aliases: state names that share the tensor of
    another name (tied weights). Planning reads headers only; `check` decides, `load` reads.
    """

    module: torch.nn.Module
    source: TensorSource
    layout: str
    aliases: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise WeightsError (file, layout, counts, keys) unless the source holds exactly what the module needs."""
        expected = {name: shape for name, shape in expected_shapes(self.module).items() if name not in self.aliases}
        problems = differences(expected, self.source)
        if problems:
            raise WeightsError(
                f"{self.source.label}: read as {self.layout}, expected {len(expected)} tensors, "
                f"found {len(self.source.entries)}; " + "; ".join(problems)
            )

    def load(self, convert: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.nn.Module:
        """The module with its tensors, in eval mode and without gradients. convert(name, stored) -> parameter.

        Raises WeightsError before any tensor is read when a name, shape or type does not fit.
        """
        self.check()
        state = {name: convert(name, read(entry)) for name, entry in self.source.entries.items()}
        state |= {alias: state[name] for alias, name in self.aliases.items()}
        self.module.load_state_dict(state, strict=True, assign=True)
        tensors = (*self.module.parameters(), *self.module.buffers())
        assert not any(tensor.is_meta for tensor in tensors), "a tensor that no file holds"
        return self.module.eval().requires_grad_(False)


def cast_to(dtype: torch.dtype, device: torch.device | str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """The plainest `convert` of LoadPlan.load: every tensor to one dtype and device."""
    return lambda name, tensor: tensor.to(device, dtype)


def read(entry: Entry) -> torch.Tensor:
    """One tensor from its file. Raises WeightsError when the file is damaged."""
    try:
        return entry.read()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise WeightsError(f"{entry.file}: cannot be read ({error}); fetch it again") from None
