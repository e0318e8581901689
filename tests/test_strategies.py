"""Every way of spreading training over two processes makes the step that one process makes on all their clips, for student
and critic on one base; what two saved, one resumes; a run that is killed goes on as if it had not been."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from liveavatar.core import ConfigError, WeightsError
from liveavatar.diffusion.denoise import noise
from liveavatar.diffusion.rollout import ClipCondition, exit_table, level_parallel
from liveavatar.training import losses, recipe, strategy
from liveavatar.training.checkpoints import Stored
from liveavatar.training.groups import join
from liveavatar.training.loop import Learner, LoopConfig, Trainer, load_average, load_checkpoint

pytest.importorskip("peft", reason="adapters are PEFT's")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd with threads for GPUs cannot be forked")
WORLD = BLOCKS = 2
FORKED_WITH = ("torch.distributed.fsdp", "peft", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else []))
SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)
MICRO = Path(__file__).parents[1] / "configs" / "train_micro.yaml"
LOOP = LoopConfig(iterations=4, batch=1, lr=1e-2, warmup=0, cooldown=0.0, clip=0.02, ema=0.5, bf16=False, device="cpu", threads=1, beta1=0.5, audio_factor=0.5)
IDLE = ("k.bias", "casual_audio_encoder.weights")  # softmax takes no notice; one layer is mixed with itself
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
SPREAD = [("adapters", "single"), ("adapters", "fsdp2"), pytest.param("adapters", "deepspeed", marks=needs_deepspeed), ("copies", "fsdp2")]


def roles(kind: str) -> dict:
    """Student, critic and teacher: adapters over one base that already say something, or copies."""
    if kind == "copies":
        return {name: tiny_model(seed, num_layers=1).requires_grad_(name != "teacher") for seed, name in enumerate(("teacher", "critic", "student"))}
    from liveavatar.training.adapters import Base
    from test_adapters import moved

    base = Base(tiny_model(num_layers=1), rank=4, alpha=2.0)
    moved(base, "critic", "student")
    return {"teacher": base.as_(None), "critic": base.as_("critic"), "student": base.as_("student")}


def part(rank: int, world: int) -> tuple[ClipCondition, torch.Tensor]:
    """The clips of one rank and their noise: two in all, of two blocks."""
    draw = torch.Generator().manual_seed(1)
    features, reference, motion = (torch.randn(WORLD, *shape, generator=draw) for shape in ((1, 400, 24), (16, 1, 8, 8), (16, 3, 8, 8)))
    context = [torch.randn(9 - i, 16, generator=draw) for i in range(WORLD)]
    mine = slice(rank * WORLD // world, (rank + 1) * WORLD // world)
    condition = ClipCondition(features[mine], context[mine], reference[mine], motion[mine], 2, 9)
    return condition, noise(0, "clips", 0, (WORLD, 16, 3 * BLOCKS, 8, 8))[mine]


def stage_two(learners: dict, teacher, rank: int, world: int) -> list[float]:
    """An iteration of Stage 2 by hand: the critic learns from a rollout, then the student from critic and teacher. Norms."""
    condition, noise = part(rank, world)
    tau, eps = torch.full((len(noise), BLOCKS), 0.6), noise.flip(2)
    critic, student = learners["critic"], learners["student"]
    made = level_parallel(condition.velocity(student.module), exit_table(SIGMAS, 2), noise, BLOCKS)
    losses.critic_loss(condition.velocity(critic.module), made.detach(), tau, eps).backward()
    norms = [critic.update(1e-2, 1)]
    direction = losses.dmd_gradient(made.detach(), condition.velocity(teacher), condition.velocity(critic.module), tau, eps)
    losses.matching_loss(made, direction).backward()
    losses.critic_loss(condition.velocity(student.module), made.detach(), tau, eps).backward()  # a second pass into the same step
    return [*norms, student.update(1e-2, 1)]


def work(kind: str, name: str, folder: Path, rank: int, world: int, iterations=(1, 1)) -> None:
    """Iterations, from a new start (and from what the last one left) each time. Shards also compute blocks again."""
    config, norms = dataclasses.replace(LOOP, strategy=name, checkpointing=name == "fsdp2"), []
    for count in iterations:
        cast = roles(kind)
        strategy.strategy_of(config).wrap(cast["teacher"])
        critic = Learner(cast["critic"], config, average=False)
        trainer = Trainer("dmd", cast["student"], config, folder, 0, {"critic": critic})
        for _ in range(count):
            norms += stage_two({"critic": critic, "student": trainer.learner}, cast["teacher"], rank, world)
            trainer.iteration += 1
        trainer.save()
    if rank == 0:
        torch.save(norms, folder / "norms")


def as_rank(rank, kind, name, folder):
    """What a rank does."""
    join(rank, WORLD, f"file://{folder}/group")
    try:
        work(kind, name, folder, rank, WORLD)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By kind of roles: the folder where one process did it on all clips."""
    folders = {}
    for kind in ("adapters", "copies"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        work(kind, "single", folders[kind], 0, 1)
    return folders


def compare(found: dict, expected: dict, exact: float = 1e-3, where: str = "") -> None:
    """Trees of tensors alike: optimiser slots relative to the size of each, weights to a hundredth of a step (Adam makes much
    of little gradients). IDLE ones have rounding for a gradient."""
    assert found.keys() == expected.keys(), where
    for key, value in expected.items():
        place = f"{where}/{key}"
        if isinstance(value, dict):
            compare(found[key], value, exact, place)
        elif not any(name in place for name in IDLE):
            scale = value.abs().max().clamp_min(1e-30) if "/optimiser/" in place else 0.1 * value.abs().max().clamp_min(1.0)
            assert float((found[key].double() - value.double()).abs().max() / scale) < exact, place


@pytest.mark.parametrize("kind, name", SPREAD)
def test_two_processes_step_as_one(alone, kind, name, tmp_path, forker):
    """Weights, averages, gradients (in norms and moments), of both roles; through a checkpoint in the middle, and on in one process."""
    forker.run(as_rank, kind, name, tmp_path, world=WORLD)
    assert torch.load(tmp_path / "norms") == pytest.approx(torch.load(alone[kind] / "norms"), rel=1e-4)
    found, expected = load_checkpoint(tmp_path / "dmd.pt"), load_checkpoint(alone[kind] / "dmd.pt")
    assert set(found) == {"model", "ema", "optimiser", "critic", "iteration", "seed"} and int(found["iteration"]) == 2
    compare(found, expected)
    if name != "fsdp2":
        return
    work(kind, "single", tmp_path, 0, 1, [1])  # two shards, read by one process
    further = tmp_path / "alone"
    shutil.copytree(alone[kind], further, symlinks=True)
    work(kind, "single", further, 0, 1, [1])
    assert torch.load(tmp_path / "norms") == pytest.approx(torch.load(further / "norms"), rel=1e-3)


# ---------------------------------------------------------------- checkpoints


def small(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))


