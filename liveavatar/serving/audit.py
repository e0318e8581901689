"""Who did what with which face, when and for how long (18.9): a log that cannot be rewritten unseen (eventlog.py), beside the event loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from liveavatar.serving.eventlog import EventLog, LogError, Record, tail

FILE = "audit.jsonl"
FINISHED = "output.finished"  # a recording or a playlist is whole, with its SHA-256

log = structlog.get_logger("liveavatar.audit")


class Audit:
    """folder/audit.jsonl. Lines are written in order by one thread; how many come is bounded by the quotas of what they tell of.

    lost(): told of each line the disk refused; the server goes on, and says so in its log and its metrics. Raises LogError.
    """

    def __init__(self, folder: Path, lost: Callable[[], None] = lambda: None):
        self._log, self._lost = EventLog(folder / FILE), lost
        self._thread = ThreadPoolExecutor(1, "audit")

    def note(self, name: str, facts: dict) -> None:
        """It happened; returns at once."""
        self._thread.submit(self._write, name, facts)

    def _write(self, name: str, facts: dict) -> None:
        try:
            self._log.append(name, facts)
        except LogError as error:
            log.error("audit_lost", what=name, reason=str(error))
            self._lost()

    def tail(self, lines: int) -> list[Record]:
        """What happened last, oldest first. Blocks on the disk. Raises LogError."""
        return tail(self._log.path, lines)

    def close(self) -> None:
        """Write what waits and give the file free; harmless when called twice."""
        self._thread.shutdown()
        self._log.close()
