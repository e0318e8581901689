"""What ships, judged from the shipped bytes: files as listed, and an avatar that speaks and stays itself."""

import hashlib
import re
import wave

import av
import numpy as np
import pytest

from liveavatar import generate as main_job
from liveavatar.conditioning.behaviour import lid_closure
from liveavatar.conditioning.identity import fit_picture, load_picture
from liveavatar.conditioning.media import read_audio
from liveavatar.config import load
from liveavatar.models.weights import inspect_folder

SECONDS = 8


def test_files_are_those_of_the_list_and_small():
    text = (main_job.ASSETS / "MEDIA.md").read_text(encoding="utf-8")
    listed = {name: (int(size), digest) for name, size, digest in re.findall(r"\| (\S+) \| (\d+) \| ([0-9a-f]{64}) \|", text)}
    found = {p.relative_to(main_job.ASSETS).as_posix(): p.read_bytes() for p in main_job.ASSETS.rglob("*") if p.is_file() and p.name != "MEDIA.md"}
    assert {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in found.items()} == listed
    assert sum(map(len, found.values())) < 25e6
    report = inspect_folder(main_job.ASSETS / "default")
    assert report.will_load, str(report)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Grey pictures float32 [T,128,128] of the avatar speaking and of it listening to silence."""
    folder = tmp_path_factory.mktemp("clips")
    with wave.open(str(folder / "silence.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(bytes(2 * 16000 * SECONDS))
    made = {}
    for name, audio in (("speech", main_job.SPEECH), ("silence", folder / "silence.wav")):
        out = folder / f"{name}.mp4"
        main_job.generate(load(None, ["model.device=cpu"]), main_job.Job(audio=str(audio), out=out, length=SECONDS))
        with av.open(str(out)) as container:
            made[name] = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)]).astype(np.float32)
    return made


def open_mouth(clip):
    """Share of dark pixels where the mouth is, per picture [T]: teeth and lips are bright, what lies behind is not."""
    return (clip[:, 74:104, 44:84] < 70).mean((1, 2))


def test_every_picture_is_the_person_of_the_portrait(clips):
    rgb = fit_picture(load_picture(main_job.PORTRAIT), 128, 128).float()
    portrait = (rgb * rgb.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).numpy()
    for clip in clips.values():
        error = np.abs(clip - portrait).mean((1, 2))
        assert error.max() < 16, error.max()  # of 255; the head moves; noise would be past 50
        assert np.abs(np.diff(clip, axis=0)).mean((1, 2)).max() < 8  # and nothing jumps


def test_the_mouth_follows_the_speech(clips):
    speaking, listening = open_mouth(clips["speech"]), open_mouth(clips["silence"])
    assert speaking.std() > 1.5 * listening.std()
    pcm = np.concatenate(list(read_audio(str(main_job.SPEECH))))[: 640 * len(speaking)]
    loud = np.sqrt(np.square(pcm.reshape(-1, 640)).mean(1))

    def follows(lag: int) -> float:
        """Correlation of the mouth with the loudness `lag` pictures earlier."""
        return float(np.corrcoef(np.roll(speaking, -lag)[8:-8], loud[8:-8])[0, 1])

    now = max(follows(lag) for lag in (-1, 0, 1))
    assert now > 0.1 and now > max(follows(lag) for lag in (-6, -5, -4, 4, 5, 6)) + 0.1, [follows(lag) for lag in range(-6, 7)]


def test_it_blinks_when_it_is_told(clips):
    """Open eyes are the sharpest contrast of a face; lids are skin."""
    for clip in clips.values():
        contrast, closure = clip[:, 46:62, 38:90].std((1, 2)), lid_closure(0, "session-0", 0, len(clip))  # generate's seed and session
        assert (closure > 0.8).sum() >= 2
        assert contrast[closure > 0.8].mean() < 0.87 * np.median(contrast[closure == 0]) and np.corrcoef(contrast, closure)[0, 1] < -0.4
