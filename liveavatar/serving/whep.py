"""WHEP: a viewer offers, we answer; one POST and the picture moves (serving.md 7.1). Also as JSON, for pages.

    POST   /v1/sessions/{id}/whep            application/sdp or application/json {"type": "offer", "sdp": ...} -> 201
    PATCH  /v1/sessions/{id}/whep/{viewer}   application/trickle-ice-sdpfrag -> 204
    DELETE /v1/sessions/{id}/whep/{viewer}   -> 200
    GET    /v1/ice-servers                   what a page hands to `new RTCPeerConnection`

An offer whose audio section also sends (sendrecv, sendonly) brings a microphone, which needs the scope publish.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from liveavatar.serving.ice import IceServers, links
from liveavatar.serving.logs import about
from liveavatar.serving.offers import Offer, read_fragment, read_offer
from liveavatar.serving.problems import Invalid, NotFound, Problem, RateLimited, TooLarge, Unsupported
from liveavatar.serving.webrtc import Heard, Source, Viewer

SDP, FRAGMENT, JSON = "application/sdp", "application/trickle-ice-sdpfrag", "application/json"
SDP_BYTES = 65_536
PATH = "/v1/sessions/{session_id}/whep"

Lookup = Callable[[str], Source]  # raises NotFound
Authorise = Callable[[Request, str | None, str], Awaitable[None]]  # (request, session or None, scope); raises Unauthorized, Forbidden


class TooMany(RateLimited):
    """Viewers of one session."""

    kind, what = "quota", "viewers"


class PreconditionRequired(Problem):
    """PATCH without If-Match."""

    status, kind, title = 428, "precondition", "If-Match needed"


class PreconditionFailed(Problem):
    """PATCH for another connection than this one."""

    status, kind, title = 412, "precondition", "If-Match does not fit"


class Viewers:
    """The peers of all sessions. limit: of one session. reports: makes for each viewer what gets its page's figures of reception (MET-2)."""

    def __init__(self, ice: IceServers, limit: int, *, reports: Callable[[], Callable[[object], None]] = lambda: lambda figures: None):
        self.ice, self._limit, self._reports = ice, limit, reports
        self._open: dict[str, Viewer] = {}

    def reload(self, limit: int) -> None:
        """Another limit; who is there stays."""
        self._limit = limit

    def of(self, session_id: str) -> list[Viewer]:
        """Those of one session, connected or about to be."""
        return [viewer for viewer in self._open.values() if viewer.session.id == session_id]

    def all(self) -> list[Viewer]:
        """Every peer there is."""
        return list(self._open.values())

    def get(self, session_id: str, viewer_id: str) -> Viewer:
        """Raises NotFound."""
        viewer = self._open.get(viewer_id)
        if viewer is None or viewer.session.id != session_id:
            raise NotFound("no such viewer")
        return viewer

    async def open(self, session: Source, offer: Offer, heard: Heard | None = None) -> tuple[Viewer, str]:
        """A viewer and our SDP; raises RateLimited beyond the limit, Unprocessable for an offer without our codecs."""
        if len(self.of(session.id)) >= self._limit:
            raise TooMany(f"this session has {self._limit} viewers")
        viewer = Viewer(session, ice=self.ice(session.id), relay_only=self.ice.network.relay_only, heard=heard, told=self._reports(),
                        gone=lambda viewer: self._open.pop(viewer.id, None))  # fmt: skip
        self._open[viewer.id] = viewer  # before anything is waited for: the limit counts who is on the way
        with about(session=session.id):  # lines of aiortc and aioice, too
            return viewer, await viewer.answer(offer)

    async def close(self) -> None:
        """Ends all peers and waits until they are gone."""
        await asyncio.gather(*(viewer.aclose() for viewer in self.all()))


def puppet(session) -> Heard:
    """A microphone's sound is what the avatar says."""
    return session.push_audio


def router(lookup: Lookup, authorise: Authorise, viewers: Viewers, *, heard: Callable[[Source], Heard] = puppet) -> APIRouter:
    """The routes. heard: for a session, who gets the sound of a viewer's microphone. Whoever holds `viewers` closes them."""
    routes = APIRouter(tags=["viewers"])
    _add_offer(routes, lookup, authorise, viewers, heard)
    _add_viewer(routes, authorise, viewers)
    _add_network(routes, authorise, viewers)
    return routes


