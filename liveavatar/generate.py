"""The main job: a portrait and speech become an mp4, through the same Engine that serves people live.

A file is a client that pushes chunks: PCM goes in while pictures come out, each block is encoded as
it is decoded, and nothing grows with the length of the recording.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liveavatar.conditioning.identity import load_picture
from liveavatar.conditioning.media import VideoWriter, read_audio
from liveavatar.config import Config
from liveavatar.core import FPS, SAMPLE_RATE, InputError, LiveAvatarError
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.sources import sized
from liveavatar.telemetry import now

ASSETS = Path(__file__).parent / "assets"
PORTRAIT, SPEECH = ASSETS / "portrait.png", ASSETS / "speech.wav"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What goes in and where it comes out. audio: a file, or "-" for raw PCM on stdin (int16, mono, 16 kHz).

    marker: (height, width) -> what is done to every picture of the file, uint8 [H, W, 3] -> the same; None: nothing.
    """

    image: Path = PORTRAIT
    audio: str = str(SPEECH)
    out: Path = Path("out.mp4")
    length: float | None = None  # seconds of audio to use at most; None: all
    marker: Callable[[int, int], Callable[[np.ndarray], np.ndarray]] | None = None


@dataclass
class Done:
    """How far a job has come. Times are telemetry seconds; pictures are those already encoded."""

    started: float = 0.0  # the job began
    opened: float = 0.0  # the models are loaded and the session is being opened
    first: float | None = None  # the first picture was there
    last: float = 0.0
    pictures: int = 0
    height: int = 0
    width: int = 0

    @property
    def seconds(self) -> float:
        """Length of the video so far."""
        return self.pictures / FPS

    @property
    def rate(self) -> float:
        """Pictures per second of wall time since the session was opened."""
        return self.pictures / max(self.last - self.opened, 1e-9)

    @property
    def loading(self) -> float:
        """Seconds until the models were loaded and every rank was ready."""
        return self.opened - self.started

    @property
    def wait(self) -> float | None:
        """Seconds from opening the session (models loaded) to its first picture."""
        return None if self.first is None else self.first - self.opened


def generate(config: Config, job: Job, report: Callable[[Done], None] = lambda done: None) -> Done:
    """Make job.out (H.264 + AAC, 25 fps) and say how it went; `report` is called after each block.

    Raises InputError before any model is loaded when portrait or audio cannot be used, other
    LiveAvatarErrors from the engine. On KeyboardInterrupt the file ends with the last whole block and plays.
    """
    picture = load_picture(job.image)
    chunks = _limited(read_audio(job.audio), job.length)
    VideoWriter(job.out, 2, 2)  # refuses a path that cannot work and touches no file
    _refuse_own_input(job)
    config = sized(replace(config, runtime=replace(config.runtime, sessions=1)), picture)  # it opens no other
    done = Done(started=now())
    try:
        asyncio.run(_run(config, job, picture, chunks, done, report))
    except InputError:
        if done.first is not None:  # the recording broke half way: leave nothing that looks like a result
            job.out.unlink(missing_ok=True)
            if _older(job.out).exists():
                _older(job.out).replace(job.out)
        raise
    finally:
        _older(job.out).unlink(missing_ok=True)
    return done


def _older(path: Path) -> Path:
    """Where an earlier result waits until the new one is whole."""
    return path.with_name(f".{path.name}.older")


def _set_aside(path: Path) -> None:
    if path.is_file() and not path.is_symlink() and os.access(path.parent, os.W_OK):
        path.replace(_older(path))


def _refuse_own_input(job: Job) -> None:
    """Writing starts while the recording is still being read."""
    for option, path in (("--audio", Path(job.audio)), ("--image", Path(job.image))):
        if job.out.exists() and path.exists() and job.out.samefile(path):
            raise InputError(f"{job.out}: is the file given as {option} too: choose another name for the result")


async def _run(config, job, picture, chunks, done, report) -> None:
    engine = await Engine.start(config)
    try:
        done.opened = done.last = now()
        session = await engine.open(picture, prompt=config.prompt, seed=config.seed)
        tasks = [
            asyncio.create_task(_feed(session, chunks)),
            asyncio.create_task(_record(session, job, done, report, engine.trace)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:  # also reached by Ctrl-C: let the recorder close its file before the engine goes
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
    finally:
        await engine.aclose()


async def _feed(session, chunks: Iterator[np.ndarray]) -> None:
    async for pcm in _from_thread(chunks):
        await session.push_audio(pcm, rate=SAMPLE_RATE)
    await session.end_audio()


async def _record(session, job: Job, done: Done, report: Callable[[Done], None], trace) -> None:
    """Encode what the session makes; one thread holds the muxer, so writes keep their order and never race the close."""
    loop, writer, mark = asyncio.get_running_loop(), None, None

    def write(out) -> None:  # all on the thread: a cancelled wait (Ctrl-C) still writes, counts and reports this block
        writer.write(out.pictures if mark is None else np.stack([mark(picture) for picture in np.asarray(out.pictures)]), out.pcm)
        trace.sent(session.name, out.epoch, out.index, float(out.pts), out.pictures)
        done.pictures += len(out.pictures)
        done.last = now()
        report(done)

    with ThreadPoolExecutor(1, "writer") as thread:
        try:
            async for out in session:
                if writer is None:
                    _, height, width, _ = out.pictures.shape
                    done.first, done.height, done.width = now(), height, width
                    mark = job.marker and job.marker(height, width)
                    _set_aside(job.out)
                    writer = VideoWriter(job.out, width, height, fps=FPS, sample_rate=SAMPLE_RATE)
                await loop.run_in_executor(thread, write, out)
        finally:
            if writer is not None:
                await asyncio.shield(loop.run_in_executor(thread, writer.close))


async def _from_thread(chunks: Iterator[np.ndarray]) -> AsyncIterator[np.ndarray]:
    """Iterate a blocking source without stopping the loop. A daemon thread, so a silent stdin never delays the exit."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue = asyncio.Queue(maxsize=4)  # full: the source is read no faster than the engine takes it
    over = threading.Event()

    def put(item) -> bool:
        """False when nobody listens any more: the loop is closing or closed."""
        try:
            if not over.is_set():
                asyncio.run_coroutine_threadsafe(queue.put(item), loop).result()
        except (CancelledError, RuntimeError):
            over.set()
        return not over.is_set()

    def read() -> None:
        outcome = InputError("the audio source broke off; the traceback above says where")  # unless proven otherwise
        try:
            for pcm in chunks:
                if not put(pcm):
                    return
            outcome = None
        except LiveAvatarError as error:
            outcome = error
        finally:
            put(outcome)

    threading.Thread(target=read, name="audio-source", daemon=True).start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, LiveAvatarError):
                raise item
            yield item
    finally:
        over.set()


def _limited(chunks: Iterable[np.ndarray], seconds: float | None) -> Iterator[np.ndarray]:
    left = None if seconds is None else round(seconds * SAMPLE_RATE)
    for pcm in chunks:
        if left is not None:
            pcm = pcm[:left]
            left -= len(pcm)
        yield pcm
        if left == 0:
            return
