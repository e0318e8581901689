"""Sync, closure and landmark measures on made-up faces and sounds whose answer is known."""

import numpy as np
import pytest
from faces import made_up

from liveavatar.conditioning.phones import Phone, Utterance
from liveavatar.conditioning.visemes import expected_mouth
from liveavatar.core import SAMPLE_RATE
from liveavatar.evaluation import landmarks, series, sync
from liveavatar.evaluation.closure import closure, wilson
from liveavatar.evaluation.landmarks import Truth, distances, response

TIMES = np.arange(200) / 25
NAMES = "pau aa m iy s aa p ow t ae b uw l aa k iy m ao n p ay d b eh v aa m s ow pau".split()


def utterance(seconds=8.0, names=NAMES, seed=0) -> Utterance:
    """Phones of random lengths, and noise to be loud where they are spoken."""
    rng = np.random.default_rng(seed)
    order = [names[0], *rng.permutation(names[1:-1] * 3), names[-1]]
    lengths = rng.uniform(0.06, 0.16, len(order))
    ends = np.cumsum(lengths) * seconds / lengths.sum()
    phones = tuple(Phone(str(n), float(a), float(b)) for n, a, b in zip(order, np.r_[0, ends[:-1]], ends, strict=True))
    return Utterance((0.1 * rng.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32), phones, "", "made up")


def follows(said: Utterance, late: float = 0.0, gain: float = 0.3):
    """A face whose mouth does what the speech asks for, `late` seconds behind it."""
    gap, width = expected_mouth(said, np.clip(TIMES - late, 0, said.seconds))
    return made_up(TIMES, gap=0.01 + gain * gap, width=0.6 + 0.1 * width)


def fields(measures):
    return {m.name: m for m in measures}


# ---------------------------------------------------------------- sync


@pytest.mark.parametrize("late", [0.0, 0.2, -0.12])
def test_sync_finds_the_lag_and_its_sign(late):
    """Sound late by L is the mouth early by L: lag +L."""
    said = utterance()
    found = fields(sync.av_corr(follows(said, -late), said))
    assert found["lag_ms"].value == pytest.approx(1000 * late, abs=1)
    assert found["peak"].value > 0.95 and found["margin"].value > 0.3
    assert (found["r0"].value > 0.95) == (late == 0.0)


def test_residual_is_what_a_line_leaves():
    x = np.tile([0.0, 1, 2, 3], 24)
    y = 3 * x + np.repeat([0.5, -0.5], 48)
    rows = series.moments(x, y, np.zeros(96, int), 1)
    assert series.residual(rows[0]) == pytest.approx(0.5)


def test_sync_index_falls_with_the_shift_and_with_wrong_speech():
    said = utterance()
    values = [fields(sync.av_corr(follows(said, -late), said))["sync_index"].value for late in (0.04, 0.12, 0.24)]
    assert values[0] > values[1] > values[2] > 0
    assert values[1] / values[0] == pytest.approx(1 / (1 + 0.4**2), rel=0.1)
    wrong = fields(sync.av_corr(follows(said), utterance(seed=5)))
    assert 0 < wrong["sync_index"].value < values[2] / 3


def test_sync_interval_holds_the_value():
    said = utterance()
    found = fields(sync.av_corr(follows(said), utterance(seed=3)))["r0"]
    assert found.interval[0] < found.value < found.interval[1] and found.interval[1] - found.interval[0] > 0.05


def test_sync_of_a_still_face_is_zero():
    jitter = np.random.default_rng(1).normal(0, 0.001, len(TIMES))
    found = fields(sync.av_corr(made_up(TIMES, gap=0.02 + jitter), utterance()))
    assert found["sync_index"].value == found["r0"].value == 0 and found["r0"].reason == "no motion"
    assert not found["lag_ms"].measured


def test_a_small_face_must_move_more_to_count_as_moving():
    """A third of a pixel is nothing, at however few pixels between the eyes."""
    jitter = np.random.default_rng(1).normal(0, 0.014, len(TIMES))
    track = made_up(TIMES, gap=0.05 + jitter)
    small = landmarks.Track(TIMES, track.points / 5, track.faces)  # 20 pixels between the eyes
    assert track.gap_floor == landmarks.GAP_FLOOR and small.gap_floor == pytest.approx(0.0175)
    assert fields(sync.av_corr(small, utterance()))["r0"].reason == "no motion" != fields(sync.av_corr(track, utterance()))["r0"].reason


