"""HTTP doors through which LiveKit agents call an avatar into their room (serving.md 10.4).

`POST /v1/livekit/join` is ours (livekit-plugins-liveavatar). The others take what existing plugins send, so that an agent
moves here by changing a base URL:

    bey        BEY_API_URL=https://HOST/v1/compat/bey    BEY_API_KEY=la_...   (or https://HOST for plugins before 1.8)
    bithuman   BITHUMAN_API_URL=https://HOST/v1/compat/bithuman   BITHUMAN_API_TOKEN=la_...   model="expression"

Keys come as X-Api-Key or bearer token; whoever asks has been let in by the gate. `livekit_url` and picture URLs are the
caller's words: they pass the SSRF check first (18.4).
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from liveavatar.core import ConfigError
from liveavatar.serving.live import LiveSession
from liveavatar.serving.problems import Invalid, Problem, TooLarge

SCHEMES = ("ws", "wss", "http", "https")
Url = Annotated[str, Field(min_length=1, max_length=2048)]
Token = Annotated[str, Field(min_length=1, max_length=16_384)]
Name = Annotated[str, Field(min_length=1, max_length=256)]

log = structlog.get_logger("liveavatar.livekit")


class NotInstalled(Problem):
    """This server was installed without LiveKit."""

    status, kind, title = 501, "not_installed", "Not installed"


@dataclass(frozen=True, kw_only=True)
class Doors:
    """What the endpoints need of the server; `request` is who asks.

    open(request, avatar id): a running session of theirs; raises Problems (NotFound, Capacity, quotas). register(request,
    picture): the id of an avatar made of an uploaded picture; the one to refuse it without consent. check(url): raises
    Forbidden for an address nobody may make us call. fetch(url): its bytes, by the same rules. image_bytes: largest picture.
    """

    open: Callable[[Request, str], Awaitable[LiveSession]]
    register: Callable[[Request, bytes], Awaitable[str]]
    check: Callable[[str], Awaitable[None]]
    fetch: Callable[[str], Awaitable[bytes]]
    image_bytes: int


class JoinWish(BaseModel):
    """agent_identity: whose voice the avatar is, where the token's attribute lk.publish_on_behalf does not say it."""

    model_config = ConfigDict(extra="forbid")
    avatar_id: Name
    livekit_url: Url
    livekit_token: Token
    agent_identity: Name | None = None


class BeyWish(BaseModel):
    """What livekit-plugins-bey sent before 1.8."""

    avatar_id: Name
    livekit_url: Url
    livekit_token: Token


class BeyTransport(BaseModel):
    """What livekit-plugins-bey 1.8 sends."""

    transport: Literal["livekit"]
    avatar_id: Name
    url: Url
    token: Token


class Joined(BaseModel):
    """The session that stands in the room now; it ends when the agent leaves."""

    session_id: str
    avatar_id: str


def router(doors: Doors) -> APIRouter:
    """The routes. They answer once the avatar is in the room; its tracks follow when somebody subscribes."""
    routes, hall = APIRouter(tags=["livekit"]), _Hall(doors)

    @routes.post("/v1/livekit/join", status_code=201, summary="Send an avatar into a LiveKit room")
    async def join_room(request: Request, wish: JoinWish) -> Joined:
        return await hall.show(request, wish.avatar_id, wish.livekit_url, wish.livekit_token, wish.agent_identity)

    @routes.post("/v1/session", status_code=201, summary="As Beyond Presence, for their LiveKit plugin")
    @routes.post("/v1/compat/bey/v1/session", status_code=201, include_in_schema=False)
    async def bey(request: Request, wish: BeyWish) -> Joined:
        return await hall.show(request, wish.avatar_id, wish.livekit_url, wish.livekit_token)

    @routes.post("/v1/compat/bey/v1/sessions", status_code=201, summary="As Beyond Presence, for their LiveKit plugin from 1.8 on")
    async def bey_transport(request: Request, wish: BeyTransport) -> Joined:
        return await hall.show(request, wish.avatar_id, wish.url, wish.token)

    @routes.post("/v1/compat/bithuman", status_code=201, summary="As bitHuman, for their LiveKit plugin with model='expression'")
    async def bithuman(
        request: Request, livekit_url: Annotated[Url, Form()], livekit_token: Annotated[Token, Form()], room_name: Annotated[Name, Form()],
        avatar_id: Annotated[Name | None, Form()] = None, avatar_image_url: Annotated[Url | None, Form()] = None,
        avatar_image: Annotated[UploadFile | None, File()] = None,
    ) -> Joined:  # fmt: skip
        await hall.inspect(livekit_url, livekit_token, room_name)
        avatar = avatar_id or await doors.register(request, await _picture(doors, avatar_image, avatar_image_url))
        return await hall.show(request, avatar, livekit_url, livekit_token)

    return routes


async def _picture(doors: Doors, image: UploadFile | None, url: str | None) -> bytes:
    if url is not None:
        return await doors.fetch(url)
    if image is None:
        raise Invalid("say avatar_id, avatar_image or avatar_image_url")
    picture = await image.read(doors.image_bytes + 1)
    if len(picture) > doors.image_bytes:
        raise TooLarge(f"avatar_image: at most {doors.image_bytes} bytes")
    return picture


class _Hall:
    """Opens sessions and sends them into rooms; holds the workers while they stay."""

    def __init__(self, doors: Doors):
        self._doors, self._stays = doors, set[asyncio.Task]()

    async def inspect(self, url: str, token: str, room: str | None = None) -> None:
        """Refuse what cannot work before anything is opened. Raises Invalid, Forbidden (SSRF), NotInstalled."""
        if urlsplit(url).scheme not in SCHEMES:
            raise Invalid(f"livekit_url: must begin with one of {', '.join(SCHEMES)}")
        claims = (await _worker_module()).read_token(token)
        if room is not None and claims["video"].get("room") != room:
            raise Invalid("room_name is not the room of livekit_token")
        await self._doors.check(url)

    async def show(self, request: Request, avatar: str, url: str, token: str, agent: str | None = None) -> Joined:
        """A new session of whoever asks, in the room. What fails leaves nothing behind."""
        await self.inspect(url, token)
        module, session, worker = await _worker_module(), await self._doors.open(request, avatar), None
        try:
            worker = await module.join(session, url, token, agent=agent)
        finally:
            if worker is None:
                await session.close("it did not get into the room")
        stay = asyncio.create_task(self._stay(worker))
        self._stays.add(stay)
        stay.add_done_callback(self._stays.discard)
        return Joined(session_id=session.id, avatar_id=avatar)

    async def _stay(self, worker) -> None:
        log.info("livekit_joined", session=worker.session.id, room=worker.room.name, agent=worker.agent)
        reason = await worker.over()
        log.info("livekit_left", session=worker.session.id, reason=reason)


async def _worker_module():
    """livekit_worker, imported beside the event loop: that takes seconds."""
    try:
        return await asyncio.to_thread(importlib.import_module, "liveavatar.serving.livekit_worker")
    except ConfigError as error:
        raise NotInstalled(str(error)) from None
