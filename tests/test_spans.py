"""Each block as an OpenTelemetry trace, sent over real OTLP to a collector on loopback (MET-1)."""

import asyncio
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")

from liveavatar.config import Config, ModelConfig, RuntimeConfig, SamplerConfig
from liveavatar.core import ConfigError
from liveavatar.runtime.engine import Engine
from liveavatar.serving.spans import Spans, provider

OFFSET = 1_700_000_000.0  # Unix time at which the engine's clock of these tests says 0


class Collector:
    """An OTLP/HTTP collector: keeps the spans that are posted."""

    def __init__(self):
        self.spans, keep = [], self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self):
                keep.take(self.path, self.rfile.read(int(self.headers["Content-Length"])), self.headers.get("Content-Encoding"))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments):
                return

        self.server = HTTPServer(("127.0.0.1", 0), Answer)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def take(self, path, body, encoding):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert (path, encoding) == ("/v1/traces", None)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def facts(span) -> dict:
    """Attributes without our prefix."""
    return {pair.key.removeprefix("liveavatar."): getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def times(span) -> tuple[float, float]:
    return span.start_time_unix_nano / 1e9 - OFFSET, span.end_time_unix_nano / 1e9 - OFFSET


def sent(lines) -> list:
    """What a collector holds after these notes."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra [otel]")
    with Collector() as collector:
        made = provider(collector.url, "1")
        spans = Spans(made.get_tracer("liveavatar"), clock=lambda: 0.0, wall=lambda: OFFSET)
        for line in lines:
            spans.note(line)
        made.shutdown()
    return collector.spans


def line(event: str, t: float, **more) -> dict:
    return {"event": event, "t": t, "session": "s", **more}


def work(t: float, start: float, end: float, block: int = 4) -> dict:
    return line("span", t, what="Block", block=block, role="Denoiser1", rank=1, start=start, end=end, rss=1, gpu=0)


def test_a_block_is_a_trace_with_its_roles_inside():
    found = sent([line("open", 0.5, pace="live"), line("opened", 0.9), line("admitted", 1.0, epoch=2, block=4, start=0, stop=7680),
                  work(1.4, 1.1, 1.3), line("ready", 1.6, epoch=2, block=4, count=12), line("interrupt", 1.7, epoch=3),
                  work(1.8, 901.0, 901.1),  # late, and from a host whose clock is another
                  line("admitted", 2.0, epoch=3, block=5, start=0, stop=0), {**line("open", 2.1, pace="live"), "session": "never"},
                  {"event": "trace", "t": 9.0}])  # fmt: skip
    opened, first, block, interrupt, late, lost, never = found
    assert [span.name for span in found] == ["open", "step1", "block", "interrupt", "step1", "block", "open"]
    assert facts(never) == {"session": "never", "pace": "live", "lost": True} and times(never) == pytest.approx((2.1, 9.0), abs=1e-5)
    assert first.parent_span_id == late.parent_span_id == block.span_id and first.trace_id == block.trace_id != lost.trace_id
    assert facts(block) == {"session": "s", "epoch": 2, "block": 4, "samples": 7680}
    assert facts(first) == {"session": "s", "block": 4, "what": "Block", "role": "Denoiser1", "rank": 1}
    assert times(opened) == pytest.approx((0.5, 0.9), abs=1e-5) and times(block) == pytest.approx((1.0, 1.6), abs=1e-5)
    assert times(first) == pytest.approx((1.1, 1.3), abs=1e-5) and times(late) == pytest.approx((1.7, 1.8), abs=1e-5)
    assert facts(lost)["lost"] is True and facts(interrupt)["epoch"] == 3


def test_an_engine_is_watched_live(tiny_folder, portrait):
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra [otel]")

    async def talk(watch):
        engine = await Engine.start(
            Config(model=ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu"), sampler=SamplerConfig(steps=1),
                   runtime=RuntimeConfig(threads=1, spans=True)), watch=watch)  # fmt: skip
        session = await engine.open(portrait)
        await session.push_audio(np.zeros(2 * 7680, np.float32))
        await session.end_audio()
        _ = [out async for out in session]
        await session.close()
        await engine.aclose()

    with Collector() as collector:
        made = provider(collector.url, "1")
        asyncio.run(asyncio.wait_for(talk(Spans(made.get_tracer("liveavatar")).note), 120))
        made.shutdown()
    blocks = {facts(span)["block"]: span for span in collector.spans if span.name == "block"}
    assert set(blocks) == {0, 1}
    for number, block in blocks.items():
        inside = [span for span in collector.spans if span.parent_span_id == block.span_id]
        assert {span.name for span in inside} >= {"condition", "step0", "decode"} and {facts(span)["block"] for span in inside} == {number}
        assert all(block.start_time_unix_nano - 1e6 <= span.start_time_unix_nano <= span.end_time_unix_nano <= block.end_time_unix_nano + 1e6
                   for span in inside)  # fmt: skip


def test_without_the_extra_the_error_names_it(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("opentelemetry")] + ["opentelemetry"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"monitoring\.otlp needs OpenTelemetry.*liveavatar\[otel\]"):
        provider("http://127.0.0.1:1/v1/traces", "1")