def test_sync_needs_speech_and_a_face():
    short = utterance(4.0)
    assert all(not m.measured and "too short" in m.reason for m in sync.av_corr(follows(short), short))
    said = utterance()
    track = follows(said)
    lost = landmarks.Track(track.times, np.full_like(track.points, np.nan), np.zeros_like(track.faces))
    assert all(not m.measured and "0 pictures" in m.reason for m in sync.av_corr(lost, said))


def test_sync_ignores_pictures_without_a_face():
    said = utterance()
    track = follows(said)
    points, faces = track.points.copy(), track.faces.copy()
    points[60:75], faces[60:75] = np.nan, 0
    assert fields(sync.av_corr(landmarks.Track(TIMES, points, faces), said))["lag_ms"].value == 0


def test_long_pauses_are_no_speech():
    said = Utterance(np.zeros(8 * SAMPLE_RATE, np.float32), (Phone("aa", 0, 3), Phone("pau", 3, 7.9), Phone("m", 7.9, 8)), "", "")
    assert sync.speech_seconds(said) == pytest.approx(3.1)
    assert sync.silent_at(said, np.array([1.0, 5.0, 7.95, 9.0])).tolist() == [False, True, False, True]


def test_offset_moves_sound():
    pcm = np.arange(1, 5, dtype=np.float32)
    assert sync.offset(pcm, 2 / SAMPLE_RATE).tolist() == [0, 0, 1, 2]
    assert sync.offset(pcm, -1 / SAMPLE_RATE).tolist() == [2, 3, 4, 0]


# ---------------------------------------------------------------- closure


def test_closure_of_exact_lips():
    said = utterance()
    shut = np.zeros(len(TIMES), bool)
    for p in said.phones:
        if p.name in "pbm":
            shut |= np.abs(TIMES - (p.start + p.end) / 2) <= 0.03
    found = fields(closure(made_up(TIMES, gap=np.where(shut, 0.005, 0.2)), said))
    assert found["closure"].value == 1 and found["closure"].interval[0] < 1
    assert abs(found["closure_lag_ms"].value) <= 30


@pytest.mark.parametrize("gap, rate", [(0.0, 1.0), (0.2, 0.0)])
def test_still_lips_gain_nothing(gap, rate):
    found = fields(closure(made_up(TIMES, gap=gap), utterance()))
    assert found["closure"].value == found["false_closure"].value == rate and found["closure_minus_false"].value == 0


def test_jitter_of_a_still_mouth_shuts_nothing():
    """Half open, so that its jitter crosses the limit: in the short suite one such face was given .47."""
    gap = 0.058 + np.random.default_rng(0).normal(0, 0.0054, len(TIMES))
    assert fields(closure(made_up(TIMES, gap=gap), utterance()))["closure_minus_false"].value == 0


def test_closure_says_what_it_cannot_judge():
    assert "no phone map" in closure(made_up(TIMES), utterance(), language="de")[0].reason
    vowels = utterance(names=["pau", "iy", "s", "pau"])
    assert "too few" in closure(made_up(TIMES), vowels)[0].reason


def test_wilson_is_known():
    low, high = wilson(1.0, 10)
    assert (low, high) == (pytest.approx(0.7225, abs=1e-3), pytest.approx(1.0))


# ---------------------------------------------------------------- landmarks


def wobble(amount=0.1):
    return 0.1 + amount * np.sin(2 * np.pi * 0.9 * TIMES) ** 2


def test_equal_faces_are_no_distance_apart():
    assert all(m.value == pytest.approx(0, abs=1e-6) for m in distances(made_up(TIMES, gap=wobble()), made_up(TIMES, gap=wobble())))


def test_distance_ignores_where_and_how_large_the_head_is():
    reference = made_up(TIMES, gap=wobble())
    z = np.exp(0.3j) * 1.7 * (reference.points[..., 0] + 1j * reference.points[..., 1]) + (50 - 20j)
    points = reference.points.copy()
    points[..., 0], points[..., 1] = z.real, z.imag
    moved = landmarks.Track(reference.times, points, reference.faces)
    assert all(m.value == pytest.approx(0, abs=1e-4) for m in distances(moved, reference))


