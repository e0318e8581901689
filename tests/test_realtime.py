"""The Realtime proxy between a real client and a real WebSocket backend that speaks the documented events."""

import asyncio
import base64
import json
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("websockets")
pytest.importorskip("uvicorn")

import uvicorn
from fastapi import FastAPI, WebSocket
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

from liveavatar.serving.realtime import Backend, BackendFailed, BackendSocket, RealtimeBridge, bridge
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig, SessionsConfig
from liveavatar.serving.studio import Studio

FORMAT = {"type": "audio/pcm", "rate": 24_000}
KINDS = ("response.output_audio.delta", "response.audio.done", "response.done", "session.updated", "input_audio_buffer.speech_started", "x")
FIELDS = ("response_id", "item_id", "content_index", "delta", "response", "id", "session", "audio", "output", "input", "format", "type", "rate",
          "turn_detection", "output_audio_format")  # fmt: skip
SESSION = {"type": "session.created", "event_id": "e0", "session": {"type": "realtime", "audio": {"output": {"format": FORMAT}}}}


class Model:
    """A backend: keeps what it is sent, says what the test tells it."""

    def __init__(self):
        self.got, self.keys, self.socket, self.here = [], [], None, asyncio.Event()

    async def __call__(self, socket):
        self.socket = socket
        self.keys.append(socket.request.headers.get("Authorization"))
        await self.say(**SESSION)
        self.here.set()
        async for text in socket:
            self.got.append(json.loads(text))

    async def say(self, **event):
        await self.socket.send(json.dumps(event))

    async def speak(self, response: str, item: str, seconds: float, *, name: str = "response.output_audio", done: bool = True):
        tone = (8000 * np.sin(np.arange(round(24_000 * seconds)) * 0.1)).astype("<i2").tobytes()
        for at in range(0, len(tone), 9_601):  # pieces of no round length
            piece = tone[at // 2 * 2 : (at + 9_601) // 2 * 2]
            await self.say(type=f"{name}.delta", event_id="d", response_id=response, item_id=item, output_index=0, content_index=0,
                           delta=base64.b64encode(piece).decode())  # fmt: skip
        if done:
            await self.say(type=f"{name}.done", event_id="f", response_id=response, item_id=item, output_index=0, content_index=0)
            await self.say(type="response.done", event_id="g", response={"id": response, "status": "completed"})

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.got if event["type"] == kind]


class Client:
    """Keeps what it is told."""

    def __init__(self, socket):
        self.socket, self.got = socket, []
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        async for text in self.socket:
            self.got.append(json.loads(text))

    async def send(self, **event):
        await self.socket.send(json.dumps(event))

    async def until(self, kind: str, count: int = 1, seconds: float = 10.0) -> dict:
        end = asyncio.get_running_loop().time() + seconds
        while len(found := [event for event in self.got if event["type"] == kind]) < count:
            assert asyncio.get_running_loop().time() < end, f"no {kind} in {[event['type'] for event in self.got]}"
            await asyncio.sleep(0.01)
        return found[count - 1]


@asynccontextmanager
async def proxied(portrait, key: str | None = None):
    """(client, model, avatar): everything real but the model."""
    studio, model = Studio(ServeConfig(engine_kind="testcard")), Model()
    await studio.start()
    avatar = await studio.open(Role(avatar="a", picture=portrait))
    async with serve(model, "127.0.0.1", 0) as backend:
        where = Backend(url=f"ws://127.0.0.1:{backend.sockets[0].getsockname()[1]}/v1/realtime", key=key)
        app = FastAPI()

        @app.websocket("/realtime")
        async def realtime(socket: WebSocket):
            await socket.accept()
            await bridge(socket, avatar, where)

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            async with connect(f"ws://127.0.0.1:{port}/realtime") as socket:
                client = Client(socket)
                await client.until("session.created")
                yield client, model, avatar
        finally:
            server.should_exit = True
            await running
            await studio.aclose()


def run(work, portrait, **settings):
    async def go():
        async with proxied(portrait, **settings) as parts:
            await asyncio.wait_for(work(*parts), 40)

    asyncio.run(go())


def test_a_response_is_spoken_and_unknown_events_pass_untouched(portrait):
    async def work(client, model, avatar):
        assert model.keys == ["Bearer secret"]
        await client.send(type="future.event", nested={"a": [1, 2]})
        await model.say(type="rate_limits.updated", rate_limits=[1])
        assert await client.until("rate_limits.updated") == {"type": "rate_limits.updated", "rate_limits": [1]}
        await model.speak("r1", "i1", 0.5)
        started = await client.until("output_audio_buffer.started")
        stopped = await client.until("output_audio_buffer.stopped")
        assert started["response_id"] == stopped["response_id"] == "r1"
        assert len([event for event in client.got if event["type"] == "response.output_audio.delta"]) == 3  # copied, not taken away
        assert [event for event in avatar.happenings if event.name == "speak.finished"][0].data["position_ms"] == 500
        await model.speak("r2", "i2", 0.2, name="response.audio")  # the beta's name
        assert (await client.until("output_audio_buffer.stopped", 2))["response_id"] == "r2"
        assert model.got == [{"type": "future.event", "nested": {"a": [1, 2]}}]

    run(work, portrait, key="secret")


