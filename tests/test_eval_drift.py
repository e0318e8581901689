"""Drift: the plan is the same for the same seed, windows are what the file shows there, and planted changes come out as planted."""

import dataclasses
import json
import wave
from itertools import pairwise

import numpy as np
import pytest
from conftest import speech

from liveavatar.conditioning.media import VideoWriter, read_audio
from liveavatar.core import ConfigError, InputError
from liveavatar.evaluation import drift
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.report import Measure

pytest.importorskip("cv2", reason="the extra [eval]")


def spoken(count: int = 5) -> np.ndarray:
    """`count` phrases of 0.4 s with 0.3 s between."""
    return np.concatenate([np.pad(speech(0.4, seed), (0, 4800)) for seed in range(count)])


def samples(path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


# ---------------------------------------------------------------- the plan


def test_windows_are_those_of_the_protocol():
    long = drift.window_starts(10_005)
    assert {0.0, 95.0, 995.0, 9995.0} <= set(long) and {60.0, 120.0, 9900.0} <= set(long)
    assert all(b - a >= 10 for a, b in pairwise(long)) and long[-1] + 10 <= 10_005
    assert drift.window_starts(60) == (0.0, 25.0, 50.0) and 95.0 in drift.window_starts(300)
    with pytest.raises(ConfigError, match="three windows"):
        drift.window_starts(20)


def test_phrases_lie_between_pauses():
    found = drift.phrases(spoken())
    assert len(found) == 5 and all(len(p) == pytest.approx(6400, abs=320) for p in found)
    assert drift.phrases(np.zeros(16000, np.float32)) == []


def test_a_plan_speaks_the_same_probe_in_every_window_and_nothing_twice_between(tmp_path):
    probe = speech(4.0, 9)
    plan = drift.write_plan(tmp_path / "a", 45.0, 3, probe, spoken(), window=5.0)
    drift.write_plan(tmp_path / "b", 45.0, 3, probe, spoken(), window=5.0)
    other = drift.write_plan(tmp_path / "c", 45.0, 4, probe, spoken(), window=5.0)
    assert (tmp_path / "a/audio.wav").read_bytes() == (tmp_path / "b/audio.wav").read_bytes() and other.sha256 != plan.sha256
    assert drift.read_plan(tmp_path / "a/plan.json") == plan
    pcm = samples(tmp_path / "a/audio.wav")
    assert len(pcm) == 45 * 16000 and len(plan.starts) == 3
    windows = [pcm[round(s * 16000) : round((s + 5) * 16000)] for s in plan.starts]
    assert all(np.array_equal(w, windows[0]) for w in windows) and np.abs(windows[0][64000:]).max() == 0
    between = [pcm[round((a + 5) * 16000) : round(b * 16000)] for a, b in zip(plan.starts, plan.starts[1:], strict=False)]
    assert all(np.abs(part).max() > 1000 for part in between) and not np.array_equal(between[0], between[1])


def test_what_is_no_plan_is_refused(tmp_path):
    with pytest.raises(InputError, match="two phrases"):
        drift.write_plan(tmp_path, 60.0, 0, speech(1.0), np.zeros(16000, np.float32))
    good = dataclasses.asdict(drift.Plan(seconds=60.0, window=10.0, seed=0, starts=(0.0, 50.0)))
    for text in ("{", json.dumps({**good, "starts": [0.0, 55.0]}), json.dumps({**good, "surprise": 1}), json.dumps({**good, "schema": "drift/0"})):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(InputError, match=r"plan\.json"):
            drift.read_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match="cannot read the plan"):
        drift.read_plan(tmp_path / "absent.json")


# ---------------------------------------------------------------- videos with planted drift


PLAN = drift.Plan(seconds=30.0, window=4.0, seed=0, starts=(0.0, 5.0, 10.0, 15.0, 20.0, 26.0))


def video(path, paint, seconds: float = 30.0, side: int = 64, jump: float | None = None):
    """A grey checkerboard that moves the same way in every window; paint(t): what is added to red, green and blue."""
    rng, pcm = np.random.default_rng(0), np.zeros(640, np.float32)
    board = (np.kron(rng.integers(0, 2, (16, 16)), np.ones((4, 4)))[..., None] * 60 + 90).repeat(3, 2)
    with VideoWriter(path, side, side) as writer:
        for k in range(round(seconds * 25)):
            t = k / 25
            moved = np.roll(board, 20 if jump is not None and t >= jump else 0, axis=1)
            moved = np.roll(moved, int(8 * np.sin(2 * np.pi * t)), axis=0)
            writer.write(np.clip(moved + paint(t), 0, 255).astype(np.uint8)[None], pcm)
    return VideoFile(path)


