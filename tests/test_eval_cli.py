"""`liveavatar evaluate`: exit statuses, one-line refusals, reports that say the same when they are made again."""

import json
import shutil
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import speech
from PIL import Image
from test_cli import error_of, run

from liveavatar.__main__ import Ours
from liveavatar.conditioning.face import TRACKER_SHA256
from liveavatar.conditioning.faceprint import NETWORK_SHA256
from liveavatar.conditioning.framing import cut
from liveavatar.conditioning.media import VideoWriter
from liveavatar.conditioning.phones import Phone, Utterance, model_sha256
from liveavatar.core import Audio, ConfigError, InputError
from liveavatar.evaluation import closeup, jobs, plots, sanity, suite
from liveavatar.evaluation.backends import fingerprint, offline
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.commands import _gates
from liveavatar.evaluation.report import Check, Item, Measure, System, absent, read_report
from liveavatar.telemetry import Trace

pytest.importorskip("matplotlib", reason="the extra [eval]")


# ---------------------------------------------------------------- the form


def test_the_short_form_is_the_suite_command(tmp_path):
    for words in (("evaluate",), ("evaluate", "suite")):
        assert "absent.yaml: cannot read config" in error_of(*words, tmp_path / "absent.yaml")


@pytest.mark.parametrize("verb", ["suite", "drift", "sanity", "video", "statistics", "trace", "compare", "doctor", "human build", "human score"])
def test_every_command_explains_itself_with_examples(verb):
    result = run("evaluate", *verb.split(), "--help")
    assert result.exit_code == 0 and "Examples" in result.output and f"liveavatar evaluate {verb}" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [("evaluate trace {}/none.jsonl", "cannot read the trace"), ("evaluate video {}/none.mp4", "no such file"),
     ("evaluate compare {0}/a.json {0}/b.json", "cannot read the report"), ("evaluate human score {}/key.json", "cannot read the key"),
     ("evaluate human build --system x", "must read NAME=FOLDER"), ("evaluate human build --system x={}/none", "no folder with mp4"),
     ("evaluate doctor --config {}/none.yaml", "cannot read config"), ("evaluate trace {}/t --gate fps", "must read NAME>=NUMBER"),
     ("evaluate nosuch", "No such command")],
)  # fmt: skip
def test_unusable_inputs_are_one_line_and_status_2(tmp_path, words, said):
    assert said in error_of(*words.format(tmp_path).split())


def test_evaluations_are_checked_before_anything_is_made(tmp_path):
    path = tmp_path / "e.yaml"
    for text, said in [("out: x\n", "suite or drift"), ("out: x\nsuite: {folder: a, biuld: tiny}\n", "did you mean 'build'"),
                       ("out: x\nsuite: {folder: a, build: huge}\n", "suite.build"), ("out: x\ndrift: {}\ngates: {a: 3}\n", "gate a"),
                       ("out: x\ndrift: {seconds: 12}\n", "three windows"), 
                       (f"out: x\nsuite: {{folder: {tmp_path}/none}}\n", "cannot read the suite")]:
        path.write_text(text)
        assert said in error_of("evaluate", path, f"out={tmp_path / 'out'}")
    path.write_text("out: x\ndrift: {}\nbackends: {sincnet: {path: a, sha256: b}}\n")
    with pytest.raises(ConfigError, match="sincnet"):
        jobs.read_evaluation(path).given()


def test_shipped_evaluations_load():
    for name in ("tiny", "short", "long"):
        order = jobs.read_evaluation(f"configs/eval_{name}.yaml")
        assert (order.drift is None) == (name == "short") and not order.given().given
        assert order.suite is None or order.suite.build == name


def test_gates_on_the_command_line():
    assert _gates(["a.p50>=1", "a.p50<=2", "b<=-3e-1"]) == {"a.p50": {"min": 1.0, "max": 2.0}, "b": {"max": -0.3}}
    for text in ("a", "a>=", "a>=x", ">1", "a=3"):
        with pytest.raises(ConfigError, match="--gate"):
            _gates([text])


# ---------------------------------------------------------------- traces


@pytest.fixture
def trace(tmp_path):
    time = 10.0
    path = tmp_path / "run.jsonl"
    writer = Trace(path, lambda: time, started=9.0, sample_rate=16000, fps=25, samples_per_block=7680, frames_per_block=12, lookahead=0, facts={})
    writer.open("s", "offline")
    for block in range(6):
        writer.admitted([Audio("s", index=block)], 0.48, 0.0)
        time += 0.3
        writer.note("ready", session="s", epoch=0, block=block, count=12)
        writer.note("sent", session="s", epoch=0, block=block, count=12, pts=0.48 * block, due=None)
    writer.close()
    return path


