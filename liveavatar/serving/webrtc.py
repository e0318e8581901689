"""A viewer: one peer connection that shows a session and, where it may, brings a microphone back (aiortc).

The session encodes once; every viewer gets the same packets (serving.md 7.3), so a peer costs encryption and nothing
else. A viewer is a `packets.Sink` with an edge for pictures and one for sound, which its two tracks empty. Nothing
leaves before both have something (CLK-3), and the first picture is a keyframe.

Each connection has a DTLS certificate of its own, which aiortc makes in 0.2 ms: none is on a disk, and no two viewers can tell by it
that they see the same server (18.6 asks for one per process at most).

A data channel that the peer opens carries JSON: {"type": "ping" | "pong", "t": ...} both ways (a pong of ours also has
"server", Unix ms), and from the page {"type": "stats", "report": {...}}, figures of its getStats().

Two things of aiortc's sender are private, hence the exact version in setup.py and a test that fails when they change:
`_send_keyframe`, called when the peer lost pictures (PLI, FIR), is ours; and the wall time of its sender reports is
that of the packet's pts, not of the moment of sending, so both tracks tell the peer the same clock to the microsecond.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
import structlog
from aiortc import RTCConfiguration, RTCIceServer, RTCIceTransportPolicy, RTCPeerConnection, RTCRtpSender, RTCSessionDescription, exceptions
from aiortc.clock import current_ntp_time
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

from liveavatar.serving import packets
from liveavatar.serving.offers import CANDIDATES, Fragment, Offer
from liveavatar.serving.problems import Capacity, Problem, Unprocessable
from liveavatar.telemetry import now as monotonic

Heard = Callable[[np.ndarray, int], Awaitable[None]]  # int16 [n] mono and its rate in Hz; n is 0 when nothing comes any more

EDGE_SECONDS = 0.2  # what waits for a viewer: five pictures, 200 ms of sound (serving.md 4)
PICTURE_HOLD = 0.02  # seconds, see PacketTrack._hold
HEARD_RATE = 16_000  # Hz, of what a microphone brings
HEARD_FRAMES = 50  # of 20 ms that wait for whoever listens; then the oldest goes
MUTED_SECONDS = 0.6  # without a packet, and the microphone is switched off; longer than the 0.4 s between two of a silent one (DTX)
NOTHING = np.zeros(0, np.int16)
CLOSE_SECONDS = 5.0  # for goodbyes
MESSAGE_BYTES = 4096  # of a peer's message on its data channel
UNSENT_BYTES = 16 * MESSAGE_BYTES  # of ours that wait for a peer who takes none; beyond it we say nothing
REFUSALS = (ValueError, AssertionError, exceptions.InvalidAccessError, exceptions.InvalidStateError, exceptions.OperationError,
            exceptions.InternalError)  # fmt: skip
TRACKS = {packets.H264: ("video", ("video/h264", "video/rtx")), packets.OPUS: ("audio", ("audio/opus",))}

log = structlog.get_logger(__name__)


class Source(Protocol):
    """What a viewer asks of its session (serving/live.py)."""

    id: str

    def add_sink(self, sink: packets.Sink) -> None: ...

    def remove_sink(self, sink: packets.Sink) -> None: ...

    def ask_keyframe(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds. ping: between signs of life we ask for. silent: without any a peer is closed. connect: until media flow."""

    ping: float = 2.0
    silent: float = 8.0
    connect: float = 20.0


@dataclass(frozen=True, kw_only=True)
class ViewerStats:
    """Of one viewer since it came. rtt, jitter: seconds, the worse of both tracks, None before its first report. lost:
    packets. pli: keyframes it asked for. drops: pieces its edges threw away. stale: pieces of a past epoch. heard_drops: of
    its microphone."""

    rtt: float | None = None
    jitter: float | None = None
    lost: int = 0
    pli: int = 0
    drops: int = 0
    stale: int = 0
    heard_drops: int = 0


class WallClock:
    """Wall time of a pts, the same for both tracks: the first packet's, then as the pts go. Never set again, for what
    counts is that pictures and sound agree."""

    def __init__(self):
        self._base: int | None = None

    def ntp(self, seconds: float) -> int:
        """Of a pts in seconds, in 2**-32 s since 1900."""
        elapsed = round(seconds * 2**32)
        if self._base is None:
            self._base = current_ntp_time() - elapsed
        return self._base + elapsed


