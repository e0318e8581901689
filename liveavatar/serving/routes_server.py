"""Probes (17.1), what this server is, its keys, its ICE servers, its metrics."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import JSONResponse

from liveavatar import __version__
from liveavatar.serving.access import ADMIN
from liveavatar.serving.gate import METRICS
from liveavatar.serving.metrics import CONTENT_TYPE
from liveavatar.serving.problems import Forbidden
from liveavatar.serving.services import BEARER, At, Services, Who
from liveavatar.serving.targets import FORMS
from liveavatar.serving.wire import KeyList, KeyView, KeyWish, NewKey, ServerView, problems

probes, metrics, operations = APIRouter(tags=["probes"]), APIRouter(), APIRouter()
router = APIRouter(prefix="/v1", tags=["server"], dependencies=[BEARER])
SLOW_SECONDS = 2.0  # the event loop may be late before /livez says so
Prefix = Annotated[str, Path(pattern=r"^[0-9a-f]{12}$")]


# ---------------------------------------------------------------- probes: for everybody, so they say little


def _probe(good: bool, **more) -> JSONResponse:
    return JSONResponse({"status": "ok" if good else "unavailable", **more}, 200 if good else 503, {"Cache-Control": "no-store"})


@probes.get("/live", include_in_schema=False)
@probes.get("/livez")
async def live(at: At) -> JSONResponse:
    """The event loop turns in time. Not: sessions can be opened."""
    return _probe(at.probe.lag < SLOW_SECONDS)


@probes.get("/ready", include_in_schema=False)
@probes.get("/healthz", include_in_schema=False)
@probes.get("/readyz")
async def ready(at: At) -> JSONResponse:
    """A session could be opened now: the chain is up and warm, a slot is free, nobody is draining. Says why not."""
    return _probe(not at.desk.studio.reasons, reasons=at.desk.studio.reasons)


@probes.get("/startupz")
async def started(at: At) -> JSONResponse:
    """The chain was up at least once."""
    return _probe(at.desk.started)


@metrics.get(METRICS, response_class=Response, include_in_schema=False)
async def scrape(at: At) -> Response:
    """For Prometheus. The gate lets in this machine, and keys with scope admin."""
    return Response(at.metrics.exposition(), media_type=CONTENT_TYPE)


@operations.post("/drain", status_code=202)
async def drain(at: At, origin: Annotated[str | None, Header()] = None) -> JSONResponse:
    """As SIGTERM: no new sessions; those that run end by themselves. The process goes on until it gets the signal."""
    if origin is not None:  # no key is asked for here, and any page that an operator looks at reaches this machine's loopback
        raise Forbidden("no page may call here", kind="origin")
    at.desk.refuse()
    return JSONResponse({"sessions": len(at.desk.studio.sessions)}, 202)


# ---------------------------------------------------------------- the server


@router.get("/server", response_model=ServerView)
async def server(who: Who, at: At) -> ServerView:
    """What it is, what it can, who the asker is to it."""
    studio, access, sessions = at.desk.studio, at.settings.access, at.settings.sessions
    return ServerView(
        version=__version__, engine=at.settings.engine_kind, ready=not studio.reasons, reasons=studio.reasons, draining=studio.draining,
        sessions=len(at.desk.leases(who)), role=sorted(who.scopes), owner=who.owner, features=features(at),
        profiles=sorted(at.settings.profiles),
        limits={"sessions": access.sessions, "viewers": access.viewers, "image_bytes": access.image_bytes, "audio_bytes": access.audio_bytes,
                "audio_seconds": sessions.audio_seconds, "idle_seconds": sessions.idle_seconds, "length_seconds": sessions.length_seconds,
                "capacity": studio.capacity},
    )  # fmt: skip


def features(at: Services) -> list[str]:
    """What may be asked of it beyond sessions."""
    found = {"say": at.speak, "talk": at.conversations, "realtime": at.settings.realtime, "watermark": at.mark_key, "livekit": find_spec("livekit")}
    return sorted([*FORMS, "record", "whep", *(name for name, there in found.items() if there is not None)])


@router.post("/keys", status_code=201, response_model=NewKey, responses=problems(400, 403, 413))
async def add_key(wish: KeyWish, who: Who, at: At) -> NewKey:
    """A new server key, shown this once. Scope admin."""
    who.need_key(ADMIN)
    key, text = await asyncio.to_thread(at.access.create_key, wish.owner, wish.scopes, wish.name)
    at.audit.note("key.created", {"prefix": key.prefix, "owner": key.owner, "scopes": list(key.scopes), "by": who.key})
    return NewKey(prefix=key.prefix, owner=key.owner, scopes=list(key.scopes), name=key.name, created_at=key.created, key=text)


@router.get("/keys", response_model=KeyList, responses=problems(403))
async def list_keys(who: Who, at: At) -> KeyList:
    """All server keys, without what opens anything. Scope admin."""
    who.need_key(ADMIN)
    return KeyList(keys=[KeyView(prefix=key.prefix, owner=key.owner, scopes=list(key.scopes), name=key.name, created_at=key.created)
                         for key in at.access.keys(who)])  # fmt: skip


@router.delete("/keys/{prefix}", status_code=204, responses=problems(403, 404))
async def revoke_key(prefix: Prefix, who: Who, at: At) -> Response:
    """It opens nothing any more, nor do tokens made with it. Scope admin."""
    who.need_key(ADMIN)
    await asyncio.to_thread(at.access.revoke_key, who, prefix)
    at.audit.note("key.revoked", {"prefix": prefix, "by": who.key})
    return Response(status_code=204)
