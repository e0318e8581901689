"""A session on air: RTMP, HLS and WHIP destinations, each written by a process of its own that may die (EGR-1 to EGR-4).

    session -> Edge (2 s, then drops to a keyframe) -> Writer -> destination.py: mux() -> server

The encoder never notices: a destination that fails is left for a while and joined again at a fresh IDR, with time stamps
that go on along the session's clock. Keys stay in the job of the process; what people and logs see is redacted.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, urlsplit

from liveavatar.config import one_of
from liveavatar.core import FPS, ConfigError, LiveAvatarError
from liveavatar.serving import destination
from liveavatar.serving.packets import AAC, H264, OPUS, Edge, Packet, Tick
from liveavatar.serving.settings import OutputsConfig, positive
from liveavatar.telemetry import now

EDGE_SECONDS = 2.0  # of media that wait for a writer
WINDOW = 80  # packets under way to a writer, about a second: beyond it the edge fills, whose policy is known
CONNECT_SECONDS = 10.0  # for the process to start and the server to answer, where outputs.stall_seconds is less
SILENCES = 3  # times outputs.stall_seconds without any datagram from a server
STEADY_SECONDS = 10.0  # live for so long: the next failure is the first of its row
ALERT_FAILURES = 5  # in a row: operators are told
FLV_SECONDS = 20 * 86_400  # FLV counts milliseconds in 31 bits (24.8 days): before that a planned reconnect starts anew
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")  # no proxies, nobody's keys
HIDDEN = "***"


# ---------------------------------------------------------------- the process


class WriterFailed(LiveAvatarError):
    """The process of a destination or recording reported an error, crashed or made no progress."""


class Writer:
    """One life of a destination.py process. job: see destination.open_container. clock: seconds, monotonic.

    `count`: packets whose mux() came back. `delivered`: bytes of these that the peer acknowledged; one more is progress, for
    success of mux() alone only means that the kernel took it. Datagrams are not acknowledged: there RTCP and checks of
    consent, which come each 5 s at least, say that somebody is there. `begun` is set by the first report. One drive() per Writer.
    """

    def __init__(self, job: dict, stall_seconds: float, clock: Callable[[], float] = now, on_progress: Callable[[int], None] = lambda size: None):
        self.count = self.delivered = 0
        self._job, self._stall, self._clock, self._on_progress = job, stall_seconds, clock, on_progress
        self._process: asyncio.subprocess.Process | None = None
        self._sent = self._held = 0
        self._progress, self._heard, self._finishing, self._closed, self._words = 0.0, 0.0, False, False, ""
        self._room, self.begun = asyncio.Event(), asyncio.Event()

    async def drive(self, feed: Callable[[Writer], Coroutine]) -> None:
        """Start the process, run feed(self), which sends and then finishes, beside the watchdog, and end the process.

        Raises WriterFailed, and whatever `feed` raises.
        """
        await self._start()
        feeding, watching = asyncio.create_task(feed(self)), asyncio.create_task(self._watch())
        try:
            await asyncio.wait({feeding, watching}, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
            await watching
        finally:
            feeding.cancel()
            watching.cancel()
            await asyncio.gather(feeding, watching, return_exceptions=True)
            await self.kill()

    async def _start(self) -> None:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", destination.__file__, env=environment, start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            raise WriterFailed(f"the writing process cannot be started: {error.strerror}") from None
        self._process.stdin.write(json.dumps(self._job).encode() + b"\n")

    @property
    def pid(self) -> int | None:
        """Of the process, for tests and operators."""
        return self._process and self._process.pid

    async def send(self, packet: Packet, origin: int = 0) -> None:
        """Hand over a packet, its time counted from tick `origin`; waits while WINDOW packets are under way."""
        while self._sent - self.count >= WINDOW:
            self._room.clear()
            await self._room.wait()  # a dead or stuck process makes no room: the watchdog ends the wait
        if self._sent == self.count and not self._held:
            self._progress = self._clock()  # nothing was under way: from now on something is
        self._sent += 1
        track = destination.VIDEO if packet.codec == H264 else destination.SOUND
        header = destination.HEADER.pack(track, packet.keyframe, packet.pts - origin * packet.rate // FPS, len(packet.data))
        with suppress(ConnectionError):  # it died: the watchdog knows why
            self._process.stdin.write(header + packet.data)
            await self._process.stdin.drain()

    def finish(self) -> None:
        """No more packets: the process finishes its container and exits."""
        self._finishing, self._progress = True, self._clock()
        self._process.stdin.close()

    def stalled(self, time: float) -> str | None:
        """What has not happened for too long, if so."""
        limit = self._stall if self.count else max(self._stall, CONNECT_SECONDS)
        if (self._finishing or self._sent > self.count or self._held > 0) and time - self._progress > limit:
            return f"no progress for {time - self._progress:.1f} s"
        if self._job["format"] == "whip" and self.count and time - self._heard > SILENCES * self._stall:
            return f"nothing heard from the server for {time - self._heard:.1f} s"
        return None

    def reported(self, message: dict, time: float) -> None:
        """Take in a line of the process."""
        if "n" in message:
            if message["heard"] or not self.count:
                self._heard = time
            self.count, self._held = message["n"], message["held"]
            grown = message["bytes"] - message["held"] - self.delivered
            if grown > 0:
                self.delivered, self._progress = self.delivered + grown, time
                self._on_progress(grown)
            self._room.set()
            self.begun.set()
        self._words = message.get("error", self._words)
        self._closed = message.get("closed", False)

    async def _watch(self) -> None:
        """Until the process has ended well; raises WriterFailed otherwise."""
        reading = asyncio.create_task(self._read())
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=self._stall / 10)
                if reason := self.stalled(self._clock()):
                    raise WriterFailed(reason)
        finally:
            reading.cancel()
        if not self._closed:
            raise WriterFailed(self._words or f"the writing process ended (exit status {await self._process.wait()})")

    async def _read(self) -> None:
        while line := await self._process.stdout.readline():
            if line.startswith(b"{"):
                self.reported(json.loads(line), self._clock())
            elif line.strip():
                self._words = line.decode(errors="replace").strip()  # of a crash: its last line

    async def kill(self) -> None:
        """End the process now, if it still runs. One that the kernel cannot end (a dead disk) is left behind."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 1)


