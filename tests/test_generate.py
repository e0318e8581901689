"""The main job end to end on a tiny random checkpoint: what is in the file, Ctrl-C, live PCM, two ranks, flat memory."""

import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
from conftest import TINY_SIZE, speech
from PIL import Image

from liveavatar import generate as main_job
from liveavatar.config import load
from liveavatar.core import InputError
from liveavatar.runtime.placement import cut

BYTES_PER_SECOND = 32000  # of raw PCM on stdin


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load(None, [f"model.path={tiny_folder}", "model.device=cpu", "runtime.threads=1", "seed=3"])


@pytest.fixture(scope="module")
def files(tmp_path_factory, portrait):
    """A portrait and 1.5 s of speech at 44.1 kHz stereo."""
    folder = tmp_path_factory.mktemp("job")
    Image.fromarray(portrait.permute(1, 2, 0).numpy()).save(folder / "me.png")
    pcm = speech(1.5)
    times = np.arange(round(1.5 * 44100)) / 44100
    wide = np.interp(times, np.arange(len(pcm)) / 16000, pcm).astype(np.float32)
    with av.open(str(folder / "speech.flac"), "w") as container:
        stream = container.add_stream("flac", rate=44100, layout="stereo")
        frame = av.AudioFrame.from_ndarray((np.repeat(wide, 2)[None] * 32767).astype(np.int16), format="s16", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder


def job(files, name, **changes):
    return main_job.Job(**{"image": files / "me.png", "audio": str(files / "speech.flac"), "out": files / name, **changes})


@pytest.fixture(scope="module")
def result(tiny, files):
    seen = []
    done = main_job.generate(tiny, job(files, "whole.mp4"), lambda d: seen.append(d.pictures))
    return done, seen, files / "whole.mp4"


def read(path):
    """(pictures [n,H,W,3], float32 PCM at 16 kHz, container facts) of an mp4."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        facts = {"video": video.codec_context.name, "audio": audio.codec_context.name, "rate": video.average_rate,
                 "starts": (video.start_time, audio.start_time)}
        pictures, sound, stamps = [], [], []
        for frame in container.decode(video, audio):
            if isinstance(frame, av.VideoFrame):
                pictures.append(frame.to_ndarray(format="rgb24"))
                stamps.append(frame.time)
            else:
                sound.append(frame.to_ndarray()[0])
        return np.stack(pictures), np.concatenate(sound), {**facts, "stamps": stamps}


def test_the_file_is_what_was_asked_for(result):
    done, seen, path = result
    pictures, sound, facts = read(path)
    assert (facts["video"], facts["audio"], facts["rate"]) == ("h264", "aac", 25)
    assert facts["starts"] == (0, 0)
    assert pictures.shape == (38, TINY_SIZE, TINY_SIZE, 3)  # 1.5 s, rounded up to a whole picture
    assert facts["stamps"] == pytest.approx([n / 25 for n in range(38)], abs=1e-6)
    assert abs(len(sound) / 16000 - 38 / 25) < 0.07  # AAC codes whole frames of 64 ms
    assert (done.pictures, done.height, done.width, done.seconds) == (38, TINY_SIZE, TINY_SIZE, 38 / 25)
    assert seen == [12, 24, 36, 38]  # written block by block, not at the end
    assert done.started <= done.opened <= done.first <= done.last and done.rate > 0 and done.wait >= 0


def test_sound_and_pictures_start_together(result):
    sound, given = read(result[2])[1], speech(1.5)
    heard = np.pad(sound, (0, max(0, len(given) - len(sound))))[: len(given)]
    scores = [float(np.dot(np.roll(heard, -lag)[2000:-2000], given[2000:-2000])) for lag in range(-800, 801)]
    assert abs(int(np.argmax(scores)) - 800) <= 8  # half a millisecond, of a resampler and a lossy codec


def test_two_processes_make_the_same_bytes(tiny, files, result):
    from dataclasses import replace

    config = replace(tiny, stages=cut(tiny.chain, 2), runtime=replace(tiny.runtime, launcher="local"))
    main_job.generate(config, job(files, "two.mp4"))
    assert (files / "two.mp4").read_bytes() == result[2].read_bytes()


def test_every_picture_of_the_file_is_marked_where_that_is_asked_for(tiny, files):
    sizes = []

    def marker(height, width):
        sizes.append((height, width))
        return lambda picture: np.zeros_like(picture)  # a mark nobody can miss

    main_job.generate(tiny, job(files, "marked.mp4", length=0.6, marker=marker))
    pictures = read(files / "marked.mp4")[0]
    assert sizes == [(TINY_SIZE, TINY_SIZE)] and len(pictures) == 15 and pictures.max() < 3


def test_length_and_seed(tiny, files, result):
    from dataclasses import replace

    done = main_job.generate(replace(tiny, seed=4), job(files, "short.mp4", length=0.5))
    assert done.pictures == 13
    other, same = read(files / "short.mp4")[0], read(result[2])[0][:13]
    assert np.abs(other.astype(int) - same.astype(int)).mean() > 1


def test_a_source_is_read_no_faster_than_it_is_shown(tiny, files, monkeypatch):
    pulled, ahead = [0], []

    def source(name):
        for _ in range(60):
            pulled[0] += 1
            yield speech(0.1)

    monkeypatch.setattr(main_job, "read_audio", source)
    from dataclasses import replace

    config = replace(tiny, runtime=replace(tiny.runtime, queued_seconds=0.7))
    done = main_job.generate(config, job(files, "long.mp4"), lambda d: ahead.append(pulled[0] * 0.1 - d.seconds))
    assert done.pictures == 150
    assert max(ahead) < 0.7 + 4 * 0.48 + 1.0  # the queue, blocks in flight, chunks between threads


def test_a_recording_that_breaks_half_way_leaves_nothing(tiny, files, monkeypatch):
    def source(name):
        yield speech(1.5)
        raise InputError("speech.flac: damaged after 1.5 s")

    monkeypatch.setattr(main_job, "read_audio", source)
    with pytest.raises(InputError, match="damaged"):
        main_job.generate(tiny, job(files, "broken.mp4"))
    assert not (files / "broken.mp4").exists()


def test_a_recording_that_breaks_half_way_keeps_an_older_result(tiny, files, monkeypatch):
    def source(name):
        yield speech(1.5)
        raise InputError("speech.flac: damaged after 1.5 s")

    monkeypatch.setattr(main_job, "read_audio", source)
    (files / "kept.mp4").write_bytes(b"older")
    before = set(files.iterdir())
    with pytest.raises(InputError, match="damaged"):
        main_job.generate(tiny, job(files, "kept.mp4"))
    assert (files / "kept.mp4").read_bytes() == b"older" and set(files.iterdir()) == before


def test_an_older_result_is_replaced_by_a_whole_one(tiny, files):
    (files / "again.mp4").write_bytes(b"older")
    before = set(files.iterdir())
    main_job.generate(tiny, job(files, "again.mp4", length=0.1))
    assert len(read(files / "again.mp4")[0]) == 3 and set(files.iterdir()) == before


def test_an_odd_failure_of_a_source_is_no_silent_success(tiny, files, monkeypatch):
    def source(name):
        yield speech(0.6)
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(main_job, "read_audio", source)
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    with pytest.raises(InputError, match="broke off"):
        main_job.generate(tiny, job(files, "odd.mp4"))


# ---------------------------------------------------------------- as a process


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a CI job in the background ignores it, and children inherit that


def started(tiny_folder, files, name):
    command = [sys.executable, "-m", "liveavatar", "generate", "--image", files / "me.png", "--audio", "-", "--out", files / name,
               f"model.path={tiny_folder}", "model.device=cpu", "runtime.threads=1"]  # fmt: skip
    return subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=hear_ctrl_c)


def raw(seconds) -> bytes:
    return (speech(seconds) * 32767).astype("<i2").tobytes()


def test_ctrl_c_leaves_a_file_that_plays(tiny_folder, files):
    process = started(tiny_folder, files, "cut.mp4")
    process.stdin.write(raw(2.4))  # and then a silent line: the source blocks
    process.stdin.flush()
    deadline = time.monotonic() + 200
    while not (files / "cut.mp4").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (files / "cut.mp4").exists(), process.communicate()[1]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"Traceback" not in err and b"interrupted after" in out
    pictures, sound, facts = read(files / "cut.mp4")
    assert len(pictures) >= 12 and len(pictures) % 12 == 0 and facts["starts"] == (0, 0)
    assert abs(len(sound) / 16000 - len(pictures) / 25) < 0.07


def test_raw_pcm_on_stdin(tiny_folder, files):
    process = started(tiny_folder, files, "live.mp4")
    out, err = process.communicate(raw(1.0), timeout=200)
    assert process.returncode == 0, err
    assert b"live.mp4" in out and b"frames per second" in out and b"first frame after" in out
    assert len(read(files / "live.mp4")[0]) == 25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.gpu
def test_the_embedded_avatar_takes_the_gpu(files):
    done = main_job.generate(load(None), job(files, "gpu.mp4", length=1.0))
    assert done.pictures == 25
