"""Cuts, sizes and refusals; no device is needed."""

import pytest
import torch
from conftest import tiny_model, tiny_vae

from liveavatar.config import Config, FastConfig, ModelConfig, RuntimeConfig, SamplerConfig
from liveavatar.core import Geometry, PlacementError
from liveavatar.models.fast import prepare
from liveavatar.models.s2v import S2VConfig
from liveavatar.runtime import placement
from liveavatar.runtime.placement import Device, check_cut, cut, plan

CHAIN, CUDA = Config().chain, placement.CUDA_CONTEXT_BYTES
USUAL = Geometry(height=384, width=704)
SMALL_VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [True, True],
             "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8}


def gpus(count: int, memory: float = 80e9, rate: float | None = None) -> list[Device]:
    return [Device(name=f"cuda:{i}", kind="cuda", memory=int(memory), rate=rate) for i in range(count)]


def config(sessions: int = 1, **fields) -> Config:
    return Config(runtime=RuntimeConfig(sessions=sessions, launcher="local"), **fields)


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize("ranks", range(1, 7))
def test_every_cut_concatenates_to_the_chain(ranks):
    stages = cut(CHAIN, ranks)
    assert len(stages) == ranks and all(stages) and sum(stages, ()) == CHAIN
    check_cut(stages, CHAIN)


def test_the_cuts_of_the_paper_and_its_neighbours():
    assert cut(CHAIN, 5) == (("condition", "step0"), ("step1",), ("step2",), ("step3",), ("decode",))
    assert cut(CHAIN, 4) == (("condition", "step0"), ("step1",), ("step2",), ("step3", "decode"))
    assert cut(CHAIN, 1) == (CHAIN,)
    assert cut(CHAIN[:-1], 2) == (("condition", "step0", "step1"), ("step2", "step3"))


def test_measured_costs_move_the_cut():
    assert cut(CHAIN, 2, {"step": 1.0, "decode": 10.0}) == (CHAIN[:-1], ("decode",))


@pytest.mark.parametrize("ranks", [0, 7, -1])
def test_impossible_number_of_ranks(ranks):
    with pytest.raises(PlacementError, match="choose 1 to 6"):
        cut(CHAIN, ranks)


@pytest.mark.parametrize("stages, complaint", [
    ([["condition"], ["step1"]], r"stages\[1\]: found 'step1' where 'step0'"),
    ([["condition", "step0"], [], ["step1"]], r"stages\[1\] is empty"),
    ([["condition", "step0", "step1"], ["step2", "step3"]], "'decode' is missing"),
    ([list(CHAIN), ["decode"]], r"stages\[1\]: found 'decode' where 'nothing"),
    ([["condition", "step0"], ["step0"]], r"found 'step0' where 'step1'"),
    ([["condition", "stepp0"]], r"stages\[0\]: found 'stepp0'"),
])  # fmt: skip
def test_a_wrong_cut_names_its_first_wrong_piece(stages, complaint):
    with pytest.raises(PlacementError, match=complaint):
        check_cut(stages, CHAIN)


# ---------------------------------------------------------------- sizes


def test_sizes_of_the_14b_model_are_those_of_the_specification():
    p = plan(config(), S2VConfig(), USUAL, gpus(5))
    step, decode = p.ranks[1], p.ranks[4]
    assert placement.transformer_bytes(S2VConfig(), torch.float32) == 4 * 16_295_755_609
    assert 32.59e9 < step.fixed["transformer"] < 33.3e9  # bf16, the fp32 parts a little more
    assert step.per_session["1 x step cache"] == 819_200 * (12_672 + 2_640)
    assert step.per_session["sink"] == 819_200 * 2_640 and step.per_session["text"] == 819_200 * 512
    sliced = plan(config(sampler=SamplerConfig(refresh_slices=8)), S2VConfig(), USUAL, gpus(5)).ranks[1]
    assert sliced.per_session == {**step.per_session, "coming sink": step.per_session["sink"]}
    assert "vae" not in step.fixed and "transformer" not in decode.fixed
    assert decode.fixed["vae"] == 2 * 126_892_531
    assert decode.per_session["vae state"] == pytest.approx(1.28e9, rel=0.01)
    assert placement.forward_flops(S2VConfig(), USUAL) == pytest.approx(120.8e12, rel=0.001)
    assert not p.problems and p.stages == cut(CHAIN, 5)


def test_fp8_linears_are_a_byte_a_weight():
    fp8 = config(model=ModelConfig(fast=FastConfig(fp8=True)))
    step = plan(fp8, S2VConfig(), USUAL, gpus(5)).ranks[1]
    assert 16.5e9 < step.fixed["transformer"] < 17.5e9  # model.md section 18
    (small,) = plan(fp8, S2VConfig(), Geometry(height=128, width=128), gpus(1, 32e9)).ranks
    assert small.sessions_that_fit >= 1, "rounded as it is read: 33 GB of bf16 never lie there"
    model, g = prepare(tiny_model(), FastConfig(fp8=True)), Geometry(height=64, width=64)
    (rank,) = plan(fp8, tiny_model().config, g, [Device(name="cpu", kind="cpu", memory=10**12)], dtype=torch.float32, vae=SMALL_VAE, host=10**12).ranks
    assert rank.fixed["transformer"] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def test_an_fp8_cache_is_a_byte_a_number_and_a_scale_a_head():
    fast = FastConfig(fp8_cache=True)
    (rank,) = plan(config(model=ModelConfig(fast=fast)), S2VConfig(), USUAL, gpus(1, 80e9)).ranks
    assert rank.per_session["4 x step cache"] == 4 * (12_672 + 2_640) * 2 * 40 * 40 * (128 + 4)
    assert rank.sessions_that_fit == 1 and plan(config(), S2VConfig(), USUAL, gpus(1, 80e9)).ranks[0].sessions_that_fit == 0
    model, g = prepare(tiny_model(), fast), Geometry(height=64, width=64, anchor_blocks=2)
    (tiny,) = plan(config(model=ModelConfig(fast=fast)), model.config, g, [Device(name="cpu", kind="cpu", memory=10**12)], dtype=torch.float32,
                   vae=SMALL_VAE, host=10**12).ranks  # fmt: skip
    assert tiny.per_session["4 x step cache"] == 4 * model.new_cache(8, 8, 3, 4, 2).nbytes


