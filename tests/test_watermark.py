"""The watermark (WM-1): what it adds, what survives H.264 and handling, and that unmarked video is not called marked."""

import hashlib
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from liveavatar.core import ConfigError, InputError
from liveavatar.serving import spread
from liveavatar.serving.watermark import FALSE_ALARM, KEY_FILE, Detector, Watermark, deep_heights, fold, limited, read_video, server_key, whiten

KEY, PAYLOAD = b"an operator's key, 32 bytes long", 0xDEADBEEF
PORTRAIT = Path(__file__).parents[1] / "liveavatar" / "assets" / "portrait.png"


def clip(height: int, width: int, count: int = 25, noise: float = 2.0) -> list[np.ndarray]:
    """The portrait as a camera would see it: it sways a little, and the sensor is noisy."""
    rng, image = np.random.default_rng(0), Image.open(PORTRAIT).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    swayed = (image.rotate(np.sin(t / 5), Image.Resampling.BICUBIC, translate=(2 * np.sin(t / 7), np.cos(t / 4))) for t in range(count))
    return [np.clip(np.asarray(p) + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8) for p in swayed]


def marked(pictures: list[np.ndarray]) -> list[np.ndarray]:
    mark = Watermark(KEY, PAYLOAD, *pictures[0].shape[:2])
    return [mark.mark(p) for p in pictures]


def through_h264(pictures: list[np.ndarray], rate: int, file=None) -> list[np.ndarray]:
    """What a viewer of baseline H.264 at `rate` bit/s sees. file: also keep it there."""
    file = io.BytesIO() if file is None else file
    options = {"profile": "baseline", "preset": "veryfast", "maxrate": str(rate), "bufsize": str(rate), "threads": "1"}
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.bit_rate, stream.codec_context.time_base = "yuv420p", rate, Fraction(1, 25)
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with av.open(file) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def read(pictures: list[np.ndarray], key: bytes = KEY):
    detector = Detector(key, heights=(128, 256, 512))
    for picture in pictures:
        detector.add(np.ascontiguousarray(picture))
    return detector.read()


@pytest.fixture(scope="module")
def seen() -> list[np.ndarray]:
    """25 marked pictures of 256 px after H.264 at 400 kb/s."""
    return through_h264(marked(clip(256, 256)), 400_000)


# ---------------------------------------------------------------- the pattern and its code


def test_code_words_are_64_or_128_apart():
    words = np.concatenate([spread.hadamard(), -spread.hadamard()])
    assert {int(d) for d in np.unique((words[:, None] != words).sum(-1))} == {0, 64, 128}


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_any_payload_comes_back_with_31_chips_of_each_byte_wrong(payload, seed):
    soft = spread.encode(payload).reshape(4, 128)
    for word in soft:
        word[np.random.default_rng(seed).choice(128, 31, replace=False)] *= -1
    assert spread.decode(soft.ravel())[0] == payload


def test_confidence_says_guess_or_certain():
    noise = np.random.default_rng(1).normal(0, 1, 512).astype(np.float32)
    assert spread.decode(noise)[1] < 0.5
    assert spread.decode(spread.encode(7) + 0.5 * noise)[1] > 0.999


def test_a_tile_is_its_chips():
    chips = spread.Chips.of(KEY).all(PAYLOAD)
    assert chips.shape == (10, 16, 16) and set(np.unique(chips)) == {-1.0, 1.0}
    pattern = spread.tile(chips)
    assert pattern.std() == pytest.approx(1, abs=1e-3) and abs(pattern.mean()) < 1e-6
    found = spread.coefficients(pattern)
    np.testing.assert_allclose(found / np.abs(found).max(), chips, atol=1e-5)
    other = spread.Chips.of(b"another key, as long as the first")
    assert abs((other.all(PAYLOAD) * chips).mean()) < 0.1


@pytest.mark.parametrize("key, payload", [(b"short", 0), (KEY, -1), (KEY, 2**32)])
def test_impossible_marks_are_refused(key, payload):
    with pytest.raises(ValueError):
        Watermark(key, payload, 64, 64)


# ---------------------------------------------------------------- embedding


@pytest.mark.parametrize("height, width", [(128, 128), (512, 512), (100, 131), (384, 704)])
def test_the_mark_is_weak_the_same_in_all_colours_and_stronger_where_the_picture_is_busy(height, width):
    picture = clip(height, width, 1, noise=0)[0]
    change = marked([picture])[0].astype(int) - picture
    inside = (picture > 12).all(-1) & (picture < 243).all(-1)  # elsewhere 0 and 255 clip it
    assert (change[inside] == change[inside][:, :1]).all()
    assert 10 * np.log10(255**2 / np.mean(change**2.0)) > 44 and np.abs(change).max() <= 10
    flat, busy = np.full_like(picture, 100), np.random.default_rng(0).integers(60, 200, picture.shape, dtype=np.uint8)
    assert 2 < (marked([busy])[0].astype(int) - busy).std() / (marked([flat])[0].astype(int) - flat).std() < 4


def test_marking_leaves_its_input_alone_and_never_wraps_round():
    picture = np.random.default_rng(0).choice(np.uint8([0, 1, 254, 255]), (64, 64, 3))
    before = picture.copy()
    after = marked([picture])[0]
    assert (picture == before).all() and np.abs(after.astype(int) - picture).max() < 15


# ---------------------------------------------------------------- surviving


