"""The stream socket over a real port: speech in, events out, who may what, coming back, nonsense, slow clients (12.1)."""

import asyncio
import json
import random

import av
import numpy as np
import pytest
from hypothesis import given, settings as examples
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from api_server import bearer, changed, on_port, running, settings, tone
from liveavatar.serving.access import ANYBODY
from liveavatar.serving.problems import Conflict, Invalid, Problem
from liveavatar.serving.stream_frames import END, HEADER, MESSAGE_BYTES, OPUS, PCM, START, SoundReader, pack, unpack
from liveavatar.serving.stream_socket import MISTAKES, Connection, Outbox


def url(port: str, session: str, query: str = "") -> str:
    return f"ws://{port}/v1/sessions/{session}/stream{query}"


async def until(socket, *names: str, most: int = 4000) -> dict:
    """The next message with one of these types."""
    async with asyncio.timeout(20):
        for _ in range(most):
            message = json.loads(await socket.recv())
            if message["type"] in names:
                return message
    raise AssertionError(f"no {names}")


async def closed(socket) -> tuple[dict | None, int]:
    """The last message that is no statistic, and the close code."""
    last = None
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(10):
            while True:
                message = json.loads(await socket.recv())
                last = last if message["type"] == "stats" else message
    return last, socket.close_code


