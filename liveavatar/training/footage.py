"""Video files as training wants them: 25 pictures a second by their time stamps, 16 kHz mono on the same clock, cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

from liveavatar.conditioning.media import lay_out, timed_sound
from liveavatar.core import FPS, ConfigError, InputError

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
LONGEST_SIDE = 1280  # pixels; larger pictures are brought down: a face fills the training size long before
CUT = 27.0  # PySceneDetect's own threshold: mean change of hue, saturation and brightness


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The container of a file with video. FFmpeg's errors become InputErrors naming the file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no video")
            yield container
    except av.FFmpegError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def pictures_of(path: Path) -> Iterator[np.ndarray]:
    """uint8 [H,W,3]; picture k is what is shown k/25 s after the first time stamp. Raises InputError."""
    with opened(path) as container:
        stream, made, held, start = container.streams.video[0], 0, None, None
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if frame.rotation:
                raise InputError(f"{path}: its pictures are to be turned by {frame.rotation} degrees: store them upright")
            start = frame.pts if start is None else start
            now = float((frame.pts - start) * stream.time_base)
            while held is not None and made / FPS < now - 1e-6:
                yield as_picture(held)
                made += 1
            held = frame
        while held is not None and made / FPS <= now + 1e-6:
            yield as_picture(held)
            made += 1


def as_picture(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H,W,3], at most LONGEST_SIDE."""
    scale = min(1.0, LONGEST_SIDE / max(frame.width, frame.height))
    width, height = (max(2, round(side * scale / 2) * 2) for side in (frame.width, frame.height))
    return frame.to_ndarray(format="rgb24", width=width, height=height)


def sound_of(path: Path) -> np.ndarray | None:
    """float32 [n] 16 kHz mono, sample 0 at the first picture's time; None without an audio stream. Raises InputError."""
    with opened(path) as container:
        if not container.streams.audio:
            return None
        return lay_out(timed_sound(container.decode(container.streams.audio[0]), str(path)), float(first_time(path)))


def first_time(path: Path):
    """Seconds (Fraction) of the first picture's time stamp."""
    with opened(path) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            return frame.pts * stream.time_base
    raise InputError(f"{path}: its video holds no picture")


def shots_of(path: Path, pictures: int) -> list[tuple[int, int]]:
    """[first, last) pictures of every shot, of so many in all. Raises ConfigError where PySceneDetect is not installed."""
    try:
        from scenedetect import ContentDetector, detect
    except ImportError:
        raise ConfigError("cutting videos into shots needs PySceneDetect: pip install 'liveavatar[videos]'") from None
    cuts = [round(begin.seconds * FPS) for begin, _ in detect(str(path), ContentDetector(threshold=CUT, min_scene_len=FPS // 2))]
    edges = sorted({0, *(cut for cut in cuts if 0 < cut < pictures), pictures})
    return list(zip(edges, edges[1:]))
