"""The judge network: what a picture of one of our heads shows, read from the picture alone (training.md section 1).

It knows nothing of speech or of the network that drives the avatar, so its figures are no echo of either. It is
trained on renders (training/probing.py) and is worth something on such heads only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from liveavatar.config import build
from liveavatar.core import ConfigError, WeightsError
from liveavatar.models import tensorfiles

READINGS = ("aperture", "width", "lid", "yaw", "pitch", "roll")
# (mean, spread) of the readings on the corpus: the network answers in these units.
TYPICAL = {"aperture": (0.065, 0.087), "width": (0.80, 0.10), "lid": (0.19, 0.036), "yaw": (0.0, 3.1), "pitch": (0.0, 2.1), "roll": (0.0, 1.3)}
FORMAT = 1
WEIGHTS, CARD = "probe.safetensors", "probe.json"
ROUNDING = 1e-3  # relative: an eigenvalue more negative than this is none
AT_ONCE = 64  # pictures per forward: memory stays flat however long a video is


@dataclass(frozen=True, kw_only=True)
class ProbeSizes:
    """size: side in pixels that pictures are brought to. widths, blocks: channels and residual blocks at 1/4, 1/8 and 1/16
    of it. code: channels per cell before the heads. identity: length of the embedding."""

    size: int = 128
    widths: tuple[int, ...] = (64, 96, 128)
    blocks: tuple[int, ...] = (1, 2, 1)
    code: int = 24
    hidden: int = 128
    identity: int = 64

    def __post_init__(self):
        if len(self.widths) != len(self.blocks) or any(w % 8 for w in self.widths):
            raise ConfigError(f"probe sizes: widths={self.widths}, blocks={self.blocks}: as many of one as of the other, widths multiples of 8")
        if self.size <= 0 or self.size % (4 * 2 ** (len(self.widths) - 1)):
            raise ConfigError(f"probe sizes: size={self.size}: must be a multiple of {4 * 2 ** (len(self.widths) - 1)} pixels")


@dataclass(frozen=True)
class Seen:
    """What the probe reads off T pictures, all float32.

    aperture, width, lid [T]: lips' gap, mouth corners' distance and the mean opening of both eyes, in eye distances.
    yaw, pitch, roll [T]: degrees, signs as in training/synth/head.py. identity [T,E]: unit vectors, see
    `identity_error`. features [T,P]: pooled, for `frechet`.
    """

    aperture: np.ndarray
    width: np.ndarray
    lid: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray
    roll: np.ndarray
    identity: np.ndarray
    features: np.ndarray

    @staticmethod
    def join(parts: Iterable[Seen]) -> Seen:
        """One after the other in time."""
        parts = list(parts)
        return Seen(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Seen)))

    def __getitem__(self, pictures: slice) -> Seen:
        return Seen(*(getattr(self, f.name)[pictures] for f in fields(Seen)))

    def __len__(self) -> int:
        return len(self.aperture)


class Residual(nn.Module):
    """x + two convolutions of its normalised self."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.relu(self.first(F.relu(self.norm(x)))))


