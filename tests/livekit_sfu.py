"""A LiveKit server for tests: the real signalling protocol and real media, for real `livekit.rtc.Room` clients on loopback.

No package ships livekit-server, so this is a small SFU of our own (serving.md 22): WebSocket /rtc with the protobufs of
livekit-protocol, two peer connections per client (aiortc), relay of tracks without re-encoding, of data packets (streams,
RPC), attributes, and RemoveParticipant of the room service. It has no simulcast, dynacast, migration or encryption.

As a program (`python livekit_sfu.py KEY SECRET`) it prints its port and serves until its stdin closes; `running()` starts
that process, so that the media of a test does not share an interpreter with what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import av
import jwt
from aiohttp import WSMsgType, web
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.sdp import candidate_from_sdp
from livekit.protocol import models, room, rtc

KEY, SECRET = "devkey", "a-secret-of-the-test-room-that-is-long-enough"
SUBSCRIBER_CHANNELS = {"_reliable": {"ordered": True}, "_lossy": {"ordered": False, "maxRetransmits": 0}}
KINDS = {"agent": models.ParticipantInfo.AGENT, "standard": models.ParticipantInfo.STANDARD}
TWIRP = "/twirp/livekit.RoomService/"


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The ws:// address of an SFU in a process of its own, which ends with the block."""
    process = subprocess.Popen([sys.executable, __file__, KEY, SECRET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield f"ws://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Relayed(MediaStreamTrack):
    """The encoded frames of a publication on their way to one subscriber. Holds at most a second; the oldest goes."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self._packets = kind, asyncio.Queue(50)

    def put(self, packet: av.Packet) -> None:
        if self._packets.full():
            self._packets.get_nowait()
        self._packets.put_nowait(packet)

    async def recv(self) -> av.Packet:
        return await self._packets.get()


class Publication:
    """One published track: takes the RTP of its receiver apart into encoded frames and hands them to every subscriber."""

    def __init__(self, info: models.TrackInfo):
        self.info, self.receiver, self.outlets = info, None, {}  # outlets: subscriber's identity -> Relayed
        self._ssrc, self._frame = 0, b""

    def attach(self, receiver, track: MediaStreamTrack) -> None:
        """Tap aiortc's receiver (a private hook, hence the pinned version); what it decodes is thrown away."""
        self.receiver, arrived = receiver, receiver._handle_rtp_packet

        async def tapped(packet, arrival_time_ms: int) -> None:
            await arrived(packet, arrival_time_ms)
            if packet._data:  # none: padding, a retransmission, another payload type
                self._relay(packet)

        receiver._handle_rtp_packet = tapped
        asyncio.ensure_future(_discard(track))

    def _relay(self, packet) -> None:
        self._ssrc, self._frame = packet.ssrc, self._frame + packet._data
        video = self.info.type == models.VIDEO
        if video and not packet.marker:
            return
        for outlet in self.outlets.values():
            frame = av.Packet(self._frame)
            frame.pts = frame.dts = packet.timestamp
            frame.time_base = Fraction(1, 90_000 if video else 48_000)
            outlet.put(frame)
        self._frame = b""

    def ask_keyframe(self) -> None:
        if self.receiver is not None and self._ssrc:
            asyncio.ensure_future(self.receiver._send_rtcp_pli(self._ssrc))


async def _discard(track: MediaStreamTrack) -> None:
    with contextlib.suppress(Exception):  # MediaStreamError when the publisher leaves
        while True:
            await track.recv()


@dataclass(eq=False)
class Peer:
    """A client in a room: its signalling socket, its two peer connections, what it published."""

    socket: web.WebSocketResponse
    info: models.ParticipantInfo
    auto_subscribe: bool
    publisher: RTCPeerConnection = field(default_factory=lambda: RTCPeerConnection(RTCConfiguration([])))
    subscriber: RTCPeerConnection = field(default_factory=lambda: RTCPeerConnection(RTCConfiguration([])))
    announced: dict[str, Publication] = field(default_factory=dict)  # client's id of the track -> what it will be
    channels: dict = field(default_factory=dict)  # label -> data channel towards the client
    negotiating: asyncio.Lock = field(default_factory=asyncio.Lock)
    answered: asyncio.Future | None = None

    async def send(self, **message) -> None:
        if not self.socket.closed:
            with contextlib.suppress(ConnectionError):
                await self.socket.send_bytes(rtc.SignalResponse(**message).SerializeToString())

    async def offer(self) -> None:
        """One round of negotiation of the subscriber connection, never two at a time."""
        async with self.negotiating:
            self.answered = asyncio.get_running_loop().create_future()
            await self.subscriber.setLocalDescription(await self.subscriber.createOffer())
            local = self.subscriber.localDescription
            await self.send(offer=rtc.SessionDescription(type=local.type, sdp=local.sdp))
            await self.subscriber.setRemoteDescription(await self.answered)

    async def close(self) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.cancel()
        await asyncio.gather(self.publisher.close(), self.subscriber.close(), self.socket.close())


class Room:
    """Everybody in it, and what they send one another."""

    def __init__(self, name: str, sids: Iterator[int]):
        self.info, self.peers, self._sids = models.Room(sid=f"RM_{name}", name=name), {}, sids

    async def enter(self, peer: Peer) -> None:
        others = [p.info for p in self.peers.values()]
        self.peers[peer.info.identity] = peer
        peer.publisher.on("track", lambda track: self._on_track(peer, track))
        peer.publisher.on("datachannel", lambda channel: channel.on("message", lambda data: self._on_data(peer, channel.label, data)))
        await peer.send(join=rtc.JoinResponse(
            room=self.info, participant=peer.info, other_participants=others, server_version="1.9.0", ping_timeout=60, ping_interval=20,
            server_info=models.ServerInfo(version="1.9.0", protocol=15), subscriber_primary=True,
            enabled_publish_codecs=[models.Codec(mime="video/VP8"), models.Codec(mime="audio/opus")],
        ))  # fmt: skip
        await self._announce(peer)
        peer.channels = {label: peer.subscriber.createDataChannel(label, **how) for label, how in SUBSCRIBER_CHANNELS.items()}
        asyncio.ensure_future(self._first_offer(peer))

    async def _first_offer(self, peer: Peer) -> None:
        await peer.offer()
        for other in list(self.peers.values()):
            for publication in list(other.announced.values()):
                if other is not peer and peer.auto_subscribe and publication.receiver is not None:
                    await self._subscribe(peer, other, publication)

    async def leave(self, peer: Peer, reason=models.CLIENT_INITIATED) -> None:
        if self.peers.get(peer.info.identity) is peer:
            del self.peers[peer.info.identity]
            peer.info.state, peer.info.disconnect_reason = models.ParticipantInfo.DISCONNECTED, reason
            await self._announce(peer)
        for other in self.peers.values():
            for publication in other.announced.values():
                publication.outlets.pop(peer.info.identity, None)
        await peer.close()

    async def remove(self, identity: str) -> bool:
        peer = self.peers.get(identity)
        if peer is None:
            return False
        reason = models.PARTICIPANT_REMOVED
        await peer.send(leave=rtc.LeaveRequest(reason=reason, action=rtc.LeaveRequest.DISCONNECT))
        await self.leave(peer, reason)
        return True

    async def _announce(self, peer: Peer) -> None:
        peer.info.version += 1
        update = rtc.ParticipantUpdate(participants=[peer.info])
        await asyncio.gather(*(p.send(update=update) for p in self.peers.values()))

    # -- what a client says ---------------------------------------------------------------------------------------

    async def on_request(self, peer: Peer, request: rtc.SignalRequest) -> bool:
        """Answer one signalling message; False: the client leaves."""
        kind = request.WhichOneof("message")
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            await handler(peer, getattr(request, kind))
        return kind != "leave"

    async def _on_offer(self, peer: Peer, offer: rtc.SessionDescription) -> None:
        sdp = offer.sdp.replace("a=msid-semantic: WMS\r\n", "a=msid-semantic: WMS *\r\n")  # else aiortc forgets the tracks' ids
        await peer.publisher.setRemoteDescription(RTCSessionDescription(sdp, offer.type))
        await peer.publisher.setLocalDescription(await peer.publisher.createAnswer())
        local = peer.publisher.localDescription
        await peer.send(answer=rtc.SessionDescription(type=local.type, sdp=local.sdp, id=offer.id))

    async def _on_answer(self, peer: Peer, answer: rtc.SessionDescription) -> None:
        if peer.answered is not None and not peer.answered.done():
            peer.answered.set_result(RTCSessionDescription(answer.sdp, answer.type))

    async def _on_trickle(self, peer: Peer, trickle: rtc.TrickleRequest) -> None:
        said = json.loads(trickle.candidateInit or "{}")
        if not said.get("candidate"):
            return
        candidate = candidate_from_sdp(said["candidate"].split(":", 1)[1])
        candidate.sdpMid, candidate.sdpMLineIndex = said.get("sdpMid"), said.get("sdpMLineIndex")
        connection = peer.publisher if trickle.target == rtc.PUBLISHER else peer.subscriber
        if connection.remoteDescription is not None:  # else the description that comes holds it
            await connection.addIceCandidate(candidate)

    async def _on_add_track(self, peer: Peer, asked: rtc.AddTrackRequest) -> None:
        info = models.TrackInfo(sid=f"TR_{next(self._sids)}", type=asked.type, name=asked.name, source=asked.source, width=asked.width,
                                height=asked.height, muted=asked.muted, stream=asked.stream)  # fmt: skip
        peer.announced[asked.cid] = Publication(info)
        await peer.send(track_published=rtc.TrackPublishedResponse(cid=asked.cid, track=info))

    async def _on_mute(self, peer: Peer, asked: rtc.MuteTrackRequest) -> None:
        for info in peer.info.tracks:
            if info.sid == asked.sid:
                info.muted = asked.muted
        await self._announce(peer)

    async def _on_subscription(self, peer: Peer, asked: rtc.UpdateSubscription) -> None:
        sids = {*asked.track_sids, *(sid for tracks in asked.participant_tracks for sid in tracks.track_sids)}
        for other in list(self.peers.values()):
            for publication in list(other.announced.values()):
                if publication.info.sid in sids and asked.subscribe:
                    await self._subscribe(peer, other, publication)
                elif publication.info.sid in sids:
                    publication.outlets.pop(peer.info.identity, None)

    async def _on_update_metadata(self, peer: Peer, asked: rtc.UpdateParticipantMetadata) -> None:
        allowed = peer.info.permission.can_update_metadata
        if allowed:
            peer.info.metadata, peer.info.name = asked.metadata or peer.info.metadata, asked.name or peer.info.name
            peer.info.attributes.update(asked.attributes)
            await self._announce(peer)
        reason = rtc.RequestResponse.OK if allowed else rtc.RequestResponse.NOT_ALLOWED
        await peer.send(request_response=rtc.RequestResponse(request_id=asked.request_id, reason=reason))

    async def _on_ping_req(self, peer: Peer, ping: rtc.Ping) -> None:
        await peer.send(pong_resp=rtc.Pong(last_ping_timestamp=ping.timestamp, timestamp=ping.timestamp))

    # -- media and data -------------------------------------------------------------------------------------------

    def _on_track(self, peer: Peer, track: MediaStreamTrack) -> None:
        publication = peer.announced[track.id]
        receiver = next(t.receiver for t in peer.publisher.getTransceivers() if t.receiver.track is track)
        publication.attach(receiver, track)
        asyncio.ensure_future(self._published(peer, publication))

    async def _published(self, peer: Peer, publication: Publication) -> None:
        peer.info.tracks.append(publication.info)
        peer.info.is_publisher = True
        await self._announce(peer)
        for other in list(self.peers.values()):
            if other is not peer and other.auto_subscribe:
                await self._subscribe(other, peer, publication)

    async def _subscribe(self, peer: Peer, owner: Peer, publication: Publication) -> None:
        if peer.info.identity in publication.outlets:
            return
        outlet = publication.outlets[peer.info.identity] = Relayed("video" if publication.info.type == models.VIDEO else "audio")
        sender = peer.subscriber.addTransceiver(outlet, direction="sendonly").sender
        sender._stream_id, sender._track_id = f"{owner.info.sid}|{publication.info.sid}", publication.info.sid
        sender._send_keyframe = publication.ask_keyframe
        with contextlib.suppress(asyncio.CancelledError):  # left meanwhile
            await peer.offer()
            await owner.send(track_subscribed=rtc.TrackSubscribed(track_sid=publication.info.sid))

    def _on_data(self, peer: Peer, label: str, data: bytes) -> None:
        packet = models.DataPacket.FromString(data)
        packet.participant_identity, packet.participant_sid = peer.info.identity, peer.info.sid
        wanted, message = set(packet.destination_identities), packet.SerializeToString()
        for identity, other in self.peers.items():
            channel = other.channels.get(label)
            if other is not peer and channel is not None and channel.readyState == "open" and (not wanted or identity in wanted):
                channel.send(message)


class Server:
    """HTTP: the signalling socket, its check, and the part of the room service that agents call."""

    def __init__(self, key: str, secret: str):
        self._key, self._secret, self._rooms, self._sids = key, secret, {}, itertools.count(1)
        self.app = web.Application()
        self.app.add_routes([
            web.get("/rtc", self._rtc),
            web.get("/rtc/validate", self._validate),  # /rtc/v1 is not there: clients of today fall back
            web.post(TWIRP + "RemoveParticipant", self._remove),
            web.post(TWIRP + "ListParticipants", self._list),
        ])  # fmt: skip

    def _claims(self, request: web.Request) -> dict:
        token = request.query.get("access_token") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            return jwt.decode(token, self._secret, algorithms=["HS256"], issuer=self._key, leeway=5)
        except jwt.InvalidTokenError as error:
            raise web.HTTPUnauthorized(text=str(error)) from error

    async def _validate(self, request: web.Request) -> web.Response:
        self._claims(request)
        return web.Response(text="success")

    async def _rtc(self, request: web.Request) -> web.WebSocketResponse:
        claims = self._claims(request)
        grants = claims["video"]
        if not grants.get("roomJoin"):
            raise web.HTTPForbidden(text="no roomJoin")
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        place = self._rooms.setdefault(grants["room"], Room(grants["room"], self._sids))
        if claims["sub"] in place.peers:
            await place.leave(place.peers[claims["sub"]], models.DUPLICATE_IDENTITY)
        peer = Peer(socket, self._participant(claims, request), request.query.get("auto_subscribe", "1") in ("1", "true"))
        await place.enter(peer)
        try:
            async for message in socket:
                if message.type == WSMsgType.BINARY and not await place.on_request(peer, rtc.SignalRequest.FromString(message.data)):
                    break
        finally:
            await place.leave(peer)
        return socket

    def _participant(self, claims: dict, request: web.Request) -> models.ParticipantInfo:
        grants = claims["video"]
        permission = models.ParticipantPermission(can_subscribe=True, can_publish=True, can_publish_data=True,
                                                  can_update_metadata=grants.get("canUpdateOwnMetadata", False))  # fmt: skip
        return models.ParticipantInfo(
            sid=f"PA_{next(self._sids)}", identity=claims["sub"], name=claims.get("name", ""), state=models.ParticipantInfo.ACTIVE,
            metadata=claims.get("metadata", ""), attributes=claims.get("attributes", {}), permission=permission,
            kind=KINDS[claims.get("kind") or "standard"], client_protocol=int(request.query.get("client_protocol", 0)),
        )  # fmt: skip

    async def _remove(self, request: web.Request) -> web.Response:
        self._claims(request)
        asked = room.RoomParticipantIdentity.FromString(await request.read())
        place = self._rooms.get(asked.room)
        if place is None or not await place.remove(asked.identity):
            return web.json_response({"code": "not_found", "msg": "participant does not exist"}, status=404)
        return web.Response(body=room.RemoveParticipantResponse().SerializeToString(), content_type="application/protobuf")

    async def _list(self, request: web.Request) -> web.Response:
        self._claims(request)
        place = self._rooms.get(room.ListParticipantsRequest.FromString(await request.read()).room)
        people = [peer.info for peer in place.peers.values()] if place else []
        return web.Response(body=room.ListParticipantsResponse(participants=people).SerializeToString(), content_type="application/protobuf")


async def serve(key: str, secret: str) -> None:
    """Serve on a free port, which is printed, until stdin closes."""
    runner = web.AppRunner(Server(key, secret).app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
