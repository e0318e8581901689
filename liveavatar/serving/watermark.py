"""The invisible mark in every picture, and its detector (WM-1).

Embedding adds the pattern of `spread` to all three colours, stronger where the picture is busy. Detecting sums what
is left of many pictures when everything smooth is taken away, folds it to one tile, finds how the tile is turned, and
reads the payload; it needs the key and nothing of the original.

The bound on false alarms: for a video without this key's mark, each combination of size tried, turn and payload reaches
z with a probability of at most exp(-z^2 / 2) over the choice of the key (see `spread`), so that all together do with at
most SIZES * 128 * 128 * 2^32 * exp(-z^2 / 2). A mark counts as found where this is below FALSE_ALARM.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from liveavatar.core import ConfigError, InputError
from liveavatar.serving import spread
from liveavatar.serving.durable import secret_file
from liveavatar.telemetry import now

KEY_FILE = "watermark.key"  # in storage.folder
FALSE_ALARM = 1e-6  # at most so many checks of unmarked video say "marked"
STRENGTH = 1.0  # root mean square of what is added where the picture is neither flat nor busy, in 1/255
FLAT, BUSY = 0.7, 2.0  # of it, at least and at most
USUAL = 6.0  # activity of a block that gets STRENGTH
SHIFT = 8  # fixed point of the embedder
HEIGHTS = (128, 192, 256, 384, 400, 480, 512, 640, 704, 720, 768, 1024, 1280)  # of pictures when they were marked; a video's own is tried too
GROUP = 25  # pictures whose mean is cleaned at a time
SHRUNK = 2.6  # times smaller, the pattern is finer than the pixels: larger heights are not tried
DEEP, DEEP_STEP = (0.6, 1.6), 2  # of a picture's height; pixels
PEAKS = 4  # turns of the tile that are tried at every size


def server_key(folder: Path, file: Path | None = None) -> bytes:
    """The key of a server: the bytes of `file`, else of folder/watermark.key, made at first use. Raises ConfigError."""
    try:
        key = secret_file(folder / KEY_FILE) if file is None else file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file or folder / KEY_FILE}: the watermark key can neither be read nor made: {error.strerror}") from None
    if len(key) < spread.KEY_BYTES:
        raise ConfigError(f"{file or folder / KEY_FILE}: a watermark key of {len(key)} bytes: at least {spread.KEY_BYTES} are needed")
    return key


class Watermark:
    """Marks the pictures of one stream.

    key: at least 16 secret bytes. payload: 0 .. 2^32 - 1. height, width: pixels. Holds only constants: one object may
    serve many threads.
    """

    def __init__(self, key: bytes, payload: int, height: int, width: int):
        if not 0 <= payload < 2**spread.PAYLOAD_BITS:
            raise ValueError(f"watermark payload {payload}: must be 0..2^{spread.PAYLOAD_BITS} - 1")
        self.height, self.width, self.payload = height, width, payload
        rows, columns = -(-height // spread.BLOCK), -(-width // spread.BLOCK)
        pattern = spread.tile(spread.Chips.of(key).all(payload)) * STRENGTH * (1 << SHIFT) / 16
        repeats = -(-rows // spread.BLOCKS), -(-columns // spread.BLOCKS)
        whole = np.tile(pattern, repeats)[: rows * spread.BLOCK, : columns * spread.BLOCK]
        self._pattern = np.rint(whole).astype(np.int16).reshape(rows, spread.BLOCK, columns, spread.BLOCK)

    def mark(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> a new marked one."""
        assert picture.shape == (self.height, self.width, 3) and picture.dtype == np.uint8, (picture.shape, picture.dtype)
        added = self._pattern * self._gain(picture)[:, None, :, None]
        added += 1 << (SHIFT - 1)
        added >>= SHIFT
        rows, _, columns, _ = added.shape
        added = added.reshape(rows * spread.BLOCK, columns * spread.BLOCK)[: self.height, : self.width]
        marked = picture + added[..., None]
        return np.clip(marked, 0, 255, out=marked).astype(np.uint8)

    def _gain(self, picture: np.ndarray) -> np.ndarray:
        """int16 [rows, columns] of blocks, 16 = 1: the mean step between neighbouring greens, against USUAL."""
        rows, _, columns, _ = self._pattern.shape
        green = picture[::2, :, 1]
        green = np.pad(green, ((0, rows * 4 - len(green)), (0, columns * 8 - self.width)), mode="edge")
        even = green.reshape(rows, 4, columns, 8).astype(np.int16)
        steps = np.abs(even[..., ::4] - even[..., 3::4]).sum((1, 3), dtype=np.int16)
        return np.clip(steps * np.float32(16 / (8 * USUAL)), 16 * FLAT, 16 * BUSY).astype(np.int16)


