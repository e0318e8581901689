"""Conditions of a recipe over a frozen base, encoded once: text rows of every caption, and what silence sounds like.

umT5 and wav2vec are larger than a GPU in training has room for, so training reads RUN/latents/conditions instead;
stage `latents` fills it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from liveavatar.conditioning.audio_features import AudioFrontEnd, LogMelFrontEnd, build_front_end
from liveavatar.core import InputError
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.folders import open_folder
from liveavatar.models.weights import load_text_encoder, load_wav2vec
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


def silence_of(text: TextEncoder | StoredConditions) -> torch.Tensor:
    """Features [L, Ca, 1] of silence that go with a recipe's texts."""
    return text.silence if isinstance(text, StoredConditions) else LogMelFrontEnd().features_of(np.zeros(0, np.float32), 1)


def front_end_of(base: str) -> AudioFrontEnd:
    """The front end of a checkpoint folder. Raises WeightsError."""
    audio = open_folder(base).audio
    return build_front_end(audio, load_wav2vec(base) if audio.get("kind") == "wav2vec2" else None)
