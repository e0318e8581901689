"""Conditions of a recipe over a frozen base, encoded once: text rows of every caption, and what silence sounds like.

umT5 and wav2vec are larger than a GPU in training has room for, so training reads RUN/latents/conditions instead;
stage `latents` fills it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.audio_features import AudioFrontEnd, LogMelFrontEnd, build_front_end, viseme_front_end
from liveavatar.conditioning.visemes import ARTICULATORS
from liveavatar.core import InputError, WeightsError
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.folders import open_folder
from liveavatar.models.viseme_encoder import load_viseme_encoder
from liveavatar.models.weights import load_hearing, load_text_encoder
from liveavatar.training import shards


class StoredConditions:
    """Stands where a TextEncoder does; raises InputError for a caption that was not encoded."""

    def __init__(self, run: str | Path):
        self.folder = Path(run) / "latents" / "conditions"

    def encode(self, caption: str) -> torch.Tensor:
        """Text rows float32 [n, text_dim]."""
        return self._read(caption_path(self.folder, caption), f"the caption {caption[:40]!r}")

    @property
    def silence(self) -> torch.Tensor:
        """Features float32 [L, Ca, 1] of one picture of silence."""
        return self._read(self.folder / "silence.npz", "silence")

    def _read(self, path: Path, what: str) -> torch.Tensor:
        if not path.exists():
            raise InputError(f"{path}: {what} was not encoded; run the latents stage")
        return torch.from_numpy(shards.read_arrays(path)[1]["rows"]).float()


def caption_path(folder: Path, caption: str) -> Path:
    """Where the rows of a caption lie."""
    return folder / f"{hashlib.sha256(caption.encode()).hexdigest()[:24]}.npz"


def write_rows(path: Path, rows: torch.Tensor, card: dict) -> None:
    """Rows of a caption or features, in fp16."""
    shards.write_arrays(path, card, rows=rows.cpu().half().numpy())


def store_conditions(base: str, run: str | Path, captions: Iterable[str], front_end: AudioFrontEnd) -> int:
    """Encode the captions that are not there, and silence, with the encoders of folder `base`; returns how many texts were.
    No caption, for guidance, is one of them."""
    folder = Path(run) / "latents" / "conditions"
    if not (folder / "silence.npz").exists():
        # One picture by itself: of a second of silence the middle, so that nothing but silence is in reach.
        write_rows(folder / "silence.npz", front_end.features_of(np.zeros(16_000, np.float32), 25)[..., 12:13], {})
    missing = sorted(caption for caption in {"", *captions} if not caption_path(folder, caption).exists())
    encoder = load_text_encoder(base, dtype=torch.bfloat16) if missing else None
    for caption in missing:
        write_rows(caption_path(folder, caption), encoder.encode(caption), {"caption": caption})
    return len(missing)


def hears_visemes(model: Mapping) -> bool:
    """Whether a transformer of these sizes takes articulators; else it takes the spectrum."""
    return model.get("audio_dim") == len(ARTICULATORS)


def front_end_of_run(model: Mapping, run: str | Path) -> AudioFrontEnd:
    """What a tiny avatar hears through: RUN/visemes where `model`, the sizes of its transformer, says that it takes articulators, else the
    spectrum. Raises WeightsError before stage `visemes`."""
    if hears_visemes(model):
        if not (Path(run) / "visemes").is_dir():
            raise WeightsError(f"{run}/visemes: what this avatar hears through is not there; run the visemes stage")
        return viseme_front_end(load_viseme_encoder(Path(run) / "visemes"))
    return LogMelFrontEnd()


def silence_of(text: TextEncoder | StoredConditions, front_end: AudioFrontEnd | None) -> torch.Tensor:
    """Features [L, Ca, 1] of silence: those that lie beside the texts of a recipe over a base, else the front end's."""
    return text.silence if isinstance(text, StoredConditions) else front_end.features_of(np.zeros(0, np.float32), 1)


def front_end_of(base: str) -> AudioFrontEnd:
    """The front end of a checkpoint folder. Raises WeightsError."""
    return build_front_end(open_folder(base).audio, load_hearing(base))