@dataclass(frozen=True)
class Reading:
    """What a detector saw. found: false_alarm is below FALSE_ALARM. payload: the best guess, meaningless where not found.
    confidence: probability that all 32 bits are right, given that there is a mark. z: correlation over its norm.
    false_alarm: bound on the probability that an unmarked video reaches z in this check. height: of the pictures when they were
    marked. needed: z at which false_alarm is FALSE_ALARM. turn: how far (rows, columns) the tile begins before the picture's corner, pixels at that height. pictures: read."""

    found: bool
    payload: int
    confidence: float
    z: float
    needed: float
    false_alarm: float
    height: int
    turn: tuple[int, int]
    pictures: int


class Detector:
    """Reads the mark of one stream: add() every picture, read() whenever wanted; 25 pictures are enough of most video.

    key: as of Watermark. heights: of pictures when they were marked, tried besides the stream's own.
    """

    def __init__(self, key: bytes, heights: tuple[int, ...] = HEIGHTS):
        self._chips, self._heights = spread.Chips.of(key), heights
        self._sum, self._count = None, 0
        self._tiles: dict[int, np.ndarray] = {}
        self.pictures = 0

    def add(self, picture: np.ndarray) -> None:
        """picture: uint8 [H, W, 3], of one size throughout."""
        luma = picture.astype(np.float32) @ np.float32((0.2126, 0.7152, 0.0722))
        self._sum = luma if self._sum is None else self._sum + luma
        self._count += 1
        self.pictures += 1
        if self._count == GROUP:
            self._clean()

    def read(self) -> Reading:
        """What all pictures so far say. Raises ValueError before the first."""
        if not self.pictures:
            raise ValueError("no picture to read a watermark from")
        if self._count:
            self._clean()
        readings = [reading for height, field in self._tiles.items() for reading in self._try(height, field)]
        return max(readings, key=lambda reading: reading.z)

    def _clean(self) -> None:
        mean = self._sum / self._count
        for height in sorted({len(mean), *(h for h in self._heights if h <= SHRUNK * len(mean))}):
            field = fold(whiten(resized(mean, height))) * np.float32(math.sqrt(self._count))
            self._tiles[height] = self._tiles.get(height, 0) + field
        self._sum, self._count = None, 0

    def _try(self, height: int, field: np.ndarray) -> list[Reading]:
        """Readings at the likeliest turns of one tile."""
        turns = [np.roll(field, (-row, -column), (0, 1)) for row in range(spread.BLOCK) for column in range(spread.BLOCK)]
        values = limited(spread.coefficients(np.stack(turns)))  # [64, 10, 16, 16]
        found = np.fft.ifft2(np.fft.fft2(values[:, :2]) * np.conj(np.fft.fft2(self._chips.sync))).real.sum(1)  # [64, 16, 16]
        norm = np.sqrt((values[:, :2] ** 2).sum((1, 2, 3), keepdims=False))[:, None, None]
        order = np.argsort((found / np.maximum(norm, 1e-9)).ravel())[::-1][:PEAKS]
        places = {0, *order.tolist()}
        return [self._reading(height, values, *np.unravel_index(place, found.shape)) for place in sorted(places)]

    def _reading(self, height: int, values: np.ndarray, phase: int, row: int, column: int) -> Reading:
        at = np.roll(values[phase], (-row, -column), (1, 2))
        payload, confidence = spread.decode(self._chips.soft(at[2:]))
        z = float((at * self._chips.all(payload)).sum() / max(np.sqrt((at**2).sum()), 1e-9))
        trials = math.log(len(self._tiles) * spread.TILE**2) + spread.PAYLOAD_BITS * math.log(2)
        needed = math.sqrt(2 * (trials - math.log(FALSE_ALARM)))
        alarm = math.exp(min(0.0, trials - max(z, 0.0) ** 2 / 2))
        turn = (int(phase) // 8 + 8 * int(row)) % spread.TILE, (int(phase) % 8 + 8 * int(column)) % spread.TILE
        return Reading(alarm < FALSE_ALARM, payload, confidence, z, needed, alarm, height, turn, self.pictures)


def deep_heights(height: int) -> tuple[int, ...]:
    """Heights to try where a picture was cut out and then enlarged or reduced by nobody knows how much: so close together that the
    tiles of a picture stay in step. Hundreds of them: each takes about a tenth of a second."""
    return tuple(range(round(DEEP[0] * height), round(DEEP[1] * height) + 1, DEEP_STEP))


def read_video(source: Path | bytes | str, key: bytes, pictures: int = 500, deep: bool = False, *, seconds: float = 60.0,
               clock: Callable[[], float] = now) -> Reading:  # fmt: skip
    """The mark of the first so many pictures of a video: a file, its bytes, or the URL of a stream that FFmpeg reads, for at most so many
    seconds once it is open. deep: try every size. Raises InputError when it cannot be read, which names the host of a URL: the rest may be a key."""
    import av

    detector, size, stream = Detector(key), {}, isinstance(source, str)
    name = urlsplit(source).hostname or source if stream else "stream" if isinstance(source, bytes) else str(source)
    options = {"timeout": (seconds, seconds)} if stream else {"options": {"protocol_whitelist": "file"}}
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), **options) as container:
            if not container.streams.video:
                raise InputError(f"{name}: holds no video")
            until = clock() + seconds if stream else math.inf  # from here on: FFmpeg takes seconds to know a stream
            for frame in itertools.islice(container.decode(video=0), pictures):
                if not size:
                    size = {"width": frame.width, "height": frame.height}
                    detector = Detector(key, deep_heights(frame.height)) if deep else detector
                detector.add(frame.to_ndarray(format="rgb24", **size))
                if clock() > until:
                    break
    except (av.FFmpegError, OSError) as error:
        if not detector.pictures:
            raise InputError(f"{name}: not a video that can be read ({error.strerror})") from None
    if not detector.pictures:
        raise InputError(f"{name}: holds no picture")
    return detector.read()