def opus(pcm: np.ndarray) -> list[bytes]:
    """Packets of 20 ms of 48 kHz int16."""
    encoder = av.CodecContext.create("libopus", "w")
    encoder.sample_rate, encoder.layout, encoder.format = 48_000, "mono", "s16"
    packets = []
    for start in range(0, len(pcm) - 959, 960):
        frame = av.AudioFrame.from_ndarray(pcm[None, start : start + 960], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48_000, start
        packets += encoder.encode(frame)
    return [bytes(packet) for packet in packets + encoder.encode(None)]


def test_what_comes_after_the_end_is_a_conflict_and_no_crash(tmp_path):
    async def story():
        async with running(settings(tmp_path)) as server:
            lease = server.at.desk.lease(ANYBODY, await server.opened())
            connection = Connection(None, lease, ANYBODY, server.at)
            await server.at.desk.close(lease)
            for data, text in ((pack(0, 1, b"\0\0"), None), (None, '{"type": "interrupt"}'), (None, '{"type": "update", "prompt": "x"}')):
                with pytest.raises(Conflict, match="the session is closed"):
                    await connection._take(data, text)

    asyncio.run(story())


# ---------------------------------------------------------------- on a real port


def test_speech_goes_in_and_events_come_out(tmp_path):
    async def story():
        async with on_port(settings(tmp_path)) as (server, port):
            session = await server.opened()
            async with connect(url(port, session), additional_headers=bearer(server.key)) as socket:
                assert (await until(socket, "session.created"))["session"]["id"] == session
                await socket.send('{"type": "format", "rate": 24000}')
                pcm = tone(0.4, 24_000).tobytes()
                await socket.send(pack(0, 7, pcm[:9600], start=True))
                await socket.send(pack(0, 7, pcm[9600:], end=True))
                assert (await until(socket, "speak.started"))["segment"] == 7
                done = await until(socket, "speak.finished")
                assert (done["segment"], done["position_ms"], done["interrupted"]) == (7, 400, False)
                packets = opus(tone(0.5, 48_000))
                for n, packet in enumerate(packets):
                    await socket.send(pack(0, 8, packet, start=n == 0, end=n == len(packets) - 1, format=OPUS))
                done = await until(socket, "speak.finished")
                assert done["segment"] == 8 and done["position_ms"] == len(packets) * 20
                await socket.send(pack(0, 9, tone(3.0, 24_000).tobytes(), end=True))
                await until(socket, "speak.started")
                await socket.send('{"type": "interrupt"}')
                assert (await until(socket, "epoch"))["epoch"] == 1
                done = await until(socket, "speak.finished")
                assert done["interrupted"] and 0 < done["position_ms"] < 3000
                await socket.send('{"type": "update", "prompt": "a garden"}')
                assert (await until(socket, "session.updated"))["prompt"] == "a garden"
                await socket.send('{"type": "ping", "id": 4}')
                assert (await until(socket, "pong"))["id"] == 4 and (await until(socket, "stats"))["epoch"] == 1
                await server.http.delete(f"/v1/sessions/{session}")
                last, code = await closed(socket)
                assert last["type"] == "session.closed" and code == 1000

    asyncio.run(story())


def test_whoever_comes_back_misses_nothing(tmp_path):
    async def story():
        async with on_port(settings(tmp_path)) as (server, port):
            session = await server.opened()
            token = (await server.http.post(f"/v1/sessions/{session}/tokens", json={"scopes": ["view", "publish"]})).json()["token"]
            async with connect(url(port, session), subprotocols=["liveavatar.v1", f"bearer.{token}"]) as socket:
                assert socket.subprotocol == "liveavatar.v1"  # the token does not come back
                await socket.send(pack(0, 0, tone(0.2).tobytes(), end=True))
                last = (await until(socket, "speak.started"))["n"]
            await asyncio.sleep(0.4)  # it ends while nobody listens
            async with connect(url(port, session)) as socket:
                await socket.send(json.dumps({"type": "hello", "token": token, "after": last}))
                numbered = [message for _ in range(3) if "n" in (message := json.loads(await socket.recv()))]
                while "speak.finished" not in [message["type"] for message in numbered]:
                    numbered += [message] if "n" in (message := json.loads(await socket.recv())) else []
                assert [message["n"] for message in numbered] == list(range(last + 1, last + 1 + len(numbered)))

    asyncio.run(story())


def test_who_may_what_on_the_socket(tmp_path):
    async def story():
        async with on_port(settings(tmp_path)) as (server, port):
            session, acme = await server.opened(), server.tenant("acme")
            theirs = await server.opened(acme)
            viewer = (await server.http.post(f"/v1/sessions/{session}/tokens", json={"scopes": ["view"]})).json()["token"]
            for headers, code in (({"Authorization": "Bearer nonsense"}, 403), ({"Origin": "https://evil.example", **bearer(server.key)}, 403)):
                with pytest.raises(InvalidStatus) as caught:
                    await connect(url(port, session), additional_headers=headers)
                assert caught.value.response.status_code == code
            for target, credential, expected in ((theirs, viewer, 4404), (session, acme, 4404), ("x" * 22, server.key, 4404)):
                async with connect(url(port, target), additional_headers=bearer(credential)) as socket:
                    assert (await closed(socket))[1] == expected
            async with connect(url(port, session)) as socket:
                await socket.send('{"type": "interrupt"}')  # before it said who it is
                assert (await closed(socket))[1] == 4401
            async with connect(url(port, session, "?after=x"), additional_headers=bearer(viewer)) as socket:
                assert (await closed(socket))[1] == 4400
            async with connect(url(port, session), additional_headers=bearer(viewer)) as socket:
                for message in (pack(0, 0, bytes(640)), '{"type": "interrupt"}', '{"type": "update", "prompt": "x"}', '{"type": "say", "text": "x"}'):
                    await socket.send(message)
                    error = await until(socket, "error")
                    assert (error["code"], error["status"], error["retryable"]) == ("scope", 403, False)
                assert server.studio.sessions[session].speech.total == 0 and server.studio.sessions[session].epoch == 0

    asyncio.run(story())


def test_a_full_buffer_is_said_and_nothing_of_the_push_taken(tmp_path):
    async def story():
        async with on_port(settings(tmp_path, sessions={"audio_seconds": 1.0})) as (server, port):
            session = await server.opened()
            async with connect(url(port, session), additional_headers=bearer(server.key)) as socket:
                await socket.send(pack(0, 0, tone(0.9).tobytes()))
                await socket.send(pack(0, 0, tone(0.9).tobytes()))
                error = await until(socket, "error")
                assert (error["code"], error["status"], error["retryable"]) == ("buffer_full", 429, True)
                assert server.studio.sessions[session].speech.total <= 0.9 * 16_000

    asyncio.run(story())


def test_nonsense_on_the_socket_never_hurts(tmp_path):
    """Random bytes and JSON; each connection is sent away after its mistakes, the server and the session go on."""
    rng = random.Random(4)
    words = ["type", "hello", "update", "say", "ping", "format", "rate", "prompt", "avatar_id", "text", "epoch", None, -1, 2**70, 1e300, [], {},
             "\ud83d\ude00"]  # fmt: skip

    def nonsense():
        kind = rng.randrange(4)
        if kind == 0:
            return rng.randbytes(rng.randrange(200))
        if kind == 1:
            epoch, flags = rng.choice((0, 1, 900, 2**32 - 1)), rng.choice((0, 1, 2, 3, 0x100, 0x103, 0xFFFF))
            return HEADER.pack(epoch, rng.randrange(4), flags, 0) + rng.randbytes(rng.randrange(300))
        if kind == 2:
            return json.dumps({str(rng.choice(words)): rng.choice(words) for _ in range(rng.randrange(4))} | {"type": rng.choice(words)})
        return rng.choice(("", "null", "[" * 5000, "{", '"x"', '{"type": "update", "avatar_id": "../../etc/passwd"}'))

    async def story():
        async with on_port(settings(tmp_path, {"requests_per_minute": 10**6})) as (server, port):
            session = await server.opened()
            for _ in range(6):
                async with connect(url(port, session), additional_headers=bearer(server.key)) as socket:
                    try:
                        for _ in range(10 * MISTAKES):
                            await socket.send(nonsense())
                    except ConnectionClosed:
                        pass
                    assert (await closed(socket))[1] == 1008
            async with connect(url(port, session), additional_headers=bearer(server.key), max_size=None) as socket:
                await socket.send(bytes(MESSAGE_BYTES + 1))
                assert (await closed(socket))[1] == 1009
            async with connect(url(port, session), additional_headers=bearer(server.key)) as socket:
                assert (await until(socket, "session.created"))["session"]["state"] in ("ready", "idle", "speaking")
            lease = server.at.desk.leases(ANYBODY)[0]
            async with asyncio.timeout(5):
                while lease.sockets:  # the server notices a client that left a moment later
                    await asyncio.sleep(0.01)

    asyncio.run(story())


def test_without_keys_only_this_machine_and_no_foreign_page(tmp_path):
    async def story():
        config = changed(settings(tmp_path), access={"required": False})
        async with on_port(config) as (server, port):
            session = (await server.http.post("/v1/sessions", json={}, headers={"Authorization": ""})).json()["id"]
            async with connect(url(port, session)) as socket:
                assert (await until(socket, "session.created"))["session"]["owner"] == "operator"
            for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
                assert (await server.http.post("/v1/sessions", json={}, headers=headers)).status_code == 403

    asyncio.run(story())


# ---------------------------------------------------------------- the pieces


@examples(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_invalid(message):
    """What is taken packs to the same bytes again; what is read is sound or a problem."""
    try:
        frame = unpack(message)
    except Invalid:
        return
    assert pack(frame.epoch, frame.segment, frame.sound, start=frame.start, end=frame.end, format=frame.format) == message
    try:
        pcm, rate = SoundReader(16_000).read(frame)
    except Problem:
        return
    assert pcm.dtype == np.int16 and pcm.ndim == 1 and rate in (16_000, 48_000)


def test_frames_say_what_they_are():
    frame = unpack(HEADER.pack(3, 2**32 - 1, START | END | OPUS << 8, 0) + b"xy")
    assert (frame.epoch, frame.segment, frame.start, frame.end, frame.format, frame.sound) == (3, 2**32 - 1, True, True, OPUS, b"xy")
    assert pack(1, 2, b"") == b"\1\0\0\0\2\0\0\0\0\0\0\0" and PCM == 0  # little-endian
    for flags, reserved in ((4, 0), (0x200, 0), (0, 1)):
        with pytest.raises(Invalid):
            unpack(HEADER.pack(0, 0, flags, reserved))


def test_a_slow_client_gets_the_newest_statistics_and_then_goes():
    """Edge "events" of section 4: 256 messages; stats are merged, then the client is disconnected (BP-1)."""

    async def story():
        box = Outbox(most=4)
        for n in range(10):
            box.put({"type": "stats", "n": n})
        box.put({"type": "epoch"})
        assert box.level()[:2] == (2, 4) and await box.get() == {"type": "stats", "n": 9}
        for n in range(3):
            box.put({"type": "state", "n": n})
        assert not box.overflowed
        box.put({"type": "stats", "n": 10})
        assert box.overflowed and await box.get() is None

    asyncio.run(story())