def test_lip_distance_is_the_mean_over_lips():
    """Inner lips .1 IOD farther apart: two of forty points are .05 off."""
    found = fields(distances(made_up(TIMES, gap=wobble() + 0.1), made_up(TIMES, gap=wobble())))
    assert found["lmd"].value == pytest.approx(2 * 0.05 / 40, rel=1e-3)
    assert found["f_lmd"].value == pytest.approx(2 * 0.05 / 468, rel=1e-3) and found["lvd"].value == pytest.approx(0, abs=1e-4)


def test_lips_are_as_far_from_the_mesh_as_they_truly_are():
    """What the tracker is off by everywhere does not count, nor do points whose truth is unknown; inner lips .1 IOD farther apart do."""
    exact, judged = made_up(TIMES, gap=wobble()), made_up(TIMES, gap=wobble() + 0.1, at=(90, 50))
    mesh = exact.points[..., :2].copy()
    mesh[:, landmarks.LIPS] += (3, -2)
    truth = Truth(TIMES, {}, {k: mesh[:, k] for k in (*landmarks.LIPS, *landmarks.STABLE)})
    found = fields(landmarks.true_distances(judged, truth, exact))
    assert found["lmd_gt"].value == pytest.approx(2 * 0.05 / 40, rel=1e-3) and found["lvd_gt"].value == pytest.approx(0, abs=1e-4)
    assert found["lmd_gt_floor"].value == pytest.approx(0, abs=1e-6) and found["lvd_gt_floor"].unit == "IOD/s"
    slower = fields(landmarks.true_distances(made_up(TIMES, gap=wobble(0.05)), truth, exact))
    speed = np.abs(np.diff(wobble(0.05)[::3])).mean() / 0.12
    assert slower["lvd_gt"].value == pytest.approx(speed / 40, rel=0.1)
    alone = fields(landmarks.true_distances(judged, truth, None))
    assert set(alone) == {"lmd_gt", "lvd_gt"} and all("needs the reference" in m.reason for m in alone.values())


def test_pictures_are_paired_by_time():
    reference = made_up(TIMES, gap=wobble())
    half = landmarks.Track(TIMES[::2] + 0.004, reference.points[::2], reference.faces[::2])
    assert fields(distances(half, reference))["lmd"].value == pytest.approx(0, abs=1e-6)
    assert all("paired" in m.reason for m in distances(landmarks.Track(TIMES + 100, reference.points, reference.faces), reference))


def test_response_is_relative_to_what_the_tracker_sees_of_the_render():
    truth = Truth(TIMES, {"gap": wobble(), "blink": -0.1 * np.ones(len(TIMES))})
    reference, judged = made_up(TIMES, gap=0.6 * wobble()), made_up(TIMES, gap=0.3 * wobble())
    found = fields(response(judged, truth, reference))
    assert found["response_gap_r"].value == pytest.approx(1, abs=1e-6)
    assert found["response_gap_slope"].value == pytest.approx(0.5, rel=1e-3)
    assert found["response_gap_slope"].interval == pytest.approx((0.5, 0.5), rel=1e-3)
    assert "does not move" in found["response_blink_r"].reason
    assert "own gain" in fields(response(judged, truth, None))["response_gap_slope"].reason
    still = fields(response(made_up(TIMES, gap=0.1), truth, reference))
    assert still["response_gap_r"].value == 0 and still["response_gap_slope"].value == pytest.approx(0, abs=1e-6)


def test_block_intervals_cover_independent_noise():
    """95 % intervals of a mean hold the truth in about 95 % of 60 draws."""
    times, held = np.arange(500) / 25, 0
    for seed in range(60):
        low, high = series.mean_interval(times, np.random.default_rng(seed).normal(2.0, 1.0, len(times)))
        held += low <= 2.0 <= high
    assert 50 <= held <= 60
    assert series.mean_interval(times[:10], np.ones(10)) is None


def test_correlation_and_slope_are_numpys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 100))
    block, count = series.block_of(np.arange(100) / 25)
    m = series.moments(x, y, block, count)
    assert series.correlation(m.sum(0)) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert series.slope(m.sum(0)) == pytest.approx(np.polyfit(x, y, 1)[0])
    assert np.isnan(series.correlation(series.moments(np.ones(100), y, block, count).sum(0)))
