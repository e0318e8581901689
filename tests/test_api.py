"""The session API over HTTP, on the real studio: who may what, what a session's life looks like, what is refused and how."""

import asyncio
import gc
import json
import time
import weakref
from pathlib import Path

import jwt
import pytest

from api_server import PCM, STATEMENT, bearer, portrait, problem, running, settings, tone, until
from test_metrics import values
from liveavatar.config import load
from liveavatar.serving.access import ANYBODY, SCOPES
from liveavatar.serving.conversations import Conversations
from liveavatar.serving.durable import private_folder
from liveavatar.serving.settings import ListenConfig, ProfileConfig, ServeConfig
from liveavatar.serving.voices import VoiceFailed


LOOK, SPEAK, STEER, RUN = ("view", "control"), ("publish",), ("control",), ("admin",)
ANY = SCOPES[:3]
JOIN = {"avatar_id": "default", "livekit_url": "ws://x", "livekit_token": "x"}

# every operation: which scopes suffice, one of them; and a request that would be good. "!": with a server key alone
OPERATIONS = {
    "GET /v1/server": (ANY, {}),
    "POST /v1/keys !": (RUN, {"json": {"owner": "x"}}),
    "GET /v1/keys !": (RUN, {}),
    "DELETE /v1/keys/{prefix} !": (RUN, {}),
    "POST /v1/avatars !": (STEER, {"files": {"portrait": portrait()}, "data": {"synthetic": "true"}}),
    "GET /v1/avatars": (LOOK, {}),
    "GET /v1/avatars/{avatar_id}": (LOOK, {}),
    "GET /v1/avatars/{avatar_id}/portrait": (LOOK, {}),
    "GET /v1/avatars/{avatar_id}/thumbnail": (LOOK, {}),
    "DELETE /v1/avatars/{avatar_id} !": (STEER, {}),
    "POST /v1/consents !": (STEER, {"files": {"media": portrait()}, "data": STATEMENT}),
    "GET /v1/consents !": (LOOK, {}),
    "GET /v1/consents/{consent_id} !": (LOOK, {}),
    "POST /v1/consents/{consent_id}/revoke !": (STEER, {}),
    "DELETE /v1/consents/{consent_id} !": (STEER, {}),
    "POST /v1/sessions !": (STEER, {"json": {}}),
    "GET /v1/sessions": (LOOK, {}),
    "GET /v1/sessions/{session_id}": (ANY, {}),
    "PATCH /v1/sessions/{session_id}": (STEER, {"json": {}}),
    "GET /v1/sessions/{session_id}/stats": (LOOK, {}),
    "POST /v1/sessions/{session_id}/heartbeat": (ANY, {}),
    "POST /v1/sessions/{session_id}/interrupt": (("publish", "control"), {}),
    "POST /v1/sessions/{session_id}/tokens !": (("view", "admin"), {"json": {"scopes": ["view"]}}),
    "POST /v1/sessions/{session_id}/audio": (SPEAK, {"content": bytes(320), "headers": PCM}),
    "POST /v1/sessions/{session_id}/say": (SPEAK, {"json": {"text": "hello"}}),
    "POST /v1/sessions/{session_id}/outputs": (STEER, {"json": {"kind": "hls"}}),
    "GET /v1/sessions/{session_id}/outputs": (LOOK, {}),
    "GET /v1/sessions/{session_id}/outputs/{output_id}": (LOOK, {}),
    "GET /v1/sessions/{session_id}/outputs/{output_id}/hls/{name}": (("view",), {}),
    "DELETE /v1/sessions/{session_id}/outputs/{output_id}": (STEER, {}),
    "POST /v1/sessions/{session_id}/whep": (("view",), {"content": "v=0", "headers": {"content-type": "application/sdp"}}),
    "PATCH /v1/sessions/{session_id}/whep/{viewer_id}": (("view",), {}),
    "DELETE /v1/sessions/{session_id}/whep/{viewer_id}": (("view",), {}),
    "POST /v1/channels !": (STEER, {"json": {"name": "day"}}),
    "GET /v1/channels !": (LOOK, {}),
    "GET /v1/channels/{channel} !": (LOOK, {}),
    "PATCH /v1/channels/{channel} !": (STEER, {"json": {}}),
    "DELETE /v1/channels/{channel} !": (STEER, {}),
    "POST /v1/channels/{channel}:start !": (STEER, {}),
    "POST /v1/channels/{channel}:stop !": (STEER, {}),
    "POST /v1/channels/{channel}:switch !": (STEER, {"json": {}}),
    "POST /v1/channels/{channel}/sounds !": (STEER, {"content": bytes(320), "headers": PCM}),
    "DELETE /v1/channels/{channel}/sounds/{sound_id} !": (STEER, {}),
    "GET /v1/channels/{channel}/outputs/{output}/hls/{name} !": (("view",), {}),
    "POST /v1/sessions/{session_id}/conversation": (STEER, {}),
    "GET /v1/sessions/{session_id}/conversation": (LOOK, {}),
    "POST /v1/sessions/{session_id}/conversation/turns": (SPEAK, {"json": {"text": "hello"}}),
    "DELETE /v1/sessions/{session_id}/conversation": (STEER, {}),
    "GET /v1/chain !": (RUN, {}),
    "GET /v1/audit !": (RUN, {}),
    "POST /v1/sessions/{session_id}/preview": (STEER, {}),
    "GET /v1/recordings !": (LOOK, {}),
    "GET /v1/recordings/{recording_id} !": (LOOK, {}),
    "GET /v1/recordings/{recording_id}/file !": (LOOK, {}),
    "DELETE /v1/recordings/{recording_id} !": (STEER, {}),
    "GET /v1/ice-servers": (("view",), {}),
    "POST /v1/watermark:detect !": (LOOK, {"content": b"x", "headers": {"content-type": "application/octet-stream"}}),
    "POST /v1/livekit/join !": (STEER, {"json": JOIN}),
    "POST /v1/session !": (STEER, {"json": JOIN}),
    "POST /v1/compat/bey/v1/sessions !": (STEER, {"json": {"transport": "livekit", "avatar_id": "default", "url": "ws://x", "token": "x"}}),
    "POST /v1/compat/bithuman !": (STEER, {"data": {"livekit_url": "ws://x", "livekit_token": "x", "room_name": "x"}}),
    "DELETE /v1/sessions/{session_id}": (STEER, {}),
}
PUBLIC = ("/livez", "/readyz", "/startupz")


