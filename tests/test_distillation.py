"""Distribution matching: guidance, fixed point, a 1-D mixture reached from elsewhere; the stages `ode` and `dmd`."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import ClipCondition, exit_table, level_parallel
from liveavatar.diffusion.schedule import shifted
from liveavatar.training import dmd, forcing, guidance, levels, losses, ode, textcode
from liveavatar.training.loop import LoopConfig, agreed, load_checkpoint, shared_draws
from liveavatar.training.shards import read_arrays, write_arrays
from torch import nn

MICRO = Path(__file__).parents[1] / "configs" / "train_micro.yaml"
SPECTRUM = ["visemes=null", "forcing.model.audio_dim=400"]  # clips of noise need no encoder
TABLE = levels.student_table(4, 5.0)


# ---------------------------------------------------------------- tables and guidance


def test_the_student_table_is_exact():
    assert [1000 * s for s in TABLE] == pytest.approx([1000, 937.5, 2500 / 3, 625, 0], abs=1e-9)
    rounded = torch.tensor([1000 * s for s in TABLE[:-1]]).bfloat16().tolist()
    assert rounded == [1000, 936, 832, 624], "what LiveTalk prints is this table in bf16; it must never be cast"


@pytest.mark.parametrize("pieces", [6, 12])
def test_the_teacher_grid_contains_the_student_levels(pieces):
    grid = levels.teacher_grid(TABLE, pieces, 5.0)
    assert len(grid) == 4 * pieces + 1
    assert grid[::pieces] == TABLE, "exactly"
    assert grid == pytest.approx([shifted(1 - i / (4 * pieces), 5.0) for i in range(4 * pieces + 1)], abs=1e-12)


def test_tau_is_one_per_clip_and_stays_inside():
    tau = levels.score_levels(np.random.default_rng(0), 5000, 7, 5.0)
    assert tau.shape == (5000, 7) and (tau == tau[:, :1]).all()
    assert float(tau.min()) >= 0.0199 and float(tau.max()) <= 0.9801
    assert float((tau[:, 0] > shifted(0.5, 5.0)).float().mean()) == pytest.approx(0.5, abs=0.03)


def constant(value: float):
    return lambda x, sigma: torch.full_like(x, value)


def test_guidance_is_conventional():
    x, sigma = torch.zeros(2, 1, 2, 1, 1), torch.ones(2, 2)
    u, text, full = constant(1.0), constant(2.0), constant(5.0)
    assert guidance.guided((u, full), (1.0,)) is full, "no guidance is the conditional prediction, at the price of one forward"
    assert guidance.guided((u, text, full), (1.0, 1.0)) is full
    assert float(guidance.guided((u, full), (3.0,))(x, sigma).mean()) == 1 + 3 * (5 - 1)
    assert float(guidance.guided((u, text, full), (2.0, 3.0))(x, sigma).mean()) == 1 + 2 * (2 - 1) + 3 * (5 - 2)
    assert float(guidance.guided((u, text, full), (3.0, 3.0))(x, sigma).mean()) == 1 + 3 * (5 - 1)
    assert float(guidance.guided((u, full), (0.0,))(x, sigma).mean()) == 1


def test_numbers_of_other_projects_are_converted_once():
    numbers = {"self_forcing": (3.0, 4.0), "livetalk": (5.0, 6.0), "fastvideo": (4.0, 4.0), "fastvideo_legacy": (3.0, 4.0), "conventional": (2.0, 2.0)}
    for convention, (theirs, ours) in numbers.items():
        assert guidance.conventional_guidance(theirs, convention) == ours
    with pytest.raises(ConfigError, match="must be one of"):
        guidance.conventional_guidance(1.0, "wan")


# ---------------------------------------------------------------- the loss


def test_matching_loss_pulls_by_the_gradient():
    made = torch.randn(3, 2, 4, 2, 2, requires_grad=True)
    gradient = torch.randn_like(made)
    losses.matching_loss(made, gradient).backward()
    assert torch.allclose(made.grad, gradient / made.numel(), atol=1e-9)


def test_nothing_moves_when_the_critic_is_the_teacher():
    torch.manual_seed(0)
    net = Net()
    made, noise, tau = torch.randn(4, 1, 6, 1, 1), torch.randn(4, 1, 6, 1, 1), torch.full((4, 2), 0.4)
    real = guidance.guided((constant(9.0), net), (1.0,))
    assert not losses.dmd_gradient(made, real, copy.deepcopy(net), tau, noise).any()
    assert losses.dmd_gradient(made, guidance.guided((constant(9.0), net), (1.1,)), net, tau, noise).any()


def test_the_normaliser_is_per_clip():
    """A clip's direction does not change when its neighbour is loud; a perfect clip divides by zero and stays."""
    real, fake = (lambda x, s: x), (lambda x, s: 2 * x)
    made, noise, tau = torch.randn(2, 1, 6, 1, 1), torch.randn(2, 1, 6, 1, 1), torch.full((2, 1), 0.5)
    loud = torch.cat([made[:1], 100 * made[1:]])
    assert torch.equal(losses.dmd_gradient(made, real, fake, tau, noise)[0], losses.dmd_gradient(loud, real, fake, tau, noise)[0])
    nowhere = losses.dmd_gradient(torch.zeros(1, 1, 6, 1, 1), constant(0.0), constant(0.0), torch.zeros(1, 1), torch.zeros(1, 1, 6, 1, 1))
    assert not nowhere.any()


