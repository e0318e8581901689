"""A live session on tape: pieces of speech as they are spoken, and file and trace that tell the same."""

import asyncio
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from liveavatar.config import Config, RuntimeConfig
from liveavatar.core import FPS, SAMPLE_RATE
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.traces import judge_trace, onsets, read_trace
from liveavatar.evaluation.turns import live, sent_at
from liveavatar.serving import taping, testcard
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig


def test_silence_is_not_pushed_and_whoever_is_interrupted_did_not_end():
    tone = np.full(SAMPLE_RATE // 5, 0.3, np.float32)
    quiet = lambda seconds: np.zeros(round(seconds * SAMPLE_RATE), np.float32)  # noqa: E731
    pcm = np.concatenate([quiet(0.4), tone, quiet(0.4), tone, quiet(1.0), tone, quiet(1.0)])
    made = taping.pieces(pcm, [2.4])
    assert len(made) == 85 and all(len(piece) == taping.PIECE for piece, _, _ in made)
    assert [n for n, (_, spoken, _) in enumerate(made) if spoken] == [*range(10, 30), *range(55, 60)]
    assert [n for n, (_, _, ends) in enumerate(made) if ends] == [29]


@pytest.fixture(scope="module")
def taped(tmp_path_factory):
    """(file, trace) of five seconds: speech, cut off at 2 s, new speech, another portrait at 3.6 s."""
    folder = tmp_path_factory.mktemp("tape")
    Image.fromarray(np.full((128, 128, 3), 90, np.uint8)).save(folder / "other.png")
    pcm = np.zeros(5 * SAMPLE_RATE, np.float32)
    for start, stop in ((0.6, 2.0), (3.2, 4.0)):
        pcm[round(start * SAMPLE_RATE) : round(stop * SAMPLE_RATE)] = 0.3
    engine = Config(runtime=RuntimeConfig(sessions=1, trace=str(folder / "t.jsonl")))
    config = ServeConfig(engine_kind="testcard", engine=engine)
    role = Role(avatar="a", picture=folder / "other.png")
    events = [(2.0, "interrupt", None), (3.6, "portrait", folder / "other.png")]
    asyncio.run(taping._tape(config, role, pcm, events, folder / "t.mp4"))
    return VideoFile(folder / "t.mp4"), live(read_trace(folder / "t.jsonl"), "t.jsonl")


def test_file_and_trace_agree_picture_by_picture(taped):
    video, run = taped
    stream = run.streams[0]
    pictures = list(video.frames())
    assert len(pictures) == sum(line["count"] for line in (*stream["sent"], *stream["repeated"]))
    assert 4.5 < len(pictures) / FPS < 7
    shown = {round(at * FPS): picture for at, picture in pictures}
    counted, agree = Counter(), []
    for line in stream["sent"]:
        number = testcard.read_code(shown[round(line["pts"] * FPS)])[0]
        agree.append(number == 12 * line["block"] + counted[line["block"]])
        counted[line["block"]] += 1
    assert np.mean(agree) > 0.8, "all but those that are blended into another"
    left = sent_at(stream, np.array([at for at, _ in pictures]))
    assert (np.diff(left) > 0).all() and len(stream["step"]) == 1


def test_interruption_and_new_speech_stand_where_they_happened(taped):
    video, run = taped
    stream = run.streams[0]
    found = {m.name: m for m in judge_trace(run)}
    cut, = stream["interrupt"]
    first, second = onsets(run, stream)
    assert cut["t"] - first.heard == pytest.approx(1.36, abs=0.3)
    assert second.heard - cut["t"] == pytest.approx(1.24, abs=0.3)
    assert 0 < found["turn_latency.p50"].value < 2
    assert found["time_to_silence"].value < 0.3 and found["time_to_fresh"].value < 1
    open_at = {at: testcard.mouth_open(picture) > 0.15 for at, picture in video.frames()}
    times = sent_at(stream, np.array(list(open_at)))
    between = (times > cut["t"] + 0.5) & (times < second.shown - 0.05)
    late = np.array(list(open_at.values()))[between].any()
    assert any(open_at.values()) and not late, "nothing of the old speech is seen half a second later"


def test_a_tape_with_a_hole_is_no_tape():
    film = taping.Tape(lambda: 5.0)
    lines = []
    film.trace.note = lambda event, **values: lines.append(event)
    tick = taping.Tick(0, 0, "filler", np.zeros((2, 2, 3), np.uint8), np.zeros(1920, np.int16))
    film.put(tick)
    assert not film.pictures and not len(film), "before the first generated picture there is nothing to keep"
    film.put(replace(tick, block=0, kind="idle"))
    film.put(tick)
    assert film.pictures == 2 and lines == ["repeated"]
