"""An avatar in a LiveKit room: the official worker classes round a LiveSession (serving.md 10.2).

    session = await studio.open(role)
    worker = await join(session, livekit_url, livekit_token)      # returns once we are in the room
    await worker.over()                                            # the agent left, the session ended, we were removed

The session belongs to the worker from then on: when the agent leaves, it is closed.
"""

from __future__ import annotations

import asyncio

import jwt
import structlog

from liveavatar.core import FPS, LiveAvatarError
from liveavatar.serving.live import LiveSession
from liveavatar.serving.livekit_video import SessionVideo, rtc  # says what to install where LiveKit is missing
from liveavatar.serving.packets import SOUND_RATE
from liveavatar.serving.problems import Invalid, JoinFailed

from livekit.agents.voice.avatar import AvatarOptions, AvatarRunner, DataStreamAudioReceiver, QueueAudioOutput  # isort: skip

ON_BEHALF = "lk.publish_on_behalf"  # attribute of our participant: identity of the agent we speak for
DISCLOSURE = {"ai_generated": "true"}  # attributes everybody in the room can read (WM-2)
CONNECT_SECONDS = 10.0
AGENT_SECONDS = 60.0  # the agent must be in the room by then
QUEUE_MS = 160  # of the synchroniser: the cushion and two ticks

log = structlog.get_logger("liveavatar.livekit")


class Runner(AvatarRunner):
    """AvatarRunner that publishes 25 pictures a second and knows from the generator whether somebody is speaking.

    bitrate: of the video, bit/s.
    """

    def __init__(self, room: rtc.Room, video: SessionVideo, audio, size: tuple[int, int], bitrate: int):
        options = AvatarOptions(video_width=size[0], video_height=size[1], video_fps=FPS, audio_sample_rate=SOUND_RATE, audio_channels=1)
        super().__init__(room, audio_recv=audio, video_gen=video, options=options, _queue_size_ms=QUEUE_MS)
        self._read_audio_atask = None  # aclose() asks for it also when start() never got that far
        self._bitrate, video.sync = bitrate, self.av_sync

    @property
    def _audio_playing(self) -> bool:
        """The base class keeps a flag that the end of one segment clears for the next one, too, when that has already arrived."""
        return self._video_gen.speaking

    @_audio_playing.setter
    def _audio_playing(self, _: bool) -> None:
        pass

    def _on_clear_buffer(self) -> None:
        super()._on_clear_buffer()
        self._video_gen.forget()
        self._audio_recv.drop_unread()

    async def _publish_track(self) -> None:
        """As in the base class, but the SDK must not choose the frame rate: for small pictures it would be 15 or 20."""
        async with self._lock:
            await self._room_connected_fut
            me = self._room.local_participant
            sound = rtc.LocalAudioTrack.create_audio_track("avatar_audio", self._audio_source)
            self._audio_publication = await me.publish_track(sound, rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE))
            await self._audio_publication.wait_for_subscription()
            picture = rtc.LocalVideoTrack.create_video_track("avatar_video", self._video_source)
            encoding = rtc.VideoEncoding(max_framerate=FPS, max_bitrate=self._bitrate)
            options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_CAMERA, video_encoding=encoding, simulcast=False)
            self._video_publication = await me.publish_track(picture, options)


class QueueOutput(QueueAudioOutput):
    """For an agent in the same process: its audio output and the runner's receiver at once."""

    def __init__(self, video: SessionVideo):
        super().__init__(sample_rate=None, wait_playback_start=True)
        self._video = video

    def drop_unread(self) -> None:
        """Segments that were cleared before anything of them was read: the agent waits for their ends, too."""
        for _ in range(self._pending_playback_count - self._video.speaking):
            self.on_playback_finished(playback_position=0.0, interrupted=True)

    def notify_playback_finished(self, playback_position: float, interrupted: bool) -> None:
        """What was heard, not what was queued (rule 6)."""
        super().notify_playback_finished(*self._video.outcome)


class Arrivals(list):
    """A list that knows how many were ever appended."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def append(self, item) -> None:
        super().append(item)
        self.total += 1


class Receiver(DataStreamAudioReceiver):
    """Takes the agent's audio in one room. Make it with `receiver`."""

    def __init__(self, room: rtc.Room, video: SessionVideo, agent: str):
        super().__init__(room, sender_identity=agent)
        self._stream_readers, self._video, self._unread = Arrivals(), video, 0

    def notify_playback_finished(self, playback_position: float, interrupted: bool) -> None:
        """What was heard, not what was queued (rule 6)."""
        super().notify_playback_finished(*self._video.outcome)

    def drop_unread(self) -> None:
        """Segments that were cleared before anything of them was read: the agent waits for their ends, too, and the base
        class would still speak those it has not begun with."""
        self._stream_readers.clear()
        for _ in range(self._stream_readers.total - self._video.begun - self._unread):
            self._unread += 1
            super().notify_playback_finished(0.0, True)


