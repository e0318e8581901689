"""Ticks become packets, once for all who watch: H.264 any browser takes, Opus for WebRTC, AAC for RTMP, HLS and files.

Every encoder delays what it is given (Opus by its pre-skip, AAC by 1,024 samples of priming). A packet's pts is the
place on the session's clock of what a decoder makes of it, so picture n and the sound of tick n meet exactly and
the first packets of sound lie before 0. Whoever cannot write negative times starts at the first picture.
"""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction
from functools import lru_cache
from uuid import NAMESPACE_URL, uuid5

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from liveavatar.core import FPS, ConfigError
from liveavatar.serving.packets import AAC, H264, OPUS, SOUND_RATE, TICK_SAMPLES, VIDEO_RATE, Packet, Tick
from liveavatar.serving.settings import MediaConfig

TICK_PTS = VIDEO_RATE // FPS  # of a picture: 3,600
QUALITY = "18"  # crf: easy pictures take fewer bits than media.bitrate allows
BUFFER_SECONDS = 0.5  # of bits an IDR may run ahead of the bitrate
BT709, LIMITED_RANGE = 1, 1  # in FFmpeg's tables
SPS, PPS = 7, 8
START = b"\0\0\1"
IDR_SLICE = re.compile(START + b"[\x25\x45\x65]")
DISCLOSURE = uuid5(NAMESPACE_URL, "https://liveavatar.dev/ai_generated").bytes + b'{"ai_generated": true}'
SEI = b"\0" + START + bytes((6, 5, len(DISCLOSURE))) + DISCLOSURE + b"\x80"  # user data of nobody's standard: a UUID and text


# ---------------------------------------------------------------- pictures


class VideoEncoder:
    """Pictures -> H.264, constrained baseline, no B frames, one packet per picture and at once (Annex B).

    width, height: of the pictures that go in, pixels; `width`, `height` of the encoder are those that come out
    (media.scale times larger, `shrink` times smaller). `name`: libx264 or h264_nvenc. `extradata`: SPS and PPS, which also stand in front of
    each IDR, as does an SEI that says who made the pictures: a machine (WM-2). Raises ConfigError for odd sizes and for an
    encoder that was asked for and does not work here.
    """

    def __init__(self, width: int, height: int, config: MediaConfig, *, shrink: int = 1):
        self.shrink, self.width, self.height = shrink, width * config.scale // shrink, height * config.scale // shrink
        if self.width % 2 or self.height % 2:
            raise ConfigError(f"video size {self.width}x{self.height}: H.264 needs even sides; media.scale=2 makes them even")
        self.name, self.extradata, self._context = _opened(self.width, self.height, config)
        self._shape, self._group, self._reformat = (height, width, 3), _group(config), VideoReformatter()
        self._last_key: int | None = None  # index of its tick
        self._inside: deque[tuple[int, int, float]] = deque()  # index, epoch, made of pictures without a packet yet

    def encode(self, tick: Tick, made: float, keyframe: bool = False) -> list[Packet]:
        """The packet of this tick's picture; keyframe: make it an IDR, as the first and each keyframe_seconds later is.

        made: clock seconds, passed on. Ticks may be left out, their indices must grow.
        """
        assert tick.picture.dtype == np.uint8 and tick.picture.shape == self._shape, (tick.picture.dtype, tick.picture.shape)
        frame = self._frame(tick.picture)
        frame.pts, frame.time_base = tick.index, Fraction(1, FPS)
        if keyframe or self._last_key is None or tick.index - self._last_key >= self._group:
            frame.pict_type, self._last_key = PictureType.I, tick.index
        self._inside.append((tick.index, tick.epoch, made))
        return [self._packet(packet) for packet in self._context.encode(frame)]

    def _frame(self, picture: np.ndarray) -> av.VideoFrame:
        """One pass of swscale: size, colours, limited range; on this thread, for handing out slices costs more than it gains."""
        frame = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(picture), format="rgb24")
        return self._reformat.reformat(frame, self.width, self.height, "yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG",
                                       interpolation="BILINEAR", threads=1)  # fmt: skip

    def _packet(self, packet: av.Packet) -> Packet:
        index, epoch, made = self._inside.popleft()
        assert packet.pts == packet.dts == index, (packet.pts, packet.dts, index)
        data = bytes(packet)
        if packet.is_keyframe:
            at = IDR_SLICE.search(data).start()
            data = data[:at].removesuffix(b"\0") + SEI + b"\0" + data[at:]
        return Packet(codec=H264, data=data, pts=index * TICK_PTS, duration=TICK_PTS, rate=VIDEO_RATE,
                      keyframe=packet.is_keyframe, epoch=epoch, made=made)  # fmt: skip


def _group(config: MediaConfig) -> int:
    return max(1, round(config.keyframe_seconds * FPS))


def _opened(width: int, height: int, config: MediaConfig) -> tuple[str, bytes, av.VideoCodecContext]:
    """An encoder: its name, its parameter sets, itself. auto: NVENC where this GPU encodes a picture of this size, else x264."""
    for name in ("h264_nvenc", "libx264") if config.encoder == "auto" else (config.encoder,):
        sets, reason = _proved(name, width, height, config)
        if sets:
            try:
                return name, sets, _context(name, width, height, config)
            except av.FFmpegError as error:  # it can, but not once more: some GPUs open a few at a time
                reason = error.strerror
    raise ConfigError(f"media.encoder={config.encoder}: cannot encode a picture of {width}x{height} here ({reason}); auto takes what works")


