"""What the routes work with, and how they get at it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPBearer

from liveavatar.serving.access import Access, Principal
from liveavatar.serving.consent import ConsentLog
from liveavatar.serving.desk import Desk
from liveavatar.serving.idempotency import LONGEST_KEY, Idempotency
from liveavatar.serving.problems import Unauthorized
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.probes import LoopProbe
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.store import AvatarStore
from liveavatar.serving.webhooks import Webhooks

Speak = Callable[[str], AsyncGenerator[tuple[np.ndarray, int], None]]  # text -> (mono PCM, Hz), as it is made

GOODBYE_SECONDS = 5.0  # for webhooks that wait when the server ends

BEARER = Security(HTTPBearer(auto_error=False, description="A server key (la_...) or a session's token"))


@dataclass(frozen=True, kw_only=True)
class Services:
    """One server's. probe: how late the event loop is. speak: text to speech; None: this server has no voice.
    extras: names of what else may be asked of it.
    """

    settings: ServeConfig
    access: Access
    quotas: Quotas
    store: AvatarStore
    desk: Desk
    idempotency: Idempotency
    webhooks: Webhooks
    metrics: Metrics
    probe: LoopProbe
    consents: ConsentLog
    wall: Callable[[], float] = time.time
    speak: Speak | None = None
    extras: list[str] = field(default_factory=list)

    async def close(self) -> None:
        """End all sessions, tell webhooks, give files free. May be called often."""
        await self.desk.close_all("drain")
        await self.webhooks.close(GOODBYE_SECONDS)
        self.consents.close()


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
