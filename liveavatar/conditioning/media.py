"""Sound in and video out, through PyAV; both in flat memory however long they are."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from liveavatar.core import FPS, SAMPLE_RATE, InputError

STDIN = "-"
READ_BYTES = 8192  # of raw PCM per read: 0.26 s at 16 kHz
MARK_BYTES = 8
GAP_SECONDS = 0.02  # between the end of one piece of sound and the time stamp of the next; more is silence in the file, less is rounding
CONTAINERS = {  # (offset, bytes) by which a file that is not raw PCM is known
    (0, b"RIFF"): "WAV", (0, b"OggS"): "Ogg", (0, b"fLaC"): "FLAC", (0, b"ID3"): "MP3", (4, b"ftyp"): "MP4",
    (0, b"\x1aE\xdf\xa3"): "WebM", (0, b"FORM"): "AIFF",
}  # fmt: skip


# ---------------------------------------------------------------- sound in


def read_audio(source: str | Path | BinaryIO, rate: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Any recording -> float32 [n] chunks of 16 kHz mono in -1..1, read as they are consumed.

    source: a path or binary file object of anything FFmpeg reads (rate and channels from the file),
    or "-" for raw signed 16-bit little-endian mono PCM at `rate` Hz on standard input. A file is
    opened and its first chunk decoded before this returns, so that what is missing, empty, corrupt or
    without sound raises InputError at once; damage that FFmpeg reports further on raises it from the iterator.
    """
    if source == STDIN:
        return _raw_chunks(sys.stdin.buffer, rate)
    if isinstance(source, (str, Path)):
        _check_file(str(source), Path(source))
        name, file = str(source), str(source)
    else:
        name, file = getattr(source, "name", "the recording"), source
    chunks = _decoded_chunks(str(name), file)
    first = next(chunks, None)
    if first is None:
        raise InputError(f"{name}: the audio stream is empty: give a recording with sound in it")
    return _chain(first, chunks)


def recording_seconds(source: str | Path) -> float | None:
    """How long a recording says it is; None for standard input and where the file does not say."""
    if source == STDIN or not Path(source).is_file():
        return None
    try:
        with av.open(str(source)) as container:
            return None if container.duration is None else container.duration / av.time_base
    except av.FFmpegError:
        return None  # read_audio says what is wrong with it


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _check_file(name: str, path: Path) -> None:
    if not name:
        raise InputError("the recording's path is empty: give the path of a file, or - for raw PCM on standard input")
    if not path.exists():
        raise InputError(f"{name}: no such file: give the path of a recording, or - for raw PCM on standard input")
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a recording")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes)")


def _decoded_chunks(name: str, file: str | BinaryIO) -> Iterator[np.ndarray]:
    """Chunks of the first audio stream; every FFmpeg error becomes an InputError naming the file."""
    seconds = 0.0
    try:
        with av.open(file) as container:
            if not container.streams.audio:
                raise InputError(f"{name}: holds no audio stream: give a recording with sound")
            for chunk in _mono(container.decode(container.streams.audio[0])):
                seconds += len(chunk) / SAMPLE_RATE
                yield chunk
    except av.FFmpegError as error:
        if seconds:
            reason = f"damaged after {seconds:.1f} s ({error.strerror}): cut it there or convert it to WAV again"
        else:
            reason = f"not a recording this program can read ({error.strerror}): give a WAV, FLAC, MP3, M4A or Ogg file"
        raise InputError(f"{name}: {reason}") from None


def _mono(frames: Iterator[av.AudioFrame]) -> Iterator[np.ndarray]:
    """Decoded frames of any format -> float32 [n] chunks at 16 kHz mono. A format may change on the way."""
    resampler, shape = None, None
    for frame in frames:
        frame.pts = None  # samples are contiguous; damaged time stamps must not open gaps
        if shape != (frame.format.name, frame.layout.name, frame.sample_rate):
            if resampler is not None:
                yield from _floats(resampler.resample(None))
            shape = (frame.format.name, frame.layout.name, frame.sample_rate)
            # s32 and not flt: for integers FFmpeg's downmix keeps the level, for floats it adds up channels
            resampler = av.AudioResampler(format="s32", layout="mono", rate=SAMPLE_RATE)
        yield from _floats(resampler.resample(frame))
    if resampler is not None:
        yield from _floats(resampler.resample(None))


