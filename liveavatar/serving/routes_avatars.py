"""/v1/avatars: faces that may speak. A portrait of a real person needs a record of consent."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

from fastapi import APIRouter, File, Form, Path, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse

from liveavatar.serving.access import CONTROL, VIEW, Principal
from liveavatar.serving.consent import media_hash
from liveavatar.serving.problems import Forbidden, NotFound, RateLimited
from liveavatar.serving.services import BEARER, At, OnceKey, Services, Who
from liveavatar.serving.store import EVERYBODY, Avatar
from liveavatar.serving.uploads import portrait as clean_portrait
from liveavatar.serving.wire import AvatarList, AvatarView, problems

router = APIRouter(prefix="/v1/avatars", tags=["avatars"], dependencies=[BEARER])
AvatarId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_]{1,64}$")]
MOST = 500  # of one tenant
PICTURE = {200: {"content": {"image/webp": {}, "image/png": {}}}}


def view(avatar: Avatar) -> AvatarView:
    """What whoever may use it may know."""
    home = f"/v1/avatars/{avatar.id}"
    return AvatarView(id=avatar.id, name=avatar.name, owner=avatar.owner, embedded=avatar.owner == EVERYBODY, consent_id=avatar.consent,
                      digest=avatar.digest, created_at=avatar.created,
                      links={"self": home, "portrait": f"{home}/portrait", "thumbnail": f"{home}/thumbnail"})  # fmt: skip


@router.post("", status_code=201, response_model=AvatarView, responses=problems(400, 403, 404, 409, 413, 415))
async def add_avatar(
    who: Who, at: At,
    portrait: Annotated[UploadFile, File(description="JPEG, PNG or WebP, at most 25 megapixels; it is encoded anew, its metadata is dropped")],
    name: Annotated[str, Form(min_length=1, max_length=64)] = "avatar",
    consent_id: Annotated[str | None, Form(max_length=64, description="Record of consent of the person shown; POST /v1/consents makes one")] = None,
    synthetic: Annotated[bool, Form(description="You declare that this is nobody's face")] = False,
    once: OnceKey = None,
) -> Response:  # fmt: skip
    """Register a face. Needs `consent_id`, or `synthetic` for a face that is nobody's."""
    who.need_key(CONTROL)
    data = await portrait.read()

    async def make() -> Response:
        avatar = await register(data, name, consent_id, synthetic, who, at)
        return JSONResponse(view(avatar).model_dump(), 201, {"Location": f"/v1/avatars/{avatar.id}"})

    return await at.idempotency.once(who.owner, "avatars", once, b"\0".join((data, name.encode(), repr((consent_id, synthetic)).encode())), make)


async def register(data: bytes, name: str, consent_id: str | None, synthetic: bool, who: Principal, at: Services) -> Avatar:
    """An uploaded picture as an avatar of the asker's. Raises Forbidden (no consent, a protected face), and what reading the picture raises."""
    if (consent_id is None) != synthetic:
        raise Forbidden("a person's face needs consent_id; a face that is nobody's, synthetic=true; never both", kind="consent_required")
    if sum(avatar.owner == who.owner for avatar in at.store.list(who.sees)) >= MOST:
        raise RateLimited(f"{MOST} avatars: erase one first", kind="quota")
    media = await asyncio.to_thread(media_hash, data)
    if consent_id is not None:
        at.consents.check(consent_id, who.owner, media=media)
    clean = await asyncio.to_thread(clean_portrait, data)
    await asyncio.to_thread(partial(at.moderation.check_face, clean, owner=who.owner, prefix=who.key, media=media))
    avatar = await asyncio.to_thread(lambda: at.store.add(clean, name=name, owner=who.owner, consent=consent_id, media=media))
    at.audit.note("avatar.added", {"avatar": avatar.id, "owner": avatar.owner, "consent": avatar.consent, "digest": avatar.digest, "by": who.key})
    return avatar


@router.get("", response_model=AvatarList, responses=problems(403))
async def list_avatars(who: Who, at: At) -> AvatarList:
    """The embedded faces and the asker's own; to a token that cannot change its session's face, of those that one alone."""
    who.need(VIEW, CONTROL)
    return AvatarList(avatars=[view(avatar) for avatar in at.store.list(lambda owner: who.sees(owner, who.session)) if _shown(avatar, who, at)])


def _shown(avatar: Avatar, who: Principal, at: Services) -> bool:
    """A page that looks at one session learns nothing of its tenant's other faces."""
    whole = who.session is None or who.may(CONTROL) or avatar.owner == EVERYBODY
    return whole or any(lease.id == who.session for lease in at.desk.using(avatar.id))


def _seen(avatar_id: str, who: Principal, at: Services) -> Avatar:
    avatar = at.store.get(avatar_id, lambda owner: who.sees(owner, who.session))
    who.need(VIEW, CONTROL)
    if not _shown(avatar, who, at):
        raise NotFound(f"no avatar {avatar_id!r}")
    return avatar


@router.get("/{avatar_id}", response_model=AvatarView, responses=problems(403, 404))
async def get_avatar(avatar_id: AvatarId, who: Who, at: At) -> AvatarView:
    """One of them."""
    return view(_seen(avatar_id, who, at))


@router.get("/{avatar_id}/portrait", response_class=FileResponse, responses={**problems(403, 404), **PICTURE})
async def get_portrait(avatar_id: AvatarId, who: Who, at: At) -> FileResponse:
    """Its picture."""
    return FileResponse(at.store.portrait(_seen(avatar_id, who, at).id))


@router.get("/{avatar_id}/thumbnail", response_class=Response, responses={**problems(403, 404), **PICTURE})
async def get_thumbnail(avatar_id: AvatarId, who: Who, at: At) -> Response:
    """Its picture, small."""
    return Response(await asyncio.to_thread(at.store.thumbnail, _seen(avatar_id, who, at).id), media_type="image/webp")


@router.delete("/{avatar_id}", status_code=204, responses=problems(403, 404, 409))
async def erase_avatar(avatar_id: AvatarId, who: Who, at: At) -> Response:
    """Erase a face and everything made of it. Sessions that show it end."""
    avatar = _seen(avatar_id, who, at)
    who.need_key(CONTROL)
    if avatar.owner != EVERYBODY:
        for lease in at.desk.using(avatar.id):
            await at.desk.close(lease)
    await asyncio.to_thread(at.store.erase, avatar.id)
    at.audit.note("avatar.erased", {"avatar": avatar.id, "by": who.key})
    return Response(status_code=204)
