"""A chain without a model: a moving test picture that says which block, picture and epoch it is.

The engine above it is the real one, so are its messages; only the ranks are missing. For tests of everything between
the engine and the viewer, for setting up a studio without a GPU, and for load tests. Its mouth opens with the loudness
of the very samples a picture belongs to, so that picture and sound can be compared at the far end.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from liveavatar.config import Config
from liveavatar.core import Audio, Close, Closed, Frames, Geometry, Interrupt, Message, Open, Opened, RankFailure, SessionClosed
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.tracing import open_trace
from liveavatar.telemetry import now as monotonic

SIZE = 128
LOOKAHEAD = 1600  # samples, as of the embedded avatar
CELLS, CELL_ROWS = 24, 8  # of the bar code in the lowest rows: 16 bits of the picture's number, 8 of the epoch
ROLES = ("testcard",)


def start_test_card(config: Config, *, block_seconds: float = 0.0, clock: Callable[[], float] = monotonic,
                    watch: Callable[[dict], None] | None = None) -> Engine:
    """An Engine over a TestCard. config: its video size (default 128), runtime.sessions and queues hold. block_seconds: a
    block takes. watch: see Engine.start."""
    geometry = Geometry(height=config.video.height or SIZE, width=config.video.width or SIZE)
    source = SimpleNamespace(geometry=geometry, lookahead_samples=LOOKAHEAD, refresh_block=0, framing=None)
    config = replace(config, stages=(ROLES,))
    return Engine.over(config, source, TestCard(geometry, block_seconds), clock, open_trace(config, source, clock, watch))


class TestCard:
    """runtime.chains.Chain that paints. block_seconds: every block takes so long; `fail` kills it as a rank would die."""

    __test__ = False  # the name is a television's, not pytest's

    def __init__(self, geometry: Geometry, block_seconds: float = 0.0):
        self.geometry, self.block_seconds = geometry, block_seconds
        self._up: queue.Queue = queue.Queue(256)
        self._heard: dict[str, np.ndarray] = {}  # PCM of the next blocks, look-ahead included
        self._failure: RankFailure | SessionClosed | None = None

    def fail(self, reason: str = "killed by a test") -> None:
        """Every call raises RankFailure from now on."""
        self._failure = RankFailure(0, ROLES, reason)

    def send(self, message: Message) -> None:
        """Answers at once, or after block_seconds for Audio."""
        self._check()
        name = message.session
        match message:
            case Open():
                self._heard[name] = np.zeros(0, np.float32)
                self._up.put(Opened(name))
            case Interrupt():
                self._heard[name] = self._heard[name][:0]
            case Audio():
                self._up.put(self._painted(message))
            case Close():
                self._heard.pop(name, None)
                self._up.put(Closed(name))

    def _painted(self, message: Audio) -> Frames:
        time.sleep(self.block_seconds)
        size = self.geometry.samples_per_block
        heard = np.concatenate([self._heard[message.session], message.pcm.numpy()])
        self._heard[message.session] = heard[size:]
        pictures = paint(self.geometry, message.index, message.epoch, heard[:size])
        return Frames(message.session, index=message.index, epoch=message.epoch, pictures=torch.from_numpy(pictures))

    def receive(self, timeout: float) -> Message | None:
        """The next answer, None after `timeout` s."""
        self._check()
        try:
            return self._up.get(timeout=timeout)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """No more."""
        self._failure = self._failure or SessionClosed("the chain was stopped")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


def paint(geometry: Geometry, block: int, epoch: int, pcm: np.ndarray) -> np.ndarray:
    """uint8 [12, H, W, 3] of a block that says float32 `pcm` [7680]."""
    count, per = geometry.frames_per_block, geometry.samples_per_block // geometry.frames_per_block
    return np.stack([picture(geometry, block * count + n, epoch, pcm[n * per : (n + 1) * per]) for n in range(count)])


def picture(geometry: Geometry, number: int, epoch: int, pcm: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: a face of two colours on a moving ground, its mouth as open as `pcm` is loud, the bar code below."""
    h, w = geometry.height, geometry.width
    y, x = np.mgrid[:h, :w]
    image = np.empty((h, w, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 40 + 60 * x // w, 60 + 60 * y // h, (90 + x + 2 * number) % 64 + 60
    face = ((x - w / 2) / (0.3 * w)) ** 2 + ((y - 0.45 * h) / (0.36 * h)) ** 2 < 1
    image[face] = (214, 170, 140)
    loud = float(np.sqrt(np.mean(np.square(pcm)))) if len(pcm) else 0.0
    opening = 0.012 + 0.16 * min(1.0, 4 * loud)
    mouth = ((x - w / 2) / (0.12 * w)) ** 2 + ((y - 0.62 * h) / (opening * h)) ** 2 < 1
    image[mouth] = (110, 20, 30)
    for side in (-1, 1):
        image[((x - w / 2 - side * 0.12 * w) / (0.035 * w)) ** 2 + ((y - 0.38 * h) / (0.025 * h)) ** 2 < 1] = (30, 30, 40)
    return _coded(image, number, epoch)


def _coded(image: np.ndarray, number: int, epoch: int) -> np.ndarray:
    value, cell = (number & 0xFFFF) << 8 | (epoch & 0xFF), image.shape[1] // CELLS
    image[-CELL_ROWS:] = 0
    for bit in range(CELLS):
        if value >> (CELLS - 1 - bit) & 1:
            image[-CELL_ROWS:, bit * cell : (bit + 1) * cell] = 255
    return image


def read_code(image: np.ndarray) -> tuple[int, int]:
    """(number, epoch) of a picture, uint8 [H, W, 3], as it came through a codec, at its own size or a whole multiple."""
    cell, rows = image.shape[1] // CELLS, max(2, CELL_ROWS * image.shape[1] // (SIZE * 2))
    value = 0
    for bit in range(CELLS):
        middle = image[-rows:, bit * cell + cell // 4 : (bit + 1) * cell - cell // 4]
        value = value << 1 | int(middle.mean() > 127)
    return value >> 8, value & 0xFF


def mouth_open(image: np.ndarray) -> float:
    """How much of the middle column below the eyes is mouth, 0..1: what a viewer sees of the loudness."""
    h, w, _ = image.shape
    column = image[round(0.46 * h) : round(0.8 * h), w // 2].astype(int)
    return float(((column[:, 0] < 165) & (column[:, 1] < 95)).mean())