class PacketTrack(MediaStreamTrack):
    """Hands a viewer's packets of one codec to aiortc, which sends them as they are. fresh: whether a packet may still leave.
    clock: the session's, by which packets were made. held: the packet that is held back just now."""

    def __init__(self, kind: str, edge: packets.Edge, barrier: asyncio.Event, wall: WallClock, fresh: Callable[[packets.Packet], bool],
                 clock: Callable[[], float]):  # fmt: skip
        super().__init__()
        self.kind, self.sender, self.held = kind, None, None
        self.left: Callable[[packets.Packet], None] = lambda packet: None
        self._edge, self._barrier, self._wall, self._fresh, self._clock = edge, barrier, wall, fresh, clock
        self._sent: packets.Packet | None = None

    async def recv(self) -> av.Packet:
        """The next packet; raises MediaStreamError when the viewer is closed."""
        if self._sent is not None:  # aiortc has just stamped what it sent with the time of sending
            self.sender._RTCRtpSender__ntp_timestamp = self._wall.ntp(self._sent.seconds)
        await self._barrier.wait()
        item = self._sent = await self._next()
        self.left(item)
        packet = av.Packet(item.data)
        packet.pts, packet.time_base = item.pts, Fraction(1, item.rate)
        return packet

    async def _next(self) -> packets.Packet:
        while (item := await self._edge.get()) is not None:
            hold = self._hold(item)
            wait = min(hold, item.made + hold - self._clock())
            if wait > 0:  # what is late anyway leaves at once, and with it all that came in a burst
                self.held = item
                await asyncio.sleep(wait)
                self.held = None
            if self._fresh(item):
                return item
        raise MediaStreamError

    def _hold(self, item: packets.Packet) -> float:
        """Seconds after its tick an item leaves at the earliest, for the jitter buffer of a browser's sound is the longer
        one: pictures a little later; and a tick's second 20 ms of sound, which come with the first, not with it, which
        would look like jitter. Measured in Chromium, sound behind pictures: 56 ms, with the spacing alone 41 ms, with
        both 16-31 ms."""
        if self.kind == "video":
            return PICTURE_HOLD
        return item.duration / item.rate if self._sent is not None and item.made == self._sent.made else 0.0


