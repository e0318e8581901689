"""A Realtime-style proxy (12.2): a speech model's voice comes out of the avatar's mouth, and it learns what was really heard.

Between a Realtime client and a Realtime backend, both WebSockets with JSON events; not an LLM server. Every event goes
through as it came, but for these: audio of responses is copied into the avatar; a client's truncation gets the avatar's
position, once; output_audio_buffer.clear ends here, as a WebSocket backend does not know it. Added are
output_audio_buffer.started, .stopped and .cleared, when the viewer hears it, and the truncation after a barge-in.
Names are of the GA interface; the beta's response.audio.delta is understood. The backend's address is the operator's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import av
import numpy as np

from liveavatar.core import LiveAvatarError
from liveavatar.serving.happenings import Event
from liveavatar.serving.live import LiveSession
from liveavatar.serving.problems import Problem
from liveavatar.serving.voices import say_to

RATE = 24_000  # Hz of audio/pcm
TELEPHONE = {"audio/pcmu": "pcm_mulaw", "audio/pcma": "pcm_alaw", "g711_ulaw": "pcm_mulaw", "g711_alaw": "pcm_alaw"}
TELEPHONE_RATE = 8_000
DELTAS = ("response.output_audio.delta", "response.audio.delta")
DONE = ("response.output_audio.done", "response.audio.done")
HEARING = {"input_audio_buffer.speech_started": True, "input_audio_buffer.speech_stopped": False}
MESSAGE_BYTES = 16 << 20
WAITING = 4096  # audio pieces on their way into the avatar, minutes of them; full: the backend's events wait
KEPT = 256  # items and responses remembered, the oldest are forgotten
SEGMENTS = itertools.count(1 << 40)  # of this process: apart from what others number


class BackendFailed(Problem):
    """The Realtime backend cannot be reached or has refused."""

    status, kind, title = 502, "realtime", "The Realtime backend failed"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Where the model is. url: ws:// or wss://, from the configuration alone. key: sent as a bearer token."""

    url: str
    key: str | None = None


class Wire(Protocol):
    """One side: text messages. receive: None when it has ended."""

    async def receive(self) -> str | None: ...

    async def send(self, text: str) -> None: ...


# ---------------------------------------------------------------- what is known


@dataclass
class Item:
    """Audio the model made in one piece: a segment of the avatar's speech."""

    id: str
    response: str
    content: int
    segment: int
    started: bool = False
    over: bool = False  # heard to its end, or cut
    truncated: bool = False  # the backend was told


@dataclass
class Response:
    """items: of its audio, in order. done: no more comes. announced: the client was told that it is heard."""

    items: list[Item] = field(default_factory=list)
    done: bool = False
    announced: bool = False
    dead: bool = False  # interrupted: its late audio is not spoken


class Ledger:
    """Responses and their items, the last KEPT of them."""

    def __init__(self):
        self.responses: OrderedDict[str, Response] = OrderedDict()

    def response(self, name: str) -> Response:
        """Known, or new."""
        if name not in self.responses:
            self.responses[name] = Response()
            while len(self.responses) > KEPT:
                self.responses.popitem(last=False)
        return self.responses[name]

    def item(self, name: str, response: str, content: int) -> Item:
        """Known, or new at the end of its response."""
        found = self.find(name)
        if found is None:
            found = Item(name, response, content, next(SEGMENTS))
            self.response(response).items.append(found)
        return found

    def find(self, name: str) -> Item | None:
        """Of this id."""
        return next((item for response in self.responses.values() for item in response.items if item.id == name), None)

    def segment(self, number: int) -> Item | None:
        """The item that is this segment."""
        return next((item for response in self.responses.values() for item in response.items if item.segment == number), None)

    def unheard(self) -> list[Item]:
        """Items the viewer has not heard to their end."""
        return [item for response in self.responses.values() for item in response.items if not item.over]


# ---------------------------------------------------------------- the proxy


