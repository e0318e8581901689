"""/v1/watermark:detect: was this video made by this server (WM-1)? The strangers' file is decoded by another process."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from fastapi import APIRouter, Body

from liveavatar.serving.access import CONTROL, VIEW
from liveavatar.serving.problems import Unprocessable
from liveavatar.serving.services import BEARER, At, Who
from liveavatar.serving.watermark import Detector, Reading
from liveavatar.serving.wire import MarkView, problems

VIDEO_BYTES = 200_000_000
PICTURES, PIXELS = 50, 9_000_000  # read of a video; of each picture
CPU_SECONDS, MEMORY, WALL_SECONDS = 20, 2_000_000_000, 40.0  # of the process that decodes
SIZE, LONGEST = struct.Struct("<II"), 200  # bytes of what the process says
WORKER = Path(__file__).with_name("pictureworker.py")
KINDS = "A video file: mp4, webm, mkv, flv, ts, avi"

router = APIRouter(prefix="/v1", tags=["provenance"], dependencies=[BEARER])


@router.post("/watermark:detect", response_model=MarkView, responses=problems(400, 403, 413))
async def detect(who: Who, at: At, video: Annotated[bytes, Body(media_type="application/octet-stream", description=KINDS)]) -> MarkView:
    """Look for this server's invisible mark in the first pictures of a video."""
    who.need_key()
    who.need(VIEW, CONTROL)
    if at.mark_key is None:
        raise Unprocessable("this server marks nothing: see provenance.watermark", kind="watermark")
    async with at.one_video:
        reading = await asyncio.to_thread(read_mark, video, at.mark_key)
    return MarkView(found=reading.found, payload=f"{reading.payload:08x}" if reading.found else None, confidence=reading.confidence,
                    false_alarm=reading.false_alarm, pictures=reading.pictures)  # fmt: skip


def read_mark(video: bytes, key: bytes) -> Reading:
    """Blocks. Raises Unprocessable."""
    command = [sys.executable, "-I", str(WORKER), *map(str, (PICTURES, PIXELS, CPU_SECONDS, MEMORY))]
    quiet = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # nothing of ours, no secret
    detector = Detector(key)
    with tempfile.TemporaryFile() as file:
        file.write(video)
        file.seek(0)
        with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet, cwd="/",
                              start_new_session=True) as worker:  # fmt: skip
            alarm = threading.Timer(WALL_SECONDS, worker.kill)
            alarm.start()
            try:
                _feed(detector, worker.stdout)
                words = worker.stderr.read(LONGEST)
            finally:
                alarm.cancel()
    if worker.returncode:
        raise Unprocessable(words.decode("utf-8", "replace").strip() if worker.returncode == 1 else "the video cannot be decoded within the limits")
    return detector.read()


def _feed(detector: Detector, pictures: BinaryIO) -> None:
    """pictures: what pictureworker.py writes, one at a time in memory."""
    if len(size := pictures.read(SIZE.size)) < SIZE.size:
        return
    width, height = SIZE.unpack(size)
    while len(pixels := pictures.read(3 * width * height)) == 3 * width * height:
        detector.add(np.frombuffer(pixels, np.uint8).reshape(height, width, 3))
