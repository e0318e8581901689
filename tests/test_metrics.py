"""Metrics (serving.md 15, MET-1, MET-2, BP-1): a live scrape, stage timing of a real chain, viewers' reports, bounded labels."""

import asyncio
import math
import shutil
import subprocess
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from liveavatar.config import Config, ModelConfig, RuntimeConfig, SamplerConfig
from liveavatar.runtime.engine import Engine
from liveavatar.serving import dashboard, probes
from liveavatar.serving.metrics import PREFIX, TABLE, Level, Metrics
from liveavatar.serving.packets import H264, OPUS, Edge, Packet, Tick
from liveavatar.serving.problems import Invalid, RateLimited
from liveavatar.serving.stages import PARTS, Stages
from liveavatar.serving.traffic import watch_sink
from liveavatar.serving.viewer_report import FIELDS, RATES, Viewer


def values(metrics: Metrics) -> dict[str, float]:
    """Every sample of a scrape, e.g. queue_depth{edge="viewer"} -> 3.0, labels in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            inside = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix(PREFIX) + (f"{{{inside}}}" if inside else "")] = sample.value
    return found


def fill(metrics: Metrics) -> None:
    """One value of every metric, through the names of the table."""
    for row in TABLE.values():
        labels = [metrics.allowed(row, label)[0] for label in row.labels]
        if row.name not in ("queue_depth", "queue_capacity"):
            {"gauge": lambda: metrics.gauge(row.name, 0.5, *labels), "counter": lambda: metrics.count(row.name, 2, *labels),
             "histogram": lambda: metrics.observe(row.name, 0.04, *labels)}[row.kind]()  # fmt: skip
    metrics.edge("viewer", lambda: Level(1, 5, 0))


# ---------------------------------------------------------------- the scrape


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_a_live_scrape_passes_promtool_and_holds_the_whole_table():
    metrics = Metrics(version="1.2", commit="abc", gpus=("0",), outputs=("main",))
    fill(metrics)
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=metrics.registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            scrape = answer.read()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    done = subprocess.run(["promtool", "check", "metrics"], input=scrape, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    exported = {family.name: family.type for family in text_string_to_metric_families(scrape.decode())}
    assert exported == {PREFIX + row.name.removesuffix("_total"): row.kind for row in TABLE.values()}


def test_labels_are_bounded_and_name_nobody():
    """Never session, user, avatar or text; and a value nobody foresaw is a mistake, not another series."""
    assert not {"session", "user", "avatar", "text", "viewer", "key", "ip"} & {label for row in TABLE.values() for label in row.labels}
    metrics = Metrics(version="1")
    before = len(values(metrics))
    for wrong in (lambda: metrics.frames_sent("session-7f3a"), lambda: metrics.output_sent("rtmp://a/b", 1),
                  lambda: metrics.edge("mine", lambda: Level(0, 1, 0)), lambda: metrics.engine_up("7", True)):  # fmt: skip
        with pytest.raises(AssertionError):
            wrong()
    metrics.frames_sent("webrtc")
    assert len(values(metrics)) == before  # counters of one label are there from the start, at 0


def test_a_filled_queue_shows_and_what_it_dropped_stays_counted():
    """BP-1 through a real Edge: 5 pictures of room, 8 put. Of several queues the fullest is exported."""
    metrics, queue = Metrics(version="1"), Edge("viewer", seconds=0.2)
    picture, sound = np.zeros((2, 2, 3), np.uint8), np.zeros(1920, np.int16)
    metrics.edge("viewer", lambda: Level(1, 50, 0))
    end = metrics.edge("viewer", queue.level)
    for index in range(8):
        queue.put(Tick(index, 0, "speech", picture, sound))
    seen = values(metrics)
    assert (seen['queue_depth{edge="viewer"}'], seen['queue_capacity{edge="viewer"}']) == (5, 5)
    assert seen['frames_dropped_total{edge="viewer"}'] == 3 == queue.drops
    queue.put(Tick(8, 1, "speech", picture, sound))
    queue.flush(epoch=1)  # what an interruption makes worthless was not dropped for want of room
    end()
    end()
    seen = values(metrics)
    assert (seen['queue_depth{edge="viewer"}'], seen['frames_dropped_total{edge="viewer"}']) == (1, 4)
    assert seen['stale_epoch_drops_total{edge="viewer"}'] == 4


def test_several_sources_of_a_gauge_become_one():
    """Of drifts the worst, with its sign; of destinations that share a name one that is down; of brightness the extreme."""
    metrics = Metrics(version="1")
    for drift, up, luma in ((0.01, 1, 0.5), (-0.06, 0, 0.9), (0.03, 1, 0.2)):
        metrics.watch("av_drift_seconds", lambda drift=drift: [(("webrtc",), drift)])
        metrics.watch("output_up", lambda up=up: [(("rtmp",), up)])
        metrics.watch("frame_luma_mean", lambda luma=luma: [(("rtmp",), luma)])
    end = metrics.watch("audio_buffered_seconds", lambda: [(("0",), 9.0)])
    seen = values(metrics)
    assert (seen['av_drift_seconds{sink="webrtc"}'], seen['output_up{output="rtmp"}'], seen['frame_luma_mean{output="rtmp"}']) == (-0.06, 0, 0.9)
    assert seen['audio_buffered_seconds{group="0"}'] == 9
    end()
    assert 'audio_buffered_seconds{group="0"}' not in values(metrics)


# ---------------------------------------------------------------- the engine, watched


def test_a_chain_that_is_watched_tells_its_stages(tiny_folder, portrait):
    """Two ranks of a tiny checkpoint, no trace file: spans reach the head live and become histograms, load and a budget."""
    metrics = Metrics(version="1")
    lines: list[dict] = []

    async def talk():
        stages = Stages(metrics)
        engine = await Engine.start(
            Config(model=ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu"), sampler=SamplerConfig(steps=2),
                   runtime=RuntimeConfig(threads=1, spans=True), stages=(("condition", "step0"), ("step1", "decode"))),
            watch=lambda line: (lines.append(line), stages.note(line)))  # fmt: skip
        session = await engine.open(portrait)
        await session.push_audio(np.zeros(3 * 7680, np.float32))
        await session.end_audio()
        blocks = [out async for out in session]
        await session.close()
        await engine.aclose()
        return blocks, stages

    blocks, stages = asyncio.run(asyncio.wait_for(talk(), 120))
    seen = values(metrics)
    assert seen['frames_generated_total{engine="model"}'] == sum(len(out.pictures) for out in blocks) == 36
    for stage in ("condition", "step0", "step1", "decode"):
        assert seen[f'block_seconds_count{{group="0",stage="{stage}"}}'] == 3
    spans = [line for line in lines if line["event"] == "span" and line["what"] in ("Audio", "Block")]
    assert {(line["role"], line["rank"]) for line in spans} >= {("Conditioner", 0), ("Denoiser0", 0), ("Denoiser1", 1), ("Decoder", 1)}
    busiest = max(sum(line["end"] - line["start"] for line in lines if line["event"] == "span" and line["rank"] == rank
                      and line["what"] not in ("Open", "Close")) for rank in (0, 1))  # fmt: skip
    assert seen['realtime_factor{group="0"}'] == pytest.approx(36 / 25 / busiest, rel=1e-3)
    assert all(part > 0 for part in stages.budget().values())
    assert [rank["roles"] for rank in stages.load()] == [["condition", "step0"], ["step1", "decode"]]
    assert seen['process_resident_bytes{process="rank1"}'] > 1e6


def say(stages: Stages, event: str, t: float, session: str = "s", **more) -> None:
    stages.note({"event": event, "t": t, "session": session, **more})


def test_real_time_factor_and_budget_of_a_known_course():
    """Two sessions, a chain of two ranks of which the second works 0.3 s for each block of 0.48 s: 1.6 in all, 0.8 for each."""
    metrics, time = Metrics(version="1"), [0.0]
    stages = Stages(metrics, clock=lambda: time[0], wall=lambda: 1e9)
    say(stages, "trace", 0.0, fps=25, facts={"stages": [["condition", "step0"], ["decode"]]})
    for name in "ab":
        say(stages, "open", 0.0, name, pace="live")
        say(stages, "received", 1.0, name, stop=7680)
        say(stages, "received", 1.5, name, stop=15360)
    for block, (start, stop) in enumerate([(0, 0), (0, 7680), (7680, 15360)]):  # idle, an utterance begins, it goes on
        for name in "ab":
            t = 2.0 + block
            say(stages, "admitted", t, name, epoch=0, block=block, start=start, stop=stop)
            for role, rank, seconds in (("Conditioner", 0, 0.1), ("Denoiser0", 0, 0.15), ("Decoder", 1, 0.3)):
                say(stages, "span", t + 0.5, name, what="Block", block=block, role=role, rank=rank, start=t, end=t + seconds, rss=5, gpu=7)
            say(stages, "ready", t + 0.75, name, epoch=0, block=block, count=12)
    time[0] = 5.0
    assert stages.throughput() == pytest.approx(1.6) and stages.realtime_factor() == pytest.approx(0.8)
    assert stages.budget() == pytest.approx({"audio_wait": 2.0, "condition": 0.1, "steps": 0.15, "decode": 0.3, "transit": 0.2})
    assert tuple(stages.budget()) == PARTS and [rank["busy"] for rank in stages.load()] == pytest.approx([0.15, 0.18])
    assert values(metrics)['engine_last_progress_timestamp_seconds{group="0"}'] == 1e9
    time[0] = 100.0  # nothing lately: not measured rather than remembered
    assert stages.realtime_factor() is None and 'realtime_factor{group="0"}' not in values(metrics)


def test_ranks_that_share_a_stage():
    """runtime.shards (2, 1): the second stage is rank 2, and that is where a block goes whose last step rank 0 has done."""
    stages = Stages(Metrics(version="1"), clock=lambda: 3.0)
    say(stages, "trace", 0.0, fps=25, facts={"stages": [["condition", "step0"], ["decode"]], "shards": [2, 1]})
    say(stages, "open", 0.0, pace="live")
    say(stages, "admitted", 1.0, epoch=0, block=0, start=0, stop=7680)
    say(stages, "span", 1.5, what="Block", block=9, role="Decoder", rank=2, start=1.0, end=1.2, rss=5, gpu=7)
    for role in ("Conditioner", "Denoiser0"):
        assert [(rank["rank"], rank["roles"], rank["blocks"]) for rank in stages.load()][-1] == (2, ["decode"], 0)
        say(stages, "span", 1.5, what="Block", block=0, role=role, rank=0, start=1.0, end=1.2, rss=5, gpu=7)
    assert [(rank["rank"], rank["blocks"]) for rank in stages.load()] == [(0, 0), (2, 1)]


# ---------------------------------------------------------------- what leaves


def test_what_leaves_is_timed_and_sound_is_held_against_pictures():
    """60 ms from tick to transport; sound 20 ms early at first and, ten minutes later, 30 ms late: a drift of 50 ms."""
    metrics, now = Metrics(version="1"), [0.0]
    end = watch_sink(metrics, sender := SimpleNamespace(name="rtmp", left=None), lambda: now[0])

    def second(start: float, picture: float, sound: float) -> None:
        for tick in range(25):
            made = start + tick / 25
            for codec, rate, lag in ((OPUS, 48_000, sound), (H264, 90_000, picture)):
                now[0] = made + lag
                sender.left(Packet(codec, b"", round(made * rate), rate // 25, rate, True, 0, made))

    second(0.0, 0.06, 0.04)
    assert 'av_drift_seconds{sink="rtmp"}' not in values(metrics)
    second(600.0, 0.06, 0.09)
    seen = values(metrics)
    assert seen['av_drift_seconds{sink="rtmp"}'] == pytest.approx(0.05, abs=1e-4)
    assert [seen[f'av_offset_seconds_bucket{{le="{limit}",sink="rtmp"}}'] for limit in (-0.045, 0.0, 0.02, 0.045)] == [0, 1, 1, 2]
    assert seen['send_seconds_count{sink="rtmp"}'] == 100
    assert seen['send_seconds_sum{sink="rtmp"}'] == pytest.approx(2 * 25 * 0.06 + 25 * 0.13, abs=1e-3)
    end()
    assert 'av_drift_seconds{sink="rtmp"}' not in values(metrics)


# ---------------------------------------------------------------- viewers (MET-2)


def test_a_viewers_report_is_counted_since_the_one_before():
    metrics = Metrics(version="1")
    viewer = Viewer(metrics, begun=0.0)
    viewer.take({"framesDecoded": 120, "jitterBufferDelay": 6.0, "jitterBufferEmittedCount": 120, "freezeCount": 1, "packetsLost": 2}, 5.0)
    seen = viewer.take({"framesDecoded": 245, "jitterBufferDelay": 18.5, "jitterBufferEmittedCount": 245, "freezeCount": 2, "packetsLost": 1,
                        "roundTripTime": 0.04, "soundLate": -0.02}, 10.0)  # fmt: skip
    assert (seen.fps, seen.jitter_buffer, seen.rtt, seen.sound_late) == pytest.approx((25.0, 0.1, 0.04, -0.02))
    assert seen.counts["freezeCount"] == 1 and seen.counts["packetsLost"] == 0  # a late packet came after all
    told = values(metrics)
    assert told['webrtc_freezes_total{sink="webrtc"}'] == 2 and told['webrtc_packets_lost_total{sink="webrtc"}'] == 2
    assert told['webrtc_jitter_buffer_seconds_sum{sink="webrtc"}'] == pytest.approx(0.15)
    with pytest.raises(RateLimited):
        viewer.take({}, 10.5)
    lied = viewer.take({"freezeCount": 2**53, "roundTripTime": 1e9, "framesDecoded": 1e12}, 15.0)
    assert (lied.counts["freezeCount"], lied.rtt, lied.fps) == (10, 10.0, 50.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(), st.dictionaries(
    st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)),
    st.one_of(st.floats(), st.integers(), st.booleans(), st.text(max_size=3), st.none()), max_size=6)), max_size=4))  # fmt: skip
def test_no_report_breaks_or_bends_the_metrics(reports):
    metrics = Metrics(version="1")
    viewer, taken = Viewer(metrics, begun=0.0), 0
    for number, report in enumerate(reports, 1):
        try:
            viewer.take(report, 5.0 * number)
            taken += 1
        except Invalid:
            continue
    told = {name: value for name, value in values(metrics).items() if name.startswith("webrtc")}
    assert all(math.isfinite(value) and value >= 0 for value in told.values())
    assert told['webrtc_packets_lost_total{sink="webrtc"}'] <= RATES["packetsLost"] * 5 * max(1, len(reports))
    assert told.get('webrtc_rtt_seconds_sum{sink="webrtc"}', 0) <= 10 * taken


# ---------------------------------------------------------------- host and GPU


def test_the_event_loops_lag_and_the_host(tmp_path):
    metrics, time = Metrics(version="1"), [0.0]

    async def sleep(seconds):
        time[0] += seconds + 0.2
        if time[0] > 2:
            raise asyncio.CancelledError

    probe = probes.LoopProbe(metrics, clock=lambda: time[0], sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(probe.run())
    assert probe.lag == pytest.approx(0.2)
    probes.watch_process(metrics, tmp_path)
    seen = values(metrics)
    assert seen['event_loop_lag_seconds_sum{process="head"}'] == pytest.approx(0.4) and seen['event_loop_lag_seconds_count{process="head"}'] == 2
    assert seen['process_resident_bytes{process="head"}'] > 1e6 and 0 <= seen["disk_free_ratio"] <= 1
    assert 'process_open_tasks{process="head"}' not in seen  # no loop runs here

    async def inside():
        return values(metrics)

    assert asyncio.run(inside())['process_open_tasks{process="head"}'] == 1


def test_gpu_metrics_are_what_the_driver_says_or_absent():
    """The library's own constants and errors over a driver of two GPUs, one of which knows neither power nor Xid errors."""
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    waiting = [0, 0]  # GPUs whose Xid errors nobody asked for yet

    class Driver:
        def __getattr__(self, name):
            return getattr(nvml, name)

        def __init__(self):
            for name, value in {"DeviceGetCount": lambda: 2, "DeviceGetHandleByIndex": lambda index: index, "EventSetCreate": object,
                                "DeviceGetIndex": lambda handle: handle, "DeviceGetTemperature": lambda handle, sensor: 40 + handle,
                                "DeviceGetUtilizationRates": lambda handle: nvml.c_nvmlUtilization_t(gpu=75, memory=10),
                                "DeviceGetMemoryInfo": lambda handle: nvml.c_nvmlMemory_t(total=100, free=70, used=30)}.items():  # fmt: skip
                setattr(self, "nvml" + name, value)

        def nvmlDeviceRegisterEvents(self, handle, types, events):
            if handle == 1:
                raise nvml.NVMLError_NotSupported

        def nvmlDeviceGetPowerUsage(self, handle):
            if handle == 1:
                raise nvml.NVMLError_NotSupported
            return 250_000

        def nvmlEventSetWait_v2(self, events, timeout):
            if not waiting:
                raise nvml.NVMLError_Timeout
            return SimpleNamespace(device=waiting.pop())

    gpus = probes.Gpus(Driver())
    metrics = Metrics(version="1", gpus=gpus.names)
    gpus.watch(metrics)
    seen = values(metrics)
    assert (seen['gpu_utilization_ratio{gpu="0"}'], seen['gpu_memory_used_bytes{gpu="1"}'], seen['gpu_temperature_celsius{gpu="1"}']) == (0.75, 30, 41)
    assert seen['gpu_power_watts{gpu="0"}'] == 250 and 'gpu_power_watts{gpu="1"}' not in seen
    assert seen['gpu_xid_errors_total{gpu="0"}'] == 2  # in the scrape that learns of them


def test_without_a_gpu_nothing_of_one_is_exported():
    if probes.find_gpus() is not None:
        pytest.skip("this machine has a GPU")
    metrics = Metrics(version="1")
    assert not [name for name in values(metrics) if name.startswith("gpu_")]


# ---------------------------------------------------------------- documentation


def test_the_documentation_is_the_table():
    page = dashboard.DOCUMENT.read_text(encoding="utf-8")
    assert page == dashboard.document(page), "run: python -m liveavatar.serving.dashboard"