def test_a_trace_becomes_a_report_and_a_failed_gate_is_status_1(tmp_path, trace):
    good = run("evaluate", "trace", trace, "--out", tmp_path / "a", "--gate", "rtf_unpaced>=1.5")
    assert good.exit_code == 0 and "gate rtf_unpaced >= 1.5: met (1.6)" in good.output
    bad = run("evaluate", "trace", trace, "--out", tmp_path / "b", "--gate", "rtf_unpaced>=1.7", "--gate", "nothing<=1")
    assert bad.exit_code == 1 and "FAILED (1.6)" in bad.output and "not judged (no such measure" in bad.output
    found = read_report(tmp_path / "a/report.json")
    assert found.kind == "trace" and found.measure("rtf_unpaced").value == pytest.approx(1.6) and found.host["cores"]
    text = (tmp_path / "a/report.md").read_text()
    assert "Speed of the reference" in text and all((tmp_path / "a" / name).read_text().startswith("<?xml") for name in found.plots)
    compared = run("evaluate", "compare", tmp_path / "a/report.json", tmp_path / "b/report.json")
    assert compared.exit_code == 0 and "| rtf_unpaced |" in compared.output and "| same |" in compared.output


# ---------------------------------------------------------------- doctor


def test_doctor_lists_everything():
    plain = run("evaluate", "doctor")
    assert plain.exit_code == 0
    assert all(word in plain.output for word in ("syncnet: not given", "research terms", "huggingface.co/facebook/dinov2-base"))
    for words in (f"face tracker: found, SHA-256 {TRACKER_SHA256}", "0.10.21, for all landmarks; Apache-2.0",
                  f"pocketsphinx: found, SHA-256 {model_sha256()}", f"dlib: found, SHA-256 {NETWORK_SHA256}", "flite: "):
        assert words in plain.output


def test_doctor_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {judge.name: judge for judge in offline()}
    assert "apt install flite" in found["flite"].note and "liveavatar[face]" in found["face tracker"].note
    assert not found["face tracker"].sha256 and found["pocketsphinx"].sha256


def test_doctor_fails_on_what_was_named_wrongly(tmp_path):
    (tmp_path / "i.pt").write_bytes(b"junk")
    (tmp_path / "d.yaml").write_text(f"backends: {{i3d: {{path: {tmp_path}/i.pt, sha256: {fingerprint(tmp_path / 'i.pt')}}}}}\n")
    named = run("evaluate", "doctor", "--config", tmp_path / "d.yaml")
    assert named.exit_code == 1 and "i3d: does not load" in named.output


# ---------------------------------------------------------------- videos and suites


@dataclass
class Scene:
    """What a renderer makes of a line, without one: a face no tracker knows, so that judging it takes no time."""

    frames: np.ndarray
    mumbled: np.ndarray
    portrait: np.ndarray
    pcm: np.ndarray
    phones: tuple
    text: str
    caption: str
    motion: dict
    points: dict = field(default_factory=dict)


def painted(line) -> Scene:
    rng = np.random.default_rng(line.seed)
    frames = np.repeat(rng.integers(0, 256, (1, 64, 64, 3), np.uint8), 25, 0)
    frames[:, 20:40, 20:40] = (np.arange(25) * 10)[:, None, None, None]
    return Scene(frames, frames, frames[0], speech(1.0, line.seed), (Phone("aa", 0.0, 1.0),), "ah", "a square", {"gap": np.sin(np.arange(25.0))})


@pytest.fixture
def small_suite(tmp_path, monkeypatch):
    """A suite of two items in tmp_path/suite. Its judge looks at the file, but not for faces: the real one has its own tests."""
    monkeypatch.setattr(suite, "judge_video", _brightness)
    monkeypatch.setattr(closeup, "draw", lambda suite, videos, items, folder: ())
    lines = [suite.Line(id=f"i{k}", identity=k, voice="slt", seed=k, seconds=1.0, size=64) for k in range(2)]
    return suite.build(tmp_path / "suite", "suite_small", "1", lines, painted)


def _brightness(video, audio=None, *, text, portrait, backends, language, **settings):
    assert text == "ah" and portrait.is_file() and language == "en"
    value = float(np.mean([picture.mean() for _, picture in video.frames()]))
    return [Measure(name="brightness", value=value, unit="", better="target", n=25, backend="test"),
            absent("Sync-C", backends.needs("syncnet", "s3fd"))]  # fmt: skip


