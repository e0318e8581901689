"""What the routes work with, and how they get at it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPBearer

from liveavatar.serving.access import ANYBODY as OPERATOR
from liveavatar.serving.access import VIEW, Access, Principal
from liveavatar.serving.audit import Audit
from liveavatar.serving.channel_runner import Channels
from liveavatar.serving.consent import ConsentLog
from liveavatar.serving.conversations import Conversations
from liveavatar.serving.desk import Desk
from liveavatar.serving.idempotency import LONGEST_KEY, Idempotency
from liveavatar.serving.problems import Unauthorized
from liveavatar.serving.live import LiveSession
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.moderation import Moderation
from liveavatar.serving.outputs import Outputs
from liveavatar.serving.probes import LoopProbe
from liveavatar.serving.puppet import Puppet
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.stages import Stages
from liveavatar.serving.store import AvatarStore
from liveavatar.serving.voices import Speak
from liveavatar.serving.uploads import Recordings
from liveavatar.serving.webhooks import Webhooks
from liveavatar.serving.webrtc import Heard
from liveavatar.serving.whep import Viewers

GOODBYE_SECONDS = 10.0  # for recordings to be finished and webhooks to be delivered when the server ends

BEARER = Security(HTTPBearer(auto_error=False, description="A server key (la_...) or a session's token"))


@dataclass(eq=False, kw_only=True)
class Services:
    """One server's. settings: as of the last reload(). probe: how late the event loop is. mark_key: of the watermark; None: nothing is
    marked. speak: text to speech; None: this server has no voice. conversations: None: sessions only repeat what they are given.
    recordings: decodes speech files. one_video: looking for a mark takes a core for seconds, so one at a time. stages: watches the chain.
    """

    settings: ServeConfig
    access: Access
    quotas: Quotas
    store: AvatarStore
    desk: Desk
    idempotency: Idempotency
    webhooks: Webhooks
    audit: Audit
    moderation: Moderation
    outputs: Outputs
    channels: Channels
    viewers: Viewers
    metrics: Metrics
    probe: LoopProbe
    mark_key: bytes | None
    stages: Stages
    consents: ConsentLog
    wall: Callable[[], float] = time.time
    speak: Speak | None = None
    conversations: Conversations | None = None
    recordings: Recordings = field(default_factory=Recordings)
    one_video: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    def session(self, session_id: str) -> LiveSession:
        """One that was authorised and runs. Raises NotFound, Conflict."""
        lease = self.desk.lease(OPERATOR, session_id)
        lease.need_running()
        return lease.session

    async def authorise(self, request: Request, session_id: str | None, scope: str) -> None:
        """What the WHEP routes ask. Raises Unauthorized, Forbidden, NotFound, RateLimited (offers)."""
        who = asker(request)
        if session_id is None:
            return who.need(scope)
        self.desk.lease(who, session_id, scope)
        if request.method == "POST" and scope == VIEW:
            self.quotas.count("offers", who.key)

    def microphone(self, session: LiveSession) -> Heard:
        """A viewer's microphone is what the avatar says."""
        puppet = Puppet()

        async def heard(pcm: np.ndarray, rate: int) -> None:
            said, over = puppet.hear(pcm, rate, session.speech.waiting if session.speech.position_ms else None)
            if len(said) or over:
                await session.push_audio(said, rate, end=over)

        return heard

    def reload(self, settings: ServeConfig) -> None:
        """From now on these, which differ from those it had by what reloading.py names."""
        self.settings = self.desk.settings = self.desk.studio.config = settings
        self.quotas.limit(settings.access)
        self.viewers.reload(settings.access.viewers)
        self.outputs.reload(settings)
        self.webhooks.reload(settings.outputs.private)

    async def close(self) -> None:
        """End all sessions, tell webhooks, give files free. May be called often."""
        await self.channels.close()
        await self.desk.close_all("drain")
        if self.conversations is not None:
            await self.conversations.aclose()
        await self.viewers.close()
        await self.outputs.close(GOODBYE_SECONDS)
        await self.webhooks.close(GOODBYE_SECONDS)
        self.consents.close()
        self.audit.close()


def services(request: Request) -> Services:
    """Of the application this request came to."""
    return request.app.state.services


def asker(request: Request) -> Principal:
    """Whom the gate has let in. A route it did not ask for is closed."""
    principal = getattr(request.state, "principal", None)
    if principal is None:
        raise Unauthorized(kind="missing")
    return principal


At = Annotated[Services, Depends(services)]
Who = Annotated[Principal, Depends(asker)]
OnceKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=LONGEST_KEY,
                                       description="A repeated request with the same key gets the first answer again")]  # fmt: skip
