"""HTTP doors through which LiveKit agents call an avatar into their room (serving.md 10.4).

`POST /v1/livekit/join` is ours (livekit-plugins-liveavatar). The others take what existing plugins send, so that an agent
moves here by changing a base URL:

    bey        BEY_API_URL=https://HOST/v1/compat/bey   BEY_API_KEY=la_...   (plugins before 1.8: https://HOST does, too)
    bithuman   BITHUMAN_API_URL=https://HOST/v1/compat/bithuman   BITHUMAN_API_TOKEN=la_...   model="expression"

Keys come as bearer token or X-Api-Key. `livekit_url` and picture links are a caller's words: they pass the SSRF check
first (18.4), by what `outputs.hosts` and `outputs.private` allow. A picture becomes an avatar only with a record of consent, like any other: `?consent_id=` or
`?synthetic=true` in the URL the plugin is given.
"""

from __future__ import annotations

import asyncio
import importlib
from types import ModuleType
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, File, Form, Query, UploadFile
from pydantic import BaseModel, Field

from liveavatar.core import ConfigError
from liveavatar.serving.access import CONTROL, Principal
from liveavatar.serving.desk import Lease, Wish
from liveavatar.serving.problems import Invalid, NotInstalled
from liveavatar.serving.routes_avatars import register
from liveavatar.serving.services import BEARER, At, Services, Who
from liveavatar.serving.settings import OutputsConfig
from liveavatar.serving.ssrf import check, fetch
from liveavatar.serving.wire import Wire, problems

