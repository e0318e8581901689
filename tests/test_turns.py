"""Conversations: what a suite of turns asks for, and that planted waits of mouth and person are found exactly."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import run
from test_eval_traces import LOUD, Scene

from liveavatar.conditioning.media import read_audio
from liveavatar.conditioning.phones import PAUSE, VOWELS, Phone, merge_pauses
from liveavatar.core import FPS, SAMPLE_RATE, Audio, InputError
from liveavatar.evaluation import suite, turns
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.landmarks import Track
from liveavatar.evaluation.report import read_report
from liveavatar.evaluation.traces import read_trace
from liveavatar.evaluation.turns import Change, Closing


# ---------------------------------------------------------------- what is asked for


class Spoken:
    """What a renderer makes of a spoken line, without one: 4.5 s of speech, half a second of silence, and so on."""

    frames = mumbled = None
    text, caption, motion = "", "a square", {}

    def __init__(self, line):
        names = ("m", "aa", "s", "iy", "t") * 9 + (PAUSE,) * 5
        tenths = (Phone(names[n % 50], n / 10, (n + 1) / 10) for n in range(round(10 * line.seconds)))
        self.phones = merge_pauses(tenths)
        loud = [0.3 * (names[n % 50] != PAUSE) for n in range(round(10 * line.seconds))]
        self.pcm = np.repeat(np.array(loud, np.float32), SAMPLE_RATE // 10)
        self.portrait = np.full((64, 64, 3), line.identity % 256, np.uint8)


def built(folder, count: int = 1):
    return suite.build(folder, "suite_turns", "1", suite.turns()[:count], turns.staged(Spoken))


def test_interruptions_fall_into_speech_and_what_follows_is_new(tmp_path):
    made = built(tmp_path / "a", 3)
    for item in made.manifest.items:
        pcm = np.concatenate(list(read_audio(made.path(item, "audio"))))
        assert len(pcm) == 60 * SAMPLE_RATE and item.phones[0].start == 0 and item.phones[-1].end == 60
        cuts = [event.time for event in item.events if event.kind == "interrupt"]
        assert len(cuts) >= 3 and [e.time for e in item.events] == sorted(e.time for e in item.events)
        for at in cuts:
            here = round(at * SAMPLE_RATE)
            assert at * FPS == pytest.approx(round(at * FPS)) and pcm[here - SAMPLE_RATE // 2 : here - 200].all()
            assert not pcm[here : here + SAMPLE_RATE * 2].any() and pcm[here:].any(), "silence, and then new speech"
            last = next(p for p in item.phones if p.start < at - 0.001 <= p.end)
            assert last.name in VOWELS
        (change,) = (event for event in item.events if event.kind == "portrait")
        assert item.portrait != change.portrait and change.portrait in item.sha256
        assert any(p.start < change.time < p.end and p.name != PAUSE for p in item.phones)


def test_the_same_seed_gives_the_same_bytes_and_other_suites_know_nothing_of_events(tmp_path):
    assert built(tmp_path / "a").sha256 == built(tmp_path / "b").sha256
    line = suite.Line(id="x", identity=1, voice="slt", seed=1, seconds=2.0, size=64, spoken=True)
    suite.build(tmp_path / "c", "suite_x", "1", (line,), turns.staged(Spoken))
    assert "events" not in json.loads((tmp_path / "c/suite.json").read_text())["items"][0]


# ---------------------------------------------------------------- what is found


def lips(gaps) -> Track:
    """A face 100 pixels between the eyes, whose lips are so far apart, 25 pictures a second."""
    points = np.zeros((len(gaps), 468, 3), np.float32)
    points[:, 263, 0], points[:, 14, 1] = 100, 100 * np.asarray(gaps)
    return Track(np.arange(len(gaps)) / FPS, points, np.ones(len(gaps), int))


def talking(*parts) -> np.ndarray:
    """(pictures, gap) one after the other."""
    return np.concatenate([np.full(count, gap) for count, gap in parts])


def test_the_closing_of_the_lips_is_found_to_the_picture():
    gaps = talking((100, 0.12), (10, 0.12), (3, 0.01), (2, 0.1), (60, 0.008), (50, 0.12))
    sent = 500 + np.arange(len(gaps)) / FPS
    (found,) = turns.closings(lips(gaps), sent, [503.99], [sent[175]])
    once, stay, last = (pytest.approx(sent[n] - 503.99) for n in (110, 115, 169))
    assert found == Closing(once, stay, last), "three pictures are closed first, but not for good"


def test_lips_that_never_close_or_never_opened_are_not_taken_for_closed():
    gaps = talking((100, 0.12), (100, 0.05), (100, 0.12), (100, 0.01), (100, 0.01))
    sent = np.arange(len(gaps)) / FPS
    first, second = turns.closings(lips(gaps), sent, [3.99, 15.99], [8.0, 19.0])
    assert first == Closing(None, None, pytest.approx(8 - turns.OPENING - 3.99, abs=0.05)) and second is None
    share = {m.name: m for m in turns.mouths([first], 1)}
    assert share["mouth_closed"].status == "failed" and share["mouth_closed_share"].value == 0
    both = {m.name: m for m in turns.mouths([first, Closing(0.1, 0.5, 3.0), Closing(0.2, 0.7, 3.0)], 1)}
    assert both["mouth_closed"].value == pytest.approx(0.7) and "1 not before new speech" in both["mouth_closed"].reason
    assert both["mouth_closed_once"].value == pytest.approx(0.2) and "1 left out" in both["mouth_closed"].reason
    assert both["mouth_closed_share"].value == pytest.approx(2 / 3)
    assert {m.status for m in turns.mouths([], 2)} == {"not_measured"}


def test_closed_lips_of_the_new_person_are_measured_by_their_own_rest():
    gaps = talking((100, 0.01), (100, 0.06), (100, 0.1), (50, 0.05), (50, 0.1))
    sent = np.arange(len(gaps)) / FPS
    first, second = (turns.closings(lips(gaps), sent, [10.99], [14.0], **more)[0] for more in ({}, {"changed": 8.0}))
    assert first.stay is None and second.stay == pytest.approx(sent[300] - 10.99)


def test_the_new_person_is_found_to_the_picture():
    sent = np.arange(0, 20, 0.04)
    nearer = np.where(sent < 11.0, -0.2, 0.2)
    nearer[sent == sent[260]] = 0.1  # one picture that looked like it
    found = turns.change(sent, nearer, 10.0)
    assert found == Change(pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0))
    nearer[(sent > 12) & (sent < 14)] = -0.1
    assert turns.change(sent, nearer, 10.0).after == pytest.approx(7 / 9, abs=0.05)
    never = turns.change(sent, np.full(len(sent), -0.1), 10.0)
    assert never == Change(None, 1.0, 0.0)
    told = {m.name: m for m in turns.persons([never])}
    assert told["portrait_change"].status == "failed" and told["portrait_after"].value == 0
    assert {m.status for m in turns.persons([turns.change(sent[:0], nearer[:0], 10.0)])[1:]} == {"not_measured"}


def test_pictures_leave_when_the_trace_says_so(tmp_path):
    scene = Scene(tmp_path / "t.jsonl")
    scene.sent(101.0, 0, 0.0, count=2)
    scene.sent(101.3, 1, 0.08)
    scene.sent(101.5, 1, 0.2)  # two pictures repeated before
    scene.trace.close()
    times = np.array([0, 0.04, 0.08, 0.12, 0.16, 0.2])
    found = turns.sent_at(read_trace(scene.path).streams[0], times)
    assert found == pytest.approx([101, 101, 101.3, 101.34, 101.38, 101.5])


# ---------------------------------------------------------------- a whole item, with a clock that only the test moves

WAIT, SHUT, NEW = 0.64, 0.32, 1.2  # planted: until the picture of speech, shut lips, the new person


def played(item, pcm, path, late: float = 0.0) -> Scene:
    """The trace of a system that shows every sample WAIT later and forgets what it was interrupted in."""
    scene, begin, rows, epoch = Scene(path), 200.0, pcm.reshape(-1, 640), 0
    events = {round(event.time * FPS): event.kind for event in item.events}
    scene.at(begin).note("opened", session="s")
    for n, row in enumerate(rows, 1):
        now = begin + n / FPS
        if row.any():
            scene.at(now).received("s", epoch, row)
        scene.at(now).admitted([Audio("s", epoch=epoch, index=n)], 0.04 * row.any(), 0.0)
        shown = n - round((WAIT - 0.04) * FPS)
        scene.sent(now, max(shown, 0), (n - 1) / FPS, epoch=epoch, due=now)
        kind = events.get(n)
        if kind == "interrupt":
            epoch += 1
            scene.at(now + late).interrupt("s", epoch)
        elif kind == "portrait":
            scene.at(now).note("step", session="s", what="portrait")
    scene.trace.close()
    return scene


@pytest.fixture
def item_played(tmp_path, monkeypatch):
    """(suite, item, folder with the trace); pictures and persons are planted, no tracker runs."""
    made = built(tmp_path / "suite")
    (item,) = made.manifest.items
    pcm = np.concatenate(list(read_audio(made.path(item, "audio"))))
    (tmp_path / "videos").mkdir()
    played(item, pcm, tmp_path / "videos/turns_00.trace.jsonl")

    def look(video, stream, asked, old, new):
        sent = turns.sent_at(stream, np.arange(1500) / FPS)
        heard = np.append(np.zeros(round(WAIT * FPS)), pcm.reshape(-1, 640).any(1))[:1500] > 0
        for line in stream["interrupt"]:
            heard[(sent > line["t"] + SHUT - 0.01) & (sent < line["t"] + 1.9)] = False
        near = np.abs(sent - asked) < 10
        return lips(np.where(heard, 0.1, 0.01)), sent, sent[near], np.where(sent[near] < asked + NEW - 0.01, -0.1, 0.1)

    monkeypatch.setattr(turns, "look", look)
    monkeypatch.setattr(turns, "read_portrait", lambda path: SimpleNamespace(embedding=None))
    return made, item, tmp_path / "videos"


def test_planted_waits_of_a_whole_item_are_recovered(item_played):
    made, item, folder = item_played
    judged = turns.judge(made, item, None, read_trace(folder / "turns_00.trace.jsonl"))
    found = {m.name: m for m in turns.measures([judged])}
    interrupts = sum(event.kind == "interrupt" for event in item.events)
    assert found["mouth_closed"].value == pytest.approx(SHUT, abs=1e-3) and found["mouth_closed"].n == interrupts
    assert found["mouth_closed_share"].value == 1 and found["portrait_change"].value == pytest.approx(NEW, abs=1e-3)
    assert found["portrait_before"].value == found["portrait_after"].value == 1
    assert found["turn_latency.p50"].value == pytest.approx(WAIT - 0.04, abs=1e-3)
    assert found["time_to_fresh"].value == pytest.approx(0.04, abs=1e-3) and found["underruns"].value == 0
    assert found["frame_interval.p50"].value == pytest.approx(0.04) and "memory_rss.start" not in found


def test_streams_that_went_through_something_else_are_refused(item_played):
    made, item, folder = item_played
    pcm = np.concatenate(list(read_audio(made.path(item, "audio"))))
    late = read_trace(played(item, pcm, folder / "late.jsonl", late=0.8).path)
    with pytest.raises(InputError, match="not those of the suite"):
        turns.judge(made, item, None, late)
    scene = Scene(folder / "offline.jsonl", pace="offline")
    scene.at(100.0).received("s", 0, LOUD)
    scene.sent(101.0, 0, 0.0)
    scene.trace.close()
    with pytest.raises(InputError, match="0 live streams"):
        turns.judge(made, item, None, read_trace(scene.path))


def test_a_part_of_the_suite_of_another_system_is_judged_from_the_command_line(item_played, monkeypatch):
    made, item, folder = item_played
    suite.write_video(folder / "turns_00.mp4", np.zeros((25, 64, 64, 3), np.uint8), np.zeros(16000, np.float32))
    order = folder.parent / "e.yaml"
    asked = {"folder": str(made.folder), "videos": str(folder)}
    order.write_text(json.dumps({"out": str(folder.parent / "out"), "suite": asked}))
    result = run("evaluate", order, "suite.items=1", "system.name=theirs")
    assert result.exit_code == 0, result.output + str(result.exception)
    found = read_report(folder.parent / "out/report.json")
    assert found.measure("mouth_closed").measured and found.system.name == "theirs"
    assert any("turns_00" in line for line in found.limits)
    assert "no other" in run("evaluate", order, "suite.items=[other]").output.replace("\n", " ")
    (folder / "turns_00.trace.jsonl").unlink()
    result = run("evaluate", order)
    assert result.exit_code == 2 and "cannot read the trace" in result.output.replace("\n", " ")


def test_our_own_streams_are_played_with_their_events(item_played, monkeypatch):
    from liveavatar.__main__ import Ours

    made, item, folder = item_played
    asked = []

    def converse(config, portrait, audio, events, out, prompt, seed, trace):
        asked.append(events)
        shutil.copy(folder / "turns_00.trace.jsonl", trace)
        suite.write_video(out, np.zeros((25, 64, 64, 3), np.uint8), np.zeros(16000, np.float32))

    monkeypatch.setattr(Ours, "converse", staticmethod(converse))
    order = folder.parent / "e.yaml"
    order.write_text(json.dumps({"out": str(folder.parent / "out"), "suite": {"folder": str(made.folder)}}))
    assert run("evaluate", order).exit_code == 0
    (events,) = asked
    assert [(at, kind) for at, kind, _ in events] == [(e.time, e.kind) for e in item.events]
    assert [file.is_file() for _, kind, file in events if kind == "portrait"] == [True]
    assert VideoFile(folder.parent / "out/videos/turns_00.mp4").seconds
    assert read_report(folder.parent / "out/report.json").system.weights