def test_the_direction_by_its_formula():
    made, noise, tau = torch.randn(1, 2, 4, 2, 2), torch.randn(1, 2, 4, 2, 2), torch.tensor([[0.3, 0.3]])
    x = 0.7 * made + 0.3 * noise
    f_real, f_fake = x - 0.3 * 2.0, x - 0.3 * torch.full_like(x, -1.0)
    expected = (f_fake - f_real) / (made - f_real).abs().mean()
    assert torch.allclose(losses.dmd_gradient(made, constant(2.0), constant(-1.0), tau, noise), expected, atol=1e-6)


# ---------------------------------------------------------------- a 1-D mixture


class Net(nn.Module):
    """A velocity for clips [B,1,F,1,1] of independent numbers."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x, sigma):
        x, s = torch.broadcast_tensors(x, levels.per_latent(sigma, x))
        seen = torch.stack([x, s, s * x, (1 - s) * x, *(f(k * math.pi * s) for k in (1, 2) for f in (torch.sin, torch.cos))], dim=-1)
        return self.layers(seen)[..., 0]


class Mixture:
    """Gaussians of given weight, mean and width: the exact velocity, and samples."""

    def __init__(self, *parts):
        self.weight, self.mean, self.width = (torch.tensor(p) for p in zip(*parts))

    def __call__(self, x, sigma):
        s = levels.per_latent(sigma, x)[..., None]
        keep, given = 1 - s, x[..., None]
        variance = (keep * self.width) ** 2 + s**2
        share = (self.weight.log() - 0.5 * variance.log() - 0.5 * (given - keep * self.mean) ** 2 / variance).softmax(-1)
        clean = self.mean + keep * self.width**2 / variance * (given - keep * self.mean)
        return (x - (share * clean).sum(-1)) / s[..., 0]

    def quantiles(self, count):
        at = torch.linspace(-6, 6, 20001)
        below = (self.weight * torch.distributions.Normal(self.mean, self.width).cdf(at[:, None])).sum(-1)
        return torch.from_numpy(np.interp((np.arange(count) + 0.5) / count, below.numpy(), at.numpy())).float()


def fitted(target, seed: int, iterations: int = 120) -> Net:
    """A Net that has learnt a known velocity: what Stage 1 leaves behind."""
    torch.manual_seed(seed)
    net = Net()
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(iterations):
        x, sigma = 1.5 * torch.randn(64, 1, 16, 1, 1), 0.02 + 0.98 * torch.rand(64, 16)
        loss = (net(x, sigma) - target(x, sigma)).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return net


def distance(net, table, target, count: int = 20000) -> float:
    """W1 between samples over the levels of `table` and the target."""
    with torch.no_grad():
        made = level_parallel(net, table, torch.randn(1, 1, count, 1, 1, generator=torch.Generator().manual_seed(9)), 1)
    return float((made.flatten().sort().values - target.quantiles(count)).abs().mean())


def distilled(student, critic, target, table, iterations: int, rates=(5e-3, 1e-2)) -> nn.Module:
    """Stage 2 in one dimension: own rollouts, exact teacher, learnt critic, one exit level per iteration. The student's average."""
    mean, rng = copy.deepcopy(student), np.random.default_rng(0)
    slow, fast = (torch.optim.AdamW(n.parameters(), rate, betas=(0.0, 0.999), weight_decay=0) for n, rate in zip((student, critic), rates))
    for i in range(iterations):
        for optimiser, rate in zip((slow, fast), rates):
            optimiser.param_groups[0]["lr"] = rate * min(1.0, 1.5 * (1 - i / iterations))
        turn = i >= 20 and i % 2 == 0
        left = exit_table(table, int(rng.integers(1, len(table))))
        start, eps, tau = torch.randn(16, 1, 64, 1, 1), torch.randn(16, 1, 64, 1, 1), levels.score_levels(rng, 16, 1, 1.5)
        with torch.set_grad_enabled(turn):
            made = level_parallel(student, left, start, 1)
        fast.zero_grad(), losses.critic_loss(critic, made.detach(), tau, eps).backward(), fast.step()
        if turn:
            direction = losses.dmd_gradient(made.detach(), target, critic, tau, eps)
            slow.zero_grad(), losses.matching_loss(made, direction).backward(), slow.step()
            with torch.no_grad():
                for a, b in zip(mean.parameters(), student.parameters()):
                    a.lerp_(b, 0.05)
    return mean