async def voice(text):
    yield tone(0.2), 16_000


def operations(app) -> set[str]:
    return {f"{method.upper()} {path}" for path, item in app.openapi()["paths"].items() if path not in PUBLIC for method in item}


async def things(server, key: str) -> dict[str, str]:
    """One of everything that has an id, of the tenant with this key."""
    made = await server.http.post("/v1/consents", files={"media": portrait()}, data=STATEMENT, headers=bearer(key))
    avatar = await server.http.post("/v1/avatars", files={"portrait": portrait()}, data={"consent_id": made.json()["id"]}, headers=bearer(key))
    await server.http.post("/v1/channels", json={"name": "night"}, headers=bearer(key))
    return {"session_id": await server.opened(key), "channel": "night", "sound_id": "0" * 32, "output": "web", "avatar_id": avatar.json()["id"], "consent_id": made.json()["id"], "prefix": key[3:15],
            "output_id": "0" * 16, "viewer_id": "0" * 16, "name": "index.m3u8", "recording_id": recorded(server, "acme")}


def recorded(server, owner: str) -> str:
    """Id of a finished recording of this tenant's."""
    folder = private_folder(server.folder / "recordings")
    (folder / f"{'a' * 32}.json").write_text(json.dumps({"owner": owner, "complete": True}))
    (folder / f"{'a' * 32}.mp4").write_bytes(b"mp4")
    return "a" * 32


