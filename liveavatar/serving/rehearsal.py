"""A whole conversation without a sound card: recorded or typed turns in, an mp4 of what a viewer would have seen out.

The viewer's ticks are the microphone's clock: with each picture that leaves, 40 ms of the question are heard, so what
lies beside each other in the file was said at the same time, and nothing here sleeps.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from liveavatar.conditioning.media import VideoWriter, read_audio
from liveavatar.core import FPS, SAMPLE_RATE, LiveAvatarError
from liveavatar.runtime.intake import Intake
from liveavatar.serving.conversation import LISTENING, SPEAKING, Conversation, Exchange
from liveavatar.serving.live import LiveSession
from liveavatar.serving.packets import SOUND_RATE, TICK_SAMPLES, Edge, Tick
from liveavatar.serving.talk import Talk

LEAD, GAP, TAIL = FPS, 4 * FPS // 5, FPS  # ticks of silence before, between and after the turns
PATIENCE = 60 * FPS  # ticks without an answer after which there will be none
EDGE_SECONDS = 4.0  # of ticks that may wait for the file; beyond, the oldest are lost and counted


class NoAnswer(LiveAvatarError):
    """A turn was not answered."""


@dataclass
class Turn:
    """What the user says: recorded (float32 [n] at 48 kHz) or typed. barge_in: seconds into the answer before it; None: after that."""

    name: str
    pcm: np.ndarray | None = None
    text: str = ""
    barge_in: float | None = None


@dataclass
class Rehearsed:
    """What came of it. late: ticks that left more than a frame late; lost: that never reached the file; kinds: see Tick.kind."""

    exchanges: list[Exchange] = field(default_factory=list)
    ticks: int = 0
    late: int = 0
    lost: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def count(self, tick: Tick, exchange: Exchange | None) -> None:
        """One more tick, and the exchange that runs."""
        self.ticks += 1
        self.late += tick.late > 1 / FPS
        self.kinds[tick.kind] = self.kinds.get(tick.kind, 0) + 1
        if exchange is not None and (not self.exchanges or self.exchanges[-1] is not exchange):
            self.exchanges.append(exchange)


def recorded_turns(audio: Sequence[Path], say: Sequence[str], barge_in: float | None = None) -> list[Turn]:
    """Recordings, then texts; all but the first with `barge_in`. Raises InputError for what cannot be read."""
    turns = [Turn(path.name, pcm=_recording(path)) for path in audio] + [Turn(f'"{text}"', text=text) for text in say]
    for turn in turns[1:]:
        turn.barge_in = barge_in
    return turns


def _recording(path: Path) -> np.ndarray:
    up = Intake(SOUND_RATE)
    return np.concatenate([*(up.push(pcm, SAMPLE_RATE) for pcm in read_audio(path)), up.flush()])


class User:
    """Says one turn after the other, a tick at a time, and is silent while it listens. Counts ticks, reads no clock."""

    def __init__(self, conversation: Conversation, turns: Sequence[Turn]):
        self._conversation, self._turns = conversation, deque(turns)
        self._left, self._name = np.zeros(0, np.float32), ""
        self._asked_before: Exchange | None = None  # the exchange that ran when this turn began
        self._waited, self._listened, self._first, self.over = 0, 0, True, False

    def tick(self) -> tuple[np.ndarray, str]:
        """What is said in these 40 ms: float32 [1920] at 48 kHz, and a typed text or ""."""
        text = ""
        if not len(self._left) and self._may_begin():
            text = self._begin()
        said, self._left = self._left[:TICK_SAMPLES], self._left[TICK_SAMPLES:]
        return np.pad(said, (0, TICK_SAMPLES - len(said))), text

    def _begin(self) -> str:
        if not self._turns:
            self.over = True
            return ""
        turn = self._turns.popleft()
        self._waited, self._listened, self._first = 0, 0, False
        self._asked_before, self._name = self._conversation.exchange, turn.name
        self._left = np.zeros(0, np.float32) if turn.pcm is None else turn.pcm
        return turn.text

    def _may_begin(self) -> bool:
        self._waited += 1
        if self._first:
            return self._waited > LEAD
        exchange = self._conversation.exchange
        answered = exchange is not self._asked_before
        if answered and self._turns and (barge_in := self._turns[0].barge_in) is not None:
            self._listened += self._conversation.state == SPEAKING
            if self._listened > barge_in * FPS:
                return True
        self._listened += answered and "over" in exchange.times and self._conversation.state == LISTENING
        if self._waited > PATIENCE and not answered:
            raise NoAnswer(f"{self._name}: no answer after {PATIENCE // FPS} s: was there speech in it?")
        return answered and "over" in exchange.times and self._listened > (GAP if self._turns else TAIL)


class Typist:
    """Turns from lines as somebody types them, whenever that is; an empty line or the end of the stream ends it."""

    LINES = 16  # typed ahead; the reader waits

    def __init__(self, conversation: Conversation, stream: TextIO):
        self._conversation, self._lines, self._ends, self.over = conversation, queue.Queue[str](self.LINES), False, False
        threading.Thread(target=self._read, args=(stream,), name="typist", daemon=True).start()

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            self._lines.put(line.strip())
            if not line.strip():
                return
        self._lines.put("")

    def tick(self) -> tuple[np.ndarray, str]:
        """See User.tick."""
        line = ""
        if not self._ends and not self._lines.empty():
            line = self._lines.get()
            self._ends = not line
        exchange = self._conversation.exchange
        self.over = self._ends and self._conversation.state == LISTENING and (exchange is None or "over" in exchange.times)
        return np.zeros(TICK_SAMPLES, np.float32), line


class Ticks(Edge):
    """Every tick of a session."""

    wants = frozenset({"raw"})


async def rehearse(avatar: LiveSession, talk: Talk, user: User | Typist, path: Path, *, both: bool = True) -> Rehearsed:
    """Hold the conversation and write it. both: the questions can be heard in the file too. Raises NoAnswer, InputError."""
    sink, done = Ticks("rehearsal", seconds=EDGE_SECONDS, sound_seconds=EDGE_SECONDS), Rehearsed()
    writer = VideoWriter(path, avatar.width, avatar.height, fps=FPS, sample_rate=SOUND_RATE)
    loop = asyncio.get_running_loop()
    avatar.add_sink(sink)
    try:
        while not user.over:
            if (tick := await sink.get()) is None:
                raise NoAnswer(f"the session ended before the conversation did: {avatar.reason}")
            said, text = user.tick()
            if talk.ears is not None:
                await talk.hear(said, SOUND_RATE)
            if text:
                await talk.read(text)
            done.count(tick, talk.conversation.exchange)
            await loop.run_in_executor(None, write, writer, tick, said if both else np.zeros_like(said))
    finally:
        avatar.remove_sink(sink)
        await loop.run_in_executor(None, writer.close)
    done.lost = sink.drops
    return done


def write(writer: VideoWriter, tick: Tick, said: np.ndarray) -> None:
    """A tick into a file; said: float32 [1920] that is heard beside it."""
    scale = writer.height // tick.picture.shape[0]
    picture = tick.picture.repeat(scale, 0).repeat(scale, 1)
    writer.write(picture[None], np.clip(tick.sound.astype(np.float32) / 32768 + said, -1, 1))
