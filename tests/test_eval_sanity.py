"""The whole judge on rendered heads: every metric ranks as it must, suites are what they say, a file gets its measures."""

import dataclasses
import shutil

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="the face tracker's runtime")
pytest.importorskip("cv2", reason="the face tracker's pictures")
pytest.importorskip("dlib", reason="likeness")
pytest.importorskip("pocketsphinx", reason="phones")
pytest.importorskip("skimage", reason="SSIM")

from test_eval_backends import lpips_files

from liveavatar.conditioning import phones
from liveavatar.conditioning.face import TRACKER_SHA256
from liveavatar.conditioning.media import VideoWriter, read_audio
from liveavatar.core import InputError
from liveavatar.evaluation import closure, jobs, judge, landmarks, likeness, sanity, suite, sync
from liveavatar.evaluation.backends import KNOWN, Backends, Given
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.judge import judge_video
from liveavatar.evaluation.report import Measure, rejected
from liveavatar.evaluation.suite import read_suite, read_truth

pytestmark = pytest.mark.timeout(900)  # the first test waits for renders and for every variant's judgement: a minute on an idle core


@pytest.fixture(scope="module")
def found(rendered_suite):
    return sanity.values_of(rendered_suite)


@pytest.mark.parametrize("order", sanity.ORDERS, ids=lambda o: f"{o.metric}: {o.needs}".replace(" ", "_"))
def test_every_metric_ranks_what_is_known(found, order):
    check = sanity.examine(order, found)
    assert check.ok, check.detail


def test_a_metric_that_ranks_wrongly_is_rejected(found):
    """Values swapped between the real pair and wrong speech."""
    swapped = [{**v, "A": v["C"], "C": v["A"]} for v in found]
    check = sanity.examine(next(o for o in sanity.ORDERS if o.metric == "r0"), swapped)
    assert check.ok is False
    made = rejected([Measure(name="r0", value=0.8, unit="", better="higher")], [check])[0]
    assert made.status == "rejected" and "A > B" in made.reason


def test_a_tie_is_a_failure_and_one_item_no_proof(found):
    order = next(o for o in sanity.ORDERS if o.metric == "sync_index")
    tied = [{**v, "B": v["A"]} for v in found]
    assert sanity.examine(order, tied).ok is False
    assert sanity.examine(order, found[:1]).ok is None


def test_orders_of_the_users_networks_are_the_specs():
    """Constructed values: those of a good judge pass, those of one that is blind do not."""
    backends = Backends({name: Given(path="x", sha256="7be5be79" if name == "lpips_backbone" else f"961e8696{'0' * 52}5442") for name in KNOWN})
    good = {"A": {"Sync-C": 7.0, "Sync-D": 7, "sync_offset": 40, "LPIPS": 0, "tLPIPS": 0, "Dino-S": 0.9, "Dino-S_worst": 0.8, "ArcFace": 0.8,
                  "ArcFace_worst": 0.7}, "B": {"Sync-C": 7.1, "Sync-D": 7.1, "sync_offset": 240}, "C": {"Sync-C": 2, "Sync-D": 11},
            "D": {"Sync-C": 1, "Sync-D": 12}, "G": {"Dino-S": 0.5, "ArcFace": 0.1}, "H": {"LPIPS": 0.3}, "I": {"tLPIPS": 0.1}}  # fmt: skip
    blind = {variant: dict.fromkeys(row, 1.0) for variant, row in good.items()}
    orders = sanity.orders_of(backends)
    assert {o.metric for o in orders} == {"Sync-C", "Sync-D", "sync_offset", "LPIPS", "tLPIPS", "Dino-S", "ArcFace"}
    assert all(sanity.examine(o, [good] * 2).ok for o in orders) and not any(sanity.examine(o, [blind] * 2).ok for o in orders)


def test_the_users_networks_are_ranked_too(rendered_suite, tmp_path, monkeypatch):
    """Random weights for the wiring: what is ranked with them has their name."""
    monkeypatch.setattr(sanity, "BRIEF", 6)
    backends = Backends(lpips_files(tmp_path))
    item = rendered_suite.manifest.items[0]
    bench = sanity.Bench(rendered_suite, item, item, rendered_suite.manifest.items[1], tmp_path, backends)
    exact = VideoFile(rendered_suite.path(item, "gt_video"))
    frames = np.stack([frame for _, frame in exact.frames(end=1.0)])
    monkeypatch.setattr(VideoFile, "frames", lambda file, start=0.0, end=1.0, whole=VideoFile.frames: whole(file, start, 1.0))
    bench._by_weights(exact, frames, bench._said(item))
    name = "LPIPS (other weights)"
    assert bench.values["A"][name] == pytest.approx(0, abs=1e-6) and bench.values["H"][name] > 0 and bench.values["I"][f"t{name}"] > 0
    assert np.isnan(bench.values["G"]["Dino-S"]) and np.isnan(bench.values["B"]["Sync-C"])
    monkeypatch.setattr(sanity, "values_of", lambda suite, items=None, backends=None: [bench.values] * 2)
    ranked = {check.metric: check.ok for check in sanity.ranking(rendered_suite, backends)}
    assert ranked[name] is True and "Sync-C" not in ranked