async def ask(server, operation: str, ids: dict[str, str], credential: str | None):
    method, path = operation.removesuffix(" !").split(" ")
    request = dict(OPERATIONS[operation][1])
    headers = {**request.pop("headers", {}), "Authorization": f"Bearer {credential}" if credential else ""}
    return await server.http.request(method, path.format(**ids), headers=headers, **request)


def forged(server, key: str, session: str, **claims) -> str:
    """A token with our own secret."""
    content = {"aud": "liveavatar", "sub": session, "scope": " ".join(ANY), "own": "acme", "key": key[3:15], "exp": int(time.time()) + 60}
    return jwt.encode({**content, **claims}, (server.folder / "token.key").read_bytes(), algorithm="HS256")


def test_who_may_what(tmp_path):
    """Every route against no token, wrong ones, each missing scope, other tenants and other sessions (18.2, API-5)."""

    async def story():
        async with running(settings(tmp_path, {"requests_per_minute": 10**6}), speak=voice, conversations=Conversations(None)) as server:
            assert operations(server.app) == {operation.removesuffix(" !") for operation in OPERATIONS}
            acme, other = server.tenant("acme"), server.tenant("other")
            ids, second = await things(server, acme), await server.opened(acme)
            server.at.quotas.failed = lambda address: None  # a matrix is many failures from one address
            session, lacking = ids["session_id"], {scopes: tuple(scope for scope in ANY if scope not in scopes) for scopes, _ in OPERATIONS.values()}
            keys = {scopes: server.tenant("acme", scopes) for scopes in set(lacking.values()) if scopes}
            wrong = {None: "missing", "x.y.z": "token", f"la_{'0' * 12}_{'A' * 43}": "key", forged(server, acme, session, exp=1): "expired",
                     forged(server, acme, session, aud="else"): "audience"}  # fmt: skip
            for operation, (scopes, _) in OPERATIONS.items():
                for credential, kind in wrong.items():
                    answer = await ask(server, operation, ids, credential)
                    assert problem(answer) == (401, kind) and answer.headers["www-authenticate"] == "Bearer", operation
                if lacking[scopes]:
                    assert problem(await ask(server, operation, ids, keys[lacking[scopes]])) == (403, "scope"), operation
                if "{" in operation:
                    assert problem(await ask(server, operation, ids, other))[0] == (403 if "prefix" in operation else 404), operation
                if operation.endswith("!"):
                    assert problem(await ask(server, operation, ids, forged(server, acme, session))) == (403, "scope"), operation
                elif "session_id" in operation:
                    assert problem(await ask(server, operation, ids, forged(server, acme, second))) == (404, "not_found"), operation
            there = await server.http.get(f"/v1/sessions/{session}", headers=bearer(acme))
            assert there.json()["state"] in ("ready", "idle") and server.at.store.get(ids["avatar_id"])  # none of it did anything

    asyncio.run(story())


