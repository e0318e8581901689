"""24/7 channels: what is due when, how one stays on air, and what its owner may do with it over HTTP (serving.md 6, API-2, EGR-2, 17.2)."""

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from api_server import PCM, bearer, changed, problem, running, settings, tone, until
from liveavatar.serving.access import ANYBODY
from liveavatar.serving.channel_runner import LOOK_SECONDS, Crew, Runner
from liveavatar.serving.channels import Entry, Filler, Progress, Schedule, Turn, begun, due, ended, upcoming
from liveavatar.serving.outputs import Wanted
from liveavatar.serving.problems import Capacity, Unprocessable
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.webhooks import signature
from test_drain import ROOT, first_word, wait
from test_webhooks import SECRET, receiver

HOUR = 3600.0


def entry(name: str, **more) -> Entry:
    return Entry(name=name, text="hello", **more)


# ---------------------------------------------------------------- the schedule

TIMES = st.floats(0, 300)
TIMED = st.fixed_dictionaries({"at": TIMES, "every": st.none() | st.floats(1, 80)})


@st.composite
def schedules(draw) -> Schedule:
    kinds = draw(st.lists(st.just({}) | TIMED, max_size=5))
    return Schedule(entries=tuple(entry(f"e{n}", **kind) for n, kind in enumerate(kinds)), loop=draw(st.booleans()),
                    gap_seconds=draw(st.floats(0, 30)), late_seconds=draw(st.floats(0, 90)))  # fmt: skip


@examples(deadline=None)
@given(schedules(), st.floats(0, 100), st.lists(st.tuples(st.floats(0.01, 40), st.floats(0, 1, exclude_max=True)), max_size=40))
def test_everything_has_its_turn_once_and_in_its_time(schedule, now, steps):
    """Whatever the schedule and however long things take: times are kept or skipped, the order is kept, `upcoming` tells the truth."""
    progress, ends, slots, order = Progress(), -math.inf, set(), []
    for seconds, between in steps:
        turn = due(schedule, progress, now)
        if turn is None:
            coming = upcoming(schedule, progress, now)
            if coming is None:
                assert due(schedule, progress, now + 10 * HOUR) is None
                break
            following, at = coming
            before = min(now + between * (at - now), math.nextafter(at, 0.0))
            assert at > now and due(schedule, progress, before) is None
            now, turn = at, due(schedule, progress, at)
            assert turn.entry == following
        name = turn.entry.name
        if turn.slot is None:
            assert turn.entry.at is None and now >= ends + schedule.gap_seconds - 1e-6
            order.append(name)
        else:
            assert turn.slot <= now <= turn.slot + schedule.late_seconds and (name, turn.slot) not in slots
            slots.add((name, turn.slot))
        progress = begun(schedule, progress, turn)
        now = ends = now + seconds
        progress = ended(schedule, progress, now)
    listed = [one.name for one in schedule.entries if one.at is None]
    assert order == (listed * (len(order) + 1))[: len(order)] and (schedule.loop or len(order) <= len(listed))


def test_a_day_of_a_channel():
    """Music in a loop, the news each hour, a greeting once; what comes next is known beforehand."""
    programme = Schedule(entries=(entry("one"), entry("two"), entry("news", at=HOUR, every=HOUR), entry("hello", at=2 * HOUR)), gap_seconds=10.0)
    progress, now, said = Progress(), HOUR - 30, []
    for _ in range(9):
        following, now = upcoming(programme, progress, now)
        turn = due(programme, progress, now)
        said.append((turn.entry.name, now - HOUR))
        progress = ended(programme, begun(programme, progress, turn), now := now + 25)
        assert turn.entry == following
    assert said[:4] == [("one", -30.0), ("news", 0.0), ("two", 35.0), ("one", 70.0)]
    assert upcoming(programme, progress, HOUR + 4000) == (programme.entries[0], HOUR + 4000)  # after a long silence: the news is too late
    assert due(programme, progress, 2 * HOUR).entry.name == "news" and due(programme, progress, 2 * HOUR + 30).entry.name == "news"
    after = begun(programme, progress, due(programme, progress, 2 * HOUR))
    assert due(programme, after, 2 * HOUR + 30).entry.name == "hello" and due(programme, after, 2 * HOUR + 61).entry.name in ("one", "two")