def order(tmp_path, small_suite, **more) -> str:
    text = {"out": str(tmp_path / "out"), "suite": {"folder": str(small_suite.folder), "videos": str(tmp_path / "videos"), "sanity": False}, **more}
    (tmp_path / "e.yaml").write_text(json.dumps(text))
    return tmp_path / "e.yaml"


def test_a_suite_of_anybodys_videos_is_judged_and_judged_the_same_again(tmp_path, small_suite):
    (tmp_path / "videos").mkdir()
    for item in small_suite.manifest.items:
        shutil.copy(small_suite.path(item, "gt_video"), tmp_path / "videos" / f"{item.id}.mp4")
    path = order(tmp_path, small_suite, gates={"brightness": {"min": 50}})
    documents = []
    for _ in range(2):
        result = run("evaluate", path)
        assert result.exit_code == 0, result.output + str(result.exception)
        documents.append(json.loads((tmp_path / "out/report.json").read_text()))
    for document in documents:
        assert document.pop("date") and document.pop("host")
    assert documents[0] == documents[1]
    found = read_report(tmp_path / "out/report.json")
    assert found.origin.synthetic and len(found.items) == 2
    assert found.system == System(name="videos"), "nobody said who made them: nothing of ours is said of them"
    assert found.measure("brightness").n == 2 and found.measure("brightness").interval is not None
    assert "syncnet_v2.model" in found.measure("Sync-C").reason and found.measure("FID").status == "not_measured"
    text = (tmp_path / "out/report.md").read_text()
    assert text.startswith("# videos on suite_small (synthetic suite)") and "No sanity ranking" in text
    assert run("evaluate", path, "gates={brightness: {max: 50}}", "system.name=theirs", f"system.driver_sha256={'d' * 64}").exit_code == 1
    assert read_report(tmp_path / "out/report.json").system == System(name="theirs", driver_sha256="d" * 64)


def test_a_measure_that_ranks_wrongly_is_rejected_in_the_report_and_fails_sanity(tmp_path, small_suite, monkeypatch):
    """The ranking itself has its own tests."""
    wrong = Check(metric="brightness", needs="A > H", ok=False, detail="margins -1 over 2 items")
    monkeypatch.setattr(sanity, "ranking", lambda asked, backends: (wrong,) if asked == small_suite else ())
    (tmp_path / "videos").mkdir()
    for item in small_suite.manifest.items:
        shutil.copy(small_suite.path(item, "gt_video"), tmp_path / "videos" / f"{item.id}.mp4")
    path = order(tmp_path, small_suite)
    assert run("evaluate", "suite", path, "suite.sanity=true").exit_code == 0
    found = read_report(tmp_path / "out/report.json")
    assert found.measure("brightness").status == "rejected" and found.sanity == (wrong,)
    assert "**rejected** (sanity ranking: A > H does not hold)" in (tmp_path / "out/report.md").read_text()
    alone = run("evaluate", "sanity", path)
    assert alone.exit_code == 1 and "| brightness | A > H | **does not hold: rejected** |" in alone.output


def test_the_truth_is_seen_as_the_system_framed_the_portrait(tmp_path, small_suite, monkeypatch):
    """A trace beside a video says what was cut out of the portrait: the true pictures are cut alike, and the report says so."""
    references = {}

    def judged(video, *arguments, reference, truth, **settings):
        references[video.path.stem] = np.stack([picture for _, picture in reference.frames()])
        return _brightness(video, *arguments, **settings)

    monkeypatch.setattr(suite, "judge_video", judged)
    (tmp_path / "videos").mkdir()
    for item in small_suite.manifest.items:
        shutil.copy(small_suite.path(item, "gt_video"), tmp_path / "videos" / f"{item.id}.mp4")
    trace, box = tmp_path / "videos" / "i0.trace.jsonl", (8.0, -4.0, 56.0, 44.0)
    for written in (box, None):
        said = Trace(trace, lambda: 1.0, started=0.0, sample_rate=16000, fps=25, samples_per_block=7680, frames_per_block=12, lookahead=0, facts={})
        said.open("s", "offline")
        said.portrait("s", written)
        said.close()
        assert run("evaluate", "suite", order(tmp_path, small_suite)).exit_code == 0
        whole = np.stack([picture for _, picture in VideoFile(small_suite.path(small_suite.manifest.items[0], "gt_video")).frames()])
        shown = cut(torch.from_numpy(whole[3]).permute(2, 0, 1), box, 64, 64).permute(1, 2, 0).numpy() if written else whole[3]
        assert references["i0"].shape == whole.shape and np.array_equal(references["i0"][3], shown)
        crops = [item.picture["crop"] for item in read_report(tmp_path / "out/report.json").items]
        assert crops == ["portrait 8 -4 56 44" if written else "none", "none"]
    Image.new("RGB", (96, 64)).save(small_suite.path(small_suite.manifest.items[0], "portrait"))
    said = suite._reference(small_suite, small_suite.manifest.items[0], VideoFile(tmp_path / "videos" / "i0.mp4"), box)
    assert said.seen is None, "a portrait that is no picture of the video: its box says nothing of it"
    trace.write_text(trace.read_text() + '{"event":"portrait","t":1,"session":"s","box":[1,2]}\n')
    with pytest.raises(InputError, match="four numbers"):
        suite.cut_of(trace)


