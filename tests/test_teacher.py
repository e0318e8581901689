"""The bidirectional teacher, its samplers, consistency, and portraits that differ from their clips."""

import numpy as np
import pytest
import torch
from liveavatar.core import ConfigError
from liveavatar.diffusion.denoise import euler
from liveavatar.models.clip import Clip
from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.training import consistency, forcing, levels, teacher
from liveavatar.training.loop import draws_of
from liveavatar.training.synth.people import Identity

BLOCKS, SIDE = 3, 4


@pytest.fixture(scope="module")
def model():
    made = CausalS2V(S2VConfig(dim=32, ffn_dim=48, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=1, in_dim=4, out_dim=4,
                               cond_dim=4, audio_dim=6, audio_layers=1, audio_inject_layers=(0,)))
    made.init_weights(0)
    torch.nn.init.normal_(made.head.head.weight, std=0.1)
    return made.eval().requires_grad_(False)


def velocity(model, x, blocks, **how):
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(1, 1, 6, 12 * blocks, generator=draw)
    reference, motion = torch.randn(1, 4, 1, SIDE, SIDE, generator=draw), torch.randn(1, 4, 3, SIDE, SIDE, generator=draw)
    return model.forward_clip(x, torch.full((1, blocks), 500.0), Clip(features, [torch.ones(2, 8)], reference, motion, **how))