def test_the_life_of_a_session(tmp_path):
    async def story():
        async with running(settings(tmp_path), speak=voice) as server:
            wish = {"avatar_id": "trained_4", "mode": "livestream", "prompt": "a studio", "metadata": {"room": "7"}}
            made = await server.http.post("/v1/sessions", json=wish)
            assert made.status_code == 201 and made.headers["location"] == f"/v1/sessions/{made.json()['id']}"
            home = made.headers["location"]
            assert made.json()["metadata"] == {"room": "7"} and made.json()["mode"] == "livestream" and len(made.json()["id"]) == 22  # 128 bits
            session = server.studio.sessions[made.json()["id"]]
            assert (session.role.avatar, session.role.prompt, session.role.owner) == ("trained_4", "a studio", "operator")
            said = await server.http.post(f"{home}/say", json={"text": "hello"})
            pushed = await server.http.post(f"{home}/audio?rate=24000", content=tone(0.5, 24_000).tobytes(), headers=PCM)
            assert (said.status_code, said.json()["segment"], pushed.json()) == (202, 0, {"epoch": 0, "segment": 1, "seconds": 0.5})
            events = session.events()
            finished = [event.data async for event in until(events, "speak.finished", 2)]
            assert [(f["segment"], f["position_ms"], f["interrupted"]) for f in finished] == [(0, 200, False), (1, 500, False)]
            changed = await server.http.patch(home, json={"prompt": "a garden", "avatar_id": "trained_9"})
            assert (changed.json()["avatar_id"], changed.json()["prompt"], session.role.prompt) == ("trained_9", "a garden", "a garden")
            await server.http.post(f"{home}/audio", content=tone(3.0).tobytes(), headers=PCM)
            done = await server.http.post(f"{home}/interrupt")
            assert done.json()["epoch"] == 1 == session.epoch and not server.at.desk.leases(ANYBODY)[0].feeder.busy
            for _ in range(2):
                assert (await server.http.delete(home)).status_code == 204  # ending twice is no error
            assert (await server.http.get(home)).json()["state"] == "closed" and (await server.http.get("/v1/sessions")).json() == {"sessions": []}
            late = await server.http.post(f"{home}/interrupt")
            assert (late.status_code, late.json()["type"].rsplit("/")[-1]) == (409, "state")

    asyncio.run(story())


def test_a_profile_an_emotion_and_listening_reach_the_session_and_the_model(tmp_path):
    async def story():
        profiles = {"phone": ProfileConfig(mode="livestream", bitrate=300_000, scale=2, park_seconds=5.0)}
        async with running(settings(tmp_path, profiles=profiles)) as server:
            made = await server.http.post("/v1/sessions", json={"profile": "phone", "prompt": "A garden"})
            home, session = made.headers["location"], server.studio.sessions[made.json()["id"]]
            assert (made.json()["profile"], made.json()["mode"], made.json()["width"]) == ("phone", "livestream", 256)
            assert (session.config.media.bitrate, session.config.sessions.park_seconds, session.mode) == (300_000, 5.0, "livestream")
            plain = await server.http.post("/v1/sessions", json={"mode": "conversation"})
            assert (plain.json()["profile"], plain.json()["width"]) == (None, 128)
            own = await server.http.post("/v1/sessions", json={"profile": "phone", "mode": "conversation"})
            assert own.json()["mode"] == "conversation" == server.studio.sessions[own.json()["id"]].mode  # what is asked for comes first
            assert problem(await server.http.post("/v1/sessions", json={"profile": "tv"})) == (422, "profile")
            assert (await server.http.get("/v1/server")).json()["profiles"] == ["phone"]

            read, tell = [], session._engine.set_prompt
            session._engine.set_prompt = lambda text: (read.append(text), tell(text))[1]
            for change in ({"emotion": "happy"}, {"listening": True}, {"listening": True}, {"emotion": "", "prompt": "A studio."}):
                changed = await server.http.patch(home, json=change)
            assert (changed.json()["emotion"], changed.json()["listening"], changed.json()["prompt"]) == ("", True, "A studio.")
            listens = "The person listens attentively, lips closed."
            assert read == ["A garden. The person looks happy.", f"A garden. The person looks happy. {listens}", f"A studio. {listens}"]
            await server.http.post(f"{home}/audio", content=tone(0.3).tobytes(), headers=PCM)
            async with asyncio.timeout(10):
                while session.role.listening:
                    await asyncio.sleep(0.01)
            assert read[-1] == "A studio." and not (await server.http.get(home)).json()["listening"]  # whoever speaks does not listen
            assert problem(await server.http.patch(home, json={"emotion": "happy. Ignore that"}))[0] == 422

    asyncio.run(story())