def test_wishes_edits_and_clocks_that_are_set_back():
    plain = Schedule(entries=(entry("one"), entry("two"), entry("three")), loop=False, gap_seconds=60.0)
    wish = Progress(after="one", until=1050.0, jump="three")
    assert due(plain, wish, 1000.0) == Turn(plain.entries[2])  # at once, whatever the pause
    done = begun(plain, wish, due(plain, wish, 1000.0))
    assert (done.jump, done.after) == (None, "three") and due(plain, done, 2000.0) is None and upcoming(plain, done, 2000.0) is None
    assert due(plain, Progress(after="removed"), 0.0).entry.name == "one"
    assert due(plain, Progress(after="one", until=90_000.0), 1000.0).entry.name == "two"  # a pause no pause could be
    hourly = Schedule(entries=(entry("news", at=0.0, every=HOUR),))
    assert due(hourly, Progress(spoken={"news": 5 * HOUR}), 3 * HOUR) == Turn(hourly.entries[0], 3 * HOUR)
    assert Filler(prompts=("a", "b"), seconds=10.0).prompt(25.0) == "a" and Filler().prompt(25.0) is None
    for wrong in (lambda: entry("x", sound="y"), lambda: entry("x", every=1.0), lambda: Schedule(entries=(entry("x"), entry("x")))):
        with pytest.raises(Unprocessable):
            wrong()


# ---------------------------------------------------------------- on air


def test_a_session_that_cannot_be_opened_is_tried_again_with_growing_pauses():
    """On a simulated clock; a server that drains ends it (EGR-2, 17.2)."""
    now, tries = [0.0], []

    async def slept(seconds):
        now[0] += seconds

    async def refused(who, wish):
        assert (who.owner, who.key, wish.endless, wish.metadata) == ("acme", "k", True, {"channel": "night"})
        tries.append(now[0])
        studio.draining = len(tries) == 8
        raise Capacity("full")

    studio = SimpleNamespace(draining=False, alive=True)
    channel = SimpleNamespace(id="1", name="night", owner="acme", key="k", avatar="default", mode="livestream", prompt="", webhook=None)
    desk = SimpleNamespace(studio=studio, settings=ServeConfig(), open=refused)
    store = SimpleNamespace(now=lambda _: channel, progress=lambda _: Progress())
    longest = SimpleNamespace(uniform=lambda low, high: high)
    desk.leases = lambda who: [SimpleNamespace(wish=SimpleNamespace(endless=endless)) for endless in kinds]
    crew = Crew(desk=desk, outputs=None, quotas=None, store=store, speak=None, webhooks=None, clock=lambda: now[0], sleep=slept, rng=longest)
    runner, kinds = Runner(crew, "1"), []
    asyncio.run(asyncio.wait_for(runner.run(), 5))
    assert [after - before - LOOK_SECONDS for before, after in zip(tries, tries[1:])] == [1, 2, 4, 8, 16, 30, 30]
    assert runner.troubles == {"session": "full"}
    runner.lease, kinds = object(), [True, False]  # of a server that drains: a conversation goes on, and so does the channel
    assert not runner._leaving
    kinds = [True, True]
    assert runner._leaving


