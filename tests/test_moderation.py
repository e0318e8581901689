"""What an operator does not want here (serving.md 18.9): words, an endpoint's judgement, protected faces; refusals are problems and in the log."""

import asyncio
import contextlib
import io
import json

import pytest
from PIL import Image

from api_server import bearer, problem, running, settings
from liveavatar.core import ConfigError
from liveavatar.generate import PORTRAIT
from liveavatar.serving import tls
from liveavatar.serving.moderation import Moderation, ProtectedFaces, Refused, Unjudged, folded, words
from liveavatar.serving.settings import ModerationConfig

FACES = PORTRAIT.parent / "portraits"


def test_words_count_however_they_are_written_and_only_whole(tmp_path):
    listed = tmp_path / "words.txt"
    listed.write_text("# of the house\nDarn\nheck it  # a phrase\n禁止\n", encoding="utf-8")
    found = words(listed)
    for text in ("well, DARN!", "ｄａｒｎ", "da\u200brn", "Heck\n  it.", "这是禁止的"):
        assert found.search(folded(text)), text
    for text in ("darning socks", "what the heck is it", "止"):
        assert not found.search(folded(text)), text
    for content in (b"# nothing\n", b"\xff\xfe"):
        listed.write_bytes(content)
        with pytest.raises(ConfigError, match="words.txt"):
            words(listed)


