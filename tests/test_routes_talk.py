"""Conversations and the Realtime proxy as a client meets them: who may, what it hears, what ends."""

import asyncio
import base64
import contextlib
import json

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import InvalidStatus

from api_server import bearer, on_port, problem, running, settings
from liveavatar.serving.access import VIEW
from liveavatar.serving.conversations import Conversations, Parts
from liveavatar.serving.ears import Began, Ended
from liveavatar.serving.minds import Companion
from liveavatar.serving.settings import RealtimeConfig


class Tone:
    async def speak(self, text: str):
        yield (8000 * np.sin(np.arange(3200) * 0.2)).astype(np.int16), 16_000


class Reader:
    broken = False

    async def recognise(self, pcm):
        if self.broken:
            raise RuntimeError("nobody foresaw this")
        return "hello"


class Loud:
    """Ears that take every loud piece for a turn, which lasts until somebody says that it is over."""

    def hear(self, pcm, rate):
        return [Began(0.0)] if np.abs(np.asarray(pcm)).max() > 1000 else []

    def end(self):
        return [Ended(0.1, 0.0, np.zeros(1, np.float32))]


def test_a_viewer_talks_with_the_avatar_and_not_through_it(tmp_path):
    conversations = Conversations(Parts(mind=Companion(), voice=Tone(), recogniser=(reader := Reader())), ears=Loud)
    loud, off = np.full(960, 9000, np.int16), np.zeros(0, np.int16)

    async def go():
        async with running(settings(tmp_path), conversations=conversations) as server:
            session = await server.opened()
            url, http = f"/v1/sessions/{session}/conversation", server.http
            assert (await http.get(url)).status_code == (await http.post(f"{url}/turns", json={"text": "hi"})).status_code == 409
            repeated, live = [], server.at.session(session)

            async def repeat(pcm, rate):
                repeated.append(len(pcm))

            microphone = conversations.microphone(lambda session: repeat)(live)
            await microphone(loud, 48_000)
            assert (await http.post(url, headers=bearer(server.tenant("other")))).status_code == 404
            assert (await http.post(url)).status_code == 201 and (await http.post(url)).status_code == 409
            await microphone(loud, 48_000)
            await microphone(off, 48_000)  # switched off: that is the end of the turn
            async with asyncio.timeout(15):
                while not [event for event in live.happenings if event.name == "talk.answer"]:
                    await asyncio.sleep(0.02)
            assert (await http.post(f"{url}/turns", json={"text": " "})).status_code == 422
            assert (await http.post(f"{url}/turns", json={"text": "What is my name?"})).status_code == 202
            async with asyncio.timeout(15):
                while len((said := (await http.get(url)).json())["turns"]) < 4 or said["state"] != "listening":
                    await asyncio.sleep(0.02)
            assert (await http.delete(url)).status_code == 204 and (await http.get(url)).status_code == 409
            await microphone(loud[:480], 48_000)
            await http.post(url)
            reader.broken = True
            await microphone(loud, 48_000)
            await microphone(off, 48_000)
            async with asyncio.timeout(5):
                while (await http.get(url)).status_code != 409:  # what broke is over, and can be begun again
                    await asyncio.sleep(0.02)
            assert [event.data for event in live.happenings if event.name == "talk.failed"] == [{"reason": "internal error"}]
            await http.post(url)
            await http.delete(f"/v1/sessions/{session}")  # the session takes its conversation along
            await asyncio.sleep(0.05)
            await conversations.aclose()
            return said["turns"], repeated, conversations._talks

    turns, repeated, left = asyncio.run(go())
    assert [(turn["role"], turn["cut"]) for turn in turns] == [("user", False), ("assistant", False)] * 2
    assert turns[0]["text"] == "hello" and "not told me your name" in turns[3]["text"] and repeated == [960, 0, 480, 0] and not left


def test_what_a_conversation_says_counts(tmp_path):
    """API-3: every sound that enters a session does, whoever sends it; and the sound of a turn that is understood."""
    conversations = Conversations(Parts(mind=Companion(), voice=Tone(), recogniser=Reader()), ears=Loud)

    async def go():
        async with running(settings(tmp_path, {"audio_seconds_per_day": 0.1}), conversations=conversations) as server:
            session = await server.opened()
            url, live = f"/v1/sessions/{session}/conversation", server.at.session(session)
            await server.http.post(url)
            assert (await server.http.post(f"{url}/turns", json={"text": "hi"})).status_code == 202
            async with asyncio.timeout(15):
                while not [event for event in live.happenings if event.name == "talk.answer"]:
                    await asyncio.sleep(0.02)
            refused = await server.http.post(f"{url}/turns", json={"text": "and now?"})
            assert problem(refused) == (429, "quota")
            microphone = conversations.microphone(server.at.microphone)(live)
            for pcm in (np.full(960, 9000, np.int16), np.zeros(0, np.int16)):
                await microphone(pcm, 48_000)
            async with asyncio.timeout(15):
                while not (failed := [event.data["reason"] for event in live.happenings if event.name == "talk.failed"]):
                    await asyncio.sleep(0.02)
            assert "for today is used up" in failed[0]

    asyncio.run(go())


def test_realtime_clients_are_let_in_as_everybody_else(tmp_path):
    async def backend(socket):
        assert socket.request.headers["Authorization"] == "Bearer theirs"  # the operator's key, not the client's
        await socket.send(json.dumps({"type": "session.created", "session": {}}))
        async for text in socket:
            await socket.send(text)

    async def go():
        (tmp_path / "key").write_text("theirs\n")
        async with contextlib.AsyncExitStack() as stack:
            model = await stack.enter_async_context(serve(backend, "127.0.0.1", 0))
            where = f"ws://127.0.0.1:{model.sockets[0].getsockname()[1]}"
            config = settings(tmp_path, access={"audio_seconds_per_day": 1.0}, realtime=RealtimeConfig(url=where, key_file=str(tmp_path / "key")))
            server, port = await stack.enter_async_context(on_port(config))
            session = await server.opened()
            url = f"ws://{port}/v1/sessions/{session}/realtime"
            protocols = ["realtime", f"openai-insecure-api-key.{server.key}"]
            async with connect(url, subprotocols=protocols) as socket:
                assert socket.subprotocol == "realtime" and json.loads(await socket.recv())["type"] == "session.created"
                await socket.send('{"type":"anything","x":1}')
                assert await socket.recv() == '{"type":"anything","x":1}'
                with pytest.raises(InvalidStatus):  # one mouth, one client
                    await connect(url, subprotocols=protocols)
                delta = {"response_id": "r", "item_id": "i", "delta": base64.b64encode(bytes(48_000 * 2)).decode()}
                await socket.send(json.dumps({"type": "response.output_audio.delta", **delta}))  # the model speaks for 2 s, of which a day has 1
                await socket.send(json.dumps({"type": "response.output_audio.delta", **delta}))
                async with asyncio.timeout(5):
                    while (said := json.loads(await socket.recv()))["type"] != "error":
                        pass
                assert said["error"]["code"] == "quota"
            for headers in ({}, bearer("nonsense"), bearer(server.tenant("other")), bearer(server.tenant("operator", scopes=(VIEW,)))):
                with pytest.raises(InvalidStatus):
                    await connect(url, additional_headers=headers)

    asyncio.run(go())
