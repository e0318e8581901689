"""Videos become clips: footage on one clock, every bad video dropped for its own reason, shards that read like files."""

import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from drawn_clips import drawn_clip

if any(importlib.util.find_spec(name) is None for name in ("scenedetect", "webdataset")):
    pytest.skip("pip install 'liveavatar[videos]'", allow_module_level=True)

from liveavatar.__main__ import _sync_verdict
from liveavatar.conditioning import face
from liveavatar.conditioning.media import VideoWriter
from liveavatar.core import ConfigError, InputError
from liveavatar.training import footage, forcing, ingest, losses, probing, recipe, shards
from liveavatar.training.data import DataConfig

MICRO = Path(__file__).parents[1] / "configs" / "train_micro.yaml"
SIZE, PICTURES = 160, 77


def write(path, frames, pcm):
    with VideoWriter(path, frames.shape[2], frames.shape[1]) as writer:
        writer.write(frames, pcm.astype(np.float32))


def videos(folder, **changes):
    return ingest.VideosConfig(**{"folder": str(folder), "licence": "CC0-1.0", "consent": "nobody: rendered", "held_share": 0.0, **changes})


def data(folder, pictures=PICTURES):
    return DataConfig(folder=str(folder), size=64, pictures=pictures)


# ---------------------------------------------------------------- footage


def test_footage_keeps_pictures_sound_and_cuts_on_one_clock(tmp_path):
    first, second = drawn_clip("train", 0, person=0), drawn_clip("train", 1, person=1, size=64)
    frames = np.concatenate([first.frames, 255 - second.frames])
    pcm = np.concatenate([c.pcm[: 25 * 640] for c in (first, second)]) / 32768
    write(tmp_path / "a.mp4", frames, pcm)
    read, sound = list(footage.pictures_of(tmp_path / "a.mp4")), footage.sound_of(tmp_path / "a.mp4")
    assert len(read) == 50 and max(np.abs(a.astype(int) - b).mean() for a, b in zip(read, frames)) < 6
    assert np.corrcoef(sound[: len(pcm)], pcm)[0, 1] > 0.9 > np.corrcoef(np.roll(sound[: len(pcm)], 20), pcm)[0, 1]
    assert footage.shots_of(tmp_path / "a.mp4", 50) == [(0, 25), (25, 50)]


def test_other_rates_are_read_by_their_time_stamps(tmp_path):
    frames = np.repeat((np.arange(25) * 10).astype(np.uint8)[:, None, None, None], 3, axis=3) + np.zeros((1, 32, 32, 1), np.uint8)
    with VideoWriter(tmp_path / "slow.mp4", 32, 32, fps=10) as writer:
        writer.write(frames, np.zeros(0, np.float32))
    read = [p.mean() for p in footage.pictures_of(tmp_path / "slow.mp4")]
    assert len(read) == 61  # the last of 25 pictures is due at 2.4 s
    assert np.allclose([read[k] for k in (0, 3, 25, 60)], [0, 10, 100, 240], atol=3)  # at 0, .12, 1 and 2.4 s
    assert len(footage.sound_of(tmp_path / "slow.mp4")) == 0


def test_stretches_are_whole_clips_inside_a_shot():
    assert ingest.stretches(10, 500, 93, 200) == [(10, 196), (196, 382), (382, 475)]
    assert ingest.stretches(0, 92, 93, 500) == [] and ingest.stretches(0, 93, 93, 10) == [(0, 93)]


# ---------------------------------------------------------------- crops and filters


def make_face(x=80.0, y=80.0, size=60.0, gap=4.0) -> face.Face:
    """Landmarks on an ellipse, the named ones where they belong."""
    angle = np.linspace(0, 2 * np.pi, 468)
    points = np.stack([x + size * 0.8 * np.cos(angle), y + size * np.sin(angle), 0 * angle], axis=1).astype(np.float32)
    for rim, side in ((face.CONTOUR_RIGHT, -1), (face.CONTOUR_LEFT, 1)):
        turn = np.linspace(0, 2 * np.pi, len(rim), endpoint=False)
        points[list(rim), :2] = np.stack([x + side * 0.4 * size + 5 * np.cos(turn), y - 0.3 * size + 2 * np.sin(turn)], axis=1)
    for index, at in zip((13, 14, 61, 291, 0, 17), ((0, -gap / 2), (0, gap / 2), (-10, 0), (10, 0), (0, -gap), (0, gap))):
        points[index, :2] = x + at[0], y + 0.5 * size + at[1]
    return face.Face((*points[:, :2].min(0), *points[:, :2].max(0)), 0.9, points)


