"""/v1/channels: what is on air day and night, with its schedule, filler and outputs (serving.md 6).

A channel belongs to a tenant, who names it; for an operator `?owner=` says whose it is. A change holds at once on air, without the
picture stopping; what is being said is said to its end, unless :switch cuts it.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, replace
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from liveavatar.serving.access import CONTROL, OWNER, VIEW, Principal
from liveavatar.serving.channel_runner import Runner, shown, tenant
from liveavatar.serving.channel_wire import (
    NAME, ChannelChange, ChannelList, ChannelName, ChannelOutputView, ChannelOutputWish, ChannelView, ChannelWish, FillerBody, NextView,
    ScheduleBody, SoundView, SwitchWish,
)  # fmt: skip
from liveavatar.serving.channels import Channel, Hook, upcoming
from liveavatar.serving.outputs import Wanted, wanted
from liveavatar.serving.problems import Conflict, NotFound
from liveavatar.serving.recorded import read_speech
from liveavatar.serving.routes_outputs import FileName
from liveavatar.serving.routes_sessions import BINARY, SOUNDS, changed
from liveavatar.serving.services import BEARER, At, OnceKey, Services, Who
from liveavatar.serving.wire import problems

router = APIRouter(prefix="/v1/channels", tags=["channels"], dependencies=[BEARER])
Named = Annotated[ChannelName, Path(description="Of the asker's channels")]
Owner = Annotated[str | None, Query(pattern=f"^{OWNER.pattern}$", description="Whose channel it is; default: the asker's")]
OutputName = Annotated[str, Path(pattern=NAME)]
SoundId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
SAME = ("prompt", "mode", "filler", "schedule", "outputs")  # called the same in a body and in a Channel


def found(who: Principal, at: Services, name: str, owner: str | None, *scopes: str) -> Channel:
    """A channel. Raises NotFound, also for somebody else's, and Forbidden for a token or without one of the scopes."""
    who.need_key()
    owner = owner or who.owner
    if not who.sees(owner):
        raise NotFound(f"no channel {name!r}")
    channel = at.channels.store.get(owner, name)
    who.need(*scopes)
    return channel


def fields(wish: ChannelWish | ChannelChange | SwitchWish, had: tuple[Wanted, ...] = ()) -> dict:
    """Of a Channel whose outputs were `had`: those that are said. Raises Unprocessable."""
    said = {name: getattr(wish, name, None) for name in SAME} | {"avatar": wish.avatar_id}
    said |= {name: said[name] and said[name].plain() for name in ("schedule", "filler")}
    if said["outputs"] is not None:
        said["outputs"] = tuple(_output(output, had) for output in said["outputs"])
    said = {name: value for name, value in said.items() if value is not None}
    if "webhook" in wish.model_fields_set:  # null: none any more
        said["webhook"] = wish.webhook and Hook(url=wish.webhook.url, secret=wish.webhook.secret.get_secret_value())
    return said


def _output(wish: ChannelOutputWish, had: tuple[Wanted, ...]) -> Wanted:
    name = wish.name or wish.kind
    same = next((one for one in had if (one.name, one.kind) == (name, wish.kind) and wish.url is None and wish.token is None), None)
    return same or replace(wanted(wish), name=name)


# ---------------------------------------------------------------- what may be known of it


def view(channel: Channel, who: Principal, at: Services) -> ChannelView:
    """How it does. Neither keys nor tokens are in it."""
    runner, lease, home = at.channels.runner(channel), at.channels.lease(channel), f"/v1/channels/{channel.name}"
    whose = "" if channel.owner == who.owner else f"?owner={channel.owner}"
    coming = upcoming(channel.schedule, runner.progress, at.wall()) if lease is not None else None
    troubles = runner.troubles if runner is not None else {}
    return ChannelView(
        name=channel.name, owner=channel.owner, avatar_id=channel.avatar, mode=channel.mode, prompt=channel.prompt,
        schedule=ScheduleBody.of(channel.schedule), filler=FillerBody(prompts=list(channel.filler.prompts), seconds=channel.filler.seconds),
        outputs=[_output_view(wanted, runner, channel.started, home, whose) for wanted in channel.outputs],
        sounds=[SoundView(**asdict(sound)) for sound in channel.sounds],
        webhook=channel.webhook and "{0.scheme}://{0.hostname}".format(urlsplit(channel.webhook.url)),
        state="on_air" if lease is not None else "waiting" if channel.started else "off", session_id=lease and lease.id,
        on_air_since=lease and lease.created, sessions=runner.sessions if runner is not None else 0,
        entry=runner and runner.entry, next=coming and NextView(entry=coming[0].name, at=coming[1]),
        last_error=troubles.get("session") or troubles.get("entry"), created_at=channel.created,
        links={"self": home + whose, **({"session": f"/v1/sessions/{lease.id}"} if lease is not None else {})},
    )  # fmt: skip