class Microphone:
    """A peer's sound, 16 kHz mono, for `heard`, and NOTHING whenever it stops; a listener that is slow loses the oldest."""

    def __init__(self, track: MediaStreamTrack, heard: Heard):
        self.drops, self._flows = 0, False
        self._track, self._heard, self._frames = track, heard, asyncio.Queue(HEARD_FRAMES)

    async def run(self) -> None:
        """Until the track ends."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                while (pcm := await self._next()) is not None:
                    await self._hand(pcm)
        finally:
            await self._hand(NOTHING)

    async def _next(self) -> np.ndarray | None:
        try:
            async with asyncio.timeout(MUTED_SECONDS if self._flows else None):
                pcm = await self._frames.get()
        except TimeoutError:
            pcm = NOTHING
        self._flows = pcm is not NOTHING
        return pcm

    async def _read(self) -> None:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=HEARD_RATE)
        try:
            while True:
                for frame in resampler.resample(await self._track.recv()):
                    self._keep(frame.to_ndarray()[0])
        except MediaStreamError:
            self._keep(None)

    def _keep(self, pcm: np.ndarray | None) -> None:
        if self._frames.full():
            self._frames.get_nowait()
            self.drops += 1
        self._frames.put_nowait(pcm)

    async def _hand(self, pcm: np.ndarray) -> None:
        try:
            await self._heard(pcm, HEARD_RATE)
        except Problem as problem:  # the session has enough, or is closing: this piece is lost, not the viewer
            if not self.drops:
                log.warning("microphone", refused=problem.kind)
            self.drops += 1


class Viewer:
    """One peer of one session; a sink of it from the moment it is connected.

    ice: RTCIceServer dictionaries for our own side. heard: gets its microphone. told: gets what its page says of its
    reception (MET-2), unchecked; may raise Problem. gone: told once when it has closed.
    """

    def __init__(self, session: Source, *, ice: list[dict] = (), relay_only: bool = False, heard: Heard | None = None,
                 told: Callable[[object], None] = lambda figures: None, gone: Callable[[Viewer], None] = lambda viewer: None,
                 patience: Patience = Patience(), clock: Callable[[], float] = monotonic):  # fmt: skip
        self.id, self.etag = secrets.token_urlsafe(16), secrets.token_hex(8)
        self.name, self.wants, self.state = f"webrtc:{self.id[:6]}", frozenset(), "new"
        self.stats = ViewerStats()
        self.left: Callable[[packets.Packet], None] = lambda packet: None  # told of each as it leaves
        self.edges = {codec: packets.Edge(f"{self.name}.{kind}", seconds=EDGE_SECONDS, sound_seconds=EDGE_SECONDS, ask_keyframe=session.ask_keyframe)
                      for codec, (kind, _) in TRACKS.items()}  # fmt: skip
        self.session, self._heard, self._told, self._gone, self._patience, self._clock = session, heard, told, gone, patience, clock
        self._offer: Offer | None = None
        self._tracks: list[PacketTrack] = []
        self._barrier, self._wall = asyncio.Event(), WallClock()
        self._epoch, self._whole, self._greeted, self._pli, self._stale, self._trickled = 0, False, False, 0, 0, 0
        self._sign, self._reports, self._channel, self._microphone = clock(), {}, None, None
        self._early: deque[packets.Packet] = deque(maxlen=2)  # a tick's sound, which comes before its picture
        self._tasks: set[asyncio.Task] = set()
        self._closing: asyncio.Task | None = None
        policy = RTCIceTransportPolicy.RELAY if relay_only else RTCIceTransportPolicy.ALL
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=[RTCIceServer(**server) for server in ice], iceTransportPolicy=policy))
        for event, handler in (("connectionstatechange", self._changed), ("track", self._track), ("datachannel", self._open_channel)):
            self._peer.on(event, handler)

    # -- signalling

    async def answer(self, offer: Offer) -> str:
        """Our SDP, with all candidates. Raises Unprocessable when we share no codec with the peer, Capacity when it could not reach us."""
        self._offer, self.wants = offer, offer.wants
        self._keep(self._watch())  # from the start: whatever becomes of this request, nobody stays who never connects
        for codec in (c for c, (kind, _) in TRACKS.items() if kind in offer.kinds):
            self._send(codec)
        try:
            await self._peer.setRemoteDescription(RTCSessionDescription(offer.text, "offer"))
            await self._peer.setLocalDescription()
        except REFUSALS as error:
            await self.aclose("refused")
            raise Unprocessable("offer: H.264 and Opus are what we send, and this peer cannot take them") from error
        answer = self._peer.localDescription.sdp
        if "a=candidate:" not in answer:
            await self.aclose("no candidate")
            raise Capacity("no way to be reached: the TURN server does not answer, or refuses us", kind="network")
        return answer

    def _send(self, codec: str) -> None:
        """A transceiver that can speak `codec` alone; must be there before the offer is, or VP8 is chosen (7.2)."""
        kind, types = TRACKS[codec]
        speaks = codec == packets.OPUS and self._heard is not None and self._offer.speaks
        track = PacketTrack(kind, self.edges[codec], self._barrier, self._wall, lambda item: item.epoch >= self._epoch, self._clock)
        transceiver = self._peer.addTransceiver(track, "sendrecv" if speaks else "sendonly")
        transceiver.setCodecPreferences([c for c in RTCRtpSender.getCapabilities(kind).codecs if c.mimeType.lower() in types])
        track.sender, track.left = transceiver.sender, lambda packet: self.left(packet)
        self._tracks.append(track)
        transceiver.sender._send_keyframe = self._pictures_lost

    async def trickle(self, fragment: Fragment) -> None:
        """More candidates of the peer. Raises Unprocessable for those of another connection (we do not restart ICE) and for too many."""
        if fragment.ufrag != self._offer.ufrag:
            raise Unprocessable("ICE restarts are not taken: make a new offer")
        self._trickled += len(fragment.candidates)
        if self._trickled > CANDIDATES:
            raise Unprocessable(f"more than {CANDIDATES} candidates")
        for candidate in (c for c in fragment.candidates if c.sdpMid == self._offer.mid):  # those of bundled sections are not used
            await self._peer.addIceCandidate(candidate)

    def _changed(self) -> None:
        state = self._peer.connectionState
        if state == "connected" and self.state == "new":
            self._begin()
        elif state in ("failed", "closed"):
            self.close(state)

    def _begin(self) -> None:
        try:
            self.session.add_sink(self)
        except Problem as problem:  # the session ended while this peer was on its way
            self.close(problem.kind)
        else:
            self.state, self._sign = "connected", self._clock()
            self.session.ask_keyframe()  # a late joiner must not wait for the next one that is due

    # -- packets.Sink

    def greet(self, still: packets.Packet) -> None:
        """A keyframe to look at, and to listen by, until the one that was asked for comes; the pictures in between build upon others."""
        self._greeted = True
        self.edges[packets.H264].put(still)

    def put(self, item: packets.Packet) -> None:
        """Into its edge; pictures from the first keyframe on, sound from its tick on, nothing of a past epoch."""
        picture = item.codec == packets.H264
        if item.epoch < self._epoch:
            self._stale += 1
            if picture:
                self._gap()
        elif self._usable(item, picture):
            self._whole = self._whole or picture
            for piece in (item, *(sound for sound in self._early if picture and sound.made == item.made)):
                self.edges[piece.codec].put(piece)
            self._early.clear()
            if not self._barrier.is_set() and all(len(self.edges[codec]) for codec in self.wants):
                self._barrier.set()
        elif not picture:
            self._early.append(item)

    def _usable(self, item: packets.Packet, picture: bool) -> bool:
        if picture:
            return self._whole or item.keyframe  # else nothing to build upon: the keyframe that was asked for is on its way
        return self._barrier.is_set() or self._whole or self._greeted or packets.H264 not in self.wants

    def flush(self, epoch: int) -> None:
        """Nothing older than `epoch` leaves any more."""
        self._epoch = max(self._epoch, epoch)
        for edge in self.edges.values():
            edge.flush(epoch)
        if any(track.kind == "video" and track.held is not None for track in self._tracks):
            self._gap()  # that picture will not leave, and the next ones build upon it

    def level(self) -> packets.Level:
        """Pictures that wait; drops and stale pieces of pictures and sound."""
        pictures, sound = (self.edges[codec].level() for codec in (packets.H264, packets.OPUS))
        return pictures._replace(drops=pictures.drops + sound.drops, stale=pictures.stale + sound.stale + self._stale)

    def _gap(self) -> None:
        if self._whole:
            self._whole = False
            self.session.ask_keyframe()

    def _pictures_lost(self) -> None:
        self._pli += 1
        self.session.ask_keyframe()

    # -- signs of life

    def _open_channel(self, channel) -> None:
        if self._channel is not None:
            channel.close()  # one is enough
            return
        self._channel = channel
        channel.on("message", self._message)

    def _message(self, text: str | bytes) -> None:
        self._sign = self._clock()
        message = _read_message(text)
        if message.get("type") == "ping":
            self._say({"type": "pong", "t": message.get("t"), "server": time.time() * 1000})
        elif message.get("type") == "stats":
            self._report(message.get("report"))

    def _report(self, figures: object) -> None:
        try:
            self._told(figures)
        except Problem as problem:
            log.debug("report", viewer=self.name, refused=problem.detail)

    def _say(self, message: dict) -> None:
        if self._channel is not None and self._channel.readyState == "open" and self._channel.bufferedAmount < UNSENT_BYTES:
            self._channel.send(json.dumps(message))

    async def _watch(self) -> None:
        """Asks for a sign of life, reads the peer's reports, and closes it when there is none: a tab that is closed says no
        goodbye, and aiortc alone would take 30 s to notice. A peer without a data channel shows by its reports that it lives."""
        while (left := self._sign + (self._patience.connect if self.state == "new" else self._patience.silent) - self._clock()) > 0:
            self._say({"type": "ping", "t": self._clock()})
            await asyncio.sleep(min(self._patience.ping, left))
            await self._read_reports()
        self.close("silent")

    async def _read_reports(self) -> None:
        found = {s.kind: s for s in (await self._peer.getStats()).values() if s.type == "remote-inbound-rtp"}
        if any(kind not in self._reports or s.timestamp > self._reports[kind].timestamp for kind, s in found.items()):
            self._sign = self._clock()
        self._reports = found
        level = self.level()
        rates = {"video": packets.VIDEO_RATE, "audio": packets.SOUND_RATE}
        self.stats = ViewerStats(
            rtt=max((s.roundTripTime for s in found.values() if s.roundTripTime is not None), default=None),
            jitter=max((s.jitter / rates[kind] for kind, s in found.items()), default=None),
            lost=sum(s.packetsLost for s in found.values()), pli=self._pli, drops=level.drops, stale=level.stale,
            heard_drops=self._microphone.drops if self._microphone else 0)  # fmt: skip

    # -- the peer's own sound

    def _track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio" and self._heard is not None:
            self._microphone = Microphone(track, self._heard)
            self._keep(self._microphone.run())

    # -- the end

    def _keep(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("viewer", viewer=self.name, session=self.session.id, exc_info=task.exception())
            self.close("error")

    def close(self, reason: str = "closed") -> None:
        """At once: no more of the session comes here; the connection goes down behind."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._end(reason))

    async def aclose(self, reason: str = "closed") -> None:
        """As close(), and waits until every socket and task of it is gone."""
        self.close(reason)
        await asyncio.shield(self._closing)

    async def _end(self, reason: str) -> None:
        if self.state == "connected":
            self.session.remove_sink(self)
        self.state = "closed"
        log.info("viewer closed", viewer=self.name, session=self.session.id, reason=reason)
        for edge in self.edges.values():
            edge.close()
        self._barrier.set()
        for task in list(self._tasks):
            task.cancel()
        self._gone(self)
        try:
            await asyncio.wait_for(self._peer.close(), CLOSE_SECONDS)
        except TimeoutError:
            log.error("viewer", viewer=self.name, session=self.session.id, reason="its connection does not close")


def _read_message(text: str | bytes) -> dict:
    """What a peer sent on its channel; nothing, if it makes no sense."""
    if len(text) > MESSAGE_BYTES:
        return {}
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}

