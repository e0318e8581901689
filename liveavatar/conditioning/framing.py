"""Portraits cut so that the face lies where a checkpoint was trained to have it: the embedded avatar knows one framing, and of
a face that is far away or beside the middle it makes a smear.

A face is moved and scaled, never turned: of a head that is turned aside or tilted only place and size become right.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from liveavatar.conditioning.face import CHIN, Face, FaceTracker
from liveavatar.conditioning.identity import fit_picture, load_picture, middle_box
from liveavatar.core import ConfigError, InputError

SIZE_TOLERANCE = 0.1  # of the framing's chin: renders of one framing, over 84 people, differ by up to .07
PLACE_TOLERANCE = 0.06  # of the picture's sides; the same renders differ by up to .006
REDUCED = 4  # times the size wanted: a larger picture is first averaged down to it, so that its borders can be filled in flat memory
ASSETS = Path(__file__).parents[1] / "assets"

Box = tuple[float, float, float, float]  # left, top, right, bottom in a picture's pixels; it may reach beyond the picture

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Where the face lies in the pictures that a checkpoint was trained on: section `framing` of its liveavatar.json.

    eyes: the middle between the eyes, x and y, shares of the picture's width and height. chin: from there to the chin, a share
    of the height; unlike the face's height it hardly differs from person to person. Raises ConfigError.
    """

    eyes: tuple[float, ...]
    chin: float

    def __post_init__(self):
        if len(self.eyes) != 2 or not all(0 < share < 1 for share in self.eyes):
            raise ConfigError(f"framing.eyes={list(self.eyes)}: must be two shares of the picture, x and y, between 0 and 1")
        if not 0 < self.chin < 1:
            raise ConfigError(f"framing.chin={self.chin}: must be a share of the picture's height between 0 and 1")


@dataclass(frozen=True, eq=False)
class Fitted:
    """A portrait as an engine takes it. pixels: uint8 [3, height, width]; box: what was cut out of the picture that was given,
    None where that was framed right, or nobody could tell."""

    pixels: torch.Tensor
    box: Box | None = None


def fit_portrait(picture: torch.Tensor, height: int, width: int, framing: Framing | None = None) -> Fitted:
    """uint8 [3, H0, W0] -> Fitted: its largest face as in `framing`. Without a framing, and where the face lies so already (within
    the tolerances) or none is found, it is fit_picture's, bit for bit. What was done, or why nothing was, is a line of the log."""
    box = None if framing is None else _wanted(picture, height, width, framing)
    return Fitted(fit_picture(picture, height, width) if box is None else cut(picture, box, height, width), box)


def cut(picture: torch.Tensor, box: Box, height: int, width: int) -> torch.Tensor:
    """uint8 [3, H0, W0] -> uint8 [3, height, width]: the box alone, antialiased; beyond the border the border's colours go on."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    shrink = max(1, int(min((box[2] - box[0]) / width, (box[3] - box[1]) / height) / REDUCED))
    image, (left, top, right, bottom) = image.reduce(shrink), (side / shrink for side in box)
    wide, high = image.size
    beyond = [max(0, math.ceil(over)) for over in (-left, -top, right - wide, bottom - high)]
    if any(beyond):
        before_x, before_y, after_x, after_y = beyond
        image = Image.fromarray(np.pad(np.asarray(image), ((before_y, after_y), (before_x, after_x), (0, 0)), mode="edge"))
        left, top, right, bottom = left + before_x, top + before_y, right + before_x, bottom + before_y
    made = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    return torch.from_numpy(np.array(made)).permute(2, 0, 1).contiguous()


def _wanted(picture: torch.Tensor, height: int, width: int, framing: Framing) -> Box | None:
    """What is to be cut out; None where nothing is, which is said unless all is right."""
    try:
        faces = FaceTracker().find(picture.permute(1, 2, 0).contiguous().numpy())
    except InputError as error:
        if not _came_along(picture):
            _say_once(f"portraits are used as they are, wherever the face lies: {error}")
        return None
    _, h0, w0 = picture.shape
    if not faces:
        log.warning("no face found in the portrait of %dx%d: it is used as it is", w0, h0)
        return None
    if _fits(faces[0], middle_box(h0, w0, height, width), framing):
        return None
    box = _inside(face_box(faces[0], height, width, framing), h0, w0)
    _tell(box, h0, w0, height, len(faces))
    return box


def face_box(face: Face, height: int, width: int, framing: Framing) -> Box:
    """What of its picture shows a face as in `framing`, in the proportions of height x width."""
    high = math.dist(face.eyes, face.landmarks[CHIN, :2]) / framing.chin
    wide = high * width / height
    left, top = face.eyes - np.multiply(framing.eyes, (wide, high))
    return float(left), float(top), float(left + wide), float(top + high)


def _fits(face: Face, box: Box, framing: Framing) -> bool:
    """Whether the face lies as in `framing` when the box is shown."""
    left, top, right, bottom = box
    away = (face.eyes - (left, top)) / (right - left, bottom - top) - framing.eyes
    size = math.dist(face.eyes, face.landmarks[CHIN, :2]) / (bottom - top) / framing.chin
    return abs(size - 1) <= SIZE_TOLERANCE and float(np.abs(away).max()) <= PLACE_TOLERANCE


def _inside(box: Box, h0: int, w0: int) -> Box:
    """The box pushed towards the picture where it reaches beyond it, as far as the tolerance allows: what is filled in is made up."""
    moves = []
    for low, high, length in ((box[0], box[2], w0), (box[1], box[3], h0)):
        most = PLACE_TOLERANCE * (high - low)
        # a box wider than the picture lacks something on both sides: then the middle is best
        push = max(0.0, -low) - max(0.0, high - length) if high - low <= length else (length - low - high) / 2
        moves.append(min(most, max(-most, push)))
    return box[0] + moves[0], box[1] + moves[1], box[2] + moves[0], box[3] + moves[1]


def _tell(box: Box, h0: int, w0: int, height: int, faces: int) -> None:
    left, top, right, bottom = box
    shown = max(0.0, min(right, w0) - max(left, 0.0)) * max(0.0, min(bottom, h0) - max(top, 0.0)) / ((right - left) * (bottom - top))
    larger = height / (bottom - top)
    remarks = [f"the largest of {faces} faces"] * (faces > 1)
    remarks += [f"{larger:.1f} times enlarged, so it will be soft"] * (larger > 1.05)
    remarks += [f"{1 - shown:.0%} of it beyond the border, filled with the border's colours"] * (shown < 0.995)
    log.warning("%s", f"portrait of {w0}x{h0} cut to the face: {right - left:.0f}x{bottom - top:.0f} pixels from {left:.0f}, {top:.0f}"
                      f"{''.join(', ' + remark for remark in remarks)} (video.face_crop=none leaves it whole)")  # fmt: skip


def _came_along(picture: torch.Tensor) -> bool:
    """It is one of the package's own portraits, which are framed right."""
    return any(torch.equal(picture, load_picture(path)) for path in (ASSETS / "portrait.png", *(ASSETS / "portraits").iterdir()))


@functools.cache
def _say_once(line: str) -> None:
    log.warning("%s", line)
