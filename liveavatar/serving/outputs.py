"""Where sessions are sent besides their viewers: RTMP, WHIP, HLS and recordings, each kept until its session or its client ends it."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from liveavatar.core import ConfigError
from liveavatar.serving.audit import FINISHED
from liveavatar.serving.background import Background
from liveavatar.serving.desk import Lease
from liveavatar.serving.durable import private_folder
from liveavatar.serving.egress import Destination, OutputStatus
from liveavatar.serving.fragments import SIDECAR, SideCar, accompany
from liveavatar.serving.problems import NotFound, RateLimited, Unprocessable
from liveavatar.serving.recorder import RECORDINGS, Recorder, Sign, expire, recover
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.signing import Seal
from liveavatar.serving.ssrf import check
from liveavatar.serving.targets import FORMS, Target
from liveavatar.serving.wire import OutputWish

MOST = 8  # of one session
BROKEN = {"recording_failed": "io", "recording_unsigned": "sign", "playlist_unsigned": "sign"}
RECORDED = "recording_finished"
HOUR, DAY = 3600.0, 86_400.0
HLS_FILE = re.compile(r"index\.m3u8|[0-9]{1,9}-(init\.mp4|[0-9]{1,20}\.m4s)|" + re.escape(SIDECAR))
HLS_SECONDS = 60.0  # a playlist stays after its end
Report = Callable[[str, dict], None]  # an event of a sink, with its facts
MEDIA_TYPES = {".m3u8": "application/vnd.apple.mpegurl", ".mp4": "video/mp4", ".m4s": "video/iso.segment", ".jws": "application/jose"}

log = structlog.get_logger("liveavatar.outputs")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """kind: rtmp, whip, hls, record. url: of the first two, with its key. token: bearer of whip. name: the client's."""

    kind: str
    name: str | None = None
    url: str | None = None
    token: str | None = None

    def __post_init__(self):
        sent = self.kind in ("rtmp", "whip")
        if (self.url is not None) != sent or (self.token is not None and self.kind != "whip"):
            raise Unprocessable(f"an output of kind {self.kind} {'needs' if sent else 'takes no'} url; token is for whip alone")


def wanted(wish: OutputWish) -> Wanted:
    """What a client asked for. Raises Unprocessable."""
    return Wanted(kind=wish.kind, name=wish.name, url=wish.url, token=wish.token and wish.token.get_secret_value())


@dataclass(eq=False, kw_only=True)
class Output:
    """One that runs or ran, of a session. sink: None when it is over, for it holds the session's pictures. folder: of its HLS files."""

    id: str
    session: str
    name: str
    kind: str
    sink: Destination | Recorder | None
    task: asyncio.Task
    folder: Path | None = None
    last: OutputStatus | None = None

    @property
    def status(self) -> OutputStatus:
        """Now, or at its end."""
        return self.last or self.sink.status


