"""The command line as a stranger meets it: help everywhere, and for every bad input one line, a status, nothing left."""

import struct
import subprocess
import sys
import wave
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from liveavatar.__main__ import app
from liveavatar.runtime import placement

VERBS = {
    "generate": ("--image", "--audio", "--prompt", "--config", "--out", "--seed", "--ranks", "--launcher", "--length", "--trace", "Ctrl-C"),
    "parity": ("FIXTURE", "--ranks", "--launcher", "tests/golden"),
    "inspect": ("PATH", "--lora", "default"),
    "plan": ("--official", "--memory", "--tflops", "--ranks", "--config"),
    "train": ("STAGE", "--config", "forcing", "export"),
    "evaluate": ("suite", "video", "drift", "trace", "human", "sanity", "compare", "doctor"),
}


def run(*arguments):
    """Invoke in this process, wide enough that nothing wraps in the middle of a word."""
    return CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


def error_of(*arguments) -> str:
    """The one line an invocation is refused with."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    for word in (*VERBS[verb], "Examples", f"liveavatar {verb}"):
        assert word in result.output, word


def test_help_lists_the_verbs_and_loads_nothing_heavy():
    code = ("import sys; sys.argv = ['liveavatar', '--help']\nfrom liveavatar.__main__ import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code\n"
            "assert not {'torch', 'transformers', 'diffusers', 'av'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def good(tmp_path, tiny_folder):
    """Arguments of a job that would work, and the empty folder it would write into."""
    Image.fromarray(np.full((80, 80, 3), 128, np.uint8)).save(tmp_path / "me.png")
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(bytes(32000))
    (tmp_path / "out").mkdir()
    return {"image": tmp_path / "me.png", "audio": tmp_path / "speech.wav", "out": tmp_path / "out" / "a.mp4",
            "settings": [f"model.path={tiny_folder}", "model.device=cpu"]}


def refused(good, *more, **changes) -> str:
    """The error of the good job with changes; and that it left nothing behind."""
    job = {**good, **changes}
    line = error_of("generate", "--image", job["image"], "--audio", job["audio"], "--out", job["out"], *more, *job["settings"])
    assert not list(good["out"].parent.iterdir())
    return line


def bomb(path):
    """A well-formed PNG header of 40,000 x 40,000 pixels."""
    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = part(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b""))


def small(path):
    Image.new("RGB", (20, 20)).save(path)


def corrupt(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("make", "word"),
    [(small, "20x20"), (corrupt, "damaged"), (bomb, "save a smaller copy"), (lambda p: p.write_bytes(b""), "empty"),
     (lambda p: p.write_text("hello"), "not a picture"), (lambda p: None, "no such file"), (lambda p: p.mkdir(), "not a file")],
    ids=["too_small", "corrupt", "bomb", "empty", "text", "absent", "folder"],
)  # fmt: skip
def test_unusable_portraits(good, tmp_path, make, word):
    make(tmp_path / "bad.png")
    line = refused(good, image=tmp_path / "bad.png")
    assert word in line and "bad.png" in line


@pytest.mark.parametrize(
    ("make", "word"),
    [(lambda p: p.write_bytes(b""), "empty"), (lambda p: p.write_bytes(b"RIFF" + bytes(range(200))), "not a recording"),
     (lambda p: None, "no such file"), (lambda p: Image.new("RGB", (8, 8)).save(p, "png"), "no audio")],
    ids=["empty", "corrupt", "absent", "picture"],
)  # fmt: skip
def test_unusable_recordings(good, tmp_path, make, word):
    make(tmp_path / "bad.wav")
    line = refused(good, audio=tmp_path / "bad.wav")
    assert word in line and "bad.wav" in line


def test_a_recording_without_samples(good, tmp_path):
    with wave.open(str(tmp_path / "bad.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
    assert "bad.wav" in refused(good, audio=tmp_path / "bad.wav")


@pytest.mark.parametrize(("out", "word"), [("absent/a.mp4", "absent"), ("a.txt", ".mp4"), (".", ".mp4")])
def test_unusable_outputs(good, out, word):
    assert word in refused(good, out=good["out"].parent / out)


def test_an_older_result_survives_a_refusal(good):
    good["out"].write_bytes(b"older")
    error_of("generate", "--image", "absent.png", "--out", good["out"])
    assert good["out"].read_bytes() == b"older"


def test_unknown_keys_name_the_nearest_right_one(good, tmp_path):
    assert "'sampler.stps'" in (line := refused(good, "sampler.stps=3")) and "did you mean 'steps'" in line
    (tmp_path / "run.yaml").write_text("runtime: {lancher: local}")
    line = refused(good, "--config", tmp_path / "run.yaml")
    assert "run.yaml" in line and "did you mean 'launcher'" in line
    assert "must read a.b=value" in refused(good, "speech.wav")
    assert "did you mean 'local'" in refused(good, "--launcher", "locl")


@pytest.mark.parametrize(
    ("words", "parts"),
    [(["generate", "--confg", "x"], ("--confg", "--config", "liveavatar generate --help")),
     (["generate", "--length", "0"], ("--length", "0.04")), (["generate", "--length", "inf"], ("--length", "finite")),
     (["generate", "--ranks", "0"], ("--ranks", "1")), (["generate", "--seed", "x"], ("--seed", "integer")),
     (["plan", "--official", "--memory", "inf"], ("--memory", "finite")), (["inspect"], ("PATH", "liveavatar inspect --help")),
     (["genrate"], ("genrate", "generate"))],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_option_is_one_line_too(words, parts):
    line = error_of(*words)
    assert all(part in line for part in parts), line


def test_no_arguments_at_all_show_the_help():
    result = run()
    assert all(verb in result.output for verb in VERBS) and "error:" not in result.output


def test_an_empty_path_is_not_the_embedded_default(good):
    assert "recording's path is empty" in refused(good, audio="")
    assert "not a file" in refused(good, image="")


def test_a_result_over_its_own_input_is_refused(good):
    talk = good["audio"].with_name("talk.mp4")
    talk.write_bytes(good["audio"].read_bytes())
    line = refused(good, audio=talk, out=talk)
    assert "--audio" in line and "another name" in line and talk.read_bytes() == good["audio"].read_bytes()
    assert "--image" in refused(good, image=good["image"].rename(good["image"].with_suffix(".mp4")), out=good["image"].with_suffix(".mp4"))


@pytest.mark.parametrize("text", ["sampler.shift=0", "sampler.shift=-3", "sampler.shift=.nan", "sampler.shift=.inf", "runtime.threads=0",
                                  "runtime.threads=-1", "runtime.in_flight=0", "runtime.queued_seconds=.nan", "stages=[]"])  # fmt: skip
def test_numbers_that_cannot_work(good, text):
    assert text.partition("=")[0] in refused(good, text)


def test_a_config_file_that_cannot_be_read(good, tmp_path):
    line = refused(good, "--config", tmp_path / "absent.yaml")
    assert line.count("absent.yaml") == 1 and "YAML" in line and "Errno" not in line


def test_cuts_that_do_not_concatenate(good):
    assert "step1" in refused(good, "stages=[[condition, step0], [step2, step3, decode]]")
    assert "decode" in refused(good, "stages=[[condition, step0, step1, step2, step3]]")
    assert "choose 1 to 6" in refused(good, "--ranks", "7")


def test_wrong_checkpoints(good, tmp_path):
    assert "no such checkpoint folder" in refused(good, settings=["model.path=/absent"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.bin").write_bytes(b"x")
    assert "no known checkpoint layout" in refused(good, settings=[f"model.path={tmp_path / 'other'}"])


def test_a_checkpoint_of_another_model_lists_the_keys(good, tmp_path, tiny_folder):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "transformer.safetensors")
    tensors["blocks.1.stranger"] = tensors.pop("blocks.1.self_attn.q.weight")
    save_file(tensors, folder / "transformer.safetensors")
    report = run("inspect", folder)
    assert report.exit_code == 1 and "will NOT load" in report.output
    line = refused(good, settings=[f"model.path={folder}", "model.device=cpu"])
    for text in (report.output, line):
        assert "blocks.1.stranger" in text and "blocks.1.self_attn.q.weight" in text


def test_too_little_memory_is_refused_with_the_numbers(good, monkeypatch):
    monkeypatch.setattr(placement, "host_memory", lambda: 1_000_000)
    line = refused(good)
    assert "1.0 MB" in line and "GB" in line and "runtime.sessions" in line


# ---------------------------------------------------------------- inspect, plan, parity


def test_inspect_says_what_a_folder_holds(tiny_folder, tmp_path):
    result = run("inspect", tiny_folder)
    assert result.exit_code == 0 and "will load" in result.output
    for part in ("transformer", "vae", "text_encoder", "tensors"):
        assert part in result.output
    assert run("inspect", tmp_path).exit_code == 1


def test_plan_needs_no_gpu_and_no_weights(tiny_folder):
    result = run("plan", "--official", "--ranks", 5, "--memory", 80, "--tflops", 400, "runtime.sessions=1")
    assert result.exit_code == 0
    for word in ("decode", "704x384", "bottleneck", "FPS"):
        assert word in result.output
    result = run("plan", "--official", "--ranks", 5, "--memory", 40, "runtime.sessions=1")
    assert result.exit_code == 1 and "does not fit" in result.output and "40.00 GB" in result.output
    assert run("plan", "--ranks", 2, f"model.path={tiny_folder}", "model.device=cpu").exit_code == 0


def test_parity_ends_in_one_json_line():
    import json

    result = run("parity", "tests/golden/schedule")
    verdict = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and verdict["ok"] is True and set(verdict) == {"max_rel_err", "max_abs_err", "cases", "ok"}
    assert "absent" in error_of("parity", "absent")


def test_train_refuses_what_is_no_recipe(tmp_path):
    assert "did you mean 'vae'" in error_of("train", "vea", "--config", "configs/train_tiny.yaml")
    assert "absent.yaml" in error_of("train", "all", "--config", "absent.yaml")
    assert "unknown key 'sed'" in error_of("train", "all", "--config", "configs/train_tiny.yaml", "sed=1")