Url = Annotated[str, Field(min_length=1, max_length=2048)]
Token = Annotated[str, Field(min_length=1, max_length=16_384)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
FAILURES = problems(400, 403, 404, 409, 413, 415, 501, 502, 503)

log = structlog.get_logger("liveavatar.livekit")


class JoinWish(Wire):
    """agent_identity: whose voice the avatar is, where the token's attribute lk.publish_on_behalf does not say it."""

    avatar_id: Name
    livekit_url: Url
    livekit_token: Token
    agent_identity: Name | None = None


class BeyWish(BaseModel):
    """What livekit-plugins-bey sent before 1.8. What else it may say is passed over: it is not our plugin."""

    avatar_id: Name
    livekit_url: Url
    livekit_token: Token


class BeyTransport(BaseModel):
    """What livekit-plugins-bey 1.8 sends."""

    transport: Literal["livekit"]
    avatar_id: Name
    url: Url
    token: Token


class Joined(Wire):
    """The session that stands in the room now; it ends when the agent leaves."""

    session_id: str
    avatar_id: str


def router() -> APIRouter:
    """The routes. They answer once the avatar is in the room; its tracks follow when somebody subscribes."""
    hall = _Hall()
    routes = APIRouter(tags=["livekit"], dependencies=[BEARER], responses=FAILURES)

    @routes.post("/v1/livekit/join", status_code=201)
    async def join_room(wish: JoinWish, who: Who, at: At) -> Joined:
        """Send an avatar into a LiveKit room."""
        return await hall.show(who, at, wish.avatar_id, wish.livekit_url, wish.livekit_token, wish.agent_identity)

    @routes.post("/v1/session", status_code=201)
    @routes.post("/v1/compat/bey/v1/session", status_code=201, include_in_schema=False)
    async def bey(wish: BeyWish, who: Who, at: At) -> Joined:
        """The same, as the LiveKit plugin of Beyond Presence asks it."""
        return await hall.show(who, at, wish.avatar_id, wish.livekit_url, wish.livekit_token)

    @routes.post("/v1/compat/bey/v1/sessions", status_code=201)
    async def bey_transport(wish: BeyTransport, who: Who, at: At) -> Joined:
        """The same, as that plugin asks it from 1.8 on."""
        return await hall.show(who, at, wish.avatar_id, wish.url, wish.token)

    @routes.post("/v1/compat/bithuman", status_code=201)
    async def bithuman(
        who: Who, at: At, livekit_url: Annotated[Url, Form()], livekit_token: Annotated[Token, Form()], room_name: Annotated[Name, Form()],
        avatar_id: Annotated[Name | None, Form()] = None, avatar_image_url: Annotated[Url | None, Form()] = None,
        avatar_image: Annotated[UploadFile | None, File()] = None,
        consent_id: Annotated[str | None, Query(max_length=64)] = None, synthetic: Annotated[bool, Query()] = False,
    ) -> Joined:  # fmt: skip
        """The same, as the LiveKit plugin of bitHuman asks it with model="expression"."""
        await hall.inspect(who, at, livekit_url, livekit_token, room=room_name)
        if avatar_id is None:
            picture = await _picture(at, avatar_image, avatar_image_url)
            avatar_id = (await register(picture, "livekit", consent_id, synthetic, who, at)).id
        return await hall.show(who, at, avatar_id, livekit_url, livekit_token)

    return routes


async def _picture(at: Services, image: UploadFile | None, url: str | None) -> bytes:
    if url is not None:
        return await fetch(url, limit=at.settings.access.image_bytes, private=at.settings.outputs.private)
    if image is None:
        raise Invalid("say avatar_id, avatar_image or avatar_image_url")
    return await image.read()  # its size was bounded at the gate


async def _address(url: str, outputs: OutputsConfig) -> str:
    """Where to connect: the address that was checked, unless TLS needs the name. Raises Invalid, Forbidden."""
    target = await check(url, ("ws", "wss", "http", "https"), hosts=outputs.hosts, private=outputs.private)
    return target.pinned if target.scheme in ("ws", "http") else url


class _Hall:
    """Opens sessions and sends them into rooms; holds the workers while they stay."""

    def __init__(self):
        self._stays = set[asyncio.Task]()

    async def inspect(self, who: Principal, at: Services, url: str, token: str, *, agent: str | None = None, room: str | None = None) -> str:
        """Refuse what cannot work before anything is opened; returns the address to join. Raises Invalid, Forbidden, NotInstalled."""
        who.need_key()
        who.need(CONTROL)
        module = await _worker_module()
        claims = module.read_token(token)
        if agent is None:
            module.spoken_for(claims)
        if room is not None and claims["video"].get("room") != room:
            raise Invalid("room_name is not the room of livekit_token")
        return await _address(url, at.settings.outputs)

    async def show(self, who: Principal, at: Services, avatar: str, url: str, token: str, agent: str | None = None) -> Joined:
        """A new session of whoever asks, in the room. What fails leaves nothing behind."""
        address = await self.inspect(who, at, url, token, agent=agent)
        module, lease, worker = await _worker_module(), await at.desk.open(who, Wish(avatar=avatar)), None
        try:
            worker = await module.join(lease.session, address, token, agent=agent)
        finally:
            if worker is None:
                await at.desk.close(lease, "failed")
        stay = asyncio.create_task(self._stay(at, lease, worker))
        self._stays.add(stay)
        stay.add_done_callback(self._stays.discard)
        return Joined(session_id=lease.id, avatar_id=avatar)

    async def _stay(self, at: Services, lease: Lease, worker) -> None:
        lease.holders += 1  # as long as the agent is there, silence does not end it
        log.info("livekit_joined", session=lease.id, room=worker.room.name, agent=worker.agent)
        reason = await worker.over()
        await at.desk.close(lease, "failed" if lease.session.state == "failed" else "closed")
        log.info("livekit_left", session=lease.id, reason=reason)


async def _worker_module() -> ModuleType:
    """livekit_worker, imported beside the event loop: that takes seconds."""
    try:
        return await asyncio.to_thread(importlib.import_module, "liveavatar.serving.livekit_worker")
    except ConfigError as error:
        raise NotInstalled(str(error)) from None