class Outputs:
    """All of one server. facts(lease): what the side-car of a recording says. recordable(lease): raises a Problem where it may
    not be recorded. sign: signs finished ones; seal: the side-cars of playlists. broke(reason): a recording did, "io", "disk_full" or "sign".
    told(name, facts): of each that is whole, with its hash, for the event log (18.9).
    """

    def __init__(self, settings: ServeConfig, *, facts: Callable[[Lease], dict], recordable: Callable[[Lease], None], sign: Sign | None,
                 seal: Seal | None = None, broke: Callable[[str], None] = lambda reason: None, told: Report = lambda name, facts: None):  # fmt: skip
        self._settings, self._facts, self._recordable, self._sign, self._seal, self._broke = settings, facts, recordable, sign, seal, broke
        self._told = told
        self._playlists = private_folder(Path(settings.storage.folder) / "hls")
        for left in self._playlists.iterdir():  # of a server that was killed
            shutil.rmtree(left)
        self._known: dict[str, Output] = {}
        self._background = Background()

    def reload(self, settings: ServeConfig) -> None:
        """Others for outputs that are started from now on."""
        self._settings = settings

    def of(self, session_id: str) -> list[Output]:
        """Those of one session, also a while after its end."""
        return [output for output in self.known() if output.session == session_id]

    def known(self) -> list[Output]:
        """Those of all sessions, also a while after their end."""
        return list(self._known.values())

    def running(self) -> list[Output]:
        """Those of all sessions that are not over."""
        return [output for output in self.known() if not output.task.done()]

    def get(self, session_id: str, output_id: str) -> Output:
        """Raises NotFound."""
        output = self._known.get(output_id)
        if output is None or output.session != session_id:
            raise NotFound("no such output")
        return output

    async def check(self, wanted: Wanted) -> None:
        """Raises Invalid, Forbidden (ssrf) for an address that nothing may be sent to."""
        if wanted.url is not None:
            await self._allowed(wanted.kind, wanted.url)

    async def _allowed(self, kind: str, url: str) -> str:
        """Where to connect: the address that was checked."""
        outputs = self._settings.outputs
        target = await check(url, FORMS[kind].schemes, hosts=outputs.hosts, private=outputs.private)
        return target.address

    async def start(self, lease: Lease, wanted: Wanted) -> Output:
        """Send the session there from now on. Raises what check() raises, RateLimited, Unprocessable, Conflict."""
        await self.check(wanted)
        if sum(output.session == lease.id for output in self.running()) >= MOST:
            raise RateLimited(f"a session has at most {MOST} outputs", kind="quota")
        lease.need_running()
        output_id = secrets.token_hex(8)
        folder = private_folder(self._playlists / output_id) if wanted.kind == "hls" else None
        report = self._reporter(lease)
        sink = self._sink(lease, wanted, folder, report)
        lease.session.add_sink(sink)
        work = _recorded(lease.session, sink) if isinstance(sink, Recorder) else sink.run()
        sidecar = None
        if folder is not None:
            facts = {"stream": output_id, "session": lease.id, "avatar": lease.wish.avatar}
            sidecar = SideCar(folder, facts, self._seal)
            work = accompany(work, sidecar, lambda reason: report("playlist_unsigned", {"reason": reason}))
        output = self._known[output_id] = Output(id=output_id, session=lease.id, name=wanted.name or wanted.kind, kind=wanted.kind, sink=sink,
                                                 folder=folder, task=self._background.spawn(work))  # fmt: skip
        output.task.add_done_callback(lambda task: self._ended(lease, output))
        if sidecar is not None:
            output.task.add_done_callback(lambda task: self._finished(lease, "hls", {"output": output_id, **sidecar.whole}))
        return output

    def _finished(self, lease: Lease, kind: str, facts: dict) -> None:
        self._told(FINISHED, {"kind": kind, "session": lease.id, "owner": lease.owner, "avatar": lease.wish.avatar, **facts})

    def _reporter(self, lease: Lease) -> Report:
        happenings = lease.session.happenings  # the lease lets go of its session when that ends, and a recording is finished after that

        def report(event: str, facts: dict) -> None:
            log.info(event, session=lease.id, **facts)
            happenings.add(event, **facts)
            if event == RECORDED:
                self._finished(lease, "record", facts)
            if event in BROKEN:
                self._broke("disk_full" if facts["reason"] == os.strerror(errno.ENOSPC) else BROKEN[event])

        return report

    def _sink(self, lease: Lease, wanted: Wanted, folder: Path | None, report: Report) -> Destination | Recorder:
        session, settings = lease.session, self._settings
        size = session.width, session.height
        if wanted.kind == "record":
            self._recordable(lease)
            return Recorder(*size, settings.storage, settings.outputs, facts=self._facts(lease), sign=self._sign, ask_keyframe=session.ask_keyframe,
                            report=report, clock=session.clock)  # fmt: skip
        try:
            target = Target(kind=wanted.kind, url=wanted.url or str(folder), token=wanted.token)
        except ConfigError as error:
            raise Unprocessable(str(error)) from None
        return Destination(wanted.kind, target, *size, settings.outputs, ask_keyframe=session.ask_keyframe, report=report, clock=session.clock,
                           check=None if folder else lambda url: self._allowed(wanted.kind, url))  # fmt: skip

    def stop(self, lease: Lease, output: Output) -> None:
        """Send what is queued and end it; harmless when it, or its session, is over."""
        if output.sink is not None:
            self._leave(lease, output)
            output.sink.close()

    def file(self, output: Output, name: str) -> tuple[Path, str]:
        """A file of an HLS output and its media type. Raises NotFound."""
        if output.folder is None or not HLS_FILE.fullmatch(name) or not (output.folder / name).is_file():
            raise NotFound("no such file")
        return output.folder / name, MEDIA_TYPES[Path(name).suffix]

    def _ended(self, lease: Lease, output: Output) -> None:
        """It sends nothing any more: nothing of it holds the session."""
        self._leave(lease, output)
        output.last, output.sink = output.sink.status, None
        if not output.task.cancelled() and output.task.exception() is not None:
            log.error("output_broke", session=lease.id, kind=output.kind, reason=type(output.task.exception()).__name__)
        asyncio.get_running_loop().call_later(HLS_SECONDS, self._forget, output)

    def _leave(self, lease: Lease, output: Output) -> None:
        if not lease.over:
            lease.session.remove_sink(output.sink)

    def _forget(self, output: Output) -> None:
        del self._known[output.id]
        if output.folder is not None:
            self._background.spawn(asyncio.to_thread(shutil.rmtree, output.folder, ignore_errors=True))

    async def housekeep(self) -> None:
        """Finish the recordings that a crash broke off; then, once an hour, remove those that are too old (REC-4)."""
        folder = private_folder(Path(self._settings.storage.folder) / RECORDINGS)
        for event, facts in await asyncio.to_thread(recover, folder, self._sign):
            log.info(event, **facts)
            if event == RECORDED:
                self._told(FINISHED, {"kind": "record", **facts})
        while True:
            for name in await asyncio.to_thread(expire, folder, time.time() - self._settings.storage.keep_days * DAY):
                log.info("recording_expired", file=name)
            await asyncio.sleep(HOUR)

    async def close(self, seconds: float) -> None:
        """The sessions are over: let recordings and playlists be finished, at most so long."""
        for output in self.running():
            output.sink.close()
        await self._background.close(seconds)


async def _recorded(session, recorder: Recorder) -> None:
    """Record, with what is spoken in the side-car."""
    notes = asyncio.create_task(_notes(session, recorder))
    try:
        await recorder.run()
    finally:
        notes.cancel()


async def _notes(session, recorder: Recorder) -> None:
    async for event in session.events():
        recorder.note(event.name, event.data)
