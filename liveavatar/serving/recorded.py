"""Speech in the body of a request: raw PCM, or any recording, which another process decodes (uploads.py)."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import numpy as np
from fastapi import Request

from liveavatar.serving.problems import Invalid, Unprocessable, Unsupported
from liveavatar.serving.uploads import Recordings

PCM = ("audio/pcm", "audio/x-pcm")
RECORDINGS = ("audio/", "video/", "application/octet-stream", "application/ogg")


async def read_speech(request: Request, rate: int, recordings: Recordings) -> tuple[np.ndarray, int]:
    """Samples and their rate. rate: Hz of audio/pcm. Raises Unsupported, Invalid, Unprocessable, TooLarge, Capacity."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not kind.startswith(RECORDINGS):
        raise Unsupported("Content-Type: audio/pcm (16-bit little-endian mono), or that of a recording, e.g. audio/wav")
    data = await request.body()
    if not data:
        raise Unprocessable("the body is empty", kind="empty")
    if kind not in PCM:
        return await recordings.decode(data)
    if len(data) % 2:
        raise Invalid("PCM has two bytes a sample")
    return np.frombuffer(data, "<i2"), rate


async def pieces(pcm: np.ndarray, rate: int) -> AsyncGenerator[tuple[np.ndarray, int], None]:
    """Speech that is there already, as the voice's would come."""
    yield pcm, rate
