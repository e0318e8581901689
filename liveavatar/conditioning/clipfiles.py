"""Clip files: one stretch of video and what is known about it, one uncompressed .npz each; made by training, read by training and evaluation.

A clip file is written under a temporary name and renamed, so a reader never sees half of one and a
killed writer leaves nothing that looks finished.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from liveavatar.core import InputError


@dataclass(frozen=True)
class Clip:
    """T pictures of one person speaking and the truth about them (training.md 5.7), or what a tracker makes of them.

    frames uint8 [T,H,W,3]; reference uint8 [H,W,3] (closed mouth, looking ahead, or aside as `turned` says); pcm int16 [n] at
    16 kHz, sample 0 at picture 0, longer than the pictures by the audio look-ahead; mouth float32
    [T,4] and eyes float32 [T,2,4] boxes x0 y0 x1 y1 in pixels; aperture, width, lid float32 [T] in
    distances between the eyes' middles; card: JSON-ready description. Only where the generator made it:
    units float32 [T,52], pose float32 [T,3] degrees.
    """

    frames: np.ndarray
    reference: np.ndarray
    pcm: np.ndarray
    mouth: np.ndarray
    eyes: np.ndarray
    aperture: np.ndarray
    width: np.ndarray
    lid: np.ndarray
    card: dict
    units: np.ndarray | None = None
    pose: np.ndarray | None = None

    @property
    def caption(self) -> str:
        return self.card["caption"]

    @property
    def turned(self) -> float:
        """Degrees of yaw that the reference, and the head on the whole, are turned by."""
        return self.card.get("turned", 0.0)

    @property
    def sound(self) -> np.ndarray:
        """pcm as float32 [n] in -1..1."""
        return self.pcm.astype(np.float32) / 32768.0

    def cut(self, pictures: int) -> Clip:
        """The first so many pictures and their labels; sound and card stay whole."""
        timed = ("frames", "mouth", "eyes", "aperture", "width", "lid", "units", "pose")
        return replace(self, **{name: array[:pictures] for name in timed if (array := getattr(self, name)) is not None})


def write_arrays(path: str | Path, card: dict, **arrays: np.ndarray) -> None:
    """An .npz with `card` as JSON, written whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "wb") as stream:
        np.savez(stream, card=np.array(json.dumps(card, sort_keys=True)), **arrays)
    os.replace(part, path)


def read_arrays(path: str | Path, *only: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(card, arrays) of a file of write_arrays; only: names of those to read. Raises InputError when it is not one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in (("card", *only) if only else stored.files)}
        return json.loads(str(arrays.pop("card"))), arrays
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a clip file: {error}") from None


def write_clip(path: str | Path, clip: Clip) -> None:
    """Store a clip; see Clip for the arrays."""
    arrays = {f.name: getattr(clip, f.name) for f in fields(Clip) if f.name != "card"}
    write_arrays(path, clip.card, **{name: array for name, array in arrays.items() if array is not None})


def read_clip(path: str | Path) -> Clip:
    """The clip of a file. Raises InputError when it is not one."""
    card, arrays = read_arrays(path)
    wanted = {f.name for f in fields(Clip)} - {"card"}
    if not wanted - {"units", "pose"} <= set(arrays) <= wanted:
        raise InputError(f"{path}: holds {', '.join(sorted(arrays))}; a clip has {', '.join(sorted(wanted))}")
    return Clip(card=card, **arrays)


def clip_path(folder: str | Path, split: str, index: int) -> Path:
    """Where clip `index` of a split ("train" or "held") lies."""
    return Path(folder) / split / f"clip_{index:06d}.npz"


def number_of(path: Path) -> int:
    """Index of a clip file in its split."""
    return int(path.stem.removeprefix("clip_"))


def clip_paths(folder: str | Path, split: str) -> list[Path]:
    """Finished clips of a split, in order of index; more may appear while a renderer runs."""
    return sorted((Path(folder) / split).glob("clip_*.npz"))
