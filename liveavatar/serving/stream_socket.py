"""/v1/sessions/{id}/stream (12.1): speech and orders in, events out. Pictures and sound go other ways.

Who it is stands in Authorization, in the subprotocol "bearer.TOKEN" (beside "liveavatar.v1"), or in the first message
{"type": "hello", "token": ...}; never in the URL. Whoever comes back says `after`: the number of the last event it saw.
An open stream does not keep a session from being idle; speech and pings do.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque

import structlog
from fastapi import APIRouter, WebSocket
from pydantic import TypeAdapter, ValidationError
from starlette.websockets import WebSocketDisconnect

from liveavatar.core import LiveAvatarError
from liveavatar.serving.access import CONTROL, PUBLISH, VIEW, Principal
from liveavatar.serving.answers import as_problem
from liveavatar.serving.desk import Lease
from liveavatar.serving.gate import address, admit, check_page, credential
from liveavatar.serving.packets import Level
from liveavatar.serving.problems import BufferFull, Invalid, Problem, RateLimited, Unauthorized
from liveavatar.serving.quotas import MessageRate
from liveavatar.serving.routes_sessions import changed, spoken, view
from liveavatar.serving.services import Services
from liveavatar.serving.stream_frames import SoundReader, unpack
from liveavatar.serving.wire import FormatOrder, Hello, InterruptOrder, Order, PingOrder, SayOrder, UpdateOrder
from liveavatar.telemetry import now

PROTOCOL, BEARER_PROTOCOL = "liveavatar.v1", "bearer."
HELLO_SECONDS = 5.0  # to say who it is
TEXT_BYTES = 65_536
MISTAKES = 20  # of one client; then it is sent away
WAITING = 256  # messages for one client
STATS_SECONDS = 1.0
FIRST_RATE = 16_000  # Hz of PCM until a format order names another
NORMAL, POLICY, SLOW, GONE = 1000, 1008, 4408, 4000  # close codes; 4000 + the HTTP status of a problem

ORDERS = TypeAdapter(Order)
router = APIRouter()
log = structlog.get_logger("liveavatar.stream")


class Outbox:
    """Messages to one client. Full: the statistics that wait become one, then the client is too slow and must go."""

    def __init__(self, most: int = WAITING):
        self._most, self._waiting, self._something = most, deque[dict](), asyncio.Event()
        self.overflowed, self._over = False, False

    def level(self) -> Level:
        """Messages that wait; who overflows is sent away, which loses one."""
        return Level(len(self._waiting), self._most, int(self.overflowed))

    def put(self, message: dict) -> None:
        """Append; statistics that wait already are replaced."""
        if message["type"] == "stats":
            self._waiting = deque(other for other in self._waiting if other["type"] != "stats")
        if len(self._waiting) >= self._most:
            self.overflowed = True
        else:
            self._waiting.append(message)
        self._something.set()

    def end(self) -> None:
        """Nothing follows what waits."""
        self._over = True
        self._something.set()

    async def get(self) -> dict | None:
        """The next message; None when the client is too slow, or after end() when nothing waits."""
        while not (self._waiting or self.overflowed or self._over):
            self._something.clear()
            await self._something.wait()
        return None if self.overflowed or not self._waiting else self._waiting.popleft()


# ---------------------------------------------------------------- coming in


@router.websocket("/v1/sessions/{session_id}/stream")
async def stream(socket: WebSocket, session_id: str) -> None:
    """One client of one session, until it leaves or the session ends."""
    at: Services = socket.app.state.services
    try:
        check_page(socket.scope, socket.headers, at.settings.listen, at.settings.access.required)
        who = await _asker_by_header(socket, at)
    except Problem as problem:  # before the handshake: the client sees 403, which is all that WebSocket can say
        return await socket.close(GONE + problem.status, problem.kind)
    await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
    try:
        after = _after(socket.query_params.get("after"))
        if who is None:
            who, said = await _asker_by_message(socket, at)
            after = said if said is not None else after
        lease = at.desk.lease(who, session_id, VIEW, PUBLISH, CONTROL)
        lease.need_room(at.settings.access.viewers)
    except LiveAvatarError as error:
        return await _refuse(socket, as_problem(error))
    except WebSocketDisconnect:
        return
    await Connection(socket, lease, who, at).run(after)


async def _asker_by_header(socket: WebSocket, at: Services) -> Principal | None:
    """None: nothing was said yet."""
    tokens = [name.removeprefix(BEARER_PROTOCOL) for name in socket.scope["subprotocols"] if name.startswith(BEARER_PROTOCOL)]
    text = tokens[0] if tokens else credential(socket.headers)
    if text is None and at.settings.access.required:
        return None
    return await admit(at.access, at.quotas, text, address(socket.scope))


async def _asker_by_message(socket: WebSocket, at: Services) -> tuple[Principal, int | None]:
    try:
        text = await asyncio.wait_for(socket.receive_text(), HELLO_SECONDS)
        hello = Hello.model_validate_json(text[:TEXT_BYTES])
    except TimeoutError:
        raise Unauthorized(f"nobody said who it is within {HELLO_SECONDS:g} s", kind="missing") from None
    except (ValidationError, KeyError):  # KeyError: bytes came instead of text
        raise Unauthorized("the first message says who it is: hello", kind="missing") from None
    return await admit(at.access, at.quotas, hello.token.get_secret_value(), address(socket.scope)), hello.after


def _after(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isdecimal() and text.isascii() and len(text) < 16):
        raise Invalid("after: the number of an event")
    return int(text)


async def _refuse(socket: WebSocket, problem: Problem) -> None:
    await socket.send_json(_error(problem))
    await socket.close(GONE + problem.status, problem.kind)


def _error(problem: Problem, segment: int | None = None) -> dict:
    of_segment = {} if segment is None else {"segment": segment}
    retryable = isinstance(problem, RateLimited) or problem.status == 503
    return {"type": "error", "code": problem.kind, "status": problem.status, "detail": problem.detail, "retryable": retryable, **of_segment}


# ---------------------------------------------------------------- there


class Connection:
    """One client that was let in."""

    def __init__(self, socket: WebSocket, lease: Lease, who: Principal, at: Services):
        self.socket, self.lease, self.who, self.at = socket, lease, who, at
        self.outbox, self.rate, self.sound, self.mistakes = Outbox(), MessageRate(), SoundReader(FIRST_RATE), 0

    async def run(self, after: int) -> None:
        """Until the client leaves, the session ends, or the client is too slow or too wrong."""
        self.lease.sockets += 1
        unwatch = self.at.metrics.edge("events", self.outbox.level)
        self.outbox.put({"type": "session.created", "session": view(self.lease, self.at.desk).model_dump()})
        tasks = [asyncio.create_task(work) for work in (self._listen(), self._tell(after), self._measure(), self._send())]
        try:
            done, _ = await asyncio.wait([tasks[0], tasks[3]], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.lease.sockets -= 1
            unwatch()
            self.at.desk.touch(self.lease)

    async def _send(self) -> None:
        try:
            while (message := await self.outbox.get()) is not None:
                await self.socket.send_text(json.dumps(message, separators=(",", ":")))
            await self.socket.close(SLOW if self.outbox.overflowed else NORMAL)
        except (WebSocketDisconnect, RuntimeError):  # it left while we were writing; starlette says RuntimeError to a second close
            return

    async def _tell(self, after: int) -> None:
        async for event in self.lease.session.events(after):
            self.outbox.put({**event.data, "n": event.number, "type": event.name, "t": event.t})
        self.outbox.put({"type": "session.closed", "reason": self.lease.session.reason or self.lease.reason})
        self.outbox.end()

    async def _measure(self) -> None:
        while not self.lease.over:
            self.outbox.put({"type": "stats", **self.lease.session.stats()})
            await asyncio.sleep(STATS_SECONDS)

    async def _listen(self) -> None:
        while (message := await self.socket.receive())["type"] != "websocket.disconnect":
            if not self.rate.take(now()):
                return await self.socket.close(POLICY, "too many messages")
            try:
                await self._take(message.get("bytes"), message.get("text"))
            except LiveAvatarError as error:
                if await self._complain(as_problem(error)):
                    return

    async def _complain(self, problem: Problem, segment: int | None = None) -> bool:
        """Tell the client; whether it has made too many mistakes."""
        self.outbox.put(_error(problem, segment))
        self.mistakes += not isinstance(problem, BufferFull)
        if self.mistakes >= MISTAKES:
            await self.socket.close(POLICY, "too many mistakes")
        return self.mistakes >= MISTAKES

    async def _take(self, data: bytes | None, text: str | None) -> None:
        self.lease.need_running()
        if data is not None:
            return await self._speech(data)
        if len(text) > TEXT_BYTES:
            raise Invalid(f"an order has at most {TEXT_BYTES} characters")
        try:
            order = ORDERS.validate_json(text)
        except ValidationError as error:
            raise Invalid("; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])) from None
        await self._obey(order)

    async def _speech(self, data: bytes) -> None:
        self.who.need(PUBLISH)
        frame = unpack(data)
        pcm, rate = self.sound.read(frame)
        await self.lease.session.push_audio(pcm, rate, segment=self.lease.segment(frame.segment),
                                           epoch=self.lease.epoch(frame.epoch), end=frame.end)

    async def _obey(self, order: Order) -> None:
        match order:
            case PingOrder():
                self.at.desk.touch(self.lease)
                self.outbox.put({"type": "pong", "id": order.id})
            case FormatOrder():
                self.sound.rate = order.rate
            case InterruptOrder():
                self.who.need(PUBLISH, CONTROL)
                await self.lease.session.interrupt()
            case UpdateOrder():
                self.who.need(CONTROL)
                await changed(self.lease, order.prompt, order.avatar_id, self.who, self.at, emotion=order.emotion, listening=order.listening)
            case SayOrder():
                self.who.need(PUBLISH)
                await spoken(self.lease, order, self.at)
