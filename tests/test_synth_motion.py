import re
import shutil
import time

import numpy as np
import pytest

from liveavatar.conditioning import visemes
from liveavatar.conditioning.phones import PHONES, VOWELS, AlignmentError, Phone, Utterance, align
from liveavatar.conditioning.visemes import ARKIT_UNITS, lip_gap, loudness
from liveavatar.training.data import load_readings
from liveavatar.training.synth import director, speech
from liveavatar.training.synth.director import direct

needs_flite = pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed (apt install flite)")


def spoken(names, length=0.11):
    """An utterance of equal phones with a buzz that is loud in vowels."""
    phones = tuple(Phone(n, k * length, (k + 1) * length) for k, n in enumerate(names))
    t = np.arange(round(len(names) * length * speech.RATE)) / speech.RATE
    level = np.array([{True: 0.3, False: 0.05}[n in VOWELS] for n in names])
    pcm = level[np.minimum((t / length).astype(int), len(names) - 1)] * np.sign(np.sin(2 * np.pi * 120 * t))
    return Utterance(pcm.astype(np.float32), phones, "", "buzz")


def gap_at(u, track, fps, names):
    g = lip_gap(track.units)
    return [g[min(round((p.start + p.end) / 2 * fps), len(g) - 1)] for p in u.phones if p.name in names]


@pytest.fixture(scope="module")
def clips():
    if not shutil.which("flite"):
        pytest.skip("flite is not installed (apt install flite)")
    return [speech.synthesize(s, 4.0) for s in range(10)]


def test_units_are_named():
    assert len(ARKIT_UNITS) == 52 and len(set(ARKIT_UNITS)) == 52
    for row in visemes.viseme_table()["arkit"].values():
        for name in row:
            for n in (name[:-1] + "Left", name[:-1] + "Right") if name.endswith("+") else (name,):
                assert n in ARKIT_UNITS
    assert set(visemes.viseme_table()["shapes"]) == PHONES


def test_lip_gap_per_class():
    gaps = {}
    for cls, row in visemes.viseme_table()["classes"].items():
        if cls == "pause":
            continue
        for p in row["phones"]:
            u = spoken(["pau", "ah", p, "ah", p, "ah", "pau"])
            gaps.setdefault(cls, []).extend(gap_at(u, direct(u, 100, 1, fps=100), 100, {p})[-2:] if p == "ah" else gap_at(u, direct(u, 100, 1, fps=100), 100, {p}))
    g = {k: float(np.mean(v)) for k, v in gaps.items()}
    assert g["pbm"] < 0.03
    assert g["pbm"] < g["fv"] < g["tdnl"] < g["ah"] < g["eh"] < g["aa"]
    assert g["sz"] < g["ih"] < g["ae"]
    assert g["w"] < g["uw"] < g["ow"] < g["ao"]
    assert g["aa"] > 0.4


def test_rest_is_closed():
    track = direct(speech.silence(2.0), 50, 3)
    assert lip_gap(track.units).max() < 0.02
    assert track.units.dtype == np.float32 and track.units.shape == (50, 52)
    assert track.articulators.shape == (50, 8) and track.pose.shape == (50, 3)


def test_frames_past_the_audio_are_silent():
    u = spoken(["pau", "aa", "aa", "pau"])
    assert lip_gap(direct(u, 75, 0).units)[40:].max() < 0.03


def test_closure_lag_is_zero():
    u = spoken(["pau", "aa", "aa", "m", "aa", "aa", "pau"], 0.12)
    close = direct(u, 100, 0, fps=100).articulators[:, visemes.CLOSE]
    inside = slice(15, 70)
    assert abs(np.argmax(close[inside]) + 15 - 100 * 3.5 * 0.12) <= 1


def test_blinks():
    rng = np.random.default_rng(0)
    blinks = director.blink_times(rng, 3000.0)
    gaps = np.diff([t for t, _ in blinks])
    assert gaps.min() >= 1.2 and 2.9 < gaps.mean() < 3.9
    lengths = np.array([n for _, n in blinks])
    assert lengths.min() >= 0.12 and lengths.max() <= 0.20
    lid = direct(speech.silence(60.0), 6000, 4, fps=100).units[:, ARKIT_UNITS.index("eyeBlinkLeft")]
    peaks = np.flatnonzero((lid[1:-1] > 0.95) & (lid[1:-1] >= lid[:-2]) & (lid[1:-1] > lid[2:])) + 1
    assert 8 <= len(peaks) <= 30
    falls, rises = [], []
    for p in peaks[(peaks > 30) & (peaks < 5970)]:
        falls.append(next(k for k in range(30) if lid[p - k] < 0.5))
        rises.append(next(k for k in range(30) if lid[p + k] < 0.5))
    assert np.mean(falls) < np.mean(rises)
    seen = direct(speech.silence(60.0), 1500, 4).units[:, ARKIT_UNITS.index("eyeBlinkLeft")]
    assert seen.max() > 0.99  # a closed frame at 25 fps, too


