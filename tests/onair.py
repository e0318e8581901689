"""What stands for a session where its packets are tested: moving pictures and beeps, encoded once for all sinks, on the clock."""

from __future__ import annotations

import asyncio
import socket
import ssl
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import av
import numpy as np

from liveavatar.serving.encoder import AacEncoder, OpusEncoder, VideoEncoder
from liveavatar.serving.packets import TICK_SAMPLES, Tick
from liveavatar.serving.settings import MediaConfig
from liveavatar.telemetry import now

SIZE = 64
EVENT_EVERY = 25  # ticks from flash to flash


def moving_tick(index: int, *, event: bool = False, size: int = SIZE, noise: int = 0, epoch: int | None = None) -> Tick:
    """A grey picture with a bar that moves, silence; at an event a white picture, and a click on the first samples.

    noise: so many rows of it, for bits.
    """
    picture, sound = np.full((size, size, 3), 60, np.uint8), np.zeros(TICK_SAMPLES, np.int16)
    picture[:, index % size] = (200, 30, 90)
    if noise:
        picture[:noise] = np.random.default_rng(index).integers(0, 256, (noise, size, 3))
    if event:
        picture[:], sound[:24] = 255, 20_000
    return Tick(index=index, epoch=index // 50 if epoch is None else epoch, kind="speech", picture=picture, sound=sound)


class Station:
    """Encodes ticks and hands each packet to the sinks that want it, as LiveSession does."""

    def __init__(self, *, size: int = SIZE, noise: int = 0, first: int = 0, **media):
        config = MediaConfig(**{"encoder": "libx264", "preset": "ultrafast", "keyframe_seconds": 1.0, **media})
        self.video = VideoEncoder(size, size, config)
        self.sound = (AacEncoder(config), OpusEncoder(config))
        self.sinks, self.epoch, self.asked = [], 0, 0
        self._size, self._noise, self._ticks, self._key = size, noise, count(first), False

    def ask_keyframe(self) -> None:
        self._key, self.asked = True, self.asked + 1

    def tick(self) -> None:
        index = next(self._ticks)
        tick = moving_tick(index, event=index % EVENT_EVERY == EVENT_EVERY - 1, size=self._size, noise=self._noise, epoch=self.epoch)
        key, self._key = self._key, False
        for packet in (*self.video.encode(tick, now(), key), *(p for encoder in self.sound for p in encoder.encode(tick))):
            for sink in self.sinks:
                if packet.codec in sink.wants:
                    sink.put(packet)

    async def play(self, until, seconds: float = 15.0, speed: float = 1.0) -> float:
        """Ticks on time until until() holds; the seconds that took. Fails after `seconds`."""
        start = now()
        for n in count():
            if until():
                return now() - start
            assert now() - start < seconds, "it never happened"
            self.tick()
            await asyncio.sleep(max(0.0, start + n / 25 / speed - now()))


def events(path: str) -> tuple[list[float], list[float]]:
    """Seconds of the flashes seen and of the clicks heard in whatever FFmpeg opens; a run of bright pictures is one flash."""
    bright, heard, last = [], [], -1.0
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if frame.reformat(format="gray").to_ndarray().mean() > 200:
                bright.append(frame.time)
    with av.open(path) as container:
        for frame in container.decode(audio=0):
            for at in np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.2):
                if (t := frame.time + at / frame.sample_rate) - last > 0.1:
                    heard.append(t)
                    last = t
    return bright, heard


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tls_server(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """An authority of our own, its certificate as a PEM file, and what a server called `name` speaks TLS with."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certificate(subject: str, key, extension, path: Path) -> Path:
        today, named = datetime.now(UTC), lambda text: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])
        builder = x509.CertificateBuilder(named("Authority"), named(subject), key.public_key(), x509.random_serial_number(),
                                          today - timedelta(days=1), today + timedelta(days=1))  # fmt: skip
        path.write_bytes(builder.add_extension(extension, critical=True).sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path

    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = certificate("Authority", root, x509.BasicConstraints(ca=True, path_length=0), folder / "authority.pem")
    chain = certificate(name, leaf, x509.SubjectAlternativeName([x509.DNSName(name)]), folder / "chain.pem")
    (folder / "key.pem").write_bytes(leaf.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, folder / "key.pem")
    return authority, context