def _output_view(wanted: Wanted, runner: Runner | None, started: bool, home: str, whose: str) -> ChannelOutputView:
    output = runner.output(wanted.name) if runner is not None else None
    said = {"name": wanted.name, "kind": wanted.kind, "url": shown(wanted)}
    if output is None:
        return ChannelOutputView(**said, state="waiting" if started else "off", last_error=runner and runner.troubles.get(wanted.name))
    status, links = output.status, {"playlist": f"{home}/outputs/{wanted.name}/hls/index.m3u8{whose}"} if output.folder else {}
    return ChannelOutputView(**said, state=status.state, reconnects=status.reconnects, failures=status.failures, last_error=status.last_error,
                             bytes=status.bytes, drops=status.drops, links=links)  # fmt: skip


@router.get("", response_model=ChannelList, responses=problems(403))
async def list_channels(who: Who, at: At) -> ChannelList:
    """The asker's; with scope admin everybody's."""
    who.need_key()
    who.need(VIEW, CONTROL)
    return ChannelList(channels=[view(channel, who, at) for channel in at.channels.store.all(who.sees)])


@router.get("/{channel}", response_model=ChannelView, responses=problems(403, 404))
async def get_channel(channel: Named, who: Who, at: At, owner: Owner = None) -> ChannelView:
    """One: whether it is on air, what is said, what comes next, how its outputs do."""
    return view(found(who, at, channel, owner, VIEW, CONTROL), who, at)


@router.get("/{channel}/outputs/{output}/hls/{name}", response_class=FileResponse, responses=problems(403, 404))
async def channel_playlist(channel: Named, output: OutputName, name: FileName, who: Who, at: At, owner: Owner = None) -> FileResponse:
    """An HLS output at an address that stays when the session is another: index.m3u8 is where players begin."""
    runner = at.channels.runner(found(who, at, channel, owner, VIEW))
    running = runner.output(output) if runner is not None else None
    if running is None:
        raise NotFound("no such output on air")
    path, kind = at.outputs.file(running, name)
    return FileResponse(path, media_type=kind)


# ---------------------------------------------------------------- make, change, erase


@router.post("", status_code=201, response_model=ChannelView, responses=problems(400, 403, 404, 409, 413))
async def add_channel(wish: ChannelWish, who: Who, at: At, once: OnceKey = None) -> Response:
    """A new channel, off air."""
    who.need_key()
    who.need(CONTROL)
    said, secret = fields(wish), wish.webhook.secret.get_secret_value() if wish.webhook else ""

    async def make() -> Response:
        channel = Channel(id=secrets.token_hex(16), name=wish.name, owner=who.owner, key=who.key, created=at.wall(), **said)
        await at.channels.add(channel)
        _note(at, who, "created", channel)
        return JSONResponse(view(channel, who, at).model_dump(), 201, {"Location": f"/v1/channels/{channel.name}"})

    return await at.idempotency.once(who.owner, "channels", once, repr((wish.name, said)).encode() + secret.encode(), make)


@router.patch("/{channel}", response_model=ChannelView, responses=problems(400, 403, 404, 409, 413))
async def change_channel(channel: Named, change: ChannelChange, who: Who, at: At, owner: Owner = None) -> ChannelView:
    """Another face, prompt, schedule, filler, or other outputs; on air at once. The mode only while it is off air."""
    had = found(who, at, channel, owner, CONTROL)
    if change.mode not in (None, had.mode) and had.started:
        raise Conflict("the mode is a session's for its whole life: stop the channel first")
    now = await _changed(had, fields(change, had.outputs), at)
    _note(at, who, "changed", now)
    return view(now, who, at)