def test_head_motion_is_small():
    poses = np.concatenate([direct(speech.silence(30.0), 750, s).pose for s in range(8)])
    assert np.all(np.abs(poses.std(0) / np.array([3.0, 2.0, 1.2]) - 1) < 0.25)
    calm = direct(speech.silence(30.0), 750, 1, behaviour=director.Behaviour(head_sigma=(0, 0, 0)))
    assert np.abs(calm.pose).max() == 0


def test_augment_keeps_time():
    u = spoken(["pau", "aa", "m", "iy", "s", "aa", "pau"])
    for seed in range(6):
        y = speech.augment(u.pcm, seed)
        assert y.dtype == np.float32 and y.shape == u.pcm.shape and np.abs(y).max() <= 1
        assert np.array_equal(y, speech.augment(u.pcm, seed))
        t = np.arange(0, u.seconds, 0.005)
        a, b = loudness(u.pcm, t, 0.02), loudness(y, t, 0.02)
        a, b = a - a.mean(), b - b.mean()
        lags = range(-8, 9)
        c = [np.dot(a[8:-8], np.roll(b, -k)[8:-8]) for k in lags]
        assert abs(list(lags)[int(np.argmax(c))]) <= 1


@needs_flite
def test_synthesize_is_exact_and_repeats(clips):
    again = speech.synthesize(3, 4.0)
    assert np.array_equal(again.pcm, clips[3].pcm) and again.phones == clips[3].phones
    for u in clips:
        assert len(u.pcm) == 64000 and u.pcm.dtype == np.float32 and u.voice in speech.TRAIN_VOICES
        assert u.phones[0].start == 0 and abs(u.phones[-1].end - 4) < 1e-6
        for a, b in zip(u.phones, u.phones[1:]):
            assert abs(a.end - b.start) < 1e-6 and a.end > a.start
        assert {p.name for p in u.phones} <= PHONES
    assert speech.synthesize(0, 2.0, voices=("awb",)).voice == "awb"
    assert len(speech.synthesize(1, 0.4).pcm) == 6400
    a, b = direct(clips[0], 100, 7), direct(again := speech.synthesize(0, 4.0), 100, 7)
    assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("units", "articulators", "pose", "translation", "gaze"))
    assert not np.array_equal(a.pose, direct(again, 100, 8).pose)


@needs_flite
def test_flite_phones_fit_the_audio(clips):
    for u in clips:
        def level(names):
            t = [np.arange(p.start, p.end, 0.005) for p in u.phones if p.name in names]
            return np.mean(loudness(u.pcm, np.concatenate(t), 0.01))
        assert level(VOWELS) > 10 * level({"pau"})


@needs_flite
def test_jaw_follows_energy_without_lag(clips):
    lags = np.arange(-30, 31)
    total = np.zeros(len(lags))
    for s, u in enumerate(clips):
        n = 400
        jaw = direct(u, n, s, fps=100).articulators[:, visemes.JAW].astype(float)
        rms = loudness(u.pcm, np.arange(n) / 100, 0.05)
        jaw, rms = (jaw - jaw.mean()) / jaw.std(), (rms - rms.mean()) / rms.std()
        total += [np.mean(jaw[30:-30] * np.roll(rms, k)[30:-30]) for k in lags]
    best = lags[int(np.argmax(total))]
    assert abs(best) <= 4, f"jaw and energy are {best * 10} ms apart"
    assert total.max() / len(clips) > 0.4


@needs_flite
def test_closures_close_in_real_speech(clips):
    closed, wide = [], []
    for s, u in enumerate(clips):
        track = direct(u, 400, s, fps=100)
        closed += gap_at(u, track, 100, {"p", "b", "m"})
        wide += gap_at(u, track, 100, {"aa", "ae", "ay"})
    assert np.mean(np.array(closed) < 0.05) > 0.95
    assert np.median(wide) > 0.35


@needs_flite
def test_direct_is_fast(clips):
    direct(clips[0], 100, 0)
    best = min(_timed(lambda: direct(clips[1], 100, s)) for s in range(5))
    assert best < 0.5  # 0.02-0.05 s on a free core; generous for a busy one


def _timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def test_recordings_align():
    pytest.importorskip("pocketsphinx")
    listing = speech.TEXTS / "transcription"
    if not listing.exists():
        pytest.skip("pocketsphinx-testdata is not installed")
    named = re.findall(r"<s>.*</s>\s*\((.+)\)", listing.read_text())
    found = load_readings(tuple(name for name in named if (speech.TEXTS / f"{name}.wav").exists()))
    assert found
    for u in found:
        assert abs(u.phones[-1].end - u.seconds) < 1e-6 and len(u.phones) > 20
    with pytest.raises(AlignmentError):
        align(found[0].pcm, "zzyzxq blorf")