def test_the_teacher_sees_the_future_and_the_student_does_not(model):
    x = torch.randn(1, 4, 3 * BLOCKS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    later = x.clone()
    later[:, :, -1] += 1
    moved = {causal: (velocity(model, later, BLOCKS, causal=causal) - velocity(model, x, BLOCKS, causal=causal))[:, :, :3].abs().max() for causal in (True, False)}
    assert moved[True] == 0 and moved[False] > 1e-4


@pytest.mark.parametrize("first_block", [0, 40])
def test_one_block_alone_is_the_same_with_and_without_a_mask(model, first_block):
    x = torch.randn(1, 4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    made = [velocity(model, x, 1, causal=causal, first_block=first_block, sink_distance=9) for causal in (True, False)]
    assert torch.allclose(*made, atol=1e-5)


# ---------------------------------------------------------------- samplers


def towards(target: float, spread: float):
    """Exact velocity of N(target, spread^2): E[eps - x0 | x]."""
    def of(x, sigma):
        s = levels.per_latent(sigma, x)
        variance = (1 - s) ** 2 * spread**2 + s**2
        gain = (s - (1 - s) * spread**2) / variance
        return -target + gain * (x - (1 - s) * target)

    return of


@pytest.mark.parametrize("scheduler", teacher.SCHEDULERS)
def test_every_scheduler_reaches_the_distribution(scheduler):
    noise = torch.randn(1, 1, 2, 100, 100, generator=torch.Generator().manual_seed(0))
    made = teacher.sample(towards(1.5, 0.3), noise, 2, teacher.SamplerConfig(scheduler=scheduler, steps=40, shift=3.0))
    assert float(made.mean()) == pytest.approx(1.5, abs=0.03) and float(made.std()) == pytest.approx(0.3, abs=0.04)


def test_euler_of_diffusers_is_ours():
    config = teacher.SamplerConfig(scheduler="euler", steps=5)
    table = [float(s) for s in teacher.make_scheduler(config).sigmas]
    x = noise = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    v = towards(0.4, 0.5)
    for sigma, after in zip(table, table[1:]):
        x = euler(x, v(x, torch.full((2, 1), sigma)), sigma, after)
    assert torch.allclose(teacher.sample(v, noise, 1, config), x, atol=1e-5)


def test_an_unknown_scheduler_is_named():
    with pytest.raises(ConfigError, match="sampler.scheduler.*unipc"):
        teacher.SamplerConfig(scheduler="heun")


# ---------------------------------------------------------------- consistency


def test_a_consistent_model_has_no_loss_and_another_has_its_distance():
    """Of a single point c every clean estimate is c, wherever the trajectory is looked at."""
    grid = levels.teacher_grid(levels.student_table(4, 5.0), 3, 5.0)
    latents, noise = torch.full((2, 1, 6, 2, 2), 0.7), torch.randn(2, 1, 6, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = consistency.draw_intervals(np.random.default_rng(0), 2, 2, len(grid) - 1, 0.0)

    def point(c):
        return lambda x, sigma: (x - c) / levels.per_latent(sigma, x).clamp_min(1e-6)

    def loss(student):
        return float(consistency.consistency_loss(student, point(0.7), point(0.7), latents, noise, grid, drawn))

    assert loss(point(0.7)) == pytest.approx(0, abs=1e-8)
    assert loss(point(0.2)) == pytest.approx(0.25, abs=1e-4)


def test_the_last_interval_is_held_to_the_teachers_own_step():
    latents, noise = torch.zeros(1, 1, 3, 1, 1), torch.ones(1, 1, 3, 1, 1)
    def teach(x, sigma):
        return torch.full_like(x, 2.0)

    with torch.no_grad():
        got = consistency.consistency_loss(lambda x, sigma: torch.zeros_like(x), lambda x, sigma: torch.zeros_like(x), teach, latents, noise,
                                           (1.0, 0.5, 0.0), torch.tensor([[1]]))
    assert float(got) == pytest.approx((0.5 - (0.5 - 0.5 * 2)) ** 2)


# ---------------------------------------------------------------- portraits


def test_another_dress_is_the_same_person():
    own = Identity.sample(15)
    other = own.dressed(np.random.default_rng(0))
    changed = {name for name, value in own.record().items() if other.record()[name] != value}
    assert changed == {"shirt_name", "shirt", "background_name", "background"}
    assert f"{other.shirt_name} shirt, {other.background_name} background" in other.caption


class Words:
    """Stands for a text encoder: one row a letter."""

    def encode(self, text):
        return torch.full((max(1, len(text)), 2), float(len(text)))


@pytest.mark.parametrize("no_text", [0.0, 1.0])
def test_a_portrait_dressed_otherwise_comes_with_text_only(tmp_path, no_text):
    z = np.zeros((2, 6, 2, 2), np.float16)
    clip = forcing.Encoded(z, z[:, :1], z[:, :3], np.zeros((1, 1, 4, 21), np.float32), np.ones((6, 2, 2), np.float32),
                           np.ones((1, 2, 3, 2, 2), np.float16), {"caption": "red shirt", "identity": {"seed": 0}})
    config = forcing.ForcingConfig(loop=None, model={}, context_latents=3, portrait_share=1.0, no_text_share=no_text, silence_share=0.0)
    reader = forcing.EncodedReader(tmp_path, config, Words(), 0)
    _, _, context, reference, motion, _ = reader._row(clip, np.random.default_rng(0))
    assert float(reference.mean()) == float(motion.mean()) == 1 - no_text
    assert len(context) == (9 if no_text == 0 else 1) and reference.shape == (2, 1, 2, 2)


def test_curated_conditions_are_those_that_move_and_speak():
    def clip(amount, phones):
        latents = np.zeros((1, 4, 1, 1), np.float16)
        latents[:, 1::2] = amount
        return forcing.Encoded(latents, *[latents] * 5, {"phones": phones})

    spoken, silent = [["aa", 0, 1]], [["pau", 0, 1]]
    clips = {name: clip(amount, phones) for name, amount, phones in (("a", 1, spoken), ("b", 9, silent), ("c", 3, spoken), ("d", 2, spoken))}
    assert forcing.curated(clips, 0.67) == ["c", "d"] and forcing.curated(clips, 0.01) == ["c"]


def test_one_level_a_clip_for_the_teacher():
    sigma = levels.shifted_levels(draws_of(0, "teacher", 0).numpy, (4000, 1), 5.0)
    assert 0 < sigma.min() and sigma.max() <= 1 and np.median(sigma) == pytest.approx(5 * 0.5 / (1 + 4 * 0.5), abs=0.02)