def resized(luma: np.ndarray, height: int) -> np.ndarray:
    """float32 [H, W] -> [height, W * height / H]."""
    if height == len(luma):
        return luma
    width = max(1, round(luma.shape[1] * height / len(luma)))
    return np.asarray(Image.fromarray(luma).resize((width, height), Image.Resampling.BICUBIC))


def box(field: np.ndarray, radius: int) -> np.ndarray:
    """Mean over (2 radius + 1)^2 pixels, edges repeated; float32 [H, W]."""
    size = 2 * radius + 1
    for axis in (0, 1):
        edge = [(0, 0), (0, 0)]
        edge[axis] = (radius + 1, radius)
        total = np.pad(field, edge, mode="edge").cumsum(axis, dtype=np.float64)
        after, before = (slice(None),) * axis + (slice(size, None),), (slice(None),) * axis + (slice(None, -size),)
        field = ((total[after] - total[before]) / size).astype(np.float32)
    return field


def whiten(luma: np.ndarray) -> np.ndarray:
    """What is not smooth, of equal strength everywhere: float32 [H, W]."""
    rough = luma - box(luma, 2)
    return np.clip(rough / np.sqrt(box(rough**2, 6) + 0.05), -3, 3)


def fold(field: np.ndarray) -> np.ndarray:
    """[H, W] -> the sum of its tiles, float32 [128, 128]."""
    rows, columns = (-size % spread.TILE for size in field.shape)
    whole = np.pad(field, ((0, rows), (0, columns)))
    return whole.reshape(-1, spread.TILE, whole.shape[1] // spread.TILE, spread.TILE).sum((0, 2))


def limited(values: np.ndarray) -> np.ndarray:
    """Coefficients [..., 10, 16, 16]: each place scaled to the same size, and none above three times it."""
    size = np.sqrt((values**2).mean((-1, -2), keepdims=True)) + 1e-9
    return np.clip(values / size, -3, 3)
