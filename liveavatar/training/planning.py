"""`liveavatar train plan`: what every stage of a recipe would take, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from liveavatar.core import ConfigError, PlacementError, latents_of
from liveavatar.models.folders import open_folder, resolve
from liveavatar.models.s2v import S2VConfig
from liveavatar.models.weights import transformer_config
from liveavatar.training import shards
from liveavatar.training.adapters import BASE_DTYPES
from liveavatar.training.codec import CodecConfig
from liveavatar.training.data import DataConfig
from liveavatar.training.export import ExportConfig
from liveavatar.training.forcing import ForcingConfig
from liveavatar.training.groups import rank_and_world
from liveavatar.training.memory import ClipConfig, Load, Sizes, StagePlan, learning_flops, sizes_of, stage_plan

PLANNED = ("teacher", "forcing", "ode", "consistency", "dmd")


class Recipe(Protocol):
    """What recipe.Recipe, which asks for plans, says of its parts."""

    run: str
    forcing: ForcingConfig
    export: ExportConfig
    data: DataConfig | None
    vae: CodecConfig | None
    clip: ClipConfig | None


def model_of(recipe: Recipe) -> tuple[S2VConfig, str]:
    """The recipe's transformer, and a remark where its folder is not here yet and the official one is counted instead."""
    if not recipe.forcing.base:
        return S2VConfig.from_dict(recipe.forcing.model), ""
    folder = resolve(recipe.forcing.base.folder)
    if folder.exists():
        return transformer_config(open_folder(folder)), ""
    return S2VConfig(), f"{folder} is not here: counted as Wan2.2-S2V-14B"


def clip_of(recipe: Recipe) -> ClipConfig:
    """Size of the recipe's clips. Raises ConfigError when neither a clip nor a data section says it."""
    if recipe.clip:
        return recipe.clip
    if not recipe.data:
        raise ConfigError("no clip section: say clip: {height: 384, width: 704, latents: 21}")
    return clip_of_data(recipe)


def clip_of_data(recipe: Recipe) -> ClipConfig:
    """Size of the clips that the data section makes."""
    latents = latents_of(recipe.data.pictures) - recipe.forcing.context_latents
    height, width = recipe.data.sides
    return ClipConfig(height=height, width=width, latents=latents, stride=recipe.vae.spatial_stride if recipe.vae else 8)


def refuse_other_clips(recipe: Recipe) -> None:
    """Raise ConfigError when the clips in RUN/latents are not of the size that the recipe plans with. The first one is looked at."""
    folder = Path(recipe.run) / "latents"
    files = shards.clip_paths(folder, "train")
    packed = None if files else shards.Packed(folder, "train")
    path = files[0] if files else next(iter(packed.cards), None)
    if path is None or not (recipe.clip or recipe.data):
        return
    found = (shards.read_arrays(path, "card", "latents")[1] if files else packed.arrays(path))["latents"].shape[1:]
    clip = clip_of(recipe)
    wanted = (clip.latents + recipe.forcing.context_latents, clip.height // clip.stride, clip.width // clip.stride)
    if found != wanted:
        count, height, width = found
        raise ConfigError(
            f"{path} holds {count} latents of {height * clip.stride}x{width * clip.stride} pixels (height x width), the recipe "
            f"says {wanted[0]} of {clip.height}x{clip.width} (clip.latents={clip.latents} and forcing.context_latents="
            f"{recipe.forcing.context_latents}): encode clips of that size, or say clip: {{height: {height * clip.stride}, "
            f"width: {width * clip.stride}, latents: {count - recipe.forcing.context_latents}}}")


def plans_of(recipe: Recipe, gpus: int) -> list[StagePlan]:
    """One plan for each stage of the recipe that trains the transformer, on so many GPUs. Raises ConfigError, WeightsError."""
    model, clip, base = model_of(recipe)[0], clip_of(recipe), recipe.forcing.base
    sizes = sizes_of(model, base.rank if base else 0, BASE_DTYPES[base.dtype] if base else torch.float32)
    return [_plan(name, section, recipe, clip, model, sizes, gpus) for name in PLANNED if (section := getattr(recipe, name))]


def _plan(name: str, section, recipe: Recipe, clip: ClipConfig, model: S2VConfig, sizes: Sizes, gpus: int) -> StagePlan:
    f, loop, whole = recipe.forcing, section.loop, not sizes.frozen
    load = Load(model=model, clip=clip, block_latents=f.block_latents, window_blocks=f.window_blocks, batch=loop.batch)
    causal = load.forward_flops(name != "teacher")
    learning = learning_flops(causal, not whole, loop.checkpointing)
    if name == "dmd":
        bidirectional = load.forward_flops(section.teacher == "forcing")
        levels = len(recipe.export.sigmas) - 1
        rolled = causal * (levels + 1) / 2  # the exit is drawn evenly
        scores = bidirectional * (1 + forwards(section.teacher_guidance.scales))
        turn = learning - causal + scores + (learning if section.forward_kl else 0)
        flops = rolled + learning_flops(bidirectional, not whole, loop.checkpointing) + turn / section.ratio
        # While the critic learns, in the student's turn, the rollout waits for its gradient.
        return stage_plan(name, loop, load, sizes, gpus, roles=2, graphs=2, frozen_copies=int(whole), flops=flops)
    guided = forwards(section.guidance.scales) * causal if name == "consistency" else 0.0
    copies = {"ode": 1, "consistency": 2}.get(name, 0)
    if name == "consistency":
        guided += causal
    return stage_plan(name, loop, load, sizes, gpus, frozen_copies=copies * whole, flops=learning + guided)


def forwards(scales: tuple[float, float]) -> int:
    """Of the teacher, under guidance of these scales (guidance.guided leaves out what cancels)."""
    return 1 if scales == (1.0, 1.0) else 2 if scales[0] == scales[1] else 3


def refuse_what_cannot_fit(recipe: Recipe, stage: str, device: torch.device) -> None:
    """Raise PlacementError, with the numbers, when `stage` would run out of the memory of this process' GPU."""
    if device.type != "cuda" or stage not in PLANNED or (not recipe.clip and not recipe.data):
        return
    memory = torch.cuda.get_device_properties(device).total_memory
    for plan in plans_of(recipe, rank_and_world()[1]):
        if plan.stage == stage and (problem := plan.problem(memory)):
            raise PlacementError(problem)
