"""Checkpoints of training through torch.distributed.checkpoint, written whole or not at all.

RUN/STAGE.pt is a link to the newest folder under RUN/checkpoints; it moves only once that folder is complete, and the
folder before it is kept for whoever is still reading. Every rank writes what it holds, and any number of ranks may read
it again. Runs from before this have one file there instead, which is read too.

A state is a flat mapping: `model/NAME`, `ema/NAME`, `optimiser/NAME/KEY`, the same below `critic/`, `iteration`, `seed`.
Optimiser state goes by the parameter's name and only where there is any: torch's own get_optimizer_state_dict would first
make one step with a gradient of zero for networks that have not had their turn yet, and a saved run would not be the
unsaved one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from liveavatar.core import WeightsError
from liveavatar.training.groups import decided, grouped, meet, rank_and_world
from liveavatar.training.optimiser import is_matrix

State = dict[str, torch.Tensor]
KEPT = 2  # folders of a stage: the newest, and the one a reader may have opened


def checkpoint_path(folder: str | Path, stage: str) -> Path:
    """Where a stage's last checkpoint is found."""
    return Path(folder) / f"{stage}.pt"


def save_checkpoint(path: Path, state: State, alone: bool = False) -> None:
    """Write `state` as the newest checkpoint of `path`; all ranks call it, or one by itself (alone). state["iteration"]
    names the folder."""
    folder = path.parent / "checkpoints" / f"{path.stem}-{int(state['iteration']):08d}"
    there = path.is_symlink() and path.resolve() == folder.resolve()
    if there if alone else decided(there):
        return  # of this iteration already: never write into what the link shows
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _calm():
        dcp.save(state, checkpoint_id=folder, no_dist=alone or not grouped())
    if alone or rank_and_world()[0] == 0:
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        part.symlink_to(Path("checkpoints") / folder.name)
        os.replace(part, path)
        forget_older(folder)
    if not alone:
        meet()


@contextlib.contextmanager
def _calm():
    """Without torch's remark, each time, that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def forget_older(newest: Path) -> None:
    """Delete the checkpoints of a stage but for the last KEPT; halves left by a killed writer go too."""
    own = re.compile(re.escape(newest.name.rpartition("-")[0]) + r"-\d{8}")
    others = sorted((p for p in newest.parent.iterdir() if own.fullmatch(p.name) and p != newest), key=lambda p: p.name)
    earlier = [p for p in others if p.name < newest.name]
    for folder in others:
        if folder not in earlier[-(KEPT - 1) :]:  # what is numbered beyond the newest is half written: the run was resumed before it
            shutil.rmtree(folder, ignore_errors=True)


class Stored:
    """A checkpoint that can be read piece by piece. shapes: of its tensors, by key. Raises WeightsError when there is none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.whole: State | None = None if self.path.is_dir() else _read_file(self.path)
        if self.whole is not None:
            self.shapes = {name: tuple(t.shape) for name, t in self.whole.items()}
            self.dtypes = {name: t.dtype for name, t in self.whole.items()}
            return
        try:
            entries = dcp.FileSystemReader(self.path).read_metadata().state_dict_metadata
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise WeightsError(f"{path}: cannot read checkpoint: {error}") from None
        self.shapes = {name: tuple(entry.size) for name, entry in entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in entries.items()}

    def below(self, prefix: str) -> list[str]:
        """What keys have after `prefix`."""
        return [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]

    def empty(self, key: str) -> torch.Tensor:
        """A tensor on the CPU to read `key` into."""
        return torch.empty(self.shapes[key], dtype=self.dtypes[key])

    @torch.no_grad()
    def read(self, into: State) -> None:
        """Fill the given tensors, whole ones or shards. Raises WeightsError where a key is missing or of another shape."""
        unfit = [key for key, t in into.items() if self.shapes.get(key) != tuple(t.shape)]
        if unfit:
            raise WeightsError(f"{self.path}: tensors differ from the recipe's model: {', '.join(sorted(unfit)[:5])}")
        if self.whole is None:
            with _calm():
                dcp.load(into, checkpoint_id=self.path.resolve(), no_dist=True)  # every rank reads what it holds
            return
        for key, t in into.items():
            t.copy_(self.whole[key])

    @property
    def iteration(self) -> int:
        number = {"iteration": torch.zeros((), dtype=torch.int64)}
        self.read(number)
        return int(number["iteration"])


def load_checkpoint(path: str | Path) -> dict:
    """All of a checkpoint as nested mappings of tensors on the CPU. Raises WeightsError when there is none."""
    stored = Stored(path)
    flat = {key: stored.empty(key) for key in stored.shapes}
    stored.read(flat)
    nested: dict = {}
    for key, tensor in flat.items():
        *parents, leaf = key.split("/")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = tensor
    return nested


@torch.no_grad()
def load_average(module: nn.Module, path: str | Path) -> int:
    """Put the EMA weights of a checkpoint into `module`; returns its iteration. Raises WeightsError."""
    stored, own = Stored(path), dict(module.named_parameters())
    if set(own) != set(stored.below("ema/")):
        raise WeightsError(f"{path}: tensors differ from the recipe's model")
    averages = {f"ema/{name}": stored.empty(f"ema/{name}") for name in own}
    stored.read(averages)
    for name, p in own.items():
        p.copy_(averages[f"ema/{name}"])
    return stored.iteration


def keep_averages(source: Path, path: Path) -> None:
    """`path` becomes a checkpoint of what export needs of `source`: its averages and iteration. One process calls it. Raises WeightsError."""
    stored = Stored(source)
    kept = {key: stored.empty(key) for key in stored.shapes if key.startswith("ema/") or key == "iteration"}
    stored.read(kept)
    path.unlink(missing_ok=True)  # or another of the same iteration would pass for this one
    save_checkpoint(path, kept, alone=True)


# ---------------------------------------------------------------- one file, as runs had it before


def _read_file(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path}: cannot read checkpoint: {error}") from None
    others = {name: part for name, part in state.items() if isinstance(part, Mapping) and "model" in part}
    flat = {key: torch.tensor(state[key]) for key in ("iteration", "seed") if key in state} | _flat_learner(state, "")
    for name, part in others.items():
        flat |= _flat_learner(part, f"{name}/")
    return flat


def _flat_learner(state: Mapping, prefix: str) -> State:
    """Its optimiser numbered parameters: matrices first, as groups_of has them, then the rest. Averages may be all there is."""
    if "model" not in state:
        return {f"{prefix}ema/{name}": t for name, t in state["ema"].items()}
    model = state["model"]
    names = sorted(model, key=lambda name: not is_matrix(model[name]))
    flat = {f"{prefix}{part}/{name}": t for part in ("model", "ema") for name, t in state[part].items()}
    for index, slots in state["optimiser"]["state"].items():
        flat |= {f"{prefix}optimiser/{names[index]}/{key}": torch.as_tensor(t) for key, t in slots.items()}
    return flat
