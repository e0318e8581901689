"""What the routes work with, and how they get at it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import numpy as np
from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPBearer

from liveavatar.serving.access import Access, Principal
from liveavatar.serving.desk import Desk
from liveavatar.serving.idempotency import LONGEST_KEY, Idempotency
from liveavatar.serving.problems import Unauthorized
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.recorded import Decode
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.store import AvatarStore
from liveavatar.serving.webhooks import Webhooks

Speak = Callable[[str], AsyncGenerator[tuple[np.ndarray, int], None]]  # text -> (mono PCM, Hz), as it is made

BEARER = Security(HTTPBearer(auto_error=False, description="A server key (la_...) or a session's token"))


class Consents(Protocol):
    """Records of people who let their face speak."""

    def check(self, consent_id: str, owner: str) -> None:
        """Raises Forbidden for a record that is not there, is over or was revoked."""
        ...


@dataclass(frozen=True, kw_only=True)
class Services:
    """One server's. portraits: an upload -> PNG of ours, raising a Problem. decode: a recording -> speech. speak: text to speech; None: this server has no voice.
    extras: names of what else may be asked of it.
    """

    settings: ServeConfig
    access: Access
    quotas: Quotas
    store: AvatarStore
    desk: Desk
    idempotency: Idempotency
    webhooks: Webhooks
    portraits: Callable[[bytes], bytes]
    decode: Decode
    consents: Consents
    speak: Speak | None = None
    extras: list[str] = field(default_factory=list)


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
