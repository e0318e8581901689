"""Uploads (serving.md 18.3): pictures lose all but their pixels, recordings are decoded out of reach, bombs are refused."""

import asyncio
import io
import os
import struct
import subprocess
import sys
import wave
import zlib

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from liveavatar.serving.problems import Problem, TooLarge, Unprocessable, Unsupported
from liveavatar.serving.uploads import MAX_SIDE, Recordings, SoundLimits, portrait, recording


def encoded(form: str, size=(96, 80), mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, form, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("form, mode", [("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "I;16"),
                                        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA")])  # fmt: skip
def test_every_kind_of_picture_becomes_a_plain_png(form, mode):
    file = io.BytesIO()
    source = Image.fromarray(np.full((80, 96), 256 * 200, np.uint16)) if mode == "I;16" else Image.new(mode, (96, 80), "white" if mode != "CMYK" else 0)
    source.save(file, form)
    clean = opened(portrait(file.getvalue()))
    assert (clean.format, clean.mode, clean.size) == ("PNG", "RGB", (96, 80)) and np.asarray(clean).mean() >= 199


def test_nothing_but_pixels_stays_and_the_picture_stands_upright():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "SecretCamera"  # orientation: turned; maker
    exif.get_ifd(0x8825)[1] = "N"  # a place on earth
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(form, exif=exif, icc_profile=profile, **({"comment": b"SecretWord"} if form == "JPEG" else {}))
        clean = portrait(data)
        assert b"Secret" not in clean and opened(clean).info == {} and opened(clean).size == (80, 96)
        assert not opened(clean).getexif()


def test_a_colour_profile_that_cannot_be_used_is_as_none():
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for profile in (b"no profile", xyz):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (200, 10, 10)).save(file, "PNG", icc_profile=profile)
        assert opened(portrait(file.getvalue())).getpixel((9, 9)) == (200, 10, 10)


def test_what_is_transparent_becomes_white():
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(file, "PNG")
    assert opened(portrait(file.getvalue())).getpixel((5, 5)) == (255, 255, 255)


def test_a_large_picture_is_made_smaller():
    assert max(opened(portrait(encoded("JPEG", (5000, 70)))).size) == MAX_SIDE


def png(width: int, height: int, rows: bytes) -> bytes:
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(5001, 5000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(width, height):
    with pytest.raises(TooLarge, match="25 million pixels"):
        portrait(png(width, height, zlib.compress(bytes(1_000_000), 9)))


def test_a_bomb_in_a_text_chunk_is_refused():
    chunk = b"a\0\0" + zlib.compress(bytes(100_000_000), 9)
    plain = png(64, 64, zlib.compress(bytes(64 * 193)))
    bomb = plain[:33] + struct.pack(">I", len(chunk)) + b"zTXt" + chunk + struct.pack(">I", zlib.crc32(b"zTXt" + chunk)) + plain[33:]
    with pytest.raises(Unprocessable):
        portrait(bomb)


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(100), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"%!PS-Adobe", b"II*\0",
                                  b"RIFF\0\0\0\0WAVEfmt ", b"BM" + bytes(60), b"/etc/passwd"])  # fmt: skip
def test_other_formats_are_unsupported(data):
    with pytest.raises(Unsupported):
        portrait(data)


def test_animations_and_small_and_damaged_pictures_are_refused():
    file, frames = io.BytesIO(), [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    for data in (file.getvalue(), encoded("PNG", (63, 100)), encoded("JPEG")[:-300], encoded("PNG")[:-2000]):
        with pytest.raises(Unprocessable):
            portrait(data)


@given(form=st.sampled_from(["JPEG", "PNG", "WEBP"]), at=st.integers(0, 3000), bytes_=st.binary(min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_a_changed_picture_is_a_picture_or_a_problem(form, at, bytes_):
    data = bytearray(encoded(form, (64, 64)))
    at %= len(data)
    data[at : at + len(bytes_)] = bytes_
    try:
        assert opened(portrait(bytes(data))).mode == "RGB"
    except Problem as problem:
        assert 400 <= problem.status < 500


# ---------------------------------------------------------------- sound


def tone(seconds: float = 1.0, rate: int = 16_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        one = 12_000 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
        out.writeframes(np.repeat(one[:, None], channels, 1).astype("<i2").tobytes())
    return file.getvalue()


def test_a_recording_becomes_16_khz_mono():
    pcm, rate = asyncio.run(Recordings().decode(tone(1.0, 48_000, 2)))
    assert rate == 16_000 and pcm.dtype == np.float32 and abs(len(pcm) - 16_000) < 100
    spectrum = np.abs(np.fft.rfft(pcm[:16_000]))
    assert spectrum.argmax() == 440 and np.abs(pcm).max() == pytest.approx(12_000 / 32_768, rel=0.05)


def test_fragmented_m4a():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as out:
        stream = out.add_stream("aac", rate=48_000, layout="mono")
        with av.open(io.BytesIO(tone(1.0, 48_000))) as source:
            for frame in source.decode(audio=0):
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert abs(len(recording(file.getvalue())) - 16_000) < 1500


@pytest.mark.parametrize("limits, error, words", [
    ({"seconds": 0.5}, TooLarge, "0.5 s"), ({"rate": 8000}, Unprocessable, "16000 Hz"), ({"memory": 150_000_000}, Unprocessable, "limits|memory"),
    ({"wall": 0.01}, Unprocessable, "took more than"), ({"cpu": 0}, Unprocessable, "processor time|limits"),
])  # fmt: skip
def test_what_costs_too_much_is_refused(limits, error, words):
    with pytest.raises(error, match=words):
        recording(tone(), SoundLimits(**limits))


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://%s\n"


def test_no_other_file_is_opened(tmp_path):
    """Neither a playlist nor an mp4 whose sound lies in another file reaches it."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(tone())
    reference = tmp_path / "reference.mov"
    for data in (PLAYLIST % str(secret).encode(), b"ffconcat version 1.0\nfile " + str(secret).encode(), b"ID3" + PLAYLIST % str(secret).encode()):
        with pytest.raises(Problem):
            recording(data)
    alis = str(secret).encode()  # QuickTime's reference to the file beside it, instead of its own data
    with av.open(str(reference), "w", format="mov") as out:
        stream = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        with av.open(io.BytesIO(tone())) as source:
            for frame in source.decode(audio=0):
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    data = reference.read_bytes()
    at = data.index(b"url \0\0\0\1", data.index(b"dref"))
    assert len(recording(data)) == 16_000
    entry = struct.pack(">I", 12 + len(alis) + 1) + b"url \0\0\0\0" + alis + b"\0"
    with pytest.raises(Problem):
        recording(data[: at - 4] + entry + data[at + 8 :])


def test_the_worker_is_alone(tmp_path):
    """It has no secret of the server's environment, can write no file, and is gone afterwards."""
    probe = ("import sys, os; sys.argv[0] = ''; from importlib.machinery import SourceFileLoader as L;"
             "w = L('w', %r).load_module(); w.restrict(5, 10**9); print('HOME' in os.environ);"
             "f = open(%r, 'wb', buffering=0); f.write(b'x')")  # fmt: skip
    from liveavatar.serving.uploads import WORKER

    told = subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", probe % (str(WORKER), str(tmp_path / "f"))], capture_output=True, text=True,
                          env={"PATH": os.defpath})  # fmt: skip
    assert told.stdout == "False\n" and ("File too large" in told.stderr or told.returncode < 0)


@given(kind=st.sampled_from([b"RIFF\xff\xff\xff\x7fWAVEfmt ", b"OggS", b"fLaC", b"ID3\x04", b"\0\0\0\x18ftypM4A ", b"\x1aE\xdf\xa3", b"\xff\xfb"]),
       rest=st.binary(max_size=200))  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_rubbish_with_a_good_beginning_is_a_problem(kind, rest):
    try:
        assert recording(kind + rest).dtype == np.float32
    except Problem as problem:
        assert 400 <= problem.status < 500
