"""The gates: measures with known answers, and one whole judgement of a tiny checkpoint of random weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny, tiny_model
from drawn_clips import drawn_clip, write_corpus
from typer.testing import CliRunner

from liveavatar.__main__ import app
from liveavatar.conditioning.behaviour import LIDS_AND_HEAD, head_pose
from liveavatar.conditioning.phones import WIDE_OPEN, Phone, Utterance
from liveavatar.conditioning.visemes import articulate
from liveavatar.config import load
from liveavatar.core import ConfigError, InputError, WeightsError
from liveavatar.evaluation import gate_measures as gm
from liveavatar.evaluation import gate_runs, gates
from liveavatar.evaluation.report import read_report
from liveavatar.models.probe import Probe, ProbeSizes, save_probe
from liveavatar.models.weights import inspect_folder
from liveavatar.training import export

rng = np.random.default_rng(0)
MOUTHS = [np.convolve(rng.random(93), np.ones(5) / 5, "same").astype(np.float32) * 0.3 for _ in range(6)]


def test_slope_and_correlation_are_within_clips():
    told = [0.7 * m + offset for m, offset in zip(MOUTHS, range(6))]  # people differ; that is no slope
    rows = gm.moments(told, MOUTHS)
    assert gm.slope(rows) == pytest.approx(0.7, abs=1e-5) and gm.correlation(rows) == pytest.approx(1, abs=1e-6)
    assert gm.correlation(gm.moments([0 * m for m in MOUTHS], MOUTHS)) == 0


def test_lag_has_a_sign_and_wrong_speech_scores_low():
    late = [np.roll(m, 3) for m in MOUTHS]
    assert gm.best_lag(late, MOUTHS)[0] == 3 and gm.best_lag(MOUTHS, late)[0] == -3 and gm.best_lag(MOUTHS, MOUTHS)[0] == 0
    crossed = gm.crossed(MOUTHS, MOUTHS)
    assert crossed.shape == (30, 3) and abs(gm.correlation(crossed)) < 0.2


def test_the_sanity_ranking_holds_for_truth_and_fails_for_noise():
    order = list(gm.sanity([m + 0.02 * rng.normal(size=len(m)) for m in MOUTHS], MOUTHS).values())
    assert order == sorted(order, reverse=True) and len(set(order)) == 4 and order[-1] == 0
    noise = gm.sanity([0.1 * rng.normal(size=len(m)) for m in MOUTHS], MOUTHS)
    assert noise["true"] < 0.4
    assert gm.sync_index([1e-4 * m for m in MOUTHS], MOUTHS) == 0  # jitter is no motion, however well it correlates


def test_closure_counts_shut_lips_around_the_phone():
    clip = drawn_clip("held", 0)
    phones = [["m", 0.18, 0.22], ["aa", 0.58, 0.62], ["b", 0.80, 0.82], ["p", 5.0, 5.1]]  # the last is beyond the pictures
    clip = replace(clip, card={**clip.card, "phones": phones})
    gap = np.full(25, 0.2, np.float32)
    gap[6] = 0.0  # 40 ms after the middle of m
    shut, share = gm.closure([gap], [clip])
    assert shut.tolist() == [True, False] and share == 0.5
    assert gm.closure([gap], [clip], WIDE_OPEN)[1] == 0
    assert np.isnan(gm.closure([gap], [clip], ("zh",))[1])


def test_blinks_are_dips_and_near_ones_are_one():
    lid = np.full(250, 0.2)
    lid[[20, 21, 23, 100, 101, 200]] = 0.03
    lid[150] = 0.14  # a look downwards
    assert gm.blinks(lid) == 3
    rate, count = gm.blink_rate([lid, np.full(250, 0.1)])
    assert (rate, count) == (pytest.approx(3 / (20 / 60)), 3)


def test_pictures_seams_flicker_and_spread():
    change = np.ones(47)
    change[11::12] = 2
    assert gm.seam_ratio(change, 12) == pytest.approx(2)
    truth = np.full((10, 8, 8, 3), 100, np.uint8)
    truth[::2, :4] = 160  # the upper half moves
    made = truth.copy()
    made[::2, 4:] += 4
    assert gm.background_flicker(made, truth) == pytest.approx(2)
    assert gm.background_flicker(made, made + (np.arange(10) * 9).astype(np.uint8)[:, None, None, None]) is None
    assert gm.psnr(truth, truth + 1) == pytest.approx(48.13, abs=0.01)
    boxes = np.tile(np.array([[0, 4, 8, 8]], float), (10, 1))
    assert gm.box_psnr(made, truth, boxes) == pytest.approx(10 * np.log10(255**2 / 8), abs=0.01)
    assert gm.spread_within([np.array([0.0, 2]), np.array([10.0, 12])]) == 1
    assert [len(w) for w in gm.windows(np.arange(25), 10)] == [10, 10] and len(gm.windows(np.arange(5), 10)) == 1


def test_audio_messages_are_the_heads():
    pcm = np.arange(70, dtype=np.float32)
    messages = list(gate_runs.audio_messages(pcm, 3, 20, 5))
    assert [(m.index, m.start, len(m.pcm)) for m in messages] == [(0, 0, 25), (1, 25, 20), (2, 45, 20)]
    assert np.array_equal(np.concatenate([m.pcm for m in messages]), pcm[:65])


def test_a_stream_repeats_its_words_after_a_period():
    clips = [drawn_clip("held", i) for i in range(3)]  # 75 pictures
    period, chunks = gate_runs.looped(clips, 200, 12)
    pcm = np.concatenate(list(chunks))
    assert period == 72 and len(pcm) == 200 * 640
    assert np.array_equal(pcm[: 72 * 640], pcm[72 * 640 : 144 * 640]) and pcm.std() > 0.01


def test_the_watch_keeps_windows_one_period_apart():
    probe = Probe(ProbeSizes(size=16, widths=(8,), blocks=(1,), code=4, hidden=8, identity=4)).eval()
    pictures = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    watch = gate_runs.Watch(probe, np.eye(4, dtype=np.float32)[0], 8, 8)
    for start in range(0, 40, 4):
        watch(pictures[start : start + 4])
    whole = probe.look(pictures)
    assert np.allclose(watch.first, whole.features[:8], atol=1e-4) and np.allclose(watch.last, whole.features[32:], atol=1e-4)
    assert len(watch.series("change")) == 39 and len(watch.series("lid")) == watch.pictures == 40
    watch(pictures[:4])  # not yet a whole period more: the last window stays
    assert np.allclose(watch.last, whole.features[32:], atol=1e-4)


# ---------------------------------------------------------------- a whole judgement


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with drawn clips and a probe that knows nothing."""
    folder = tmp_path_factory.mktemp("gates")
    write_corpus(folder / "data", held=3, default=4)
    torch.manual_seed(0)
    save_probe(folder / "probe", Probe(ProbeSizes(size=32, widths=(8, 16), blocks=(1, 1), code=4, hidden=8, identity=4)), {"iterations": 0})
    return folder