def receiver(room: rtc.Room, video: SessionVideo, agent: str) -> Receiver:
    """One with a class of its own: the official one keeps the handlers of lk.clear_buffer in the class, by identity, so that
    of two rooms whose agents have one name the second would take the interruptions of both."""
    return type("Receiver", (Receiver,), {"_clear_buffer_handlers": {}})(room, video, agent)


class AvatarWorker:
    """A session's stay in a room. agent: identity. discloses: it may say that it is made by a machine. reason: why it ended."""

    def __init__(self, session: LiveSession, room: rtc.Room, agent: str, discloses: bool):
        self.session, self.room, self.agent, self.reason, self._discloses = session, room, agent, "", discloses
        self.video = SessionVideo(session)
        self.runner = Runner(room, self.video, receiver(room, self.video, agent), (session.width, session.height), session.config.media.bitrate)
        self._left = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def over(self) -> str:
        """Wait until it has ended; returns the reason."""
        await asyncio.wait([self._task])
        return self.reason

    async def aclose(self, reason: str = "closed") -> None:
        """Leave the room and close the session. May be called often."""
        self._leave(reason)
        await self.over()

    def _leave(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._left.set()

    async def _run(self) -> None:
        self.room.on("participant_disconnected", lambda who: who.identity == self.agent and self._leave("the agent left"))
        self.room.on("disconnected", lambda reason: self._leave("removed from the room"))
        self.session.on_end(lambda: self._leave("the session ended"))
        working, left = asyncio.create_task(self._work()), asyncio.create_task(self._left.wait())
        try:
            await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
            if self.session.state in ("closing", "closed"):  # what it refuses meanwhile is no failure; on_end comes last
                self._leave("the session ended")
            elif working.done() and (error := working.exception()) is not None:
                log.error("livekit_failed", session=self.session.id, reason=str(error), exc_info=None if isinstance(error, LiveAvatarError) else error)
                self._leave("the worker failed")
        finally:
            for task in (working, left):
                task.cancel()
            await asyncio.gather(working, left, return_exceptions=True)
            await self._clean_up()

    async def _work(self) -> None:
        """Does not end by itself, unless the agent does not come."""
        if self._discloses:
            await self.room.local_participant.set_attributes(DISCLOSURE)
        try:
            async with asyncio.timeout(AGENT_SECONDS):
                await self.runner.start()
        except TimeoutError:
            return self._leave("the agent did not come")
        await self.runner.wait_for_complete()

    async def _clean_up(self) -> None:
        await self.session.close(self.reason)
        await self.runner.aclose()
        await self.room.disconnect()


async def join(session: LiveSession, url: str, token: str, *, agent: str | None = None) -> AvatarWorker:
    """Enter the room `token` is for and show the session there.

    agent: identity of the agent; None: the token says it. The session is closed when the agent leaves. Raises Invalid
    (token), JoinFailed; the session is then still the caller's.
    """
    claims = read_token(token)
    agent = agent or spoken_for(claims)
    room = rtc.Room()
    try:
        async with asyncio.timeout(2 * CONNECT_SECONDS):
            await room.connect(url, token, rtc.RoomOptions(auto_subscribe=False, connect_timeout=CONNECT_SECONDS))
    except (rtc.ConnectError, TimeoutError) as error:
        raise JoinFailed(str(error) or "it does not answer") from None
    return AvatarWorker(session, room, agent, bool(claims["video"].get("canUpdateOwnMetadata")))


def read_token(token: str) -> dict:
    """Claims of a LiveKit token; its signature is for LiveKit to check. Raises Invalid."""
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except jwt.InvalidTokenError:
        raise Invalid("livekit_token is not a token") from None
    grants = claims.get("video")
    if not isinstance(grants, dict) or not grants.get("roomJoin") or not isinstance(claims.get("attributes", {}), dict):
        raise Invalid("livekit_token gives no right to join a room")
    return claims


def spoken_for(claims: dict) -> str:
    """Identity of the agent whose voice the bearer of a token is. Raises Invalid."""
    agent = claims.get("attributes", {}).get(ON_BEHALF)
    if not isinstance(agent, str) or not agent:
        raise Invalid(f"the token has no attribute {ON_BEHALF}: say whose voice the avatar is")
    return agent