def test_faces_are_judged_by_number_presence_and_size():
    config, one = videos("x"), make_face()
    assert ingest.face_reason([[one]] * 20, config) == ""
    assert ingest.face_reason([[one]] * 18 + [[one, make_face(30)]] * 2, config) == "several faces"
    assert ingest.face_reason([[one]] * 18 + [[]] * 2, config) == "no face"
    assert ingest.face_reason([[make_face(size=40)]] * 20, config) == "small face"


def test_labels_are_those_of_the_crop():
    faces = [[make_face(gap=g)] for g in (8.0, 2.0, 8.0)] + [[]]
    points = ingest.followed(faces)
    assert points.shape == (4, 468, 2) and np.array_equal(points[3], points[2])
    box = ingest.crop_box(points, (160, 160, 3), 1.9, (64, 64))
    frames = [np.full((160, 160, 3), i * 10, np.uint8) for i in range(4)]
    arrays = ingest.arrays_of(frames, points, box, np.zeros(10, np.float32), (64, 64))
    assert arrays["frames"].shape == (4, 64, 64, 3) and arrays["reference"].mean() == pytest.approx(10, abs=1)  # the closed mouth
    assert np.allclose(arrays["aperture"], [8 / 48, 2 / 48, 8 / 48, 8 / 48], atol=1e-3)  # eyes are 48 pixels apart
    middle = (arrays["mouth"][0, :2] + arrays["mouth"][0, 2:]) / 2
    assert np.allclose(middle, (np.array([80, 110]) - box[:2]) * 64 / (box[2] - box[0]), atol=0.1)
    assert ingest.crop_box(ingest.followed([[make_face(50)], [make_face(110)]]), (160, 160, 3), 1.0, (64, 64)) is None


