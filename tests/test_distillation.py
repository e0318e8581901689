"""Distribution matching: guidance, fixed point, a 1-D mixture reached from elsewhere; the stages `ode` and `dmd`."""

import copy
import math

import numpy as np
import pytest
import torch
from liveavatar.core import ConfigError
from liveavatar.diffusion.rollout import exit_table, level_parallel
from liveavatar.diffusion.schedule import shifted
from liveavatar.training import levels, losses
from torch import nn

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
    assert losses.guided((u, full), (1.0,)) is full, "no guidance is the conditional prediction, at the price of one forward"
    assert losses.guided((u, text, full), (1.0, 1.0)) is full
    assert float(losses.guided((u, full), (3.0,))(x, sigma).mean()) == 1 + 3 * (5 - 1)
    assert float(losses.guided((u, text, full), (2.0, 3.0))(x, sigma).mean()) == 1 + 2 * (2 - 1) + 3 * (5 - 2)
    assert float(losses.guided((u, text, full), (3.0, 3.0))(x, sigma).mean()) == 1 + 3 * (5 - 1)
    assert float(losses.guided((u, full), (0.0,))(x, sigma).mean()) == 1


def test_numbers_of_other_projects_are_converted_once():
    numbers = {"self_forcing": (3.0, 4.0), "livetalk": (5.0, 6.0), "fastvideo": (4.0, 4.0), "fastvideo_legacy": (3.0, 4.0), "conventional": (2.0, 2.0)}
    for convention, (theirs, ours) in numbers.items():
        assert losses.conventional_guidance(theirs, convention) == ours
    with pytest.raises(ConfigError, match="must be one of"):
        losses.conventional_guidance(1.0, "wan")


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
    real = losses.guided((constant(9.0), net), (1.0,))
    assert not losses.dmd_gradient(made, real, copy.deepcopy(net), tau, noise).any()
    assert losses.dmd_gradient(made, losses.guided((constant(9.0), net), (1.1,)), net, tau, noise).any()


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


def fitted(target, seed: int, iterations: int = 300) -> Net:
    """A Net that has learnt a known velocity: what Stage 1 leaves behind."""
    torch.manual_seed(seed)
    net = Net()
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(iterations):
        x, sigma = 1.5 * torch.randn(64, 1, 16, 1, 1), 0.02 + 0.98 * torch.rand(64, 16)
        loss = (net(x, sigma) - target(x, sigma)).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return net


def distance(net, target, count: int = 20000) -> float:
    """W1 between four-step samples and the target."""
    with torch.no_grad():
        made = level_parallel(net, TABLE, torch.randn(1, 1, count, 1, 1, generator=torch.Generator().manual_seed(9)), 1)
    return float((made.flatten().sort().values - target.quantiles(count)).abs().mean())


def test_a_student_of_the_wrong_distribution_reaches_the_mixture():
    """Gate 7: four steps, own rollouts, exact teacher, learnt critic, 5:1, one exit level per iteration."""
    target = Mixture((0.65, -1.0, 0.4), (0.35, 1.2, 0.3))
    student, critic = fitted(Mixture((1.0, 0.0, 1.0)), 0), fitted(target, 1)
    mean, rng = copy.deepcopy(student), np.random.default_rng(0)
    slow = torch.optim.AdamW(student.parameters(), 1e-3, betas=(0.0, 0.999), weight_decay=0.0)
    fast = torch.optim.AdamW(critic.parameters(), 2e-3, betas=(0.0, 0.999), weight_decay=0.0)
    start, count = distance(student, target), 1500
    for i in range(count):
        for group, rate in ((slow.param_groups[0], 1e-3), (fast.param_groups[0], 2e-3)):
            group["lr"] = rate * min(1.0, 2 * (1 - i / count))
        table = exit_table(TABLE, int(rng.integers(1, 5)))
        turn = i >= 20 and i % 5 == 0
        eps, again, tau = torch.randn(32, 1, 64, 1, 1), torch.randn(32, 1, 64, 1, 1), levels.score_levels(rng, 32, 1, 3.0)
        with torch.no_grad():
            made = level_parallel(student, table, eps, 1)
        loss = losses.critic_loss(critic, made, tau, again)
        fast.zero_grad(), loss.backward(), fast.step()
        if turn:
            made = level_parallel(student, table, eps, 1)
            loss = losses.matching_loss(made, losses.dmd_gradient(made, target, critic, tau, again))
            slow.zero_grad(), loss.backward(), slow.step()
            with torch.no_grad():
                for a, b in zip(mean.parameters(), student.parameters()):
                    a.lerp_(b, 0.03)
    print(start, distance(student, target), distance(mean, target))
    assert start > 0.2 and distance(mean, target) < 0.05