def test_a_student_of_the_wrong_distribution_reaches_the_mixture():
    """Gate 7, with two levels: every exit must match by itself, and with four levels W1 was still .055 after 1,000
    iterations. A network that knows one Gaussian becomes the sampler of two."""
    target, table = Mixture((0.6, -0.7, 0.4), (0.4, 0.8, 0.35)), levels.student_table(2, 5.0)
    student, critic = fitted(Mixture((1.0, 0.0, 1.0)), 0), fitted(target, 1)
    assert distance(student, table, target) > 0.2
    torch.manual_seed(0)
    assert distance(distilled(student, critic, target, table, 1200), table, target) < 0.05


# ---------------------------------------------------------------- trajectories


def test_trajectories_pass_through_the_student_levels():
    target, noise = Mixture((0.5, -1.0, 0.3), (0.5, 1.0, 0.3)), torch.randn(2, 1, 6, 1, 1)
    states = ode.integrate(target, levels.teacher_grid(TABLE, 6, 5.0), 6, noise, 2)
    assert states.shape == (2, 5, 1, 6, 1, 1) and torch.equal(states[:, 0], noise)
    for k, sigma in enumerate(TABLE[1:4], start=1):  # going on from a stored state ends where the whole way ended
        rest = levels.teacher_grid(TABLE[k:], 6, 5.0)
        assert rest[0] == sigma and torch.allclose(ode.integrate(target, rest, 6, states[:, k], 2)[:, -1], states[:, -1], atol=1e-5)


