"""Sync-C and Sync-D: SyncNet (Chung and Zisserman, ACCV 2016 workshops) with the user's syncnet_v2 weights.

The layout of the network, the MFCC and the crop are those of the authors' public release, so that its weights load
and its numbers compare. One thing differs: pictures are not written as JPEG and XVID in between, nothing is encoded
again before it is judged. 25 pictures per second, 16 kHz mono.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.core import FPS, SAMPLE_RATE

SHIFT = 15  # pictures the sound is moved either way
SPAN, MFCC_SPAN, MFCC_PER_PICTURE = 5, 20, 4  # pictures and MFCC columns one comparison looks at
SIDE = 224
CROP_SCALE = 0.40
GREY = 110  # around the picture, where a crop reaches beyond it
SMOOTHING = 13  # pictures of the median filter over boxes
MIN_TRACK = 25  # pictures; shorter tracks are left out and counted
WIDTH = 1024


# ---------------------------------------------------------------- the network


class SyncNet(nn.Module):
    """Two towers into one space. Tensor names are those of syncnet_v2.model."""

    def __init__(self):
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_block(nn.Conv2d(1, 64, 3, padding=1)), nn.MaxPool2d(1, 1),
            *_block(nn.Conv2d(64, 192, 3, padding=1)), nn.MaxPool2d(3, (1, 2)),
            *_block(nn.Conv2d(192, 384, 3, padding=1)), *_block(nn.Conv2d(384, 256, 3, padding=1)),
            *_block(nn.Conv2d(256, 256, 3, padding=1)), nn.MaxPool2d(3, 2),
            *_block(nn.Conv2d(256, 512, (5, 4))),
        )  # fmt: skip
        self.netcnnlip = nn.Sequential(
            *_block(nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2))), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_block(nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1))), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *(layer for _ in range(3) for layer in _block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_block(nn.Conv3d(256, 512, (1, 6, 6))),
        )  # fmt: skip
        self.netfcaud, self.netfclip = (
            nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, WIDTH)) for _ in range(2))

    def audio(self, mfcc: torch.Tensor) -> torch.Tensor:
        """[n, 1, 13, 20] -> [n, 1024]"""
        return self.netfcaud(self.netcnnaud(mfcc).flatten(1))

    def lips(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, 5, 224, 224], BGR, 0..255 -> [n, 1024]"""
        return self.netfclip(self.netcnnlip(pictures).flatten(1))


def _block(layer: nn.Module) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm3d
    return layer, norm(layer.out_channels), nn.ReLU()


# ---------------------------------------------------------------- sound


def mfcc(pcm: np.ndarray) -> np.ndarray:
    """pcm float [n] in -1..1 -> float64 [13, T], 100 columns a second, the first coefficient log energy.

    Windows of 25 ms without taper, 26 mel bands from 0 to 8 kHz, pre-emphasis .97, lifter 22: what the authors' release uses.
    """
    from scipy.fft import dct

    signal = np.asarray(pcm, np.float64) * 32768
    signal = np.append(signal[:1], signal[1:] - 0.97 * signal[:-1])
    count = 1 + max(0, -(-(len(signal) - 400) // 160))
    signal = np.pad(signal, (0, max(0, 400 + 160 * (count - 1) - len(signal))))
    windows = np.lib.stride_tricks.sliding_window_view(signal, 400)[::160][:count]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2 / 512
    tiny = np.finfo(float).eps
    bands = np.maximum(power @ _mel_bands().T, tiny)
    lifter = 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
    cepstrum = dct(np.log(bands), type=2, axis=1, norm="ortho")[:, :13] * lifter
    cepstrum[:, 0] = np.log(np.maximum(power.sum(1), tiny))
    return cepstrum.T


def _mel_bands() -> np.ndarray:
    """Triangles [26, 257] whose corners lie on whole bins of the 512-point spectrum."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, 28) / 2595) - 1)
    corners = np.floor(513 * hertz / SAMPLE_RATE)
    bins, bands = np.arange(257), np.zeros((26, 257))
    for row, (low, middle, high) in zip(bands, zip(corners, corners[1:], corners[2:], strict=False), strict=True):
        rising, falling = (bins >= low) & (bins < middle), (bins >= middle) & (bins < high)
        row[rising] = (bins[rising] - low) / (middle - low)
        row[falling] = (high - bins[falling]) / (high - middle)
    return bands


# ---------------------------------------------------------------- pictures


def crop_face(pictures: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """pictures uint8 [T, H, W, 3] and face boxes [T, 4] (x0 y0 x1 y1, pixels) -> uint8 [T, 224, 224, 3].

    Boxes are smoothed, grown to 1.4 half sides left and right and 1.8 below, and cut with grey beyond the edge.
    """
    import cv2
    from scipy.signal import medfilt

    centre_x, centre_y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    half = np.maximum(boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]) / 2
    half, centre_x, centre_y = (medfilt(values, SMOOTHING) for values in (half, centre_x, centre_y))
    cut = []
    for picture, s, x, y in zip(pictures, half, centre_x, centre_y, strict=True):
        margin = int(s * (1 + 2 * CROP_SCALE))
        padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), constant_values=GREY)
        x, y = x + margin, y + margin
        face = padded[int(y - s) : int(y + s * (1 + 2 * CROP_SCALE)), int(x - s * (1 + CROP_SCALE)) : int(x + s * (1 + CROP_SCALE))]
        cut.append(cv2.resize(face, (SIDE, SIDE)))
    return np.stack(cut)


# ---------------------------------------------------------------- the distance


@dataclass(frozen=True)
class Sync:
    """confidence: Sync-C. distance: Sync-D. offset_ms: how late the sound is, positive: late. pictures: compared."""

    confidence: float
    distance: float
    offset_ms: float
    pictures: int


def verdict(lips: torch.Tensor, audio: torch.Tensor, shift: int = SHIFT) -> Sync:
    """lips, audio [T, D]: Sync-D = least mean distance over shifts, Sync-C = median over shifts less that."""
    assert lips.shape == audio.shape and lips.ndim == 2, (lips.shape, audio.shape)
    moved = F.pad(audio, (0, 0, shift, shift)).unfold(0, len(lips), 1)  # [2 shift + 1, D, T]
    means = torch.stack([F.pairwise_distance(lips, one.T).mean() for one in moved])
    best = int(means.argmin())
    return Sync(float(means.median() - means[best]), float(means[best]), (best - shift) * 1000 / FPS, len(lips))


@torch.inference_mode()
def compare(net: SyncNet, faces: np.ndarray, pcm: np.ndarray, batch: int = 20) -> Sync | None:
    """faces uint8 [T, 224, 224, 3] RGB at 25 per second, pcm float [n] at 16 kHz from the same moment; None: too short."""
    count = min(len(faces), len(pcm) * FPS // SAMPLE_RATE) - SPAN
    if count < MIN_TRACK - SPAN:
        return None
    columns = torch.from_numpy(mfcc(pcm)).float()
    bgr = torch.from_numpy(np.ascontiguousarray(faces[..., ::-1])).permute(3, 0, 1, 2)
    lips, audio = [], []
    for begin in range(0, count, batch):
        places = range(begin, min(begin + batch, count))
        lips.append(net.lips(torch.stack([bgr[:, p : p + SPAN] for p in places]).float()))
        audio.append(net.audio(torch.stack([columns[None, :, MFCC_PER_PICTURE * p : MFCC_PER_PICTURE * p + MFCC_SPAN] for p in places])))
    return verdict(torch.cat(lips), torch.cat(audio))
