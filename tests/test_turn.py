"""Picture and sound through a real coturn, relayed on both sides, with credentials made from its secret (NET-1, section 22)."""

from __future__ import annotations

import asyncio
import secrets
import shutil

import pytest

pytest.importorskip("aiortc", reason="WebRTC needs the extra: pip install 'liveavatar[serve]'")
if shutil.which("turnserver") is None:
    pytest.skip("coturn is not installed (apt install coturn)", allow_module_level=True)

from aiortc import RTCIceTransportPolicy
from viewer_kit import Card, Peer, coturn, free_port, own_address, playing, until

from liveavatar.serving.ice import IceServers
from liveavatar.serving.offers import read_offer
from liveavatar.serving.problems import Capacity
from liveavatar.serving.settings import NetworkConfig
from liveavatar.serving.webrtc import Viewer

HOST = own_address()
pytestmark = pytest.mark.skipif(HOST is None, reason="this machine has no address but loopback, where we send no checks")


def servers(folder, secret: str, url: str) -> list[dict]:
    path = folder / f"secret{len(list(folder.iterdir()))}"
    path.write_text(secret)
    return IceServers(NetworkConfig(turn=(url,), turn_secret_file=str(path), relay_only=True))("session")


def test_both_sides_meet_at_the_relay_and_only_with_its_secret(tmp_path):
    secret = secrets.token_hex(16)

    async def body():
        async with coturn(tmp_path, HOST, secret) as url, playing(Card()) as card:
            ice = servers(tmp_path, secret, url)
            peer, viewer = Peer(servers=ice, policy=RTCIceTransportPolicy.RELAY), Viewer(card, ice=ice, relay_only=True)
            answer = await viewer.answer(read_offer(await peer.offer()))
            candidates = [line for line in answer.splitlines() if line.startswith("a=candidate")]
            assert candidates and all("typ relay" in line for line in candidates)
            await peer.accept(answer)
            await until(lambda: peer.pictures and peer.sound)
            await asyncio.gather(viewer.aclose(), peer.close())

            stranger = Viewer(card, ice=servers(tmp_path, secrets.token_hex(16), url), relay_only=True)
            with pytest.raises(Capacity, match="TURN"):
                await stranger.answer(read_offer(await Peer().offer()))
            assert stranger.state == "closed"

    asyncio.run(body())


def test_a_turn_server_that_is_down_is_said_and_other_ways_are_taken(tmp_path):
    """17.6. Relay only: 503. Else the answer has our own addresses."""
    ice = servers(tmp_path, secrets.token_hex(16), f"turn:{HOST}:{free_port(HOST)}?transport=tcp")

    async def body():
        async with playing(Card()) as card:
            only, also = Viewer(card, ice=ice, relay_only=True), Viewer(card, ice=ice)
            peer = Peer()
            offer = read_offer(await peer.offer())
            with pytest.raises(Capacity):
                await only.answer(offer)
            await peer.accept(await also.answer(offer))
            await until(lambda: peer.pictures)
            await asyncio.gather(also.aclose(), peer.close())

    asyncio.run(body())