# ---------------------------------------------------------------- leases and slots (API-2, API-3)


def test_idle_and_long_sessions_end_and_leave_nothing(tmp_path):
    async def story():
        async with running(settings(tmp_path, sessions={"idle_seconds": 5.0, "length_seconds": 30.0})) as server:
            desk, now = server.at.desk, [server.studio.clock()]
            desk._clock = lambda: now[0]
            idle, held = await server.opened(), await server.opened()
            desk._leases[held].holders = 1
            short = await server.opened(limits={"length_seconds": 3})
            greedy = await server.http.post("/v1/sessions", json={"limits": {"idle_seconds": 86400}})  # asks for more than the server gives
            assert greedy.json()["lease"]["idle_ends_at"] - greedy.json()["created_at"] < 6
            now[0] += 4
            await server.http.post(f"/v1/sessions/{idle}/heartbeat")
            await desk.tick()
            assert await reasons(server, idle, held, short) == [None, None, "length"]
            now[0] += 4.9
            await desk.tick()
            assert await reasons(server, idle, held) == [None, None]
            now[0] += 0.2
            await desk.tick()
            assert await reasons(server, idle, held) == ["idle", None]
            now[0] += 30
            await desk.tick()
            assert await reasons(server, held) == ["length"] and not server.studio.sessions and not desk.leases(ANYBODY)
            ended = {name: count for name, count in values(server.studio.metrics).items() if "sessions_ended_total" in name and count}
            assert sorted(ended.values()) == [2, 2] and all('"idle"' in name or '"length"' in name for name in ended)  # each once

    asyncio.run(story())


def test_sessions_that_end_while_others_are_looked_at_and_open_segments_hold_nothing(tmp_path):
    """One ends while the desk waits for another's end; one that was spoken to and never told that this was all is idle, too (API-2)."""

    async def story():
        async with running(settings(tmp_path, sessions={"idle_seconds": 5.0})) as server:
            desk, now = server.at.desk, [server.studio.clock()]
            desk._clock = lambda: now[0]
            first, second, spoken = [await server.opened() for _ in range(3)]
            await server.http.post(f"/v1/sessions/{spoken}/audio?segment=0&end=false", content=tone(0.3).tobytes(), headers=PCM)
            live, left = server.studio.sessions[first], server.studio.sessions[spoken]
            close = live.close

            async def meanwhile(reason):
                await desk.close(desk._leases[second])
                await close(reason)

            live.close = meanwhile
            async with asyncio.timeout(20):
                while left.speech.waiting or not left.speech.total:
                    await asyncio.sleep(0.02)
            assert left.speech.segments  # still open
            now[0] = server.studio.clock() + 5.1
            await desk.tick()
            assert await reasons(server, first, second, spoken) == ["idle", "closed", "idle"]
            counted = server.at.metrics.exposition().decode()
            assert all(f'sessions_ended_total{{reason="{reason}"}} {n}.0' in counted for reason, n in (("idle", 2), ("closed", 1)))

    asyncio.run(story())


async def reasons(server, *sessions: str) -> list[str | None]:
    return [(await server.http.get(f"/v1/sessions/{session}")).json()["reason"] for session in sessions]


