"""What operators watch: one table of every metric, and the object through which serving reports (serving.md 15).

Labels come from bounded sets only: who was seen or heard belongs in logs. The documentation, the dashboard and the
alert rules are checked against TABLE by tests. Seconds and bytes throughout; counters grow while the process lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from liveavatar.serving.packets import CODECS, Level, Sink
from liveavatar.serving.settings import ENGINES, MODES

PREFIX = "liveavatar_"
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
prometheus_client.disable_created_metrics()  # a second series for each, which nobody asks for

SINKS = ("webrtc", "rtmp", "hls", "whip", "record", "livekit", "pipecat", "socket")
SENDERS = ("webrtc", "rtmp", "hls", "whip", "record")  # of these, those whose packets we see leave
EDGES = ("audio_in", "engine_in", "playout", "viewer", "rtmp", "hls", "whip", "record", "livekit", "pipecat", "events", "webhooks")
STAGES = ("condition", *(f"step{k}" for k in range(8)), "decode", "other")
PROCESSES = ("head", *(f"rank{n}" for n in range(64)))
FILLERS = ("schedule", "underrun", "restart", "degraded", "parked")

QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
INTERVALS = (0.01, 0.02, 0.03, 0.035, 0.038, 0.04, 0.042, 0.045, 0.05, 0.06, 0.08, 0.1, 0.2, 0.5, 1.0)
BLOCKS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.48, 0.6, 0.8, 1.0, 2.0, 5.0)
SPEECH = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
SILENCE = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)
OFFSETS = (-0.185, -0.125, -0.09, -0.06, -0.045, -0.02, 0.0, 0.02, 0.045, 0.06, 0.09, 0.125, 0.185, 0.5)  # BT.1359, R37, IS-191
STARTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of TABLE. labels: name -> what it may say; None: what Metrics was made with (groups, outputs, ...).

    join: of a gauge, how the values of several sources (sessions, queues) with equal labels become one. buckets: upper
    bounds, of a histogram.
    """

    name: str
    kind: str
    help: str
    labels: dict[str, tuple[str, ...] | None]
    buckets: tuple[float, ...] = ()
    join: Callable[[list[float]], float] = sum


def worst(values: list[float]) -> float:
    """The one farthest from 0."""
    return max(values, key=abs)


def extreme(values: list[float]) -> float:
    """The one farthest from the middle of 0..1."""
    return max(values, key=lambda value: abs(value - 0.5))


def _gauge(name: str, help: str, join: Callable = sum, **labels) -> Metric:
    return Metric(name=name, kind="gauge", help=help, labels=labels, join=join)


def _counter(name: str, help: str, **labels) -> Metric:
    return Metric(name=name, kind="counter", help=help, labels=labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], **labels) -> Metric:
    return Metric(name=name, kind="histogram", help=help, labels=labels, buckets=buckets)