def judged(found):
    slopes = drift.trends(found)
    return {m.name: m for m in slopes}, {g.name: g for g in drift.gates(found, slopes)}


def test_a_steady_stream_passes(tmp_path):
    found = drift.probes(video(tmp_path / "a.mp4", lambda t: 0), PLAN)
    few = {m.name: m for m in drift.trends(found[:3])}
    assert few["picture_luma.slope"].reason == "needs 5 windows"
    trends, gates = judged(found)
    assert gates["colour change"].ok and gates["sharpness change"].ok and gates["identity change"].ok is None
    assert abs(trends["picture_luma.change"].value) < 0.5 and trends["picture_luma.change"].n == 8 and abs(trends["picture_luma.slope"].value) < 20


def test_a_colour_that_creeps_is_found_with_its_slope_and_its_worst_window(tmp_path):
    found = drift.probes(video(tmp_path / "a.mp4", lambda t: np.array([t, t, t])), PLAN)
    trends, gates = judged(found)
    assert trends["picture_luma.slope"].value == pytest.approx(1000, rel=0.03) and trends["picture_luma.slope"].unit == "/1000 s"
    assert trends["picture_luma.change"].value == pytest.approx(26, abs=1) and trends["picture_luma.change"].reason == "largest at 26 s"
    low, high = trends["picture_luma.change"].interval
    assert low < 26 < high and gates["colour change"].ok is False and drift.worst(found).start == 26.0


def test_one_bad_window_is_the_worst_probe_and_no_trend(tmp_path):
    found = drift.probes(video(tmp_path / "a.mp4", lambda t: np.array([40, 0, 0]) * (10 <= t < 14)), PLAN)
    trends, gates = judged(found)
    assert drift.worst(found).start == 10.0 and gates["colour change"].ok is False
    slope = trends["picture_a.slope"]
    assert slope.interval[0] <= 0 <= slope.interval[1]


def test_the_judge_sees_a_window_as_a_file_from_zero_and_its_gates_count(tmp_path):
    """Identity creeps by 0.02 a window and the sound by 10 ms."""
    seen = []

    def judge(window):
        times, first = zip(*[(t, p[0, 0, 0]) for t, p in window.frames()], strict=True)
        seen.append((times[0], times[-1], len(times), len(window.sound()), window.seconds))
        k = len(seen) - 1
        return [Measure(name="id_dlib", value=0.3 + 0.02 * k, unit="", better="lower", n=4),
                Measure(name="lag_ms", value=40.0 + 10.0 * k, unit="ms", better="target", n=1)]

    found = drift.probes(video(tmp_path / "a.mp4", lambda t: 0), PLAN, judge)
    assert seen == [(pytest.approx(0), pytest.approx(3.96), 100, pytest.approx(64000, abs=2), 4.0)] * 6
    trends, gates = judged(found)
    assert gates["identity change"].value == pytest.approx(0.10) and gates["identity change"].ok is False
    assert gates["lag_ms change"].value == 50 and gates["lag_ms change"].ok is False
    assert gates["offset trend"].ok is False and trends["lag_ms.slope"].value == pytest.approx(1000 * 10 / 5.2, rel=0.15)


def test_a_video_shorter_than_its_plan_is_refused(tmp_path):
    with pytest.raises(InputError, match="its plan ends at 30"):
        drift.probes(video(tmp_path / "a.mp4", lambda t: 0, seconds=10.0), PLAN)


def test_a_seam_stands_out_of_the_motion_around_it(tmp_path):
    clip = video(tmp_path / "a.mp4", lambda t: 0, seconds=6.0, jump=3.0)
    assert drift.seam(clip, 3.0) > 2 * drift.seam(clip, 2.0) and drift.seam(clip, 2.0) < 2.5
    with pytest.raises(InputError, match="no picture at 9"):
        drift.seam(clip, 9.0)


def test_the_sound_of_a_plan_is_read_back(tmp_path):
    drift.write_plan(tmp_path, 30.0, 0, speech(2.0), spoken(), window=5.0)
    assert sum(len(c) for c in read_audio(tmp_path / "audio.wav")) == 30 * 16000
