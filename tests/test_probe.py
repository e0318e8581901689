"""The judge network: it learns what drawn faces show, resumes, survives its file; its distances have known answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_clips import draw, write_corpus

from liveavatar.core import ConfigError, WeightsError
from liveavatar.models.probe import READINGS, TYPICAL, Probe, ProbeSizes, Seen, frechet, identity_error, load_probe, save_probe, units_of
from liveavatar.training import probing, recipe, shards
from liveavatar.training.checkpoints import load_checkpoint
from liveavatar.training.loop import LoopConfig

SIZES = ProbeSizes(size=32, widths=(16, 24), blocks=(1, 1), code=8, hidden=32, identity=8)


def config(iterations: int, **changes) -> probing.ProbeConfig:
    loop = LoopConfig(iterations=iterations, batch=24, lr=4e-3, muon=True, warmup=5, ema=0.9, cooldown=0.6, threads=1, bf16=False)
    gentle = {"turn": 1.0, "scale": 0.01, "shift": 0.01, "hidden_share": 0.0, "light": 0.1, "noise": 0.01}
    return probing.ProbeConfig(**{"loop": loop, "sizes": SIZES, "codec_clips": 0, "strangers": 0, **gentle, **changes})


def every(clip: shards.Clip, step: int) -> shards.Clip:
    """Each step-th picture of a clip."""
    timed = ("frames", "mouth", "eyes", "aperture", "width", "lid", "units", "pose")
    return replace(clip, **{name: getattr(clip, name)[::step] for name in timed})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("drawn"), train=8, held=2)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """(run folder, losses, card) of a probe trained for seconds."""
    run = tmp_path_factory.mktemp("run")
    losses = probing.train_probe(config(130), str(corpus), run, 3)
    return run, losses, probing.finish_probe(config(130), str(corpus), run, 3, "abc")


def test_it_learns_what_pictures_show(trained):
    run, losses, card = trained
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    held = card["held"]
    assert held["aperture"]["r"] > 0.8 and held["lid"]["r"] > 0.6 and held["yaw"]["r"] > 0.6 and held["pitch"]["r"] is None, held
    assert held["lag"] == 0 and held["identity error"]["same"] < held["identity error"]["other"]
    assert (card["generator"], card["recipe_sha256"], card["iterations"]) == (shards.GENERATOR_VERSION, "abc", 130)


def test_the_file_gives_the_same_readings_and_no_classifier(trained):
    run = trained[0]
    probe, card = load_probe(run / "probe")
    assert card["held"]["clips"] == 2 and probe.sizes == SIZES
    assert (run / "probe" / "probe.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in probe.parameters()) + 4000
    pictures = np.stack([draw(64, 1, gap, 0.2, 0.0) for gap in (0.0, 0.1, 0.2)])
    seen = probe.look(pictures)
    assert seen.aperture[0] < seen.aperture[1] < seen.aperture[2]
    assert np.allclose(np.linalg.norm(seen.identity, axis=1), 1, atol=1e-5)
    state = load_checkpoint(run / "probe.pt")
    assert any(name.startswith("people") for name in state["ema"])


def test_pictures_of_any_kind_and_cut_read_the_same(trained):
    probe = load_probe(trained[0] / "probe")[0]
    pictures = np.stack([draw(32, 2, gap, 0.2, 0.0) for gap in np.linspace(0, 0.2, 70)])
    whole = probe.look(pictures)
    as_float = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    pieces = Seen.join([probe.look(pictures[:7]), probe.look(pictures[7:])])
    for other in (probe.look(torch.from_numpy(pictures).permute(0, 3, 1, 2)), probe.look(as_float), pieces):
        assert len(other) == 70 and np.allclose(whole.aperture, other.aperture, atol=1e-5)
        assert np.allclose(whole.features, other.features, atol=1e-4)


def test_a_resumed_run_repeats_the_losses(corpus, tmp_path):
    whole = probing.train_probe(config(8), str(corpus), tmp_path / "a", 3)
    first = probing.train_probe(config(8), str(corpus), tmp_path / "b", 3, stop_after=5)
    assert first + probing.train_probe(config(8), str(corpus), tmp_path / "b", 3) == whole


def test_calibration_makes_slopes_one_and_asks_for_strangers(corpus, trained, tmp_path):
    probe = Probe(SIZES)
    probe.load_state_dict(load_probe(trained[0] / "probe")[0].state_dict())
    with torch.no_grad():
        probe.readings.weight.mul_(0.25)
    paths = shards.clip_paths(corpus, "train")
    gains = probing.calibrate(probe.requires_grad_(False), paths)
    assert gains["aperture"] > 2 and gains["pitch"] == 1  # nothing is known of what stands still
    clips = [shards.read_clip(path) for path in paths]
    slope = probing.check(probe, [every(c, probing.CALIBRATION_STEP) for c in clips])["aperture"]["slope within"]
    assert slope == pytest.approx(1, abs=0.02)
    with pytest.raises(ConfigError, match="people that were not trained on"):
        probing.finish_probe(config(130, strangers=3), str(corpus), trained[0], 3, "abc")


def test_labels_follow_mirror_and_turn():
    labels = torch.from_numpy(units_of(aperture=np.array([0.1]), width=np.array([0.8]), lid=np.array([0.2]), yaw=np.array([5.0]),
                                       pitch=np.array([2.0]), roll=np.array([1.0])))
    turned = probing.turned_labels(labels, torch.tensor([-1.0]), torch.tensor([3.0]))
    told = {name: float(turned[0, i]) * TYPICAL[name][1] + TYPICAL[name][0] for i, name in enumerate(READINGS)}
    assert told == pytest.approx({"aperture": 0.1, "width": 0.8, "lid": 0.2, "yaw": -5.0, "pitch": 2.0, "roll": 2.0}, abs=1e-5)


def test_a_turn_is_clockwise_and_a_mirror_comes_first():
    picture = torch.zeros(1, 3, 32, 32)
    picture[0, :, 15:17, 26:28] = 1  # right of the middle
    still, one, none = torch.zeros(1), torch.ones(1), torch.zeros(1, 2)

    def place(made):
        rows, columns = torch.nonzero(made[0, 0] > 0.5, as_tuple=True)
        return float(rows.float().mean()), float(columns.float().mean())

    assert place(probing.move(picture, one, torch.tensor([90.0]), one, none, 32)) == pytest.approx((26.5, 15.5), abs=0.6)  # below it
    assert place(probing.move(picture, -one, still, one, none, 32)) == pytest.approx((15.5, 4.5), abs=0.6)
    assert place(probing.move(picture, -one, torch.tensor([90.0]), one, none, 32)) == pytest.approx((4.5, 15.5), abs=0.6)


def test_surroundings_are_hidden_and_the_face_stays():
    pictures, face = torch.rand(4, 3, 32, 32), torch.tensor([[0.5, 0.5, 0.25]]).expand(4, 3)
    batch = probing.Batch(pictures, torch.zeros(4, 6), torch.zeros(4, dtype=torch.long), face)
    hidden = probing.hide_surroundings(batch, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(hidden[..., 16, 16], pictures[..., 16, 16])
    assert all(len(hidden[i, 0, 0].unique()) == 1 for i in range(4))
    assert torch.equal(probing.hide_surroundings(batch, 0.0, torch.Generator().manual_seed(0)), pictures)


def test_frechet_distance_of_known_gaussians():
    a = np.random.default_rng(0).normal(size=(500, 6))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 2) == pytest.approx(24, rel=1e-6)
    assert frechet(a, 2 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(np.trace(np.cov(a, rowvar=False)), rel=1e-6)  # (1 - 2)^2 per direction
    assert frechet(a[:4], a[4:]) > 0  # fewer samples than directions: no root of a negative number


def test_identity_error_is_a_cosine():
    rows = np.array([[1.0, 0], [0, 1], [-1, 0]], np.float32)
    assert identity_error(rows, np.array([1.0, 0])).tolist() == [0, 1, 2]


def test_refusals_name_what_is_wrong(tmp_path, corpus):
    with pytest.raises(WeightsError, match="no probe here; train one"):
        load_probe(tmp_path / "none")
    save_probe(tmp_path / "p", Probe(SIZES), {})
    (tmp_path / "p" / "probe.json").write_text('{"format": 9}')
    with pytest.raises(WeightsError, match="format 9"):
        load_probe(tmp_path / "p")
    with pytest.raises(ConfigError, match="multiple of 8 pixels"):
        ProbeSizes(size=30, widths=(16, 24), blocks=(1, 1))
    with pytest.raises(ConfigError, match="multiple of pictures_per_clip"):
        config(1, pictures_per_clip=5)
    with pytest.raises(ConfigError, match="data stage first"):
        probing.train_probe(config(1), str(tmp_path / "nothing"), tmp_path, 0)


def test_the_micro_recipe_has_the_stage():
    path = Path(__file__).parents[1] / "configs" / "train_micro.yaml"
    micro = recipe.read_recipe(path)
    assert "probe" in recipe.stages_of(micro)
    assert recipe.recipe_sha256(micro) == recipe.recipe_sha256(recipe.read_recipe(path)) != recipe.recipe_sha256(recipe.read_recipe(path, ["seed=9"]))
