"""Roles as adapters over one base: identity at the start, merge == unmerged, no role reaches another or the base, and the
whole chain in miniature: forcing -> dmd -> export -> serving."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

pytest.importorskip("peft", reason="adapters are PEFT's")

from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import cached_clips, level_parallel
from liveavatar.models.lora import lora_targets
from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.training import adapters, losses
from liveavatar.training.adapters import Base
from liveavatar.training.memory import compute_blocks_again
from liveavatar.training.replay import replay
from test_rollouts import BLOCKS, SIGMAS, clips, gap, gradient, relative, start

SMALL = S2VConfig(dim=48, ffn_dim=64, freq_dim=32, text_dim=16, text_len=16, num_heads=2, num_layers=2, audio_dim=400, audio_layers=1,
                  audio_inject_layers=(0,))


def moved(base: Base, *names: str) -> None:
    """Give adapters something to say."""
    for i, name in enumerate(names):
        draw = torch.Generator().manual_seed(i)
        for key, p in base.as_(name).named_parameters():
            if key.endswith("lora_B.weight"):
                p.data.copy_(0.2 * torch.randn(p.shape, generator=draw))


@pytest.fixture
def base():
    return Base(tiny_model(), rank=4, alpha=2.0)


def velocities(base, *roles, seed=1):
    condition, x = clips(), start()
    with torch.no_grad():
        return [condition.velocity(base.as_(role))(x, torch.full((2, BLOCKS), 0.7)) for role in roles]


def test_a_fresh_adapter_changes_nothing(base):
    plain = clips().velocity(tiny_model())(start(), torch.full((2, BLOCKS), 0.7))
    for made in velocities(base, None, "student", "critic"):
        assert torch.equal(made, plain)
    assert len(base.targets) == len(list(base.as_("student").parameters())) / 2 == 24
    moved(base, "student", "critic")
    teacher, student, critic = velocities(base, None, "student", "critic")
    assert torch.equal(teacher, plain) and gap(student, plain) > 1e-2 and gap(student, critic) > 1e-2


def test_adapters_are_functions_of_the_seed():
    one, two, other = ({n: p.detach().clone() for n, p in Base(tiny_model(), 4, 2.0, seed).as_("student").named_parameters()} for seed in (0, 0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one) and not any(torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
    assert not any(p.any() for n, p in one.items() if "lora_B" in n)


def test_the_full_layout_is_the_public_one():
    with torch.device("meta"):
        base = Base(CausalS2V(S2VConfig()), 128, 64.0)
        student = dict(base.as_("student").named_parameters())
    assert len(student) == 896 and sum(p.numel() for p in student.values()) == 676_331_520
    assert student["blocks.39.ffn.2.lora_A.weight"].shape == (128, 13824) and student["audio_injector.injector.11.o.lora_B.weight"].shape == (5120, 128)


def test_merged_equals_unmerged_through_the_serving_file(base, tmp_path):
    """What is exported, read by models/lora.py and merged, is what the trainer ran."""
    from liveavatar.models.weights import merge_lora

    moved(base, "student")
    path = adapters.save_adapter(tmp_path / "a.safetensors", dict(base.as_("student").named_parameters()), 4, 2.0, torch.float32)
    served = tiny_model()
    assert merge_lora(served, path) == 24
    (trained,) = velocities(base, "student")
    with torch.no_grad():
        assert gap(clips().velocity(served)(start(), torch.full((2, BLOCKS), 0.7)), trained) < 1e-5 * trained.abs().max()
    keys = set(load_file(path))
    assert keys == {f"{name}.{kind}" for name in lora_targets(tiny_model()) for kind in ("lora_A.weight", "lora_B.weight", "alpha")}


def of(base, role):
    return [p.grad for p in base.as_(role).parameters()]


def test_gradients_of_one_role_never_reach_another(base):
    moved(base, "student", "critic")
    condition, x = clips(), start()
    for role, other in (("student", "critic"), ("critic", "student")):
        with torch.no_grad():  # the other roles run in between, as in Stage 2
            velocities(base, other, None)
        loss = condition.velocity(base.as_(role))(x, torch.full((2, BLOCKS), 0.5)).square().mean()
        with torch.no_grad():
            velocities(base, other, None)
        loss.backward()
        assert all(g is not None and g.any() for g in of(base, role)) and not any(g is not None for g in of(base, other))
        assert all(p.grad is None for n, p in base.model.named_parameters() if "lora_" not in n)
        base.model.zero_grad(set_to_none=True)
    assert adapters.IN_USE.get() is None


def test_roles_can_be_nested_and_fail(base):
    moved(base, "student", "critic")
    student, critic = base.as_("student"), base.as_("critic")
    plain, alone = velocities(base, None, "student")
    seen = []

    def inner(x, sigma):
        seen.append(adapters.IN_USE.get())
        return clips().velocity(critic)(x, sigma)

    student._run(inner, start(), torch.full((2, BLOCKS), 0.7))
    assert seen == ["student"] and adapters.IN_USE.get() is None
    with pytest.raises(ConfigError):
        student.encode_text(torch.zeros(100, 16))
    assert adapters.IN_USE.get() is None
    assert torch.equal(velocities(base, "student")[0], alone) and torch.equal(velocities(base, None)[0], plain)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_blocks_computed_again_use_the_adapter_they_used(base, elsewhere):
    """Also where the backward pass runs in another thread, as on a GPU, after a forward of another role."""
    moved(base, "student", "critic")
    condition, x = clips(), start()

    def backward():
        made = condition.velocity(base.as_("student"))(x, torch.full((2, BLOCKS), 0.5))
        with torch.no_grad():
            velocities(base, "critic")
        if elsewhere:
            thread = threading.Thread(target=lambda: made.square().mean().backward())
            thread.start(), thread.join()
        else:
            made.square().mean().backward()
        return gradient(base.as_("student"))

    joint = backward()
    compute_blocks_again(base.model)
    assert relative(backward(), joint) < 1e-6


def test_rollouts_and_replay_take_a_role(base):
    """Nothing of diffusion/ or the losses is written twice for adapters."""
    moved(base, "student", "critic")
    student, condition, x, pull = base.as_("student"), clips(), start(), torch.randn_like(start()) / 1000
    level_parallel(condition.velocity(student, history_grad=False), SIGMAS, x, BLOCKS).backward(pull)
    joint = gradient(student)
    rolled = cached_clips(student, SIGMAS, x, condition, BLOCKS)
    replay(student, rolled, pull)
    assert relative(gradient(student), joint) < 1e-6
    assert not any(g is not None for g in of(base, "critic"))


def test_nothing_moves_while_critic_and_teacher_are_one(base):
    """Gate 6 on one base."""
    condition, made, noise, tau = clips(), start(), torch.randn_like(start()), torch.full((2, BLOCKS), 0.4)
    direction = losses.dmd_gradient(made, condition.velocity(base.as_(None)), condition.velocity(base.as_("critic")), tau, noise)
    assert not direction.any()


# ---------------------------------------------------------------- the whole chain, in miniature


RECIPE = """
seed: 5
run: {root}/run
forcing:
  base: {{folder: {root}/official, rank: 4, alpha: 2.0, dtype: float32}}
  motion_frames: 9
  default_share: 0.0
  loop: {{iterations: 4, batch: 2, lr: 3.0e-2, audio_factor: 0.5, warmup: 0, ema: 0.5, threads: 1, log_every: 1, bf16: false, device: cpu}}
