"""/v1/consents: who let their face speak (19.2)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

from fastapi import APIRouter, File, Form, Path, Response, UploadFile
from fastapi.responses import JSONResponse

from liveavatar.serving.access import CONTROL, VIEW, Principal
from liveavatar.serving.consent import METHODS, SCOPES, Consent, Statement, media_hash
from liveavatar.serving.problems import NotFound
from liveavatar.serving.services import BEARER, At, OnceKey, Services, Who
from liveavatar.serving.wire import ConsentList, ConsentView, problems

router = APIRouter(prefix="/v1/consents", tags=["provenance"], dependencies=[BEARER])
ConsentId = Annotated[str, Path(pattern=r"^con_[0-9a-f]{24}$")]


def view(consent: Consent, at: Services) -> ConsentView:
    """A record as its tenant sees it."""
    said = consent.statement
    return ConsentView(id=consent.id, subject=said and said.subject, scope=list(consent.scope), method=consent.method, media=consent.media,
                       state=consent.state(at.wall()), created_at=consent.created, expires_at=consent.expires, revoked_at=consent.revoked,
                       signature=consent.signature, avatars=[avatar.id for avatar in at.store.with_consent(consent.id)])  # fmt: skip


@router.post("", status_code=201, response_model=ConsentView, responses=problems(400, 403, 409, 413))
async def add_consent(
    who: Who, at: At,
    media: Annotated[UploadFile, File(description="The very portrait that will be registered; its hash is kept, not the picture")],
    subject: Annotated[str, Form(min_length=1, max_length=200, description="Whose face")],
    method: Annotated[str, Form(max_length=16, description="; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items()))],
    scope: Annotated[list[str], Form(max_length=3, description=f"Some of {', '.join(SCOPES)}")],
    expires_at: Annotated[float | None, Form(description="Unix seconds; default: never")] = None,
    once: OnceKey = None,
) -> Response:  # fmt: skip
    """Record that a person agreed to the use of this picture. It is signed and cannot be rewritten."""
    who.need_key(CONTROL)
    data = await media.read()
    statement = Statement(subject=subject, scope=tuple(scope), expires=expires_at, uploader=who.owner, method=method)

    async def make() -> Response:
        given = await asyncio.to_thread(at.consents.grant, statement, media_hash(data))
        return JSONResponse(view(given, at).model_dump(), 201, {"Location": f"/v1/consents/{given.id}"})

    return await at.idempotency.once(who.owner, "consents", once, repr(statement).encode() + data, make)


@router.get("", response_model=ConsentList, responses=problems(403))
async def list_consents(who: Who, at: At) -> ConsentList:
    """The asker's records."""
    who.need_key(VIEW, CONTROL)
    return ConsentList(consents=[view(consent, at) for consent in at.consents.all() if _sees(who, consent)])


@router.get("/{consent_id}", response_model=ConsentView, responses=problems(403, 404))
async def get_consent(consent_id: ConsentId, who: Who, at: At) -> ConsentView:
    """One record."""
    who.need_key(VIEW, CONTROL)
    return view(_found(consent_id, who, at), at)


@router.post("/{consent_id}/revoke", response_model=ConsentView, responses=problems(403, 404))
async def revoke_consent(consent_id: ConsentId, who: Who, at: At) -> ConsentView:
    """The person has changed their mind: sessions that show the face end now, no new ones begin."""
    who.need_key(CONTROL)
    await asyncio.to_thread(at.consents.revoke, _found(consent_id, who, at).id, who.key)
    await _end_sessions(consent_id, at)
    return view(at.consents.get(consent_id), at)


@router.delete("/{consent_id}", status_code=204, responses=problems(403, 404))
async def erase_consent(consent_id: ConsentId, who: Who, at: At) -> Response:
    """Revoke it, forget the person and erase the avatars made of the picture. Hashes stay in the log."""
    who.need_key(CONTROL)
    await asyncio.to_thread(at.consents.revoke, _found(consent_id, who, at).id, who.key, "erasure")
    await _end_sessions(consent_id, at)
    for avatar in at.store.with_consent(consent_id):
        with contextlib.suppress(NotFound):  # erased by somebody else just now
            await asyncio.to_thread(at.store.erase, avatar.id)
            at.audit.note("avatar.erased", {"avatar": avatar.id, "by": who.key})
    await asyncio.to_thread(at.consents.erase, consent_id, who.key)  # last: until all is gone, its tenant can ask again
    return Response(status_code=204)


async def _end_sessions(consent_id: str, at: Services) -> None:
    for avatar in at.store.with_consent(consent_id):
        for lease in at.desk.using(avatar.id):
            await at.desk.close(lease, "consent")


def _sees(who: Principal, consent: Consent) -> bool:
    """After erasure nobody's name is on it: then operators alone."""
    return who.sees(consent.statement.uploader if consent.statement else "")


def _found(consent_id: str, who: Principal, at: Services) -> Consent:
    """Raises NotFound, also for another tenant's."""
    consent = at.consents.get(consent_id)
    if not _sees(who, consent):
        raise NotFound("no such consent")
    return consent
