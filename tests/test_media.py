"""Sound in: any file, flat, exact. Video out: exact time stamps, playable after Ctrl-C and after a kill."""

import io
import os
import signal
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
import torch

from liveavatar.conditioning.media import VideoWriter, lay_out, read_audio
from liveavatar.core import InputError


def tone(rate: int, seconds: float, channels=1) -> np.ndarray:
    """Silence with half a second of a 440 Hz tone starting at 0.5 s, float32 [channels, n]."""
    t = np.arange(int(rate * seconds)) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * t) * ((t >= 0.5) & (t < 1.0))
    return np.repeat(wave[None], channels, 0).astype(np.float32)


def recording(path, codec: str, format: str, rate: int, layout="mono", seconds=1.5, sample="fltp"):
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(tone(rate, seconds, channels), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def loud(pcm: np.ndarray) -> tuple[int, int]:
    """First and last sample above a tenth of full scale."""
    where = np.flatnonzero(np.abs(pcm) > 0.1)
    return int(where[0]), int(where[-1])


# ---------------------------------------------------------------- sound in


@pytest.mark.parametrize(
    "codec, format, rate, layout",
    [
        ("pcm_s16le", "wav", 16000, "mono"),
        ("pcm_f32le", "wav", 44100, "stereo"),
        ("pcm_s24le", "wav", 96000, "5.1"),
        ("pcm_mulaw", "wav", 8000, "mono"),
        ("flac", "flac", 48000, "stereo"),
        ("libmp3lame", "mp3", 22050, "mono"),
        ("aac", "mp4", 48000, "stereo"),
        ("libopus", "ogg", 48000, "mono"),
    ],
)
def test_any_file_becomes_16_khz_mono_at_its_own_time_and_level(tmp_path, codec, format, rate, layout):
    path = recording(tmp_path / "speech", codec, format, rate, layout)  # no suffix: the contents decide
    chunks = list(read_audio(path))
    pcm = np.concatenate(chunks)
    assert all(c.dtype == np.float32 and c.ndim == 1 for c in chunks) and len(chunks) > 1
    first, last = loud(pcm)
    assert abs(first - 8000) < 80 and abs(last - 16000) < 80  # within 5 ms
    assert abs(len(pcm) - 24000) <= 1200  # codecs fill up their last frame
    level = np.abs(pcm[10_000:14_000]).max()
    assert level <= 1.0 and (layout == "5.1" or 0.4 < level < 0.6)  # a downmix neither clips nor fades


def test_pcm_at_the_right_rate_passes_through_exactly(tmp_path):
    path = recording(tmp_path / "a.wav", "pcm_s16le", "wav", 16000)
    expected = np.round(tone(16000, 1.5)[0] * 32768) / 32768
    pcm = np.concatenate(list(read_audio(path)))
    assert len(pcm) == 24000 and np.abs(pcm - expected).max() <= 1 / 32768


def test_file_objects_and_a_video_with_sound(tmp_path):
    path = tmp_path / "talk.mp4"
    with VideoWriter(path, 64, 64) as writer:
        writer.write(np.zeros((12, 64, 64, 3), np.uint8), tone(16000, 1.5)[0])
    with open(path, "rb") as file:
        assert abs(loud(np.concatenate(list(read_audio(file))))[0] - 8000) < 80
    assert abs(loud(np.concatenate(list(read_audio(io.BytesIO(path.read_bytes())))))[0] - 8000) < 80


def give_on_stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))


@pytest.mark.parametrize("rate", [16000, 24000])
def test_raw_pcm_on_standard_input(monkeypatch, rate):
    data = (tone(rate, 1.5)[0] * 32767).astype("<i2").tobytes()
    give_on_stdin(monkeypatch, data + b"\x01")  # an odd last byte is no sample
    pcm = np.concatenate(list(read_audio("-", rate=rate)))
    first, last = loud(pcm)
    assert abs(len(pcm) - 24000) <= 2 and abs(first - 8000) < 40 and abs(last - 16000) < 40


def test_sound_is_laid_out_by_its_time_stamps():
    one = np.full(1600, 0.5, np.float32)
    late = lay_out([(0.5, one), (0.6, one)], 0)
    assert len(late) == 0.7 * 16000 and not late[:8000].any() and np.all(late[8000:] == 0.5)
    assert len(lay_out([(0.0, one), (0.1 + 1e-3, one)], 0)) == 3200  # rounding of stamps opens no gap
    hole = lay_out([(0.0, one), (0.3, one)], 0)
    assert len(hole) == 6400 and not hole[1600:4800].any()
    early = lay_out([(0.0, one), (0.1, one)], 0.05)
    assert len(early) == 0.15 * 16000 and early.all()  # what was heard before the first picture is gone
    assert len(lay_out([(0.0, one), (0.1, one)], 0.05, 0.12)) == round(0.07 * 16000)


