"""Files, steadiness, quality and set distances on pictures whose answer is known."""

import hashlib
from fractions import Fraction

import av
import numpy as np
import pytest
from faces import made_up

pytest.importorskip("cv2", reason="optical flow and colours")
pytest.importorskip("skimage", reason="SSIM")

from liveavatar.conditioning.face import Face
from liveavatar.conditioning.media import VideoWriter
from liveavatar.core import SAMPLE_RATE, InputError
from liveavatar.evaluation import quality, stability
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.distribution import kernel_distance
from liveavatar.evaluation.stability import Steadiness, Stillness
from liveavatar.models.probe import frechet

RNG = np.random.default_rng(0)
TEXTURE = np.kron(RNG.integers(30, 220, (24, 24, 3)), np.ones((4, 4, 1))).astype(np.uint8)  # 96 pixels of coarse pattern


def face_at(x0, y0, x1, y1) -> Face:
    points = np.zeros((468, 3), np.float32)
    points[:, 0], points[:, 1] = RNG.uniform(x0, x1, 468), RNG.uniform(y0, y1, 468)
    return Face((x0, y0, x1, y1), 1.0, points)


# ---------------------------------------------------------------- files


def numbered(count, side=32):
    return np.repeat(np.arange(count, dtype=np.uint8)[:, None, None, None] * 4, side, 1).repeat(side, 2).repeat(3, 3)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """2.4 s: picture k has grey 4 k; a click at 1.0 s."""
    path = tmp_path_factory.mktemp("clips") / "clicks.mp4"
    pcm = np.zeros(round(2.4 * SAMPLE_RATE), np.float32)
    pcm[SAMPLE_RATE : SAMPLE_RATE + 160] = 0.8
    with VideoWriter(path, 32, 32) as writer:
        writer.write(numbered(60), pcm)
    return path


def test_pictures_and_sound_share_the_files_clock(clicks):
    file = VideoFile(clicks)
    rows = list(file.frames())
    assert [at for at, _ in rows] == pytest.approx([k / 25 for k in range(60)])
    assert all(abs(int(frame.mean()) - 4 * k) <= 2 for k, (_, frame) in enumerate(rows))
    assert np.flatnonzero(np.abs(file.sound()) > 0.4)[0] == pytest.approx(SAMPLE_RATE, abs=40)
    assert file.card == {"width": 32, "height": 32, "fps": 25.0, "codec": "h264", "seconds": pytest.approx(2.4, abs=0.1), "crop": "none"}
    assert file.sha256 == hashlib.sha256(clicks.read_bytes()).hexdigest()


def test_a_window_is_cut_on_the_same_clock(clicks):
    file = VideoFile(clicks)
    assert [round(at, 2) for at, _ in file.frames(0.8, 1.0)] == [0.8, 0.84, 0.88, 0.92, 0.96]
    sound = file.sound(0.8, 1.5)
    assert len(sound) == round(0.7 * SAMPLE_RATE)
    assert np.flatnonzero(np.abs(sound) > 0.4)[0] == pytest.approx(0.2 * SAMPLE_RATE, abs=40)