def test_a_missing_video_fails_its_item_and_is_named(tmp_path, small_suite):
    (tmp_path / "videos").mkdir()
    shutil.copy(small_suite.path(small_suite.manifest.items[0], "gt_video"), tmp_path / "videos" / "i0.mp4")
    result = run("evaluate", "suite", order(tmp_path, small_suite))
    assert result.exit_code == 0 and "left out: i1: " in result.output
    found = read_report(tmp_path / "out/report.json")
    assert any("i1" in line and "no such file" in line for line in found.exclusions)


def test_a_suite_without_one_usable_video_is_no_result(tmp_path, small_suite):
    result = run("evaluate", "suite", order(tmp_path, small_suite))
    progress, error = result.stderr.splitlines()
    assert result.exit_code == 2 and progress.startswith("judging") and error.startswith("error: ") and "none of the suite's 2 videos" in error
    assert not (tmp_path / "out/report.json").exists()


def test_videos_nobody_gave_are_made_once(tmp_path, small_suite, monkeypatch):
    made = []

    def generate(config, portrait, audio, out, prompt, seed, trace):
        assert portrait.is_file() and audio.is_file() and prompt == "a square"
        made.append(out.name)
        shutil.copy(small_suite.folder / out.name.replace(".mp4", ".gt.mp4"), out)

    monkeypatch.setattr(Ours, "generate", staticmethod(generate))
    path = order(tmp_path, small_suite)
    for _ in range(2):
        assert run("evaluate", "suite", path, "suite.videos=null").exit_code == 0
    assert made == ["i0.mp4", "i1.mp4"]
    system = read_report(tmp_path / "out/report.json").system
    assert "transformer.safetensors" in system.weights and system.name == "embedded avatar"
    assert (system.engine, system.driver, system.driver_sha256) == ("diffusion", "viseme encoder", system.weights["viseme_encoder/model.safetensors"])
    (tmp_path / "ears").write_bytes(b"wav2vec2")
    heard = Ours.weights(None) | {"wav2vec2/model.safetensors": tmp_path / "ears"}
    theirs = jobs.system_of(jobs.SystemSettings(engine="x"), SimpleNamespace(weights=lambda config: heard), None)
    assert (theirs.engine, theirs.driver, theirs.driver_sha256) == ("x", "wav2vec2", fingerprint(tmp_path / "ears"))
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(Ours, "weights", staticmethod(lambda config: {"transformer.safetensors": tmp_path / "other.safetensors"}))
    assert run("evaluate", "suite", path, "suite.videos=null").exit_code == 0
    assert made == ["i0.mp4", "i1.mp4"] * 2, "other weights' videos are not passed off as these"


def test_a_video_that_was_broken_off_is_made_again(tmp_path, small_suite, monkeypatch):
    """What is half written plays, as a shorter video would."""
    made = []

    def generate(config, portrait, audio, out, prompt, seed, trace):
        made.append(out.name)
        shutil.copy(small_suite.folder / out.name.replace(".mp4", ".gt.mp4"), out)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ours, "generate", staticmethod(generate))
    path = order(tmp_path, small_suite)
    run("evaluate", "suite", path, "suite.videos=null")
    assert run("evaluate", "suite", path, "suite.videos=null").exit_code == 0
    assert made == ["i0.mp4", "i1.mp4", "i1.mp4"]