def trained(folder, iterations: int, seed: int = 0, **change) -> Trainer:
    trainer = Trainer("toy", small(seed), dataclasses.replace(LOOP, iterations=100, **change), folder, 0)
    trainer.run(lambda draws: (trainer.learner.module(torch.randn(8, 4, generator=draws.torch)).square().mean(), {}), iterations)
    return trainer


def test_the_last_good_checkpoint_is_kept(tmp_path, monkeypatch):
    trained(tmp_path, 1), trained(tmp_path, 1), trained(tmp_path, 1)
    link, folders = tmp_path / "toy.pt", tmp_path / "checkpoints"
    assert os.readlink(link) == "checkpoints/toy-00000003"
    assert sorted(p.name for p in folders.iterdir()) == ["toy-00000002", "toy-00000003"]
    before = load_checkpoint(link)
    from liveavatar.training import checkpoints

    def killed(state, checkpoint_id, no_dist):
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.dcp, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, 1)
    compare(load_checkpoint(link), before)
    monkeypatch.undo()
    assert trained(tmp_path, 1).iteration == 4
    assert sorted(p.name for p in folders.iterdir()) == ["toy-00000003", "toy-00000004"]
    (tmp_path / "checkpoints" / "toy-00000004" / ".metadata").unlink()
    with pytest.raises(WeightsError, match="cannot read checkpoint"):
        Stored(link)