# ---------------------------------------------------------------- where to


@dataclass(frozen=True)
class Form:
    """How a kind of destination is written. live: a viewer waits at the far end, so what is old is not sent on connecting."""

    format: str
    schemes: tuple[str, ...]
    sound: str
    channels: int
    live: bool
    options: dict[str, str]


FORMS = {
    "rtmp": Form("flv", ("rtmp", "rtmps"), AAC, 1, True, {"flvflags": "no_duration_filesize"}),
    "hls": Form("hls", (), AAC, 1, False, {
        "hls_time": "1", "hls_list_size": "6", "hls_segment_type": "fmp4",
        "hls_flags": "delete_segments+independent_segments+program_date_time+discont_start"}),
    "whip": Form("whip", ("http", "https"), OPUS, 2, True, {}),
}  # fmt: skip
PLAYLIST = "index.m3u8"
LIFE_SEGMENTS = 10**9  # of HLS: each connection numbers its own, so that numbers grow whatever happens


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a destination is. kind: rtmp, hls, whip. url: with its key; of hls the folder, which exists. token: bearer, of whip."""

    kind: str
    url: str = field(repr=False)
    token: str | None = field(default=None, repr=False)

    def __post_init__(self):
        one_of("kind", self.kind, tuple(FORMS))
        schemes = FORMS[self.kind].schemes
        if schemes and not _is_url(self.url, schemes):
            raise ConfigError(f"a destination of kind {self.kind} needs a URL like {schemes[0]}://host/...")
        if not schemes and not Path(self.url).is_dir():
            raise ConfigError(f"a destination of kind {self.kind} needs a folder that exists")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.kind == "whip"):
            raise ConfigError("a token is a line of ASCII, and only whip takes one")

    @property
    def host(self) -> str | None:
        """Name or address of the server; None for a folder."""
        return urlsplit(self.url).hostname if FORMS[self.kind].schemes else None

    @property
    def shown(self) -> str:
        """The URL for people: server and application, never user, key or query. Of a folder its name."""
        if self.host is None:
            return Path(self.url).name
        parts = urlsplit(self.url)
        port = f":{parts.port}" if parts.port else ""
        application = parts.path.strip("/").split("/")[0] if self.kind == "rtmp" and parts.path.count("/") > 1 else ""
        return "/".join(part for part in (f"{parts.scheme}://{parts.hostname}{port}", application, HIDDEN) if part)

    def redact(self, text: str) -> str:
        """`text` without what only we and the server may know."""
        if self.host is None:
            return text.replace(self.url, self.shown)
        parts = urlsplit(self.url)
        places = parts.path.strip("/").split("/")
        secrets = {self.url, self.token, parts.username, parts.password, parts.query, *parts.query.split("&"), parts.path, *places[self.kind == "rtmp" :]}
        for secret in sorted(filter(None, secrets | {quote(secret, safe="") for secret in secrets if secret}), key=len, reverse=True):
            text = text.replace(secret, self.shown if secret == self.url else HIDDEN)
        return text

    def job(self, width: int, height: int, life: int) -> dict:
        """What the writing process must know. width, height: of the encoded pictures. life: how many processes came before."""
        form, url = FORMS[self.kind], self.url
        options = dict(form.options)
        if self.kind == "hls":
            folder = Path(url)
            url = str(folder / PLAYLIST)  # files of their own for each life: players keep what they have of the old ones
            options["start_number"], options["hls_segment_filename"] = str(life * LIFE_SEGMENTS), str(folder / f"{life}-%d.m4s")
            options["hls_fmp4_init_filename"] = f"{life}-init.mp4"
        if self.kind == "whip":
            options["cert_file"], options["key_file"] = (str(path) for path in certificate())
            if self.token:
                options["authorization"] = self.token
        return {"url": url, "format": form.format, "options": options, "width": width, "height": height, "sound": form.sound, "channels": form.channels}

    def tidy(self, life: int) -> None:
        """Remove what processes before the last one left in a folder: players have long gone on."""
        if self.kind == "hls":
            for path in Path(self.url).glob("*-*.m*4*"):
                if int(path.name.split("-")[0]) < life - 1:
                    path.unlink()


def _is_url(url: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # a port or an address that is none
        return False


@lru_cache(maxsize=1)
def _certificate_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="liveavatar-whip-")  # only we can read it; gone when the process ends


@lru_cache(maxsize=1)
def certificate() -> tuple[Path, Path]:
    """Certificate and key (PEM) of this process for DTLS: ECDSA on P-256, since the handshake fails with what FFmpeg makes itself."""
    from datetime import UTC, datetime, timedelta

    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ConfigError("WHIP needs the package cryptography: pip install 'liveavatar[serve]'") from None
    key, name, today = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "liveavatar")]), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
    signed = builder.not_valid_before(today - timedelta(days=1)).not_valid_after(today + timedelta(days=3650)).sign(key, hashes.SHA256())
    folder, pem = Path(_certificate_folder().name), serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


# ---------------------------------------------------------------- the destination


@dataclass(frozen=True, kw_only=True)
class OutputStatus:
    """How a destination does, for API, console and metrics; holds no secret. Times are clock seconds.

    state: connecting, live, waiting (for the next try), closed. failures: in a row. reconnects: connections after the first.
    bytes: of media that the far end took. progress: when it last took some. drops: packets thrown away.
    """

    name: str
    kind: str
    url: str
    state: str = "connecting"
    reconnects: int = 0
    failures: int = 0
    last_error: str | None = None
    bytes: int = 0
    progress: float | None = None
    drops: int = 0


class Destination:
    """A Sink (packets.Sink) that keeps a server or folder fed; whoever makes it runs run() as a task until after close().

    width, height: of the encoded pictures. check: awaited before each connection (is the host still allowed?), raises
    LiveAvatarError. report(event, facts): output.live, output.down, output.failing, output.closed.
    """

    def __init__(
        self, name: str, target: Target, width: int, height: int, config: OutputsConfig, *, ask_keyframe: Callable[[], None] = lambda: None,
        check: Callable[[Target], Awaitable[None]] | None = None, report: Callable[[str, dict], None] = lambda event, facts: None,
        clock: Callable[[], float] = now, rng: random.Random | None = None,
    ):  # fmt: skip
        positive("outputs", config, "stall_seconds", "retry_seconds", "retry_limit_seconds")
        self.name, self.target, self.form = name, target, FORMS[target.kind]
        self.wants = frozenset({H264, self.form.sound})
        self.status = OutputStatus(name=name, kind=target.kind, url=target.shown)
        self.writer: Writer | None = None
        self._size, self._config, self._check = (width, height), config, check
        self._ask_keyframe, self._report, self._clock, self._rng = ask_keyframe, report, clock, rng or random.Random()
        self._edge: Edge | None = None  # None: nobody to send to
        self._origin: int | None = None  # tick that is 0 at the far end, the same for all connections
        self._connections, self._lives, self._live_since = 0, 0, None
        self._closing = asyncio.Event()

    # ---- the Sink

    def put(self, item: Packet | Tick) -> None:
        """Queue a packet; forgotten while there is no connection."""
        if self._edge is not None:
            self._edge.put(item)

    def flush(self, epoch: int) -> None:
        """Nothing of an older epoch leaves any more."""
        if self._edge is not None:
            self._edge.flush(epoch)

    def close(self) -> None:
        """Send what is queued, say goodbye, end run()."""
        self._closing.set()
        if self._edge is not None:
            self._edge.close()

    @property
    def depth(self) -> int:
        """Packets that wait."""
        return 0 if self._edge is None else len(self._edge)

    # ---- connections

    async def run(self) -> None:
        """Connect, and connect again, until close()."""
        try:
            while not self._closing.is_set():
                try:
                    await self._connection()
                except LiveAvatarError as error:
                    await self._wait(self._failed(self.target.redact(str(error))))
        finally:
            self._set(state="closed")
            self._report("output.closed", self._facts())

    async def _connection(self) -> None:
        """One life of the writing process. Returns after close(), or when it is time for a new origin."""
        self._set(state="connecting")
        self._live_since = None
        if self._check is not None:
            await self._check(self.target)
        self.writer = Writer(self.target.job(*self._size, self._lives), self._config.stall_seconds, self._clock, self._progressed)
        try:
            await self.writer.drive(self._feed)
        finally:
            self._drop_edge()
            self._lives += 1

    async def _feed(self, writer: Writer) -> None:
        key = await self._join()
        if key is not None and self.form.live:  # the first packet opens the connection; what came meanwhile is old
            await self._send(writer, key)
            await writer.begun.wait()
            key = await self._join()
        if key is not None:
            await self._send(writer, key)
            await writer.begun.wait()
            self._went_live()
            while (packet := await self._edge.get()) is not None and not self._outlived(packet):
                if packet.seconds >= key.seconds:  # sound of before the first picture
                    await self._send(writer, packet)
        writer.finish()

    async def _join(self) -> Packet | None:
        """A fresh edge and the first keyframe that comes; None after close()."""
        self._drop_edge()
        self._edge = Edge(self.name, seconds=EDGE_SECONDS, sound_seconds=EDGE_SECONDS, ask_keyframe=self._ask_keyframe)
        if self._closing.is_set():
            self._edge.close()
        self._ask_keyframe()
        while (packet := await self._edge.get()) is not None and not (packet.codec == H264 and packet.keyframe):
            pass
        return packet

    async def _send(self, writer: Writer, packet: Packet) -> None:
        if self._origin is None:
            self._origin = packet.pts * FPS // packet.rate
        await writer.send(packet, self._origin)

    def _outlived(self, packet: Packet) -> bool:
        """Whether the field of the time stamps is nearly full; then the next connection counts from its own start."""
        over = self.target.kind == "rtmp" and packet.keyframe and packet.codec == H264 and packet.seconds - self._origin / FPS > FLV_SECONDS
        self._origin = None if over else self._origin
        return over

    def _drop_edge(self) -> None:
        if self._edge is not None:
            self._set(drops=self.status.drops + self._edge.drops)
        self._edge = None

    # ---- what others see

    def _set(self, **changes) -> None:
        self.status = replace(self.status, **changes)

    def _facts(self) -> dict:
        return {"output": self.name, "kind": self.target.kind, "url": self.target.shown}

    def _progressed(self, size: int) -> None:
        self._set(bytes=self.status.bytes + size, progress=self._clock())
        if self._live_since is not None and self.status.failures and self._clock() - self._live_since > STEADY_SECONDS:
            self._set(failures=0)

    def _went_live(self) -> None:
        self._connections, self._live_since = self._connections + 1, self._clock()
        self._set(state="live", reconnects=self._connections - 1)
        self.target.tidy(self._lives)
        self._report("output.live", {**self._facts(), "reconnects": self.status.reconnects})

    def _failed(self, reason: str) -> float:
        """Note a failure; the seconds to wait: exponential with full jitter (EGR-2)."""
        failures = self.status.failures + 1
        self._set(state="waiting", failures=failures, last_error=reason)
        self._report("output.down", {**self._facts(), "reason": reason, "failures": failures})
        if failures == ALERT_FAILURES:
            self._report("output.failing", {**self._facts(), "reason": reason, "failures": failures})
        longest = min(self._config.retry_limit_seconds, self._config.retry_seconds * 2 ** min(failures - 1, 30))
        return self._rng.uniform(0, longest)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
