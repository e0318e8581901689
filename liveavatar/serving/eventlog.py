"""A log that cannot be altered unseen: JSON lines, each holding the hash of the line before it.

Interface, for consent.py and for the server's own audit:

    log = EventLog(path)                        # opens or makes; refuses a broken chain and a second writer
    log.append("session.opened", {"id": ...})   # written and on the disk when it returns; blocks for an fsync
    log.head                                    # (lines, hash): publish it, and cutting off the end shows too
    check(path) -> Broken | None                # the first line that is wrong; needs no lock
    log.close()

A chain shows a changed, removed, added or moved line. Who can write the file can still make all of it anew or cut its end
off: only a `head` kept elsewhere shows that, or a signature in the lines (consent.py has one).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from liveavatar.core import LiveAvatarError
from liveavatar.serving.durable import PRIVATE, flush_folder, private_folder

START = hashlib.sha256(b"liveavatar event log 1").hexdigest()  # what the first line names as the one before it
FIELDS = ("n", "t", "name", "data", "prev", "hash")
TORN = "log.torn"
TAIL_BYTES = 262_144  # of a log that are read for its last lines

logger = structlog.get_logger("liveavatar.eventlog")


class LogError(LiveAvatarError):
    """The log cannot be used: broken, held by another process, or the disk refuses."""


@dataclass(frozen=True)
class Record:
    """One line. n: its number from 0. t: Unix seconds, UTC. name: what happened. data: JSON. prev, hash: SHA-256, hex."""

    n: int
    t: float
    name: str
    data: dict
    prev: str
    hash: str


@dataclass(frozen=True)
class Broken:
    """Where a log stops being true. line: from 1, as editors count. torn: the last line was not finished (a crash)."""

    line: int
    reason: str
    torn: bool = False


def canonical(value: object) -> bytes:
    """JSON in exactly one spelling: keys sorted, no blanks, ASCII. Raises ValueError for what JSON has no word for."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def check(path: str | Path, head: tuple[int, str] | None = None) -> Broken | None:
    """The first wrong line, None when all are right. head: of an earlier time, which the log must still contain. Raises LogError."""
    previous, count = START, 0
    for record in _records(Path(path)):
        if isinstance(record, Broken):
            return record
        count, previous = record.n + 1, record.hash
        if head is not None and head[0] == count and head[1] != previous:
            return Broken(count, "is not the line that was published")
    if head is not None and count < head[0]:
        return Broken(count + 1, f"is missing: {head[0]} lines were published")
    return None


def read(path: str | Path) -> Iterator[Record]:
    """All lines in order. Raises LogError at the first wrong one."""
    for record in _records(Path(path)):
        if isinstance(record, Broken):
            raise LogError(f"{path}: line {record.line} {record.reason}")
        yield record


def head(path: str | Path) -> tuple[int, str]:
    """Lines and the hash of the last: note it elsewhere, and a cut-off end shows. Raises LogError."""
    count, last = 0, START
    for record in read(path):
        count, last = record.n + 1, record.hash
    return count, last


def tail(path: str | Path, lines: int) -> list[Record]:
    """The last few lines, oldest first, without a look at those before them: for reading, not for proof. Raises LogError."""
    try:
        with Path(path).open("rb") as file:
            whole = file.seek(0, os.SEEK_END) <= TAIL_BYTES
            file.seek(0 if whole else -TAIL_BYTES, os.SEEK_END if not whole else os.SEEK_SET)
            found = file.read().split(b"\n")[0 if whole else 1 : -1]  # what stands behind the last line's end is being written
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error.strerror}") from None
    return [Record(**json.loads(line)) for line in found[-lines:]]


