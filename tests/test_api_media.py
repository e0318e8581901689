"""Faces, destinations, recordings and marks over HTTP, on the real studio: what may be shown, where it goes, what it leaves behind."""

import asyncio
import hashlib
import io
import re
import threading

import av
import numpy as np

from api_server import PCM, STATEMENT, bearer, changed, portrait, problem, running, settings, tone, until
from liveavatar.serving import eventlog, routes_avatars, signing
from liveavatar.serving.audit import FINISHED
from liveavatar.serving.watermark import Watermark


def test_a_face_lives_as_long_as_its_consent(tmp_path):
    """Registered with a record of the very picture, kept clean, and gone from the air the moment the record is revoked (19.2)."""

    async def story():
        async with running(settings(tmp_path)) as server:
            http, photo = server.http, portrait("JPEG", exif=b"Exif\0\0secret place", seed=3)
            given = (await http.post("/v1/consents", files={"media": photo}, data={**STATEMENT, "scope": ["conversation"]})).json()
            assert given["state"] == "valid" and given["subject"] == "Ada"
            other = await http.post("/v1/avatars", files={"portrait": portrait()}, data={"consent_id": given["id"]})
            assert problem(other) == (403, "consent_media")
            made = await http.post("/v1/avatars", files={"portrait": ("../../evil.jpg", photo)}, data={"consent_id": given["id"], "name": "Ada"})
            assert made.status_code == 201 and made.headers["location"] == made.json()["links"]["self"]
            avatar = made.json()["id"]
            kept = await http.get(made.json()["links"]["portrait"])
            assert kept.content.startswith(b"\x89PNG") and b"secret" not in kept.content and kept.headers["content-type"] == "image/png"
            assert problem(await http.post("/v1/sessions", json={"avatar_id": avatar, "mode": "livestream"})) == (403, "consent_scope")
            session = await server.opened(avatar_id=avatar)
            assert (await http.post(f"/v1/consents/{given['id']}/revoke")).json()["state"] == "revoked"
            assert (await http.get(f"/v1/sessions/{session}")).json()["reason"] == "consent"
            assert problem(await http.post("/v1/sessions", json={"avatar_id": avatar})) == (403, "consent_revoked")
            assert (await http.delete(f"/v1/consents/{given['id']}")).status_code == 204
            assert problem(await http.get(f"/v1/avatars/{avatar}")) == (404, "not_found")
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert not any(avatar in str(path) or b"Ada" in path.read_bytes() for path in files)
        told = [(record.name, record.data.get("avatar")) for record in eventlog.read(tmp_path / "audit.jsonl")]  # no name in it (18.9)
        names = ("avatar.added", "session.opened", "session.ended", "avatar.erased")
        assert told == [("server.started", None), *((name, avatar) for name in names)]
        assert eventlog.check(tmp_path / "audit.jsonl") is None

    asyncio.run(story())


def test_uploads_of_a_day_and_avatars_of_a_tenant_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(routes_avatars, "MOST", 1)

    async def story():
        async with running(settings(tmp_path, access={"upload_bytes_per_day": 50_000})) as server:
            face = {"files": {"portrait": portrait()}, "data": {"synthetic": "true"}}  # 28 kB
            assert (await server.http.post("/v1/avatars", **face)).status_code == 201
            assert problem(await server.http.post("/v1/avatars", **face)) == (429, "quota")  # one is enough
            assert "uploads" in (await server.http.post("/v1/consents", files={"media": portrait()}, data=STATEMENT)).json()["detail"]
            assert (await server.http.get("/v1/avatars")).status_code == 200
            assert (await server.http.post("/v1/avatars", **face, headers=bearer(server.tenant("acme")))).status_code == 201

    asyncio.run(story())


def test_a_page_that_looks_at_one_session_sees_no_other_face(tmp_path):
    async def story():
        async with running(settings(tmp_path)) as server:
            face = {"data": {"synthetic": "true"}}
            shown, hidden = [(await server.http.post("/v1/avatars", files={"portrait": portrait(seed=n)}, **face)).json()["id"] for n in (1, 2)]
            session = await server.opened(avatar_id=shown)
            for scopes, known in ((["view"], {shown}), (["control"], {shown, hidden})):
                token = bearer((await server.http.post(f"/v1/sessions/{session}/tokens", json={"scopes": scopes})).json()["token"])
                listed = (await server.http.get("/v1/avatars", headers=token)).json()["avatars"]
                assert {avatar["id"] for avatar in listed if not avatar["embedded"]} == known and len(listed) > len(known)
                for avatar in (shown, hidden):
                    answer = await server.http.get(f"/v1/avatars/{avatar}/portrait", headers=token)
                    assert answer.status_code == (200 if avatar in known else 404)

    asyncio.run(story())


