"""From sound to what a mouth does: the speech encoders of the embedded avatar.

A 14B transformer is given wav2vec2, which has heard a thousand hours. A small one that is given the spectrum itself learns a few voices by
heart and follows strangers badly; these networks hear hours of many voices without a picture (training/hearing.py) and tell it
the eight articulators of visemes.yaml (motion.md section 7). VisemeEncoder knows nothing else (gated dilated convolutions as in WaveNet,
arXiv 1609.03499). MoonshineVisemes begins as the first layers of a speech recogniser that has heard people (Moonshine, arXiv 2410.15608).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.config import build
from liveavatar.core import FPS, SAMPLE_RATE, ConfigError, WeightsError
from liveavatar.models import tensorfiles

MELS, ARTICULATORS = 40, 8
PICTURE = SAMPLE_RATE // FPS  # samples
WEIGHTS, CONFIG, MOONSHINE, LAYOUT = "model.safetensors", "config.json", "moonshine", "a viseme encoder's folder"


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


# ---------------------------------------------------------------- on the first layers of a recogniser

TOKEN, AROUND = 384, 447  # samples from token to token, and on either side of the one that a token is centred on
NEAR = 8  # tokens before a block that its head sees


@dataclass(frozen=True, kw_only=True)
class MoonshineSizes:
    """layers, hidden, intermediate, heads: of the recogniser's encoder that are kept; those of Moonshine tiny. width: of the head on top.
    context, ahead: tokens of 24 ms that are heard before a block of pictures, and after its last; 4 of them end 100 ms after a block."""

    layers: int = 6
    hidden: int = 288
    intermediate: int = 1152
    heads: int = 8
    width: int = 96
    context: int = 40
    ahead: int = 4

    def __post_init__(self):
        if min(asdict(self).values()) < 1 or self.context < NEAR or self.hidden % self.heads:
            raise ConfigError(f"viseme encoder: {asdict(self)}: at least 1 each, {NEAR} of context, and hidden a multiple of heads")

    def tokens(self, pictures: int) -> int:
        """Tokens from the first picture of a block to the last that is heard."""
        return math.ceil((pictures - 1) * PICTURE / TOKEN) + self.ahead + 1

    def margins(self, pictures: int) -> tuple[int, int]:
        """Samples heard before a block of so many pictures, and from its beginning on."""
        return self.context * TOKEN + AROUND, (self.tokens(pictures) - 1) * TOKEN + AROUND + 1


class MoonshineVisemes(nn.Module):
    """Sound -> articulators at every picture of a block. Windows begin where blocks do, so that one is heard alike in any stream."""

    def __init__(self, sizes: MoonshineSizes):
        super().__init__()
        from transformers import MoonshineConfig
        from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder

        self.sizes, width = sizes, sizes.width
        self.encoder = MoonshineEncoder(MoonshineConfig(
            encoder_num_hidden_layers=sizes.layers, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
            encoder_num_attention_heads=sizes.heads, encoder_num_key_value_heads=sizes.heads))  # fmt: skip
        self.enter = nn.Conv1d(sizes.hidden, width, 1)
        self.mixed = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2))
        self.leave = nn.Conv1d(width, ARTICULATORS, 1)

    def forward(self, pcm: torch.Tensor, pictures: int) -> torch.Tensor:
        """pcm float32 [B, sum of margins], 16 kHz -> [B,8,pictures], about 0..1."""
        assert pcm.shape[1] == sum(self.sizes.margins(pictures)), f"{pcm.shape[1]} samples for {pictures} pictures"
        x = self.enter(self.encoder(pcm).last_hidden_state[:, self.sizes.context - NEAR :].transpose(1, 2))
        for mixed in self.mixed:
            x = x + F.relu(mixed(F.relu(x)))
        low, weight = _between_tokens(pictures)
        x = self.leave(x).float()
        return torch.lerp(x[..., low], x[..., low + 1], weight)


@lru_cache(maxsize=8)
def _between_tokens(pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each picture the token at or before it, of those the head sees, and how far it is to the next."""
    with torch.inference_mode(False):
        at = NEAR + torch.arange(pictures, dtype=torch.float64) * PICTURE / TOKEN
        return at.floor().long(), (at - at.floor()).float()


# ---------------------------------------------------------------- folders


def sections_of(encoder: VisemeEncoder | MoonshineVisemes) -> dict:
    """What the config.json of its folder says."""
    return {**({"network": MOONSHINE} if isinstance(encoder, MoonshineVisemes) else {}), **asdict(encoder.sizes)}


def plan_viseme_encoder(folder: str | Path) -> tensorfiles.LoadPlan:
    """How one is filled. Raises WeightsError."""
    folder = Path(folder)
    config, source = tensorfiles.read_json(folder / CONFIG), tensorfiles.open_file(folder / WEIGHTS)
    network = config.pop("network", "")
    try:
        if network == MOONSHINE:
            with torch.random.fork_rng(devices=[]):  # not on the meta device: it has a table that no file holds
                return tensorfiles.LoadPlan(MoonshineVisemes(build(MoonshineSizes, config)), tensorfiles.from_int8(source), LAYOUT)
        if network:
            raise ConfigError(f"network={network!r}: {MOONSHINE}, or none")
        with torch.device("meta"):
            return tensorfiles.LoadPlan(VisemeEncoder(build(VisemeSizes, config)), source, LAYOUT)
    except ConfigError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from None


def load_viseme_encoder(folder: str | Path) -> VisemeEncoder | MoonshineVisemes:
    """The one in a folder, float32, on the CPU, in eval mode. Raises WeightsError."""
    return plan_viseme_encoder(folder).load(tensorfiles.cast_to(torch.float32, "cpu"))