@lru_cache(maxsize=16)  # that a GPU has no encoder takes as long to find out as to open one
def _proved(name: str, width: int, height: int, config: MediaConfig) -> tuple[bytes, str]:
    """SPS and PPS (Annex B) of the encoder `name`, by really encoding one picture; or nothing, and why it cannot.

    A driver may list an encoder that the GPU does not have (A100, H100), or refuse a size only when it is opened.
    """
    try:
        data = _one_picture(_context(name, width, height, config))
    except av.FFmpegError as error:
        return b"", error.strerror
    return b"".join(b"\0" + START + unit for unit in _units(data) if unit[0] & 31 in (SPS, PPS)), ""


def _one_picture(context: av.VideoCodecContext) -> bytes:
    frame = av.VideoFrame(context.width, context.height, "yuv420p")
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.pts, frame.time_base = 0, Fraction(1, FPS)
    return b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None)))


def _units(data: bytes) -> list[bytes]:
    """NAL units of an Annex B stream, without start codes."""
    return [unit.rstrip(b"\0") for unit in data.split(START)[1:] if unit]


def _context(name: str, width: int, height: int, config: MediaConfig) -> av.VideoCodecContext:
    context = av.CodecContext.create(name, "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.framerate, context.time_base = FPS, Fraction(1, FPS)
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE
    common = {"bf": "0", "g": str(_group(config)), "forced-idr": "1", "profile": "baseline",
              "maxrate": str(config.bitrate), "bufsize": str(round(config.bitrate * BUFFER_SECONDS))}  # fmt: skip
    if name == "libx264":
        context.thread_count = 1  # more threads cut a picture in slices: little gain below 1080p, and cores are scarce
        context.options = {**common, "preset": config.preset, "tune": "zerolatency", "crf": QUALITY, "sc_threshold": "0"}
    else:
        context.bit_rate = config.bitrate
        context.options = {**common, "tune": "ull", "zerolatency": "1", "delay": "0", "rc": "cbr"}
    context.open()
    return context


# ---------------------------------------------------------------- sound


class _SoundEncoder:
    """48 kHz mono -> packets of `samples`. `extradata`: what a file or a server needs to know of the stream."""

    codec: str
    library: str
    sample_format: str
    samples: int  # of one packet

    def __init__(self, config: MediaConfig):
        context = av.CodecContext.create(self.library, "w")
        context.sample_rate, context.layout, context.format = SOUND_RATE, "mono", self.sample_format
        context.bit_rate, context.time_base = config.sound_bitrate, Fraction(1, SOUND_RATE)
        context.open()
        assert context.frame_size == self.samples, context.frame_size
        self.extradata: bytes = context.extradata
        self._context, self._rest, self._end = context, np.zeros(0, np.int16), None

    def encode(self, tick: Tick, made: float = 0.0) -> list[Packet]:
        """The packets that this tick's sound completes; each carries this tick's epoch. made: clock seconds, passed on.

        Where ticks are left out the sound begins anew at its own place: what did not fill a packet is lost.
        """
        assert tick.sound.dtype == np.int16 and tick.sound.shape == (TICK_SAMPLES,), (tick.sound.dtype, tick.sound.shape)
        start = tick.index * TICK_SAMPLES
        if start != self._end:
            assert self._end is None or start > self._end, (start, self._end)
            self._rest = self._rest[:0]
        start -= len(self._rest)
        sound = np.concatenate([self._rest, tick.sound])
        whole = len(sound) // self.samples * self.samples
        self._rest, self._end = sound[whole:], start + len(sound)
        frames = [self._frame(sound[at : at + self.samples], start + at) for at in range(0, whole, self.samples)]
        return [self._packet(packet, tick.epoch, made) for frame in frames for packet in self._context.encode(frame)]

    def _frame(self, sound: np.ndarray, position: int) -> av.AudioFrame:
        if self.sample_format == "fltp":
            sound = sound.astype(np.float32) / 32768
        frame = av.AudioFrame.from_ndarray(sound[None], format=self.sample_format, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, position, Fraction(1, SOUND_RATE)
        return frame

    def _packet(self, packet: av.Packet, epoch: int, made: float) -> Packet:
        return Packet(codec=self.codec, data=bytes(packet), pts=packet.pts, duration=self.samples, rate=SOUND_RATE,
                      keyframe=True, epoch=epoch, made=made)  # fmt: skip


class OpusEncoder(_SoundEncoder):
    """Sound -> Opus of 20 ms, two packets a tick, one channel. `extradata`: OpusHead, whose pre-skip the pts already pay for."""

    codec, library, sample_format, samples = OPUS, "libopus", "s16", SOUND_RATE // 50


class AacEncoder(_SoundEncoder):
    """Sound -> raw AAC-LC of 1,024 samples, one channel. `extradata`: the AudioSpecificConfig."""

    codec, library, sample_format, samples = AAC, "aac", "fltp", 1024
