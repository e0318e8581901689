"""What training on a lent GPU takes along and brings home, in files of at most 15 MB: shards of encoded clips, averages of stages.

    python bench/carried.py shards runs/tiny192 runs/tiny192-gpu       # encoded clips -> runs/tiny192-gpu/latents/train-*.tar, and visemes/
    python bench/carried.py out runs/tiny192 runs/tiny192-gpu/carried  # averages of its finished stages, in bf16, those not sent yet
    python bench/carried.py in FOLDER runs/tiny192                     # and back: checkpoints that later stages start from

A stage that is cut off goes on where its machine is kept; its optimiser, some 100 MB, does not travel.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from liveavatar.training import shards
from liveavatar.training.checkpoints import Stored, checkpoint_path, save_checkpoint
from safetensors.torch import load_file, save_file

FILE = 15_000_000  # bytes; 16 MiB come back at most
STAGES = 3  # so many at once: 8 files and 64 MiB come back at most


def pack(run: Path, away: Path) -> list[Path]:
    """The encoded clips of RUN as shards in AWAY/latents, and the encoder that they were heard through in AWAY/visemes."""
    files = shards.clip_paths(run / "latents", "train")
    made = shards.pack(run / "latents", "train", max(1, FILE // max(p.stat().st_size for p in files)) if files else 1)
    (away / "latents").mkdir(parents=True, exist_ok=True)
    if (run / "visemes").exists():
        shutil.copytree(run / "visemes", away / "visemes", dirs_exist_ok=True)
    return [shard.rename(away / "latents" / shard.name) for shard in made]


def out(run: Path, folder: Path) -> list[str]:
    """Averages of the stages that are done (RUN/STAGE.done, or what Stage 2 kept) and have not been written yet."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = sorted([p.with_suffix(".pt") for p in run.glob("*.done")] + list(run.glob("dmd_[0-9]*.pt")))
    todo = [path for path in ready if not path.with_suffix(".sent").exists()][:STAGES]
    for path in todo:
        stored = Stored(path)
        keys = [key for key in stored.shapes if key.startswith("ema/")]
        state = {key: stored.empty(key) for key in keys}
        stored.read(state)
        pieces, size = [{"iteration": torch.tensor(stored.iteration)}], 0
        for key, tensor in state.items():
            tensor = tensor.bfloat16()
            if size + tensor.nbytes > FILE:
                pieces, size = [*pieces, {}], 0
            pieces[-1][key], size = tensor, size + tensor.nbytes
        for number, piece in enumerate(pieces):
            save_file(piece, folder / f"{path.stem}-{number}.safetensors")
        path.with_suffix(".sent").touch()
    return [path.stem for path in todo]


def back(folder: Path, run: Path) -> list[str]:
    """Checkpoints RUN/STAGE.pt of what `out` wrote, for stages that RUN does not have."""
    made = []
    for first in sorted(folder.glob("*-0.safetensors")):
        stage = first.name.removesuffix("-0.safetensors")
        path = checkpoint_path(run, stage)
        if path.exists():
            continue
        state = {key: t for piece in sorted(folder.glob(f"{stage}-[0-9].safetensors")) for key, t in load_file(piece).items()}
        run.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, state, alone=True)
        path.with_suffix(".done").touch(), path.with_suffix(".sent").touch()
        made.append(stage)
    return made


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("shards", "out", "in"):
        sys.exit(__doc__)
    for name in {"shards": pack, "out": out, "in": back}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3])):
        print(name)
