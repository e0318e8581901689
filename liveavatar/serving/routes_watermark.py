"""/v1/watermark:detect: was this video made by this server (WM-1)? The strangers' file is decoded by another process."""

from __future__ import annotations

import asyncio
import struct
import tempfile
import threading
from typing import BinaryIO

import numpy as np
from fastapi import APIRouter, Request

from liveavatar.serving.access import CONTROL, VIEW
from liveavatar.serving.problems import Unprocessable
from liveavatar.serving.routes_sessions import BINARY
from liveavatar.serving.services import BEARER, At, Who
from liveavatar.serving.uploads import refusal, worker
from liveavatar.serving.watermark import Detector, Reading
from liveavatar.serving.wire import MarkView, problems

VIDEO_BYTES = 200_000_000
PICTURES, STREAMS, PIXELS = 50, 8, 9_000_000  # read of a video; in it at most; of each picture
CPU_SECONDS, MEMORY, WALL_SECONDS = 20, 2_000_000_000, 40.0  # of the process that decodes
SIZE = struct.Struct("<II")  # of the pictures
KINDS = "A video file: mp4, webm, mkv, flv, ts, avi"

router = APIRouter(prefix="/v1", tags=["provenance"], dependencies=[BEARER])


@router.post("/watermark:detect", response_model=MarkView, responses=problems(400, 403, 413, 503),
             openapi_extra={"requestBody": {"required": True, "description": KINDS, "content": {"application/octet-stream": {"schema": BINARY}}}})  # fmt: skip
async def detect(request: Request, who: Who, at: At) -> MarkView:
    """Look for this server's invisible mark in the first pictures of a video."""
    who.need_key(VIEW, CONTROL)
    if at.mark_key is None:
        raise Unprocessable("this server marks nothing: see provenance.watermark", kind="watermark")
    with tempfile.TemporaryFile() as file:  # not in memory: many may wait
        async for piece in request.stream():
            file.write(piece)
        async with at.one_video:
            reading = await asyncio.to_thread(read_mark, file, at.mark_key)
    return MarkView(found=reading.found, payload=f"{reading.payload:08x}" if reading.found else None, confidence=reading.confidence,
                    false_alarm=reading.false_alarm, pictures=reading.pictures)  # fmt: skip


def read_mark(video: BinaryIO, key: bytes) -> Reading:
    """The mark of a stranger's video file. Blocks. Raises Unprocessable, Capacity."""
    detector = Detector(key)
    video.seek(0)
    with worker(CPU_SECONDS, MEMORY, "pictures", PICTURES, STREAMS, PIXELS, stdin=video) as process:
        alarm = threading.Timer(WALL_SECONDS, process.kill)
        alarm.start()
        try:
            _feed(detector, process.stdout)
            words = process.stderr.read()
        finally:
            alarm.cancel()
    if process.returncode:
        raise refusal(words)
    return detector.read()


def _feed(detector: Detector, pictures: BinaryIO) -> None:
    """pictures: what decodeworker.py writes, one at a time in memory."""
    if len(size := pictures.read(SIZE.size)) < SIZE.size:
        return
    width, height = SIZE.unpack(size)
    while len(pixels := pictures.read(3 * width * height)) == 3 * width * height:
        detector.add(np.frombuffer(pixels, np.uint8).reshape(height, width, 3))
