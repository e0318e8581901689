"""LoRA files merged into the transformer: every key used, every target met, or an error (model.md 15.2).

The public Live-Avatar file is read with `strict=False` elsewhere, where one unknown spelling silently
runs the undistilled model. Here W becomes W + (alpha/r) B A in fp32 with one rounding at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from liveavatar.core import WeightsError
from liveavatar.models import tensorfiles

DEFAULT_ALPHA = 64.0  # of the distributed file (rank 128, so scale 0.5) when it stores no alpha
TARGET_SUFFIXES = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")
TARGET_PREFIXES = ("blocks.", "audio_injector.injector.")
FILE_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
_KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<half>[AB])(?:\.default)?\.weight|(?P<alpha>alpha))")


@dataclass(frozen=True)
class LowRank:
    """One target's update. down (A): [r, in]; up (B): [out, r]; scale: alpha / r."""

    down: tensorfiles.Entry
    up: tensorfiles.Entry
    scale: float

    def delta(self, device: torch.device | str) -> torch.Tensor:
        """scale * B A, fp32 [out, in]."""
        down, up = (tensorfiles.read(half).to(device, torch.float32) for half in (self.down, self.up))
        return self.scale * (up @ down)


def lora_targets(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Linears a Live-Avatar LoRA changes, by module name: (out, in). 448 of them at 14B."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(TARGET_PREFIXES) and name.endswith(TARGET_SUFFIXES)
    }


def read_lora(path: str | Path, wanted: dict[str, tuple[int, int]]) -> dict[str, LowRank]:
    """The update of every module in `wanted` (name -> (out, in)) from a LoRA file.

    Key forms: an optional prefix of FILE_PREFIXES, then `<module>.lora_A.weight` or
    `<module>.lora_A.default.weight` (B alike) and `<module>.alpha`. Raises WeightsError listing keys
    that are unknown, targets without both halves, and halves of the wrong shape.
    """
    source = tensorfiles.open_file(path)
    halves, unknown = _parse(source, wanted)
    lacking = [f"{name}.lora_{half}.weight" for name in wanted for half in "AB" if half not in halves.get(name, {})]
    misfits = [_misfit(name, parts, wanted[name]) for name, parts in halves.items() if {"A", "B"} <= parts.keys()]
    misfits = [text for text in misfits if text]
    problems = [
        tensorfiles.listing(kind, keys)
        for kind, keys in (("unexpected", unknown), ("missing", lacking), ("wrongly shaped", misfits))
        if keys
    ]
    if problems:
        raise WeightsError(
            f"{source.label}: not a LoRA for this transformer: expected A and B for {len(wanted)} linears, "
            f"found {len(source.entries)} tensors; " + "; ".join(problems)
        )
    return {name: LowRank(parts["A"], parts["B"], _scale(parts)) for name, parts in halves.items()}


def _parse(source: tensorfiles.TensorSource, wanted: dict) -> tuple[dict[str, dict[str, tensorfiles.Entry]], list[str]]:
    """halves[module]["A" | "B" | "alpha"] and the keys that mean nothing (or the same thing twice)."""
    halves: dict[str, dict[str, tensorfiles.Entry]] = {}
    unknown = []
    for key, entry in source.entries.items():
        match = _KEY.fullmatch(_without_prefix(key))
        module = match["module"] if match else ""
        part = (match["half"] or "alpha") if match else ""
        if module not in wanted or part in halves.get(module, {}):
            unknown.append(f"{key} {list(entry.shape)}")
        else:
            halves.setdefault(module, {})[part] = entry
    return halves, unknown


def _without_prefix(key: str) -> str:
    for prefix in FILE_PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _misfit(name: str, parts: dict[str, tensorfiles.Entry], shape: tuple[int, int]) -> str | None:
    down, up = parts["A"].shape, parts["B"].shape
    fits = len(down) == len(up) == 2 and down[0] == up[1] > 0 and (up[0], down[1]) == shape
    if not fits:
        return f"{name} is {list(shape)}, its A is {list(down)} and B {list(up)}"
    if "alpha" in parts and parts["alpha"].shape not in ((), (1,)):
        return f"{name}.alpha is {list(parts['alpha'].shape)}, must be one number"
    return None


def _scale(parts: dict[str, tensorfiles.Entry]) -> float:
    alpha = tensorfiles.read(parts["alpha"]).float().item() if "alpha" in parts else DEFAULT_ALPHA
    return alpha / parts["A"].shape[0]


def merged(updates: dict[str, LowRank], weight_name: str, weight: torch.Tensor) -> torch.Tensor:
    """`weight` with the update of its linear added, fp32; itself when `weight_name` is no target."""
    update = updates.get(weight_name.removesuffix(".weight")) if weight_name.endswith(".weight") else None
    return weight if update is None else weight.float() + update.delta(weight.device)


@torch.no_grad()
def merge_lora(model: nn.Module, path: str | Path) -> int:
    """Add the LoRA of file `path` to `model` in place; returns how many linears changed. Raises WeightsError.

    One rounding, from fp32 to the weight's dtype. The file is judged as a whole before any weight moves.
    """
    updates = read_lora(path, lora_targets(model))
    for name, update in updates.items():
        weight = model.get_submodule(name).weight
        weight.copy_(weight.float() + update.delta(weight.device))
    return len(updates)