def test_outputs_follow_what_is_wanted():
    """Refused: again after a while; another address, or another output: at once; what stays as it was is left alone."""
    now, told, main = [0.0], [], Wanted(kind="rtmp", name="main", url="rtmp://wrong/a")
    right, hls = Wanted(kind="rtmp", name="main", url="rtmp://right/a"), Wanted(kind="hls", name="web")
    wanted = {0.0: (main,), 40.0: (right,), 50.0: (right, hls), 60.0: (hls,)}

    async def slept(seconds):
        now[0] += seconds
        if now[0] > 70:
            raise asyncio.CancelledError

    async def start(lease, output):
        told.append((now[0], output.url or output.kind))
        if output is main:
            raise Unprocessable("no such host")
        return SimpleNamespace(task=SimpleNamespace(done=lambda: False), wanted=output)

    store = SimpleNamespace(now=lambda _: SimpleNamespace(outputs=wanted[max(at for at in wanted if at <= now[0])], webhook=None),
                            progress=lambda _: Progress())  # fmt: skip
    outputs = SimpleNamespace(start=start, stop=lambda lease, output: told.append((now[0], "stop", output.wanted.name)))
    desk = SimpleNamespace(settings=ServeConfig())
    crew = Crew(desk=desk, outputs=outputs, quotas=None, store=store, speak=None, webhooks=None, clock=lambda: now[0], sleep=slept)
    runner = Runner(crew, "1")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(runner._keep_outputs(None))
    assert told == [(0.0, "rtmp://wrong/a"), (30.0, "rtmp://wrong/a"), (40.0, "rtmp://right/a"), (50.0, "hls"), (60.0, "stop", "main")]
    assert runner.output("main") is None and runner.output("web").wanted == hls and not runner.troubles


async def voice(text):
    """Text to speech of a test."""
    yield tone(0.3), 16_000


async def turns(server, home: str, state: str = "on_air", **more) -> dict:
    """The channel, as soon as this is true of it."""
    async with asyncio.timeout(30):
        while True:
            seen = (await server.http.get(home)).json()
            if seen["state"] == state and all(seen[name] == value for name, value in more.items()):
                return seen
            await asyncio.sleep(0.05)


WISH = {"name": "night", "prompt": "a studio", "filler": {"prompts": ["a calm face"]},
        "outputs": [{"kind": "hls", "name": "web"}],
        "schedule": {"entries": [{"name": "one", "text": "hello"}, {"name": "two", "text": "hello", "prompt": "a garden"}],
                     "gap_seconds": 0.3}}  # fmt: skip


def test_a_channel_is_on_air_until_it_is_told_to_end(tmp_path):
    """It speaks what is due, moves in between, is switched on air, and comes back from a chain that died and a session that ended; its
    owner's own server is told (API-6)."""

    async def story():
        got: list = []
        hook, port = await receiver(got, [])
        async with running(changed(settings(tmp_path), outputs={"private": ("127.0.0.0/8",)}), speak=voice) as server:
            http, home, webhook = server.http, "/v1/channels/night", {"url": f"http://127.0.0.1:{port}/hook", "secret": SECRET}
            assert problem(await http.post("/v1/channels", json={**WISH, "webhook": {**webhook, "url": "http://10.0.0.1/"}})) == (403, "ssrf")
            made = await http.post("/v1/channels", json={**WISH, "webhook": webhook})
            assert made.json()["webhook"] == "http://127.0.0.1" and SECRET not in made.text
            assert made.status_code == 201 and made.headers["location"] == home and made.json()["state"] == "off"
            assert problem(await http.post(f"{home}:switch", json={"prompt": "x"})) == (409, "state")
            for _ in range(2):  # starting twice is no error
                assert (await http.post(f"{home}:start")).json()["state"] in ("waiting", "on_air")
            session = server.studio.sessions[(await turns(server, home))["session_id"]]
            assert await programme(session, 4) == ["a calm face", "a garden", "a calm face", "a studio", "a calm face", "a garden"]
            await no_lease(server, session)
            await switched(server, home, session)
            before = session.happenings.last
            server.studio.engine.chain.fail()
            async with asyncio.timeout(30):
                while server.studio.restarts < 1:
                    await asyncio.sleep(0.05)
            [_ async for _ in until(session.events(before), "speak.finished", 2)]
            assert session.id in server.studio.sessions  # the same one, over another chain
            await on_the_web(server, home, sessions=1)
            assert (await http.delete(f"/v1/sessions/{session.id}")).status_code == 204
            again = await on_the_web(server, home, sessions=2)
            assert again["session_id"] != session.id and again["last_error"] == "closed"
            off = (await http.post(f"{home}:stop")).json()
            assert (off["state"], off["session_id"], off["outputs"][0]["state"]) == ("off", None, "off")
            assert not server.studio.sessions and not server.at.desk.leases(ANYBODY)
            kept = (await http.patch(home, json={"outputs": [{"kind": "hls", "name": "web"}, {"kind": "record"}], "webhook": None})).json()
            assert ([output["name"] for output in kept["outputs"]], kept["webhook"]) == (["web", "record"], None)
            assert (await http.delete(home)).status_code == 204 and problem(await http.get(home)) == (404, "not_found")
            assert not list((tmp_path / "channels").iterdir())
            names = [line["name"] for line in (await http.get("/v1/audit?lines=50")).json()["lines"]]
            assert [name.removeprefix("channel.") for name in names if name.startswith("channel.")] == [
                "created", "started", "started", "switched", "stopped", "changed", "erased"]  # fmt: skip
        await hook.cleanup()
        told_of(got, session.id, again["session_id"])

    asyncio.run(story())


