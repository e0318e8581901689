"""The agent's side: calls an avatar of a liveavatar server into the agent's room and speaks through it."""

from __future__ import annotations

import asyncio
import os

import aiohttp
from livekit import api, rtc
from livekit.agents import (
    DEFAULT_API_CONNECT_OPTIONS,
    NOT_GIVEN,
    AgentSession,
    APIConnectionError,
    APIConnectOptions,
    APIStatusError,
    NotGivenOr,
    get_job_context,
)
from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF
from livekit.agents.voice.avatar import AvatarSession as BaseAvatarSession
from livekit.agents.voice.avatar import DataStreamAudioOutput

from .log import logger

IDENTITY = "liveavatar-avatar"
SAMPLE_RATE = 16000  # what the model hears; the server takes any


class LiveAvatarException(Exception):
    """The plugin was not told where to find something."""


class AvatarSession(BaseAvatarSession):
    """An avatar on a liveavatar server.

    avatar_id: one that is registered there. api_url, api_key: of the server; LIVEAVATAR_URL and LIVEAVATAR_API_KEY where
    they are not given. participant_identity, participant_name: under which it enters the room.

    The avatar cannot pause in the midst of a sentence: AgentSession(turn_handling={"interruption": {"resume_false_interruption": False}}).
    """

    def __init__(
        self, *, avatar_id: str = "default", api_url: NotGivenOr[str] = NOT_GIVEN, api_key: NotGivenOr[str] = NOT_GIVEN,
        participant_identity: str = IDENTITY, participant_name: str = IDENTITY, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS,
    ):  # fmt: skip
        super().__init__()
        self._avatar_id, self._identity, self._name, self._options = avatar_id, participant_identity, participant_name, conn_options
        self._url = _said(api_url, "api_url", "LIVEAVATAR_URL").rstrip("/")
        self._key = _said(api_key, "api_key", "LIVEAVATAR_API_KEY")
        self.session_id: str | None = None  # of the server, once start() has returned

    @property
    def avatar_identity(self) -> str:
        return self._identity

    @property
    def provider(self) -> str:
        return "liveavatar"

    async def start(
        self, agent_session: AgentSession, room: rtc.Room, *, livekit_url: NotGivenOr[str] = NOT_GIVEN,
        livekit_api_key: NotGivenOr[str] = NOT_GIVEN, livekit_api_secret: NotGivenOr[str] = NOT_GIVEN,
    ) -> None:  # fmt: skip
        """Call the avatar into `room`; what the agent says goes to it from now on.

        Raises LiveAvatarException (LiveKit's address or keys are missing), APIStatusError (the server refused),
        APIConnectionError (it cannot be reached).
        """
        await super().start(agent_session, room)
        url = _said(livekit_url, "livekit_url", "LIVEKIT_URL")
        token = self._token(room, _said(livekit_api_key, "livekit_api_key", "LIVEKIT_API_KEY"),
                            _said(livekit_api_secret, "livekit_api_secret", "LIVEKIT_API_SECRET"))  # fmt: skip
        await self._call(url, token)
        agent_session.output.replace_audio_tail(
            DataStreamAudioOutput(room, destination_identity=self._identity, sample_rate=SAMPLE_RATE,
                                  wait_remote_track=rtc.TrackKind.KIND_VIDEO, wait_playback_start=True)
        )  # fmt: skip

    def _token(self, room: rtc.Room, key: str, secret: str) -> str:
        """The avatar's right to enter, on behalf of this agent."""
        job = get_job_context(required=False)
        agent = job.local_participant_identity if job is not None else room.local_participant.identity
        return (
            api.AccessToken(key, secret)
            .with_kind("agent")
            .with_identity(self._identity)
            .with_name(self._name)
            .with_grants(api.VideoGrants(room_join=True, room=room.name, can_update_own_metadata=True))
            .with_attributes({ATTRIBUTE_PUBLISH_ON_BEHALF: agent})
            .to_jwt()
        )

    async def _call(self, livekit_url: str, token: str) -> None:
        body = {"avatar_id": self._avatar_id, "livekit_url": livekit_url, "livekit_token": token}
        for attempt in range(self._options.max_retry + 1):
            try:
                self.session_id = await self._post(body)
                return
            except (APIStatusError, APIConnectionError) as error:
                if not error.retryable or attempt == self._options.max_retry:
                    raise
                logger.warning("liveavatar did not answer as hoped, trying again", extra={"attempt": attempt + 1, "error": str(error)})
                await asyncio.sleep(self._options.retry_interval)

    async def _post(self, body: dict) -> str:
        headers = {"Authorization": f"Bearer {self._key}"}
        timeout = aiohttp.ClientTimeout(total=30, sock_connect=self._options.timeout)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as client, client.post(f"{self._url}/v1/livekit/join", json=body, headers=headers) as answer:
                if answer.status >= 400:
                    raise APIStatusError("liveavatar refused", status_code=answer.status, body=await answer.text())
                return (await answer.json())["session_id"]
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise APIConnectionError(f"liveavatar cannot be reached: {error}") from error


def _said(value: NotGivenOr[str], name: str, variable: str) -> str:
    found = value or os.getenv(variable)
    if not found:
        raise LiveAvatarException(f"{name} is missing: pass it or set {variable}")
    return found