def test_low_bit_rate(seen):
    reading = read(seen)
    assert reading.found and reading.payload == PAYLOAD and reading.confidence > 0.999
    assert reading.z > 1.5 * reading.needed and reading.turn == (0, 0) and reading.height == 256 and reading.pictures == 25


def test_the_small_avatar_at_its_own_rate_and_four_times_enlarged():
    pictures = through_h264(marked(clip(128, 128)), 150_000)
    large = [np.asarray(Image.fromarray(p).resize((512, 512), Image.Resampling.BICUBIC)) for p in pictures]
    for reading in (read(pictures), read(through_h264(large, 800_000))):
        assert reading.found and reading.payload == PAYLOAD and reading.height == 128


def test_rescaled(seen):
    smaller = [np.asarray(Image.fromarray(p).resize((192, 192), Image.Resampling.BILINEAR)) for p in seen]
    assert read(smaller).found and read(smaller).payload == PAYLOAD and read(smaller).height == 256


@pytest.mark.parametrize("top, left, bottom, right", [(13, 7, 239, 250), (0, 128, 256, 256), (129, 66, 256, 200)])
def test_cropped_by_any_number_of_pixels(seen, top, left, bottom, right):
    reading = read([p[top:bottom, left:right] for p in seen])
    assert reading.found and reading.payload == PAYLOAD and reading.turn == (-top % 128, -left % 128)


def test_a_part_cut_out_and_enlarged_is_found_when_every_size_is_tried(seen):
    enlarged = [np.asarray(Image.fromarray(p[11:240, 9:238]).resize((300, 300), Image.Resampling.BICUBIC)) for p in seen]
    assert not read(enlarged).found
    tried = [height for height in deep_heights(300) if 220 <= height < 240]  # the others take long and find nothing
    assert deep_heights(300)[0] == 180 and deep_heights(300)[-1] == 480
    detector = Detector(KEY, tuple(tried))
    for picture in enlarged:
        detector.add(picture)
    reading = detector.read()
    assert reading.found and reading.payload == PAYLOAD and abs(reading.height - 229) <= 2


def test_shifted_round(seen):
    reading = read([np.roll(p, (5, -9), (0, 1)) for p in seen])
    assert reading.found and reading.payload == PAYLOAD and reading.turn == (5, 128 - 9)


def test_brighter_flatter_and_grey(seen):
    grey = [np.repeat(np.clip(0.8 * p.mean(-1, keepdims=True) + 30, 0, 255).astype(np.uint8), 3, -1) for p in seen]
    assert read(grey).found and read(grey).payload == PAYLOAD


def test_more_pictures_say_more(seen):
    assert read(seen[:1]).z < read(seen).z


# ---------------------------------------------------------------- false alarms


def test_another_key_and_unmarked_video_are_not_found(seen):
    for reading in (read(seen, b"somebody else's key, 32 bytes....."), read(clip(128, 128))):
        assert not reading.found and reading.false_alarm > FALSE_ALARM and reading.z < reading.needed


def test_the_bound_is_that_of_hoeffding():
    reading = read(clip(64, 64, 2))
    sizes = 2  # 64 itself and 128: at 256 or more the pattern would be finer than these pixels
    alarm = sizes * 128**2 * 2.0**32 * np.exp(-(reading.needed**2) / 2)
    assert alarm == pytest.approx(FALSE_ALARM, rel=1e-6)


def test_correlation_of_an_unmarked_picture_stays_under_hoeffdings_bound_over_keys():
    """One payload, one turn, 4,000 keys: the share beyond z must not exceed exp(-z^2 / 2)."""
    luma = clip(128, 128, 1)[0].mean(-1).astype(np.float32)
    values = limited(spread.coefficients(fold(whiten(luma)))).ravel()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (4000, values.size))  # what a key is
    z = signs @ values / np.sqrt((values**2).sum())
    for at in (1, 2, 3):
        assert (z >= at).mean() <= np.exp(-(at**2) / 2)
    keyed = [float((spread.Chips.of(hashlib.sha256(bytes([n])).digest()).all(n).ravel() * values).sum() / np.linalg.norm(values)) for n in range(200)]
    assert abs(np.mean(keyed)) < 0.3 and 0.8 < np.std(keyed) < 1.2  # and keys behave like coins


@pytest.mark.parametrize("value", [0, 255])
def test_pictures_of_one_colour_hold_nothing(value):
    reading = read([np.full((64, 96, 3), value, np.uint8)] * 3)
    assert not reading.found and np.isfinite(reading.z)


def test_nothing_to_read_is_an_error():
    with pytest.raises(ValueError, match="no picture"):
        Detector(KEY).read()


# ---------------------------------------------------------------- files and keys


def test_a_file(tmp_path):
    through_h264(marked(clip(128, 128)), 400_000, str(tmp_path / "clip.mp4"))
    assert read_video(tmp_path / "clip.mp4", KEY).payload == PAYLOAD
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "none.mp4"):
        with pytest.raises(InputError, match=name):
            read_video(tmp_path / name, KEY)


def test_a_server_keeps_its_key(tmp_path):
    key = server_key(tmp_path)
    assert len(key) == 32 and server_key(tmp_path) == key == (tmp_path / KEY_FILE).read_bytes()
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / "short").write_bytes(b"short")
    for name in ("short", "missing"):
        with pytest.raises(ConfigError, match=name):
            server_key(tmp_path, tmp_path / name)
