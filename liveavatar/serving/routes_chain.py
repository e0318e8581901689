"""For operators, and the console: the chain and its load, what each step makes of a block, what happened lately.

    GET  /v1/chain                    cut, load by rank, latency budget; scope admin
    GET  /v1/audit                    the end of the event log (18.9); scope admin
    POST /v1/sessions/{id}/preview    the next block after each denoising step, small; scope control
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from liveavatar.runtime.observing import Observation
from liveavatar.runtime.seats import seats_of
from liveavatar.serving.access import ADMIN, CONTROL
from liveavatar.serving.previews import data_url, previews
from liveavatar.serving.problems import Capacity
from liveavatar.serving.routes_sessions import SessionId
from liveavatar.serving.services import BEARER, At, Services, Who
from liveavatar.serving.wire import Wire, problems

PREVIEW_SECONDS = 15.0  # a block may take to come through; longer than any that can be watched live
AUDIT_LINES = 200
router = APIRouter(prefix="/v1", tags=["operators"], dependencies=[BEARER])


class RankView(Wire):
    """busy: share of the last seconds at work. rss, gpu: bytes. blocks: there or waiting for it. None: nobody measures."""

    rank: int
    roles: list[str]
    busy: float | None = None
    rss: int | None = None
    gpu: int | None = None
    blocks: int | None = None


class ChainView(Wire):
    """budget: median seconds by part, None where nothing was measured. throughput: media seconds a second of work makes, all sessions
    together; realtime_factor: for each session at work. steps: whether there are any to preview."""

    engine: str
    up: bool
    ranks: list[RankView]
    budget: dict[str, float | None]
    throughput: float | None
    realtime_factor: float | None
    sessions: int
    capacity: int
    restarts: int
    steps: bool


class AuditLine(Wire):
    """n: number in the log. t: Unix seconds. hash: of this line, which holds that of the line before."""

    n: int
    t: float
    name: str
    data: dict
    hash: str


class AuditTail(Wire):
    lines: list[AuditLine]


class StepView(Wire):
    """step: None for the decoded picture. picture: PNG as a data URL."""

    step: int | None
    width: int
    height: int
    picture: str


class PreviewView(Wire):
    block: int
    steps: list[StepView]


@router.get("/chain", response_model=ChainView, responses=problems(403))
async def chain(who: Who, at: At) -> ChainView:
    """What every rank does, how full it is, and where the time between speech and picture goes."""
    who.need_key(ADMIN)
    studio = at.desk.studio
    cut = [seat.roles for seat in seats_of(studio.engine.config)] if studio.engine is not None else []
    return ChainView(
        engine=at.settings.engine_kind, up=studio.alive, ranks=_ranks(at, cut), budget=at.stages.budget(),
        throughput=at.stages.throughput(), realtime_factor=at.stages.realtime_factor(), sessions=len(studio.sessions),
        capacity=studio.capacity, restarts=studio.restarts, steps=any(name.startswith("step") for stage in cut for name in stage),
    )  # fmt: skip


def _ranks(at: Services, cut) -> list[RankView]:
    """As the chain is cut; with figures where spans were reported."""
    loads = {load["rank"]: load for load in at.stages.load()}
    return [RankView(**{**loads.get(n, {"rank": n}), "roles": list(roles)}) for n, roles in enumerate(cut)]


@router.get("/audit", response_model=AuditTail, responses=problems(403))
async def audit(who: Who, at: At, lines: Annotated[int, Query(ge=1, le=AUDIT_LINES)] = 50) -> AuditTail:
    """Who did what lately, oldest first. `liveavatar consent verify` and eventlog.check prove the whole log."""
    who.need_key(ADMIN)
    found = await asyncio.to_thread(at.audit.tail, lines)
    return AuditTail(lines=[AuditLine(n=line.n, t=line.t, name=line.name, data=line.data, hash=line.hash) for line in found])


@router.post("/sessions/{session_id}/preview", response_model=PreviewView, responses=problems(403, 404, 409, 503))
async def preview(session_id: SessionId, who: Who, at: At) -> PreviewView:
    """The next block as each step leaves it."""
    lease = at.desk.running(who, session_id, CONTROL)
    try:
        async with asyncio.timeout(PREVIEW_SECONDS):
            seen = await lease.session.observe()
    except TimeoutError:
        raise Capacity("no block came through in time", kind="engine") from None
    return await asyncio.to_thread(_view, seen)


def _view(seen: Observation) -> PreviewView:
    shown = [StepView(step=step, width=picture.shape[1], height=picture.shape[0], picture=data_url(picture)) for step, picture in previews(seen)]
    return PreviewView(block=seen.index, steps=shown)