class EventLog:
    """The one writer of a log; calls may come from several threads. See the module for the interface.

    path: its folder is made when missing. clock: Unix seconds. A last line that a crash left unfinished was never acknowledged: it is moved to a file
    beside the log, and both a warning and a line `log.torn` say so. Raises LogError.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time):
        self.path, self._clock, self._lock = Path(path), clock, threading.Lock()
        new = not self.path.exists()
        try:
            private_folder(self.path.parent)
            self._file = open(self.path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, PRIVATE))
            with contextlib.ExitStack() as undo:
                undo.callback(self._file.close)
                self._begin(new)
                undo.pop_all()
        except OSError as error:
            raise LogError(f"{self.path}: cannot be opened: {error.strerror}") from None

    def _begin(self, new: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LogError(f"{self.path}: another process writes to it") from None
        if new:
            flush_folder(self.path.parent)
        self._count, self._last, torn = 0, START, None
        for record in _records(self.path):
            if not isinstance(record, Broken):
                self._count, self._last = record.n + 1, record.hash
            elif record.torn:
                torn = self._set_aside()
            else:
                raise LogError(f"{self.path}: line {record.line} {record.reason}: keep the file as evidence and start a new one")
        if torn is not None:
            self.append(TORN, torn)

    def _set_aside(self) -> dict:
        """Move the unfinished last line into a file of its own."""
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        aside = self.path.with_name(f"{self.path.name}.torn-{self._count}")
        aside.write_bytes(whole[end:])
        self._file.truncate(end)
        logger.warning("the last line of a log was not finished", log=str(self.path), moved_to=aside.name)
        return {"bytes": len(whole) - end, "sha256": hashlib.sha256(whole[end:]).hexdigest(), "file": aside.name}

    @property
    def head(self) -> tuple[int, str]:
        """How many lines there are, and the hash of the last."""
        with self._lock:
            return self._count, self._last

    def append(self, name: str, data: dict) -> Record:
        """Write one line; it is on the disk when this returns. Raises LogError, then the log takes no more."""
        with self._lock:
            if self._file.closed:
                raise LogError(f"{self.path}: closed")
            body = {"n": self._count, "t": round(self._clock(), 3), "name": name, "data": data, "prev": self._last}
            line = {**body, "hash": hashlib.sha256(canonical(body)).hexdigest()}
            try:
                _write(self._file, canonical(line) + b"\n")
            except OSError as error:
                self._file.close()  # what is on the disk is unknown now: opening it again looks
                raise LogError(f"{self.path}: cannot be written: {error.strerror}") from None
            self._count, self._last = self._count + 1, line["hash"]
            return Record(**json.loads(canonical(line)))

    def close(self) -> None:
        """Give the file free; harmless when called twice."""
        with self._lock:
            self._file.close()


def _write(file, line: bytes) -> None:
    while line:
        line = line[file.write(line) :]
    os.fsync(file.fileno())


def _records(path: Path) -> Iterator[Record | Broken]:
    """The lines of a log up to and with the first wrong one."""
    try:
        with open(path, "rb") as file:
            previous = START
            for n, line in enumerate(file):
                record = _parse(n, line, previous)
                yield record
                if isinstance(record, Broken):
                    return
                previous = record.hash
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(n: int, line: bytes, previous: str) -> Record | Broken:
    if not line.endswith(b"\n"):
        return Broken(n + 1, "was not finished", torn=True)
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return Broken(n + 1, "is not JSON")
    if not isinstance(found, dict) or set(found) != set(FIELDS) or not isinstance(found["data"], dict):
        return Broken(n + 1, "is not a line of an event log")
    body = {name: value for name, value in found.items() if name != "hash"}
    if not _spelled(found, line) or found["hash"] != hashlib.sha256(canonical(body)).hexdigest():
        return Broken(n + 1, "was changed: its hash is another")
    if found["n"] != n or found["prev"] != previous:
        return Broken(n + 1, "does not follow the line before it: lines were removed, added or moved")
    return Record(**found)


def _spelled(found: dict, line: bytes) -> bool:
    """Whether the line is written as append() would; NaN and the like are not."""
    try:
        return canonical(found) + b"\n" == line
    except (ValueError, RecursionError):
        return False