class RealtimeBridge:
    """One client, one backend, one avatar. `run` until either side ends."""

    def __init__(self, avatar: LiveSession, client: Wire, backend: Wire, *, sleep: Callable[[float], Awaitable] = asyncio.sleep):
        self.avatar, self.client, self.backend = avatar, client, backend
        self.ledger, self._sleep = Ledger(), sleep
        self._format, self._interrupts = "audio/pcm", True  # as the session says
        self._rate = RATE
        self._speech: asyncio.Queue[tuple[Item, np.ndarray, bool]] = asyncio.Queue(WAITING)
        self._names = itertools.count(1)
        self._seen = max((event.number for event in avatar.happenings), default=0)

    async def run(self) -> None:
        """Raises what a side raises."""
        tasks = [asyncio.create_task(work) for work in (self._up(), self._down(), self._speak(), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ client -> backend

    async def _up(self) -> None:
        while (text := await self.client.receive()) is not None:
            event = _parsed(text)
            match event.get("type"):
                case "output_audio_buffer.clear":
                    await self._clear()
                    await self.backend.send(_json(type="response.cancel", event_id=self._name()))
                case "response.cancel":
                    await self._clear()
                    await self.backend.send(text)
                case "conversation.item.truncate":
                    await self._truncate(event, text)
                case _:
                    await self.backend.send(text)

    async def _truncate(self, event: dict, text: str) -> None:
        """The client's guess of what was heard -> what was heard."""
        item = self.ledger.find(event.get("item_id", ""))
        if item is None or (item.over and not item.truncated):
            return await self.backend.send(text)
        if not item.truncated:
            await self._clear()

    # ------------------------------------------------------------ backend -> client

    async def _down(self) -> None:
        while (text := await self.backend.receive()) is not None:
            event = _parsed(text)
            await self._understand(event)
            await self.client.send(text)
            kind = event.get("type")
            if kind == "input_audio_buffer.speech_started" and self._interrupts:
                await self._clear()
            if kind in HEARING:
                await self.avatar.hears(HEARING[kind])

    async def _understand(self, event: dict) -> None:
        kind = event.get("type", "")
        if kind in DELTAS:
            await self._hear(event)
        elif kind in DONE:
            item = self.ledger.find(event.get("item_id", ""))
            if item is not None and not self.ledger.response(item.response).dead:
                await self._speech.put((item, np.zeros(0, np.int16), True))
        elif kind == "response.done":
            response = self.ledger.response(str(_inside(event, "response", "id")))
            response.done = True
            await self._maybe_stopped(response, str(_inside(event, "response", "id")))
        elif kind in ("session.created", "session.updated"):
            self._configure(_mapping(event.get("session")))

    async def _hear(self, event: dict) -> None:
        response = str(event.get("response_id", ""))
        if self.ledger.response(response).dead:
            return
        item = self.ledger.item(str(event.get("item_id", "")), response, _whole(event.get("content_index")))
        if not item.over:
            await self._speech.put((item, _samples(event.get("delta", ""), self._format), False))

    def _configure(self, session: dict) -> None:
        """GA: audio.output.format {type, rate}, audio.input.turn_detection; beta: output_audio_format, turn_detection."""
        said = _inside(session, "audio", "output", "format") or session.get("output_audio_format")
        said = {"type": said} if isinstance(said, str) else _mapping(said)
        self._format = str(said.get("type", "audio/pcm"))
        self._rate = TELEPHONE_RATE if self._format in TELEPHONE else _whole(said.get("rate")) or RATE
        turns = _inside(session, "audio", "input", "turn_detection") or session.get("turn_detection")
        self._interrupts = _mapping(turns).get("interrupt_response", True) is not False

    # ------------------------------------------------------------ the avatar

    async def _speak(self) -> None:
        while True:
            item, pcm, end = await self._speech.get()
            if not item.over and not self.ledger.response(item.response).dead:
                await say_to(self.avatar, (pcm, self._rate), segment=item.segment, end=end, sleep=self._sleep)

    async def _clear(self) -> None:
        """Silence now; the backend learns of every item how much of it was heard, the client that it was cut."""
        unheard = self.ledger.unheard()
        if not unheard:
            return
        for response in self.ledger.responses.values():
            response.dead = response.dead or any(item in unheard for item in response.items)
        while not self._speech.empty():
            self._speech.get_nowait()
        await self.avatar.interrupt(reason="realtime")
        await self._catch_up()
        for item in self.ledger.unheard():  # no sound of these had reached the avatar
            await self._cut(item, 0)

    async def _cut(self, item: Item, position_ms: int) -> None:
        item.over = item.truncated = True
        await self.backend.send(_json(type="conversation.item.truncate", event_id=self._name(), item_id=item.id, content_index=item.content,
                                      audio_end_ms=position_ms))  # fmt: skip
        response = self.ledger.response(item.response)
        response.dead = True
        if response.announced and all(other.over for other in response.items):
            response.announced = False
            await self._tell("output_audio_buffer.cleared", item.response)

    async def _watch(self) -> None:
        async for _ in self.avatar.events(self._seen):
            await self._catch_up()

    async def _catch_up(self) -> None:
        """What the viewer heard up to now, in order."""
        for event in tuple(self.avatar.happenings):
            if event.number > self._seen:
                self._seen = event.number
                await self._heard(event)

    async def _heard(self, event: Event) -> None:
        item = self.ledger.segment(event.data["segment"]) if event.name.startswith("speak.") else None
        if item is None or item.over:
            return
        response = self.ledger.response(item.response)
        if event.name == "speak.started":
            item.started = True
            if not response.announced:
                response.announced = True
                await self._tell("output_audio_buffer.started", item.response)
        elif event.data["interrupted"]:
            await self._cut(item, event.data["position_ms"])
        else:
            item.over = True
            await self._maybe_stopped(response, item.response)

    async def _maybe_stopped(self, response: Response, name: str) -> None:
        if response.announced and response.done and not response.dead and all(item.over for item in response.items):
            response.announced = False
            await self._tell("output_audio_buffer.stopped", name)

    async def _tell(self, kind: str, response: str) -> None:
        await self.client.send(_json(type=kind, event_id=self._name(), response_id=response))

    def _name(self) -> str:
        return f"avatar_{next(self._names)}"


# ---------------------------------------------------------------- events


def _json(**event) -> str:
    return json.dumps(event, separators=(",", ":"))


def _parsed(text: str) -> dict:
    """{} for what is no event: it goes through untouched."""
    try:
        return _mapping(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _inside(event: dict, *names: str):
    for name in names:
        event = event.get(name) if isinstance(event, dict) else None
    return event


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def _whole(value) -> int:
    return value if type(value) is int else 0


def _samples(delta: str, format: str) -> np.ndarray:
    """int16 [n] of a base64 delta. Raises BackendFailed."""
    try:
        data = base64.b64decode(delta, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise BackendFailed("an audio delta that is no base64") from None
    if format not in TELEPHONE:
        return np.frombuffer(data[: len(data) // 2 * 2], "<i2")
    if not data:
        return np.zeros(0, np.int16)
    decoder = av.CodecContext.create(TELEPHONE[format], "r")
    decoder.sample_rate, decoder.layout = TELEPHONE_RATE, "mono"
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in decoder.decode(av.Packet(data))]).astype(np.int16)


# ---------------------------------------------------------------- sockets


class BackendSocket:
    """Wire over the `websockets` client. Use as `async with await BackendSocket.open(backend)`."""

    def __init__(self, socket):
        self._socket = socket

    @classmethod
    async def open(cls, backend: Backend) -> BackendSocket:
        """Raises BackendFailed."""
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        headers = {"Authorization": f"Bearer {backend.key}"} if backend.key else {}
        try:
            return cls(await connect(backend.url, additional_headers=headers, max_size=MESSAGE_BYTES, open_timeout=10))
        except (OSError, WebSocketException, TimeoutError) as error:
            raise BackendFailed(f"the Realtime backend cannot be reached: {type(error).__name__}: {error}") from None

    async def __aenter__(self) -> BackendSocket:
        return self

    async def __aexit__(self, *exception) -> None:
        await self._socket.close()

    async def receive(self) -> str | None:
        from websockets.exceptions import ConnectionClosed

        try:
            return await self._socket.recv(decode=True)
        except ConnectionClosed:
            return None

    async def send(self, text: str) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(text)
        except ConnectionClosed:
            raise BackendFailed("the Realtime backend has closed the connection") from None


class ClientSocket:
    """Wire over a Starlette WebSocket that was accepted."""

    def __init__(self, socket):
        self._socket = socket

    async def receive(self) -> str | None:
        while (message := await self._socket.receive())["type"] == "websocket.receive":
            if message.get("text") is not None:  # the protocol has no binary messages
                return message["text"]
        return None

    async def send(self, text: str) -> None:
        from starlette.websockets import WebSocketDisconnect

        try:
            await self._socket.send_text(text)
        except (WebSocketDisconnect, RuntimeError):  # it left while we wrote: receive() says so
            return


async def bridge(socket, avatar: LiveSession, backend: Backend) -> None:
    """Serve one accepted Starlette WebSocket until either side ends; closes it with the reason. The caller has checked who it is."""
    from starlette.websockets import WebSocketDisconnect

    code = 1000
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client left first: there is nobody to tell
        try:
            async with await BackendSocket.open(backend) as upstream:
                await RealtimeBridge(avatar, ClientSocket(socket), upstream).run()
        except LiveAvatarError as error:
            code, kind = 1011, getattr(error, "kind", "internal")
            await socket.send_json({"type": "error", "error": {"type": "server_error", "code": kind, "message": str(error)}})
        await socket.close(code)
