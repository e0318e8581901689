"""A judged file: its pictures with their own times, its sound on the same clock, in flat memory; and sound to make one from.

Time is what the file says (pts), never index over rate. Nothing of a judged file is scaled or encoded again on the way.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import av
import numpy as np
import torch

from liveavatar.conditioning.framing import Box, cut
from liveavatar.conditioning.media import lay_out, seconds_of, timed_sound
from liveavatar.core import SAMPLE_RATE, InputError
from liveavatar.evaluation.provenance import sha256


class VideoFile:
    """An mp4 (or whatever else FFmpeg reads) that is to be judged.

    seen: what is shown of every picture, a box in its pixels, in width x height pixels: for a reference as the judged system framed
    it; None: all. Raises InputError where the file is missing, no video, or damaged; reading its pictures may raise it later.
    """

    def __init__(self, path: str | Path, seen: tuple[Box, int, int] | None = None):
        self.path, self.seen = Path(path), seen
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file: give the path of a video")
        with self._open() as container:
            if not container.streams.video:
                raise InputError(f"{self.path}: holds no pictures: give a video")
            stream = container.streams.video[0]
            self.width, self.height, self.codec = stream.width, stream.height, stream.codec_context.name
            self.fps = float(stream.average_rate or 0)
            self.has_sound = bool(container.streams.audio)
            self.seconds = container.duration / av.time_base if container.duration else 0.0

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)

    @property
    def card(self) -> dict:
        """What a report says about the file (evaluation.md EVA-6)."""
        return {"width": self.width, "height": self.height, "fps": round(self.fps, 3), "codec": self.codec,
                "seconds": round(self.seconds, 3), "crop": "none"}

    def frames(self, start: float = 0.0, end: float = math.inf) -> Iterator[tuple[float, np.ndarray]]:
        """(seconds from the file's zero, uint8 [H, W, 3] RGB) of every picture in [start, end), one at a time."""
        with self._open() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            _seek(container, stream, start)
            for frame in self._decoded(container, stream):
                at = seconds_of(frame, str(self.path))
                if at >= end:
                    return
                if at >= start:
                    yield at, self._shown(frame.to_ndarray(format="rgb24"))

    def sound(self, start: float = 0.0, end: float = math.inf) -> np.ndarray:
        """float32 [n] 16 kHz mono; sample 0 is heard at `start` seconds. Empty where the file is mute."""
        if not self.has_sound:
            return np.zeros(0, np.float32)
        with self._open() as container:
            stream = container.streams.audio[0]
            _seek(container, stream, start)
            heard = timed_sound(self._decoded(container, stream), str(self.path))
            return lay_out(takewhile(lambda piece: piece[0] < end, heard), start, end)

    def _shown(self, picture: np.ndarray) -> np.ndarray:
        if self.seen is None:
            return picture
        box, width, height = self.seen
        return cut(torch.from_numpy(picture).permute(2, 0, 1), box, height, width).permute(1, 2, 0).numpy()

    def _open(self):
        try:
            return av.open(str(self.path))
        except av.FFmpegError as error:
            raise InputError(f"{self.path}: not a video this program can read ({error.strerror})") from None

    def _decoded(self, container, stream) -> Iterator:
        try:
            yield from container.decode(stream)
        except av.FFmpegError as error:
            raise InputError(f"{self.path}: damaged ({error.strerror})") from None


def _seek(container, stream, start: float) -> None:
    """To a key frame at or before `start`; sound a little earlier, so that its decoder has settled."""
    if start > 0:
        container.seek(max(0, int((start - 0.5) / stream.time_base)), stream=stream)


def write_sound(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """A wav, 16 kHz mono 16 bit, of pieces float32 [n] in order."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(SAMPLE_RATE)
        for piece in pieces:
            file.writeframes(np.round(np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())