def test_another_suite_than_the_one_asked_for_and_people_without_consent_are_refused(tmp_path, small_suite):
    people = small_suite.folder / "suite.json"
    people.write_text(people.read_text().replace('"synthetic": true', '"synthetic": false'))
    assert "i0 shows a person: say licence and consent" in error_of("evaluate", order(tmp_path, small_suite))
    people.write_text(people.read_text().replace('"synthetic": false', '"synthetic": true'))
    assert "holds suite_small 1, not suite_short 2, seed 2" in error_of("evaluate", order(tmp_path, small_suite), "suite.build=short", "suite.seed=2")


def test_one_video_of_any_system(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", 64, 64) as writer:
        writer.write(painted(suite.Line(id="x", identity=0, voice="slt", seed=3, seconds=1.0, size=64)).frames, speech(1.0))
    result = run("evaluate", "video", tmp_path / "v.mp4", "--out", tmp_path / "out", "--system", "theirs", "--gate", "width<=0")
    assert result.exit_code == 0, result.output + str(result.exception)
    found = read_report(tmp_path / "out/report.json")
    assert found.system == System(name="theirs")
    assert found.measure("tracker_noise_gap") is None and any("noise floor" in line and "0.006 IOD of the gap" in line for line in found.limits)
    assert found.kind == "video" and found.items[0].picture["width"] == 64 and found.items[0].sha256 and not found.origin.synthetic


def test_a_video_of_a_rendered_head_is_labelled(tmp_path, monkeypatch):
    """By the flag, and without it where the portrait is the embedded one (EVA-5)."""
    monkeypatch.setattr("liveavatar.evaluation.judge.judge_video", lambda file, **options: [])
    Image.new("RGB", (64, 64)).save(tmp_path / "me.png")
    shutil.copy(Ours.portrait, tmp_path / "renamed.png")
    with VideoWriter(tmp_path / "v.mp4", 64, 64) as writer:
        writer.write(np.zeros((5, 64, 64, 3), np.uint8), speech(0.2))
    for words, synthetic in (((), False), (("--synthetic",), True), (("--portrait", tmp_path / "renamed.png"), True),
                             (("--portrait", tmp_path / "me.png"), False)):
        assert run("evaluate", "video", tmp_path / "v.mp4", "--out", tmp_path / "out", *words).exit_code == 0
        assert read_report(tmp_path / "out/report.json").origin.synthetic is synthetic
        assert ("(synthetic suite)" in (tmp_path / "out/report.md").read_text()) is synthetic


def test_worst_items_are_drawn_even_without_a_face(tmp_path, monkeypatch):
    monkeypatch.setattr(closeup.sync, "heard", lambda pcm, text: (Utterance(pcm, (Phone("aa", 0.2, 0.8),), text, "given"), "given"))
    lines = [suite.Line(id=f"i{k}", identity=k, voice="slt", seed=k, seconds=1.0, size=64) for k in range(2)]
    small = suite.build(tmp_path / "suite", "suite_small", "1", lines, painted)
    (tmp_path / "videos").mkdir()
    items = []
    for item in small.manifest.items:
        shutil.copy(small.path(item, "gt_video"), tmp_path / "videos" / f"{item.id}.mp4")
        items.append(Item(id=item.id, picture={"width": 64}))
    assert closeup.draw(small, tmp_path / "videos", items, tmp_path / "plots") == ("plots/worst.svg",), "nothing was measured, so no curve means anything"
    items[1] = replace(items[1], measures=(Measure(name="sync_index", value=0.1, unit="", better="higher", n=1),))
    drawn = [f"plots/{name}.svg" for name in ("worst", "lag", "mouth", "response")]
    assert closeup.draw(small, tmp_path / "videos", items, tmp_path / "plots") == tuple(drawn)
    lags, sheet = ((tmp_path / f"plots/{name}.svg").read_text() for name in ("lag", "worst"))
    assert ">i1<" in lags and ">i0<" not in lags and ">i0: not measured<" in sheet
    assert closeup.draw(small, tmp_path / "videos", [], tmp_path / "plots") == ()
    assert "synthetic suite" in (tmp_path / "plots/worst.svg").read_text()


def test_drawings_are_the_same_again_and_labelled(tmp_path):
    times, values = np.arange(50) / 25, {"gap": np.sin(np.arange(50.0)), "width": np.cos(np.arange(50.0))}
    for name, synthetic in (("a", True), ("b", True), ("c", False)):
        plots.mouth(tmp_path / name / "mouth.svg", times, values, values, synthetic)
        plots.response(tmp_path / name / "response.svg", values, values, synthetic)
        plots.lag_curves(tmp_path / name / "lag.svg", {"x": [(-40.0, 0.1), (0.0, 0.5)]}, synthetic)
    for name in ("mouth", "response", "lag"):
        one, two, plain = ((tmp_path / folder / f"{name}.svg").read_text() for folder in "abc")
        assert one == two and "synthetic suite" in one and "synthetic suite" not in plain


# ---------------------------------------------------------------- drift and people


def test_a_plan_for_another_system_and_its_video(tmp_path, monkeypatch):
    settings = {"seconds": 9.0, "window": 2.0, "portrait": str(tmp_path / "me.png")}
    (tmp_path / "e.yaml").write_text(json.dumps({"out": str(tmp_path / "out"), "drift": settings}))
    Image.new("RGB", (64, 64)).save(tmp_path / "me.png")
    planned = run("evaluate", "drift", tmp_path / "e.yaml", "--plan")
    assert planned.exit_code == 0 and "windows at 0, 3.5, 7 s" in planned.output and (tmp_path / "out/audio.wav").exists()
    with VideoWriter(tmp_path / "long.mp4", 64, 64) as writer:
        for k in range(9):
            writer.write(np.full((25, 64, 64, 3), 100 + 3 * k, np.uint8), np.zeros(16000, np.float32))
    monkeypatch.setattr("liveavatar.evaluation.judge.judge_video", lambda window, **settings: [])
    result = run("evaluate", "drift", tmp_path / "e.yaml", f"drift.video={tmp_path}/long.mp4")
    assert result.exit_code == 1 and "gate colour change <= 2: FAILED" in result.output, result.output + str(result.exception)
    found = read_report(tmp_path / "out/report.json")
    assert len(found.details["windows"]) == 3 and found.measure("picture_luma.change").value > 5
    text = (tmp_path / "out/report.md").read_text()
    assert "needs the trace of the run" in text and "| picture_luma |" in text and "nothing is said about minutes" in text
    assert "another plan" in error_of("evaluate", "drift", tmp_path / "e.yaml", f"drift.video={tmp_path}/long.mp4", "drift.seed=9")
    assert "made already" in error_of("evaluate", "drift", tmp_path / "e.yaml", f"drift.video={tmp_path}/long.mp4", "drift.first_position=9")


def test_a_warped_drift_run_says_what_it_is(tmp_path, monkeypatch):
    """The counter of positions goes to whoever makes the video, and into the report."""
    asked = []

    def generate(config, portrait, audio, out, prompt, seed, trace, first_position=0):
        asked.append(first_position)
        with VideoWriter(out, 64, 64) as writer:
            writer.write(np.full((225, 64, 64, 3), 100, np.uint8), np.zeros(9 * 16000, np.float32))
        trace.write_text(json.dumps({"kind": "start", "time": 0.0}) + "\n")

    monkeypatch.setattr("liveavatar.__main__.Ours.generate", staticmethod(generate))
    monkeypatch.setattr("liveavatar.evaluation.judge.judge_video", lambda window, **settings: [])
    monkeypatch.setattr("liveavatar.evaluation.jobs._marks", lambda trace: [])
    (tmp_path / "e.yaml").write_text(json.dumps({"out": str(tmp_path / "out"), "drift": {"seconds": 9.0, "window": 2.0, "first_position": 44990}}))
    run("evaluate", "drift", tmp_path / "e.yaml")
    limits = " ".join(read_report(tmp_path / "out/report.json").limits)
    assert asked == [44990] and "time positions start at 44990" in limits and "arithmetic, not drift" in limits


def test_a_study_from_the_command_line(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for item in ("x", "y"):
            with VideoWriter(tmp_path / name / f"{item}.mp4", 32, 32) as writer:
                writer.write(np.full((10, 32, 32, 3), 90, np.uint8), speech(0.4))
    systems = ("--system", f"ours={tmp_path}/a", "--system", f"theirs={tmp_path}/b")
    built = run("evaluate", "human", "build", *systems, "--out", tmp_path / "study", "--side", 64, "--sheets", 2)
    assert built.exit_code == 0 and (tmp_path / "study/index.html").exists(), built.output + str(built.exception)
    scored = run("evaluate", "human", "score", tmp_path / "study.key.json", "--out", tmp_path / "out")
    assert scored.exit_code == 0 and "not measured** (no ratings collected)" in (tmp_path / "out/report.md").read_text().replace("**not", "not")