TABLE = {row.name: row for row in (
    _gauge("build_info", "1, of this version.", max, version=None, commit=None),
    _gauge("sessions_active", "Sessions that run.", mode=MODES),
    _gauge("sessions_capacity", "Sessions the engine can hold in real time.", group=None),
    _counter("sessions_created_total", "Sessions opened.", mode=MODES),
    _counter("sessions_rejected_total", "Sessions refused.", reason=("capacity", "draining", "quota", "rate", "invalid", "consent", "engine")),
    _counter("sessions_ended_total", "Sessions over.", reason=("closed", "idle", "length", "drain", "failed", "consent")),
    _histogram("session_create_seconds", "From the request to a session that is ready.", STARTS, engine=ENGINES),
    _gauge("viewers_active", "Viewers and destinations connected.", sink=SINKS),
    _counter("frames_generated_total", "Pictures the engine made.", engine=ENGINES),
    _counter("frames_sent_total", "Pictures handed to a transport.", sink=SINKS),
    _counter("frames_late_total", "Of those, pictures later than their deadline by more than the dead-band.", sink=SINKS),
    _counter("frames_repeated_total", "Slots filled with an old picture.", reason=FILLERS),
    _counter("frames_dropped_total", "Pictures or packets a full queue threw away.", edge=EDGES),
    _histogram("frame_interval_seconds", "Between two pictures sent.", INTERVALS, sink=SINKS),
    _gauge("realtime_factor", "Media seconds the engine could make per second for each session at work; below 1 it falls behind.", min, group=None),
    _histogram("block_seconds", "A role's work on one block.", BLOCKS, group=None, stage=STAGES),
    _histogram("encode_seconds", "Encoding one picture or piece of sound, once for all who watch.", QUICK, codec=CODECS),
    _histogram("send_seconds", "From the playout to the transport.", QUICK, sink=SENDERS),
    _histogram("first_frame_seconds", "From the start of speech to its first picture sent.", SPEECH, engine=ENGINES),
    _histogram("time_to_silence_seconds", "From an interruption to silence.", SILENCE, sink=SINKS),
    _counter("interrupts_total", "Interruptions.", reason=("api", "audio", "livekit", "pipecat", "realtime", "viewer")),
    _counter("stale_epoch_drops_total", "What an interruption made worthless, thrown away.", edge=EDGES),
    _histogram("av_offset_seconds", "Sound minus picture as they leave, mean of a second; above 0 the sound is late.", OFFSETS, sink=SENDERS),
    _gauge("av_drift_seconds", "Change of that offset since the start, of the worst viewer or destination.", worst, sink=SENDERS),
    _counter("clock_reanchors_total", "Media clocks set anew.", reason=("late",)),
    _gauge("queue_depth", "Items in the fullest queue of this kind.", max, edge=EDGES),
    _gauge("queue_capacity", "Items that queue can hold.", max, edge=EDGES),
    _gauge("audio_buffered_seconds", "Speech that waits, of the session with the most.", max, group=None),
    _counter("audio_underruns_total", "Speech that was not there when its time came.", mode=MODES),
    _gauge("degradation_step", "0 (none) to 5, of the worst session.", max, group=None),
    _gauge("filler_active", "1 while an old or idle picture stands in.", max, output=None, reason=FILLERS),
    _counter("filler_seconds_total", "Seconds of such pictures.", output=None, reason=FILLERS),
    _gauge("output_up", "1 while a destination takes packets; 0 if one of this name does not.", min, output=None),
    _counter("output_reconnects_total", "Connections to a destination made again.", output=None),
    _counter("output_bytes_total", "Bytes a destination took.", output=None),
    _gauge("output_last_progress_timestamp_seconds", "When a destination last took a packet, Unix time.", min, output=None),
    _counter("recording_errors_total", "Recordings that broke.", reason=("disk_full", "io", "sign")),
    _histogram("webrtc_rtt_seconds", "Round trips, as viewers report them.", QUICK, sink=("webrtc",)),
    _histogram("webrtc_jitter_buffer_seconds", "Time in viewers' jitter buffers.", QUICK, sink=("webrtc",)),
    _histogram("webrtc_av_offset_seconds", "Sound minus picture as browsers play them; above 0 the sound is late.", OFFSETS, sink=("webrtc",)),
    _counter("webrtc_freezes_total", "Freezes viewers saw.", sink=("webrtc",)),
    _counter("webrtc_pli_total", "Key pictures viewers asked for.", sink=("webrtc",)),
    _counter("webrtc_packets_lost_total", "Packets viewers missed.", sink=("webrtc",)),
    _gauge("engine_up", "1 while the chain takes blocks.", min, group=None),
    _counter("engine_restarts_total", "Chains built again.", group=None, reason=("rank_failure",)),
    _histogram("engine_restore_seconds", "From a lost chain to a moving picture.", STARTS, group=None),
    _gauge("engine_last_progress_timestamp_seconds", "When the engine last gave a block, Unix time.", max, group=None),
    _gauge("identity_similarity", "Likeness to the portrait, of the worst session, 0..1.", min, output=None),
    _gauge("identity_similarity_floor", "What it must not fall below.", max),
    _gauge("frame_luma_mean", "Mean brightness of the picture farthest from mid grey, 0..1.", extreme, output=None),
    _gauge("frame_change_ratio", "Share of pixels that change within a second, of the stillest session.", min, output=None),
    _gauge("watermark_selfcheck_ratio", "Watermark bits read back right, of the worst session.", min, output=None),
    _counter("provenance_errors_total", "Marks that could not be read back, recordings not signed, lines lost to the audit log.",
             reason=("watermark", "sign", "log")),
    _counter("auth_failures_total", "Requests without right.", reason=("missing", "key", "token", "expired", "audience", "scope")),
    _counter("rate_limited_total", "Requests over a limit.",
             reason=("requests", "sessions", "offers", "viewers", "audio", "uploads", "failures", "buffer_full")),
    _counter("ssrf_blocked_total", "Addresses given by callers and refused.", reason=("scheme", "host", "address")),
    _counter("uploads_rejected_total", "Files refused.", reason=("size", "type", "decode", "pixels", "consent")),
    _counter("webhook_deliveries_total", "Events told to webhooks.", outcome=("delivered", "retried", "failed", "refused")),
    _gauge("gpu_utilization_ratio", "Share of time the GPU was at work.", max, gpu=None),
    _gauge("gpu_memory_used_bytes", "Memory in use on the GPU.", max, gpu=None),
    _gauge("gpu_temperature_celsius", "Temperature of the GPU.", max, gpu=None),
    _gauge("gpu_power_watts", "Power the GPU draws.", max, gpu=None),
    _counter("gpu_xid_errors_total", "Faults the driver reported (Xid).", gpu=None),
    _gauge("process_open_tasks", "Tasks of the event loop.", process=("head",)),
    _histogram("event_loop_lag_seconds", "How late the event loop is.", QUICK, process=("head",)),
    _gauge("draining", "1 while the server takes no more sessions.", max),
    # beyond the table of the spec: what its alerts on memory, disk and dates need
    _gauge("process_resident_bytes", "Memory a process holds: the head, or a rank as it last told.", max, process=None),
    _gauge("rank_gpu_bytes", "Memory a rank's tensors hold on its GPU, as it last told.", max, process=None),
    _gauge("disk_free_ratio", "Share of the storage folder's disk that is free.", min),
    _gauge("certificate_expiry_timestamp_seconds", "When a certificate ends, Unix time.", min, certificate=("tls", "c2pa")),
    _gauge("consent_expiry_timestamp_seconds", "When the first consent of an avatar in use ends, Unix time.", min),
)}  # fmt: skip


