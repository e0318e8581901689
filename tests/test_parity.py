"""Every fixture of shared/parity at its own tolerances, and one of other sizes made here."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from liveavatar.core import InputError, PlacementError
from liveavatar.diffusion.rollout import denoise_block, make_steps
from liveavatar.models.vae import wan_name
from liveavatar.runtime import parity

GOLDEN = Path(__file__).parent / "golden"


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("name", ["causal_s2v", "vae_stream", "schedule", "audio_bucket", "size_rule"])
def test_fixture_without_a_chain(name, capsys):
    assert parity.run(GOLDEN / name)
    line = last_line(capsys)
    assert line["ok"] and line["cases"] >= 6 and set(line) == {"max_rel_err", "max_abs_err", "cases", "ok"}


def test_causal_compares_every_expected_tensor():
    names = {case.name for case in parity.causal_cases(parity.Fixture(GOLDEN / "causal_s2v"))}
    stored = load_file(GOLDEN / "causal_s2v.safetensors")
    expected = {n for n in stored if n.startswith(("prefill", "ring", "stage")) or n.endswith((".v", "audio_tokens", "audio_global"))}
    assert {n for n in expected if not n.startswith("weights.")} | {"rope.y"} == names


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_rollout_on_any_number_of_ranks(ranks, capsys):
    assert parity.run(GOLDEN / "rollout_s2v.json", ranks=ranks, launcher="inproc")
    assert last_line(capsys)["cases"] == 7 + 2 + 2


def test_rollout_over_processes_gives_the_bytes_of_one_rank():
    fixture = parity.Fixture(GOLDEN / "rollout_s2v.safetensors")
    one, two = parity.roll_out(fixture, 1, "inproc"), parity.roll_out(fixture, 2, "local")
    assert all(torch.equal(one.clean[b], two.clean[b]) for b in range(7))
    assert all(torch.equal(v, two.velocity[key]) for key, v in one.velocity.items())


def test_too_many_ranks_are_refused():
    with pytest.raises(PlacementError, match="choose 1 to 5"):
        parity.run(GOLDEN / "rollout_s2v", ranks=6)


# ---------------------------------------------------------------- another size


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A rollout fixture of other sizes, steps and distances, made step by step without roles or chain."""
    return write_rollout(tmp_path_factory.mktemp("fixture") / "other_sizes", refresh=2)


def write_rollout(path: Path, refresh: int | None) -> Path:
    model = tiny_model(5, dim=72, num_heads=3, ffn_dim=100, text_dim=20, text_len=12, num_layers=3, audio_dim=24, audio_layers=25,
                       audio_inject_layers=(1, 2))
    levels, distances, h, w, blocks = [1.0, 0.7, 0.25, 0.0], [4, 30, 11, 23, 7, 30, 16, 5, 9], 8, 16, 9
    g = torch.Generator().manual_seed(6)
    given = {"in.noise": (blocks, 16, 3, h, w), "in.audio": (blocks, 25, 24, 12), "in.ref0": (16, 1, h, w),
             "in.motion": (16, 5, h, w), "in.context": (7, 20)}
    given = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in given.items()}
    x0, velocity = straight_rollout(model, levels, {k: v.float() for k, v in given.items()}, distances, refresh)
    tensors = {**given, **{f"weights.{k}": v for k, v in model.state_dict().items()}, "expect.x0": x0, "expect.v.8.1": velocity[8, 1]}
    facts = {"kind": "rollout", "config": model.config.to_dict(), "latent_hw": [h, w], "blocks": blocks, "block_latents": 3,
             "ring_latents": 6, "stage_timesteps": [1000 * s for s in levels[:-1]], "sigmas": levels, "rel_per_block": distances,
             "sink_reprefill_before_block": refresh, "tolerance": {"fp32": {"max_abs_over_max_ref": 1e-6, "rms_over_rms_ref": 1e-6}}}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(facts))
    return path


@torch.inference_mode()
def straight_rollout(model, levels, given, distances, refresh):
    h, w = given["in.ref0"].shape[-2:]
    text, steps, clean, velocity = model.encode_text(given["in.context"]), make_steps(model, levels), [], {}
    caches = [model.new_cache(h, w, 3, 2) for _ in steps]
    for b, x in enumerate(given["in.noise"]):
        if b == 0 or b == refresh:
            sink = model.prefill(clean[0][:, :1] if b else given["in.ref0"], given["in.motion"], text)
            for cache in caches:
                model.set_sink(cache, sink, h, w)
        for k, step in enumerate(steps):
            x, velocity[b, k] = denoise_block(model, step, x, model.encode_audio(given["in.audio"][b]), text, caches[k], block=b,
                                              sink_distance=distances[b])
        clean.append(x)
    return torch.stack(clean), velocity


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_other_sizes(other, ranks, capsys):
    assert parity.run(other, ranks=ranks, launcher="inproc")
    assert last_line(capsys)["max_rel_err"] < 1e-6


