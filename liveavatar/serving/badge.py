"""The visible sign that a picture is made by a machine: a small rounded label in a corner (WM-2)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.serving.settings import CORNERS

SHARE, LEAST = 0.07, 12  # height of the label: of the shorter side; pixels at least
OVERSAMPLING = 4
BACKGROUND, INK = (20, 20, 24, 190), (255, 255, 255, 255)


class Badge:
    """Draws the same label on every picture of one stream. Holds only constants: one object may serve many threads.

    text: 1 to 24 characters. height, width: of the pictures, pixels. Raises ConfigError when the label does not fit.
    """

    def __init__(self, text: str, height: int, width: int, corner: str = "top-left"):
        if not 0 < len(text) <= 24 or not text.isprintable() or not text.strip():
            raise ConfigError(f"provenance.badge_text={text!r}: must be 1 to 24 printable characters")
        one_of("provenance.badge_corner", corner, CORNERS)
        label = _label(text, max(LEAST, round(SHARE * min(height, width))))
        rows, columns, margin = *label.shape[:2], max(2, label.shape[0] // 4)
        if rows + 2 * margin > height or columns + 2 * margin > width:
            raise ConfigError(f"provenance.badge_text={text!r}: does not fit a picture of {width}x{height}")
        top = margin if corner.startswith("top") else height - margin - rows
        left = margin if corner.endswith("left") else width - margin - columns
        self.height, self.width = height, width
        self._where = slice(top, top + rows), slice(left, left + columns)
        alpha = label[..., 3:].astype(np.uint32)
        self._colour, self._rest = label[..., :3] * alpha, 255 - alpha

    def draw(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> a new one with the label. Before the watermark is put in."""
        assert picture.shape == (self.height, self.width, 3) and picture.dtype == np.uint8, (picture.shape, picture.dtype)
        drawn = picture.copy()
        drawn[self._where] = (picture[self._where] * self._rest + self._colour + 127) // 255
        return drawn


def _label(text: str, height: int) -> np.ndarray:
    """RGBA uint8 [height, w, 4]: text in a rounded box."""
    tall = height * OVERSAMPLING
    font = ImageFont.load_default(size=tall * 0.62)
    left, top, right, bottom = font.getbbox(text)
    wide = -(-max(tall, right - left + tall * 7 // 10) // OVERSAMPLING) * OVERSAMPLING
    image = Image.new("RGBA", (int(wide), tall))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, image.width - 1, tall - 1), radius=tall * 0.3, fill=BACKGROUND)
    draw.text(((image.width - right - left) / 2, (tall - bottom - top) / 2), text, font=font, fill=INK)
    return np.array(image.resize((image.width // OVERSAMPLING, height), Image.Resampling.LANCZOS))