def _floats(frames: list[av.AudioFrame]) -> Iterator[np.ndarray]:
    for frame in frames:
        if frame.samples:
            yield (frame.to_ndarray()[0] / 2.0**31).astype(np.float32)


def seconds_of(frame: av.AudioFrame | av.VideoFrame, name: str) -> float:
    """The time stamp of a frame of the file `name`. Raises InputError where it has none."""
    if frame.pts is None:
        raise InputError(f"{name}: a frame without a time stamp: put it into an mp4 again")
    return float(frame.pts * frame.time_base)


def timed_sound(frames: Iterator[av.AudioFrame], name: str) -> Iterator[tuple[float, np.ndarray]]:
    """Decoded frames of one format -> (seconds by their time stamps, float32 [n] at 16 kHz mono). Raises InputError without stamps."""
    resampler = at = None
    for frame in frames:
        stamp = seconds_of(frame, name)
        if at is None or abs(stamp - at) > GAP_SECONDS:
            if resampler is not None:
                yield from ((at, piece) for piece in _floats(resampler.resample(None)))
            resampler, at = av.AudioResampler(format="s32", layout="mono", rate=SAMPLE_RATE), stamp
        frame.pts = None
        for piece in _floats(resampler.resample(frame)):
            yield at, piece
            at += len(piece) / SAMPLE_RATE
    if resampler is not None:
        yield from ((at, piece) for piece in _floats(resampler.resample(None)))


def lay_out(pieces: Iterable[tuple[float, np.ndarray]], start: float = 0.0, end: float = math.inf) -> np.ndarray:
    """(seconds, float32 [n]) in order -> float32 [m] of what is heard in [start, end); silence where there is no piece."""
    kept, length = [], 0
    for at, piece in pieces:
        first = round((at - start) * SAMPLE_RATE)
        if kept and abs(first - length) < GAP_SECONDS * SAMPLE_RATE:
            first = length
        piece, first = piece[max(0, length - first) :], max(first, length)  # what was before the start, or said twice
        if math.isfinite(end):
            piece = piece[: max(0, round((end - start) * SAMPLE_RATE) - first)]
        if len(piece):
            kept += [np.zeros(first - length, np.float32), piece]
            length = first + len(piece)
    return np.concatenate(kept) if kept else np.zeros(0, np.float32)


def _raw_chunks(file: BinaryIO, rate: int) -> Iterator[np.ndarray]:
    """Raw s16le mono at `rate` -> chunks; each is handed on as soon as it was read."""
    if rate <= 0:
        raise InputError(f"sample rate {rate}: must be positive")
    yield from _mono(_raw_frames(file, rate))


def _raw_frames(file: BinaryIO, rate: int) -> Iterator[av.AudioFrame]:
    rest, begun = b"", False
    while data := file.read1(READ_BYTES):
        data = rest + data
        if not begun and len(data) >= MARK_BYTES:
            _check_raw(data)
            begun = True
        whole = len(data) // 2 * 2 if begun else 0
        rest = data[whole:]
        if whole:
            frame = av.AudioFrame.from_ndarray(np.frombuffer(data[:whole], "<i2")[None], format="s16", layout="mono")
            frame.sample_rate = rate
            yield frame
    if not begun:
        raise InputError("standard input: no audio arrived: pipe raw 16-bit mono PCM into it")


def _check_raw(head: bytes) -> None:
    for (offset, mark), kind in CONTAINERS.items():
        if head.startswith(mark, offset):
            raise InputError(
                f"standard input: this is {kind} data, not raw PCM: give its path, or pipe it through "
                f"'ffmpeg -i pipe: -f s16le -ac 1 -ar {SAMPLE_RATE} -'"
            )


# ---------------------------------------------------------------- video out


