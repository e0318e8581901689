"""The one place that reads a clock for timing, and the trace of a run.

Everything that decides by time takes the time as an argument; whoever needs the present asks `now`.

A trace is a file of JSON lines, each with `event` and `t`: seconds on one monotonic clock of the host of the head.
FIELDS lists every event and what else its line must hold; `liveavatar.evaluation.traces` judges such files, and
whoever writes them for another system can have it judged too. Positions of samples count what was received in a
session, from 0, at 16 kHz; pictures count what was sent.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from liveavatar.core import SAMPLE_RATE, InputError, Message, Refresh, Span

TRACE_SCHEMA = "trace/1"
LOUD = 0.01  # of full scale: a received sample beyond it is speech
DIGEST_PICTURES = 50  # so many first pictures of a session are hashed, to tell whether two runs are equal

FIELDS = {
    # the first line: what ran. started: when the process began, in t. lookahead: samples the model needs beyond a block
    "trace": ("schema", "started", "sample_rate", "fps", "samples_per_block", "frames_per_block", "lookahead", "facts"),
    "open": ("session", "pace"),  # somebody asked for a session. pace: "live" or "offline"
    "opened": ("session",),  # its block 0 can be asked for
    # the portrait was cut to the face: left, top, right, bottom in its pixels, beyond its border too. Not there: it was framed right
    "portrait": ("session", "box"),
    # sound arrived: samples [start, stop). speech: the first and the last loud one, or null
    "received": ("session", "epoch", "start", "stop", "speech"),
    "ended": ("session",),  # no more sound will come
    # a block went down the chain with received samples [start, stop); none of them: an idle block
    "admitted": ("session", "epoch", "block", "start", "stop"),
    # a role worked on a message from start to end. what: its type. rss, gpu: bytes the rank's process holds after it
    "span": ("session", "what", "block", "role", "rank", "start", "end", "rss", "gpu"),
    "ready": ("session", "epoch", "block", "count"),  # so many pictures of a block reached the head
    # pictures left for the viewer. pts: seconds, of the first. due: t at which it should have left, null where nobody paces
    "sent": ("session", "epoch", "block", "count", "pts", "due"),
    "repeated": ("session", "count"),  # playout slots filled with an old picture, for want of a fresh one
    "dropped": ("session", "count"),  # fresh pictures that were not shown
    "played": ("session", "epoch", "pts", "seconds"),  # sound left for the viewer
    "interrupt": ("session", "epoch"),  # from now on everything of an older epoch is stale
    # from the next admitted block on something is different. what: "refresh" (of the sink), "portrait", "prompt", "restart", "quality"
    "step": ("session", "what"),
    "digest": ("session", "pictures", "sha256"),
    "closed": ("session",),
}


def now() -> float:
    """Seconds on a monotonic clock; differences mean something, the value itself does not."""
    return time.monotonic()


def process_start() -> float:
    """When this process began, on the clock of now()."""
    import psutil

    return now() - (time.time() - psutil.Process().create_time())


class NoTrace:
    """Nobody asked for a trace: every note is forgotten."""

    def _forget(self, *arguments, **values) -> None:
        return

    note = open = portrait = received = admitted = refresh = span = sent = interrupt = closed = close = _forget


class Trace:
    """Writes the trace of one engine, a line at a time, so that what was written survives a kill. Any thread.

    path: None writes no file. watch: is given each line, a dict, in the thread that notes it. facts: of the first line
    (see FIELDS). Raises InputError when the file cannot be written.
    """

    def __init__(self, path: str | Path | None, clock: Callable[[], float] = now, watch: Callable[[dict], None] | None = None, **facts):
        try:
            self._file = None if path is None else open(path, "w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InputError(f"{path}: cannot write the trace ({error.strerror})") from None
        self._clock, self._lock, self._watch = clock, threading.Lock(), watch
        self._heard: dict[str, int] = {}  # samples received, per session
        self._used: dict[str, int] = {}  # of those, samples that went down the chain or were forgotten
        self._hashed: dict[str, tuple] = {}  # session -> (hash, pictures in it)
        self.note("trace", schema=TRACE_SCHEMA, **facts)

    def note(self, event: str, **values) -> None:
        """A line of any event of FIELDS."""
        assert set(values) == set(FIELDS[event]), (event, sorted(values))
        line = {"event": event, "t": round(self._clock(), 6), **values}
        if self._file is not None:
            text = json.dumps(line, separators=(",", ":"), allow_nan=False)
            with self._lock:
                if not self._file.closed:
                    self._file.write(text + "\n")
        if self._watch is not None:
            self._watch(line)

    def open(self, session: str, pace: str) -> None:
        """Somebody asked for a session; one that had the name before is forgotten."""
        for counts in (self._heard, self._used, self._hashed):
            counts.pop(session, None)
        self.note("open", session=session, pace=pace)

    def portrait(self, session: str, box: Sequence[float] | None) -> None:
        """What of a session's portrait goes down the chain; None: all that a centre crop leaves."""
        if box is not None:
            self.note("portrait", session=session, box=[round(side, 3) for side in box])

    def received(self, session: str, epoch: int, pcm: np.ndarray) -> None:
        """pcm: float32 [n] that joined the session's queue."""
        start = self._heard.get(session, 0)
        self._heard[session] = start + len(pcm)
        loud = np.flatnonzero(np.abs(pcm) > LOUD)
        speech = [start + int(loud[0]), start + int(loud[-1])] if len(loud) else None
        self.note("received", session=session, epoch=epoch, start=start, stop=start + len(pcm), speech=speech)

    def admitted(self, messages: Sequence[Message], before: float, after: float) -> None:
        """A block was sent, with what goes before it. before, after: seconds of audio that waited before and after (silence put in is no change)."""
        *others, audio = messages
        for message in others:
            if isinstance(message, Refresh):
                self.refresh(message)
        start = self._used.get(audio.session, 0)
        self._used[audio.session] = start + max(0, round((before - after) * SAMPLE_RATE))
        self.note("admitted", session=audio.session, epoch=audio.epoch, block=audio.index, start=start, stop=self._used[audio.session])

    def refresh(self, message: Refresh) -> None:
        """Part of a new sink was sent; the pictures change behind the last."""
        if message.complete:
            self.note("step", session=message.session, what="refresh")

    def interrupt(self, session: str, epoch: int) -> None:
        """What waited was forgotten."""
        self._used[session] = self._heard.get(session, 0)
        self.note("interrupt", session=session, epoch=epoch)

    def span(self, span: Span) -> None:
        """A role's work, as its rank reported it."""
        self.note("span", session=span.session, what=span.what, block=span.index, role=span.role, rank=span.rank,
                  start=round(span.start, 6), end=round(span.end, 6), rss=span.rss, gpu=span.gpu)

    def sent(self, session: str, epoch: int, block: int, pts: float, pictures: np.ndarray, due: float | None = None) -> None:
        """pictures uint8 [n, H, W, 3] left for the viewer."""
        self.note("sent", session=session, epoch=epoch, block=block, count=len(pictures), pts=pts, due=due)
        digest, count = self._hashed.get(session) or (hashlib.sha256(), 0)
        if count < DIGEST_PICTURES and self._file is not None:  # hashing is for whoever compares files
            fresh = np.ascontiguousarray(pictures[: DIGEST_PICTURES - count])
            digest.update(fresh)
            self._hashed[session] = digest, count + len(fresh)

    def closed(self, session: str) -> None:
        """Its state is gone along the chain; what was counted of it goes too, for a server's sessions have no end of names."""
        self._heard.pop(session, None), self._used.pop(session, None)
        self.note("closed", session=session)

    def close(self) -> None:
        """The run is over. May be called often."""
        while self._hashed:
            session, (digest, count) = self._hashed.popitem()
            self.note("digest", session=session, pictures=count, sha256=digest.hexdigest())
        with self._lock:
            if self._file is not None:
                self._file.close()