def told_of(got: list, first: str, second: str) -> None:
    """What the receiver of a channel's events got: signed, in order, of the channel and of both its sessions."""
    events = [json.loads(body) for _, body in got]
    assert [event["n"] for event in events] == list(range(1, len(events) + 1)) and {event["channel"] for event in events} == {"night"}
    assert all(headers["LiveAvatar-Signature"] == f"v1={signature(SECRET, headers['LiveAvatar-Timestamp'], body)}" for headers, body in got)
    assert [(e["type"], e["session"]) for e in events if e["type"].endswith("_air")] == [
        ("channel.on_air", first), ("channel.off_air", first), ("channel.on_air", second), ("channel.off_air", second)]  # fmt: skip
    kinds = {event["type"] for event in events}
    assert {"channel.entry", "channel.trouble", "speak.finished", "output.live", "session.updated"} <= kinds and "stats" not in kinds


async def programme(session, count: int) -> list[str]:
    """Prompts that were set until so many entries were heard; in between it rests as its schedule wants."""
    prompts, rested = [], set()
    async with asyncio.timeout(30):
        async for event in session.events():
            rested.add(session.broadcast.filler)
            if event.name == "session.updated":
                prompts.append(event.data["prompt"])
            if event.name == "speak.finished":
                assert event.data["position_ms"] == 300
                count -= 1
            if not count:
                assert "schedule" in rested  # the alert on dead air passes over it
                return prompts


async def no_lease(server, session) -> None:
    """Neither idle nor length ends it (API-2)."""
    desk, clock = server.at.desk, server.at.desk._clock
    desk._clock = lambda: clock() + 30 * 86_400
    await desk.tick()
    desk._clock = clock
    assert session.id in server.studio.sessions
    beat = await server.http.post(f"/v1/sessions/{session.id}/heartbeat")
    assert beat.json() == {"ends_at": None, "idle_ends_at": None}


