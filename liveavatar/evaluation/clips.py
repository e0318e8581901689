"""A judged file: its pictures with their own times, its sound on the same clock, in flat memory; and sound to make one from.

Time is what the file says (pts), never index over rate. Nothing is scaled or encoded again on the way.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import av
import numpy as np

from liveavatar.core import SAMPLE_RATE, InputError
from liveavatar.evaluation.provenance import sha256

MAX_GAP_SECONDS = 0.02  # between the end of one piece of sound and the time stamp of the next; more is silence in the file


class VideoFile:
    """An mp4 (or whatever else FFmpeg reads) that is to be judged.

    Raises InputError where the file is missing, no video, or damaged; reading its pictures may raise it later.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
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
                at = _seconds(frame, self.path)
                if at >= end:
                    return
                if at >= start:
                    yield at, frame.to_ndarray(format="rgb24")

    def sound(self, start: float = 0.0, end: float = math.inf) -> np.ndarray:
        """float32 [n] 16 kHz mono; sample 0 is heard at `start` seconds. Empty where the file is mute."""
        if not self.has_sound:
            return np.zeros(0, np.float32)
        with self._open() as container:
            stream = container.streams.audio[0]
            _seek(container, stream, start)
            pieces = self._pieces(container, stream, end)
            return _laid_out(pieces, start, end)

    def _pieces(self, container, stream, end: float) -> Iterator[tuple[float, np.ndarray]]:
        """(seconds, float32 [n]) of sound as it was decoded, at 16 kHz mono."""
        resampler = av.AudioResampler(format="s32", layout="mono", rate=SAMPLE_RATE)  # s32: as in conditioning/media.py
        at = None
        for frame in self._decoded(container, stream):
            stamp = _seconds(frame, self.path)
            if at is None or abs(stamp - at) > MAX_GAP_SECONDS:
                if at is not None:
                    yield at, _samples(resampler.resample(None))
                    resampler = av.AudioResampler(format="s32", layout="mono", rate=SAMPLE_RATE)
                at = stamp
            frame.pts = None
            piece = _samples(resampler.resample(frame))
            yield at, piece
            at += len(piece) / SAMPLE_RATE
            if at >= end + 1:
                return
        if at is not None:
            yield at, _samples(resampler.resample(None))

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


def _seconds(frame, path: Path) -> float:
    if frame.pts is None:
        raise InputError(f"{path}: a frame without a time stamp: put it into an mp4 again")
    return float(frame.pts * frame.time_base)


def _samples(frames) -> np.ndarray:
    pieces = [frame.to_ndarray()[0] / 2.0**31 for frame in frames if frame.samples]
    return np.concatenate(pieces).astype(np.float32) if pieces else np.zeros(0, np.float32)


def _laid_out(pieces: Iterator[tuple[float, np.ndarray]], start: float, end: float) -> np.ndarray:
    """Pieces with their times -> one array from `start` on; silence where there are none."""
    kept, length = [], 0
    for at, piece in pieces:
        first = round((at - start) * SAMPLE_RATE)
        piece, first = piece[max(0, -first):], max(0, first)
        if math.isfinite(end):
            piece = piece[: max(0, round((end - start) * SAMPLE_RATE) - first)]
        if len(piece) and first > length:
            kept.append(np.zeros(first - length, np.float32))
            length = first
        piece = piece[max(0, length - first):]
        kept.append(piece)
        length += len(piece)
    return np.concatenate(kept) if kept else np.zeros(0, np.float32)


def write_sound(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """A wav, 16 kHz mono 16 bit, of pieces float32 [n] in order."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(SAMPLE_RATE)
        for piece in pieces:
            file.writeframes(np.round(np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())
