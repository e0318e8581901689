"""Our Triton kernels: each equals its torch reference (in Triton's interpreter, on the CPU), and all compile for Hopper."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from liveavatar import ops

HERE = Path(__file__).parent
# bf16: one step of bf16 at the largest value; fp32: order of summation.
LIMITS = {"bfloat16": 2**-7, "float32": 5e-7}
OWN = {"fp8 attention": 2**-7}  # 1.2e-5 seen in fp32: a share that stands between two numbers of E4M3

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (Linux only): the torch references run instead", allow_module_level=True)


def child(script: str) -> str:
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(HERE / script)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return json.loads(child("kernel_checks.py"))


def test_kernels_equal_their_references(errors):
    wrong = {name: value for name, value in errors.items()
             if not value <= OWN.get(" ".join(name.split()[:-2]), LIMITS[name.split()[-1]])}
    assert not wrong, wrong
    assert len(errors) == 2 * 2 * 14 + 1


def test_a_stream_through_the_kernels_is_the_plain_one(errors):
    assert errors["three blocks float32"] < 2e-6


def test_kernels_compile_for_hopper_as_the_14b_model_launches_them():
    made = json.loads(child("kernel_compile.py"))
    assert len(made) == 10 and len(made["_quantise_rows"]) == 3 and len(made["_round_heads"]) == 2, made
    assert all(code > 0 and shared <= 227 * 1024 for launches in made.values() for code, shared in launches), "what a Hopper gives a block"


def test_the_plain_way_is_taken_on_a_cpu_and_for_gradients(monkeypatch):
    x = torch.zeros(1, 1, 4, requires_grad=True)
    assert not ops._fused(torch.zeros(1))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(ops, "own_kernels_available", lambda: True)
    assert ops._fused(x.detach()) and not ops._fused(x)
    with torch.no_grad():
        assert ops._fused(x)
    with ops.own_kernels(False):
        assert not ops._fused(x.detach())