class Probe(nn.Module):
    """Pictures -> readings, identity, features. A small residual network; the heads see where things are, not only that they are."""

    def __init__(self, sizes: ProbeSizes = ProbeSizes()):
        super().__init__()
        self.sizes = sizes
        before = 3 * 4 * 4
        stages = []
        for i, (width, blocks) in enumerate(zip(sizes.widths, sizes.blocks)):
            enter = nn.Conv2d(before, width, 3, stride=1 if i == 0 else 2, padding=1)
            stages.append(nn.Sequential(enter, *(Residual(width) for _ in range(blocks))))
            before = width
        self.stages = nn.ModuleList(stages)
        self.code = nn.Conv2d(before, sizes.code, 1)
        cells = (sizes.size // (4 * 2 ** (len(stages) - 1))) ** 2
        self.mixed = nn.Linear(sizes.code * cells, sizes.hidden)
        self.readings = nn.Linear(sizes.hidden, len(READINGS))
        self.identity = nn.Linear(sizes.code * cells, sizes.identity)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Float [-1,1] [T,3,size,size] -> readings [T,6] in units of TYPICAL, identity [T,E] not normalised, features [T,P]."""
        x, pooled = F.pixel_unshuffle(pictures, 4).contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            x = stage(x)
            pooled.append(x.float().mean(dim=(2, 3)))
        code = F.relu(self.code(F.relu(x))).flatten(1)
        return self.readings(F.relu(self.mixed(code))).float(), self.identity(code).float(), torch.cat(pooled, dim=1)

    @torch.no_grad()
    def look(self, pictures: np.ndarray | torch.Tensor) -> Seen:
        """Read T pictures: [T,3,H,W] or [T,H,W,3], uint8, or float in [-1,1]; any size, brought to the probe's own."""
        pictures = torch.as_tensor(pictures)
        if pictures.shape[1] != 3:
            pictures = pictures.permute(0, 3, 1, 2)
        assert pictures.dim() == 4 and pictures.shape[1] == 3 and len(pictures), pictures.shape
        return Seen.join(self._look(part) for part in pictures.split(AT_ONCE))

    def _look(self, pictures: torch.Tensor) -> Seen:
        weight = self.code.weight
        x = pictures.to(weight.device).float()
        x = x / 127.5 - 1 if pictures.dtype == torch.uint8 else x
        if x.shape[-2:] != (self.sizes.size, self.sizes.size):
            x = F.interpolate(x, (self.sizes.size, self.sizes.size), mode="bilinear", antialias=True, align_corners=False)
        readings, identity, features = self(x.to(weight.dtype))
        scaled = [readings[:, i].cpu().numpy() * TYPICAL[name][1] + TYPICAL[name][0] for i, name in enumerate(READINGS)]
        return Seen(*scaled, F.normalize(identity, dim=1).cpu().numpy(), features.cpu().numpy())


def units_of(**labels: np.ndarray) -> np.ndarray:
    """Labels [T] by the names of READINGS -> float32 [T,6] in units of TYPICAL, what `Probe.forward` answers in."""
    return np.stack([(labels[name] - TYPICAL[name][0]) / TYPICAL[name][1] for name in READINGS], axis=1).astype(np.float32)


# ---------------------------------------------------------------- distances


def identity_error(identity: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`probe_id` [T]: 1 - cosine between embeddings [T,E] and one reference [E] (or one each); 0 is the same face."""
    return 1.0 - (identity * reference).sum(-1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to rows a [n,P] and b [m,P]: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    The root's trace is that of the eigenvalues of S1^1/2 S2 S1^1/2, which is symmetric: no complex numbers to drop. Of the
    probe's features it is `probe_fd`, no FID, whose network is another.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    one, two = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ two @ root)
    assert inner.min() > -ROUNDING * max(inner.max(), 1e-12), "a covariance that is none"
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * np.sqrt(np.clip(inner, 0, None)).sum())


# ---------------------------------------------------------------- files


def save_probe(folder: str | Path, probe: Probe, card: dict) -> None:
    """Write FOLDER/probe.safetensors (fp16) and probe.json (sizes and card), each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in probe.state_dict().items()}
    part = folder / (WEIGHTS + ".part")
    save_file(state, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS)
    part = folder / (CARD + ".part")
    part.write_text(json.dumps({"format": FORMAT, "sizes": asdict(probe.sizes), "card": card}, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / CARD)


def load_probe(folder: str | Path) -> tuple[Probe, dict]:
    """The probe of a folder, fp32 in eval mode, and its card. Raises WeightsError naming the file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no probe here; train one: liveavatar train probe --config configs/train_tiny.yaml")
    stored = tensorfiles.read_json(folder / CARD)
    if stored.get("format") != FORMAT:
        raise WeightsError(f"{folder / CARD}: format {stored.get('format')!r}, this version reads {FORMAT}; train the probe again")
    try:
        sizes = build(ProbeSizes, stored.get("sizes"), str(folder / CARD), "sizes")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    with torch.device("meta"):
        empty = Probe(sizes)
    plan = tensorfiles.LoadPlan(empty, tensorfiles.open_file(folder / WEIGHTS), "a probe of ours")
    probe = plan.load(tensorfiles.cast_to(torch.float32, "cpu"))
    return probe.to(memory_format=torch.channels_last), stored.get("card", {})
