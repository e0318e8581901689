"""An avatar in the agent's own process: no server between them, its tracks are the agent's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from livekit import rtc
from livekit.agents import AgentSession
from livekit.agents.voice.avatar import AvatarSession as BaseAvatarSession

if TYPE_CHECKING:
    from liveavatar.serving.role import Role
    from liveavatar.serving.studio import Studio


class LocalAvatarSession(BaseAvatarSession):
    """An avatar of a liveavatar Studio that runs in this process, on this event loop.

    studio: started. role: whom it shows. Needs `pip install 'livekit-plugins-liveavatar[local]'`.
    """

    def __init__(self, studio: Studio, role: Role):
        super().__init__()
        self._studio, self._role = studio, role
        self._runner = self._session = None

    @property
    def avatar_identity(self) -> str:
        """The agent's own: it publishes the tracks."""
        return self._room.local_participant.identity

    @property
    def provider(self) -> str:
        return "liveavatar"

    async def start(self, agent_session: AgentSession, room: rtc.Room) -> None:
        """Open a session of the studio; what the agent says goes to it from now on. Raises Capacity, InputError."""
        from liveavatar.serving.livekit_worker import QueueOutput, Runner
        from liveavatar.serving.livekit_video import SessionVideo

        await super().start(agent_session, room)
        self._session = session = await self._studio.open(self._role)
        video = SessionVideo(session)
        output = QueueOutput(video)
        self._runner = Runner(room, video, output, (session.width, session.height), session.config.media.bitrate)
        await self._runner.start()
        agent_session.output.replace_audio_tail(output)

    async def aclose(self) -> None:
        """Close the studio's session and leave the room alone."""
        if self._session is not None:
            await self._session.close("the agent left")
        if self._runner is not None:
            await self._runner.aclose()
            self._runner = None
        await super().aclose()