def test_barge_in_truncates_where_the_viewer_was(portrait):
    async def work(client, model, avatar):
        avatar.config = replace(avatar.config, sessions=SessionsConfig(listening=True))
        await model.speak("r1", "i1", 3.0, done=False)  # ten times faster than it is spoken
        await client.until("output_audio_buffer.started")
        await asyncio.sleep(0.6)
        await model.say(type="input_audio_buffer.speech_started", event_id="s", audio_start_ms=1000, item_id="u1")
        assert (await client.until("output_audio_buffer.cleared"))["response_id"] == "r1"
        (truncate,) = model.of("conversation.item.truncate")
        told = [event for event in avatar.happenings if event.name == "speak.finished"][0].data
        await model.say(type="input_audio_buffer.speech_stopped", event_id="e", audio_end_ms=1500, item_id="u1")
        await client.until("input_audio_buffer.speech_stopped")
        while avatar.role.listening:  # `run` bounds it
            await asyncio.sleep(0.01)
        assert [event.data for event in avatar.happenings if event.name == "session.updated"] == [{"listening": True}, {"listening": False}]
        assert truncate["item_id"] == "i1" and truncate["audio_end_ms"] == told["position_ms"] and 400 <= truncate["audio_end_ms"] <= 1600
        await client.send(type="conversation.item.truncate", item_id="i1", content_index=0, audio_end_ms=2900)  # its own guess, too late
        await model.speak("r1", "i1", 0.5, done=False)  # late audio of a response that is over
        await model.speak("r2", "i2", 0.2)
        assert (await client.until("output_audio_buffer.stopped"))["response_id"] == "r2"
        assert len(model.of("conversation.item.truncate")) == 1
        spoken = [event.data["position_ms"] for event in avatar.happenings if event.name == "speak.finished"]
        assert spoken == [told["position_ms"], 200]

    run(work, portrait)


def test_what_clears_the_buffer_stops_every_item(portrait):
    async def work(client, model, avatar):
        await model.speak("r1", "i1", 0.6, done=False)
        await model.speak("r1", "i2", 3.0, done=False)
        await client.until("output_audio_buffer.started")
        await client.send(type="output_audio_buffer.clear")  # a WebSocket backend does not know it
        await client.until("output_audio_buffer.cleared")
        assert {event["item_id"]: event["audio_end_ms"] <= 600 for event in model.of("conversation.item.truncate")} == {"i1": True, "i2": True}
        assert model.of("conversation.item.truncate")[1]["audio_end_ms"] == 0 and not model.of("output_audio_buffer.clear")
        while not model.of("response.cancel"):
            await asyncio.sleep(0.01)
        await model.speak("r2", "i3", 2.0, done=False)
        await client.until("output_audio_buffer.started", 2)
        await client.send(type="response.cancel", response_id="r2")
        assert (await client.until("output_audio_buffer.cleared", 2))["response_id"] == "r2"
        assert model.of("response.cancel")[-1]["response_id"] == "r2" and avatar.epoch == 2

    run(work, portrait)


def test_a_model_that_lets_itself_not_be_interrupted_is_not(portrait):
    async def work(client, model, avatar):
        detection = {"type": "server_vad", "interrupt_response": False}
        sound = {"input": {"turn_detection": detection}, "output": {"format": {"type": "audio/pcmu"}}}
        await model.say(type="session.updated", session={"audio": sound})
        delta = base64.b64encode(b"\xff" * 4000).decode()
        await model.say(type="response.output_audio.delta", response_id="r", item_id="i", content_index=0, delta=delta)
        await model.say(type="response.output_audio.done", response_id="r", item_id="i", content_index=0)
        await model.say(type="input_audio_buffer.speech_started", item_id="u")
        await model.say(type="response.done", response={"id": "r"})
        await client.until("output_audio_buffer.stopped")
        assert avatar.epoch == 0 and [e.data["position_ms"] for e in avatar.happenings if e.name == "speak.finished"] == [500]  # 8 kHz telephone

    run(work, portrait)


class Deaf:
    """An avatar that takes all and says nothing; a wire that does the same."""

    epoch, happenings, sent = 0, (), 0

    async def push_audio(self, pcm, rate, **said):
        assert pcm.dtype == np.int16 and rate > 0

    async def interrupt(self, reason):
        return None

    async def hears(self, somebody):
        return None

    async def send(self, text):
        self.sent += 1


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "i1", "r1", "AAAA", "audio/pcmu", "pcm16", "?"]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5), max_leaves=8)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)), max_size=8))
def test_no_event_whatever_its_shape_breaks_the_proxy(events):
    async def go():
        bridge = RealtimeBridge(Deaf(), client := Deaf(), Deaf())
        for kind, rest in events:
            try:
                await bridge._understand({**rest, "type": kind})
            except BackendFailed:  # sound that is none: the connection ends, and the client is told why
                return
            await bridge._clear()
        assert client.sent == 0  # nothing was heard, so nothing was told

    asyncio.run(go())


def test_no_backend_is_said_so():
    async def go():
        with pytest.raises(BackendFailed, match="cannot be reached"):
            await BackendSocket.open(Backend(url="ws://127.0.0.1:9/"))

    asyncio.run(go())
