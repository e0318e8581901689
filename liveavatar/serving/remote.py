"""An avatar on another machine, for agents: its session API, stream socket and WHEP behind the three calls of an in-process one.

Sound owns the clock here too: every 40 ms of sound that arrives is one tick, with the picture that arrived last. What
the server tells of segments overtakes the media by its way through the network, so the end of one counts only when its
last sound had time to arrive. Needs httpx, websockets and aiortc (extra `serve`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator

import numpy as np
import structlog

from liveavatar.core import LiveAvatarError
from liveavatar.serving.packets import TICK_SAMPLES, Edge, Mark, Tick
from liveavatar.serving.stream_frames import pack

MESSAGE_SAMPLES = 100_000  # of one message, which may have 1 MB
AHEAD_SECONDS = 30.0  # of speech that waits at the server; beyond, this side waits
LAG_TICKS = 8  # from the server's word that a segment is over to its last sound here: network and jitter buffer
ANSWER_SECONDS = 10.0
EDGE_SECONDS = 0.4

log = structlog.get_logger("liveavatar.remote")


class RemoteFailed(LiveAvatarError):
    """The server cannot be reached, or has refused."""


class RemoteAvatar:
    """Client of one session, opened with `open` and ended with `close`. url: of the server; key: of its operator."""

    def __init__(self, url: str, key: str, *, avatar: str = "default"):
        self.url, self.avatar, self.epoch, self.session_id = url.rstrip("/"), avatar, 0, ""
        self._headers = {"Authorization": f"Bearer {key}"}
        self._ticks = Edge("remote", seconds=EDGE_SECONDS)
        self._picture: np.ndarray | None = None
        self._sound, self._index = np.zeros(0, np.int16), 0
        self._ahead, self._rate, self._news = 0.0, 0, asyncio.Event()
        self._said = 0  # segments that are being heard
        self._marks: deque[tuple[int, Mark]] = deque()  # (tick from which on it counts, mark)
        self._tasks: list[asyncio.Task] = []
        self._socket = self._peer = None

    # ------------------------------------------------------------ open and close

    async def open(self) -> None:
        """May be called often. Raises RemoteFailed."""
        if self.session_id:
            return
        import httpx
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        try:
            async with httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=ANSWER_SECONDS) as http:
                self.session_id = (await self._post(http, "/v1/sessions", json={"avatar_id": self.avatar})).json()["id"]
                address = f"{self.url.replace('http', 'ws', 1)}/v1/sessions/{self.session_id}/stream"
                self._socket = await connect(address, additional_headers=self._headers, subprotocols=["liveavatar.v1"])
                self._tasks.append(asyncio.create_task(self._listen()))
                await self._watch(http)
        except RemoteFailed:
            await self.close()
            raise
        except (httpx.HTTPError, OSError, WebSocketException) as error:
            await self.close()
            raise RemoteFailed(f"{self.url}: {type(error).__name__}: {error}") from None

    async def _post(self, http, path: str, **body):
        answer = await http.post(path, **body)
        if answer.status_code != 201:
            raise RemoteFailed(f"{self.url}{path}: status {answer.status_code}: {answer.text[:200]}")
        return answer

    async def _watch(self, http) -> None:
        from aiortc import RTCPeerConnection, RTCSessionDescription

        self._peer = RTCPeerConnection()
        read = {"video": self._see, "audio": self._hear}
        self._peer.on("track", lambda track: self._tasks.append(asyncio.create_task(read[track.kind](track))))
        for kind in read:
            self._peer.addTransceiver(kind, "recvonly")
        await self._peer.setLocalDescription(await self._peer.createOffer())
        answer = await self._post(http, f"/v1/sessions/{self.session_id}/whep", content=self._peer.localDescription.sdp,
                                  headers={"Content-Type": "application/sdp"})  # fmt: skip
        await self._peer.setRemoteDescription(RTCSessionDescription(answer.text, "answer"))

    async def close(self) -> None:
        """The session ends, also at the server. May be called often."""
        import httpx

        session, self.session_id = self.session_id, ""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._peer is not None:
            await self._peer.close()
        if self._socket is not None:
            await self._socket.close()
        self._ticks.close()
        if session:
            with contextlib.suppress(httpx.HTTPError):  # a server that is gone has ended it too, or its lease will
                async with httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=ANSWER_SECONDS) as http:
                    await http.delete(f"/v1/sessions/{session}")

    # ------------------------------------------------------------ speech

    async def say(self, pcm: np.ndarray, rate: int, segment: int, end: bool) -> None:
        """int16 [n] mono; waits while AHEAD_SECONDS wait at the server. Raises RemoteFailed."""
        while self._ahead > AHEAD_SECONDS:
            self._news.clear()
            await self._news.wait()
        if rate != self._rate:
            self._rate = rate
            await self._send(json.dumps({"type": "format", "rate": rate}))
        pieces = [pcm[at : at + MESSAGE_SAMPLES] for at in range(0, len(pcm), MESSAGE_SAMPLES)] or [pcm]
        for piece in pieces:
            await self._send(pack(self.epoch, segment, piece.astype("<i2").tobytes(), end=end and piece is pieces[-1]))
        self._ahead += len(pcm) / rate

    async def interrupt(self) -> int:
        """The new epoch. Raises RemoteFailed."""
        before = self.epoch
        await self._send(json.dumps({"type": "interrupt"}))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while self.epoch == before:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise RemoteFailed(f"{self.url}: no answer to an interruption") from None
        self._ahead = 0.0
        self._ticks.flush(self.epoch)
        return self.epoch

    async def _send(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise RemoteFailed(f"{self.url}: the session is over: {error}") from None

    # ------------------------------------------------------------ what the server tells

    async def _listen(self) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            while True:
                self._take(json.loads(await self._socket.recv()))
                self._news.set()
        except ConnectionClosed as error:
            log.info("remote_over", session=self.session_id, reason=str(error))
        finally:  # nobody waits for what cannot come any more
            self._ahead = 0.0
            self._news.set()
            self._ticks.close()

    def _take(self, event: dict) -> None:
        match event["type"]:
            case "epoch":
                self.epoch = event["epoch"]
                self._said = 0
                self._marks.clear()
            case "stats":
                self._ahead = event["edges"]["audio_in"]["depth"]
            case "speak.started":
                self._marks.append((self._index, Mark("started", event["segment"])))
            case "error":
                log.warning("remote_refused", code=event["code"], detail=event["detail"], segment=event.get("segment"))
            case "speak.finished" if not event["interrupted"]:
                self._marks.append((self._index + LAG_TICKS, Mark("finished", event["segment"], event["position_ms"])))

    # ------------------------------------------------------------ media

    async def _see(self, track) -> None:
        from aiortc.mediastreams import MediaStreamError

        with contextlib.suppress(MediaStreamError):  # the track has ended
            while True:
                self._picture = (await track.recv()).to_ndarray(format="rgb24")

    async def _hear(self, track) -> None:
        from aiortc.mediastreams import MediaStreamError

        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                if self._picture is None:
                    continue  # there is no tick without one: sound would pile up
                samples = frame.to_ndarray().reshape(-1, len(frame.layout.channels))
                self._sound = np.concatenate([self._sound, np.rint(samples.mean(axis=1)).astype(np.int16)])
                while len(self._sound) >= TICK_SAMPLES:
                    self._tick()

    def _tick(self) -> None:
        sound, self._sound = self._sound[:TICK_SAMPLES], self._sound[TICK_SAMPLES:]
        marks = []
        while self._marks and self._marks[0][0] <= self._index:
            marks.append(self._marks.popleft()[1])
        self._said += sum(1 if mark.name == "started" else -1 for mark in marks)
        self._ticks.put(Tick(self._index, self.epoch, "speech" if self._said else "idle", self._picture, sound, marks=tuple(marks)))
        self._index += 1

    async def ticks(self) -> AsyncIterator[Tick]:
        """25 a second, until close() or the session's end."""
        while (tick := await self._ticks.get()) is not None:
            yield tick