def test_planned_bytes_are_what_the_tiny_chain_allocates():
    model, vae, g = tiny_model(), tiny_vae(), Geometry(height=64, width=64)
    p = plan(config(), model.config, g, [Device(name="cpu", kind="cpu", memory=10**12)], dtype=torch.float32, vae=SMALL_VAE, host=10**12)
    (rank,) = p.ranks
    assert rank.fixed["transformer"] == sum(x.nbytes for x in model.parameters())
    assert rank.fixed["vae"] == sum(x.nbytes for x in vae.module.parameters())
    assert rank.per_session["4 x step cache"] == 4 * model.new_cache(8, 8, 3, 4).nbytes
    anchored = plan(config(), model.config, Geometry(height=64, width=64, anchor_blocks=3), [Device(name="cpu", kind="cpu", memory=10**12)],
                    dtype=torch.float32, vae=SMALL_VAE, host=10**12).ranks[0]
    assert anchored.per_session["4 x step cache"] == 4 * model.new_cache(8, 8, 3, 4, 3).nbytes > rank.per_session["4 x step cache"]
    state = vae.new_state()
    vae.decode(torch.zeros(16, 3, 8, 8), state)
    assert rank.per_session["vae state"] == state.nbytes
    text = model.encode_text(torch.zeros(1, 16))
    assert rank.per_session["text"] == sum(k.nbytes + v.nbytes for k, v in text.layers)


# ---------------------------------------------------------------- refusals


def test_one_gpu_cannot_hold_four_steps_and_says_the_numbers():
    p = plan(config(), S2VConfig(), USUAL, gpus(1))
    with pytest.raises(PlacementError, match=r"rank 0 .*needs \d+\.\d+ GB for 1 session.*80\.00 GB free; 0 session.*Lower"):
        p.refuse()


def test_sessions_are_counted():
    plan(config(2), S2VConfig(), USUAL, gpus(5)).refuse()
    with pytest.raises(PlacementError, match=r"for 4 session\(s\).*3 session\(s\) would fit"):
        plan(config(4), S2VConfig(), USUAL, gpus(5)).refuse()


def test_host_memory_is_counted():
    cpu = [Device(name="cpu", kind="cpu", memory=10**10)] * 2
    with pytest.raises(PlacementError, match=r"the host needs .* GB of RAM .*2\.00 GB are free"):
        plan(config(), tiny_model().config, Geometry(height=64, width=64), cpu, vae=SMALL_VAE, host=2_000_000_000,
             text_encoder_bytes=10**9).refuse()


def test_larger_pictures_cost_more():
    sizes = [plan(config(), S2VConfig(), Geometry(height=h, width=w), gpus(5)).ranks[1].bytes(1) for h, w in ((384, 704), (704, 1280))]
    assert sizes[1] - sizes[0] > 20e9


def test_too_few_devices():
    with pytest.raises(PlacementError, match="5 stages need 5 devices, there are 4"):
        plan(config(stages=cut(CHAIN, 5)), S2VConfig(), USUAL, gpus(4))


def test_cuda_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(PlacementError, match="2 GPUs, this machine has 0"):
        placement.local_devices("cuda", 2)
    assert placement.local_devices("auto", 2)[1].kind == "cpu"


# ---------------------------------------------------------------- speed


def test_speed_is_predicted_from_flops_or_measured_times():
    by_flops = plan(config(), S2VConfig(), USUAL, gpus(5, rate=790e12))
    assert by_flops.fps == pytest.approx(77, rel=0.03) and by_flops.slowest.rank == 0
    measured = plan(config(), S2VConfig(), USUAL, gpus(5), times={"condition": 0.01, "step": 0.2, "decode": 0.3})
    assert measured.fps == pytest.approx(12 / 0.3) and measured.slowest.roles == ("decode",)
    assert measured.first_frame_seconds == pytest.approx(0.01 + 4 * 0.2 + 0.3)
    assert plan(config(), S2VConfig(), USUAL, gpus(5)).fps is None


def test_table_is_for_people():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(plan(config(), S2VConfig(), USUAL, gpus(5, rate=600e12)).table())
    text = console.export_text()
    assert "704x384" in text and "transformer" in text and "FPS" in text and "80.00 GB" in text


def test_fewer_steps_make_a_shorter_chain():
    short = config(sampler=SamplerConfig(steps=4, finish_after=3))
    assert plan(short, S2VConfig(), USUAL, gpus(5)).stages == cut(("condition", "step0", "step1", "step2", "decode"), 5)
