"""The two orders of a rollout are one function; history modes; blocks replayed one by one give the joint gradient."""

import pytest
import torch
from conftest import tiny_model
from liveavatar.core import ConfigError
from liveavatar.diffusion.denoise import euler, noise
from liveavatar.diffusion.rollout import (
    PER_STEP,
    ClipCondition,
    Course,
    HistoryMode,
    cached_clips,
    cached_rollout,
    exit_table,
    level_parallel,
    replay_block,
)
from liveavatar.training.replay import replay

SIZE, BLOCK, BLOCKS = 8, 3, 5
SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)
MODES = ["per_step", "clean", "fixed:557", "random:400"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def clips(count: int = 2, **where) -> ClipCondition:
    draw = torch.Generator().manual_seed(1)
    return ClipCondition(torch.randn(count, 1, 400, 4 * BLOCK * BLOCKS, generator=draw),
                         [torch.randn(9 - i, 16, generator=draw) for i in range(count)],
                         torch.randn(count, 16, 1, SIZE, SIZE, generator=draw), torch.randn(count, 16, 3, SIZE, SIZE, generator=draw),
                         **{"window_blocks": 3, "sink_distance": 9, **where})


def start(count: int = 2) -> torch.Tensor:
    return noise(0, "clips", 0, (count, 16, BLOCK * BLOCKS, SIZE, SIZE))


def streamed(model, condition, x, i, seed: int = 0, **how) -> torch.Tensor:
    """Clip i of a batch through the streaming rollout."""
    course = Course(ring_blocks=condition.window_blocks, sink_distance=condition.sink_distance, refresh_block=condition.refresh_block, **how)
    return torch.cat(list(cached_rollout(
        model, SIGMAS, x[i].chunk(BLOCKS, dim=1), condition.features[i].chunk(BLOCKS, dim=-1), condition.context[i], condition.reference[i],
        condition.motion[i], course, seed)), dim=1)


def gap(a, b) -> float:
    return float((a - b).detach().abs().max())


def test_level_parallel_equals_the_cached_order(model):
    condition, x = clips(), start()
    with torch.no_grad():
        parallel = level_parallel(condition.velocity(model), SIGMAS, x, BLOCKS)
    rolled = cached_clips(model, SIGMAS, x, condition, BLOCKS)
    assert gap(parallel, rolled.latents) < 1e-5 * parallel.abs().max()
    for i in range(2):
        assert gap(parallel[i], streamed(model, condition, x, i)) < 1e-5 * parallel.abs().max()


def test_some_clips_of_a_batch_are_what_they_are_among_all(model):
    condition, x, some = clips(3), start(3), torch.tensor([True, False, True])
    sigma = torch.rand(3, BLOCKS, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole, part = condition.velocity(model)(x, sigma), condition.of(some).velocity(model)(x[some], sigma[some])
    assert len(part) == 2 and gap(whole[some], part) < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("steps", [1, 3])
def test_both_orders_leave_at_the_same_level(model, steps):
    """Deep in a stream, too: block 500 and on."""
    condition, x, table = clips(first_block=500), start(), exit_table(SIGMAS, steps)
    assert len(table) == steps + 1 and table[-1] == 0
    with torch.no_grad():
        parallel = level_parallel(condition.velocity(model), table, x, BLOCKS)
    assert gap(parallel, cached_clips(model, table, x, condition, BLOCKS).latents) < 1e-5 * parallel.abs().max()


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("refresh", [0, 2])
def test_batched_clips_equal_the_stream_in_every_mode(model, mode, refresh):
    condition, x, history = clips(count=1, refresh_block=refresh), start(1), HistoryMode.parse(mode)
    rolled = cached_clips(model, SIGMAS, x, condition, BLOCKS, history=history, seed=4)
    assert gap(rolled.latents[0], streamed(model, condition, x, 0, history=history, seed=4)) < 1e-5 * rolled.latents.abs().max()


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_shared_bank_by_definition(model, mode):
    """The plain way: for each block and level, one masked forward of [remembered blocks at their level | the block]."""
    condition, x, history = clips(count=1), start(1), HistoryMode.parse(mode)
    seen, made = [], []
    features = condition.features.chunk(BLOCKS, dim=-1)
    with torch.no_grad():
        for n, piece in enumerate(x.chunk(BLOCKS, dim=2)):
            now = ClipCondition(torch.cat(features[: n + 1], dim=-1), condition.context, condition.reference, condition.motion, 3, 9)
            velocity = now.velocity(model)
            for sigma, after in zip(SIGMAS, SIGMAS[1:]):
                levels = torch.tensor([[*(s for s, _ in seen), sigma]])
                whole = velocity(torch.cat([*(past for _, past in seen), piece], dim=2), levels)
                piece = euler(piece, whole[:, :, -BLOCK:], sigma, after)
            made.append(piece)
            sigma, eps = history.corruption(4, n, piece.shape)
            seen.append((sigma, (1 - sigma) * piece + sigma * eps))
    rolled = cached_clips(model, SIGMAS, x, condition, BLOCKS, history=history, seed=4)
    assert gap(rolled.latents, torch.cat(made, dim=2)) < 1e-5 * rolled.latents.abs().max()


def test_modes_differ_from_the_second_block_on(model):
    condition, x = clips(count=1), start(1)
    made = [cached_clips(model, SIGMAS, x, condition, BLOCKS, history=HistoryMode.parse(mode)).latents for mode in MODES]
    for i, one in enumerate(made):
        for other in made[:i]:
            assert torch.equal(one[:, :, :BLOCK], other[:, :, :BLOCK])
            assert gap(one[:, :, BLOCK:], other[:, :, BLOCK:]) > 1e-3


def test_history_levels_follow_their_mode():
    shape = (16, 3, 2, 2)
    assert PER_STEP.corruption(0, 0, shape) is None
    assert HistoryMode.parse("clean").corruption(0, 3, shape)[0] == 0
    assert HistoryMode.parse("fixed:557").corruption(0, 3, shape)[0] == pytest.approx(0.557)
    drawn = [HistoryMode.parse("random:400").corruption(0, n, shape)[0] for n in range(500)]
    assert 0 <= min(drawn) < 0.01 and 0.39 < max(drawn) <= 0.4 and sum(drawn) / 500 == pytest.approx(0.2, abs=0.02)
    for bad in ("fixed", "random:0", "fixed:1001", "clean:3", "per_level", "fixed:x"):
        with pytest.raises(ConfigError, match="must be clean, fixed:t"):
            HistoryMode.parse(bad)


# ---------------------------------------------------------------- gradients


def gradient(model) -> torch.Tensor:
    out = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    for p in model.parameters():
        p.grad = None
    return out


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def trained():
    return tiny_model().requires_grad_(True)


@pytest.fixture(scope="module")
def pull():
    """A gradient of some loss with respect to the clips."""
    return torch.randn(2, 16, BLOCK * BLOCKS, SIZE, SIZE, generator=torch.Generator().manual_seed(8)) / 1000


def test_replay_gives_the_joint_gradient(trained, pull):
    """Per-step banks: one block of activations at a time equals the whole clip with detached history."""
    condition, x, table = clips(), start(), exit_table(SIGMAS, 3)
    level_parallel(condition.velocity(trained, history_grad=False), table, x, BLOCKS).backward(pull)
    joint = gradient(trained)
    rolled = cached_clips(trained, table, x, condition, BLOCKS)
    replay(trained, rolled, pull)
    assert relative(gradient(trained), joint) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_replayed_blocks_are_those_of_the_rollout(trained, pull, mode):
    """Every mode, with the sink refreshed on the way: same values, and the gradient of all blocks kept alive together."""
    condition, table = clips(refresh_block=2), exit_table(SIGMAS, 2)
    rolled = cached_clips(trained, table, start(), condition, BLOCKS, history=HistoryMode.parse(mode), seed=2)
    together = torch.cat([replay_block(trained, rolled, n) for n in range(BLOCKS)], dim=2)
    assert gap(together, rolled.latents) < 1e-6 * rolled.latents.abs().max()
    together.backward(pull)
    joint = gradient(trained)
    replay(trained, rolled, pull)
    assert relative(gradient(trained), joint) < 1e-6


def test_gradients_through_history_are_a_switch(trained, pull):
    condition, x, table = clips(), start(), exit_table(SIGMAS, 2)
    found = {}
    for through in (True, False):
        made = level_parallel(condition.velocity(trained, history_grad=through), table, x, BLOCKS)
        made.backward(pull)
        found[through] = made.detach(), gradient(trained)
    assert torch.equal(found[True][0], found[False][0])
    assert relative(found[True][1], found[False][1]) > 1e-3
    # A loss on the last block alone: with detached history the noise of an earlier block has no pull on it.
    for through, reaches in ((True, True), (False, False)):
        moved = x.clone().requires_grad_(True)
        level_parallel(condition.velocity(trained, history_grad=through), exit_table(SIGMAS, 1), moved, BLOCKS)[:, :, -BLOCK:].sum().backward()
        assert bool(moved.grad[:, :, BLOCK * (BLOCKS - 2) : BLOCK * (BLOCKS - 1)].any()) == reaches
        gradient(trained)


def test_only_the_last_step_has_gradients(trained):
    """However many levels came before, the graph is that of one forward: the noise that was only an input there gets none."""
    condition, x = clips(), start().requires_grad_(True)
    level_parallel(condition.velocity(trained), exit_table(SIGMAS, 2), x, BLOCKS).sum().backward()
    assert x.grad is None and gradient(trained).any()


def test_a_clip_at_once_refuses_two_sinks(model):
    with pytest.raises(ConfigError, match="cached order"):
        clips(refresh_block=2).velocity(model)