@pytest.mark.parametrize("sides", [(64, 128), (128, 64)])
def test_crops_take_the_proportions_that_are_asked_for(sides):
    """The face keeps its own; the shorter side is so many faces high."""
    points, shape = ingest.followed([[make_face(200, 160)]]), (320, 400, 3)
    left, top, right, bottom = box = ingest.crop_box(points, shape, 1.2, sides)
    assert (bottom - top) / (right - left) == pytest.approx(sides[0] / sides[1]) and min(right - left, bottom - top) == pytest.approx(1.2 * 120, rel=0.01)
    assert 0 <= left and 0 <= top and right <= 400 and bottom <= 320
    y, x = np.mgrid[:320, :400]
    disc = np.repeat((((x - 200) ** 2 + (y - 160) ** 2 < 30**2) * 255).astype(np.uint8)[..., None], 3, axis=2)
    arrays = ingest.arrays_of([disc], points, box, np.zeros(10, np.float32), sides)
    picture = arrays["frames"][0]
    assert picture.shape == (*sides, 3)
    rows, columns = np.flatnonzero(picture[..., 0].max(1) > 127), np.flatnonzero(picture[..., 0].max(0) > 127)
    assert abs(len(rows) - len(columns)) <= 1, "a disc stays one"
    # The mouth's middle, 30 pixels below the disc's, where the labels say.
    scale = sides[0] / (bottom - top)
    assert np.allclose((arrays["mouth"][0, 1::2].mean(), arrays["mouth"][0, ::2].mean()), (sides[0] / 2 + 30 * scale, sides[1] / 2), atol=1)
    weight = losses.cell_weight(arrays["mouth"], arrays["eyes"], sides, 8, 4.0, 0.0)
    assert weight.shape == (1, sides[0] // 8, sides[1] // 8) and weight.argmax() // (sides[1] // 8) == int((sides[0] / 2 + 30 * scale) // 8)


def test_sync_is_judged_over_a_stretch():
    piece = ingest.Piece(0, [[make_face()]] * 25, {}, "")
    said = []

    def judge(answer):
        return lambda faces, pcm: said.append((len(faces), len(pcm))) or answer

    config, pcm = videos("x"), np.zeros(50 * 640 + 2560, np.float32)
    answers = {None: "sync unknown", (0.1, 40.0): "no sync", (0.6, 400.0): "sound offset", (0.6, 0.0): "", (0.6, 120.0): ""}
    for answer, reason in answers.items():
        assert ingest.sync_reason([piece, piece], 50, pcm, config, judge(answer)) == reason
    assert said[0] == (50, 32000)
    assert ingest.sync_reason([piece], 25, pcm, config, None) == ""
    assert ingest.sync_reason([ingest.Piece(0, [], None, "silent")], 25, pcm, config, judge((0, 0))) == ""


# ---------------------------------------------------------------- whole videos


@pytest.fixture(scope="module")
def talk():
    """(uint8 [154,160,160,3], float32 pcm) of a rendered head that speaks for 6.2 s."""
    if any(importlib.util.find_spec(name) is None for name in ("anny", "moderngl")):
        pytest.skip("the generator needs anny and moderngl")
    from liveavatar.training.synth import director, speech
    from liveavatar.training.synth.head import HeadRenderer
    from liveavatar.training.synth.people import Identity

    if not shutil.which("flite"):
        pytest.skip("flite is not installed (apt install flite)")
    said = speech.synthesize(5, 2 * PICTURES / 25, ("awb",))
    track = director.direct(said, 2 * PICTURES, 3)
    rendered = HeadRenderer(SIZE, 1).render_clip(Identity.sample(1_000_001), track.units, track.pose, track.translation, track.gaze)
    return np.stack([p.rgb for p in rendered]), said.pcm


@pytest.fixture(scope="module")
def kept(talk, tmp_path_factory):
    """(report, data folder) of one good video and the bad ones, judged by AVCorr."""
    pytest.importorskip("ai_edge_litert", reason="the face tracker runs on it")
    face.model_path(face.MESH)
    frames, pcm = talk
    folder = tmp_path_factory.mktemp("videos")
    few = frames[:PICTURES]
    small = np.full_like(few, 90)
    small[:, 50:110, 50:110] = few[:, ::8, ::8].repeat(3, axis=1).repeat(3, axis=2)
    write(folder / "good.mp4", frames, pcm[: len(frames) * 640])
    (folder / "good.txt").write_text("a rendered person\n")
    write(folder / "late.mp4", frames, np.concatenate([np.zeros(6400), pcm])[: len(frames) * 640])
    write(folder / "two.mp4", np.concatenate([few, few], axis=2), pcm[: PICTURES * 640])
    write(folder / "small.mp4", small, pcm[: PICTURES * 640])
    write(folder / "silent.mp4", few, np.zeros(PICTURES * 640))
    (folder / "broken.mp4").write_bytes(b"no video at all")
    out = tmp_path_factory.mktemp("data")
    return ingest.ingest(videos(folder), data(out), _sync_verdict), out


def test_every_bad_video_is_dropped_for_its_own_reason(kept):
    report, out = kept
    reasons = {row["file"]: (row["kept"], list(row["dropped"])) for row in report["files"]}
    assert reasons["good.mp4"] == (2, []), reasons
    assert reasons["late.mp4"] == (0, ["sound offset"]), reasons
    assert reasons["two.mp4"] == (0, ["several faces"]), reasons
    assert reasons["small.mp4"][0] == 0 and reasons["small.mp4"][1] in (["small face"], ["no face"]), reasons
    assert reasons["silent.mp4"] == (0, ["silent"]), reasons
    assert reasons["broken.mp4"][0] == 0 and reasons["broken.mp4"][1][0].startswith("unreadable"), reasons
    assert report["kept"] == 2 and json.loads((out / "ingest.json").read_text()) == report


def test_clips_carry_terms_labels_and_caption(kept, talk):
    clip = shards.read_clip(shards.clip_paths(kept[1], "train")[0])
    assert clip.frames.shape == (PICTURES, 64, 64, 3) and clip.units is None and clip.pose is None
    card = clip.card
    assert (card["caption"], card["licence"], card["consent"], card["labels"]) == ("a rendered person", "CC0-1.0", "nobody: rendered", "tracked")
    assert "generator" not in card and not probing.rendered_clips([str(kept[1])])
    assert np.corrcoef(clip.pcm[: PICTURES * 640] / 32768, talk[1][: PICTURES * 640])[0, 1] > 0.98
    assert clip.aperture.std() > 0.01 and clip.mouth[:, 3].mean() > clip.eyes[:, 0, 3].mean()
    second = shards.read_clip(shards.clip_paths(kept[1], "train")[1])
    assert second.card["start"] == pytest.approx(PICTURES / 25) and second.card["identity"] == card["identity"]


def test_a_cut_parts_the_clips_and_a_second_run_adds_nothing(talk, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="the face tracker runs on it")
    frames, pcm = talk
    (tmp_path / "in").mkdir()
    shots = np.concatenate([frames[:30], 255 - frames[30:56], frames[56:90]])  # the middle one is too short for a clip
    write(tmp_path / "in" / "cut.mp4", shots, pcm[: len(shots) * 640])
    report = ingest.ingest(videos(tmp_path / "in"), data(tmp_path / "out", 29), None)
    assert report["files"][0]["kept"] == 2 and report["dropped"] == {"short shot": 1} and not report["sync judged"]
    assert [shards.read_clip(p).card["start"] for p in shards.clip_paths(tmp_path / "out", "train")] == [0, 56 / 25]
    longer = ingest.ingest(videos(tmp_path / "in", shortest=1.3), data(tmp_path / "longer", 29), None)
    assert longer["kept"] == 1 and longer["dropped"] == {"short shot": 2}, "30, 26 and 34 pictures"
    assert ingest.ingest(videos(tmp_path / "in"), data(tmp_path / "out", 29), None) == report
    assert len(shards.clip_paths(tmp_path / "out", "train")) == 2


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="videos.consent is empty"):
        videos(tmp_path, consent=" ")
    with pytest.raises(ConfigError, match="missing key 'videos.licence'"):
        recipe.read_recipe(MICRO, ["videos.folder=x", "videos.consent=y"])
    with pytest.raises(ConfigError, match="holds no video"):
        recipe.run("data", MICRO, [f"videos.folder={tmp_path}", "videos.licence=CC0", "videos.consent=all", f"data.folder={tmp_path}"])