async def _changed(channel: Channel, said: dict, at: Services) -> Channel:
    """Checked, put on air where it is on air, kept. Raises a Problem, and then nothing is changed."""
    await at.channels.check(replace(channel, **said))
    if (lease := at.channels.lease(channel)) is not None:
        avatar = said["avatar"] if said.get("avatar", channel.avatar) != channel.avatar else None
        prompt = said["prompt"] if said.get("prompt", channel.prompt) != channel.prompt else None
        await changed(lease, prompt or None, avatar, tenant(channel), at)
    return await at.channels.change(channel, **said)


@router.delete("/{channel}", status_code=204, responses=problems(403, 404))
async def erase_channel(channel: Named, who: Who, at: At, owner: Owner = None) -> Response:
    """Off air, and gone with its sounds."""
    had = found(who, at, channel, owner, CONTROL)
    await at.channels.erase(had)
    _note(at, who, "erased", had)
    return Response(status_code=204)


@router.post("/{channel}/sounds", status_code=201, response_model=SoundView, responses=problems(400, 403, 404, 409, 413, 415),
             openapi_extra={"requestBody": {"required": True, "content": {kind: {"schema": BINARY} for kind in SOUNDS}}})  # fmt: skip
async def add_sound(
    channel: Named, request: Request, who: Who, at: At, owner: Owner = None,
    rate: Annotated[int, Query(ge=8000, le=192_000, description="Hz, of audio/pcm (16-bit little-endian mono)")] = 16_000, once: OnceKey = None,
) -> Response:  # fmt: skip
    """A recording that entries may name."""
    had = found(who, at, channel, owner, CONTROL)

    async def make() -> Response:
        sound = await at.channels.add_sound(had, *await read_speech(request, rate, at.recordings))
        return JSONResponse(SoundView(**asdict(sound)).model_dump(), 201, {"Location": f"/v1/channels/{had.name}/sounds/{sound.id}"})

    return await at.idempotency.once(who.owner, f"sounds {had.id}", once, await request.body() + b"%d" % rate, make)


@router.delete("/{channel}/sounds/{sound_id}", status_code=204, responses=problems(403, 404))
async def erase_sound(channel: Named, sound_id: SoundId, who: Who, at: At, owner: Owner = None) -> Response:
    """Gone, unless an entry names it."""
    await at.channels.erase_sound(found(who, at, channel, owner, CONTROL), sound_id)
    return Response(status_code=204)


# ---------------------------------------------------------------- on air


@router.post("/{channel}:start", response_model=ChannelView, responses=problems(400, 403, 404, 409, 503))
async def start_channel(channel: Named, who: Who, at: At, owner: Owner = None) -> ChannelView:
    """On air as soon as there is room, and again after every failure and every restart of the server, until :stop. No lease ends it.

    Its session counts among those of the key that started it.
    """
    now = await at.channels.start(found(who, at, channel, owner, CONTROL), who.key)
    _note(at, who, "started", now)
    return view(now, who, at)


@router.post("/{channel}:stop", response_model=ChannelView, responses=problems(403, 404))
async def stop_channel(channel: Named, who: Who, at: At, owner: Owner = None) -> ChannelView:
    """Off air now. Stopping it twice is no error."""
    now = await at.channels.stop(found(who, at, channel, owner, CONTROL))
    _note(at, who, "stopped", now)
    return view(now, who, at)


@router.post("/{channel}:switch", response_model=ChannelView, responses=problems(400, 403, 404, 409, 413))
async def switch_channel(channel: Named, wish: SwitchWish, who: Who, at: At, owner: Owner = None, once: OnceKey = None) -> Response:
    """Another face, prompt, schedule, filler or entry, on air, without the picture stopping; it stays so."""
    had = found(who, at, channel, owner, CONTROL)
    if (runner := at.channels.runner(had)) is None or at.channels.lease(had) is None:
        raise Conflict("the channel is not on air")
    said = fields(wish)
    if wish.entry is not None and said.get("schedule", had.schedule).find(wish.entry) is None:
        raise NotFound(f"no entry {wish.entry!r}")

    async def make() -> Response:
        now = await _changed(had, said, at)
        await runner.switch(wish.entry, wish.cut)
        _note(at, who, "switched", now, avatar=now.avatar, entry=wish.entry)
        return JSONResponse(view(now, who, at).model_dump())

    return await at.idempotency.once(who.owner, f"switch {had.id}", once, repr(wish).encode(), make)


def _note(at: Services, who: Principal, what: str, channel: Channel, **more) -> None:
    at.audit.note(f"channel.{what}", {"channel": channel.name, "owner": channel.owner, "by": who.key, **more})
