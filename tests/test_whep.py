"""WHEP over HTTP: a browser's offer is answered, whatever else comes is told what was wrong, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import re
from pathlib import Path

import pytest

pytest.importorskip("aiortc", reason="WebRTC needs the extra: pip install 'liveavatar[serve]'")

import api_server
import httpx
from browser_kit import application
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from viewer_kit import Card, Peer, interrupted, playing, until

from liveavatar.core import ConfigError
from liveavatar.serving.ice import IceServers
from liveavatar.serving.offers import reachable, read_fragment, read_offer
from liveavatar.serving.problems import Forbidden, Invalid, NotFound, Problem, Unprocessable
from liveavatar.serving.settings import NetworkConfig, ServeConfig
from liveavatar.serving.whep import SDP_BYTES, Viewers, router

OFFER = (Path(__file__).parent / "golden" / "chromium_offer.sdp").read_bytes().decode()  # of Chromium 156, all gathered
URL = "/v1/sessions/card/whep"
SDP, FRAGMENT = {"Content-Type": "application/sdp"}, "application/trickle-ice-sdpfrag"
UFRAG = re.search("a=ice-ufrag:(.*)", OFFER)[1].strip()


@contextlib.asynccontextmanager
async def server(card=None, limit: int = 20, **sections):
    """A client of an application without sockets; gives (client, viewers)."""
    config = ServeConfig(**sections)
    viewers = Viewers(IceServers(config.network, now=lambda: 1000.0), limit)
    app = application(card or Card(), config, viewers)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client, viewers
        await viewers.close()


def run(body):
    """Nothing may fail in a task that nobody waits for."""
    lost = []

    async def watched():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
        await body()

    asyncio.run(watched())
    gc.collect(1)  # a task that failed says so when it goes
    assert not lost, lost


def test_the_offer_of_a_browser_is_answered_with_h264_alone():
    """7.1, 7.2: 201, Location, ETag, Link, an answer; the same as JSON; gone after DELETE."""

    async def body():
        network = NetworkConfig(stun=("stun:192.0.2.9:3478",))
        async with server(network=NetworkConfig()) as (client, viewers):
            made = await client.post(URL, content=OFFER, headers=SDP)
            assert made.status_code == 201 and made.headers["content-type"] == "application/sdp" and made.headers["etag"].startswith('"')
            assert "H264/90000" in made.text and not re.search("VP8|VP9|AV1", made.text) and "a=candidate" in made.text
            assert "127.0.0.1" not in made.text
            where = made.headers["location"]
            assert where.startswith(URL + "/") and len(viewers.of("card")) == 1
            assert (await client.delete(where)).status_code == 200
            again = await client.delete(where)
            assert again.status_code == 404 and again.json()["type"].endswith("/not_found") and viewers.all() == []
            page = await client.post(URL, json={"type": "offer", "sdp": OFFER})
            assert page.status_code == 201 and page.json()["type"] == "answer" and page.headers["location"].endswith(page.json()["viewer"])
            proofs = [set(re.findall("a=fingerprint:(.+)", sdp)) for sdp in (made.text, page.json()["sdp"])]
            assert all(proofs) and not proofs[0] & proofs[1], "a certificate of its own for each connection, none outlives it (18.6)"
        assert IceServers(network)("card") == [{"urls": ["stun:192.0.2.9:3478"]}]

    run(body)


def test_candidates_may_come_later():
    """Trickle: an offer without candidates, then PATCH; for another connection it is refused."""

    async def body():
        async with playing(Card()) as card, server(card) as (client, viewers):
            peer = Peer()
            offer = await peer.offer()
            lines = offer.splitlines()
            bare = "\r\n".join(line for line in lines if not line.startswith(("a=candidate", "a=end-of-candidates"))) + "\r\n"
            made = await client.post(URL, content=bare, headers=SDP)
            where, tag = made.headers["location"], {"If-Match": made.headers["etag"], "Content-Type": FRAGMENT}
            late = next(line for line in lines if line.startswith("a=ice-ufrag")) + "\r\na=mid:0\r\n"
            late += "".join(line + "\r\n" for line in dict.fromkeys(lines) if line.startswith("a=candidate"))
            assert (await client.patch(where, content=late, headers={"Content-Type": FRAGMENT})).status_code == 428
            assert (await client.patch(where, content=late, headers={**tag, "If-Match": '"other"'})).status_code == 412
            assert (await client.patch(where, content=late, headers={**tag, **SDP})).status_code == 415
            assert (await client.patch(where, content=late.replace("ufrag:", "ufrag:new"), headers=tag)).status_code == 422
            await asyncio.sleep(0.3)
            assert viewers.all()[0].state == "new", "nobody knows where the peer is"
            assert (await client.patch(where, content=late, headers=tag)).status_code == 204
            assert (await client.patch(where, content=late + "a=end-of-candidates\r\n", headers=tag)).status_code == 204
            await peer.accept(made.text)
            await until(lambda: peer.pictures)
            assert (await client.patch(where, content=late * 65, headers=tag)).status_code in (400, 422)
            await peer.close()
            await until(lambda: viewers.all() == [], 10)  # it said goodbye: the viewer is gone at once

    run(body)


def test_what_is_wrong_is_said():
    """API-4."""
    cases = [
        (415, {"content": OFFER}),
        (415, {"content": OFFER, "headers": {"Content-Type": "text/plain"}}),
        (413, {"content": OFFER + "a=x\r\n" * (SDP_BYTES // 5), "headers": SDP}),
        (400, {"content": b"\xff\xfe", "headers": SDP}),
        (400, {"content": "", "headers": SDP}),
        (400, {"content": "v=0\r\n" + "a=x\r\n" * 1001, "headers": SDP}),
        (400, {"json": {"type": "answer", "sdp": OFFER}}),
        (400, {"json": [OFFER]}),
        (400, {"content": "{", "headers": {"Content-Type": "application/json"}}),
        (422, {"content": "v=0\r\n", "headers": SDP}),
        (422, {"content": re.sub("H264/", "H265/", OFFER), "headers": SDP}),
        (422, {"content": OFFER.replace("a=recvonly", "a=inactive"), "headers": SDP}),
        (422, {"content": OFFER.replace("a=setup:actpass", "a=x"), "headers": SDP}),
        (422, {"content": OFFER.replace("sha-256", "md5"), "headers": SDP}),
        (422, {"content": OFFER.replace("BUNDLE 0 1 2", "BUNDLE 0 1"), "headers": SDP}),
        (422, {"content": OFFER.replace("a=rtcp-mux\r\n", ""), "headers": SDP}),
        (422, {"content": OFFER.replace("a=ice-pwd:", "a=x:"), "headers": SDP}),
        (400, {"content": OFFER.replace("192.0.2.2 58897", "192.0.2.2 port"), "headers": SDP}),
    ]

    async def body():
        async with server() as (client, viewers):
            for status, request in cases:
                said = await client.post(URL, **request)
                assert said.status_code == status, (status, said.text, str(request)[:80])
                assert said.headers["content-type"] == "application/problem+json" and said.json()["status"] == status and "Traceback" not in said.text
            assert viewers.all() == []

    run(body)


def test_a_session_has_so_many_viewers_and_no_more():
    """API-3: those on the way count, so a burst of offers does not slip through."""

    async def body():
        async with server(limit=2) as (client, viewers):
            made = await asyncio.gather(*(client.post(URL, content=OFFER, headers=SDP) for _ in range(5)))
            assert sorted(r.status_code for r in made) == [201, 201, 429, 429, 429]
            assert next(r for r in made if r.status_code == 429).json()["type"].endswith("/quota")
            await client.delete(next(r for r in made if r.status_code == 201).headers["location"])
            assert (await client.post(URL, content=OFFER, headers=SDP)).status_code == 201

    run(body)


def test_who_may_look_may_not_speak():
    """API-5: an offer that sends sound needs the scope publish; every route asks."""
    asked, sessions = [], {"card": Card()}

    async def authorise(request, session_id, scope):
        asked.append((request.method, session_id, scope))
        if scope == "publish":
            raise Forbidden("publish")

    def lookup(name):
        if name not in sessions:
            raise NotFound("no such session")
        return sessions[name]

    async def body():
        app = FastAPI()
        app.include_router(router(lookup, authorise, Viewers(IceServers(NetworkConfig()), 20)))
        app.exception_handler(Problem)(lambda request, error: JSONResponse(error.body("test"), error.status))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/v1/sessions/other/whep", content=OFFER, headers=SDP)).status_code == 404
            made = await client.post(URL, content=OFFER, headers=SDP)
            head, tail = OFFER.split("m=audio")
            assert (await client.post(URL, content=f"{head}m=audio{tail.replace('a=recvonly', 'a=sendrecv')}", headers=SDP)).status_code == 403
            await client.delete(made.headers["location"])
            await client.get("/v1/ice-servers")
        assert asked == [("POST", "other", "view"), ("POST", "card", "view"), ("POST", "card", "view"), ("POST", "card", "publish"),
                         ("DELETE", "card", "view"), ("GET", None, "view")]  # fmt: skip

    run(body)


def test_what_may_be_sent_is_said():
    async def body():
        async with server() as (client, _):
            said = await client.options(URL)
            assert said.status_code == 204 and said.headers["accept-post"].startswith("application/sdp") and said.headers["accept-patch"] == FRAGMENT

    run(body)


def test_turn_credentials_are_those_of_coturn(tmp_path):
    """NET-1; the credential is of `printf 1600:card | openssl dgst -sha1 -hmac north-north-west -binary | base64`."""
    secret = tmp_path / "secret"
    secret.write_text("north-north-west\n")
    network = NetworkConfig(stun=("stun:s.example",), turn=("turn:t.example:3478?transport=udp",), turn_secret_file=str(secret), turn_seconds=600)
    assert IceServers(network, now=lambda: 1000.5)("card")[1] == {
        "urls": ["turn:t.example:3478?transport=udp"], "username": "1600:card", "credential": "ttuFefJCwZNjvRr0MYsCiwHqqb8="}  # fmt: skip

    async def body():
        config = ServeConfig(network=network)
        app = application(Card(), config, Viewers(IceServers(config.network, now=lambda: 1000.0), 20))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            got = await client.get("/v1/ice-servers")
            assert got.headers["cache-control"] == "no-store" and got.json()["ttl"] == 600 and got.json()["iceTransportPolicy"] == "all"
            assert got.json()["iceServers"][1]["username"] == "1600:page" and "north" not in got.text

    run(body)
    secret.write_text("short")
    for wrong in (network, NetworkConfig(turn=network.turn, turn_secret_file=str(tmp_path / "none")), NetworkConfig(relay_only=True)):
        with pytest.raises(ConfigError, match="network"):
            IceServers(wrong)


def test_we_send_checks_to_peers_not_to_ourselves():
    """18.6: a stranger's candidate is an address our server sends to."""
    good, bad = ("192.0.2.2", "10.0.0.7", "8.8.8.8", "fd00::2", "2001:4860::1"), (
        "127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "a1b2.local", "example.com", "")  # fmt: skip
    assert all(map(reachable, good)) and not any(map(reachable, bad))
    offer = read_offer(OFFER.replace("192.0.2.2 58897", "127.0.0.1 58897"))
    assert "127.0.0.1 58897" not in offer.text and "fd00::2" in offer.text and " tcp " not in offer.text
    assert offer.wants == {"h264", "opus"} and not offer.speaks and offer.ufrag == UFRAG and offer.mid == "0"


def test_a_viewer_of_a_whole_server_hears_speech_then_silence_then_the_end(tmp_path):
    """BRG-1 at the viewer: 250 ms on an idle machine. When the session ends, its viewers are told, not left."""

    async def body():
        async with api_server.running(api_server.settings(tmp_path)) as server:
            name = await server.opened()
            peer = Peer()
            made = await server.http.post(f"/v1/sessions/{name}/whep", content=await peer.offer(), headers=SDP)
            assert made.status_code == 201, made.text
            await peer.accept(made.text)
            await until(lambda: peer.pictures and peer.sound)
            assert not peer.loud()
            silence, said = await interrupted(server.http, server.studio.sessions[name], peer)
            assert 300 < said["position_ms"] < 6000, said
            assert silence < 0.8, silence
            assert (await server.http.delete(f"/v1/sessions/{name}")).status_code in (200, 204)
            await until(lambda: peer.channel.readyState == "closed" and server.at.viewers.all() == [])
            await peer.close()

    run(body)


LINES = OFFER.splitlines()
edits = st.lists(st.tuples(st.sampled_from(["drop", "double", "swap", "cut", "put", "digits", "swallow"]), st.integers(0, len(LINES) - 1),
                           st.integers(0, 200), st.text(max_size=12)), min_size=1, max_size=6)  # fmt: skip


def edited(changes) -> str:
    lines = list(LINES)
    for kind, at, place, text in changes:
        at = min(at, len(lines) - 1)
        line = lines[at]
        lines[at : at + 1] = {"drop": [], "double": [line, line], "swap": [lines[place % len(lines)]], "cut": [line[: place % (len(line) + 1)]],
                              "put": [line[: place % (len(line) + 1)] + text + line[place % (len(line) + 1) :]],
                              "digits": [re.sub("[0-9]+", str(place * 7919**3 - 5), line)], "swallow": [line.split(":")[0]]}[kind]  # fmt: skip
        lines = lines or [""]
    return "\r\n".join(lines) + "\r\n"


@functools.cache
def attacked() -> tuple[FastAPI, Viewers]:
    """Nothing of it belongs to a loop, so all examples go to one."""
    viewers = Viewers(IceServers(NetworkConfig()), 20)
    return application(Card(), ServeConfig(), viewers), viewers


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(edits.map(edited), st.text(max_size=300), st.text(max_size=100).map(lambda t: "v=0\r\n" + t)))
def test_any_sdp_is_answered_or_refused(text):
    """Section 18.10: never a crash, neither in the request nor in a task behind it."""

    async def body():
        app, viewers = attacked()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            said = await client.post(URL, content=text.encode(errors="surrogatepass"), headers=SDP)
            assert said.status_code in (201, 400, 422), said.text
            assert len(viewers.all()) == (said.status_code == 201)
            if said.status_code == 201:
                await asyncio.sleep(0.01)  # the checks begin
            await viewers.close()

    run(body)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.text(max_size=60).map(lambda t: f"a=ice-ufrag:{UFRAG}\r\na=mid:0\r\na=candidate:1 1 udp 1 {t}\r\n"))
def test_any_fragment_is_read_or_refused(text):
    with contextlib.suppress(Invalid, Unprocessable):
        assert all(reachable(c.ip) for c in read_fragment(text).candidates)


def test_a_candidate_of_a_fragment_belongs_to_its_section():
    fragment = read_fragment(f"a=ice-ufrag:{UFRAG}\r\nm=audio 9 RTP/AVP 0\r\na=mid:1\r\na=candidate:1 1 udp 5 192.0.2.7 99 typ host\r\n"
                             "a=candidate:1 2 udp 5 192.0.2.7 98 typ host\r\na=end-of-candidates\r\n")  # fmt: skip
    assert [(c.ip, c.port, c.sdpMid) for c in fragment.candidates] == [("192.0.2.7", 99, "1")]
