"""A live session by the wall clock, on tape: speech as it is spoken, interruptions and portraits at their times.

The session is the one that people get (live.py). The mp4 holds every tick from the first generated picture on, and to
the trace of the engine are added the times at which ticks left, by the file's own time stamps.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from liveavatar.conditioning.identity import load_picture
from liveavatar.conditioning.media import VideoWriter, read_audio
from liveavatar.config import Config
from liveavatar.core import FPS, SAMPLE_RATE, LiveAvatarError
from liveavatar.runtime.sources import sized
from liveavatar.serving.live import LiveSession
from liveavatar.serving.packets import SOUND_RATE, TICK_SAMPLES, Tick
from liveavatar.serving.playout import FADE_SAMPLES
from liveavatar.serving.rehearsal import EDGE_SECONDS, Ticks, write
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig, SessionsConfig
from liveavatar.serving.studio import Studio
from liveavatar.telemetry import NoTrace, Trace, now

PIECE = SAMPLE_RATE // FPS  # samples that a microphone gives at a time
PAUSE = 12  # silent pieces that end an utterance: they are not pushed
LOOK_SECONDS = 0.01

Event = tuple[float, str, Path | None]  # seconds from the first sample; interrupt | portrait; the portrait's file


class Tape(Ticks):
    """Every tick from the first that the engine made, noted in the trace as it leaves."""

    def __init__(self, clock: Callable[[], float]):
        super().__init__("tape", seconds=EDGE_SECONDS, sound_seconds=EDGE_SECONDS)
        self.trace: Trace | NoTrace = NoTrace()
        self.clock, self.session, self.pictures = clock, "", 0

    def follow(self, line: dict) -> None:
        """A line of the trace: it says what the engine calls the session."""
        if line["event"] == "open" and line["pace"] == "live":
            self.session = line["session"]

    def put(self, item: Tick) -> None:
        """Note it, and queue it for the file."""
        if item.block < 0 and not self.pictures:
            return
        pts = self.pictures / FPS
        if item.block >= 0:
            due = self.clock() - item.late
            self.trace.sent(self.session, item.epoch, item.block, pts, item.picture[None], due)
        else:
            self.trace.note("repeated", session=self.session, count=1)
        if item.sound.any():  # without a picture of its own it is the faded end of what was cut off
            cut = item.kind == "filler"
            epoch, seconds = (item.epoch - 1, FADE_SAMPLES / SOUND_RATE) if cut else (item.epoch, 1 / FPS)
            self.trace.note("played", session=self.session, epoch=epoch, pts=pts, seconds=seconds)
        self.pictures += 1
        super().put(item)


def tape(config: Config, portrait: Path, audio: Path, events: Sequence[Event], out: Path) -> None:
    """Make `out`, and the trace if the config asks for one; takes as long as the recording. Raises LiveAvatarError."""
    picture = load_picture(portrait)
    engine = sized(replace(config, runtime=replace(config.runtime, sessions=1)), picture)
    role = Role(avatar="tape", picture=picture, prompt=config.prompt, seed=config.seed)
    # overload is to be seen, so nothing is left out under it
    settings = ServeConfig(engine=engine, sessions=SessionsConfig(degrade=False))
    asyncio.run(_tape(settings, role, np.concatenate(list(read_audio(audio))), events, out))


async def _tape(config: ServeConfig, role: Role, pcm: np.ndarray, events: Sequence[Event], out: Path) -> None:
    film = Tape(now)
    studio = Studio(config, notes=film.follow)
    try:
        await studio.start()
        film.trace = studio.engine.trace
        live = await studio.open(role)
        with VideoWriter(out, live.width, live.height, fps=FPS, sample_rate=SOUND_RATE) as writer:
            live.add_sink(film)
            keeping = asyncio.create_task(_keep(film, writer))
            await play(live, film, pcm, events)
            live.remove_sink(film)
            film.close()
            await keeping
        gone = live.playout.counts.hurried + live.playout.counts.skipped
        film.trace.note("dropped", session=film.session, count=gone)
    finally:
        await studio.aclose()
    if film.drops or studio.restarts:
        lost = f"{film.drops} pictures never reached the file, the chain restarted {studio.restarts} times"
        raise LiveAvatarError(f"{out}: no whole tape: {lost}")


async def _keep(film: Tape, writer: VideoWriter) -> None:
    loop, mute = asyncio.get_running_loop(), np.zeros(TICK_SAMPLES, np.float32)
    while (tick := await film.get()) is not None:
        await loop.run_in_executor(None, write, writer, tick, mute)


async def play(live: LiveSession, film: Tape, pcm: np.ndarray, events: Sequence[Event]) -> None:
    """Speak pcm float32 [n] and let the events happen, from the first generated picture on."""
    while not film.pictures:
        await asyncio.sleep(LOOK_SECONDS)
    origin, left, under_way = live.clock(), sorted(events, key=lambda event: event[0]), []
    cuts = [at for at, kind, _ in events if kind == "interrupt"]
    for n, (piece, spoken, ends) in enumerate(pieces(pcm, cuts), 1):
        await asyncio.sleep(max(0.0, origin + n / FPS - live.clock()))
        if spoken:
            await live.push_audio(piece, SAMPLE_RATE, end=ends)
        while left and round(left[0][0] * FPS) <= n:
            portrait = left.pop(0)[2]
            act = live.interrupt() if portrait is None else live.set_reference(portrait.stem, portrait)
            under_way.append(asyncio.create_task(act))
    await asyncio.gather(*under_way)


def pieces(pcm: np.ndarray, interrupts: Sequence[float]) -> list[tuple[np.ndarray, bool, bool]]:
    """(float32 [640], whether it is pushed, whether an utterance ends with it) of what is spoken, PIECE by PIECE.

    interrupts: seconds at which whoever speaks is cut short: the utterance does not end there, for nobody said so.
    """
    count = math.ceil(len(pcm) / PIECE)
    rows = np.pad(pcm, (0, count * PIECE - len(pcm))).reshape(count, PIECE)
    spoken = rows.any(1)
    for a, b in pairwise(np.flatnonzero(spoken)):
        spoken[a:b] |= b - a <= PAUSE
    ends = spoken & ~np.append(spoken[1:], False)
    ends[[round(at * FPS) - 1 for at in interrupts]] = False
    return list(zip(rows, map(bool, spoken), map(bool, ends), strict=True))