def sink_kind(sink: Sink) -> str:
    """The label of a sink: what stands before the colon of its name ("webrtc:4f2a", "rtmp:main"); any other is a socket."""
    kind = sink.name.split(":")[0]
    return kind if kind in SINKS else "socket"


class Metrics(Collector):
    """The metrics of one server, in a registry of their own. `count` and `observe` from any thread, the rest from one.

    groups, outputs: the chains and the configured destinations (a destination a client makes counts under its kind).
    gpus: see probes.py. A value outside a label's set is a mistake of ours: AssertionError.
    """

    def __init__(self, *, version: str, commit: str = "unknown", groups: Iterable[str] = ("0",), outputs: Iterable[str] = (),
                 gpus: Iterable[str] = ()):  # fmt: skip
        self.registry = CollectorRegistry(auto_describe=False)
        self._open = {"version": (version,), "commit": (commit,), "group": tuple(groups), "output": (*SINKS, *outputs), "gpu": tuple(gpus),
                      "process": PROCESSES}  # fmt: skip
        self.registry.register(self)  # the gauges, before the counters: what is counted as it is read is in the same scrape
        self._made = {row.name: self._make(row) for row in TABLE.values() if row.kind != "gauge"}
        self._set: dict[str, dict[tuple[str, ...], float]] = {}
        self._readers: dict[str, list[Callable]] = {}
        self._watched: list[_Watched] = []
        self.gauge("build_info", 1, version, commit)

    def allowed(self, row: Metric, label: str) -> tuple[str, ...]:
        """What this label may say here."""
        values = row.labels[label]
        return self._open[label] if values is None else values

    def _make(self, row: Metric) -> Counter | Histogram:
        more = {"buckets": row.buckets} if row.kind == "histogram" else {}
        made = (Counter if row.kind == "counter" else Histogram)(PREFIX + row.name, row.help, tuple(row.labels), registry=self.registry, **more)
        if row.kind == "counter" and len(row.labels) == 1:  # present from the start: the first event is an increase too
            for value in self.allowed(row, *row.labels):
                made.labels(value)
        return made

    def _check(self, name: str, labels: tuple[str, ...]) -> None:
        row = TABLE[name]
        assert len(labels) == len(row.labels), f"{name} has the labels {', '.join(row.labels) or 'none'}"
        for label, value in zip(row.labels, labels):
            assert value in self.allowed(row, label), f"{name}: {label}={value!r} is none of {', '.join(self.allowed(row, label))}"

    # ------------------------------------------------------------ by name; serving calls the typed methods below

    def count(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter of TABLE; labels in the order of its row."""
        self._check(name, labels)
        (self._made[name].labels(*labels) if labels else self._made[name]).inc(amount)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into a histogram of TABLE."""
        self._check(name, labels)
        assert math.isfinite(value), (name, value)
        self._made[name].labels(*labels).observe(value)

    def gauge(self, name: str, value: float | None, *labels: str) -> None:
        """Set a gauge that has one source. None: it is not exported any more."""
        self._check(name, labels)
        held = self._set.setdefault(name, {})
        held.pop(labels, None)
        if value is not None:
            held[labels] = float(value)

    def watch(self, name: str, read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]) -> Callable[[], None]:
        """Read a gauge at each scrape: `read` gives (labels, value). Several readers are joined. Returns what ends it."""
        assert TABLE[name].kind == "gauge", name
        readers = self._readers.setdefault(name, [])
        readers.append(read)
        return lambda: readers.remove(read) if read in readers else None

    def edge(self, name: str, read: Callable[[], Level]) -> Callable[[], None]:
        """Watch a queue on edge `name` (BP-1): depth and capacity of the fullest of that name; drops and stale items of all.

        Returns what ends it, to be called when the queue is gone; what it threw away until then stays counted.
        """
        self._check("queue_depth", (name,))
        self._watched.append(edge := _Watched(name, read))
        return lambda: self._end_edge(edge)

    def _end_edge(self, edge: _Watched) -> None:
        if edge in self._watched:
            self._read_edge(edge)
            self._watched.remove(edge)

    def _read_edge(self, edge: _Watched) -> Level:
        level, before = edge.read(), edge.counted
        for name, now, then in (("frames_dropped_total", level.drops, before.drops), ("stale_epoch_drops_total", level.stale, before.stale)):
            self.count(name, now - then if now >= then else now, edge.name)  # less than before: a queue in place of that one
        edge.counted = level
        return level

    def _fullest(self) -> dict[str, Level]:
        levels: dict[str, Level] = {}
        for edge in self._watched:
            level = self._read_edge(edge)
            if edge.name not in levels or level.depth / level.capacity > levels[edge.name].depth / levels[edge.name].capacity:
                levels[edge.name] = level
        return levels

    def _sampled(self, row: Metric) -> dict[tuple[str, ...], float]:
        """labels -> value of a gauge now."""
        found: dict[tuple[str, ...], list[float]] = {labels: [value] for labels, value in self._set.get(row.name, {}).items()}
        for read in self._readers.get(row.name, ()):
            for labels, value in read():
                self._check(row.name, labels)
                found.setdefault(labels, []).append(float(value))
        return {labels: row.join(values) for labels, values in found.items()}

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The gauges, read as somebody asks."""
        levels = self._fullest()
        queues = {f"queue_{part}": {(name,): getattr(level, part) for name, level in levels.items()} for part in ("depth", "capacity")}
        for row in (row for row in TABLE.values() if row.kind == "gauge"):
            if samples := queues.get(row.name) or self._sampled(row):
                family = GaugeMetricFamily(PREFIX + row.name, row.help, labels=tuple(row.labels))
                for labels, value in sorted(samples.items()):
                    family.add_metric(labels, value)
                yield family

    def exposition(self) -> bytes:
        """Everything, as CONTENT_TYPE."""
        return prometheus_client.generate_latest(self.registry)

    # ------------------------------------------------------------ sessions

    def session_created(self, mode: str, engine: str, seconds: float) -> None:
        self.count("sessions_created_total", 1, mode)
        self.observe("session_create_seconds", seconds, engine)

    def session_rejected(self, reason: str) -> None:
        self.count("sessions_rejected_total", 1, reason)

    def session_ended(self, reason: str) -> None:
        self.count("sessions_ended_total", 1, reason)

    def interrupted(self, reason: str) -> None:
        self.count("interrupts_total", 1, reason)

    def silent_after(self, sink: str, seconds: float) -> None:
        """An interruption was heard (BRG-1)."""
        self.observe("time_to_silence_seconds", seconds, sink)

    def first_frame(self, engine: str, seconds: float) -> None:
        """Speech that began was seen."""
        self.observe("first_frame_seconds", seconds, engine)

    def audio_underrun(self, mode: str) -> None:
        self.count("audio_underruns_total", 1, mode)

    def reanchored(self, reason: str) -> None:
        """A session's clock was set anew (CLK-2)."""
        self.count("clock_reanchors_total", 1, reason)

    # ------------------------------------------------------------ pictures

    def frames_generated(self, engine: str, count: int) -> None:
        self.count("frames_generated_total", count, engine)

    def frames_sent(self, sink: str, count: int = 1, *, interval: float | None = None, late: bool = False) -> None:
        """interval: seconds since the picture before. late: beyond the dead-band."""
        self.count("frames_sent_total", count, sink)
        if late:
            self.count("frames_late_total", count, sink)
        if interval is not None:
            self.observe("frame_interval_seconds", interval, sink)

    def frames_repeated(self, reason: str, count: int = 1) -> None:
        self.count("frames_repeated_total", count, reason)

    def stale_dropped(self, edge: str, count: int = 1) -> None:
        self.count("stale_epoch_drops_total", count, edge)

    def block_stage(self, group: str, stage: str, seconds: float) -> None:
        self.observe("block_seconds", seconds, group, stage)

    def encoded(self, codec: str, seconds: float) -> None:
        self.observe("encode_seconds", seconds, codec)

    def sent(self, sink: str, seconds: float) -> None:
        """From Packet.made to the transport."""
        self.observe("send_seconds", seconds, sink)

    def av_offset(self, sink: str, seconds: float) -> None:
        """seconds: above 0 the sound is late."""
        self.observe("av_offset_seconds", seconds, sink)

    # ------------------------------------------------------------ destinations

    def filler(self, output: str, reason: str, seconds: float) -> None:
        """An old or idle picture stood in for so long."""
        self.count("filler_seconds_total", seconds, output, reason)

    def output_sent(self, output: str, size: int) -> None:
        self.count("output_bytes_total", size, output)

    def output_reconnected(self, output: str, count: int = 1) -> None:
        self.count("output_reconnects_total", count, output)

    def recording_failed(self, reason: str) -> None:
        self.count("recording_errors_total", 1, reason)
        if reason == "sign":
            self.provenance_failed(reason)

    # ------------------------------------------------------------ engine

    def engine_up(self, group: str, up: bool) -> None:
        self.gauge("engine_up", up, group)

    def engine_restarted(self, group: str, reason: str) -> None:
        self.count("engine_restarts_total", 1, group, reason)

    def engine_restored(self, group: str, seconds: float) -> None:
        """A moving picture again, so long after the chain was lost."""
        self.observe("engine_restore_seconds", seconds, group)

    # ------------------------------------------------------------ right and wrong

    def auth_failed(self, reason: str) -> None:
        self.count("auth_failures_total", 1, reason)

    def rate_limited(self, reason: str) -> None:
        self.count("rate_limited_total", 1, reason)

    def ssrf_blocked(self, reason: str) -> None:
        self.count("ssrf_blocked_total", 1, reason)

    def upload_rejected(self, reason: str) -> None:
        self.count("uploads_rejected_total", 1, reason)

    def webhook(self, outcome: str) -> None:
        self.count("webhook_deliveries_total", 1, outcome)

    def provenance_failed(self, reason: str) -> None:
        self.count("provenance_errors_total", 1, reason)


class _Watched:
    """A watched queue, and what of its drops was counted."""

    def __init__(self, name: str, read: Callable[[], Level]):
        self.name, self.read, self.counted = name, read, Level(0, 1)
