"""What training stores: clip files (conditioning/clipfiles.py has their form), and encoded clips packed into tar shards.

A shard is a webdataset tar: members NAME.json (the card) and NAME.ARRAY.npy, so that other programs can stream it. Ours reads
members where they lie, by offset: a batch stays a function of its draws, and a resumed run repeats it.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from liveavatar.conditioning.clipfiles import Clip, clip_path, clip_paths, number_of, read_arrays, read_clip, write_arrays, write_clip
from liveavatar.core import ConfigError, InputError

__all__ = ["GENERATOR_VERSION", "Clip", "Packed", "clip_path", "clip_paths", "missing", "number_of", "pack", "read_arrays", "read_clip",
           "write_arrays", "write_clip"]  # fmt: skip

GENERATOR_VERSION = 1  # raise when the same seed would give other bytes
CARD, ARRAY = ".json", ".npy"


def missing(paths: Iterable[Path], place: Callable[[Path], Path]) -> list[Path]:
    """Those of `paths` of which place(path) was not made yet: with them a stage that was stopped goes on."""
    return [path for path in paths if not place(path).exists()]


def pack(folder: str | Path, split: str, per_shard: int = 256) -> list[Path]:
    """FOLDER/SPLIT/clip_*.npz into FOLDER/SPLIT-000000.tar and so on; returns the shards. The files stay.

    Raises ConfigError without webdataset, InputError without clips.
    """
    try:
        from webdataset import TarWriter
    except ImportError:
        raise ConfigError("writing shards needs webdataset: pip install 'liveavatar[videos]'") from None
    paths, made = clip_paths(folder, split), []
    if not paths:
        raise InputError(f"{Path(folder) / split}: no clips to pack")
    for number in range(0, len(paths), per_shard):
        made.append(Path(folder) / f"{split}-{number // per_shard:06d}.tar")
        part = made[-1].with_suffix(".part")
        with TarWriter(str(part), mtime=0) as tar:
            for path in paths[number : number + per_shard]:
                card, arrays = read_arrays(path)
                tar.write({"__key__": path.stem, "json": card, **{f"{name}.npy": array for name, array in arrays.items()}})
        part.replace(made[-1])
    return made


class Packed:
    """All clips in the shards of a split. cards: by FOLDER/SPLIT-N.tar/NAME; arrays are read when asked for.

    Raises InputError when a shard is damaged or holds a clip without its card.
    """

    def __init__(self, folder: str | Path, split: str):
        self.cards: dict[Path, dict] = {}
        self._places: dict[Path, dict[str, tuple[int, int]]] = defaultdict(dict)
        for shard in sorted(Path(folder).glob(f"{split}-*.tar")):
            try:
                self._list(shard)
            except (tarfile.TarError, ValueError, OSError) as error:
                raise InputError(f"{shard}: not a readable shard: {error}") from None
        for path in self._places.keys() - self.cards.keys():
            raise InputError(f"{path.parent}: {path.name} has no card")

    def _list(self, shard: Path) -> None:
        with tarfile.open(shard) as tar:
            for member in tar:
                name, _, kind = member.name.partition(".")
                if f".{kind}" == CARD:
                    self.cards[shard / name] = json.load(tar.extractfile(member))
                elif kind.endswith(ARRAY):
                    self._places[shard / name][kind.removesuffix(ARRAY)] = (member.offset_data, member.size)

    def arrays(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays of one clip, by name."""
        with open(path.parent, "rb") as file:
            return {name: _array(file, *place) for name, place in self._places[path].items()}


def _array(file, offset: int, size: int) -> np.ndarray:
    file.seek(offset)
    return np.load(io.BytesIO(file.read(size)), allow_pickle=False)
