"""What strangers send us: portraits and recordings, made harmless before anything else touches them (serving.md 18.3).

    png = portrait(data)                       # -> PNG of the pixels alone: upright, RGB, no EXIF, no ICC, no name; blocks: in a thread
    pcm, rate = await Recordings().decode(data)   # -> float32 16 kHz mono, decoded in a process of its own with limits

How many bytes may come is the business of whoever receives them (gate.py, while they arrive; ssrf.fetch). The client's file name is
never seen here. Errors are problem details.
"""

from __future__ import annotations

import asyncio
import io
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from liveavatar.core import SAMPLE_RATE
from liveavatar.serving.problems import Capacity, Problem, TooLarge, Unprocessable, Unsupported

MAX_PIXELS = 25_000_000
MIN_SIDE = 64  # pixels, as conditioning.identity wants
MAX_SIDE = 4096  # of what is kept: larger ones are scaled down
PICTURES = {"JPEG": (0, b"\xff\xd8\xff"), "PNG": (0, b"\x89PNG\r\n\x1a\n"), "WEBP": (8, b"WEBP")}
SOUNDS = ((0, b"RIFF"), (0, b"OggS"), (0, b"fLaC"), (0, b"ID3"), (4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (0, b"FORM"))
BROKEN = (OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, struct.error, MemoryError, EOFError)  # of Pillow, on bad data
WORKER, WORDS = Path(__file__).with_name("decodeworker.py"), 200  # characters of what it says that are passed on


@dataclass(frozen=True, kw_only=True)
class SoundLimits:
    """What decoding one recording may cost. seconds: of sound. streams: in the file. rate: Hz. wall, cpu: seconds. memory: bytes."""

    seconds: float = 600.0
    streams: int = 8
    rate: int = 192_000
    channels: int = 8
    wall: float = 30.0
    cpu: int = 20
    memory: int = 1_500_000_000


# ---------------------------------------------------------------- pictures


def picture_kind(data: bytes) -> str:
    """JPEG, PNG or WEBP by the first bytes. Raises Unsupported."""
    for kind, (offset, mark) in PICTURES.items():
        if data.startswith(mark, offset) and (kind != "WEBP" or data.startswith(b"RIFF")):
            return kind
    raise Unsupported("not a picture that is taken here: send JPEG, PNG or WebP")


def portrait(data: bytes) -> bytes:
    """An uploaded picture -> PNG of its pixels, upright sRGB, at most MAX_SIDE a side. Raises Unsupported, TooLarge, Unprocessable."""
    kind = picture_kind(data)
    try:
        return _encoded(_pixels(_opened(kind, data)))
    except Image.DecompressionBombError:  # Pillow's own bound, eight times ours, is passed before ours
        raise TooLarge(_too_large(), kind="pixels") from None
    except BROKEN:  # what Pillow says may quote the data
        raise Unprocessable(f"the {kind} data is damaged: save the picture again") from None


def _too_large() -> str:
    return f"more than {MAX_PIXELS // 1_000_000} million pixels"


def _opened(kind: str, data: bytes) -> Image.Image:
    """The picture with its header read and checked, its pixels not yet decoded."""
    image = Image.open(io.BytesIO(data), formats=(kind,))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise TooLarge(_too_large(), kind="pixels")
    if min(width, height) < MIN_SIDE:
        raise Unprocessable(f"{width}x{height} pixels: a portrait needs at least {MIN_SIDE} a side")
    if getattr(image, "n_frames", 1) > 1:
        raise Unprocessable("an animation: send a still picture")
    return image


def _pixels(image: Image.Image) -> Image.Image:
    """Decoded, upright, in sRGB, transparent parts white; a fresh picture that carries nothing else."""
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "I;16" or upright.mode == "I":  # 16 bits of grey
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif profile and upright.mode in ("RGB", "CMYK", "L"):
        upright = _in_srgb(upright, profile)
    rgb = upright.convert("RGB")
    if max(rgb.size) > MAX_SIDE:
        rgb.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(rgb))


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours through the embedded profile; a profile that is no good is as none."""
    try:
        return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *BROKEN):
        return image


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return file.getvalue()


# ---------------------------------------------------------------- sound


class Recordings:
    """Decodes what is uploaded, a few at once; more wait their turn, as many as the listener lets requests wait."""

    def __init__(self, limits: SoundLimits = SoundLimits(), at_once: int = 2):
        self._limits, self._turn = limits, asyncio.Semaphore(at_once)

    async def decode(self, data: bytes) -> tuple[np.ndarray, int]:
        """float32 [n] mono and its Hz. Raises what recording() raises."""
        async with self._turn:
            return await asyncio.to_thread(recording, data, self._limits), SAMPLE_RATE


def recording(data: bytes, limits: SoundLimits = SoundLimits()) -> np.ndarray:
    """An uploaded recording -> float32 [n], 16 kHz mono.

    A process of its own decodes it from its standard input: it opens no other file and no address, and dies when it takes
    more time or memory than `limits`. Raises Unsupported, TooLarge, Unprocessable; Capacity when the machine cannot start it.
    """
    if not any(data.startswith(mark, offset) for offset, mark in SOUNDS) and not _is_mpeg_audio(data):
        raise Unsupported("not a recording that is taken here: send WAV, FLAC, MP3, M4A, Ogg, WebM or AIFF")
    with worker(limits.cpu, limits.memory, "sound", limits.seconds, limits.streams, limits.rate, limits.channels, stdin=subprocess.PIPE) as process:
        try:
            pcm, words = process.communicate(data, timeout=limits.wall)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Unprocessable(f"the recording took more than {limits.wall:g} s to decode") from None
    if process.returncode:
        raise refusal(words)
    return np.frombuffer(pcm, "<f4")


def _is_mpeg_audio(data: bytes) -> bool:
    """MP3 without a tag, or AAC in ADTS: eleven or twelve set bits begin a frame."""
    return len(data) > 2 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0


# ---------------------------------------------------------------- the process that decodes


def worker(cpu: int, memory: int, job: str, *limits: float, stdin: int | BinaryIO) -> subprocess.Popen:
    """decodeworker.py at work on what comes from `stdin`: in a process group of its own, with nothing of ours and no secret in its
    environment. Raises Capacity when the machine cannot start it."""
    quiet = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(WORKER), *map(str, (cpu, memory, job, *limits))]
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet, cwd="/", start_new_session=True)
    except OSError as error:
        raise Capacity(f"no process to decode the file: {error.strerror}") from None


def refusal(words: bytes) -> Problem:
    """Why it ended with a status that is not 0. words: what it said on stderr, nothing where a limit killed it."""
    kind, _, text = words.decode("utf-8", "replace").strip().partition("\t")
    if kind == "long":
        return TooLarge(text[:WORDS])
    return Unprocessable(text[:WORDS] if kind == "refused" else "the file cannot be decoded within the limits")
