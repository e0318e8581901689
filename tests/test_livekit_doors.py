"""Ways into a LiveKit room: the HTTP endpoints of serving.md 10.4 on the real application, our plugin and an AgentSession,
the plugins of others where they are installed, an avatar in the agent's own process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("livekit.agents", reason="needs livekit-agents: pip install 'liveavatar[livekit]'")
sys.path.insert(0, str(Path(__file__).parent.parent / "plugins/livekit-plugins-liveavatar"))

import livekit_sfu
from api_server import bearer, on_port, portrait, settings
from livekit import api, rtc
from livekit.agents import Agent as Talker
from livekit.agents import AgentSession
from livekit.agents.job import _JobContextVar
from livekit.agents.utils import http_context
from livekit.plugins import liveavatar as plugin
from livekit_people import FACE, Agent, Viewer, avatar_token, frames, run, studio, token, tone, until

from liveavatar.serving import livekit_compat
from liveavatar.serving.problems import NotInstalled
from liveavatar.serving.role import Role
from liveavatar.serving.settings import OutputsConfig

LOOPBACK = OutputsConfig(private=("127.0.0.0/8",))


@pytest.fixture(scope="module")
def sfu():
    """Address of an SFU in a process of its own."""
    with livekit_sfu.running() as url:
        yield url


@contextlib.asynccontextmanager
async def serving(folder, outputs: OutputsConfig = LOOPBACK, **limits):
    """The whole application on a port, which has our routes: (Running, "http://127.0.0.1:PORT")."""
    async with on_port(settings(folder, outputs=outputs, **limits)) as (server, address):
        yield server, f"http://{address}"


def wish(sfu: str, room: str, **more) -> dict:
    return {"avatar_id": "default", "livekit_url": sfu, "livekit_token": avatar_token(room), **more}


def bithuman(sfu: str, room: str, **more) -> dict:
    return {"livekit_url": sfu, "livekit_token": avatar_token(room), "room_name": room, **more}


def test_every_door_leads_into_the_room(sfu, tmp_path):
    """10.4: our own, both forms of bey, bithuman with an id and with a picture; each frees its slot when the agent leaves."""

    async def scene():
        async with serving(tmp_path) as (server, _):
            doors = [
                ("/v1/livekit/join", {"json": wish(sfu, "d0")}),
                ("/v1/session", {"json": wish(sfu, "d1", region="eu"), "headers": {"Authorization": "", "x-api-key": server.key}}),
                ("/v1/compat/bey/v1/sessions", {"json": {"transport": "livekit", "avatar_id": "default", "url": sfu, "token": avatar_token("d2")}}),
                ("/v1/compat/bithuman", {"data": bithuman(sfu, "d3", avatar_id="default", model="expression")}),
                ("/v1/compat/bithuman?synthetic=true", {"data": bithuman(sfu, "d4"), "files": {"avatar_image": ("avatar.jpg", portrait("JPEG"))}}),
            ]  # fmt: skip
            for number, (path, request) in enumerate(doors):
                agent = await Agent().enter(sfu, f"d{number}")
                answer = await server.http.post(path, **request)
                assert answer.status_code == 201, (path, answer.text)
                assert answer.json()["session_id"] in server.studio.sessions
                await agent.say(0.2)
                assert (await agent.output.wait_for_playout()).playback_position == pytest.approx(0.2, abs=0.005)
                await agent.room.disconnect()
                await until(lambda: not server.studio.sessions)

    run(scene())


def test_doors_refuse_before_anything_is_opened(sfu, tmp_path):
    """18.2, 18.4: keys, scopes, tokens, addresses, consent; nothing is left of what failed."""

    async def scene():
        async with serving(tmp_path) as (server, _):

            async def asked(status: int, kind: str, path: str = "/v1/livekit/join", **request) -> None:
                answer = await server.http.post(path, **request)
                assert answer.status_code == status and answer.json()["type"].endswith("/" + kind), answer.text
                assert not server.studio.sessions

            await asked(401, "key", json=wish(sfu, "x"), headers=bearer("la_000000000000_" + "x" * 43))
            await asked(403, "scope", json=wish(sfu, "x"), headers=bearer(server.tenant("viewers", ("view",))))
            await asked(404, "not_found", json=wish(sfu, "x", avatar_id="b9be11b8-89fb-4227-8f86-4a881393cbdb"))
            await asked(400, "invalid", json=wish(sfu, "x", livekit_token="none"))
            await asked(400, "invalid", json=wish(sfu, "x", livekit_token=token("avatar", "x")))  # on whose behalf?
            await asked(403, "ssrf", json=wish(sfu, "x", livekit_url="ftp://127.0.0.1/"))
            await asked(403, "ssrf", json=wish(sfu, "x", livekit_url="ws://169.254.169.254/"))
            await asked(502, "join", json=wish(sfu, "x", livekit_url="ws://127.0.0.1:9"))
            await asked(400, "invalid", "/v1/compat/bithuman", data=bithuman(sfu, "x", room_name="y"))
            await asked(400, "invalid", "/v1/compat/bithuman", data=bithuman(sfu, "x"))
            await asked(403, "ssrf", "/v1/compat/bithuman", data=bithuman(sfu, "x", avatar_image_url="http://10.0.0.1/face.png"))
            server.studio.capacity = 0
            await asked(503, "capacity", json=wish(sfu, "x"))
            await asked(403, "consent_required", "/v1/compat/bithuman", data=bithuman(sfu, "x"), files={"avatar_image": ("a.jpg", portrait("JPEG"))})

    run(scene())


def test_without_livekit_the_doors_say_what_to_install(monkeypatch):
    for name in ("livekit_video", "livekit_worker"):
        monkeypatch.delitem(sys.modules, f"liveavatar.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "livekit", None)
    with pytest.raises(NotInstalled, match=r"pip install 'liveavatar\[livekit\]'"):
        run(livekit_compat._worker_module())


# ---------------------------------------------------------------- an AgentSession of livekit-agents


@contextlib.asynccontextmanager
async def job(sfu: str, identity: str):
    """What plugins ask of a job of livekit-agents: the agent's identity, LiveKit's API, an HTTP session."""
    async with api.LiveKitAPI(sfu.replace("ws", "http", 1), livekit_sfu.KEY, livekit_sfu.SECRET) as client:
        context = SimpleNamespace(local_participant_identity=identity, api=client, add_shutdown_callback=lambda callback: None,
                                  proc=SimpleNamespace(http_proxy=None))  # fmt: skip
        mark = _JobContextVar.set(context)
        try:
            async with http_context.open():
                yield
        finally:
            _JobContextVar.reset(mark)


async def voice(seconds: float):
    """Speech that was made elsewhere, for AgentSession.say(audio=...)."""
    for frame in frames(tone(seconds, 24_000), 24_000):
        yield frame


async def conversation(sfu: str, room: rtc.Room, viewer: Viewer, avatar, **where) -> dict:
    """Two utterances of a real AgentSession through an avatar, the second interrupted. Returns what there is to know."""
    cannot_pause = {"interruption": {"resume_false_interruption": False}}  # rule 8
    talk, metrics, loop = AgentSession(turn_handling=cannot_pause), [], asyncio.get_running_loop()
    avatar.on("metrics_collected", metrics.append)
    await talk.start(Talker(instructions=""))
    async with job(sfu, "agent"):
        await avatar.start(talk, room, **where)
        await avatar.wait_for_join(timeout=10)
    began = loop.time()
    await asyncio.wait_for(talk.say("two seconds", audio=voice(2.0)).wait_for_playout(), 8)
    whole = loop.time() - began
    speech = talk.say("never heard to its end", audio=voice(5.0))
    since = viewer.sounds[-1][0]
    await until(lambda: len(viewer.loud(since)) > 60)
    speech.interrupt()
    asked = loop.time()
    await asyncio.wait_for(speech.wait_for_playout(), 2)
    known = {"seconds": whole, "stopped": loop.time() - asked, "metrics": metrics, "identity": avatar.avatar_identity,
             "interrupted": [item for item in talk.history.items if item.type == "message"][-1].interrupted}  # fmt: skip
    await talk.aclose()
    async with job(sfu, "agent"):
        await avatar.aclose()
    return known


LIVEKIT = {"livekit_api_key": livekit_sfu.KEY, "livekit_api_secret": livekit_sfu.SECRET}


def test_an_agent_session_speaks_through_the_plugin(sfu, tmp_path):
    """10.3 as a whole: 2.0 s of speech take 2.0 s, an interruption returns at once, metrics; aclose() removes the avatar, which frees the session."""

    async def scene():
        async with serving(tmp_path) as (server, url):
            room, viewer = rtc.Room(), await Viewer().enter(sfu, "plugin")
            await room.connect(sfu, token("agent", "plugin", "agent"))
            avatar = plugin.AvatarSession(api_url=url, api_key=server.key)
            known = await conversation(sfu, room, viewer, avatar, livekit_url=sfu, **LIVEKIT)
            await until(lambda: not server.studio.sessions)
            assert avatar.session_id and known["identity"] == "liveavatar-avatar"
            await asyncio.gather(room.disconnect(), viewer.room.disconnect())
            return known

    known = run(scene())
    latencies = [m.playback_latency for m in known["metrics"] if m.playback_latency is not None]
    print(f"2.0 s of speech took {known['seconds']:.2f} s; playback latency {latencies}")
    assert 1.95 < known["seconds"] < 3.0 and known["interrupted"] and known["metrics"][0].metadata.model_provider == "liveavatar"


def test_an_avatar_in_the_agents_own_process(sfu):
    """10.3, in-process mode: QueueAudioOutput between the agent and the runner, the tracks are the agent's."""

    async def scene():
        async with studio() as place:
            room, viewer = rtc.Room(), await Viewer().enter(sfu, "local")
            await room.connect(sfu, token("agent", "local", "agent"))
            avatar = plugin.LocalAvatarSession(place, Role(avatar="a", picture=FACE))
            known = await conversation(sfu, room, viewer, avatar)
            assert not place.sessions and known["identity"] == "agent" and "avatar_video" in viewer.tracks
            await asyncio.gather(room.disconnect(), viewer.room.disconnect())
            return known

    known = run(scene())
    assert 1.95 < known["seconds"] < 3.0 and known["interrupted"]


