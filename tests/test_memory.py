"""The plan of a training run against what is really there: weights, optimiser and averages to the byte, activations as
autograd keeps them, FLOP as torch counts them; refusals with numbers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from liveavatar import ops
from liveavatar.core import ConfigError, PlacementError
from liveavatar.models.clip import Clip
from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.training import planning, recipe
from liveavatar.training.loop import Learner, LoopConfig
from liveavatar.training.memory import ACTIVATION_FACTOR, ClipConfig, Load, compute_blocks_again, learning_flops, sizes_of, stage_plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = S2VConfig(dim=96, ffn_dim=256, freq_dim=16, text_dim=8, text_len=64, num_heads=2, num_layers=3, audio_dim=8, audio_layers=1, audio_inject_layers=(0, 2))
CLIP = ClipConfig(height=128, width=192, latents=9)
LOOP = LoopConfig(iterations=2, batch=2, warmup=0, bf16=False, device="cpu", threads=1)
LOAD = Load(model=SMALL, clip=CLIP, block_latents=3, window_blocks=4, batch=2)


def learner_of(adapters: bool, **change):
    """A learner of a small transformer or of adapters on one, and its sizes."""
    model = CausalS2V(SMALL)
    model.init_weights(0)
    if adapters:
        pytest.importorskip("peft", reason="adapters are PEFT's")
        from liveavatar.training.adapters import Base

        module = Base(model, 8, 4.0).as_("student")
    else:
        module = model
    return Learner(module, dataclasses.replace(LOOP, **change)), sizes_of(SMALL, 8 * adapters, torch.float32)


def forward(module, batch: int = 2) -> torch.Tensor:
    h, w = CLIP.height // 8, CLIP.width // 8
    return module.forward_clip(torch.randn(batch, 16, 9, h, w), torch.full((batch, 3), 500.0), clip_of(batch))


def clip_of(batch: int, **how) -> Clip:
    h, w = CLIP.height // 8, CLIP.width // 8
    return Clip(torch.randn(batch, 1, 8, 36), [torch.randn(4, 8)] * batch, torch.randn(batch, 16, 1, h, w), torch.randn(batch, 16, 3, h, w), **how)


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("adapters, muon", [(False, False), (False, True), (True, False)])
def test_weights_optimiser_and_average_to_the_byte(adapters, muon):
    learner, sizes = learner_of(adapters, muon=muon)
    for p in learner.module.parameters():
        p.grad = torch.zeros_like(p)
    gradients = nbytes(p.grad for p in learner.module.parameters())
    learner.update(1e-3, 1)
    parts = stage_plan("forcing", learner.config, LOAD, sizes, 1).parts
    state = learner.strategy.optimiser_state()
    assert parts["adapters" if adapters else "weights"] == nbytes(learner.module.parameters())
    assert parts["optimiser"] == nbytes(t for slots in state.values() for key, t in slots.items() if key != "step")
    assert parts["average"] == nbytes(learner.ema.values.values()) and parts["gradients"] == gradients
    if adapters:
        frozen = [p for n, p in learner.module.base.model.named_parameters() if "lora_" not in n]
        assert parts["base"] == nbytes(frozen) and not any(p.requires_grad for p in frozen)


def kept_by_autograd(module, bf16: bool) -> int:
    """Bytes of all that a forward leaves for its backward, weights aside; storages counted once."""
    own = {p.untyped_storage().data_ptr() for p in (module.base.model if hasattr(module, "base") else module).parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = forward(module)
    total = sum(t.untyped_storage().nbytes() for t in seen.values())
    del out
    return total


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_within_the_stated_factor(adapters, bf16, monkeypatch):
    """Attention as on a GPU, fused."""
    monkeypatch.setattr(ops, "PLAIN_ATTENTION_LIMIT", 0)
    learner, _ = learner_of(adapters)
    planned, _ = LOAD.graph_bytes(2 if bf16 else 4, 4, not adapters, again=False)
    assert 1 / ACTIVATION_FACTOR < kept_by_autograd(learner.module, bf16) / planned < ACTIVATION_FACTOR


def test_blocks_computed_again_keep_little():
    """Same gradient; nothing of the inside of blocks and injectors is kept."""
    role = learner_of(True)[0].module
    for p in role.parameters():
        p.data.add_(0.1)

    def gradients():
        torch.manual_seed(1)
        forward(role).square().mean().backward()
        found = [p.grad for p in role.parameters()]
        for p in role.parameters():
            p.grad = None
        return found

    expected, whole = gradients(), kept_by_autograd(role, False)
    compute_blocks_again(role.base.model), compute_blocks_again(role.base.model)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max())) for a, b in zip(gradients(), expected, strict=True))
    outside = kept_by_autograd(role, False)
    left, added = LOAD.graph_bytes(4, 4, False, again=True)
    sinks = SMALL.num_layers * 2 * LOAD.sink * SMALL.dim * 4  # keys and values, held by the attention of later blocks
    assert left == pytest.approx(outside + sinks, rel=ACTIVATION_FACTOR - 1) and left + added < 0.5 * whole


@pytest.mark.parametrize("causal", [True, False])
def test_flop_as_torch_counts_them(causal):
    model = learner_of(False)[0].module
    h, w = CLIP.height // 8, CLIP.width // 8
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.forward_clip(torch.randn(2, 16, 9, h, w), torch.full((2, 3), 500.0), clip_of(2, causal=causal))
    assert counter.get_total_flops() == pytest.approx(LOAD.forward_flops(causal), rel=0.06)
    assert learning_flops(1.0, False, False) == 3 and learning_flops(1.0, True, True) == 3


def plans(*overrides, gpus=1):
    made = recipe.read_recipe(CONFIGS / "train_s2v14b.yaml", overrides)
    return {p.stage: p for p in planning.plans_of(made, gpus)}


ONE = ("forcing.loop.strategy=single", "dmd.loop.strategy=single")


def test_the_14b_recipe_by_the_numbers_of_the_specification():
    """model.md 1 and 18, training.md 2.8 and 2.9."""
    one = plans(*ONE)
    assert one["dmd"].parts["base"] == pytest.approx(32.6e9, rel=0.02) and one["dmd"].parts["adapters"] == 2 * 4 * 676_331_520
    assert one["dmd"].problem(141_000_000_000) is None, "14B distillation fits one GPU of 141 GB"
    many = plans(gpus=8)
    assert many["dmd"].parts["base"] == pytest.approx(one["dmd"].parts["base"] / 8, abs=1) and many["dmd"].problem(80_000_000_000) is None
    load = Load(model=S2VConfig(), clip=ClipConfig(), block_latents=3, window_blocks=4, batch=1)
    assert 7 * 123.0e12 == pytest.approx(load.forward_flops() - 72e12, rel=0.03)
    assert one["forcing"].flops == pytest.approx(3 * load.forward_flops())
    assert many["forcing"].flops == pytest.approx(8 * one["forcing"].flops)


def test_what_cannot_fit_is_refused_with_numbers(monkeypatch):
    small = plans(*ONE, "dmd.loop.checkpointing=false", "dmd.loop.batch=2")
    problem = small["dmd"].problem(80_000_000_000)
    assert "needs" in problem and "of 80.00 GB" in problem and "checkpointing: true" in problem and "smaller batch" in problem
    made = recipe.read_recipe(CONFIGS / "train_s2v14b.yaml", ONE)
    planning.refuse_what_cannot_fit(made, "dmd", torch.device("cpu"))

    class Card:
        total_memory = 40_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    with pytest.raises(PlacementError, match="stage dmd needs .* GB on each of 1 GPU"):
        planning.refuse_what_cannot_fit(made, "dmd", torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="no clip section"):
        planning.clip_of(dataclasses.replace(made, clip=None))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train_*.yaml")), ids=lambda path: path.stem)
def test_recipes_tell_no_history(path):
    """It goes into the card of whoever runs the recipe, whose weights came about otherwise."""
    assert not recipe.read_recipe(path).export.history


def test_clips_of_another_size_are_refused_with_both(tmp_path):
    """Plan, data section and what is stored speak of one size."""
    from liveavatar.training import shards

    def refused(words, *overrides):
        with pytest.raises(ConfigError, match=words):
            recipe.run("forcing", CONFIGS / "train_s2v14b.yaml", [f"run={tmp_path}", *overrides])

    shards.write_arrays(shards.clip_path(tmp_path / "latents", "train", 0), {}, latents=torch.zeros(16, 24, 16, 16).numpy())
    refused("clip_000000.npz holds 24 latents of 128x128 pixels .*says 40 of 384x704 .*say clip: {height: 128, width: 128, latents: 5}")
    pytest.importorskip("webdataset")
    shards.pack(tmp_path / "latents", "train")
    shards.clip_paths(tmp_path / "latents", "train")[0].unlink()
    refused("train-000000.tar/clip_000000 holds 24 latents of 128x128")
    data = ["data.folder=x", "data.pictures=157", "data.height=384", "data.width=704"]
    refused("for clips of videos over a base only", *data)
    videos = [*data, "videos.folder=y", "videos.licence=CC0", "videos.consent=all"]
    refused("holds 24 latents", *videos)
    refused("clip says 21 latents of 384x704 pixels .*data makes 21 of 512x512", "data.size=512", *videos[:2], *videos[4:])


@pytest.mark.parametrize("arguments, status, words", [
    (["--config", "train_s2v14b.yaml", "--gpus", "64", "--memory", "80"], 0, "gathered blocks"),
    (["--config", "train_s2v14b.yaml", "--memory", "24", *ONE], 1, "does not fit: stage forcing needs"),
    (["--config", "train_micro.yaml"], 0, "consistency"),
])  # fmt: skip
def test_the_command(arguments, status, words):
    from liveavatar.__main__ import app
    from typer.testing import CliRunner

    arguments = [str(CONFIGS / a) if a.endswith(".yaml") else a for a in arguments]
    made = CliRunner().invoke(app, ["train", "plan", *arguments])
    assert made.exit_code == status and words in made.output, made.output
