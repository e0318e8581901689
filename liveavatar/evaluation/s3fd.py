"""Faces by S3FD (Zhang et al., ICCV 2017) with the user's sfd_face weights: the detector behind published Sync-C.

The layout and the constants are those of the detector in the public SyncNet release, so that its weights load and its boxes compare.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from liveavatar.evaluation.syncnet import MIN_TRACK

MEAN = (123.0, 117.0, 104.0)  # of red, green, blue
LEVELS = ((256, 4, 16), (512, 8, 32), (512, 16, 64), (1024, 32, 128), (512, 64, 256), (256, 128, 512))  # channels, stride, box
CENTRE_STEP, SIZE_STEP = 0.1, 0.2  # units of the regression
CONFIDENCE, SCALE = 0.9, 0.25
KEEP_OVERLAP = 0.1  # boxes that share more than this are one face
SAME_FACE = 0.5  # intersection over union with the picture before
MAX_MISSED = 25  # pictures a face may be lost
MIN_FACE = 100  # pixels


class S3FD(nn.Module):
    """Six levels of boxes on a VGG16. Tensor names are those of sfd_face.pth."""

    def __init__(self):
        super().__init__()
        self.vgg = nn.ModuleList(_vgg())
        self.L2Norm3_3, self.L2Norm4_3, self.L2Norm5_3 = (_Scaled(n) for n in (256, 512, 512))
        self.extras = nn.ModuleList([nn.Conv2d(1024, 256, 1), nn.Conv2d(256, 512, 3, 2, 1), nn.Conv2d(512, 128, 1), nn.Conv2d(128, 256, 3, 2, 1)])
        self.loc = nn.ModuleList([nn.Conv2d(channels, 4, 3, padding=1) for channels, _, _ in LEVELS])
        self.conf = nn.ModuleList([nn.Conv2d(channels, 4 if k == 0 else 2, 3, padding=1) for k, (channels, _, _) in enumerate(LEVELS)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [1, 3, H, W], RGB less MEAN -> boxes [n, 4] in pixels of x, and the probability [n] of a face in each."""
        boxes, chances = [], []
        for k, level in enumerate(self._levels(x)):
            scores, offsets = self.conf[k](level), self.loc[k](level)
            if k == 0:  # the finest level tells three kinds of background apart; the likeliest counts
                scores = torch.cat([scores[:, :3].amax(1, keepdim=True), scores[:, 3:]], 1)
            boxes.append(_boxes(offsets[0], *LEVELS[k][1:]))
            chances.append(scores[0].softmax(0)[1].flatten())
        return torch.cat(boxes), torch.cat(chances)

    def _levels(self, x: torch.Tensor) -> list[torch.Tensor]:
        levels, norms = [], {15: self.L2Norm3_3, 22: self.L2Norm4_3, 29: self.L2Norm5_3}
        for place, layer in enumerate(self.vgg):
            x = layer(x)
            if place in norms:
                levels.append(norms[place](x))
        levels.append(x)
        for place, layer in enumerate(self.extras):
            x = F.relu(layer(x))
            if place % 2:
                levels.append(x)
        return levels


class _Scaled(nn.Module):
    """Unit length over channels, times a learnt scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight[:, None, None] * x / (x.norm(dim=1, keepdim=True) + 1e-10)


def _vgg() -> list[nn.Module]:
    layers, channels = [], 3
    for stage, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=stage == 2))
    return [*layers, nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.ReLU(), nn.Conv2d(1024, 1024, 1), nn.ReLU()]


def _boxes(offsets: torch.Tensor, stride: int, side: int) -> torch.Tensor:
    """Regression [4, h, w] of one level -> boxes [h * w, 4], x0 y0 x1 y1."""
    rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in offsets.shape[1:]), indexing="ij")
    centres = torch.stack([columns, rows]) * stride + offsets[:2] * CENTRE_STEP * side
    halves = side * torch.exp(offsets[2:] * SIZE_STEP) / 2
    return torch.cat([centres - halves, centres + halves]).flatten(1).T


def suppress(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> np.ndarray:
    """Indices of the best boxes [n, 4] none of which shares more than `overlap` of its union with a better one."""
    order, kept = np.argsort(-scores, kind="stable"), []
    while len(order):
        kept.append(order[0])
        order = order[1:][iou(boxes[order[0]], boxes[order[1:]]) <= overlap]
    return np.array(kept, int)


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of box [4] with others [n, 4]."""
    shared = np.prod(np.maximum(0, np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    return shared / (np.prod(box[2:] - box[:2]) + areas - shared)


@torch.inference_mode()
def detect(net: S3FD, picture: np.ndarray, confidence: float = CONFIDENCE, scale: float = SCALE) -> np.ndarray:
    """picture uint8 [H, W, 3] RGB -> boxes [n, 4] in its pixels, best first."""
    import cv2

    small = cv2.resize(picture, None, fx=scale, fy=scale).astype(np.float32) - np.float32(MEAN)
    boxes, chances = net(torch.from_numpy(small).permute(2, 0, 1)[None])
    sure = chances > confidence
    grow = [n / m for n, m in zip((picture.shape[1], picture.shape[0]) * 2, (small.shape[1], small.shape[0]) * 2, strict=True)]
    boxes, chances = boxes[sure].numpy() * np.array(grow), chances[sure].numpy()
    return boxes[suppress(boxes, chances, KEEP_OVERLAP)]


def tracks(found: list[np.ndarray]) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Boxes of every picture -> faces followed through them: (picture numbers [n], boxes [n, 4], gaps filled in), and how
    many tracks were too short or too small."""
    waiting = [list(boxes) for boxes in found]
    kept, dropped = [], 0
    while any(waiting):
        numbers, boxes = _follow(waiting)
        every = np.arange(numbers[0], numbers[-1] + 1)
        filled = np.stack([np.interp(every, numbers, column) for column in np.array(boxes).T], axis=1)
        large = np.mean(filled[:, 2:] - filled[:, :2], axis=0).max() > MIN_FACE
        if len(numbers) > MIN_TRACK and large:
            kept.append((every, filled))
        else:
            dropped += 1
    return kept, dropped


def _follow(waiting: list[list[np.ndarray]]) -> tuple[list[int], list[np.ndarray]]:
    """Take one face out of `waiting`, from its first picture to where it is lost."""
    numbers, boxes = [], []
    for number, candidates in enumerate(waiting):
        if numbers and number - numbers[-1] > MAX_MISSED:
            break
        match = next((k for k, box in enumerate(candidates) if not boxes or iou(boxes[-1], box[None])[0] > SAME_FACE), None)
        if match is not None:
            numbers.append(number)
            boxes.append(candidates.pop(match))
    return numbers, boxes
