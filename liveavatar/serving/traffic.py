"""What passes through a session and out of it, told to the metrics: its queues (BP-1), and what leaves for each viewer and destination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from liveavatar.core import FPS
from liveavatar.runtime.engine import Engine
from liveavatar.serving.metrics import EDGES, SENDERS, Metrics, sink_kind
from liveavatar.serving.packets import H264, Level, Packet, Sink


def watch_session(metrics: Metrics, session, engine: Callable[[], Engine]) -> None:
    """Export the queues of a LiveSession, from speech to pictures, until it ends. engine: the one it runs on now."""

    def audio_in() -> Level:
        """Seconds; what does not fit is refused, not dropped."""
        return Level(session.speech.waiting, session.speech.limit)

    def engine_in() -> Level:
        """Blocks."""
        return Level(session.stats()["edges"]["engine"]["depth"], engine().scheduler.credits)

    def playout() -> Level:
        """Pictures. The engine's credits bound them, since a taken block is at most one more."""
        counts, most = session.playout.counts, (engine().scheduler.credits + 1) * engine().geometry.frames_per_block
        return Level(len(session.playout), most, counts.skipped, counts.stale)

    for read in (audio_in, engine_in, playout):
        session.on_end(metrics.edge(read.__name__, read))


# ---------------------------------------------------------------- what leaves


@runtime_checkable
class Queued(Protocol):
    """A Sink with a queue of its own."""

    def level(self) -> Level: ...


@runtime_checkable
class Sender(Protocol):
    """A Sink that calls `left` with each packet as it leaves for the transport."""

    left: Callable[[Packet], None]


class Departures:
    """Of one viewer or destination: how long after its tick a packet leaves, and sound against picture (send_seconds, av_offset_seconds).

    A packet's lag is the clock when it leaves less its place in the stream; the offset is the mean lag of a second's sound
    less that of its pictures. drift: that offset less the first one, seconds; None before the second.
    """

    def __init__(self, metrics: Metrics, kind: str, clock: Callable[[], float]):
        self.drift: float | None = None
        self._metrics, self._kind, self._clock, self._first = metrics, kind, clock, None
        self._forget()

    def _forget(self) -> None:
        self._lags = {"picture": (0.0, 0), "sound": (0.0, 0)}  # sum, packets

    def left(self, packet: Packet) -> None:
        """It leaves now."""
        now, track = self._clock(), "picture" if packet.codec == H264 else "sound"
        self._metrics.sent(self._kind, now - packet.made)
        total, count = self._lags[track]
        self._lags[track] = total + now - packet.seconds, count + 1
        if count + 1 >= FPS and track == "picture":
            self._compare()

    def _compare(self) -> None:
        (pictures, shown), (sounds, heard) = self._lags["picture"], self._lags["sound"]
        self._forget()
        if heard:  # else it was silent for a second, or asked for pictures alone
            offset = sounds / heard - pictures / shown
            self._metrics.av_offset(self._kind, offset)
            if self._first is None:
                self._first = offset
            else:
                self.drift = offset - self._first


def watch_sink(metrics: Metrics, sink: Sink, clock: Callable[[], float]) -> Callable[[], None]:
    """Export the queue of a sink that has one, and what leaves it. Returns what ends it, to be called when the sink is gone."""
    kind, ends = sink_kind(sink), []
    edge = "viewer" if kind == "webrtc" else kind
    if isinstance(sink, Queued) and edge in EDGES:
        ends.append(metrics.edge(edge, sink.level))
    if isinstance(sink, Sender) and kind in SENDERS:
        departures = Departures(metrics, kind, clock)
        sink.left = departures.left
        ends.append(metrics.watch("av_drift_seconds", lambda: [] if departures.drift is None else [((kind,), departures.drift)]))
    return lambda: [end() for end in ends] and None