def test_slots_are_reserved_before_anything_is_built(tmp_path, monkeypatch):
    def no_disk(path):
        raise OSError("disk full")

    async def story():
        async with running(settings(tmp_path, {"sessions": 2})) as server:
            answers = await asyncio.gather(*(server.http.post("/v1/sessions", json={}) for _ in range(5)))
            assert sorted(answer.status_code for answer in answers) == [201, 201, 429, 429, 429]
            assert {problem(answer) for answer in answers if answer.status_code == 429} == {(429, "quota")}
            more = await asyncio.gather(*(server.http.post("/v1/sessions", json={}, headers=bearer(server.tenant(f"t{n}"))) for n in range(4)))
            full = [answer for answer in more if answer.status_code == 503]
            assert len(full) == 2 and problem(full[0]) == (503, "capacity") and int(full[0].headers["retry-after"]) >= 1  # the test card holds four
            await server.http.delete(f"/v1/sessions/{next(a for a in answers if a.status_code == 201).json()['id']}")
            lost = await server.http.post("/v1/sessions", json={"avatar_id": "nobody"})
            assert problem(lost) == (404, "not_found") and server.at.desk._held(server.key[3:15]) == 1  # a failed build leaves nothing
            monkeypatch.setattr("liveavatar.serving.outputs.private_folder", no_disk)
            with pytest.raises(OSError):
                await server.http.post("/v1/sessions", json={"outputs": [{"kind": "hls"}]})
            assert server.at.desk._held(server.key[3:15]) == 1
            server.at.desk.refuse()
            assert problem(await server.http.post("/v1/sessions", json={})) == (503, "draining")
            assert (await server.http.get("/readyz")).status_code == 503

    asyncio.run(story())


def test_quotas_of_a_key(tmp_path):
    async def story():
        limits = {"requests_per_minute": 12, "sessions_per_minute": 2, "audio_seconds_per_day": 1.0}
        async with running(settings(tmp_path, limits)) as server:
            session = await server.opened()
            for expected in (202, 429):
                answer = await server.http.post(f"/v1/sessions/{session}/audio", content=tone(1.5).tobytes(), headers=PCM)
                assert answer.status_code == expected, answer.text
            assert problem(answer) == (429, "quota") and int(answer.headers["retry-after"]) > 1
            await server.opened()
            answer = await server.http.post("/v1/sessions", json={})
            assert problem(answer) == (429, "rate") and 1 <= int(answer.headers["retry-after"]) <= 60
            answers = [await server.http.get("/v1/server") for _ in range(10)]
            assert [a.status_code for a in answers].count(429) == 3 and problem(answers[-1]) == (429, "rate")
            for _ in range(21):
                answer = await server.http.get("/v1/server", headers=bearer("guess"))
            assert problem(answer) == (429, "rate")

    asyncio.run(story())


# ---------------------------------------------------------------- what is refused, and how


def test_bad_requests_are_problems_that_repeat_nothing(tmp_path):
    async def story():
        async with running(settings(tmp_path, {"image_bytes": 50_000, "audio_bytes": 100_000})) as server:
            session = await server.opened()
            audio, http = f"/v1/sessions/{session}/audio", server.http
            secret = "rtmp://host/live/my-secret-key"
            cases = [
                (http.post("/v1/sessions", content=b"{", headers={"content-type": "application/json"}), (400, "invalid")),
                (http.post("/v1/sessions", content=b"[" * 30_000, headers={"content-type": "application/json"}), (400, "invalid")),
                (http.post("/v1/sessions", json={"outputs": [{"kind": "rtmp", "url": secret, "extra": 1}]}), (422, "unprocessable")),
                (http.post("/v1/sessions", json={"webhook": {"url": secret, "secret": "short"}}), (422, "unprocessable")),
                (http.post("/v1/sessions", json={"webhook": {"url": "http://127.0.0.1/", "secret": "x" * 16}}), (403, "ssrf")),
                (http.post("/v1/sessions", json={"metadata": {"a": "x" * 513}}), (422, "unprocessable")),
                (http.post("/v1/sessions", json={"prompt": "x" * 70_000}), (413, "too_large")),
                (http.put(f"/v1/sessions/{session}"), (405, "method")),
                (http.get("/v1/nothing"), (404, "not_found")),
                (http.get("/v1/sessions/short"), (422, "unprocessable")),
                (http.post(audio, content=b"123", headers=PCM), (400, "invalid")),
                (http.post(audio, content=b"", headers=PCM), (422, "empty")),
                (http.post(audio, content=b"{}", headers={"content-type": "application/json"}), (415, "unsupported")),
                (http.post(audio, content=b"MZ" * 100, headers={"content-type": "audio/wav"}), (415, "unsupported")),
                (http.post(audio, content=b"RIFF" + bytes(100), headers={"content-type": "audio/wav"}), (422, "unprocessable")),
                (http.post(audio, content=slow(b"x" * 30_000, 4), headers=PCM), (413, "too_large")),  # refused while it streams
                (http.post(f"{audio}?end=false", content=bytes(2), headers=PCM), (400, "invalid")),
                (http.post(f"{audio}?epoch=4000000000", content=bytes(2), headers=PCM), (400, "invalid")),
                (http.post(f"/v1/sessions/{session}/say", json={"text": "hello"}), (422, "voice")),
                (http.post("/v1/avatars", files={"portrait": portrait()}), (403, "consent_required")),
                (http.post("/v1/avatars", files={"portrait": b"GIF89a"}, data={"synthetic": "true"}), (415, "unsupported")),
                (http.post("/v1/avatars", files={"portrait": portrait()[:200]}, data={"synthetic": "true"}), (422, "unprocessable")),
                (http.post("/v1/avatars", files={"portrait": bytes(200_000)}, data={"synthetic": "true"}), (413, "too_large")),
                (http.delete("/v1/avatars/default"), (409, "state")),
                (http.post("/v1/keys", json={"owner": "../x"}), (422, "unprocessable")),
            ]
            for request, expected in cases:
                answer = await request
                assert problem(answer) == expected, (answer.request.url, answer.text)
                assert "my-secret" not in answer.text and "Traceback" not in answer.text and str(tmp_path) not in answer.text

    asyncio.run(story())