class VideoWriter:
    """H.264 + AAC in an mp4, encoded as pictures and sound arrive.

    Picture n is shown at exactly n / fps, sample m heard at exactly m / sample_rate, both from 0 (an
    edit list hides AAC's 1024 priming samples). The file appears under its own name with the first
    write and grows in fragments: after a kill everything but the last second or so plays (there the
    priming shows, as sound that starts 64 ms before picture 0, in sync). close() turns it into an
    ordinary mp4. Memory: constant, but for the index of that mp4 (15 MB per hour of video).
    """

    MOVFLAGS = "frag_keyframe+delay_moov+hybrid_fragmented"
    BT709 = 1  # in FFmpeg's tables of primaries, transfer curves and matrices
    LIMITED_RANGE = 1
    FRAGMENT_SECONDS = 1

    def __init__(
        self, path: str | Path, width: int, height: int, fps: int | Fraction = FPS, sample_rate: int = SAMPLE_RATE
    ):
        """width, height: pixels, even. Raises InputError when the size or the path cannot work; touches no file."""
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise InputError(f"video size {width}x{height}: H.264 needs even, positive sides")
        self.path, self.width, self.height = Path(path), width, height
        self.fps, self.sample_rate = Fraction(fps), sample_rate
        self.pictures_written = self.samples_written = 0
        self._container, self._failed = None, False
        self._check_path()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, pictures, pcm) -> None:
        """pictures: uint8 [n, H, W, 3]; pcm: float32 [m] mono; the next of each, numpy or torch, n or m may be 0.

        Raises InputError when the disk refuses; what was written before stays playable, nothing more is accepted.
        """
        pictures, pcm = np.asarray(pictures), np.asarray(pcm)
        assert pictures.dtype == np.uint8, pictures.dtype
        assert pictures.shape[1:] == (self.height, self.width, 3), pictures.shape
        assert pcm.dtype == np.float32 and pcm.ndim == 1, (pcm.dtype, pcm.shape)
        assert not self._failed, "write after a failed write"
        try:
            if self._container is None:
                self._open()
            for picture in pictures:
                self._encode(self._video, self._video_frame(picture))
            if len(pcm):
                self._encode(self._audio, self._audio_frame(pcm))
        except av.FFmpegError as error:
            self._container = None  # FFmpeg's muxer must not be touched again after a failed write
            self._failed = True
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Encode what is under way and finish the file; harmless when called twice or before any write."""
        container, self._container = self._container, None
        if container is None:
            return
        try:
            for stream in (self._video, self._audio):
                container.mux(stream.encode(None))
            container.close()
        except av.FFmpegError as error:
            raise InputError(f"{self.path}: cannot be finished: {error.strerror}") from None

    def _check_path(self) -> None:
        folder = self.path.parent
        if self.path.suffix.lower() not in (".mp4", ".m4v", ".mov"):
            raise InputError(f"{self.path}: the video is an mp4: give a name that ends in .mp4")
        if not folder.is_dir():
            raise InputError(f"{self.path}: the folder {folder} does not exist: create it first")
        if self.path.is_dir():
            raise InputError(f"{self.path}: is a folder: give the name of a file")
        if not os.access(self.path if self.path.exists() else folder, os.W_OK):
            raise InputError(f"{self.path}: cannot be written: no permission")

    def _open(self) -> None:
        options = {"movflags": self.MOVFLAGS, "flush_packets": "1"}  # flushed: what is encoded survives a kill
        container = av.open(str(self.path), "w", format="mp4", options=options)
        group = str(round(self.fps * self.FRAGMENT_SECONDS))
        # no B frames: decoding order is display order, so no reordering delay has to be edited away
        coding = {"preset": "veryfast", "crf": "18", "bf": "0", "g": group}
        self._video = container.add_stream("libx264", rate=self.fps, options=coding)
        self._video.width, self._video.height, self._video.pix_fmt = self.width, self.height, "yuv420p"
        context = self._video.codec_context
        context.time_base = 1 / self.fps
        context.colorspace = context.color_primaries = context.color_trc = self.BT709
        context.color_range = self.LIMITED_RANGE
        self._audio = container.add_stream("aac", rate=self.sample_rate, layout="mono", options={"b": "96k"})
        self._container = container

    def _encode(self, stream, frame) -> None:
        self._container.mux(stream.encode(frame))

    def _video_frame(self, picture: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = self.pictures_written, 1 / self.fps
        self.pictures_written += 1
        return frame

    def _audio_frame(self, pcm: np.ndarray) -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(np.clip(pcm, -1.0, 1.0)[None], format="flt", layout="mono")
        frame.sample_rate = self.sample_rate
        frame.pts, frame.time_base = self.samples_written, Fraction(1, self.sample_rate)
        self.samples_written += len(pcm)
        return frame
