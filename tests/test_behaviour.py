"""Blinks and motion of the head: pure functions of the picture's number, of a person's shape and rate, that travel with every block."""

import json

import numpy as np
import pytest
import torch
from conftest import save_tiny, tiny_model
from liveavatar.conditioning import behaviour
from liveavatar.config import load
from liveavatar.core import FPS, Audio, ConfigError, Open, WeightsError
from liveavatar.runtime.sources import open_source
from liveavatar.runtime.stage_roles import build_stage
from liveavatar.training.synth import director


def test_pieces_are_the_whole_anywhere_in_time():
    far = 2**31
    for first in (0, far, 3 * 2**40):
        whole = behaviour.lid_closure(7, "s", first, 360)
        pieces = [behaviour.lid_closure(7, "s", first + at, 12) for at in reversed(range(0, 360, 12))][::-1]
        assert np.array_equal(np.concatenate(pieces), whole) and whole.max() == 1
    assert not np.array_equal(behaviour.lid_closure(7, "s", 0, 360), behaviour.lid_closure(8, "s", 0, 360))
    assert not np.array_equal(behaviour.lid_closure(7, "s", 0, 360), behaviour.lid_closure(7, "other", 0, 360))


def test_blinks_have_a_persons_rate_pause_and_shape():
    minutes = 20
    closure = behaviour.lid_closure(0, "s", 0, minutes * 60 * FPS)
    shut = np.flatnonzero((closure[1:] > 0) & (closure[:-1] == 0)) + 1
    open_again = np.flatnonzero((closure[1:] == 0) & (closure[:-1] > 0)) + 1
    assert 12 <= len(shut) / minutes <= 20  # one per 3 to 5 s
    assert (shut[1:] - open_again[: len(shut) - 1]).min() >= 0.5 * FPS - 1 and np.diff(shut).std() > 20
    for a, b in zip(shut, open_again):
        assert 4 <= b - a <= 6 and closure[a:b].max() == 1  # shut in one picture at least, whatever the phase
        peak = int(closure[a:b].argmax())
        assert peak <= 2 and (np.diff(closure[a : a + peak + 1]) > 0).all() and (np.diff(closure[a + peak : b]) <= 0).all()


def test_lids_of_a_clip_are_closed_as_far_as_they_are():
    lid = np.full(93, 0.2)
    lid[40:44] = 0.1, 0.0, 0.05, 0.19
    closed = behaviour.closure_of(lid)
    assert closed[40:44] == pytest.approx([0.5, 1, 0.75, 0]) and closed.sum() == pytest.approx(2.25)


def test_a_head_drifts_as_the_corpus_heads_do():
    """Spread and speed of its Ornstein-Uhlenbeck paths (director.py), no jump from picture to picture, and no two sessions alike."""
    far = 2**63
    for first in (0, far):
        whole = behaviour.head_pose(7, "s", first, 360)
        pieces = [behaviour.head_pose(7, "s", first + at, 12) for at in reversed(range(0, 360, 12))][::-1]
        assert np.array_equal(np.concatenate(pieces), whole) and np.abs(np.diff(whole, axis=0)).max() < 1
    assert np.abs(behaviour.head_pose(7, "s", 0, 360) - behaviour.head_pose(8, "s", 0, 360)).mean() > 0.5
    long = behaviour.head_pose(0, "s", 0, 20_000)
    assert long.std(0) == pytest.approx(director.Behaviour().head_sigma, rel=0.1) and np.abs(np.corrcoef(long.T) - np.eye(3)).max() < 0.15
    paths = np.concatenate([np.diff(director._ou(np.random.default_rng(k), 400, 1 / 25, (3.0, 2.0, 1.2), 1.4), axis=0) for k in range(40)])
    assert np.diff(long, axis=0).std(0) == pytest.approx(paths.std(0), rel=0.1)


def test_planes_say_nothing_where_lids_are_open():
    planes = behaviour.control_planes(torch.tensor([0.0, 0.5, 1.0, 0.5] + [0.0] * 8), None, 16, 8, 6)
    assert planes.shape == (16, 3, 8, 6) and not planes[4:].any() and not planes[:, 1:].any()
    assert torch.equal(planes[:4, 0, 3, 3], behaviour.STRENGTH * torch.tensor([0.0, 0.5, 1.0, 0.5]))
    with pytest.raises(ConfigError, match="4 planes"):
        behaviour.control_planes(torch.zeros(12), None, 3, 8, 8)