def test_ode_loss_counts_noised_blocks_only():
    states = torch.randn(2, 5, 1, 6, 1, 1)
    shown = torch.tensor([[0, 4], [3, 2]])
    seen = torch.stack([torch.cat([states[b, k, :, 3 * n : 3 * n + 3] for n, k in enumerate(row)], dim=1) for b, row in enumerate(shown.tolist())])

    def oracle(x, sigma):
        assert torch.equal(x, seen)
        s = levels.per_latent(sigma, x)
        return torch.where(s > 0, (x - states[:, -1]) / s.clamp_min(1e-6), 1e6)  # nonsense where the block is clean

    assert float(ode.ode_loss(oracle, states, TABLE, shown)) < 1e-10
    off = ode.ode_loss(lambda x, s: oracle(x, s) + 1, states, TABLE, shown)
    assert float(off) == pytest.approx((1 + TABLE[3] ** 2 + TABLE[2] ** 2) / 3, rel=1e-5)
    assert float(ode.ode_loss(lambda x, s: x, states, TABLE, torch.full((2, 2), 4))) == 0, "nothing to learn from context alone"


def test_states_shown_follow_their_law():
    shown = ode.draw_states(np.random.default_rng(0), 6000, 7, 4, 0.5, 0.1)
    same = (shown == shown[:, :1]).all(1)
    assert float(same.float().mean()) == pytest.approx(0.5, abs=0.03) and set(shown[same].unique().tolist()) == {0, 1, 2, 3}
    assert float((shown[~same] == 4).float().mean()) == pytest.approx(0.1, abs=0.02)


# ---------------------------------------------------------------- what all ranks do alike


def test_one_plan_for_all_ranks_covers_all_exits():
    config = dmd.DmdConfig(loop=LoopConfig(iterations=1), refresh_share=0.25)
    forcing_config = forcing.ForcingConfig(loop=LoopConfig(iterations=1), model={})
    plans = [dmd.Plan.draw(config, forcing_config, 4, shared_draws(0, "dmd", i)) for i in range(600)]
    assert plans[5] == dmd.Plan.draw(config, forcing_config, 4, shared_draws(0, "dmd", 5))
    for steps in (1, 2, 3, 4):
        assert 110 < sum(p.steps == steps for p in plans) < 190
    assert {p.sink_distance for p in plans} == set(range(4, 31)) and 110 < sum(p.refresh for p in plans) < 190


def compare(rank, folder):
    """What a rank does in the test below."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        plan = shared_draws(3, "dmd", 8).numpy.integers(4)
        agreed(steps=int(plan), refresh=1)
        try:
            agreed(steps=int(plan), refresh=rank)
        except ConfigError as error:
            (folder / f"refused{rank}").write_text(str(error))
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_that_disagree_all_stop(tmp_path, forker):
    forker.run(compare, tmp_path)
    for rank in (0, 1):
        assert "different refresh: [[" in (tmp_path / f"refused{rank}").read_text()


def test_the_student_takes_its_turns():
    config = dmd.DmdConfig(loop=LoopConfig(iterations=40), ratio=5, critic_warmup=20)
    assert [i for i in range(40) if config.student_turn(i)] == [24, 29, 34, 39] and config.student_steps(40) == 4


# ---------------------------------------------------------------- the stages of the micro recipe


def encoded_clip(folder: Path, index: int) -> None:
    """A clip as stage `latents` would leave it, of noise: 9 latents of 4 x 4."""
    rng = np.random.default_rng(index)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    card = {"caption": f"person {index}", "identity": {"seed": index}, "seed": index, "phones": [["aa", 0.0, 1.0]]}
    write_arrays(folder / "train" / f"clip_{index:06d}.npz", card, latents=draw(16, 9, 4, 4).astype(np.float16), reference=draw(16, 1, 4, 4),
                 motion=draw(16, 3, 4, 4), features=draw(2, 1, 400, 33), weight=np.ones((9, 4, 4), np.float32),
                 portraits=draw(1, 16, 3, 4, 4).astype(np.float16))


def test_one_clip_is_learned_by_heart(tmp_path):
    """A picture that stands still, at the student's levels: the velocity error goes below .05 (training.md 2.11)."""
    from liveavatar.training import recipe

    encoded_clip(tmp_path / "latents", 0)
    (path,) = (tmp_path / "latents" / "train").iterdir()
    card, arrays = read_arrays(path)
    still = np.random.default_rng(0).standard_normal((16, 1, 4, 4)).astype(np.float16)
    write_arrays(path, card, **{**arrays, "latents": np.repeat(still, 9, axis=1)})
    known = recipe.read_recipe(MICRO, SPECTRUM).forcing
    config = dataclasses.replace(
        known, start="", model={**known.model, "dim": 64, "ffn_dim": 128}, levels=TABLE[:-1], same_share=1.0, table_share=1.0, far_share=0.0,
        portrait_share=0.0, silence_share=0.0, no_text_share=0.0, mouth=0.0, eyes=0.0,
        loop=LoopConfig(iterations=300, batch=2, lr=8e-3, warmup=10, ema=0.9, threads=1, log_every=100, muon=True))
    learned = forcing.train_forcing(config, tmp_path, 0, textcode.text_encoder_of(config.model, 0), 0)
    assert np.mean(learned[:5]) > 1.5 and np.mean(learned[-10:]) < 0.05


