"""For tests and bench/glass.py: a session that shows a clock, an aiortc peer that watches it, a page, an HTTP server.

The picture carries the millisecond at which it was made as a bar code, so whoever sees it knows how old it is. Once a
second it flashes, and that tick's sound is a beep.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from liveavatar.core import FPS
from liveavatar.serving.broadcast import Broadcast
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.packets import SOUND_RATE, TICK_SAMPLES, Tick
from liveavatar.serving.playout import Pacer
from liveavatar.serving.settings import MediaConfig
from liveavatar.telemetry import now as monotonic

WIDTH, HEIGHT, CELL = 320, 240, 10  # pixels; 32 cells of the bar code: 20 bits of milliseconds, 12 that check them
LEVEL = 0.5  # of the beep


def bar_code(milliseconds: int) -> np.ndarray:
    """uint8 [16, 320, 3]"""
    stamp = milliseconds & 0xFFFFF
    bits = stamp << 12 | _check(stamp)
    cells = [bits >> (31 - i) & 1 for i in range(32)]
    return np.repeat(np.repeat(np.array(cells, np.uint8)[None, :, None] * 255, CELL, 1), 16, 0).repeat(3, 2)


def read_bar_code(picture: np.ndarray) -> int | None:
    """Milliseconds modulo 2**20 of a picture uint8 [H, W, 3]; None if it cannot be read."""
    bits = int("".join("1" if v > 128 else "0" for v in picture[8, CELL // 2 :: CELL].mean(-1)), 2)
    return bits >> 12 if _check(bits >> 12) == bits & 0xFFF else None


def _check(stamp: int) -> int:
    return (stamp * 0x9E3779B1 & 0xFFFFFFFF) >> 20


class Card:
    """A live session of the clock, sent as a session sends. `heard` collects what push_audio got."""

    def __init__(self, name: str = "card"):
        self.id, self.index, self.heard = name, 0, []
        t = np.arange(TICK_SAMPLES) / SOUND_RATE
        self._beep = (LEVEL * 32767 * np.sin(2 * np.pi * 1000 * t)).astype(np.int16)
        self._ground = (np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) % 128 + 64).astype(np.uint8)[..., None].repeat(3, 2)
        self._encoding = ThreadPoolExecutor(1)
        self._broadcast = Broadcast(WIDTH, HEIGHT, MediaConfig(keyframe_seconds=10), self._encoding, monotonic, Metrics(version="card"))
        self.sinks, self.ask_keyframe = self._broadcast.sinks, self._broadcast.ask_keyframe
        self.add_sink, self.remove_sink = self._broadcast.add, self._broadcast.remove

    async def push_audio(self, pcm, rate, **said) -> None:
        self.heard.append((pcm, rate))

    def tick(self) -> Tick:
        """The next picture, made now."""
        flash = self.index % FPS == 0
        picture = np.roll(self._ground, 4 * self.index, 1)
        picture[:16] = bar_code(round(time.time() * 1000))
        picture[100:140] = 255 if flash else 0
        return Tick(self.index, 0, "idle", picture, self._beep if flash else np.zeros(TICK_SAMPLES, np.int16))

    async def run(self) -> None:
        pacer = Pacer(monotonic())
        while True:
            await asyncio.sleep(max(0.0, pacer.due - monotonic()))
            pacer.tick(monotonic())
            await self._broadcast.send(self.tick())
            self.index += 1


@contextlib.asynccontextmanager
async def playing(card: Card):
    """The card is on air inside."""
    task = asyncio.ensure_future(card.run())
    try:
        yield card
    finally:
        task.cancel()


class Peer:
    """An aiortc client that takes picture and sound. pictures: (clock seconds, uint8 [H, W, 3]); sound: (seconds, int16)."""

    def __init__(self, *, microphone=None, servers=(), kinds=("video", "audio"), channel: bool = True, policy=None):
        self.pictures, self.sound, self.messages, self._tasks = [], [], [], []
        options = {} if policy is None else {"iceTransportPolicy": policy}
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[RTCIceServer(**s) for s in servers], **options))
        self.pc.on("track", lambda track: self._tasks.append(asyncio.ensure_future(self._read(track))))
        for kind in kinds:
            speaks = microphone is not None and kind == "audio"
            self.pc.addTransceiver(microphone if speaks else kind, "sendrecv" if speaks else "recvonly")
        self.channel = self.pc.createDataChannel("pulse") if channel else None
        if channel:
            self.channel.on("message", self._message)

    async def offer(self) -> str:
        await self.pc.setLocalDescription(await self.pc.createOffer())
        return self.pc.localDescription.sdp

    async def accept(self, answer: str) -> None:
        await self.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def _read(self, track) -> None:
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                if track.kind == "video":
                    self.pictures.append((time.monotonic(), frame.to_ndarray(format="rgb24")))
                else:
                    self.sound.append((time.monotonic(), frame.to_ndarray()[0, ::2]))

    def loud(self) -> list[float]:
        """Clock seconds at which it heard something."""
        return [at for at, pcm in self.sound if np.abs(pcm.astype(int)).max() > 2000]

    def _message(self, text: str) -> None:
        self.messages.append(text)
        if '"ping"' in text:
            self.channel.send(text.replace("ping", "pong"))

    def vanish(self) -> None:
        """Without a word, as when the cable is pulled."""
        for transceiver in self.pc.getTransceivers():
            for protocol in transceiver.receiver.transport.transport._connection._protocols:
                protocol.transport.close()

    async def close(self) -> None:
        await self.pc.close()
        for task in self._tasks:
            task.cancel()


async def interrupted(http, session, peer: Peer, after: float = 0.5) -> tuple[float, dict]:
    """Speech for `after` s, then POST interrupt: seconds until `peer` hears nothing any more, and the answer."""
    heard, tone = len(peer.loud()), 8000 * np.sin(2 * np.pi * 220 * np.arange(6 * 16_000) / 16_000)
    await session.push_audio(tone.astype(np.int16), 16_000, end=True)
    await until(lambda: len(peer.loud()) > heard)
    await asyncio.sleep(after)
    began = time.monotonic()
    answer = await http.post(f"/v1/sessions/{session.id}/interrupt")
    await asyncio.sleep(1.0)
    return max(peer.loud()) - began, answer.json()


async def until(condition, seconds: float = 10.0) -> float:
    """Seconds until condition() holds; raises TimeoutError."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"not within {seconds} s")
        await asyncio.sleep(0.01)
    return time.monotonic() - start


def own_address() -> str | None:
    """Of this machine as others see it; None if nobody does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            return None
        return probe.getsockname()[0]


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def coturn(folder, host: str, secret: str):
    """Gives its TURN URL."""
    port = free_port(host)
    command = ["turnserver", "-n", "--listening-ip", host, "--relay-ip", host, "--listening-port", str(port),
               "--min-port", "50000", "--max-port", "50999", "--use-auth-secret", f"--static-auth-secret={secret}", "--realm=avatar.test",
               "--no-tls", "--no-dtls", "--no-cli", "--log-file=stdout", "--simple-log",
               "--pidfile", str(folder / "turn.pid"), "--db", str(folder / "turndb")]  # fmt: skip
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
    try:
        await until(lambda: process.returncode is not None or bound(host, port))
        yield f"turn:{host}:{port}?transport=udp"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def bound(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex((host, port)) == 0
