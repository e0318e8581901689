"""Conversations and the Realtime proxy over HTTP.

    POST   /v1/sessions/{id}/conversation         begin: microphones of viewers (WHEP, sendrecv) are heard, not repeated
    GET    /v1/sessions/{id}/conversation         state and memory
    POST   /v1/sessions/{id}/conversation/turns   {"text": ...}: a turn that was typed
    DELETE /v1/sessions/{id}/conversation         end; the session goes on
    WS     /v1/sessions/{id}/realtime             for Realtime clients (12.2); their key as Authorization, or as the
                                                  subprotocol "openai-insecure-api-key.TOKEN", as those clients send it

What is said and answered comes as events talk.* of the session (12.1).
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response, WebSocket
from pydantic import BaseModel, ConfigDict, StringConstraints

from liveavatar.core import LiveAvatarError
from liveavatar.serving.access import CONTROL, PUBLISH, VIEW
from liveavatar.serving.answers import as_problem
from liveavatar.serving.conversations import Conversations
from liveavatar.serving.gate import address, admit, check_page, credential
from liveavatar.serving.minds import Said
from liveavatar.serving.problems import Conflict
from liveavatar.serving.realtime import Backend, bridge
from liveavatar.serving.routes_sessions import SessionId
from liveavatar.serving.services import BEARER, At, Services, Who
from liveavatar.serving.talk import Talk
from liveavatar.serving.wire import problems

REALTIME, KEY_PROTOCOL = "realtime", "openai-insecure-api-key."
TURN_CHARACTERS = 2000
GONE = 4000  # close codes: plus the HTTP status


class TurnWish(BaseModel):
    """What somebody typed."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, StringConstraints(min_length=1, max_length=TURN_CHARACTERS, strip_whitespace=True)]


class TurnView(BaseModel):
    """One turn as it was heard. cut: the avatar was interrupted there."""

    role: str
    text: str
    cut: bool

    @classmethod
    def of(cls, said: Said) -> TurnView:
        """The same on the wire."""
        return cls(role=said.role, text=said.text, cut=said.cut)


class ConversationView(BaseModel):
    """state: listening, thinking or speaking."""

    state: str
    turns: list[TurnView]


def _view(talk: Talk) -> ConversationView:
    return ConversationView(state=talk.conversation.state, turns=[TurnView.of(said) for said in talk.conversation.history])


def router(conversations: Conversations) -> APIRouter:
    """The routes of conversations. Whoever holds them closes them."""
    routes = APIRouter(prefix="/v1/sessions", tags=["conversations"], dependencies=[BEARER])
    path = "/{session_id}/conversation"

    @routes.post(path, status_code=201, response_model=ConversationView, responses=problems(403, 404, 409))
    async def begin(session_id: SessionId, who: Who, at: At) -> ConversationView:
        """From now on the avatar answers what viewers say."""
        return _view(await conversations.begin(at.desk.running(who, session_id, CONTROL).session))

    @routes.get(path, response_model=ConversationView, responses=problems(403, 404, 409))
    async def look(session_id: SessionId, who: Who, at: At) -> ConversationView:
        """What was said so far, as it was heard."""
        at.desk.lease(who, session_id, VIEW, CONTROL)
        return _view(conversations.get(session_id))

    @routes.post(path + "/turns", status_code=202, response_model=ConversationView, responses=problems(400, 403, 404, 409))
    async def turn(session_id: SessionId, wish: TurnWish, who: Who, at: At) -> ConversationView:
        """Say something in writing; it interrupts what the avatar says."""
        at.desk.running(who, session_id, PUBLISH)
        talk = conversations.get(session_id)
        at.quotas.may_speak(who.key)
        await talk.read(wish.text)
        return _view(talk)

    @routes.delete(path, status_code=204, responses=problems(403, 404))
    async def end(session_id: SessionId, who: Who, at: At) -> Response:
        """The avatar only repeats again."""
        at.desk.lease(who, session_id, CONTROL)
        await conversations.end(session_id)
        return Response(status_code=204)

    return routes


def realtime_router(backend: Backend) -> APIRouter:
    """The proxy of every session to one backend, which is the configuration's. A session has one mouth: one client at a time."""
    routes, speaking = APIRouter(), set[str]()

    @routes.websocket("/v1/sessions/{session_id}/realtime")
    async def realtime(socket: WebSocket, session_id: str) -> None:
        """One Realtime client, until it leaves or the backend does."""
        at: Services = socket.app.state.services
        try:
            check_page(socket.scope, socket.headers, at.settings.listen, at.settings.access.required)
            who = await admit(at.access, at.quotas, _key(socket), address(socket.scope))
            lease = at.desk.running(who, session_id, PUBLISH)
            if lease.id in speaking:
                raise Conflict("a Realtime client speaks through this session already")
        except LiveAvatarError as error:
            problem = as_problem(error)
            return await socket.close(GONE + problem.status, problem.kind)
        speaking.add(lease.id)
        lease.holders += 1
        try:
            await socket.accept(REALTIME if REALTIME in socket.scope["subprotocols"] else None)
            await bridge(socket, lease.session, backend)
        finally:
            speaking.discard(lease.id)
            lease.holders -= 1
            at.desk.touch(lease)

    return routes


def _key(socket: WebSocket) -> str | None:
    named = [name.removeprefix(KEY_PROTOCOL) for name in socket.scope["subprotocols"] if name.startswith(KEY_PROTOCOL)]
    return named[0] if named else credential(socket.headers)