def test_files_of_earlier_runs_are_read(tmp_path):
    """As torch.save wrote them: numbered optimiser slots, everything in one file; muon's too."""
    for muon in (False, True):
        folder = tmp_path / str(muon)
        want = trained(folder, 3, muon=muon)
        learner, names = want.learner, list(want.learner.strategy.named)
        model = learner.module.state_dict()
        torch.save({"model": model, "ema": learner.ema.values, "optimiser": learner.strategy.optimiser.state_dict(), "iteration": 3, "seed": 0,
                    "critic": {"model": model, "ema": {}, "optimiser": {"state": {}, "param_groups": []}}}, folder / "old.pt")
        compare({k: v for k, v in load_checkpoint(folder / "old.pt").items() if k != "critic"}, load_checkpoint(folder / "toy.pt"))
        assert load_checkpoint(folder / "old.pt")["critic"]["model"].keys() == set(names)
        (folder / "toy.pt").unlink(), shutil.move(folder / "old.pt", folder / "toy.pt")
        module = small(1)
        assert load_average(module, folder / "toy.pt") == 3 and all(torch.equal(p, learner.ema.values[n]) for n, p in module.named_parameters())
        on = trained(folder, 1, seed=1, muon=muon)
        trained(tmp_path / f"{muon}-straight", 4, muon=muon)
        assert on.iteration == 4 and (folder / "toy.pt").is_symlink()
        compare(load_checkpoint(folder / "toy.pt"), load_checkpoint(tmp_path / f"{muon}-straight" / "toy.pt"))


def test_other_tensors_are_refused(tmp_path):
    trained(tmp_path, 1)
    with pytest.raises(WeightsError, match="differ from the recipe's model: .*model/0.weight"):
        Trainer("toy", torch.nn.Sequential(torch.nn.Linear(4, 5)), LOOP, tmp_path, 0)
    with pytest.raises(WeightsError, match="cannot read checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def train_for_long(rank, folder) -> None:
    """A run that saves all the time."""
    config = dataclasses.replace(LOOP, iterations=100_000, checkpoint_seconds=0.02, log_every=1)
    trainer = Trainer("toy", small(), config, folder, 0)

    def loss_of(draws):
        time.sleep(0.002)
        return trainer.learner.module(torch.randn(8, 4, generator=draws.torch)).square().mean(), {}

    trainer.run(loss_of)


def lines(folder) -> dict[int, float]:
    """Loss by iteration; where one was made again, again the same."""
    found: dict[int, float] = {}
    for text in (folder / "toy.jsonl").read_text().splitlines(keepends=True):
        if not text.endswith("\n"):  # killed while it was written
            continue
        row = json.loads(text)
        assert found.setdefault(int(row["iteration"]), row["loss"]) == row["loss"]
    return found


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path, forker):
    """SIGKILL in the middle of training and writing, twice."""
    (tmp_path / "toy.jsonl").touch()
    for wanted in (40, 80):
        (child,) = forker.start(train_for_long, tmp_path, world=1)
        deadline = time.monotonic() + 120
        while len(lines(tmp_path)) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert "SIGKILL" in forker.outcome()
    killed = lines(tmp_path)
    assert len(killed) >= 80 and max(killed) == len(killed)
    straight = tmp_path / "straight"
    config = dataclasses.replace(LOOP, iterations=100_000, log_every=1)
    trainer = Trainer("toy", small(), config, straight, 0)
    trainer.run(lambda draws: (trainer.learner.module(torch.randn(8, 4, generator=draws.torch)).square().mean(), {}), max(killed))
    assert lines(straight) == killed


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("override, words", [
    ("forcing.loop.strategy=zero", "strategy='zero': must be one of single, fsdp2, deepspeed"),
    ("forcing.loop.strategy=fsdp2", "muon with strategy='fsdp2'"),
    ("ode.loop.strategy=deepspeed", "ode.loop.strategy='deepspeed': only for adapters"),
    ("vae.decoder.strategy=fsdp2", "muon with strategy='fsdp2'"),
    ("forcing.loop.device=tpu", "device='tpu'"),
])  # fmt: skip
def test_refusals_name_the_key(override, words):
    with pytest.raises(ConfigError, match=words):
        recipe.read_recipe(MICRO, [override])


def test_a_group_is_asked_for():
    with pytest.raises(ConfigError, match="strategy 'fsdp2' runs in a group"):
        Learner(tiny_model().requires_grad_(True), dataclasses.replace(LOOP, strategy="fsdp2"))