def test_planes_of_a_head_stand_behind_those_of_lids():
    lids, head = torch.rand(2, 12), torch.tensor(behaviour.HEAD_SPREAD) * torch.arange(12.0)[None, :, None].expand(2, -1, 3)
    planes = behaviour.control_planes(lids, head, 20, 8, 6)
    assert planes.shape == (2, 20, 3, 8, 6) and torch.equal(planes[:, :4], behaviour.control_planes(lids, None, 4, 8, 6))
    told = torch.tensor(behaviour.HEAD_STRENGTH)
    for latent in range(3):
        pictures = torch.arange(4.0) + 4 * latent
        assert torch.allclose(planes[1, 4:16, latent, 0, 0], (pictures[:, None] * told).flatten())
    assert (planes[:, 16] == behaviour.TOLD).all() and not planes[:, 17:].any()
    assert torch.equal(behaviour.control_planes(None, head, 20, 8, 6)[:, 4:], planes[:, 4:])
    assert behaviour.control_planes(None, None, 20, 8, 6) is None
    with pytest.raises(ConfigError, match="lids and head need 17 planes"):
        behaviour.control_planes(lids, head, 16, 8, 8)


def test_a_checkpoint_says_what_it_is_told_of(tmp_path, tiny_folder):
    told = save_tiny(tmp_path / "told", control=behaviour.LIDS)
    both = save_tiny(tmp_path / "both", control=behaviour.LIDS_AND_HEAD)
    for folder, blinks, moves, lids, head in ((told, True, True, True, False), (told, False, True, False, False), (tiny_folder, True, True, False, False),
                                              (both, True, True, True, True), (both, False, True, False, True), (both, True, False, True, False)):  # fmt: skip
        config = load(None, [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", f"sampler.blinks={str(blinks).lower()}",
                             f"sampler.head_motion={[4, 0, 1] if moves else 'null'}"])
        (conditioner,) = build_stage(config, ("condition",), "cpu")
        source = open_source(config)
        assert (source.lids, source.head_motion) == (lids, (4, 0, 1) if head else None)
        conditioner(Open("s", seed=5, context=torch.zeros(1, 16), reference=torch.zeros(16, 1, 8, 8), motion=torch.zeros(16, 3, 8, 8)))
        (block,) = conditioner(Audio("s", index=2, pcm=torch.zeros(7680 * 3 + 2000)))
        assert block.lids is None if not lids else np.array_equal(block.lids, behaviour.lid_closure(5, "s", 24, 12))
        drift = behaviour.head_pose(5, "s", 24, 12, (4, 0, 1))
        assert block.head_pose is None if not head else np.array_equal(block.head_pose, drift)
        (turned,) = conditioner(Audio("s", index=2, pcm=torch.zeros(7680), head_pose=torch.full((12, 3), 2.0)))
        assert turned.head_pose is None if not head else np.array_equal(turned.head_pose, drift + 2)
    settings = json.loads((told / "liveavatar.json").read_text())
    (told / "liveavatar.json").write_text(json.dumps({**settings, "control": {"kind": "brows"}}))
    with pytest.raises(WeightsError, match="brows"):
        open_source(load(None, [f"model.path={told}"]))


def test_open_lids_are_no_control_bit_for_bit():
    model = tiny_model()
    x = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    planes = behaviour.control_planes(torch.zeros(1, 12), None, model.config.cond_dim, 8, 8)
    assert torch.equal(model.noisy_tokens(x, planes), model.noisy_tokens(x))


@pytest.mark.parametrize("said", ["[3, 2]", "[3, 2, -1]", "[3, 2, 11]", "true"])
def test_a_head_moves_by_three_sizes_in_bounds(said):
    with pytest.raises(ConfigError, match="head_motion"):
        load(None, [f"sampler.head_motion={said}"])
    assert load(None, ["sampler.head_motion=[0, 0, 0]"]).sampler.head_motion == (0, 0, 0)
    assert not behaviour.head_pose(0, "s", 0, 50, (0, 0, 0)).any()