def test_the_past_is_given_noised_in_stage_one_and_the_portrait_after(tmp_path, monkeypatch):
    """training.md 2.1: the latents before the trained ones, each at a level of its own; Stage 2 gives what serving does."""
    from liveavatar.training import recipe

    given = {}

    def seen(module):
        def condition(features, context, reference, motion, *rest, **how):
            given.setdefault(module, []).append((reference, motion))
            return ClipCondition(features, context, reference, motion, *rest, **how)

        monkeypatch.setattr(module, "ClipCondition", condition)

    seen(forcing), seen(dmd)
    encoded_clip(tmp_path / "latents", 0)
    clip = forcing.read_encoded(next((tmp_path / "latents" / "train").iterdir()))
    known = {"forcing.motion": "past", "forcing.portrait_share": "0", "forcing.loop.iterations": "8", "forcing.start": "''", "dmd.loop.iterations": "1",
             "dmd.start": "forcing", "dmd.teacher": "forcing", "dmd.forward_kl": "0", "run": str(tmp_path), "text": "null"}
    for stage in ("forcing", "dmd"):
        recipe.run(stage, MICRO, [*SPECTRUM, *(f"{key}={value}" for key, value in known.items())])
    past = torch.from_numpy(clip.latents[:, :3].astype(np.float32))  # of 9
    motion = torch.cat([m for _, m in given[forcing]])  # [16 clips,z,3,h,w], one clip 16 times
    share = ((motion * past).mean(dim=(1, 3, 4)) / past.square().mean(dim=(0, 2, 3))).clip(0, 1)  # of the past that is left in each latent
    assert motion.shape[1:] == past.shape and 0.35 < share.mean() < 0.65 and share.std() > 0.15 < (share[:, 0] - share[:, 2]).std()
    held = torch.from_numpy(clip.motion)
    assert all(torch.equal(r, held[:, :1].expand_as(r)) for r, _ in given[forcing]), "who it is is said by the portrait"
    assert given[dmd] and all(torch.equal(m, held.expand_as(m)) for _, m in given[dmd]), "clean, and as the runtime gives it"
    with pytest.raises(ConfigError, match="13 motion_frames are 4 latents .*context_latents=3 leaves fewer"):
        recipe.read_recipe(MICRO, ["forcing.motion=past", "forcing.motion_frames=13"])


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """The micro recipe from its teacher to dmd, on clips of noise; its overrides."""
    from liveavatar.training import recipe

    root = tmp_path_factory.mktemp("distilled")
    for index in range(3):
        encoded_clip(root / "latents", index)
    overrides = [f"run={root}", "text=null", "teacher.loop.iterations=4", "forcing.loop.iterations=4", *SPECTRUM]
    for stage in ("teacher", "forcing", "ode", "consistency", "dmd"):
        recipe.run(stage, MICRO, overrides)
    return recipe.read_recipe(MICRO, overrides)