def test_raw_pcm_is_handed_on_as_it_arrives(monkeypatch):
    source, sink = os.pipe()
    monkeypatch.setattr(sys, "stdin", open(source, encoding="latin-1"))
    chunks = read_audio("-")
    for size in (2, 3, 961, 640):  # bytes, cut anywhere
        os.write(sink, bytes(size))
    assert len(next(chunks)) == 803
    os.write(sink, bytes(2000))
    assert len(next(chunks)) == 1000
    os.close(sink)
    assert list(chunks) == []
    sys.stdin.close()


@pytest.mark.parametrize(
    "data, message", [(b"", "no audio arrived"), (b"RIFF\0\0\0\0WAVE", "this is WAV data, not raw PCM"),
                      (b"\0\0\0\x1cftypM4A ", "this is MP4 data"), (b"\x1aE\xdf\xa3" + bytes(40), "this is WebM data")]
)
def test_standard_input_that_is_no_pcm_is_refused(monkeypatch, data, message):
    give_on_stdin(monkeypatch, data)
    with pytest.raises(InputError, match=message):
        list(read_audio("-"))


def test_unusable_recordings_are_refused_in_one_line(tmp_path):
    silent = tmp_path / "silent.mp4"
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.mp3").write_text("these are not the sounds you are looking for\n" * 50)
    (tmp_path / "header.wav").write_bytes(recording(tmp_path / "full.wav", "pcm_s16le", "wav", 16000).read_bytes()[:78])
    cases = {
        tmp_path / "missing.wav": "no such file", tmp_path: "a folder", tmp_path / "empty.wav": "empty \\(0 bytes\\)",
        tmp_path / "text.mp3": "not a recording", silent: "holds no audio stream",
        tmp_path / "header.wav": "the audio stream is empty",
    }  # fmt: skip
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read_audio(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damage_on_the_way_names_the_second(tmp_path):
    path = recording(tmp_path / "a.mp3", "libmp3lame", "mp3", 16000, seconds=10)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.mp3: damaged after [45]\.\d s") as caught:
        list(read_audio(path))
    assert "\n" not in str(caught.value)


def test_reading_is_flat_in_memory(tmp_path):
    path = tmp_path / "long.wav"
    with av.open(str(path), "w") as container:
        stream, second = container.add_stream("pcm_s16le", rate=48000, layout="stereo"), tone(48000, 1.0, 2)
        for k in range(600):
            frame = av.AudioFrame.from_ndarray(second, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48000, k * 48000, Fraction(1, 48000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    chunks, process, samples = read_audio(path), psutil.Process(), 0
    for _ in range(200):
        samples += len(next(chunks))
    before = process.memory_info().rss
    samples += sum(map(len, chunks))
    assert samples == 600 * 16000
    assert process.memory_info().rss - before < 8e6  # the whole would be 38 MB, or 115 MB undecoded


# ---------------------------------------------------------------- video out


def blocks(count: int, height=64, width=96):
    """Block b: 12 grey pictures and 7680 silent samples; in every fourth block picture 5 flashes and beeps."""
    for b in range(count):
        pictures, pcm = np.full((12, height, width, 3), 90, np.uint8), np.zeros(7680, np.float32)
        if b % 4 == 1:
            pictures[5] = 255
            pcm[5 * 640 : 6 * 640] = 0.9 * np.sin(np.arange(640) * 0.4)
        yield pictures, pcm


def probe(path, *entries) -> list[dict]:
    """ffprobe's streams as dictionaries: an independent reader."""
    wanted = ["-show_entries", "stream=" + ",".join(entries), "-of", "compact=p=0"]
    command = ["ffprobe", "-v", "error", "-count_frames", *wanted, str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [dict(item.split("=") for item in line.split("|")) for line in lines]


def flashes_and_beeps(path) -> tuple[list[Fraction], list[float]]:
    with av.open(str(path)) as container:
        flashes = [f.pts * f.time_base for f in container.decode(video=0) if f.to_ndarray(format="gray").mean() > 200]
    pcm = np.concatenate(list(read_audio(path)))
    where = np.flatnonzero(np.abs(pcm) > 0.3)
    starts = where[np.flatnonzero(np.diff(where, prepend=-10_000) > 3000)]
    return flashes, [s / 16000 for s in starts]


def test_time_stamps_are_exact_and_start_at_zero(tmp_path):
    path = tmp_path / "out.mp4"
    with VideoWriter(path, 96, 64) as writer:
        for pictures, pcm in blocks(9):
            writer.write(torch.from_numpy(pictures), torch.from_numpy(pcm))
    entries = "codec_name pix_fmt start_time duration nb_read_frames color_space sample_rate channels"
    video, audio = probe(path, *entries.split())
    assert video["codec_name"] == "h264" and video["pix_fmt"] == "yuv420p" and video["color_space"] == "bt709"
    assert audio["codec_name"] == "aac" and audio["sample_rate"] == "16000" and audio["channels"] == "1"
    assert float(video["start_time"]) == float(audio["start_time"]) == 0.0
    assert float(video["duration"]) == float(audio["duration"]) == 4.32 and video["nb_read_frames"] == "108"
    with av.open(str(path)) as container:
        assert [f.pts * f.time_base for f in container.decode(video=0)] == [Fraction(n, 25) for n in range(108)]
    flashes, beeps = flashes_and_beeps(path)
    assert flashes == [Fraction(12 * b + 5, 25) for b in (1, 5)]
    assert np.abs(np.array(beeps) - np.array([float(f) for f in flashes])).max() < 0.002


def test_colours_survive(tmp_path):
    path, wanted = tmp_path / "out.mp4", [(200, 50, 30), (20, 180, 90), (240, 240, 10), (30, 30, 200)]
    picture = np.repeat(np.array(wanted, np.uint8)[None], 64, 0).repeat(32, 1)
    with VideoWriter(path, 128, 64) as writer:
        writer.write(np.repeat(picture[None], 3, 0), np.zeros(0, np.float32))
    with av.open(str(path)) as container:
        seen = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    for k, colour in enumerate(wanted):
        assert np.abs(seen[32, 32 * k + 16] - colour).max() <= 4


WRITER = """
import sys, time, numpy as np
from liveavatar.conditioning.media import VideoWriter
rng = np.random.default_rng(0)
with VideoWriter(sys.argv[1], 96, 64) as writer:
    for b in range(100000):
        pcm = 0.5 * np.sin(np.arange(7680 * b, 7680 * (b + 1)) * 0.1).astype(np.float32)
        writer.write(rng.integers(0, 255, (12, 64, 96, 3), dtype=np.uint8), pcm)
        if b == 15:
            print("written", flush=True)
        if b > 15:
            time.sleep(0.02)
"""


@pytest.mark.parametrize("how, at_least", [(signal.SIGINT, 192), (signal.SIGKILL, 120)])
def test_the_file_plays_after_the_program_was_ended(tmp_path, how, at_least):
    path = tmp_path / "out.mp4"
    command = [sys.executable, "-c", WRITER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(how)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    video, audio = probe(path, "start_time", "nb_read_frames", "duration")
    assert int(video["nb_read_frames"]) >= at_least and float(video["start_time"]) == 0.0
    priming = 1024 / 16000
    assert float(audio["start_time"]) == (0.0 if how == signal.SIGINT else -priming)
    assert abs(float(video["duration"]) - float(audio["duration"])) < 1.2


def test_a_copy_cut_anywhere_still_opens(tmp_path):
    path, cut = tmp_path / "out.mp4", tmp_path / "cut.mp4"
    writer, rng = VideoWriter(path, 96, 64), np.random.default_rng(1)
    for _, pcm in blocks(20):
        writer.write(rng.integers(0, 255, (12, 64, 96, 3), dtype=np.uint8), pcm)
    growing = path.read_bytes()  # as it lies on the disk while the program runs
    writer.close()
    for share in (0.5, 0.77, 1.0):
        cut.write_bytes(growing[: int(share * len(growing))])
        video, _ = probe(cut, "nb_read_frames")
        assert int(video["nb_read_frames"]) > share * 120


def test_nothing_is_touched_before_the_first_write(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"an older video")
    VideoWriter(path, 64, 64).close()
    assert path.read_bytes() == b"an older video"
    VideoWriter(tmp_path / "new.mp4", 64, 64).close()
    assert not (tmp_path / "new.mp4").exists()


def test_sizes_and_paths_that_cannot_work_are_refused(tmp_path):
    for width, height in ((63, 64), (64, 65), (0, 64)):
        with pytest.raises(InputError, match=f"{width}x{height}: H.264 needs even"):
            VideoWriter(tmp_path / "out.mp4", width, height)
    (tmp_path / "folder.mp4").mkdir()
    cases = {"none/out.mp4": "none does not exist", "out.avi": "ends in .mp4", "folder.mp4": "is a folder"}
    for path, message in cases.items():
        with pytest.raises(InputError, match=message):
            VideoWriter(tmp_path / path, 64, 64)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("count", [1, 20])
def test_a_full_disk_is_an_input_error(tmp_path, count):
    path, rng = tmp_path / "out.mp4", np.random.default_rng(0)
    path.symlink_to("/dev/full")
    with pytest.raises(InputError, match="out.mp4: cannot be written: No space left on device"):
        with VideoWriter(path, 96, 64) as writer:
            for _ in range(count):
                writer.write(rng.integers(0, 255, (12, 64, 96, 3), dtype=np.uint8), np.zeros(7680, np.float32))


def test_writing_is_flat_in_memory(tmp_path):
    process, sizes = psutil.Process(), []
    with VideoWriter(tmp_path / "out.mp4", 96, 64) as writer:
        for round_ in range(3):
            for pictures, pcm in blocks(60):
                writer.write(pictures, pcm)
            sizes.append(process.memory_info().rss)
    assert sizes[2] - sizes[1] < 4e6  # 29 s of raw pictures would be 13 MB