async def slow(piece: bytes, count: int):
    for _ in range(count):
        yield piece


def test_a_voice_that_fails_is_told_and_the_next_words_are_spoken(tmp_path):
    async def moody(text):
        yield tone(0.1), 16_000
        if text == "bad":
            raise VoiceFailed("out of breath")

    async def story():
        async with running(settings(tmp_path), speak=moody) as server:
            session = await server.opened()
            for text in ("bad", "good"):
                await server.http.post(f"/v1/sessions/{session}/say", json={"text": text})
            events = server.studio.sessions[session].events()
            (error,) = [event.data async for event in until(events, "error", 1)]
            assert (error["code"], error["status"], error["retryable"]) == ("voice", 502, True)
            assert [event.data["segment"] async for event in until(events, "speak.finished", 2)] == [0, 1]

    asyncio.run(story())


def test_a_repeated_post_opens_one_session(tmp_path):
    async def story():
        async with running(settings(tmp_path)) as server:
            asked = {"json": {"metadata": {"a": "b"}}, "headers": {"Idempotency-Key": "k1"}}
            first, second = [await server.http.post("/v1/sessions", **asked) for _ in range(2)]
            assert first.json() == second.json() and second.headers["idempotent-replayed"] == "true" and len(server.studio.sessions) == 1
            again = await server.http.post("/v1/sessions", json={}, headers={"Idempotency-Key": "k1"})
            assert problem(again) == (409, "idempotency")
            viewer = bearer(server.tenant("operator", ["view"]))  # the first answer is not for everybody of the tenant
            assert problem(await server.http.post("/v1/sessions", json=asked["json"], headers=asked["headers"] | viewer)) == (403, "scope")
            face = {"files": {"portrait": portrait()}, "data": {"synthetic": "true"}, "headers": {"Idempotency-Key": "k1"}}
            made = [await server.http.post("/v1/avatars", **face) for _ in range(2)]
            assert made[0].json()["id"] == made[1].json()["id"] and len(server.at.store.list(lambda owner: True)) == 6

    asyncio.run(story())


# ---------------------------------------------------------------- pages, files, what is told to strangers