def _add_offer(routes: APIRouter, lookup: Lookup, authorise: Authorise, viewers: Viewers, heard: Callable[[Source], Heard]) -> None:
    body = {"requestBody": {"required": True, "content": {
        SDP: {"schema": {"type": "string"}},
        JSON: {"schema": {"type": "object", "required": ["type", "sdp"], "additionalProperties": False,
                          "properties": {"type": {"const": "offer"}, "sdp": {"type": "string"}}}}}}}  # fmt: skip

    @routes.post(PATH, status_code=201, response_class=Response, openapi_extra=body, responses=_answers(400, 401, 403, 404, 413, 415, 422, 429))
    async def watch(session_id: str, request: Request) -> Response:
        """Open a viewer: an offer in, our answer out, its resource in Location."""
        await authorise(request, session_id, "view")
        session = lookup(session_id)
        kind = _media_type(request, SDP, JSON)
        offer = read_offer(_offer_text(await _text(request), kind))
        if offer.speaks:
            await authorise(request, session_id, "publish")
        viewer, answer = await viewers.open(session, offer, heard(session) if offer.speaks else None)
        made = Response(answer, 201, media_type=SDP) if kind == SDP else JSONResponse({"type": "answer", "sdp": answer, "viewer": viewer.id}, 201)
        made.headers.update({"Location": f"{PATH.format(session_id=session_id)}/{viewer.id}", "ETag": f'"{viewer.etag}"'})
        for link in links(viewers.ice(session_id)):
            made.headers.append("Link", link)
        return made


def _add_viewer(routes: APIRouter, authorise: Authorise, viewers: Viewers) -> None:
    body = {"requestBody": {"required": True, "content": {FRAGMENT: {"schema": {"type": "string"}}}},
            "parameters": [{"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}}]}  # fmt: skip

    @routes.patch(PATH + "/{viewer_id}", status_code=204, response_class=Response, openapi_extra=body,
                  responses=_answers(400, 401, 403, 404, 412, 413, 415, 422, 428))  # fmt: skip
    async def trickle(session_id: str, viewer_id: str, request: Request) -> Response:
        """More ICE candidates of a viewer."""
        await authorise(request, session_id, "view")
        viewer = viewers.get(session_id, viewer_id)
        _media_type(request, FRAGMENT)
        _match(request, viewer)
        await viewer.trickle(read_fragment(await _text(request)))
        return Response(status_code=204)

    @routes.delete(PATH + "/{viewer_id}", response_class=Response, responses=_answers(401, 403, 404))
    async def leave(session_id: str, viewer_id: str, request: Request) -> Response:
        """End a viewer."""
        await authorise(request, session_id, "view")
        await viewers.get(session_id, viewer_id).aclose("left")
        return Response()


def _add_network(routes: APIRouter, authorise: Authorise, viewers: Viewers) -> None:
    @routes.get("/v1/ice-servers", responses=_answers(401, 403))
    async def ice_servers(request: Request, response: Response) -> dict:
        """STUN and TURN servers with credentials that last `ttl` seconds."""
        await authorise(request, None, "view")
        response.headers["Cache-Control"] = "no-store"
        return viewers.ice.configuration("page")

    @routes.options(PATH, include_in_schema=False)
    @routes.options(PATH + "/{viewer_id}", include_in_schema=False)
    async def options() -> Response:
        """What may be sent here; pages of other origins are the business of listen.origins."""
        return Response(status_code=204, headers={"Accept-Post": f"{SDP}, {JSON}", "Accept-Patch": FRAGMENT})


def _answers(*statuses: int) -> dict:
    return {status: {"description": "Problem", "content": {"application/problem+json": {"schema": {"type": "object"}}}} for status in statuses}


def _media_type(request: Request, *taken: str) -> str:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in taken:
        raise Unsupported(f"Content-Type must be {' or '.join(taken)}")
    return kind


async def _text(request: Request) -> str:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > SDP_BYTES:
            raise TooLarge(f"SDP has at most {SDP_BYTES} bytes")
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise Invalid("the body is no UTF-8") from None


def _offer_text(text: str, kind: str) -> str:
    if kind == SDP:
        return text
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise Invalid("the body is no JSON") from None
    if not isinstance(message, dict) or set(message) != {"type", "sdp"} or message["type"] != "offer" or not isinstance(message["sdp"], str):
        raise Invalid('JSON of an offer is {"type": "offer", "sdp": "v=0..."}')
    return message["sdp"]


def _match(request: Request, viewer: Viewer) -> None:
    """RFC 9725: trickled candidates name the connection they are for."""
    wanted = request.headers.get("if-match")
    if wanted is None:
        raise PreconditionRequired("If-Match with the ETag of the answer")
    if wanted.strip() != f'"{viewer.etag}"':
        raise PreconditionFailed("this is another connection, or ICE was to be restarted: make a new offer")