def test_outputs_start_and_end_and_show_no_key(tmp_path):
    async def story():
        config = changed(settings(tmp_path), outputs={"private": ("127.0.0.0/8",), "retry_limit_seconds": 0.2})
        async with running(config) as server:
            home = f"/v1/sessions/{await server.opened(outputs=[{'kind': 'hls'}])}/outputs"
            hls = (await server.http.get(home)).json()["outputs"][0]
            refused = await server.http.post(home, json={"kind": "rtmp", "url": "rtmp://10.0.0.1/live/my-secret"})
            assert problem(refused) == (403, "ssrf") and "my-secret" not in refused.text
            for wrong in ({"kind": "rtmp"}, {"kind": "hls", "url": "file:///etc/passwd"}, {"kind": "record", "token": "x"},
                          {"kind": "whip", "url": "rtmp://x/y"}):  # fmt: skip
                assert (await server.http.post(home, json=wrong)).status_code in (403, 422), wrong
            made = await server.http.post(home, json={"kind": "rtmp", "url": "rtmp://127.0.0.1:1/live/my-secret", "name": "main"})
            assert made.status_code == 201 and made.json()["name"] == "main"
            async with asyncio.timeout(30):
                while (playlist := await server.http.get(hls["links"]["playlist"])).status_code != 200:
                    await asyncio.sleep(0.1)
            assert playlist.text.startswith("#EXTM3U") and playlist.headers["content-type"] == "application/vnd.apple.mpegurl"
            part = re.search(r'URI="([^"]+)"', playlist.text)[1]
            assert b"ftyp" in (await server.http.get(hls["links"]["playlist"].replace("index.m3u8", part))).content[:16]
            assert problem(await server.http.get(hls["links"]["playlist"].replace("index.m3u8", "keys.json"))) == (404, "not_found")
            shown = (await server.http.get(made.headers["location"])).json()
            assert shown["url"] == "rtmp://127.0.0.1:1/live/***" and shown["state"] in ("connecting", "waiting")
            assert "my-secret" not in (await server.http.get(home)).text
            for _ in range(2):
                assert (await server.http.delete(made.headers["location"])).status_code == 204
            await server.http.delete(home.removesuffix("/outputs"))
            assert (await server.http.delete(hls["links"]["self"])).status_code == 204, "its session has ended it"

    asyncio.run(story())


