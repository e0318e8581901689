"""A portrait from a person: read safely, choose the output size, fit it (model.md section 10)."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from liveavatar.core import InputError

MAX_BYTES = 100_000_000  # of an encoded picture
MAX_PIXELS = 64_000_000  # of a decoded picture: 192 MB as RGB
MIN_SIDE = 64  # pixels; below this there is no face-sized image
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")  # no format that runs other programs
BROKEN = (  # what Pillow's decoders raise on damaged data
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error,
    Image.DecompressionBombError,
)
MID_GREY = (128, 128, 128)
SIZE_STEP = 64  # output sides are multiples of this


# ---------------------------------------------------------------- reading


def load_picture(source: str | Path | bytes) -> torch.Tensor:
    """A picture file, or its bytes -> uint8 [3, H0, W0] RGB as a viewer would show it.

    EXIF orientation is applied, transparency lies over mid-grey, an animation gives its first frame.
    Raises InputError, one line naming the file and the way out, on anything that is not a usable picture.
    """
    name, data = _read(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata; its bomb warning, as our limit is lower
        image = _open(name, data)
        _check_size(name, *image.size)
        pixels = _pixels(name, image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def as_picture(given) -> torch.Tensor:
    """What a program gives, a path, bytes or pixels uint8 [3, H0, W0] -> uint8 [3, H0, W0]. Raises InputError."""
    if isinstance(given, (str, Path, bytes)):
        return load_picture(given)
    try:
        pixels = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"picture of type {type(given).__name__}: must be uint8 [3, H, W] ({_line(error)[:100]})") from None
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise InputError(f"picture {list(pixels.shape)} {pixels.dtype}: must be uint8 [3, H, W]")
    return pixels


def _open(name: str, data: bytes) -> Image.Image:
    """The picture with its header read and its pixels not yet decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise InputError(f"{name}: not a picture this program can read: give a PNG, JPEG or WebP file") from None
    except Image.DecompressionBombError:  # the header promises more than Pillow would ever decode
        raise InputError(f"{name}: {_too_large()} (perhaps a decompression bomb): save a smaller copy") from None
    except BROKEN as error:
        raise InputError(f"{name}: cannot be read as a picture ({_line(error)}): save it as PNG or JPEG") from None


def _pixels(name: str, image: Image.Image) -> np.ndarray:
    """uint8 [H0, W0, 3], upright."""
    try:
        return np.array(_as_rgb(ImageOps.exif_transpose(image)))
    except BROKEN as error:
        raise InputError(f"{name}: the {image.format} data is damaged ({_line(error)}): save it again as PNG") from None


def _read(source: str | Path | bytes) -> tuple[str, bytes]:
    """Name for messages and the encoded bytes, bounded."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "the picture", bytes(source)
    else:
        name, data = str(source), _read_file(Path(source))
    if not data:
        raise InputError(f"{name}: the picture is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: more than {MAX_BYTES // 1_000_000} MB: save a smaller copy of the picture")
    return name, data


def _read_file(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path}: no such file: give the path of a portrait picture")
    if not path.is_file():
        raise InputError(f"{path}: not a file: give the path of a portrait picture")
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {os.strerror(error.errno)}") from None


def _too_large() -> str:
    return f"more than {MAX_PIXELS // 1_000_000} million pixels"


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width}x{height} is {_too_large()}: save a smaller copy")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name}: {width}x{height} is no face-sized image: give one of at least {MIN_SIDE}x{MIN_SIDE}")


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, transparency over mid-grey, more than 8 bits scaled (Pillow would clip)."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(deep // 257 if deep.max() > 255 else deep, 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers")
    if not image.has_transparency_data:
        return image.convert("RGB")
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, (*MID_GREY, 255)), above).convert("RGB")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- size


def output_size(height: int, width: int, area_cap: int) -> tuple[int, int]:
    """Picture size in pixels and an area cap -> (height, width) of the video, multiples of 64.

    The largest of 100 scales whose rounded-up size fits the cap; if none does, the cap's area in the
    picture's proportions. Raises InputError when that leaves a side of zero.
    """
    for scale in _scales(height, width, area_cap):
        high, wide = _ceil_step(int(height * scale)), _ceil_step(int(width * scale))
        if high and wide and high * wide <= area_cap:
            return high, wide
    ratio = width / height
    wide, high = _floor_step(math.sqrt(area_cap * ratio)), _floor_step(math.sqrt(area_cap / ratio))
    if wide >= width or high >= height:
        wide, high = _floor_step(width), _floor_step(height)
    if not wide or not high:
        problem = f"a {width}x{height} picture has no output size within {area_cap} pixels"
        raise InputError(f"{problem}: crop it or allow a larger area")
    return high, wide


def _scales(height: int, width: int, area_cap: int) -> list[float]:
    area = height * width
    high, low = 1.0, 0.1
    if area > area_cap:
        reach, rest = (SIZE_STEP - 1) * (height + width), (SIZE_STEP - 1) ** 2 - area_cap
        square = reach * reach - 2 * area * rest  # 2, not 4: the reference's own formula
        high, low = math.sqrt(area_cap / area), (math.sqrt(max(0, square)) - reach) / (2 * area)
    return [high - (high - low) * i / 100 for i in range(100)]


def _ceil_step(value: int) -> int:
    return -(-value // SIZE_STEP) * SIZE_STEP


def _floor_step(value: float) -> int:
    return int(value) // SIZE_STEP * SIZE_STEP


# ---------------------------------------------------------------- fitting


def fit_picture(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [3, H0, W0] -> uint8 [3, height, width]: scaled to cover, antialiased, centre-cropped; no bars."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=middle_box(*picture.shape[1:], height, width))
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def middle_box(h0: int, w0: int, height: int, width: int) -> tuple[float, float, float, float]:
    """left, top, right, bottom of what fit_picture shows of a picture of h0 x w0."""
    scale = max(height / h0, width / w0)
    wide, high = min(w0, width / scale), min(h0, height / scale)
    left, top = (w0 - wide) / 2, (h0 - high) / 2
    return left, top, left + wide, top + high