def test_one_rank_reads_the_videos_for_all(tmp_path, monkeypatch):
    """Two would give the same numbers to their clips."""
    monkeypatch.setattr(recipe, "rank_and_world", lambda: (1, 2))
    recipe.run("data", MICRO, [f"videos.folder={tmp_path}", "videos.licence=CC0", "videos.consent=all", f"data.folder={tmp_path}"])


# ---------------------------------------------------------------- shards


class Rows:
    def encode(self, caption):
        import torch

        return torch.full((2, 4), float(len(caption)))


def encoded(run, count):
    """So many encoded clips as files under RUN/latents/train."""
    rng = np.random.default_rng(0)
    for index in range(count):
        arrays = {"latents": rng.normal(size=(16, 9, 4, 4)), "reference": rng.normal(size=(16, 1, 4, 4)), "motion": rng.normal(size=(16, 3, 4, 4)),
                  "features": rng.normal(size=(2, 1, 400, 33)), "weight": np.ones((9, 4, 4)), "portraits": np.zeros((0, 16, 3, 4, 4))}
        card = {"caption": f"clip {index}", "identity": {"seed": index}, "phones": []}
        shards.write_arrays(shards.clip_path(run / "latents", "train", index), card, **{k: v.astype(np.float16) for k, v in arrays.items()})


def test_the_forcing_stage_reads_shards_like_files(tmp_path):
    from liveavatar.training.loop import draws_of

    encoded(tmp_path, 5)
    config = recipe.read_recipe(MICRO, ["visemes=null", "forcing.model.audio_dim=400"]).forcing
    files = forcing.EncodedReader(tmp_path, config, Rows(), 0).batch(draws_of(1, "forcing", 0), 4)
    made = shards.pack(tmp_path / "latents", "train", per_shard=2)
    assert [p.name for p in made] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    for path in shards.clip_paths(tmp_path / "latents", "train"):
        path.unlink()
    packed = forcing.EncodedReader(tmp_path, config, Rows(), 0).batch(draws_of(1, "forcing", 0), 4)
    for name in ("latents", "features", "reference", "motion", "weight"):
        assert getattr(files, name).equal(getattr(packed, name)), name
    assert all(a.equal(b) for a, b in zip(files.context, packed.context))


def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    encoded(tmp_path, 2)
    shard = shards.pack(tmp_path / "latents", "train")[0]
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [s["json"]["caption"] for s in samples] == ["clip 0", "clip 1"] and samples[1]["latents.npy"].shape == (16, 9, 4, 4)
    shard.write_bytes(b"nonsense" * 100)
    with pytest.raises(InputError, match="not a readable shard"):
        shards.Packed(tmp_path / "latents", "train")
    with pytest.raises(InputError, match="no clips to pack"):
        shards.pack(tmp_path, "held")
    assert asdict(videos("x"))["licence"] == "CC0-1.0"