def test_times_are_read_not_counted(tmp_path):
    """A file whose pictures come at uneven times, and whose sound begins at .5 s."""
    path, stamps = tmp_path / "uneven.mkv", [0, 40, 200, 240, 1000]
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=25), container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
        video.width = video.height = 32
        video.codec_context.time_base = Fraction(1, 1000)
        for frame, stamp in zip(numbered(len(stamps)), stamps, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = stamp, Fraction(1, 1000)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        tone = av.AudioFrame.from_ndarray(np.full((1, 1600), 16000, np.int16), format="s16", layout="mono")
        tone.sample_rate, tone.pts, tone.time_base = SAMPLE_RATE, SAMPLE_RATE // 2, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(tone))
    file = VideoFile(path)
    assert [round(1000 * at) for at, _ in file.frames()] == stamps
    loud = np.flatnonzero(np.abs(file.sound()) > 0.3)
    assert loud[0] == pytest.approx(SAMPLE_RATE // 2, abs=16) and len(file.sound()) == pytest.approx(0.6 * SAMPLE_RATE, abs=16)


def test_files_that_are_no_videos(tmp_path, clicks):
    with pytest.raises(InputError, match="no such file"):
        VideoFile(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(InputError, match="not a video"):
        VideoFile(tmp_path / "text.mp4")


# ---------------------------------------------------------------- steadiness


def steadiness_of(frames) -> Steadiness:
    seen = Steadiness()
    for k, frame in enumerate(frames):
        seen.see(k / 25, frame)
    return seen


def by_name(measures):
    return {m.name: m for m in measures}


def test_a_still_picture_is_steady():
    found = by_name(steadiness_of([TEXTURE] * 30).measures())
    assert found["warp_error"].value == 0 and found["flicker_mae"].value == 1 and found["repeated_frames"].value == pytest.approx(29 / 30)


def test_a_pan_is_change_but_no_warp_error():
    wide = np.kron(RNG.integers(30, 220, (40, 60, 3)), np.ones((4, 4, 1)))
    import cv2

    wide = cv2.GaussianBlur(wide.astype(np.uint8), (0, 0), 2)
    pan, lit = [wide[:96, k : k + 96] for k in range(40)], []
    for k, frame in enumerate(pan):
        lit.append(np.clip(frame * (1.06 if k % 2 else 0.94), 0, 255).astype(np.uint8))
    moved, flickering = by_name(steadiness_of(pan).measures()), by_name(steadiness_of(lit).measures())
    assert moved["flicker_mae"].value < 0.99 and moved["warp_error"].value < 0.3 * (1 - moved["flicker_mae"].value)
    assert flickering["warp_error"].value > 3 * moved["warp_error"].value
    ratio = by_name(steadiness_of(lit).measures(steadiness_of(pan)))["warp_error_ratio"].value
    assert ratio == pytest.approx(flickering["warp_error"].value / moved["warp_error"].value)


def test_repeats_are_counted_exactly():
    frames = [np.roll(TEXTURE, k, axis=1) for k in range(60)]
    for k in (7, 20, 21, 50):
        frames[k] = frames[k - 1]
    assert steadiness_of(frames).repeats == 4 and steadiness_of([np.roll(TEXTURE, k, axis=1) for k in range(60)]).repeats == 0


def test_stillness_parts_background_from_face():
    seen, face = Stillness(), face_at(60, 60, 100, 110)
    for k in range(40):
        frame = np.full((160, 160, 3), 100, np.uint8)
        frame[60:110, 60:100] += np.uint8(10 * (k % 2))  # the face: variance 25
        frame[:30] += np.uint8(2 * (k % 2))  # background above: variance 1
        seen.see(frame, [face])
    found = by_name(seen.measures())
    assert found["idle_var_face"].value == pytest.approx(25, rel=1e-3)
    assert 0 < found["idle_var_background"].value <= 1
    assert not by_name(Stillness().measures())["idle_var_face"].measured


def test_jerk_of_known_movement():
    times = np.arange(100) / 25
    smooth = made_up(times, at=np.stack([200 + 10 * times**2, np.full(100, 200.0)], 1))
    assert stability.jerk(smooth).value < 5
    cubic = made_up(times, at=np.stack([200 + 20 * times**3, np.full(100, 200.0)], 1))
    assert stability.jerk(cubic).value == pytest.approx(20 * 6 / 100, rel=0.3)
    stuck = made_up(times, at=np.stack([200 + 40 * np.floor(times * 12.5) / 12.5, np.full(100, 200.0)], 1))
    assert stability.jerk(stuck).value > 100 * stability.jerk(smooth).value


def test_blinks_are_counted_once():
    lids = np.full(100, 0.12)
    lids[20:24] = [0.08, 0.02, 0.03, 0.09]
    lids[60:62] = 0.04
    assert stability.blinks(lids) == 2 and stability.blinks(np.full(100, 0.12)) == 0


def test_motion_energy_tells_speech_from_silence():
    times = np.arange(200) / 25
    gap = np.where(times < 4, 0.1 + 0.05 * np.sin(8 * np.pi * times), 0.1)
    found = by_name(stability.motion_energy(made_up(times, gap=gap, at=np.stack([200 + 5 * times, 200 + 0 * times], 1)), times >= 4))
    assert found["motion_speech"].value > 10 * found["motion_silence"].value
    assert found["head_range"].value == pytest.approx(0, abs=0.1) and found["blinks"].value == 0


# ---------------------------------------------------------------- quality


def test_psnr_is_arithmetic():
    a = np.full((20, 20, 3), 100, np.uint8)
    assert quality.psnr(a, a) == 60 and quality.psnr(a, a + 5) == pytest.approx(10 * np.log10(255**2 / 25))


def test_quality_looks_into_its_boxes():
    """Noise on the mouth alone lowers the mouth's figures, not the eyes'."""
    face, frame = face_at(20, 20, 80, 80), TEXTURE.copy()
    face.landmarks[list(quality.LIPS), :2] = RNG.uniform((40, 60), (60, 70), (len(quality.LIPS), 2))
    face.landmarks[list(quality.EYES), :2] = RNG.uniform((30, 30), (70, 38), (len(quality.EYES), 2))
    spoilt = frame.copy()
    spoilt[60:70, 40:60] ^= 63
    seen = quality.Quality()
    seen.see(0.0, spoilt, [face], frame, [face])
    found = by_name(seen.measures(paired=True))
    assert not found["NIQE"].measured and "fitted parameters" in str(found["BRISQUE"])
    assert found["psnr_eyes"].value == 60 and found["ssim_eyes"].value == pytest.approx(1)
    assert found["psnr_mouth"].value < found["psnr_face"].value < found["psnr_full"].value < 60


def test_blur_lowers_sharpness_and_blocks_are_seen():
    import cv2

    face = face_at(20, 20, 80, 80)
    values = {}
    for name, frame in {"sharp": TEXTURE, "soft": cv2.GaussianBlur(TEXTURE, (0, 0), 2)}.items():
        seen = quality.Quality()
        seen.see(0.0, frame, [face])
        values[name] = by_name(seen.measures(paired=False))
    assert values["soft"]["sharpness"].value < 0.3 * values["sharp"]["sharpness"].value
    ramp = np.add.outer(np.arange(96), np.arange(96)).repeat(3).reshape(96, 96, 3).astype(np.uint8)
    coarse = np.kron(ramp[::8, ::8], np.ones((8, 8, 1))).astype(np.uint8)
    assert quality.blockiness(ramp) == pytest.approx(1, abs=0.05) and quality.blockiness(coarse) > 10


def test_colour_is_lab():
    seen = quality.Quality()
    seen.see(0.0, np.full((96, 96, 3), 255, np.uint8), [face_at(20, 20, 80, 80)])
    found = by_name(seen.measures(paired=False))
    assert found["lab_L"].value == pytest.approx(100, abs=0.1) and found["lab_a"].value == pytest.approx(0, abs=0.1)


# ---------------------------------------------------------------- sets


def test_frechet_of_gaussians_is_the_formula():
    d = 3
    x = RNG.normal(size=(4000, d))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # exactly mean 0, covariance 1
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, 2 * x + [1, 0, 2]) == pytest.approx(5 + d * (2 - 1) ** 2, rel=1e-6)
    tilted = x @ np.array([[2.0, 0.5, 0], [0, 1, 0.3], [0, 0, 1.5]]).T
    assert frechet(x, tilted) == pytest.approx(frechet(tilted, x), rel=1e-9)


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(np.random.default_rng(s).normal(size=(30, 8)), np.random.default_rng(s + 100).normal(size=(40, 8))) for s in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)
    assert kernel_distance(RNG.normal(size=(50, 8)), 1 + RNG.normal(size=(50, 8))) > 10 * np.std(values)
