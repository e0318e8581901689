"""Traces: planted waits, underruns, offsets and leaks are found exactly; and one real run of the embedded avatar."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from conftest import speech

from liveavatar.config import Config, ModelConfig, RuntimeConfig, SamplerConfig
from liveavatar.core import Audio, InputError, Refresh, Span
from liveavatar.evaluation.traces import judge_trace, read_trace
from liveavatar.evaluation.trend import quantile, theil_sen
from liveavatar.generate import Job, generate
from liveavatar.runtime.engine import Engine
from liveavatar.telemetry import FIELDS, NoTrace, Trace

RATE, FPS, BLOCK, AHEAD = 16000, 25, 7680, 1280  # look-ahead 80 ms
LOUD, SILENT = np.full(640, 0.5, np.float32), np.zeros(640, np.float32)


class Scene:
    """A trace written by hand on a clock that only the test moves."""

    def __init__(self, path, pace="live"):
        self.path, self.time = path, 100.0
        self.trace = Trace(path, lambda: self.time, started=90.0, sample_rate=RATE, fps=FPS, samples_per_block=BLOCK, frames_per_block=12,
                           lookahead=AHEAD, facts={})
        self.trace.open("s", pace)

    def at(self, time: float):
        self.time = time
        return self.trace

    def sent(self, time: float, block: int, pts: float, count: int = 1, epoch: int = 0, due: float | None = None):
        self.at(time).note("sent", session="s", epoch=epoch, block=block, count=count, pts=pts, due=due)

    def judged(self, **options) -> dict:
        self.trace.close()
        return {m.name: m for m in judge_trace(read_trace(self.path), **options)}


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path / "trace.jsonl")


# ---------------------------------------------------------------- waits


def hear(scene, start: float, count: int, loud: bool):
    """`count` pieces of 40 ms, each received when it was spoken."""
    for k in range(count):
        scene.at(start + 0.04 * (k + 1)).received("s", 0, LOUD if loud else SILENT)


def test_the_first_picture_of_speech_is_waited_for_from_two_moments(scene):
    """480 ms of silence, then speech: block 1 speaks it and needs its own 480 ms and 80 ms more."""
    hear(scene, 100.0, 12, loud=False)
    hear(scene, 100.48, 16, loud=True)
    scene.at(100.6).admitted([Audio("s", epoch=0, index=0)], 1.0, 0.52)
    scene.sent(101.0, 0, 0.0, count=12)
    scene.at(101.04).admitted([Audio("s", epoch=0, index=1)], 1.0, 0.52)
    scene.sent(101.5, 1, 0.48, count=12)
    found = scene.judged()
    assert found["ttff_total"].value == pytest.approx(101.5 - 100.52)  # the first loud piece arrived at 100.52
    assert found["ttff_compute"].value == pytest.approx(101.5 - 101.04)  # sample 7680 + 7680 + 1280 arrived at 101.04
    assert found["ttff_cold"].value == pytest.approx(11.5) and found["open_to_idle"].value == pytest.approx(1.0)
    assert found["ttff_glass"].status == "not_measured" and found["turn_latency.p50"].status == "not_measured"


def test_a_turn_is_speech_into_a_stream_that_flows(scene):
    for block in range(4):  # idle blocks use no sample
        scene.at(100 + 0.48 * block).admitted([Audio("s", epoch=0, index=block)], 0.0, 0.0)
        scene.sent(100.3 + 0.48 * block, block, 0.48 * block, count=12)
    hear(scene, 102.0, 14, loud=True)
    scene.at(102.6).admitted([Audio("s", epoch=0, index=4)], 0.56, 0.08)
    for k in range(12):
        scene.sent(103.0 + 0.04 * k, 4, 1.92 + 0.04 * k)
    found = scene.judged()
    assert found["turn_latency.p50"].value == pytest.approx(103.0 - 102.04) and found["turn_latency.p50"].n == 1
    assert found["turn_latency.p95"].reason == "too few: 1 of 100"


def test_speech_inside_a_block_waits_for_its_own_picture(scene):
    hear(scene, 100.0, 6, loud=False)
    hear(scene, 100.24, 20, loud=True)
    scene.at(101.1).admitted([Audio("s", epoch=0, index=0)], 1.04, 0.56)
    for k in range(12):
        scene.sent(102.0 + 0.04 * k, 0, 0.04 * k)
    assert scene.judged()["ttff_total"].value == pytest.approx(102.0 + 0.24 - 100.28)


def test_changes_on_the_way_stand_where_they_are_seen(scene):
    for block in range(3):
        slices = [Refresh("s", slice=block, slices=2)] if block < 2 else []  # nothing changes before the last
        scene.at(100 + block).admitted([*slices, Audio("s", index=block)], 0.48, 0.0)
        scene.sent(100.5 + block, block, 0.48 * block, count=12)
    scene.at(103).note("step", session="s", what="portrait")  # never seen
    scene.trace.close()
    assert read_trace(scene.path).streams[0].steps() == [(0.48, "refresh")]


def test_an_interruption_forgets_what_waited(scene):
    hear(scene, 100.0, 14, loud=True)
    scene.at(100.56).admitted([Audio("s", epoch=0, index=0)], 0.56, 0.08)
    scene.sent(101.0, 0, 0.0, count=12)
    scene.at(101.0).note("played", session="s", epoch=0, pts=0.0, seconds=0.48)
    scene.at(101.2).interrupt("s", 1)
    scene.at(101.25).note("played", session="s", epoch=0, pts=0.48, seconds=0.02)
    scene.at(101.9).admitted([Audio("s", epoch=1, index=1)], 0.0, 0.0)
    scene.sent(102.0, 1, 0.48, count=12, epoch=1)
    found = scene.judged()
    assert found["time_to_silence"].value == pytest.approx(0.28)  # the first piece rings until 101.48
    assert found["time_to_fresh"].value == pytest.approx(0.8)
    assert [(line["start"], line["stop"]) for line in read_trace(scene.path).streams[0]["admitted"]] == [(0, 7680), (8960, 8960)]


# ---------------------------------------------------------------- steadiness


def test_planted_underruns_and_drops_are_recovered_exactly(scene):
    time, slot, rng, planted, longest = 100.0, 0, np.random.default_rng(1), 0, 0
    for picture in range(900):
        if picture and rng.random() < 0.03:
            gap = int(rng.integers(1, 6))
            planted, longest = planted + gap, max(longest, gap)
            for _ in range(gap):
                time, slot = time + 0.04, slot + 1
                scene.at(time).note("repeated", session="s", count=1)
        time, slot = time + 0.04, slot + 1
        scene.sent(time, picture // 12, picture / FPS, due=time)
    scene.at(time).note("dropped", session="s", count=7)
    found = scene.judged()
    assert planted > 20 and found["underruns"].value == planted and found["drops"].value == 7
    assert found["underrun_total"].value == pytest.approx(40 * planted) and found["underrun_longest"].value == 40 * longest
    assert found["underruns_per_hour"].value == pytest.approx(planted / ((900 + planted) / 25 / 3600))


def test_an_unpaced_run_says_nothing_about_underruns(tmp_path):
    scene = Scene(tmp_path / "trace.jsonl", "offline")
    scene.sent(101.0, 0, 0.0)
    assert {scene.judged()[name].status for name in ("underruns", "drops")} == {"not_measured"}


@pytest.mark.parametrize(("late", "slope"), [(0.045, 0.0), (-0.02, 0.0), (0.0, 3.0)])
def test_offset_and_drift_of_the_sound_are_recovered_with_their_sign(scene, late, slope):
    for k in range(3000):  # two minutes
        t = k / FPS
        scene.sent(100 + t, k // 12, t)
        scene.at(100 + t + late + slope / 1000 * t / 60).note("played", session="s", epoch=0, pts=t, seconds=0.04)
    found = scene.judged()
    assert found["av_offset.p50"].value == pytest.approx(1000 * late + slope, abs=0.1)
    assert found["av_drift"].value == pytest.approx(slope, abs=0.001)
    assert found["av_drift"].interval[0] - 0.001 <= slope <= found["av_drift"].interval[1] + 0.001


def test_a_leak_is_a_slope_of_the_rank_that_holds_most(scene):
    for k in range(100):
        for rank, size in ((0, 5e8), (1, 1e9 + 1e6 * k)):
            scene.at(100 + k).span(Span("s", what="Block", index=k, role="Decoder", rank=rank, start=99.9 + k, end=100.0 + k, rss=round(size), gpu=0))
    found = scene.judged()
    assert found["memory_rss.slope"].value == pytest.approx(3600)
    assert (found["memory_rss.start"].value, found["memory_rss.peak"].value) == (1000, 1099)
    assert found["memory_gpu.peak"].reason == "no GPU was used"


# ---------------------------------------------------------------- speed


def test_rates_leave_the_warm_up_out_and_find_the_worst_ten_seconds(tmp_path):
    scene, time = Scene(tmp_path / "trace.jsonl", "offline"), 100.0
    for block in range(100):
        scene.at(time).admitted([Audio("s", epoch=0, index=block)], 1.0, 0.52)
        time += 3.0 if block < 2 else 0.96 if 40 <= block < 60 else 0.24
        scene.at(time).note("ready", session="s", epoch=0, block=block, count=12)
        scene.sent(time + 0.01, block, 0.48 * block, count=12)
    found = scene.judged(warmup=2, price=3.0)
    wall = 20 * 0.96 + 77 * 0.24
    assert found["rtf_unpaced"].value == pytest.approx(97 * 0.48 / wall) and found["rtf_unpaced.worst_10s"].value == pytest.approx(0.5)
    assert found["fps"].value == pytest.approx(97 * 12 / wall) and found["warmup_latency"].value == pytest.approx(3.0)
    assert found["block_latency.p50"].value == pytest.approx(0.24) and found["block_latency.max"].value == pytest.approx(0.96)
    assert found["block_latency.p95"].reason == "too few: 98 of 100"
    assert found["floor"].value == pytest.approx(0.48 + 0.08 + 0.24)
    assert found["cost"].value == pytest.approx(3.0 / 60) and "frame_interval.p50" not in found  # pictures left by block


def test_roles_have_their_own_latency_and_percentiles_their_rule(scene):
    for k in range(1002):
        for role, seconds in (("Denoiser0", 0.1 + 1e-5 * k), ("Decoder", 0.2)):
            scene.at(100 + k).span(Span("s", what="Block", index=k, role=role, start=100.0 + k, end=100.0 + k + seconds, rss=1, gpu=0))
    found = scene.judged()
    step = found["block_latency.Denoiser0.p50"]
    assert step.value == pytest.approx(np.quantile(0.1 + 1e-5 * np.arange(2, 1002), 0.5), abs=1e-6) and step.n == 1000
    assert step.interval[0] < step.value < step.interval[1] and found["block_latency.Denoiser0.p99"].measured
    assert found["block_latency.Decoder.p95"].value == pytest.approx(0.2)


def test_theil_sen_ignores_one_odd_value_and_quantiles_interpolate():
    x = np.arange(50.0)
    y = 2 * x + 1
    y[7] = 1e6
    assert theil_sen(x, y)[0] == pytest.approx(2.0) and theil_sen(x[:4], y[:4]) is None and theil_sen(x[:5], 0 * x[:5]) == (0.0, (0.0, 0.0))
    many = np.arange(5000.0)
    assert theil_sen(many, -0.5 * many)[0] == pytest.approx(-0.5)
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5)[0] == 2.5


# ---------------------------------------------------------------- files


def test_what_is_no_trace_is_refused_with_its_line(tmp_path, scene):
    scene.trace.close()
    good = scene.path.read_text().splitlines()
    cases = {"": "empty", "{": ":1: not JSON", '{"event":"dance","t":1}': "dance", good[1]: "first line",
             f'{good[0]}\n{{"event":"closed","t":1,"session":"x"}}': ":2: session 'x' was never opened",
             f'{good[0]}\n{{"event":"closed","t":1}}': "wrong: session", f'{good[0]}\n{{"event":"closed","t":"x","session":"s"}}': "wrong: t"}
    for text, word in cases.items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(InputError, match=word):
            read_trace(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match=r"absent\.jsonl"):
        read_trace(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot write the trace"):
        Trace(tmp_path / "no" / "folder.jsonl")


def test_without_a_trace_every_note_is_forgotten():
    public = {name for name in vars(Trace) if not name.startswith("_")}
    assert public <= set(vars(NoTrace))
    NoTrace().note("sent", anything=1)


def test_an_empty_run_measures_nothing_and_breaks_nothing(scene):
    assert not [m for m in scene.judged().values() if m.measured]


# ---------------------------------------------------------------- real runs


def settings(tiny_folder, path) -> Config:
    return Config(model=ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu"), sampler=SamplerConfig(steps=2, refresh_block=2),
                  runtime=RuntimeConfig(threads=1, trace=str(path)), stages=(("condition", "step0"), ("step1", "decode")), seed=7)


def test_an_engine_writes_what_the_judge_reads(tmp_path, tiny_folder, portrait):
    async def talk():
        engine = await Engine.start(settings(tiny_folder, tmp_path / "trace.jsonl"))
        session = await engine.open(portrait)
        await session.push_audio(np.zeros(8000, np.float32))
        await session.push_audio(speech(1.5))
        await session.end_audio()
        async for out in session:
            engine.trace.sent(session.name, out.epoch, out.index, float(out.pts), out.pictures)
        await session.close()
        assert not engine.trace._heard and not engine.trace._used, "a server's sessions have no end of names"
        await engine.aclose()

    asyncio.run(asyncio.wait_for(talk(), 120))
    run = read_trace(tmp_path / "trace.jsonl")
    (stream,) = run.streams
    assert [(line["start"], line["stop"]) for line in stream["admitted"]] == [(7680 * k, min(7680 * (k + 1), 32000)) for k in range(5)]
    assert stream.steps() == [(0.96, "refresh")]
    assert {span["rank"] for span in stream["span"]} == {0, 1} and len(stream["closed"]) == 1
    assert {"Conditioner", "Denoiser0", "Denoiser1", "Decoder"} <= {span["role"] for span in stream["span"]}
    found = {m.name: m for m in judge_trace(run, warmup=1)}
    assert found["ttff_total"].value >= found["ttff_compute"].value > 0 and found["rtf_unpaced"].measured and found["fps"].measured
    assert found["block_latency.Decoder.p50"].n == 4 and found["memory_rss.peak"].value > 50
    assert found["ttff_cold"].value > found["open_to_idle"].value


def traced(tmp_path, name: str, config: Config, **job):
    path = tmp_path / f"{name}.jsonl"
    generate(dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, trace=str(path))), Job(out=tmp_path / f"{name}.mp4", **job))
    return read_trace(path)


def test_two_runs_of_a_file_are_known_to_be_equal(tmp_path, tiny_folder):
    config = dataclasses.replace(settings(tiny_folder, "unused"), stages=None)
    one, two, other = (traced(tmp_path, name, dataclasses.replace(config, seed=seed), length=1.0) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for run, value in ((two, 1.0), (other, 0.0)):
        assert next(m.value for m in judge_trace(one, again=run) if m.name == "determinism") == value


def test_the_embedded_avatar_leaves_a_whole_trace(tmp_path):
    run = traced(tmp_path, "default", Config(model=ModelConfig(device="cpu"), runtime=RuntimeConfig(threads=1)), length=2.0)
    found = {m.name: m for m in judge_trace(run, warmup=1)}
    assert all(found[name].measured for name in ("ttff_total", "ttff_compute", "ttff_cold", "open_to_idle", "fps", "rtf_unpaced", "floor"))
    assert [len([line for line in run.streams[0][event]]) for event in ("admitted", "ready", "sent", "digest")] == [5, 5, 5, 1]
    lines = [json.loads(line) for line in (tmp_path / "default.jsonl").read_text().splitlines()]
    assert all(set(line) == {"event", "t", *FIELDS[line["event"]]} for line in lines)