@contextlib.asynccontextmanager
async def judge():
    """An endpoint as OpenAI's: "bad" is flagged, "odd" gets nonsense, "late" no answer. Gives its URL and what it was asked."""
    asked = []

    async def answer(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            body = json.loads(await reader.readexactly(int(head.split("content-length: ")[1].split("\r")[0])))
            asked.append((head, body))
            if "late" in body["input"]:
                await reader.read()
            said = {"nothing": 1} if "odd" in body["input"] else {"results": [{"flagged": False}, {"flagged": "bad" in body["input"]}]}
            text = json.dumps(said).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/moderations", asked


def test_without_a_judgement_it_is_the_operators_choice_but_never_on_a_channel():
    async def story():
        async with judge() as (url, asked):
            told, local = [], ("127.0.0.0/8",)
            await tls.context()  # the first takes its time
            strict = Moderation(ModerationConfig(url=url, private=local, seconds=0.4, model="m"), lambda *line: told.append(line))
            lenient = Moderation(ModerationConfig(url=url, private=local, seconds=0.4, silent="allow"))
            walled = Moderation(ModerationConfig(url=url, silent="allow"))  # the endpoint is on no network it may be on
            for _ in range(2):
                await strict.check("speech", "fine", closed=True)  # asked once: a channel repeats itself
            assert asked[0][1] == {"input": "fine", "model": "m"}
            for text in ("odd", "late"):
                for hook, closed in ((strict, False), (lenient, True)):
                    with pytest.raises(Unjudged) as error:
                        await hook.check("speech", text, closed=closed, owner="acme")
                    assert (error.value.status, error.value.kind) == (503, "moderation") and "Retry-After" in error.value.headers
                await lenient.check("speech", text, closed=False)
            await walled.check("speech", "bad", closed=False)
            assert len(asked) == 7, "nothing reached it where its network is not allowed"
            for hook in (strict, lenient):
                with pytest.raises(Refused):
                    await hook.check("prompt", "bad", closed=False, owner="acme")
            assert [(name, line["what"], line["by"], line["owner"]) for name, line in told] == [
                ("moderation.refused", "speech", "silence", "acme")] * 2 + [("moderation.refused", "prompt", "endpoint", "acme")]  # fmt: skip

    asyncio.run(story())


async def voice(text):
    raise AssertionError(f"{text!r} was voiced")
    yield


def test_every_door_for_text_is_watched_and_the_log_says_who(tmp_path):
    listed = tmp_path / "words.txt"
    listed.write_text("darn")
    config = settings(tmp_path / "var", moderation=ModerationConfig(words=str(listed)))

    async def story():
        async with running(config, speak=voice) as server:
            key = server.tenant("acme")
            assert problem(await server.http.post("/v1/sessions", json={"prompt": "a darn garden"}, headers=bearer(key))) == (403, "moderation")
            assert not server.studio.sessions
            session = await server.opened(key, prompt="a garden")
            home, live = f"/v1/sessions/{session}", server.studio.sessions[session]
            doors = [("POST", "/say", {"text": "Darn it."}), ("PATCH", "", {"prompt": "darn"}), ("PATCH", "", {"emotion": "darn sad"})]
            for method, path, body in doors:
                assert problem(await server.http.request(method, home + path, json=body, headers=bearer(key))) == (403, "moderation")
            assert (live.role.prompt, live.role.emotion, live.speech.total) == ("a garden", "", 0)
            with pytest.raises(Refused):
                await live.moderate("speech", "darn")  # as a conversation and a channel ask before they speak
            channel = {"name": "day", "prompt": "a garden", "schedule": {"entries": [{"name": "one", "text": "Darn it."}]}}
            assert (await server.http.post("/v1/channels", json=channel, headers=bearer(key))).status_code == 201
            await server.http.post("/v1/channels/day:start", headers=bearer(key))
            async with asyncio.timeout(10):
                while "not allowed" not in (await server.http.get("/v1/channels/day", headers=bearer(key))).text:
                    await asyncio.sleep(0.05)
            await server.http.post("/v1/channels/day:stop", headers=bearer(key))
            server.at.audit._thread.submit(lambda: None).result()
            lines = [line.data for line in server.at.audit.tail(50) if line.name == "moderation.refused"]
            assert [line["what"] for line in lines[:5]] == ["prompt", "speech", "prompt", "prompt", "speech"] and lines[5]["what"] == "speech"
            assert all((line["owner"], line["prefix"], line["by"], len(line["sha256"])) == ("acme", key[3:15], "words", 64) for line in lines)
            assert [line.get("session") for line in lines[:5]] == [None, *[session] * 4] and "darn" not in json.dumps(lines).lower()

    asyncio.run(story())


def test_a_protected_face_becomes_no_avatar_and_another_one_does(tmp_path):
    for package in ("dlib", "ai_edge_litert", "cv2", "mediapipe", "face_recognition_models"):
        pytest.importorskip(package, reason="faces are compared with it")
    folder = tmp_path / "faces"
    folder.mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        ProtectedFaces(folder, 0.6)
    Image.open(FACES / "trained_4.webp").convert("RGB").resize((256, 256)).save(folder / "somebody.png")
    limit = 0.25  # renders of different people lie closer together than photographs
    config = settings(tmp_path / "var", moderation=ModerationConfig(faces=str(folder), face_distance=limit))

    def upload(name: str) -> dict:
        out = io.BytesIO()
        Image.open(FACES / f"{name}.webp").convert("RGB").resize((300, 300)).save(out, "JPEG", quality=85)
        return {"files": {"portrait": out.getvalue()}, "data": {"synthetic": "true"}}

    async def story():
        async with running(config) as server:
            assert problem(await server.http.post("/v1/avatars", **upload("trained_4"))) == (403, "protected_face")
            assert (await server.http.post("/v1/avatars", **upload("trained_9"))).status_code == 201
            server.at.audit._thread.submit(lambda: None).result()
            (line,) = [line.data for line in server.at.audit.tail(50) if line.name == "moderation.refused"]
            assert (line["what"], line["by"], line["owner"]) == ("face", "faces", "operator")
            assert [avatar.owner for avatar in server.at.store.list(lambda owner: owner == "operator")].count("operator") == 1

    asyncio.run(story())
    Image.new("RGB", (128, 128), "grey").save(folder / "nobody.png")
    with pytest.raises(ConfigError, match="nobody.png: 0 faces found"):
        ProtectedFaces(folder, limit)
