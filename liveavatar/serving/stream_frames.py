"""Binary messages of the stream socket (12.1): a header of 12 bytes, little-endian, then sound."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import av
import numpy as np

from liveavatar.serving.packets import SOUND_RATE
from liveavatar.serving.problems import Invalid, Unprocessable

HEADER = struct.Struct("<IIHH")  # epoch, segment, flags, reserved
MESSAGE_BYTES = 1_000_000
START, END, FORMAT, FORMAT_SHIFT = 0x0001, 0x0002, 0x0F00, 8  # flags; the format is a number in four bits
PCM, OPUS = 0, 1  # 16-bit little-endian mono at the rate last named; one Opus packet
OPUS_BYTES = 61_298  # the longest packet: 48 frames of 1,275 bytes, and their lengths


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. start, end: of its segment."""

    epoch: int
    segment: int
    start: bool
    end: bool
    format: int
    sound: bytes


def unpack(message: bytes) -> Frame:
    """Raises Invalid."""
    if not HEADER.size <= len(message) <= MESSAGE_BYTES:
        raise Invalid(f"a message has {HEADER.size} to {MESSAGE_BYTES} bytes, this one {len(message)}")
    epoch, segment, flags, reserved = HEADER.unpack_from(message)
    format = (flags & FORMAT) >> FORMAT_SHIFT
    if reserved or flags & ~(START | END | FORMAT) or format not in (PCM, OPUS):
        raise Invalid(f"flags 0x{flags:04x}, reserved 0x{reserved:04x}: bits that mean nothing are 0, the format is 0 (PCM) or 1 (Opus)")
    return Frame(epoch, segment, bool(flags & START), bool(flags & END), format, message[HEADER.size :])


def pack(epoch: int, segment: int, sound: bytes, *, start: bool = False, end: bool = False, format: int = PCM) -> bytes:
    """What a client sends."""
    return HEADER.pack(epoch, segment, START * start | END * end | format << FORMAT_SHIFT, 0) + sound


class SoundReader:
    """Sound of the frames of one socket. rate: Hz of PCM. An Opus decoder lives from the start of a segment to its end."""

    def __init__(self, rate: int):
        self.rate = rate
        self._opus: av.CodecContext | None = None
        self._run: tuple[int, int] | None = None

    def read(self, frame: Frame) -> tuple[np.ndarray, int]:
        """int16 [n] mono and its rate. Raises Invalid, Unprocessable for what is no Opus."""
        if frame.format == OPUS:
            return self._decode(frame), SOUND_RATE
        if len(frame.sound) % 2:
            raise Invalid("PCM has two bytes a sample")
        return np.frombuffer(frame.sound, "<i2"), self.rate

    def _decode(self, frame: Frame) -> np.ndarray:
        if not frame.sound:
            return np.zeros(0, np.int16)
        if len(frame.sound) > OPUS_BYTES:
            raise Invalid("longer than any Opus packet")
        if frame.start or self._opus is None or self._run != (frame.epoch, frame.segment):
            self._opus, self._run = _opus_decoder(), (frame.epoch, frame.segment)
        try:
            decoded = [piece.to_ndarray() for piece in self._opus.decode(av.Packet(frame.sound))]
        except av.FFmpegError:
            self._opus = None
            raise Unprocessable("not an Opus packet", kind="opus") from None
        return np.concatenate([_mono(piece) for piece in decoded]) if decoded else np.zeros(0, np.int16)


def _opus_decoder() -> av.CodecContext:
    decoder = av.CodecContext.create("libopus", "r")
    decoder.sample_rate, decoder.layout = SOUND_RATE, "mono"
    return decoder


def _mono(samples: np.ndarray) -> np.ndarray:
    """int16 of libopus, [1, n] packed mono."""
    return np.ascontiguousarray(samples.reshape(-1)).astype(np.int16)
