"""Ablations and the choice of a checkpoint: caches that leave something out, figures of known answers, the best one found."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import tiny_model
from liveavatar.core import ConfigError, InputError
from liveavatar.diffusion.denoise import noise
from liveavatar.diffusion.rollout import Course, cached_rollout
from liveavatar.models.probe import Seen
from liveavatar.training import ablations, choose, preview, students
from liveavatar.training.checkpoints import checkpoint_path, load_checkpoint, save_checkpoint

SIGMAS = (1.0, 0.9, 0.6, 0.0)


def rolled(kind, reference: float = 0.0, distance: int = 30) -> torch.Tensor:
    """Six blocks of a stream under a kind of cache; reference: added to the portrait."""
    draw = torch.Generator().manual_seed(0)
    held, rows = torch.randn(16, 3, 8, 8, generator=draw) + reference, torch.randn(5, 16, generator=draw)
    noises = [noise(0, "s", b, (16, 3, 8, 8)) for b in range(6)]
    features = [torch.randn(1, 400, 12, generator=draw) for _ in range(6)]
    course = Course(kind=kind, sink_distance=distance)
    return torch.cat(list(cached_rollout(tiny_model(), SIGMAS, noises, features, rows, held[:, :1], held, course)), dim=1)


def test_without_a_sink_the_portrait_does_not_matter():
    assert torch.equal(rolled(ablations.NoSink), rolled(ablations.NoSink, reference=1.0))
    assert not torch.allclose(rolled(ablations.StepCache), rolled(ablations.StepCache, reference=1.0), atol=1e-4)


def test_a_still_sink_differs_from_where_it_would_roll():
    """With distance 30 the reference rolls from the second block on; the first is the same."""
    still, rolling = rolled(ablations.StillSink), rolled(ablations.StepCache)
    assert torch.allclose(still[:, :3], rolling[:, :3], atol=1e-6)
    assert not torch.allclose(still[:, 3:6], rolling[:, 3:6], atol=1e-5)
    assert torch.equal(still, rolled(ablations.StillSink, distance=4)), "no policy moves it"


def seen(aperture, features, identity=(1.0, 0.0), motion=1.0) -> Seen:
    """A reading of T pictures; head motion is the aperture's own, scaled."""
    still = np.zeros_like(aperture)
    return Seen(aperture, still, still, motion * aperture, motion * aperture, motion * aperture, np.tile(identity, (len(aperture), 1)), features)


def test_figures_of_known_answers():
    rng, count = np.random.default_rng(0), 120
    truth, features = np.sin(np.arange(count) / 3).astype(np.float32), rng.normal(size=(count, 4))
    turned = seen(0.5 * truth + 3, features + [2, 0, 0, 0], (0.6, 0.8), motion=2.0)
    scene = preview.Scene(np.zeros((16, 16, 3), np.uint8), np.zeros((count, 16, 16, 3), np.uint8), truth, np.zeros(1, np.float32), "")
    pictures = np.zeros((count, 16, 16, 3), np.uint8)
    pictures[::2, :2, :2] = 10  # one of the two corners flickers by 10 every picture
    row = ablations.figures([pictures], [turned], [seen(truth, features)], [scene], [np.array([1.0, 0.0])])
    assert row["sync r"] == pytest.approx(1) and row["aperture slope"] == pytest.approx(0.5)
    assert row["probe_id start"] == row["probe_id end"] == pytest.approx(0.4)
    assert row["probe_fd"] == pytest.approx(4.0, abs=1e-6) and row["head motion ratio"] == pytest.approx(1.0)  # 2 x .5
    assert row["corner flicker"] == pytest.approx(5.0)


def test_the_score_falls_with_every_fault():
    good = {"sync r": 0.9, "aperture slope": 1.0, "head motion ratio": 1.0, "probe_fd": 0.0}
    assert choose.score(good) == pytest.approx(0.9)
    for fault in ({"sync r": 0.5}, {"aperture slope": 0.5}, {"aperture slope": 2.0}, {"head motion ratio": 0.3}, {"probe_fd": 1.0}, {"sync r": -0.2}):
        assert 0 <= choose.score(good | fault) < 0.9


def test_the_best_candidate_is_chosen(tmp_path, monkeypatch):
    slopes = {"consistency": 0.85, "dmd_000050": 0.9, "dmd": 1.12}  # the last scores higher, the one before meets the gate
    for name in slopes:
        state = {"ema/w": torch.tensor(slopes[name]), "model/w": torch.zeros(()), "iteration": torch.tensor(1)}
        save_checkpoint(checkpoint_path(tmp_path, name), state)

    class Bench:
        """Gives every checkpoint the slope it stands for."""

        def row(self, arm, run, stage, sigmas, seed):
            return {"stage": arm.stage, "sync r": 0.9, "aperture slope": slopes[arm.stage], "head motion ratio": 1.0, "probe_fd": 0.1}

    monkeypatch.setattr(choose.Bench, "build", lambda *a: Bench())
    rows = choose.choose(choose.ChooseConfig(), None, None, tmp_path, 0, None, "dmd", "consistency", SIGMAS)
    assert [row["stage"] for row in rows] == ["dmd_000050", "dmd", "consistency"] == [row["stage"] for row in json.loads((tmp_path / "choice.json").read_text())]
    chosen = load_checkpoint(checkpoint_path(tmp_path, "chosen"))
    assert float(chosen["ema"]["w"]) == pytest.approx(0.9) and "model" not in chosen
    with pytest.raises(InputError, match="no checkpoint"):
        choose.choose(choose.ChooseConfig(), None, None, tmp_path / "none", 0, None, "dmd", "ode", SIGMAS)


def test_the_table_says_what_was_not_measured():
    config = ablations.AblationConfig(blocks=10)
    rows = [{"arm": "as shipped", "stage": "dmd", "iteration": 3, "sync r": 0.5, "seconds": 1.0, "paper": "x"}, {"arm": "forcing alone", "stage": "forcing", "paper": "y"}]
    text = ablations.table_text(config, rows)
    assert "| as shipped | dmd 3 | 0.500 | x |" in text and "| forcing alone | forcing  | not measured (no checkpoint) | y |" in text


def test_students_have_rows_and_folders_of_their_own():
    config = ablations.AblationConfig(arms=(ablations.Arm(name="x"),), students=students.StudentsConfig(starts=("ode", "forcing")))
    assert [(arm.name, arm.run, arm.stage) for arm in config.arms_with_students] == [
        ("x", "", ""), ("student from ode", "ablations/ode", "dmd"), ("student from forcing", "ablations/forcing", "dmd")]
    with pytest.raises(ConfigError, match="names must differ"):
        dataclasses.replace(config, arms=(ablations.Arm(name="student from ode"),))


def test_refusals_name_the_key():
    with pytest.raises(ConfigError, match="arm.sink"):
        ablations.Arm(name="x", sink="some")
    with pytest.raises(ConfigError, match="must be clean"):
        ablations.Arm(name="x", history="none")
    with pytest.raises(ConfigError, match="names must differ"):
        ablations.AblationConfig(arms=(ablations.Arm(name="x"), ablations.Arm(name="x")))
    with pytest.raises(ConfigError, match="one of each"):
        students.StudentsConfig(starts=("ode", "ode"))
    with pytest.raises(ConfigError, match="students.starts"):
        students.StudentsConfig(starts=("teacher",))
    with pytest.raises(ConfigError, match="choose: people"):
        choose.ChooseConfig(people=())
    with pytest.raises(ConfigError, match="blocks"):
        dataclasses.replace(ablations.AblationConfig(), blocks=3)