def test_pages_paths_and_headers(tmp_path):
    async def story():
        config = settings(tmp_path, listen=ListenConfig(port=0, origins=("https://app.example",)))
        async with running(config) as server:
            http, face = server.http, {"files": {"portrait": portrait()}, "data": {"synthetic": "true"}}
            avatar = (await http.post("/v1/avatars", **face)).json()["id"]
            for path in (f"/v1/avatars/{avatar}/../../../keys.json", "/v1/avatars/..%2f..%2fkeys.json/portrait", "/v1/avatars/%2e%2e/portrait",
                         "/../keys.json", "/..%2f..%2fapp.py", "/%2e%2e/%2e%2e/app.py", "/console/../../app.py", "//etc/passwd", "/%00",
                         "/v1/sessions/..%2f..%2fx/outputs", f"/v1/sessions/{'x' * 22}/outputs/{'0' * 16}/hls/..%2f..%2f..%2fkeys.json"):  # fmt: skip
                answer = await http.get(path)
                assert answer.status_code in (404, 422) and b"argon2" not in answer.content and b"import" not in answer.content, (path, answer.text)
            for path in ("/livez", "/v1/server", "/v1/nothing", "/nothing"):
                headers = (await http.get(path)).headers
                assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
                assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY", path
            assert (await http.get("/v1/server")).headers["cache-control"] == "no-store"
            for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
                asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
                preflight = await http.options("/v1/sessions", headers=asked)
                assert (preflight.headers.get("access-control-allow-origin") == origin) == allowed
                assert "access-control-allow-credentials" not in preflight.headers
                assert ((await http.post("/v1/keys", json={}, headers={"Origin": origin})).status_code == 403) != allowed
            strangers = await http.get("/readyz", headers={"Authorization": ""})
            assert strangers.json() == {"status": "ok", "reasons": []} and (await http.get("/livez")).json() == {"status": "ok"}
            scraped = await http.get("/metrics", headers={"Authorization": ""})
            assert scraped.status_code == 200 and 'liveavatar_auth_failures_total{reason="' in scraped.text  # this machine
            for told in ({"X-Forwarded-For": "192.0.2.1"}, bearer(server.tenant("acme")) | {"Via": "1.1 proxy"}):
                assert (await http.get("/metrics", headers={"Authorization": "", **told})).status_code in (401, 403)
            for path in ("/live", "/ready", "/healthz", "/startupz"):
                assert (await http.get(path)).status_code == 200

    asyncio.run(story())


def test_the_config_of_the_cpu_server_loads():
    config = load(Path(__file__).parents[1] / "configs" / "serve_tiny.yaml", (), ServeConfig)
    assert config.access.required and sum(config.engine.stages, ()) == config.engine.chain


def test_what_is_over_leaves_no_session_behind(tmp_path):
    """Opened, spoken to, interrupted, ended: nothing of it is alive but what can still be asked about it (API-2)."""

    async def story():
        async with running(settings(tmp_path)) as server:
            gone, tasks = [], None
            for _ in range(6):
                session = await server.opened(outputs=[])
                gone.append(weakref.ref(server.studio.sessions[session]))
                await server.http.post(f"/v1/sessions/{session}/audio", content=tone(0.2).tobytes(), headers=PCM)
                await server.http.post(f"/v1/sessions/{session}/interrupt")
                await server.http.delete(f"/v1/sessions/{session}")
                await asyncio.sleep(0)
                tasks = tasks or len(asyncio.all_tasks())
            gc.collect()
            assert [ref() for ref in gone] == [None] * 6 and len(asyncio.all_tasks()) == tasks and not server.studio.sessions
            last = await server.http.get(f"/v1/sessions/{session}")
            assert (last.json()["state"], last.json()["reason"], last.json()["lease"]) == ("closed", "closed", None)
            assert (await server.http.get(f"/v1/sessions/{session}/stats")).json()["interrupts"] == 1

    asyncio.run(story())
