"""A session's ticks as LiveKit's AvatarRunner wants them, and what agents say as speech of the session (serving.md 10.2).

The session is the clock: its ticks come in real time. So the runner's synchroniser is kept a little full, always and of
both, picture and sound: between sentences silence goes into the same queue, past the runner, which would count it as
speech. What was heard is computed from what went in and when, so positions are exact and "finished" means heard.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial

import numpy as np

from liveavatar.core import ConfigError
from liveavatar.serving.live import LiveSession
from liveavatar.serving.packets import SOUND_RATE, TICK_SAMPLES, Level, Mark, Tick
from liveavatar.serving.problems import Conflict
from liveavatar.serving.voices import say_to

try:
    from livekit import rtc
    from livekit.agents.voice.avatar import AudioSegmentEnd, VideoGenerator
except ImportError:
    raise ConfigError("LiveKit needs livekit-agents: pip install 'liveavatar[livekit]'") from None

CUSHION_TICKS = 2  # waiting in the synchroniser: late ticks are not heard (CLK-4)
WAITING_TICKS = 10  # between session and runner; beyond, the oldest goes and its marks move on
FIRST_SEGMENT = 1 << 20  # of the agent's: above those that clients of the session count from 0
FADE_SAMPLES = SOUND_RATE // 100  # of the sound that an interruption cuts off: 10 ms, what LiveKit sends at a time


class Source:
    """What went into an audio source, which plays in real time. Time is an argument, in seconds."""

    def __init__(self):
        self.empty_at = 0.0  # when all that went in was heard
        self._last: deque[tuple[np.ndarray, bool]] = deque(maxlen=2 * WAITING_TICKS)

    def push(self, sound: np.ndarray, spoken: bool, now: float) -> None:
        """int16 [n] of 48 kHz; spoken: it belongs to the agent's segment."""
        self.empty_at = max(self.empty_at, now) + len(sound) / SOUND_RATE
        self._last.append((sound, spoken))

    def waiting(self, now: float) -> float:
        """Seconds not yet heard."""
        return max(0.0, self.empty_at - now)

    def unheard(self, now: float) -> tuple[np.ndarray, float]:
        """What was not yet heard, int16 [n], and how many seconds of it were spoken."""
        left, sounds, spoken = round(self.waiting(now) * SOUND_RATE), [], 0
        for sound, said in reversed(self._last):
            sounds.insert(0, sound[max(0, len(sound) - left) :])
            left -= len(sounds[0])
            spoken += len(sounds[0]) * said
            if left <= 0:
                break
        return np.concatenate([np.zeros(0, np.int16), *sounds]), spoken / SOUND_RATE

    def clear(self) -> None:
        """All that waited is gone."""
        self.empty_at = 0.0
        self._last.clear()