ode:
  batches: 1
  pieces: 1
  loop: {{iterations: 1, batch: 2, lr: 1.0e-3, warmup: 0, ema: 0.5, threads: 1, log_every: 1, bf16: false, device: cpu}}
dmd:
  teacher: teacher
  critic_warmup: 1
  ratio: 2
  refresh_share: 0.5
  forward_kl: 0.1
  loop: {{iterations: 5, batch: 2, lr: 1.0e-2, warmup: 0, ema: 0.5, threads: 1, log_every: 1, bf16: false, device: cpu, checkpointing: true}}
export:
  stage: dmd
  folder: {root}/lora
  dtype: float32
"""


def official_folder(folder: Path) -> None:
    """A base as Wan-AI distributes it, tiny."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel_S2V", "model_type": "s2v", **SMALL.to_dict()}))
    model = tiny_model(**{key: getattr(SMALL, key) for key in ("text_len",)})
    save_file({name: t.clone().contiguous() for name, t in model.state_dict().items()}, folder / "diffusion_pytorch_model.safetensors")


def encoded_clips(latents: Path, count: int = 2) -> None:
    """Clips, captions and silence as stage `latents` would leave them, of noise: 9 latents of 8 x 8."""
    from liveavatar.training import shards, stored

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    for i in range(count):
        arrays = {"latents": draw(16, 9, 8, 8), "reference": draw(16, 1, 8, 8), "motion": draw(16, 3, 8, 8), "features": draw(1, 1, 400, 33),
                  "weight": np.ones((9, 8, 8), np.float32), "portraits": np.zeros((0, 16, 3, 8, 8), np.float32)}
        shards.write_arrays(shards.clip_path(latents, "train", i), {"caption": f"person {i}", "identity": {"seed": i}}, **arrays)
    conditions = latents / "conditions"
    stored.write_rows(conditions / "silence.npz", torch.from_numpy(draw(1, 400, 1)), {})
    for caption in ("", "person 0", "person 1"):
        stored.write_rows(stored.caption_path(conditions, caption), torch.from_numpy(draw(5, 16)), {"caption": caption})


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The recipe over a tiny base after forcing, ode, dmd and export; (recipe, path of its file)."""
    from liveavatar.training import recipe

    root = tmp_path_factory.mktemp("miniature")
    official_folder(root / "official")
    encoded_clips(root / "run" / "latents")
    path = root / "recipe.yaml"
    path.write_text(RECIPE.format(root=root))
    recipe.run("all", path)
    return recipe.read_recipe(path), path


def test_stages_over_a_base_are_those_that_train_adapters(miniature):
    from liveavatar.training import recipe

    made, path = miniature
    assert recipe.stages_of(made) == ["forcing", "ode", "dmd", "export"]
    for stage, words in (("vae", "used as it is"), ("teacher", "used as it is"), ("data", "no data section"), ("consistency", "no consistency")):
        with pytest.raises(ConfigError, match=words):
            recipe.run(stage, path)
    for stage, section in (("preview", "vae"), ("ablations", "vae"), ("teacher_clips", "teacher")):
        with pytest.raises(ConfigError, match=f"stage {stage}: the recipe has no {section} section.*export the adapter.*lora/liveavatar.safetensors"):
            recipe.run(stage, path)
    with pytest.raises(ConfigError, match="either model .* or base"):
        recipe.read_recipe(path, ["forcing.model={dim: 48}"])
    with pytest.raises(ConfigError, match="section 'teacher': not over a base"):
        recipe.read_recipe(path, ["teacher.loop.iterations=1"])
    with pytest.raises(ConfigError, match="export.blend: not over a base"):
        recipe.read_recipe(path, ["export.blend=elsewhere"])


def test_checkpoints_hold_adapters_only(miniature):
    from liveavatar.training.loop import load_checkpoint

    run = Path(miniature[0].run)
    state = load_checkpoint(run / "dmd.pt")
    assert len(state["model"]) == len(state["critic"]["model"]) == len(state["ema"]) == 48 and "ema" not in state["critic"]
    assert all(".lora_" in name for name in state["model"])
    start = load_checkpoint(run / "forcing.pt")
    assert any(not torch.equal(state["model"][n], start["ema"][n]) for n in state["model"]), "the student learned"
    assert all(t.any() for n, t in state["critic"]["model"].items() if "lora_B" in n and "injector" not in n), "the critic learned"
    slow, fast = (max(float(t.abs().max()) for n, t in start["model"].items() if "lora_B" in n and n.startswith(part)) for part in ("audio", "blocks"))
    assert 0 < slow < 0.8 * fast, "audio_factor"


def test_the_export_is_served_as_the_trainer_ran_it(miniature):
    """The adapter file, through the loader that serving uses, gives the streaming rollout of the trainer's student."""
    import hashlib

    from liveavatar.diffusion.rollout import cached_rollout
    from liveavatar.models.weights import load_transformer
    from liveavatar.training.casting import averaged_model

    made, _ = miniature
    path = Path(made.export.folder) / "liveavatar.safetensors"
    card = json.loads(path.with_name("card.json").read_text())
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and card["iterations"] == 5 and card["stage"] == "dmd"
    served = load_transformer(made.forcing.base.folder, lora=path)
    trained, iteration = averaged_model(made.forcing, made.run, "dmd", made.seed)
    assert iteration == 5
    plain = load_transformer(made.forcing.base.folder)
    condition, x = clips(1), start(1)
    rolled = [torch.cat(list(cached_rollout(model, made.export.sigmas, x[0].chunk(BLOCKS, dim=1), condition.features[0].chunk(BLOCKS, dim=-1),
                                            condition.context[0], condition.reference[0], condition.motion[0])), dim=1)
              for model in (trained, served, plain)]
    assert gap(rolled[0], rolled[1]) < 1e-5 * rolled[0].abs().max() and gap(rolled[0], rolled[2]) > 1e-2