def test_a_recording_is_made_found_fetched_and_erased(tmp_path):
    """Through the API alone: record, speak, stop, list; the file plays and says that a machine made it (REC-2, REC-4, 19.4)."""

    async def story():
        async with running(settings(tmp_path)) as server:
            http, session = server.http, await server.opened()
            made = await http.post(f"/v1/sessions/{session}/outputs", json={"kind": "record"})
            await http.post(f"/v1/sessions/{session}/audio?segment=3", content=tone(0.5).tobytes(), headers=PCM)
            [done] = [event.data async for event in until(server.studio.sessions[session].events(), "speak.finished", 1)]
            assert (await http.delete(made.headers["location"])).status_code == 204
            async with asyncio.timeout(30):
                while any("_notes" in str(task.get_coro()) for task in asyncio.all_tasks()):  # it goes with the recording, not the session
                    await asyncio.sleep(0.1)
                while not (found := (await http.get("/v1/recordings")).json()["recordings"]):
                    await asyncio.sleep(0.1)
            [recording] = found
            assert (recording["session"], recording["owner"], recording["signed"], recording["whole"]) == (session, "operator", True, True)
            assert [segment["segment"] for segment in recording["segments"]] == [3]
            assert (await http.get("/v1/recordings", headers=bearer(server.tenant("acme")))).json() == {"recordings": []}
            (tmp_path / "recordings" / f"{'0' * 32}.json").symlink_to(tmp_path / "gone")  # erased while the list is made
            assert len((await http.get("/v1/recordings")).json()["recordings"]) == 1
            (tmp_path / "recordings" / f"{'0' * 32}.json").unlink()
            file = await http.get(recording["links"]["file"])
            assert file.headers["content-type"] == "video/mp4" and hashlib.sha256(file.content).hexdigest() == recording["sha256"]
            (tmp_path / "got.mp4").write_bytes(file.content)
            manifest = signing.inspect(tmp_path / "got.mp4")
            assert manifest.valid and manifest.made_by_machine
            with av.open(str(tmp_path / "got.mp4")) as container:
                assert len(list(container.decode(video=0))) >= 12
            assert (await http.delete(recording["links"]["self"])).status_code == 204 and not list((tmp_path / "recordings").iterdir())
            for kind in ("record", "hls"):
                await http.post(f"/v1/sessions/{session}/outputs", json={"kind": kind})
            folder = tmp_path / "hls"
            async with asyncio.timeout(30):
                while len(list(folder.glob("*/*.m4s"))) < 2:
                    await asyncio.sleep(0.05)
            await http.delete(f"/v1/sessions/{session}")  # what ends with its session is finished after it
            async with asyncio.timeout(30):
                while any(not output.task.done() for output in server.at.outputs.of(session)):
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0)
            server.at.audit._thread.submit(lambda: None).result()
            lines = [line.data for line in server.at.audit.tail(50) if line.name == FINISHED]
            assert all((line["session"], line["owner"], line["avatar"]) == (session, "operator", "default") for line in lines)
            assert lines[0]["sha256"] == recording["sha256"] and sorted(line["kind"] for line in lines[1:]) == ["hls", "record"]
            [last] = (await http.get("/v1/recordings")).json()["recordings"]
            [playlist] = [line for line in lines if line["kind"] == "hls"]
            assert last["sha256"] in {line["sha256"] for line in lines[1:] if line["kind"] == "record"}
            parts = sorted(folder.glob("*/*.m4s"), key=lambda path: int(path.stem.partition("-")[2]))
            played = b"".join(path.read_bytes() for path in [*folder.glob("*/*-init.mp4"), *parts])
            assert (playlist["sha256"], playlist["fragments"]) == (hashlib.sha256(played).hexdigest(), len(parts))

    asyncio.run(story())


def test_recordings_are_decoded_two_at_a_time(tmp_path, monkeypatch):
    """However many come: each may take a gigabyte and a core (18.3)."""
    begun, go = [], threading.Event()

    def decode(data, limits):
        begun.append(data)
        assert go.wait(20)
        return tone(0.1)

    monkeypatch.setattr("liveavatar.serving.uploads.recording", decode)

    async def story():
        async with running(settings(tmp_path)) as server:
            audio = f"/v1/sessions/{await server.opened()}/audio"
            posts = [asyncio.create_task(server.http.post(audio, content=b"RIFF", headers={"content-type": "audio/wav"})) for _ in range(4)]
            async with asyncio.timeout(20):
                while len(begun) < 2:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)  # for a third one
            early = len(begun)
            go.set()
            assert early == 2 and [answer.status_code for answer in await asyncio.gather(*posts)] == [202] * 4

    asyncio.run(story())


def test_whether_a_video_is_ours(tmp_path):
    """A marked stream, through the codec, is found again over HTTP; another server's is not; what is no video is refused (WM-1)."""

    def film(key: bytes | None) -> bytes:
        out, rng = io.BytesIO(), np.random.default_rng(1)
        ground = np.kron(rng.integers(60, 200, (16, 16, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        mark = Watermark(key, 77, 256, 256).mark if key else lambda picture: picture
        with av.open(out, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "18"})
            stream.width = stream.height = 256
            for n in range(25):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(mark(np.roll(ground, n, 1)), format="rgb24")))
            container.mux(stream.encode(None))
        return out.getvalue()

    async def story():
        async with running(settings(tmp_path)) as server:
            async def asked(video: bytes):
                return await server.http.post("/v1/watermark:detect", content=video, headers={"content-type": "video/mp4"})

            ours = (await asked(film(server.at.mark_key))).json()
            assert ours["found"] and ours["payload"] == "0000004d" and ours["pictures"] == 25
            assert not (await asked(film(bytes(range(32))))).json()["found"]
            for nonsense in (b"x" * 1000, b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"):
                answer = await asked(nonsense)
                assert problem(answer) == (422, "unprocessable") and "passwd" not in answer.text

    asyncio.run(story())
