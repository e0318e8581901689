"""People of the LiveKit tests: an agent with the official audio output, a viewer that notes what it sees and hears, a studio."""

from __future__ import annotations

import asyncio
import contextlib
import time

import livekit_sfu
import numpy as np
from livekit import api, rtc
from livekit.agents.voice.avatar import DataStreamAudioOutput

from liveavatar.serving.livekit_worker import ON_BEHALF
from liveavatar.serving.packets import SOUND_RATE
from liveavatar.serving.settings import ServeConfig, SessionsConfig
from liveavatar.serving.studio import Studio
from liveavatar.serving.testcard import read_code

FACE = np.full((3, 128, 128), 128, np.uint8)
LOUD = 1000  # RMS of a tone, far above what a codec makes of silence


def run(work, seconds: float = 60.0):
    """The coroutine's result, or a failure instead of a test that hangs."""
    return asyncio.run(asyncio.wait_for(work, seconds))


def token(identity: str, room: str, kind: str = "standard", **attributes) -> str:
    grants = api.VideoGrants(room_join=True, room=room, can_update_own_metadata=True)
    made = api.AccessToken(livekit_sfu.KEY, livekit_sfu.SECRET).with_identity(identity).with_kind(kind).with_grants(grants)
    return made.with_attributes({name.replace("__", "."): value for name, value in attributes.items()}).to_jwt()


def avatar_token(room: str, identity: str = "avatar", agent: str = "agent") -> str:
    return token(identity, room, "agent", **{ON_BEHALF: agent})


@contextlib.asynccontextmanager
async def studio(**limits):
    """A Studio on the test card. limits: of SessionsConfig."""
    made = Studio(ServeConfig(engine_kind="testcard", sessions=SessionsConfig(**limits)))
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()


def tone(seconds: float, rate: int) -> np.ndarray:
    return (12_000 * np.sin(2 * np.pi * 440 / rate * np.arange(round(seconds * rate)))).astype(np.int16)


def frames(sound: np.ndarray, rate: int, channels: int = 1):
    """rtc.AudioFrames of 100 ms."""
    for piece in np.split(sound, range(rate // 10, len(sound), rate // 10)):
        yield rtc.AudioFrame(np.repeat(piece, channels).tobytes(), rate, channels, len(piece))


class Agent:
    """What an AgentSession does with an avatar: the official output, and a note of every playback event."""

    def __init__(self, identity: str = "agent", avatar: str = "avatar"):
        self.room, self.identity, self.avatar, self.events = rtc.Room(), identity, avatar, []

    async def enter(self, url: str, room: str, **options) -> Agent:
        await self.room.connect(url, token(self.identity, room, "agent"), rtc.RoomOptions(**options))
        self.output = DataStreamAudioOutput(self.room, destination_identity=self.avatar, wait_remote_track=rtc.TrackKind.KIND_VIDEO, wait_playback_start=True)
        for name in ("playback_started", "playback_finished"):
            self.output.on(name, lambda event, name=name: self.events.append((name, time.monotonic(), event)))
        return self

    async def say(self, seconds: float, rate: int = 24_000, channels: int = 1) -> None:
        for frame in frames(tone(seconds, rate), rate, channels):
            await self.output.capture_frame(frame)
        self.output.flush()

    def names(self) -> list[str]:
        return [name.removeprefix("playback_") for name, *_ in self.events]


class Viewer:
    """Sees and hears: (time, picture's number) and (time, loudness of 10 ms)."""

    def __init__(self):
        self.room, self.tracks, self.pictures, self.sounds, self._tasks = rtc.Room(), [], [], [], []

    async def enter(self, url: str, room: str) -> Viewer:
        self.room.on("track_subscribed", lambda track, publication, owner: self._tasks.append(asyncio.ensure_future(self._take(track))))
        await self.room.connect(url, token("viewer", room))
        return self

    async def _take(self, track: rtc.Track) -> None:
        self.tracks.append(track.name)
        if track.kind == rtc.TrackKind.KIND_VIDEO:
            async for event in rtc.VideoStream(track, format=rtc.VideoBufferType.RGB24):
                picture = np.frombuffer(event.frame.data, np.uint8).reshape(event.frame.height, event.frame.width, 3)
                self.pictures.append((time.monotonic(), read_code(picture)[0], picture))
        else:
            async for event in rtc.AudioStream(track, sample_rate=SOUND_RATE, num_channels=1):
                self.sounds.append((time.monotonic(), float(np.sqrt(np.mean(np.square(np.frombuffer(event.frame.data, np.int16), dtype=float))))))

    def loud(self, since: float) -> list[float]:
        """When it was loud, after `since`."""
        return [at for at, level in self.sounds if at > since and level > LOUD]


async def until(true, seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)