# ---------------------------------------------------------------- suites


def test_suite_reads_back_and_refuses_other_files(rendered_suite, tmp_path):
    again = read_suite(rendered_suite.folder)
    assert again.sha256 == rendered_suite.sha256 and [i.id for i in again.manifest.items] == ["tiny_0", "tiny_3"]
    for path in rendered_suite.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tiny_0.wav").write_bytes(b"other")
    with pytest.raises(InputError, match="tiny_0.wav"):
        read_suite(tmp_path)


def test_the_same_recipe_gives_the_same_bytes(tmp_path):
    """Built twice from the same renders: manifest, WAV, video and motion are equal."""
    from types import SimpleNamespace

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (10, 64, 64, 3), dtype=np.uint8)
    made = SimpleNamespace(frames=frames, mumbled=frames, portrait=frames[0], pcm=rng.normal(0, 0.1, 6400).astype(np.float32), phones=(),
                           text="t", caption="c", motion={"gap": np.ones(10)}, points={61: np.ones((10, 2))})
    built = [suite.build(tmp_path / name, "s", "1", suite.tiny()[:1], lambda line: made) for name in "ab"]
    assert built[0].sha256 == built[1].sha256
    assert suite.tiny(1) == suite.tiny(1) != suite.tiny(2)


def test_truth_survives_its_file(rendered_suite):
    item = rendered_suite.manifest.items[0]
    truth = read_truth(rendered_suite.path(item, "gt_motion"))
    assert len(truth.times) == 150 and set(truth.channels) == {"gap", "width", "blink", "yaw", "pitch", "roll"}
    assert len(truth.points) == 48 and all(path.shape == (150, 2) and (path > 0).all() and (path < 128).all() for path in truth.points.values())
    assert truth.channels["gap"].min() < 0.02 < 0.15 < truth.channels["gap"].max()
    with pytest.raises(InputError, match="commanded motion"):
        read_truth(rendered_suite.path(item, "audio"))


# ---------------------------------------------------------------- one file


def test_the_judge_of_sync_is_known_by_its_models():
    """So that a driver that is the same model can be found out (EVA-7)."""
    found = [Measure(name=name, value=0.5, unit="", better="higher", backend=by)
             for name, by in (("r0", sync.BACKEND), ("closure", closure.BACKEND), ("lmd", landmarks.BACKEND), ("warp_error", "own"))]
    aligned, given = ({m.name: m for m in judge._signed(found, source)} for source in ("phones aligned to the words", sync.GIVEN))
    assert [m.weights_sha256 for m in aligned.values()] == [f"{phones.model_sha256()}+{TRACKER_SHA256}"] * 2 + [TRACKER_SHA256, None]
    assert [m.weights_sha256 for m in given.values()] == [TRACKER_SHA256] * 3 + [None]
    assert "pocketsphinx" in aligned["r0"].backend and "given phones" in given["r0"].backend and "given phones" in given["closure"].backend


@pytest.fixture(scope="module")
def judged(rendered_suite, tmp_path_factory):
    """Two seconds of an item, mute, as another system might hand them in with its sound apart: judged with all there is."""
    item = rendered_suite.manifest.items[0]
    rows = [frame for _, frame in VideoFile(rendered_suite.path(item, "gt_video")).frames(0, 2)]
    path = tmp_path_factory.mktemp("judged") / "other.mp4"
    with VideoWriter(path, 128, 128) as writer:
        writer.write(np.stack(rows), np.zeros(0, np.float32))
    made = judge_video(path, rendered_suite.path(item, "audio"), reference=rendered_suite.path(item, "gt_video"), text=item.text,
                       truth=read_truth(rendered_suite.path(item, "gt_motion")), portrait=rendered_suite.path(item, "portrait"))
    return {m.name: m for m in made}


def test_one_file_gets_every_measure(judged):
    for name in ("r0", "closure", "lmd", "response_gap_slope", "warp_error", "jerk", "motion_speech", "psnr_mouth", "ssim_face", "sharpness"):
        assert judged[name].measured or judged[name].reason, name
    assert judged["lmd_gt"].value < 0.04 and abs(judged["lmd_gt"].value - judged["lmd_gt_floor"].value) < 0.005
    for name, most in (("gap", 0.03), ("width", 0.03), ("lids", 0.03)):
        found = judged[f"tracker_noise_{name}"]
        assert found.n == 50 and 0 < found.value < most and found.interval[0] < found.value, "measured on the exact render, not stated"
    assert judged["lmd"].value < 0.01 and judged["psnr_full"].value > 35
    assert judged["response_gap_slope"].value == pytest.approx(1, abs=0.15)
    assert judged["face_share"].value == 1
    assert judged["lmd"].weights_sha256 == TRACKER_SHA256 and judged["jerk"].weights_sha256 == TRACKER_SHA256
    assert 50 < judged["face_x"].value < 78 and 40 < judged["face_y"].value < 90 and 20 < judged["face_iod"].value < 50, "pixels of 128"