def settings(model) -> list[str]:
    return [f"model.path={model}", "model.device=cpu", "model.dtype=float32", "runtime.threads=1"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A checkpoint that is told when to blink and how to hold its head; read only."""
    return save_tiny(tmp_path_factory.mktemp("told"), transformer=tiny_model(cond_dim=20), control=LIDS_AND_HEAD)


@pytest.fixture(scope="module")
def judged(place, tiny_folder):
    """(result of the command, its report); the avatar itself plays the teacher."""
    torch.set_num_threads(1)
    out = place / "gates.json"
    arguments = ["evaluate", "gates", *settings(tiny_folder), "--data", str(place / "data"), "--probe", str(place / "probe"), "--frames", "48", "--clips", "2",
                 "--teacher", str(place / "data"), "--full", str(tiny_folder), "--out", str(out)]
    return CliRunner().invoke(app, arguments), out


def test_random_weights_fail_and_the_exit_status_says_so(judged):
    result, out = judged
    assert result.exit_code == 1, result.output
    report = read_report(out)
    verdicts = {gate.name: gate.ok for gate in report.gates}
    assert set(verdicts) == set(gates.DEMANDS)
    assert verdicts["vae_psnr"] is False and verdicts["size_mb"] is True and report.failed
    assert "FAIL" in result.output and "not measured" in result.output
    for name in ("speed", "audio_to_motion_r", "id_dlib", "media_mismatches"):
        assert verdicts[name] is None and report.measure(name).reason
    for name, words in (("blink_slope", "control on"), ("blink_rate_ratio", "without control, 48 pictures"), ("blink_rate_ratio_control", "control on")):
        assert report.measure(name).reason.startswith(words)
    for axis in ("yaw", "pitch", "roll"):
        assert abs(report.measure(f"head_{axis}_r").value) <= 1 and np.isfinite(report.measure(f"head_{axis}_slope").value)
    assert json.loads(out.read_text())["origin"]["synthetic"] is True


@pytest.mark.parametrize("pictures", [3 * 150 + 70, 2 * 150])
def test_the_first_and_the_last_window_hold_their_heads_alike(pictures):
    spread, period, second = (3.0, 2.0, 1.2), 150, 25
    told, own = gate_runs.repeated_head(5, spread, period, pictures), head_pose(5, gate_runs.SESSION, 0, pictures, spread)
    last = (pictures // period - 1) * period
    alike = period if last > period else period - second  # of two windows the first ends in what leads to the second
    assert told[last : last + alike] == pytest.approx(own[:alike], abs=1e-5)
    assert np.array_equal(told[: last - second], own[: last - second]) and np.array_equal(told[last + period + second :], own[last + period + second :])
    assert np.abs(np.diff(told, axis=0)).max() < 1


class Foretold:
    """A front end that says of each clip what is said in it, but of `wrong` noise."""

    def __init__(self, clips, wrong):
        self.clips, self.wrong = {clip.sound.tobytes(): clip for clip in clips}, wrong

    def features_of(self, sound, count):
        clip = self.clips[sound.tobytes()]
        spoken = Utterance(sound, tuple(Phone(*row) for row in clip.card["phones"]), "", "")
        said = articulate(spoken, np.arange(4 * count) / 100)[::4]
        if self.wrong is not None:
            said[:, self.wrong] = np.random.default_rng(0).random(count)
        return torch.from_numpy(said.T[None])


def test_what_is_heard_is_judged_by_the_articulator_that_is_heard_worst():
    phones = [["pau", 0, 0.2], ["b", 0.2, 0.3], ["uw", 0.3, 0.5], ["iy", 0.5, 0.8], ["aa", 0.8, 1.0]]
    clips = [replace(clip, card=clip.card | {"phones": phones}) for clip in (drawn_clip("held", k) for k in range(2))]
    assert gm.heard(Foretold(clips, None), clips) == pytest.approx(dict.fromkeys(("jaw", "close", "wide", "round"), 1))
    wrong = gm.heard(Foretold(clips, 3), clips)
    assert abs(wrong["round"]) < 0.6 and wrong["jaw"] == pytest.approx(1)


def test_the_lids_of_a_take_are_those_of_its_clip(tiny_folder):
    clip, avatar = drawn_clip("held", 0), gate_runs.Avatar(load(None, settings(tiny_folder)))

    def made(closure) -> np.ndarray:
        return avatar.make(np.zeros((64, 64, 3), np.uint8), clip.sound, "", 1, 0, closure)[1]

    shut = np.ones(12, np.float32)
    assert np.array_equal(made(0 * shut), made(0 * shut)) and not np.array_equal(made(0 * shut), made(shut))


def test_engine_and_rollout_are_equal_bit_for_bit(judged):
    report = read_report(judged[1])
    for name in ("streaming_difference", "half_file_difference", "served_dtype_difference"):
        assert report.measure(name).value == 0, name


def test_every_measure_says_what_it_rests_on(judged, place):
    report = read_report(judged[1])
    for measure in report.metrics:
        assert not measure.measured or measure.n or measure.name.startswith("blink"), measure
        assert measure.backend != "probe" or not measure.measured or len(measure.weights_sha256) == 64
    assert report.measure("probe_fd_over_teacher").value > 0
    assert set(report.system.weights) == {"transformer.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    groups = {group for group, _ in gate_runs.grouped_clips(place / "data")}
    assert groups == set(gate_runs.GROUPS)


def test_demands_are_those_of_the_specification():
    wanted = {"vae_psnr": (32, None), "vae_mouth_psnr": (30, None), "vae_aperture_slope": (0.97, None), "vae_blink_slope": (0.95, None),
              "sync_ratio": (0.95, None), "sync_shuffled": (None, 0.15), "aperture_slope": (0.9, 1.1), "width_slope": (0.85, 1.15),
              "closure": (0.9, None), "closure_readings": (0.85, None), "blink_slope": (0.9, 1.1), "blink_rate_ratio": (0.7, 1.3), "blink_rate_ratio_control": (0.7, 1.3), "id_dlib": (None, 0.35),
              "drift_probe_fd_ratio": (None, 1.1), "latent_std_ratio": (0.95, 1.08), "seam_ratio": (None, 1.05), "background_flicker": (None, 1.5),
              "streaming_difference": (None, 0), "size_mb": (None, 25)}  # fmt: skip
    for name, limits in wanted.items():
        assert (gates.DEMANDS[name].get("min"), gates.DEMANDS[name].get("max")) == limits, name


def test_the_card_takes_the_report_of_its_own_weights_only(judged, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "own")
    export.add_gates(tmp_path / "own", judged[1])
    card = json.loads((tmp_path / "own" / "liveavatar.json").read_text())["card"]["gates"]
    assert set(card["rows"]) == set(gates.DEMANDS) and card["command"].startswith("liveavatar")
    assert card["rows"]["vae_psnr"]["verdict"] == "fail" and card["rows"]["speed"]["reason"].startswith("needs --speed")
    assert inspect_folder(tmp_path / "own").will_load
    with (tmp_path / "own" / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ConfigError, match="judges another vae/"):
        export.add_gates(tmp_path / "own", judged[1])
    with pytest.raises(ConfigError, match="no report of gates"):
        export.add_gates(tmp_path / "own", tmp_path / "none.json")


def test_media_list_and_files_must_agree(tmp_path):
    root = tmp_path / "assets"
    shutil.copytree(Path(gates.DEFAULT_FOLDER).parent, root, ignore=shutil.ignore_patterns("transformer*", "vae"))
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    missing = gates.media_mismatches(root / "MEDIA.md", root, files)
    assert "default/transformer.safetensors" in missing and "portrait.png" not in missing
    (root / "portrait.png").write_bytes(b"other")
    assert "portrait.png" in gates.media_mismatches(root / "MEDIA.md", root, files)


def test_refusals(place, tiny_folder, tmp_path):
    config = load(None, settings(tiny_folder))
    job = gates.GateJob(data=place / "data", probe=place / "probe", frames=48)
    for change, error, words in (({"data": tmp_path}, InputError, "holds no held/clip"),
                                 ({"probe": tmp_path / "none"}, WeightsError, "no probe here")):
        with pytest.raises(error, match=words):
            gates.gates(config, replace(job, **change), "test")
    with pytest.raises(ConfigError, match="frames=12"):
        replace(job, frames=12)
    write_corpus(tmp_path / "large", held=1)
    clip = drawn_clip("held", 0, size=96)
    with pytest.raises(InputError, match="render the held-out clips in its size"):
        gate_runs.take_clip(gate_runs.Avatar(config), Probe(ProbeSizes(size=16, widths=(8,), blocks=(1,))), "held", clip, 0)


def test_speed_is_what_the_benchmark_wrote_of_one_rank(tmp_path):
    written = {"machine": {"cpu": "some", "cores": 2}, "commit": "abc", "rows": [{"ranks": 2, "fps": 80, "frames": 9}, {"ranks": 1, "fps": 31.5, "frames": 200}]}
    (tmp_path / "speed.json").write_text(json.dumps(written))
    judgement = gates.Judgement.__new__(gates.Judgement)
    judgement.job = gates.GateJob(data=tmp_path, probe=tmp_path, speed=tmp_path / "speed.json")
    measure = judgement.speed()
    assert (measure.value, measure.n) == (31.5, 200) and "commit abc, one rank" in measure.reason
    (tmp_path / "speed.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match=r"speed.json: no result of bench/pipeline.py"):
        judgement.speed()
