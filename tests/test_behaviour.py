"""Blinks: a pure function of the picture's number, of a person's shape and rate, that travels with every block."""

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


def test_planes_say_nothing_where_lids_are_open():
    planes = behaviour.lid_planes(torch.tensor([0.0, 0.5, 1.0, 0.5] + [0.0] * 8), 16, 8, 6)
    assert planes.shape == (16, 3, 8, 6) and not planes[4:].any() and not planes[:, 1:].any()
    assert torch.equal(planes[:4, 0, 3, 3], behaviour.STRENGTH * torch.tensor([0.0, 0.5, 1.0, 0.5]))
    with pytest.raises(ConfigError, match="4 channels"):
        behaviour.lid_planes(torch.zeros(12), 3, 8, 8)


def test_a_checkpoint_says_whether_it_takes_lids(tmp_path, tiny_folder):
    told = save_tiny(tmp_path / "told", control=behaviour.LIDS)
    for folder, blinks, lids in ((told, True, True), (told, False, False), (tiny_folder, True, False)):
        config = load(None, [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", f"sampler.blinks={str(blinks).lower()}"])
        (conditioner,) = build_stage(config, ("condition",), "cpu")
        assert open_source(config).lids is lids
        conditioner(Open("s", seed=5, context=torch.zeros(1, 16), reference=torch.zeros(16, 1, 8, 8), motion=torch.zeros(16, 3, 8, 8)))
        (block,) = conditioner(Audio("s", index=2, pcm=torch.zeros(7680 * 3 + 2000)))
        wanted = torch.from_numpy(behaviour.lid_closure(5, "s", 24, 12))
        assert block.lids is None if not lids else torch.equal(block.lids, wanted)
    settings = json.loads((told / "liveavatar.json").read_text())
    (told / "liveavatar.json").write_text(json.dumps({**settings, "control": {"kind": "brows"}}))
    with pytest.raises(WeightsError, match="brows"):
        open_source(load(None, [f"model.path={told}"]))


def test_open_lids_are_no_control_bit_for_bit():
    model = tiny_model()
    x = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    planes = behaviour.lid_planes(torch.zeros(1, 12), model.config.cond_dim, 8, 8)
    assert torch.equal(model.noisy_tokens(x, planes), model.noisy_tokens(x))