def rows(run, stage):
    return [json.loads(line) for line in Path(run, f"{stage}.jsonl").read_text().splitlines()]


def test_the_chain_runs_and_the_student_learns_in_its_turns(micro):
    log = rows(micro.run, "dmd")
    assert len(log) == 14 and all(math.isfinite(v) for row in log for v in row.values())
    assert [row["iteration"] for row in log if "student" in row] == [9, 14]
    assert all(row["lr"] == pytest.approx(2e-4) for row in log) and all(row["forward"] > 0 for row in log if "student" in row)
    assert len(rows(micro.run, "teacher")) == 4 and len(rows(micro.run, "consistency")) == 4 and len(rows(micro.run, "ode")) == 6
    assert len(list((Path(micro.run) / "trajectories").iterdir())) == 2


def test_student_and_critic_move_and_the_teacher_stays(micro):
    """In bf16 autocast, after a rollout without gradients: casts kept from there would cut the graph."""
    assert micro.dmd.loop.bf16
    state, start, teacher = (load_checkpoint(Path(micro.run) / f"{stage}.pt") for stage in ("dmd", "consistency", "teacher"))
    assert teacher["iteration"] == 4
    for name, before, after in [(n, p, state["model"][n]) for n, p in start["ema"].items()] + [
            (n, p, state["critic"]["model"][n]) for n, p in teacher["ema"].items()]:
        idle = name.startswith(("cond_encoder.weight", "casual_audio_encoder.weights", "frame_packer")) or name.endswith("k.bias")
        assert torch.isfinite(after).all() and (idle or not torch.equal(before, after)), name
    assert not torch.equal(state["model"]["head.head.weight"], state["critic"]["model"]["head.head.weight"])
    assert "ema" not in state["critic"] and state["iteration"] == 14
    drift = [float((state["ema"][n] - start["ema"][n]).abs().max()) for n in ("head.head.weight", "patch_embedding.weight")]
    assert min(drift) > 0, "the average moves with the student"


