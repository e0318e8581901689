"""/v1/sessions: open, watch, steer, speak, interrupt, end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from liveavatar.conditioning.identity import load_picture
from liveavatar.serving.access import CONTROL, PUBLISH, VIEW, Principal
from liveavatar.serving.desk import Lease, Wish
from liveavatar.serving.feeder import Utterance
from liveavatar.serving.outputs import wanted
from liveavatar.serving.problems import Invalid, Unprocessable
from liveavatar.serving.recorded import pieces, read_speech
from liveavatar.serving.services import BEARER, At, OnceKey, Services, Who
from liveavatar.serving.wire import (
    Accepted, InterruptedView, LeaseView, Number, SayWish, SessionChange, SessionList, SessionView, SessionWish, Token, TokenWish, problems,
)  # fmt: skip

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], dependencies=[BEARER])
SOUNDS = ("audio/pcm", "audio/wav", "audio/mpeg", "audio/ogg", "audio/flac", "audio/mp4", "audio/webm", "application/octet-stream")
BINARY = {"type": "string", "format": "binary"}
SessionId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{22}$", description="128 random bits")]


def view(lease: Lease, desk) -> SessionView:
    """What its owner may know of a session."""
    session, home = lease.session, f"/v1/sessions/{lease.id}"
    return SessionView(
        id=lease.id, avatar_id=session.avatar, mode=lease.mode, state=session.state, reason=lease.reason or session.reason or None,
        epoch=session.epoch, owner=lease.owner, profile=lease.wish.profile, prompt=lease.wish.prompt, emotion=lease.wish.emotion,
        listening=not lease.over and session.role.listening, width=session.width, height=session.height,
        viewers=session.stats()["viewers"], created_at=lease.created, metadata=lease.wish.metadata,
        lease=None if lease.over else _ends(lease, desk),
        links={"self": home, **{name: f"{home}/{name}" for name in ("stream", "whep", "stats", "audio", "say", "interrupt", "tokens", "outputs")}},
    )  # fmt: skip


def _ends(lease: Lease, desk) -> LeaseView:
    if lease.wish.endless:
        return LeaseView(ends_at=None, idle_ends_at=None)
    ends, idle = desk.ends(lease)
    return LeaseView(ends_at=ends, idle_ends_at=min(ends, idle))


# ---------------------------------------------------------------- open, look, end


@router.post("", status_code=201, response_model=SessionView, responses=problems(400, 403, 404, 409, 413, 503))
async def open_session(wish: SessionWish, who: Who, at: At, once: OnceKey = None) -> Response:
    """Open a session. Its id stands in Location; `Idempotency-Key` makes a repeated request harmless."""
    who.need_key(CONTROL)

    async def make() -> Response:
        lease = await _opened(wish, who, at)
        return JSONResponse(view(lease, at.desk).model_dump(), 201, {"Location": f"/v1/sessions/{lease.id}"})

    return await at.idempotency.once(who.owner, "sessions", once, _content(wish), make)


def _content(wish: SessionWish) -> bytes:
    """All that was asked for; the JSON hides secrets, so they follow it."""
    secrets = [wish.webhook and wish.webhook.secret, *(output.token for output in wish.outputs)]
    return "\0".join([wish.model_dump_json(), *(secret.get_secret_value() if secret else "" for secret in secrets)]).encode()


async def _opened(wish: SessionWish, who: Principal, at: Services) -> Lease:
    outputs = [wanted(output) for output in wish.outputs]
    if wish.webhook is not None:
        await at.webhooks.check(wish.webhook.url)
    for output in outputs:
        await at.outputs.check(output)
    lease = await at.desk.open(who, Wish(avatar=wish.avatar_id, mode=wish.mode, profile=wish.profile, prompt=wish.prompt, metadata=dict(wish.metadata),
                                         idle_seconds=wish.limits.idle_seconds, length_seconds=wish.limits.length_seconds))  # fmt: skip
    if wish.webhook is not None:
        at.webhooks.follow(lease.session, wish.webhook.url, wish.webhook.secret.get_secret_value())
    async with AsyncExitStack() as undo:  # whatever goes wrong: the client does not know the session's id
        undo.push_async_callback(at.desk.close, lease, "failed")
        for output in outputs:
            await at.outputs.start(lease, output)
        undo.pop_all()
    return lease


@router.get("", response_model=SessionList, responses=problems(403))
async def list_sessions(who: Who, at: At) -> SessionList:
    """Sessions that run: the asker's; with scope admin everybody's."""
    who.need(VIEW, CONTROL)
    return SessionList(sessions=[view(lease, at.desk) for lease in at.desk.leases(who)])


@router.get("/{session_id}", response_model=SessionView, responses=problems(403, 404))
async def get_session(session_id: SessionId, who: Who, at: At) -> SessionView:
    """One session, also a while after its end."""
    return view(at.desk.lease(who, session_id, VIEW, PUBLISH, CONTROL), at.desk)


@router.delete("/{session_id}", status_code=204, responses=problems(403, 404))
async def end_session(session_id: SessionId, who: Who, at: At) -> Response:
    """End it. Ending it twice is no error."""
    await at.desk.close(at.desk.lease(who, session_id, CONTROL))
    return Response(status_code=204)


@router.get("/{session_id}/stats", responses=problems(403, 404))
async def session_stats(session_id: SessionId, who: Who, at: At) -> dict:
    """Figures of this moment: pictures a second, queues, latency by part."""
    return at.desk.lease(who, session_id, VIEW, CONTROL).session.stats()


@router.post("/{session_id}/heartbeat", response_model=LeaseView, responses=problems(403, 404, 409))
async def heartbeat(session_id: SessionId, who: Who, at: At) -> LeaseView:
    """Somebody still wants it: the idle lease begins anew."""
    return _ends(at.desk.running(who, session_id, VIEW, PUBLISH, CONTROL), at.desk)


# ---------------------------------------------------------------- steer


@router.patch("/{session_id}", response_model=SessionView, responses=problems(400, 403, 404, 409, 413, 503))
async def change_session(session_id: SessionId, change: SessionChange, who: Who, at: At) -> SessionView:
    """Another prompt, emotion or face from the next block on, listening or not; other metadata."""
    lease = at.desk.running(who, session_id, CONTROL)
    await changed(lease, change.prompt, change.avatar_id, who, at, emotion=change.emotion, listening=change.listening)
    if change.metadata is not None:
        at.desk.change(lease, metadata=dict(change.metadata))
    return view(lease, at.desk)


async def changed(lease: Lease, prompt: str | None, avatar_id: str | None, who: Principal, at: Services, *, emotion: str | None = None,
                  listening: bool | None = None) -> None:  # fmt: skip
    """Steer a running session. Raises a Problem; an avatar is checked before anything changes."""
    portrait = None if avatar_id is None else at.desk.portrait(who, avatar_id, lease.mode)
    await lease.session.set_prompt(prompt, emotion=emotion, listening=listening)
    at.desk.change(lease, **{name: said for name, said in (("prompt", prompt), ("emotion", emotion)) if said is not None})
    if portrait is not None:
        await lease.session.set_reference(avatar_id, await asyncio.to_thread(load_picture, portrait))
        at.desk.change(lease, avatar=avatar_id)


@router.post("/{session_id}/interrupt", response_model=InterruptedView, responses=problems(403, 404, 409))
async def interrupt(session_id: SessionId, who: Who, at: At) -> InterruptedView:
    """Silence now. Says how much of the running segment was heard."""
    done = await at.desk.running(who, session_id, PUBLISH, CONTROL).session.interrupt()
    return InterruptedView(epoch=done.epoch, position_ms=done.position_ms)


@router.post("/{session_id}/tokens", status_code=201, response_model=Token, responses=problems(400, 403, 404, 409, 413))
async def make_token(session_id: SessionId, wish: TokenWish, who: Who, at: At) -> Token:
    """A short token of this session for a browser, with scopes the asker has."""
    who.need_key()
    lease = at.desk.running(who, session_id)
    text, expires = at.access.token(who, lease.id, lease.owner, wish.scopes, wish.seconds)
    return Token(token=text, scopes=list(wish.scopes), expires_at=expires)


# ---------------------------------------------------------------- speak


@router.post("/{session_id}/audio", status_code=202, response_model=Accepted, responses=problems(400, 403, 404, 409, 413, 415),
             openapi_extra={"requestBody": {"required": True, "content": {kind: {"schema": BINARY} for kind in SOUNDS}}})  # fmt: skip
async def push_recording(
    session_id: SessionId, request: Request, who: Who, at: At,
    epoch: Annotated[Number | None, Query(description="Of an older epoch it is dropped")] = None,
    segment: Annotated[Number | None, Query(description="The run of speech it belongs to; default: a new one")] = None,
    end: Annotated[bool, Query(description="The segment is whole with this")] = True,
    rate: Annotated[int, Query(ge=8000, le=192_000, description="Hz, of audio/pcm (16-bit little-endian mono)")] = 16_000,
) -> Accepted:  # fmt: skip
    """Speech as a file, or a piece of raw PCM. It is spoken after what waits; an interruption forgets it."""
    lease = at.desk.running(who, session_id, PUBLISH)
    if segment is None and not end:
        raise Invalid("a piece of a segment names it: give segment")
    at.quotas.may_speak(lease.key)
    pcm, rate = await read_speech(request, rate, at.recordings)
    lease.need_running()
    epoch, segment = lease.epoch(epoch), lease.segment(segment)
    lease.feeder.put(Utterance(pieces(pcm, rate), segment, epoch, end, pcm.nbytes))
    return Accepted(epoch=epoch, segment=segment, seconds=len(pcm) / rate)


@router.post("/{session_id}/say", status_code=202, response_model=Accepted, responses=problems(400, 403, 404, 409, 413, 503))
async def say(session_id: SessionId, wish: SayWish, who: Who, at: At) -> Accepted:
    """Text, spoken with the server's voice."""
    lease = at.desk.running(who, session_id, PUBLISH)
    return await spoken(lease, wish, at)


async def spoken(lease: Lease, wish: SayWish, at: Services) -> Accepted:
    """Queue text for the voice. Raises Unprocessable without a voice, BufferFull, RateLimited, and what Moderation.check raises."""
    if at.speak is None:
        raise Unprocessable("this server has no voice: see speech.voice", kind="voice")
    at.quotas.may_speak(lease.key)
    epoch = lease.epoch(wish.epoch)  # before anything is waited for: an interruption meanwhile is meant for this, too
    await lease.session.moderate("speech", wish.text)
    lease.need_running()
    segment = lease.segment(wish.segment)
    lease.feeder.put(Utterance(at.speak(wish.text), segment, epoch))
    return Accepted(epoch=epoch, segment=segment, seconds=None)
