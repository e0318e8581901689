"""What only a GPU can show: kernels as compiled, FP8 in its units, graphs as captured. bench/gpu_all.sh runs it on a lent one."""

import importlib
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from liveavatar import ops
from liveavatar.config import FastConfig
from liveavatar.models.fast import Fp8Linear, prepare
from liveavatar.runtime.graphs import GraphedForward
from test_fast import relative, stream
from torch import nn

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIMITS = {"attention_fp8": 2**-6, "gelu and quantise_rows": 2**-3, "quantise_rows": 2**-3, "round_heads": 2**-3, "norm_round": 2**-3}  # a step of E4M3
KERNELS = ("norm_modulate", "gate_residual", "rms_norm", "rotate_into", "rope_cache", "quantise_rows", "round_heads", "restore_heads", "norm_round",
           "layer_norm", "gelu and quantise_rows", "attention_fp8")  # fmt: skip


@pytest.fixture
def fp8_attention():
    ops.use_attention("fp8")
    yield
    ops.use_attention("auto")


@torch.inference_mode()
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_compiled_kernel_is_its_reference(kernel, monkeypatch, fp8_attention):
    """At the widths of the 14B model, an odd number of tokens."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    if "quantise" in kernel or kernel in ("round_heads", "norm_round", "restore_heads", "attention_fp8"):
        assert ops.fp8_matmul_available() or pytest.skip("no FP8 units")
    cases = importlib.import_module("kernel_times").cases(197, CUDA)
    assert cases.keys() == set(KERNELS) and ops.own_kernels_available()
    got = cases[kernel][0]().clone().float()
    with ops.own_kernels(False):
        expected = cases[kernel][0]().clone().float()
    assert float((got - expected).abs().max() / expected.abs().max()) <= LIMITS.get(kernel, 2**-7)
    assert relative(got, expected) < 0.005, "no more than a rounding here and there"


@torch.inference_mode()
def test_fp8_units_multiply_what_the_reference_multiplies():
    if not ops.fp8_matmul_available():
        pytest.skip("no FP8 units")
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(5120, 3 * 640)
    linear.weight.data.normal_(0, 0.01, generator=draw)
    x = torch.randn(1, 197, 5120, generator=draw).bfloat16()
    linear = linear.bfloat16()
    expected = Fp8Linear.of(linear)(x)  # on the CPU: multiplied in fp32
    assert relative(Fp8Linear.of(linear.to(CUDA))(x.to(CUDA)).float().cpu(), expected.float()) < 0.005


@torch.inference_mode()
@pytest.mark.parametrize("changes", [{}, {"text_at": 8, "sink_at": 6}, {"anchors": 2}])
@pytest.mark.parametrize("fast", [FastConfig(), FastConfig(packed_qkv=True, fp8=True, fp8_cache=True)], ids=["plain", "fp8"])
def test_a_captured_stream_is_the_plain_one(changes, fast):
    """Blocks 7 to 10 are captured; the same model runs both, so every bit agrees."""
    model = prepare(tiny_model().to(CUDA), fast)
    assert torch.equal(stream(model, GraphedForward(model), **changes), stream(model, **changes))


@torch.inference_mode()
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_a_stream_on_a_gpu_is_that_of_a_cpu(dtype, limit):
    expected = stream(tiny_model())
    assert relative(stream(tiny_model().cast(dtype).to(CUDA)).float().cpu(), expected) < limit


@torch.inference_mode()
@pytest.mark.parametrize("name", ["auto", "torch", "cudnn", "flash2", "flash3"])
def test_every_attention_is_attention(name):
    q, k, v = (torch.randn(1, tokens, 8, 128, generator=torch.Generator().manual_seed(tokens)) for tokens in (197, 600, 600))
    ops.use_attention(name)
    try:
        got = ops.attention(*(x.to(CUDA, torch.bfloat16) for x in (q, k, v)))
    except ModuleNotFoundError as absent:
        pytest.skip(str(absent))
    finally:
        ops.use_attention("auto")
    assert relative(got.float().cpu(), ops.attention(q, k, v)) < 0.01