def test_the_plugin_says_what_it_lacks(monkeypatch):
    for name in ("LIVEAVATAR_URL", "LIVEAVATAR_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(plugin.LiveAvatarException, match="LIVEAVATAR_URL"):
        plugin.AvatarSession()
    with pytest.raises(plugin.LiveAvatarException, match="LIVEAVATAR_API_KEY"):
        plugin.AvatarSession(api_url="http://localhost")


@pytest.mark.parametrize("name", ["bey", "bithuman"])
def test_plugins_of_others_find_their_way(sfu, tmp_path, name):
    """10.4 with their own code, where it is installed."""
    module = pytest.importorskip(f"livekit.plugins.{name}", reason=f"livekit-plugins-{name} is not installed")

    async def scene():
        async with serving(tmp_path) as (server, url):
            room, viewer = rtc.Room(), await Viewer().enter(sfu, name)
            await room.connect(sfu, token("agent", name, "agent"))
            if name == "bey":
                avatar = module.AvatarSession(avatar_id="default", api_url=f"{url}/v1/compat/bey", api_key=server.key)
            else:
                avatar = module.AvatarSession(avatar_id="default", api_url=f"{url}/v1/compat/bithuman", api_token=server.key, api_secret="unused",
                                              model="expression")  # fmt: skip
            known = await conversation(sfu, room, viewer, avatar, livekit_url=sfu, **LIVEKIT)
            await until(lambda: not server.studio.sessions)
            await asyncio.gather(room.disconnect(), viewer.room.disconnect())
            return known

    assert run(scene())["interrupted"]