def test_what_needs_weights_says_so(judged):
    for name in ("Sync-C", "Sync-D", "LPIPS", "Dino-S", "ArcFace", "ASE"):
        assert judged[name].status == "not_measured" and "needs" in judged[name].reason, name


def test_a_mute_file_has_no_sync(rendered_suite, tmp_path):
    with VideoWriter(tmp_path / "mute.mp4", 128, 128) as writer:
        writer.write(np.zeros((30, 128, 128, 3), np.uint8), np.zeros(0, np.float32))
    made = {m.name: m for m in judge_video(tmp_path / "mute.mp4")}
    assert not made["r0"].measured and made["face_share"].value == 0
    assert not made["jerk"].measured and not made["id_dlib"].measured and not made["sharpness"].measured


def test_a_suite_judges_files_by_name(rendered_suite, tmp_path, monkeypatch):
    """A file that is missing fails its item and not the others."""
    first = rendered_suite.manifest.items[0]
    (tmp_path / f"{first.id}.mp4").write_bytes(rendered_suite.path(first, "gt_video").read_bytes())
    counted = Measure(name="r0", value=1.0, unit="", better="higher")
    monkeypatch.setattr(suite, "judge_video", lambda file, sound, **settings: [counted] if settings["text"] == first.text else [])
    items = suite.judge_suite(rendered_suite, tmp_path)
    assert items[0].measures == (counted,) and items[0].picture["codec"] == "h264"
    assert items[1].measures[0].status == "failed" and "no such file" in items[1].measures[0].reason


def test_portrait_without_a_face_is_refused(tmp_path, rendered_suite):
    from PIL import Image

    Image.fromarray(np.full((128, 128, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(InputError, match="0 faces"):
        judge_video(rendered_suite.path(rendered_suite.manifest.items[0], "gt_video"), portrait=tmp_path / "grey.png")


def test_the_long_suite_is_sound_with_silences_and_a_portrait(tmp_path):
    """suite_long's lines, one of them shortened: pauses of half a second and more, phones that agree with the sound, nothing rendered but the portrait."""
    performance = pytest.importorskip("liveavatar.training.synth.performance")
    if not shutil.which("flite"):
        pytest.skip("flite is not installed (apt install flite)")
    lines = suite.long()
    assert len(lines) == 15 and lines[-1].seconds == 10_000 and all(300 < line.seconds <= 360 for line in lines[:-1])
    assert len({line.id for line in lines}) == 15 and len({line.identity for line in lines}) == 3 and suite.long(2) != lines
    short = dataclasses.replace(lines[0], seconds=40.0, size=64)
    built = suite.build(tmp_path, "suite_long", "1", [short], performance.Stage())
    (item,) = built.manifest.items
    assert not item.gt_video and built.path(item, "gt_motion") is None and item.text and set(item.sha256) == {"long_00.png", "long_00.wav"}
    pcm = np.concatenate(list(read_audio(built.path(item, "audio"))))
    pauses = [p for p in item.phones if p.name == "pau" and p.end - p.start >= 0.5]
    assert len(pcm) == 40 * 16000 and len(pauses) >= 3 and item.phones[-1].end <= 40
    for pause in pauses:
        assert np.abs(pcm[round((pause.start + 0.15) * 16000) : round((pause.end - 0.15) * 16000)]).max(initial=0) < 0.05
    assert max(np.abs(pcm).max(), 0) > 0.1


def test_a_seam_where_the_face_becomes_another_is_measured(rendered_suite, tmp_path):
    first, second = (list(VideoFile(rendered_suite.path(item, "gt_video")).frames(end=4.0)) for item in rendered_suite.manifest.items)
    path = tmp_path / "cut.mp4"
    with VideoWriter(path, 128, 128) as writer:
        writer.write(np.stack([frame for _, frame in first[:50] + second[:50]]), np.zeros(4 * 16000, np.float32))
    far, usual = likeness.jump(VideoFile(path), 2.0)
    kept, _ = likeness.jump(VideoFile(rendered_suite.path(rendered_suite.manifest.items[0], "gt_video")), 2.0)
    assert kept < 0.2 < far and usual < far / 2
    assert likeness.jump(VideoFile(path), 0.5) is None  # the file begins inside the stretch before it
    picture, face = jobs._seams(VideoFile(path), [(1.0, "refresh"), (2.0, "restarted")], path)
    assert picture.value > 3 and (face.value, face.n) == (far, 1)
    assert {m.status for m in jobs._seams(VideoFile(path), [], None)} == {"not_measured"}