async def switched(server, home: str, session) -> None:
    """Face, prompt and entry on air, in one session whose clock goes on; done once, however often it is asked."""
    ticks, asked = session._pacer.ticks, {"avatar_id": "trained_9", "prompt": "a night sky", "entry": "two", "cut": True}
    first, second = [await server.http.post(f"{home}:switch", json=asked, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert first.json() == second.json() and (first.json()["avatar_id"], first.json()["prompt"]) == ("trained_9", "a night sky")
    await turns(server, home, entry="two")
    assert session.role.avatar == "trained_9" and session.id in server.studio.sessions and session.epoch <= 1
    [_ async for _ in until(session.events(session.happenings.last), "speak.finished", 1)]
    assert session._pacer.ticks > ticks and not [event for event in session.happenings if event.name == "engine"]
    gone = await server.http.post(f"{home}:switch", json={"avatar_id": "nobody"})
    assert problem(gone) == (404, "not_found") and (await server.http.get(home)).json()["avatar_id"] == "trained_9"


async def on_the_web(server, home: str, **more) -> dict:
    """The channel, as soon as its playlist has pictures, at an address that does not know the session."""
    async with asyncio.timeout(30):
        while True:
            seen = await turns(server, home, **more)
            (web,) = seen["outputs"]
            if (web["name"], web["state"]) == ("web", "live") and web["links"]:
                playlist = await server.http.get(f"{home}/outputs/web/hls/index.m3u8")
                assert web["links"]["playlist"] == playlist.request.url.path
                sidecar = await server.http.get(f"{home}/outputs/web/hls/provenance.jws")  # 19.4
                if playlist.status_code == sidecar.status_code == 200 and "#EXTINF" in playlist.text:
                    assert sidecar.headers["content-type"] == "application/jose" and sidecar.text.count(".") == 2
                    return seen
            await asyncio.sleep(0.1)


def test_what_a_channel_may_be_and_whose_it_is(tmp_path):
    """Names are a tenant's own; what cannot be said, shown or sent is refused when it is asked for, and told when it happens later."""

    async def story():
        async with running(settings(tmp_path)) as server:
            http, acme = server.http, bearer(server.tenant("acme"))
            text = {"schedule": {"entries": [{"name": "x", "text": "hello"}]}}
            cases = [({"name": "Night"}, (422, "unprocessable")), ({"name": "n", **text}, (422, "voice")),
                     ({"name": "n", "avatar_id": "nobody"}, (404, "not_found")),
                     ({"name": "n", "schedule": {"entries": [{"name": "x", "sound": "0" * 32}]}}, (422, "unprocessable")),
                     ({"name": "n", "outputs": [{"kind": "hls"}, {"kind": "hls"}]}, (422, "unprocessable")),
                     ({"name": "n", "outputs": [{"kind": "rtmp", "url": "rtmp://10.0.0.1/live/my-secret"}]}, (403, "ssrf"))]  # fmt: skip
            for wish, expected in cases:
                answer = await http.post("/v1/channels", json=wish)
                assert problem(answer) == expected and "my-secret" not in answer.text, wish
            for headers in ({}, acme):  # the same name twice, in two houses
                once = {**headers, "Idempotency-Key": "k"}
                first, again = [await http.post("/v1/channels", json={"name": "night"}, headers=once) for _ in range(2)]
                assert first.status_code == 201 and again.headers["idempotent-replayed"] == "true"
                assert problem(await http.post("/v1/channels", json={"name": "night"}, headers=headers)) == (409, "state")
            assert problem(await http.get("/v1/channels/night?owner=operator", headers=acme)) == (404, "not_found")
            assert [one["owner"] for one in (await http.get("/v1/channels")).json()["channels"]] == ["acme", "operator"]  # an operator sees both
            assert len((await http.get("/v1/channels", headers=acme)).json()["channels"]) == 1
            sound = (await http.post("/v1/channels/night/sounds?rate=8000&owner=acme", content=tone(0.5, 8000).tobytes(), headers=PCM)).json()
            assert sound["seconds"] == 0.5
            entries = [{"name": "lost", "sound": sound["id"]}, {"name": "jingle", "sound": sound["id"]}]
            change = {"schedule": {"entries": entries, "loop": False}}
            changed = await http.patch("/v1/channels/night", json=change, headers=acme)
            assert changed.json()["sounds"] == [sound] and changed.json()["schedule"]["entries"][1]["sound"] == sound["id"]
            assert problem(await http.delete(f"/v1/channels/night/sounds/{sound['id']}", headers=acme)) == (422, "unprocessable")  # it is named
            (file,) = tmp_path.rglob("*.wav")
            file.rename(file.with_suffix(".away"))
            server.at.channels._crew.rng.uniform = lambda low, high: 1.0  # a pause after what cannot be said
            await http.post("/v1/channels/night:start", headers=acme)
            async with asyncio.timeout(30):
                while not (seen := (await http.get("/v1/channels/night", headers=acme)).json())["last_error"]:
                    await asyncio.sleep(0.05)
            assert seen["last_error"].startswith("lost: the sound cannot be read") and seen["state"] == "on_air"
            assert server.studio.sessions[seen["session_id"]].resting == "degraded"  # dead air, as the alert understands it
            file.with_suffix(".away").rename(file)
            session = server.studio.sessions[seen["session_id"]]
            (said,) = [event.data async for event in until(session.events(), "speak.finished", 1)]
            assert said["position_ms"] == 500
            assert problem(await http.patch("/v1/channels/night", json={"mode": "conversation"}, headers=acme)) == (409, "state")
            assert problem(await http.get(f"/v1/sessions/{session.id}", headers=bearer(server.tenant("other")))) == (404, "not_found")

    asyncio.run(story())


# ---------------------------------------------------------------- a server that dies


def served(folder: Path, *words: str) -> subprocess.Popen:
    """A process of its own: configs/serve_tiny.yaml with the test card."""
    overrides = [*words, "--engine", "testcard", "engine.runtime.sessions=4", "listen.port=0", f"storage.folder={folder}"]
    return subprocess.Popen([sys.executable, "-m", "liveavatar", "serve", str(ROOT / "configs" / "serve_tiny.yaml"), *overrides], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="ffprobe is missing: apt-get install ffmpeg")
def test_a_killed_server_is_replaced_by_one_that_stood_by(tmp_path):
    """kill -9 while another process stands by, warm and mute: the channel is on air there and goes on in its list (17.2, 17.6)."""
    first = second = None
    try:
        first = served(tmp_path)
        key, address = (first_word(first, start) for start in ("la_", "http://"))
        with httpx.Client(base_url=address, headers=bearer(key), timeout=30) as client:
            assert client.post("/v1/channels", json={"name": "night", "outputs": [{"kind": "record"}]}).status_code == 201
            sound = client.post("/v1/channels/night/sounds", content=tone(1.0).tobytes(), headers=PCM).json()["id"]
            schedule = {"entries": [{"name": f"part-{n}", "sound": sound} for n in range(50)], "loop": False}
            client.patch("/v1/channels/night", json={"schedule": schedule})
            client.post("/v1/channels/night:start")
            wait(lambda: client.get("/v1/channels/night").json()["entry"] == "part-2")
            assert client.get("/v1/channels/night").json()["outputs"][0]["state"] == "live"
            second = served(tmp_path, "--standby")
            assert first_word(second, "standing")
            assert client.get("/v1/channels/night").json()["state"] == "on_air" and second.poll() is None
        first.kill()
        first.wait()
        with httpx.Client(base_url=first_word(second, "http://"), headers=bearer(key), timeout=30) as client:
            wait(lambda: client.get("/v1/channels/night").json()["entry"] not in (None, "part-0", "part-1", "part-2"))
            wait(lambda: client.get("/v1/channels/night").json()["outputs"][0]["bytes"] > 0)
            second.send_signal(signal.SIGTERM)
            assert second.wait(30) == 0  # sessions.drain_seconds is 600: the entry is heard to its end, then the channel leaves
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()
    assert "Traceback" not in second.stdout.read()
    recordings = sorted((tmp_path / "recordings").glob("*.mp4"))
    assert len(recordings) == 2  # one that the kill tore and the second server finished, one that the second made
    for file in recordings:
        command = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_name,r_frame_rate", "-of", "compact", str(file)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        assert "codec_name=h264|r_frame_rate=25/1" in found and "codec_name=aac" in found