@pytest.mark.parametrize("refresh", [1, None, 50])
def test_refresh_block_is_whatever_the_fixture_says(tmp_path, refresh):
    assert parity.run(write_rollout(tmp_path / "refresh", refresh), ranks=2, launcher="inproc")


def test_a_causal_fixture_need_not_expect_every_block(tmp_path):
    def change(tensors, facts):
        for name in ("block.1.v", "stage.3.v", "ring.k.3"):
            del tensors[name]

    assert parity.run(rewritten(GOLDEN / "causal_s2v", tmp_path / "fewer", change))


PATCHED = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [True, True], "patch_size": 2,
           "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8}
RESIDUAL = {"base_dim": 8, "z_dim": 16, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}


@pytest.mark.parametrize("config, named_by_wan", [(PATCHED, True), (RESIDUAL, True), (RESIDUAL, False), ({"base_dim": 8, "dim_mult": [1, 2, 2, 4]}, True)],
                         ids=["patched", "residual", "residual, names of diffusers", "other widths"])
def test_vae_of_other_sizes(tmp_path, config, named_by_wan):
    """Expectations by diffusers' own encode and decode, which share no call with ours."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).eval()
    mean, std = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in (vae.config.latents_mean, vae.config.latents_std))
    stride = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    z, image = torch.randn(1, 16, 4, 2, 3), torch.rand(1, 3, 1, 2 * stride, 3 * stride) * 2 - 1
    with torch.no_grad():
        tensors = {"in.z": z, "in.image": image, "expect.decode": vae.decode(z * std + mean).sample,
                   "expect.image_latent": (vae.encode(image).latent_dist.mode() - mean) / std,
                   "expect.repeat5_latents": (vae.encode(image.repeat(1, 1, 5, 1, 1)).latent_dist.mode() - mean) / std}
    tensors |= {f"weights.{wan_name(k, vae.config) if named_by_wan else k}": v for k, v in vae.state_dict().items()}
    facts = {"config": config, "call_sizes": [1, 2, 1], "frames_per_call": [1, 8, 4], "tolerance": {"decode_max_abs": 2e-5, "encode_max_abs": 1e-5}}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "vae.safetensors")
    (tmp_path / "vae.json").write_text(json.dumps(facts))
    assert parity.run(tmp_path / "vae")


# ---------------------------------------------------------------- what must not pass


def rewritten(source: Path, target: Path, change) -> Path:
    tensors, facts = load_file(source.with_suffix(".safetensors")), json.loads(source.with_suffix(".json").read_text())
    change(tensors, facts)
    save_file(tensors, target.with_suffix(".safetensors"))
    target.with_suffix(".json").write_text(json.dumps(facts))
    return target


@pytest.mark.parametrize("name", ["weights.blocks.0.ffn.0.weight", "in.motion", "in.context", "weights.audio_injector.injector.0.o.weight"])
def test_a_changed_input_fails(other, tmp_path, name, capsys):
    def change(tensors, facts):
        tensors[name] = tensors[name] * 1.01

    assert not parity.run(rewritten(other, tmp_path / "changed", change), launcher="inproc")
    line = last_line(capsys)
    assert not line["ok"] and line["max_rel_err"] > 1e-6


def test_another_distance_fails(other, tmp_path):
    def change(tensors, facts):
        facts["rel_per_block"][8] = 20

    assert not parity.run(rewritten(other, tmp_path / "distance", change), launcher="inproc")


def test_nan_fails_and_is_valid_json(other, tmp_path, capsys):
    def change(tensors, facts):
        tensors["in.noise"][0, 0, 0, 0, 0] = float("nan")

    assert not parity.run(rewritten(other, tmp_path / "nan", change), launcher="inproc")
    assert last_line(capsys)["ok"] is False


def test_unknown_tensor_is_refused(other, tmp_path):
    def change(tensors, facts):
        tensors["expect.surprise"] = torch.zeros(3)

    with pytest.raises(InputError, match="expect.surprise"):
        parity.run(rewritten(other, tmp_path / "unknown", change))


def test_no_fixture(tmp_path):
    with pytest.raises(InputError, match="no readable fixture"):
        parity.run(tmp_path / "absent")
    (tmp_path / "other.json").write_text('{"hello": 1}')
    with pytest.raises(InputError, match="hello"):
        parity.run(tmp_path / "other.json")


def test_compare_sees_shape_and_scale():
    one = torch.ones(3)
    assert parity.compare("a", one, one, max_rel=0).ok
    assert not parity.compare("a", one, torch.ones(4), max_rel=1).ok
    assert parity.compare("a", one * 1.5, one, max_rel=0.5).ok and not parity.compare("a", one * 1.6, one, max_rel=0.5).ok
    assert dataclasses.asdict(parity.compare("a", one * 3, one))["max_abs"] == 2.0
