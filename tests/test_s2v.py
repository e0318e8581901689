"""The causal transformer by itself: ring against a full cache, far positions, flat memory, one function two ways."""

import gc
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from liveavatar import ops
from liveavatar.core import ConfigError
from liveavatar.diffusion.denoise import noise, sink_distance
from liveavatar.diffusion.rollout import Course, cached_rollout, denoise_block, make_steps
from liveavatar.diffusion.schedule import sigmas
from liveavatar.models import layers as L
from liveavatar.models.clip import Clip
from liveavatar.models.s2v import S2VConfig, grid_positions, reference_position, spread

H = W = 8
BLOCK = 3  # latents
WEEK = 7 * 24 * 3600 * 25 // (4 * BLOCK)  # blocks in seven days of video
FAR = {"the reference's end": 44_990 // BLOCK, "2^31": 2**31 // BLOCK, "seven days": WEEK}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def given(model):
    draw = torch.Generator().manual_seed(1)
    return {"context": torch.randn(9, 16, generator=draw), "reference": torch.randn(16, 1, H, W, generator=draw),
            "motion": torch.randn(16, 3, H, W, generator=draw)}


def features(block: int) -> torch.Tensor:
    return torch.randn(1, 400, 4 * BLOCK, generator=torch.Generator().manual_seed(block % 1000))


def close(a, b, limit=2e-5):
    assert (a - b).abs().max() <= limit * b.abs().max(), float((a - b).abs().max() / b.abs().max())


class Stream:
    """One step of one session, block after block."""

    def __init__(self, model, given, ring_blocks: int = 4, step: int = 1, anchor_blocks: int = 0):
        self.model, self.step = model, make_steps(model, sigmas(4, 3.0))[step]
        self.text, self.cache = model.encode_text(given["context"]), model.new_cache(H, W, BLOCK, ring_blocks, anchor_blocks)
        model.set_sink(self.cache, model.prefill(given["reference"], given["motion"], self.text), H, W)

    @torch.inference_mode()
    def block(self, number: int, content: int | None = None, distance: int = 30) -> torch.Tensor:
        content = number if content is None else content
        return denoise_block(self.model, self.step, noise(0, "s", content, (16, BLOCK, H, W)), self.model.encode_audio(features(content)),
                             self.text, self.cache, block=number, sink_distance=distance)[1]


def test_a_wrapped_ring_equals_a_full_cache_cut_to_the_window(model, given, monkeypatch):
    """The plain way: keep every key, attend to the newest four blocks by slicing."""
    ring, kept = Stream(model, given), {}
    plain = Stream(model, given, ring_blocks=13)
    sink = plain.cache.sink_tokens

    def attention(q, k, v, mask=None):
        if k.shape[1] > sink:  # self-attention of a block: sink, then all blocks so far
            n = plain.cache.block_tokens
            k, v = (torch.cat([x[:, :sink], x[:, sink:][:, -4 * n :]], dim=1) for x in (k, v))
        return real(q, k, v, mask)

    real = ops.attention
    for number in range(13):  # three times round
        kept[number] = ring.block(number)
    monkeypatch.setattr(ops, "attention", attention)
    for number in range(13):
        close(kept[number], plain.block(number))
    assert ring.cache.written == 13


@pytest.mark.parametrize("first", [0, 2**31])
def test_anchors_stay_before_the_newest_blocks(model, given, monkeypatch, first):
    """The plain way: keep every key; of five blocks seen the first three are the stream's first, turned to stand next to the newest two."""
    ring, plain = Stream(model, given, ring_blocks=5, anchor_blocks=3), Stream(model, given, ring_blocks=11)
    kept = [ring.block(first + i, i) for i in range(11)]
    sink, n, now = plain.cache.sink_tokens, plain.cache.block_tokens, 0

    def attention(q, k, v, mask=None):
        if k.shape[1] > sink + 5 * n:
            blocks = [sink + i * n for i in (0, 1, 2, now - 1, now)]
            turned = [L.rotate(k[:, at : at + n], model.time_angles(BLOCK * (now - 4) * (i < 3))) for i, at in enumerate(blocks)]
            k, v = torch.cat([k[:, :sink], *turned], dim=1), torch.cat([v[:, :sink], *(v[:, at : at + n] for at in blocks)], dim=1)
        return real(q, k, v, mask)

    real = ops.attention
    monkeypatch.setattr(ops, "attention", attention)
    for now in range(11):
        close(kept[now], plain.block(first + now, now))
    assert ring.cache.anchors == [first, first + 1, first + 2]
    monkeypatch.undo()
    without = Stream(model, given, ring_blocks=5)
    assert [torch.allclose(kept[i], without.block(first + i, i), atol=1e-4) for i in range(7)] == [True] * 5 + [False] * 2


def test_the_window_matters(model, given):
    """A ring of another size is another function: the equality above can fail."""
    four, two = Stream(model, given), Stream(model, given, ring_blocks=2)
    same = [torch.allclose(four.block(n), two.block(n), rtol=1e-3, atol=1e-4) for n in range(4)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("where", FAR)
def test_far_positions_are_exact(where):
    """Angles at absolute position p come from 64-bit arithmetic: equal to those of exact integers modulo a turn."""
    base, dim = FAR[where] * BLOCK, 24
    angles = L.rope_angles(grid_positions(range(base, base + BLOCK), range(2), range(2)), dim)
    times = dim // 2 - 2 * (dim // 6)  # pairs that turn with time come first
    frame = angles.view(2, BLOCK, 4, dim // 2)
    for latent, pair in itertools.product(range(BLOCK), range(times)):
        turn = (base + latent) * 10000.0 ** (-2 * pair / (2 * times))
        assert float(frame[0, latent, 0, pair]) == pytest.approx(math.cos(turn), abs=2e-6)
        assert float(frame[1, latent, 0, pair]) == pytest.approx(math.sin(turn), abs=2e-6)


@pytest.mark.parametrize("where", FAR)
def test_attention_depends_on_relative_time_alone(where):
    draw, far = torch.Generator().manual_seed(0), FAR[where] * BLOCK
    q, k = (torch.randn(1, 1, 1, 24, generator=draw) for _ in range(2))

    def score(base: int) -> float:
        turned = [L.rotate(x, L.rope_angles(grid_positions([base + p], [1], [1]), 24)) for x, p in ((q, 11), (k, 3))]
        return float((turned[0] * turned[1]).sum())

    assert score(far) == pytest.approx(score(0), abs=2e-4)


@pytest.mark.parametrize("where", FAR)
def test_a_stream_goes_on_at_any_position(model, given, where):
    """Far in the stream everything but the motion tokens (which never move) stands as it stands at block 20."""
    near, far = Stream(model, given), Stream(model, given)
    for n in range(6):
        a, b = near.block(20 + n, content=n), far.block(FAR[where] + n, content=n)
        assert torch.isfinite(b).all()
        assert float(b.std()) == pytest.approx(float(a.std()), rel=0.3)
    assert reference_position(FAR[where], BLOCK, 30) > FAR[where]


def test_two_thousand_blocks_in_flat_memory(given):
    def held() -> tuple[int, int]:
        gc.collect()
        alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        return len(alive), sum(x.nbytes for x in alive)

    stream, sizes = Stream(tiny_model(dim=24, ffn_dim=24, num_heads=1, num_layers=1), given), []
    for number in range(2000):
        last = stream.block(number)
        if number % 500 == 499:
            sizes.append(held())
    grown = [(more > less, larger > smaller) for (less, smaller), (more, larger) in zip(sizes, sizes[1:])]  # what other tests left may go
    assert torch.isfinite(last).all() and not any(map(any, grown)), sizes


def clip_of(given, audio: torch.Tensor, **how) -> Clip:
    return Clip(audio, [given["context"]], given["reference"][None], given["motion"][None], **how)


def test_a_clip_at_once_equals_block_after_block(model, given):
    """forward_clip is the training path, cached_rollout the serving path: one function (training.md 2.4)."""
    levels, blocks = sigmas(4, 3.0), 7
    noises = [noise(1, "clip", n, (16, BLOCK, H, W)) for n in range(blocks)]
    audio = [features(n) for n in range(blocks)]
    rolled = list(cached_rollout(model, levels, noises, audio, given["context"], given["reference"], given["motion"], Course(sink_distance=9)))
    x = torch.cat(noises, dim=1)[None]
    for level, after in zip(levels, levels[1:]):
        v = model.forward_clip(x, torch.full((1, blocks), 1000 * level), clip_of(given, torch.cat(audio, dim=-1)[None], sink_distance=9))
        x = x + (after - level) * v
    close(x[0], torch.cat(rolled, dim=1), 1e-4)


def test_nothing_sees_the_future(model, given):
    """A change in block 4 changes block 4 and later ones, never an earlier one."""
    x = torch.randn(1, 16, 7 * BLOCK, H, W, generator=torch.Generator().manual_seed(2))
    audio = torch.cat([features(n) for n in range(7)], dim=-1)[None]

    def velocity(x, audio):
        return model.forward_clip(x, torch.full((1, 7), 700.0), clip_of(given, audio))

    plain = velocity(x, audio)
    other_x, other_audio = x.clone(), audio.clone()
    other_x[:, :, 4 * BLOCK :] += 1
    other_audio[..., 16 * BLOCK :] += 1
    for changed in (velocity(other_x, audio), velocity(x, other_audio)):
        assert torch.equal(changed[:, :, : 4 * BLOCK], plain[:, :, : 4 * BLOCK])
        assert not torch.allclose(changed[:, :, 4 * BLOCK :], plain[:, :, 4 * BLOCK :], atol=1e-3)


def test_gradients_reach_every_tensor(given):
    model = tiny_model().requires_grad_(True)
    x = torch.randn(1, 16, 2 * BLOCK, H, W)
    audio = torch.cat([features(0), features(1)], dim=-1)[None]
    pose = torch.randn(1, 16, 2 * BLOCK, H, W)
    full = dict(given, motion=torch.randn(16, 19, H, W))
    model.forward_clip(x, torch.tensor([[900.0, 300.0]]), clip_of(full, audio), pose=pose).square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Softmax over one audio layer has no slope; keys' bias shifts all scores alike, which leaves rounding errors only.
    assert not [name for name in idle if name != "casual_audio_encoder.weights" and not name.endswith(".k.bias")], idle


def test_what_does_not_fit_is_said(model, given):
    with pytest.raises(ConfigError, match="65 rows|at most 64"):
        model.encode_text(torch.zeros(65, 16))
    with pytest.raises(ConfigError, match="at most 19"):
        model.prefill(given["reference"], torch.zeros(16, 20, H, W), model.encode_text(given["context"]))
    with pytest.raises(ConfigError, match="did you mean 'num_heads'"):
        S2VConfig.from_dict({"num_head": 3})


def test_noise_and_sink_distance_are_functions_of_their_keys():
    a = noise(3, "x", 7, (2, 5))
    assert torch.equal(a, noise(3, "x", 7, (2, 5)))
    for other in (noise(4, "x", 7, (2, 5)), noise(3, "y", 7, (2, 5)), noise(3, "x", 8, (2, 5))):
        assert not torch.equal(a, other)
    drawn = {sink_distance("random", 5, block) for block in range(2000)}
    assert drawn == set(range(4, 31)) and sink_distance(30, 5, 9) == 30


def test_positions_of_coarse_motion_tokens_are_the_reference_s_at_every_size():
    assert [spread(8, 4), spread(12, 3), spread(6, 1), spread(2, 0)] == [[0, 2, 4, 7], [0, 5, 11], [0], []]
    for rows, step in itertools.product(range(2, 400), (2, 4)):  # numpy's rounding decides where the exact value is an integer
        assert spread(rows, rows // step) == np.linspace(0, rows - 1, rows // step).astype(int).tolist()
