"""From log-mel to what a mouth does: the speech encoder of the embedded avatar.

A 14B transformer is given wav2vec2, which has heard a thousand hours. A small one that is given the spectrum itself learns a few voices by
heart and follows strangers badly; this network hears hours of many voices without a picture (training/hearing.py) and tells it
the eight articulators of visemes.yaml (motion.md section 7; gated dilated convolutions as in WaveNet, arXiv 1609.03499).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.config import build
from liveavatar.core import ConfigError, WeightsError
from liveavatar.models import tensorfiles

MELS, ARTICULATORS = 40, 8
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class VisemeSizes:
    """width: channels. enter: ticks that the first convolution sees. dilations: of the convolutions of three taps that follow.
    ahead: ticks of 10 ms after the one that is told, of those it sees."""

    width: int = 96
    enter: int = 5
    dilations: tuple[int, ...] = (1, 1, 2, 4, 8, 8)
    ahead: int = 11

    def __post_init__(self):
        if self.width < 1 or self.enter < 1 or not self.dilations or min(self.dilations) < 1:
            raise ConfigError(f"viseme encoder: width={self.width}, enter={self.enter}, dilations={self.dilations}: at least 1 each")
        if not 0 <= self.ahead <= self.reach:
            raise ConfigError(f"viseme encoder: ahead={self.ahead}: 0 to the {self.reach} ticks beside its own that it sees")

    @property
    def reach(self) -> int:
        """Ticks beside the one that is told that are seen."""
        return self.enter - 1 + 2 * sum(self.dilations)


class VisemeEncoder(nn.Module):
    """Log-mel ticks, as conditioning/audio_features.py makes them -> articulators."""

    def __init__(self, sizes: VisemeSizes):
        super().__init__()
        self.sizes, width = sizes, sizes.width
        self.enter = nn.Conv1d(MELS, width, sizes.enter)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, dilation=d) for d in sizes.dilations)
        self.mixed = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in sizes.dilations)
        self.leave = nn.Conv1d(width, ARTICULATORS, 1)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        """mels float32 [B,40,reach+T] -> [B,8,T], about 0..1; column j tells of tick j + reach - ahead. Nothing is padded."""
        x = self.enter(mels)
        for dilation, gated, mixed in zip(self.sizes.dilations, self.gated, self.mixed):
            value, gate = gated(x).chunk(2, dim=1)
            x = x[..., 2 * dilation :] + mixed(F.relu(value) * torch.sigmoid(gate))
        return self.leave(x)


def plan_viseme_encoder(folder: str | Path) -> tensorfiles.LoadPlan:
    """How one is filled. Raises WeightsError."""
    folder = Path(folder)
    try:
        sizes = build(VisemeSizes, tensorfiles.read_json(folder / CONFIG))
    except ConfigError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from None
    with torch.device("meta"):
        return tensorfiles.LoadPlan(VisemeEncoder(sizes), tensorfiles.open_file(folder / WEIGHTS), "a viseme encoder's folder")


def load_viseme_encoder(folder: str | Path) -> VisemeEncoder:
    """The one in a folder, float32, on the CPU, in eval mode. Raises WeightsError."""
    return plan_viseme_encoder(folder).load(tensorfiles.cast_to(torch.float32, "cpu"))
