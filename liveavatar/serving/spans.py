"""Each block as an OpenTelemetry trace: admission to pictures, with every role's work inside (MET-1).

Like stages.py it watches the engine's notes (Engine.start, `watch`). A trace is one block, for sessions last for days
and a span is sent when it ends. Attributes: session, epoch, block, role, rank. Only `tracer` needs the extra [otel].
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from liveavatar.core import ConfigError
from liveavatar.serving.stages import stage_of

BLOCKS_KEPT = 256  # whose late spans still find them
QUEUE = 4096  # spans that may wait for the collector; beyond, the exporter drops
CLOCK_SLACK = 0.05  # s a rank's clock may seem to differ; more: another host, whose clock says nothing here


def provider(endpoint: str | None, version: str, exporter=None):
    """An OpenTelemetry TracerProvider that sends to an OTLP/HTTP collector, e.g. http://localhost:4318/v1/traces.

    exporter: instead of that one. Call its shutdown() at the end: what waits is sent. Raises ConfigError without [otel].
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"monitoring.otlp needs OpenTelemetry ({error}): pip install 'liveavatar[otel]'") from None
    made = TracerProvider(resource=Resource.create({"service.name": "liveavatar", "service.version": version}), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint), max_queue_size=QUEUE))
    return made


class Spans:
    """Makes spans of notes. tracer: of OpenTelemetry. clock, wall: the engine's seconds and Unix time, compared once."""

    def __init__(self, tracer, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self._tracer, self._offset = tracer, wall() - clock()
        self._blocks: OrderedDict[tuple[str, int], tuple] = OrderedDict()  # -> (span, when it began)
        self._opening: dict[str, object] = {}

    def note(self, line: dict) -> None:
        """A line of the trace (telemetry.FIELDS)."""
        handle = getattr(self, f"_on_{line['event']}", None)
        if handle is not None:
            handle(line)

    def _nanoseconds(self, t: float) -> int:
        return round((t + self._offset) * 1e9)

    def _begin(self, name: str, t: float, within=None, **attributes):
        from opentelemetry.trace import set_span_in_context

        context = None if within is None else set_span_in_context(within)
        named = {f"liveavatar.{key}": value for key, value in attributes.items() if value is not None}
        return self._tracer.start_span(name, context=context, attributes=named, start_time=self._nanoseconds(t))

    def _instant(self, name: str, line: dict, **attributes) -> None:
        self._begin(name, line["t"], session=line["session"], **attributes).end(self._nanoseconds(line["t"]))

    def _on_trace(self, line: dict) -> None:
        """A chain starts; what was inside the one before never arrives."""
        for key in list(self._blocks):
            self._end(key, line["t"], lost=True)
        self._blocks.clear()
        for session in list(self._opening):
            self._never_opened(session, line["t"])

    def _on_open(self, line: dict) -> None:
        self._opening[line["session"]] = self._begin("open", line["t"], session=line["session"], pace=line["pace"])

    def _on_opened(self, line: dict) -> None:
        if (span := self._opening.pop(line["session"], None)) is not None:
            span.end(self._nanoseconds(line["t"]))

    def _on_interrupt(self, line: dict) -> None:
        self._instant("interrupt", line, epoch=line["epoch"])

    def _on_step(self, line: dict) -> None:
        self._instant(line["what"], line)

    def _on_closed(self, line: dict) -> None:
        self._never_opened(line["session"], line["t"])
        self._instant("close", line)

    def _never_opened(self, session: str, t: float) -> None:
        """It ended first, if so: a portrait that was refused, a chain that died."""
        if (span := self._opening.pop(session, None)) is not None:
            span.set_attribute("liveavatar.lost", True)
            span.end(self._nanoseconds(t))

    def _on_admitted(self, line: dict) -> None:
        key = line["session"], line["block"]
        span = self._begin("block", line["t"], session=line["session"], epoch=line["epoch"], block=line["block"],
                           samples=line["stop"] - line["start"])  # fmt: skip
        self._blocks[key] = span, line["t"]
        while len(self._blocks) > BLOCKS_KEPT:
            self._end(oldest := next(iter(self._blocks)), line["t"], lost=True)
            del self._blocks[oldest]

    def _end(self, key: tuple[str, int], t: float, lost: bool = False) -> None:
        span = self._blocks[key][0]
        if span.is_recording():  # it ended when its pictures came
            if lost:
                span.set_attribute("liveavatar.lost", True)
            span.end(self._nanoseconds(t))

    def _on_ready(self, line: dict) -> None:
        if (key := (line["session"], line["block"])) in self._blocks:  # and stays, for a span that comes late
            self._end(key, line["t"])

    def _on_span(self, line: dict) -> None:
        block, began = self._blocks.get((line["session"], line["block"]), (None, None))
        start, end = self._placed(line, began)
        self._begin(stage_of(line["role"]), start, block, session=line["session"], block=line["block"], what=line["what"], role=line["role"],
                    rank=line["rank"]).end(self._nanoseconds(end))  # fmt: skip

    def _placed(self, line: dict, began: float | None) -> tuple[float, float]:
        """(start, end) on our clock: as told, or, from a host whose clock is another, so that it ends as we hear of it."""
        start, end, heard = line["start"], line["end"], line["t"]
        earliest = heard - 600.0 if began is None else began
        ours = earliest - CLOCK_SLACK <= start and end <= heard + CLOCK_SLACK
        return (start, end) if ours else (heard - (end - start), heard)