class SessionVideo(VideoGenerator):
    """VideoGenerator over a LiveSession, and one of its sinks (raw ticks).

    sync: the runner's AVSynchronizer, set before the first frame is asked for. outcome: (seconds heard, interrupted) of
    the segment that ended last, to be reported in place of what the runner counts.
    """

    name, wants = "livekit", frozenset({"raw"})

    def __init__(self, session: LiveSession):
        self.sync: rtc.AVSynchronizer | None = None
        self.outcome: tuple[float, bool] = (0.0, False)
        self.drops, self.fills = 0, 0  # ticks that nobody took in time; how often the cushion was filled
        self._session, self._clock, self._epoch = session, session.clock, session.epoch
        self._ticks, self._fresh, self._closed = deque[Tick](), asyncio.Event(), False
        self._source, self._primed = Source(), False
        self._shown, self._calm, self._rest = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._calm.set()  # no interruption is under way
        self._rest.set()  # nobody holds a frame of ours that is not yet in the synchroniser
        self._cutting, self._cuts = asyncio.Lock(), set[asyncio.Task]()
        self._waits = 0  # how often what waits in push_audio was forgotten
        self._number, self._open, self._deaf = FIRST_SEGMENT, None, False  # open: takes what arrives; deaf: the rest of it is unwanted
        self._pending = deque[int]()  # segments that were pushed and not reported as ended
        self._current: int | None = None  # the one that is being spoken
        self._said, self._ends = 0.0, deque[tuple[float, Mark]]()  # seconds of it that went out; (heard at, which) of those that are whole

    @property
    def speaking(self) -> bool:
        """A segment was pushed whose end was not reported."""
        return bool(self._pending)

    @property
    def begun(self) -> int:
        """Segments of which something was pushed, ever."""
        return self._number - FIRST_SEGMENT

    # ------------------------------------------------------------ from the agent

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Speech of any rate and 1 or 2 channels, faster than it is spoken; waits while the session's buffer is full.

        Nothing is spoken before the tracks are published: nobody would hear it.
        """
        waits = self._waits
        await self._calm.wait()
        await self._shown.wait()
        if waits != self._waits:
            return
        if isinstance(frame, AudioSegmentEnd):
            self._deaf = False
            if self._open is not None:  # else the end of what was cleared: it has been reported
                segment, self._open = self._open, None
                await self._push(np.zeros(0, np.int16), SOUND_RATE, segment, end=True)
        elif not self._deaf:
            if self._open is None:
                self._open, self._number = self._number, self._number + 1
                self._pending.append(self._open)
            await self._push(mono(frame), frame.sample_rate, self._open)

    async def _push(self, pcm: np.ndarray, rate: int, segment: int, end: bool = False) -> None:
        with contextlib.suppress(Conflict):  # the session has ended meanwhile, and close() tells
            await say_to(self._session, (pcm, rate), segment=segment, epoch=self._epoch, end=end)

    # ------------------------------------------------------------ interruption

    def forget(self) -> None:
        """What waits in push_audio was cleared before it was taken."""
        self._waits += 1

    async def clear_buffer(self) -> None:
        """The agent wants silence: returns when nothing of the old epoch is left anywhere (BRG-2, BRG-3)."""
        async with self._cutting:
            self._calm.clear()
            await self._stop(partial(self._session.interrupt, reason="livekit"))

    async def _cut(self) -> None:
        """Somebody else has interrupted the session: the agent is told, and the rest of what it is sending is not wanted."""
        async with self._cutting:
            running, self._deaf = self._pending[0] if self._pending else None, self._open is not None
            await self._stop()
            if running is not None:
                self._pending.append(running)
                self._ends.append((0.0, Mark("finished", running, round(1000 * self.outcome[0]), interrupted=True)))

    async def _stop(self, interrupt: Callable[[], Awaitable] | None = None) -> None:
        """Silence, then wait until frames that were in somebody's hands are gone too."""
        busy, (sound, unheard) = not self._rest.is_set(), self._source.unheard(self._clock())
        position = max(0.0, self._said - unheard)
        try:
            await self._clear()
            if not busy:  # a source takes one frame at a time, and a fade that comes late is worse than none
                await self._sound(faded(sound[:FADE_SAMPLES]))
            if interrupt is not None:
                with contextlib.suppress(Conflict):  # the session has ended: silent enough
                    await interrupt()
            if self._shown.is_set():
                if busy:
                    await self._rest.wait()
                    await self._clear()
                await self.sync.wait_for_playout()  # the picture it holds is shown before we say that it is over
        finally:
            self._pending.clear()
            self._ends.clear()
            self.outcome, self._open, self._current, self._said, self._primed = (position, True), None, None, 0.0, False
            self._calm.set()

    async def _clear(self) -> None:
        await self.sync.clear_queue()
        self._source.clear()

    # ------------------------------------------------------------ from the session (packets.Sink)

    def put(self, item: Tick) -> None:
        """The next tick; when nobody takes them the oldest goes."""
        self._ticks.append(item)
        if len(self._ticks) > WAITING_TICKS:
            gone = self._ticks.popleft()
            self._ticks[0] = replace(self._ticks[0], marks=gone.marks + self._ticks[0].marks)
            self.drops += 1
        self._fresh.set()

    def flush(self, epoch: int) -> None:
        """The session was interrupted: by clear_buffer, which sees to the rest, or by somebody else."""
        self._epoch = epoch
        if self._calm.is_set():
            self._calm.clear()
            task = asyncio.create_task(self._cut())
            self._cuts.add(task)
            task.add_done_callback(self._cuts.discard)

    def level(self) -> Level:
        """Ticks that wait."""
        return Level(len(self._ticks), WAITING_TICKS, self.drops)

    def close(self) -> None:
        """The session is over: the stream of frames ends."""
        self._closed = True
        for task in self._cuts:
            task.cancel()
        self._calm.set()
        self._fresh.set()

    async def _next(self) -> Tick | None:
        """The next tick of this epoch; None after close()."""
        self._rest.set()
        while not self._closed:
            await self._calm.wait()
            if not self._ticks:
                self._fresh.clear()
                await self._fresh.wait()
            elif (tick := self._ticks.popleft()).epoch >= self._epoch and not self._may_skip(tick):
                self._rest.clear()
                return tick
        return None

    def _may_skip(self, tick: Tick) -> bool:
        """In silence what piled up is made good again, or it would be late for ever (CLK-5)."""
        return tick.kind != "speech" and not tick.marks and len(self._ticks) > CUSHION_TICKS

    # ------------------------------------------------------------ to the runner

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        """Pictures without end, behind each its sound where a segment says it; one AudioSegmentEnd per segment, once it was heard."""
        self._session.add_sink(self)
        while (tick := await self._next()) is not None:
            picture = video_frame(tick.picture)
            if not self._shown.is_set():
                self._session.remove_sink(self)  # the runner now waits for a subscriber: an empty room costs nothing (rule 1)
                yield picture
                self._begin_show()
                continue
            stops = self._ours(tick.marks)
            spoken = tick.kind == "speech" and self._current is not None
            while self._ends and (spoken or self._clock() >= self._ends[0][0]):
                self.outcome = self._ended()
                yield AudioSegmentEnd()
                self._pending.popleft()  # not before: the runner asks whether we are speaking
            await self._fill(picture)
            if self._calm.is_set():
                yield picture
            if self._calm.is_set() and spoken:
                yield audio_frame(tick.sound)
                self._source.push(tick.sound, True, self._clock())
                self._said += len(tick.sound) / SOUND_RATE
            elif self._calm.is_set():  # between segments; somebody else's speech is heard too, but is none of the agent's
                await self._sound(tick.sound if tick.kind == "speech" else np.zeros_like(tick.sound))
            if stops and self._calm.is_set():
                self._current = None
                self._ends.extend((self._source.empty_at, mark) for mark in stops)

    def _begin_show(self) -> None:
        self._ticks.clear()
        self._session.add_sink(self)
        self._shown.set()

    def _ours(self, marks: tuple[Mark, ...]) -> list[Mark]:
        """The agent's segments that end with a tick. One that makes room for another in it has ended before."""
        ours = [mark for mark in marks if mark.segment in self._pending]
        starts = [mark.segment for mark in ours if mark.name == "started"]
        stops = [mark for mark in ours if mark.name == "finished"]
        if starts:
            self._ends.extend((0.0, mark) for mark in stops if mark.segment not in starts)
            self._current, self._said = starts[-1], 0.0
            stops = [mark for mark in stops if mark.segment in starts]
        return stops

    def _ended(self) -> tuple[float, bool]:
        mark = self._ends.popleft()[1]
        return mark.position_ms / 1000, mark.interrupted

    async def _sound(self, sound: np.ndarray) -> None:
        """Into the queue behind everything else, past the runner, which would count it."""
        if len(sound):
            await self.sync.push(audio_frame(sound))
            self._source.push(sound, False, self._clock())

    async def _fill(self, picture: rtc.VideoFrame) -> None:
        """At the start, after an interruption and when ticks came too late: picture and silence for the same time, so that both wait alike."""
        if self._primed and self._source.waiting(self._clock()) > 0:
            return
        await self.sync.wait_for_playout()
        self.sync.reset()
        for _ in range(CUSHION_TICKS):
            await self.sync.push(picture)
            await self._sound(np.zeros(TICK_SAMPLES, np.int16))
        self._primed = True
        self.fills += 1


def video_frame(picture: np.ndarray) -> rtc.VideoFrame:
    """uint8 [H, W, 3] RGB."""
    height, width, _ = picture.shape
    return rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, picture.tobytes())


def audio_frame(sound: np.ndarray) -> rtc.AudioFrame:
    """int16 [n], 48 kHz mono."""
    return rtc.AudioFrame(sound.tobytes(), SOUND_RATE, 1, len(sound))


def mono(frame: rtc.AudioFrame) -> np.ndarray:
    """int16 [n]: the mean of its channels."""
    samples = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
    return samples[:, 0] if frame.num_channels == 1 else samples.mean(axis=1).astype(np.int16)


def faded(sound: np.ndarray) -> np.ndarray:
    """int16 [n], to nothing."""
    return (sound * np.linspace(1, 0, len(sound))).astype(np.int16)