def same(a, b) -> bool:
    """Equal trees of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_resumed_distillation_repeats_everything(micro, tmp_path):
    """Cut in the middle: losses, both networks, both optimisers and the average, bit for bit."""
    for name in ("latents", "forcing.pt", "teacher.pt", "consistency.pt"):
        (tmp_path / name).symlink_to(Path(micro.run) / name)
    text = textcode.text_encoder_of(micro.forcing.model, micro.seed)
    found = [loss for stop in (3, 7, None)
             for loss in dmd.train_dmd(micro.dmd, micro.forcing, micro.export.sigmas, tmp_path, micro.seed, text, 0, stop)]
    assert len(found) == 14
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path, "dmd")]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(micro.run, "dmd")]
    assert same(load_checkpoint(tmp_path / "dmd.pt"), load_checkpoint(Path(micro.run) / "dmd.pt"))


def test_students_of_other_starts_are_trained_apart(micro, tmp_path):
    """Each in its folder, from its own start; a start that the run does not have is left out, what is done is not done again."""
    from liveavatar.training.students import StudentsConfig, train_students

    for name in ("latents", "forcing.pt", "teacher.pt", "ode.pt"):
        (tmp_path / name).symlink_to(Path(micro.run) / name)
    again, short = every_turn(micro), StudentsConfig(iterations=2)
    made = [train_students(short, again.dmd, again.forcing, again.export.sigmas, tmp_path, again.seed, again.texts(), 0) for _ in range(2)]
    assert made[0] == made[1] == {start: tmp_path / "ablations" / start for start in ("forcing", "ode")}
    assert (tmp_path / "ablations/ode/ode.pt").readlink() == tmp_path / "ode.pt", "the link that moves, not an old checkpoint that is deleted"
    ends = [load_checkpoint(folder / "dmd.pt") for folder in made[0].values()]
    assert [int(end["iteration"]) for end in ends] == [2, 2] and not same(ends[0]["model"], ends[1]["model"])
    assert all(len(rows(folder, "dmd")) == 2 for folder in made[0].values())


def every_turn(micro, **change):
    """The recipe with two iterations of Stage 2, the student in both."""
    loop = dataclasses.replace(micro.dmd.loop, iterations=2)
    return dataclasses.replace(micro, dmd=dataclasses.replace(micro.dmd, critic_warmup=0, ratio=1, loop=loop, **change),
                               export=dataclasses.replace(micro.export, stage="forcing"))


@pytest.mark.parametrize("change", [{"history": "fixed:557"}, {"refresh_share": 1.0}, {"history_grad": "detach", "forward_kl": 0.0},
                                    {"teacher": "forcing", "start": "forcing", "curated_share": 0.4, "aggressive": True}])
def test_other_ways_of_stage_two(micro, tmp_path, change):
    """Shared banks and refreshed sinks go through the cached order and replay."""
    for name in ("latents", "forcing.pt", "teacher.pt", "consistency.pt"):
        (tmp_path / name).symlink_to(Path(micro.run) / name)
    short = every_turn(micro, **change)
    dmd.train_dmd(short.dmd, short.forcing, short.export.sigmas, tmp_path, short.seed, textcode.text_encoder_of(short.forcing.model, short.seed), 0)
    log = rows(tmp_path, "dmd")
    assert [row["student"] > 0 and row["student_norm"] > 0 for row in log] == [True, True]


def distil_as_rank(rank, micro, folder):
    """What a rank does in the test below."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        text = textcode.text_encoder_of(micro.forcing.model, micro.seed)
        work = dmd.Distillation(micro.dmd, micro.forcing, micro.export.sigmas, folder, micro.seed, forcing.EncodedReader(folder, micro.forcing, text, 0))
        log = [work.step(), work.step()]
        torch.save({"loss": [row["loss"] for row in log], **{k: w.module.state_dict() for k, w in (("student", work.student), ("critic", work.critic))}},
                   folder / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd with threads for GPUs cannot be forked")
def test_two_ranks_stay_one_student(micro, tmp_path, forker):
    """Own batches, shared plan, averaged gradients: after two updates of both networks the ranks hold the same bits."""
    for name in ("latents", "forcing.pt", "teacher.pt", "consistency.pt"):
        (tmp_path / name).symlink_to(Path(micro.run) / name)
    forker.run(distil_as_rank, every_turn(micro), tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["loss"] != two["loss"], "each rank has clips of its own"
    assert same(one["student"], two["student"]) and same(one["critic"], two["critic"])


def test_refusals_of_distillation_name_the_key(micro):
    from liveavatar.training import recipe

    for override, words in (("dmd.history=per_level", "must be clean, fixed:t"), ("dmd.start=teacher", "dmd.start"), ("dmd.ratio=0", "dmd.ratio"),
                            ("dmd.guidance.convention=wan", "guidance.convention"), ("dmd.history=clean", "cannot be exported"),
                            ("consistency=null", "no consistency section"), ("teacher=null", "no teacher section"), ("ode.pieces=0", "ode.pieces"), ("dmd.guidance.audio=-1", "not be negative"),
                            ("dmd=null", "export.stage='dmd'"), ("lids=null", "lips.start='lids'")):
        with pytest.raises(ConfigError, match=words):
            recipe.read_recipe(MICRO, [override])
    with pytest.raises(ConfigError, match="no dmd section"):
        recipe.run("dmd", MICRO, [f"run={micro.run}", "dmd=null", "export.stage=forcing"])
    with pytest.raises(ConfigError, match="made for levels"):
        ode.read_trajectories(ode.trajectory_path(micro.run, 0), (1.0, 0.5, 0.0))
    assert recipe.stages_of(micro)[-9:] == ["teacher", "forcing", "ode", "consistency", "dmd", "lids", "painter", "lips", "export"]
