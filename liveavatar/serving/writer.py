"""The parent's side of destination.py: one process that writes, fed within bounds, watched and killed (EGR-1)."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress

from liveavatar.core import FPS, LiveAvatarError
from liveavatar.serving import destination
from liveavatar.serving.packets import H264, Packet
from liveavatar.telemetry import now

WINDOW = 80  # packets under way to a writer, about a second: beyond it the edge fills, whose policy is known
CONNECT_SECONDS = 10.0  # for the process to start and the server to answer, where outputs.stall_seconds is less
EXIT_SECONDS = 1.0  # for a process that is ending
NOISE = 10  # of what was written since the last progress, more than this part must have been read: windows are rounded
SILENCES = 3  # times outputs.stall_seconds without any datagram from a server
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")  # no proxies, nobody's keys


class WriterFailed(LiveAvatarError):
    """The process of a destination or recording reported an error, crashed or made no progress."""


class Writer:
    """One life of a destination.py process. job: see destination.open_container. clock: seconds, monotonic.

    `sent`: packets handed over; `count`: those whose mux() came back. `delivered`: bytes of these that the far program has
    read; more of them is progress, for success of mux() alone only means that the kernel took them. Datagrams are not
    acknowledged: there RTCP and checks of consent, which come each 5 s at least, say that somebody is there. `begun` is set
    by the first report. One drive() per Writer.
    """

    def __init__(self, job: dict, stall_seconds: float, clock: Callable[[], float] = now, on_progress: Callable[[int], None] = lambda size: None):
        self.sent = self.count = self.delivered = 0
        self._job, self._stall, self._clock, self._on_progress = job, stall_seconds, clock, on_progress
        self._process: asyncio.subprocess.Process | None = None
        self._held, self._muxed, self._progress, self._heard = 0, 0, 0.0, 0.0  # muxed: bytes, when the last progress was made
        self._finishing, self._closed, self._words = False, False, ""
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
        while self.sent - self.count >= WINDOW:
            self._room.clear()
            await self._room.wait()  # a dead or stuck process makes no room: the watchdog ends the wait
        if self.sent == self.count and not self._held:
            self._progress = self._clock()  # nothing was under way: from now on something is
        self.sent += 1
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
        if (self._finishing or self.sent > self.count or self._held > 0) and time - self._progress > limit:
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
            if grown * NOISE > message["bytes"] - self._muxed:
                self.delivered, self._muxed, self._progress = self.delivered + grown, message["bytes"], time
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
        with suppress(TimeoutError):  # it has closed its end; to kill it before asyncio has noticed its exit would lose the status
            await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
        if not self._closed:
            raise WriterFailed(self._words or f"the writing process ended (exit status {self._process.returncode})")

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
            await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