def test_texts_that_were_not_encoded_are_named(miniature):
    from liveavatar.core import InputError
    from liveavatar.training.stored import StoredConditions

    with pytest.raises(InputError, match="a new face.*latents stage"):
        StoredConditions(miniature[0].run).encode("a new face")


def test_a_text_is_encoded_once(tmp_path, monkeypatch):
    """Captions come as a stream; a stage that goes on must not load umT5 for those it has."""
    from liveavatar.training import stored

    encoder = SimpleNamespace(encode=lambda caption: torch.full((1, 4), float(len(caption))))
    monkeypatch.setattr(stored, "load_text_encoder", lambda base, dtype: encoder)
    front_end = SimpleNamespace(features_of=lambda pcm, count: torch.zeros(1, 2, count))
    assert [stored.store_conditions("base", tmp_path, (c for c in ("a face", "a face", "another")), front_end) for _ in range(2)] == [3, 0]


SCORES = """
test -s "$ADAPTER" && test -z "$RANK" || exit 3
n=$(cat {root}/calls 2>/dev/null || echo 0); echo $((n + 1)) > {root}/calls
set -- 1 3.5 fail 2 2; shift $n; echo "judged {root}"; echo $1
"""


def test_the_best_student_over_a_base_is_kept_by_a_command(miniature, tmp_path, monkeypatch):
    """It judges the start and every step, is resumed without asking twice, may fail once it has worked, and ends the stage."""
    from liveavatar.training import recipe
    from liveavatar.training.loop import load_checkpoint

    made, path = miniature
    for name in ("latents", "forcing.pt"):
        (tmp_path / name).symlink_to(Path(made.run) / name)
    (tmp_path / "judge.sh").write_text(SCORES.format(root=tmp_path))
    monkeypatch.setenv("RANK", "0")
    overrides = [f"run={tmp_path}", f"export.folder={tmp_path}/lora", "export.stage=best", f"dmd.judge.command=bash {tmp_path}/judge.sh", "dmd.judge.every=1",
                 "dmd.judge.patience=1", "dmd.loop.iterations=20", "dmd.refresh_share=0"]
    for _ in range(2):
        recipe.run("dmd", path, overrides)
    rows = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [(row["stage"], row.get("score")) for row in rows] == [("forcing", 1.0), ("dmd_000001", 3.5), ("dmd_000002", None), ("dmd_000003", 2.0)]
    assert "its last line is 'fail'" in rows[2]["error"] and (tmp_path / "calls").read_text().strip() == "4"
    assert len((tmp_path / "dmd.jsonl").read_text().splitlines()) == 7, "one of warm-up and three turns of two, of 20"
    recipe.run("export", path, overrides)
    best = load_checkpoint(tmp_path / "dmd_000001.pt")
    card = json.loads((tmp_path / "lora" / "card.json").read_text())
    assert card["stage"] == "best" and card["iterations"] == 3
    written = load_file(tmp_path / "lora" / "liveavatar.safetensors")
    assert all(torch.equal(written[name], value) for name, value in best["ema"].items())
    with pytest.raises(ConfigError, match="dmd.judge.command ended with 1, .*never"):
        (tmp_path / "judged.jsonl").unlink()
        recipe.run("dmd", path, [*overrides, "dmd.judge.command=echo never >&2; exit 1"])
    with pytest.raises(ConfigError, match="export.stage='best': nobody says"):
        recipe.read_recipe(path, ["export.stage=best"])
    with pytest.raises(ConfigError, match="dmd.judge: judges adapters over a base"):
        recipe.read_recipe(Path(__file__).parents[1] / "configs" / "train_micro.yaml", ["dmd.judge.command=x"])


def test_the_14b_recipe_is_valid():
    from liveavatar.training import recipe

    made = recipe.read_recipe(Path(__file__).parents[1] / "configs" / "train_s2v14b.yaml")
    assert recipe.stages_of(made) == ["forcing", "dmd", "export"] and made.dmd.student_steps(made.dmd.loop.iterations) == 996
    assert made.dmd.critic_lr / made.dmd.loop.lr == pytest.approx(1 / 5)
