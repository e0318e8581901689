"""bench/serve.py at a small scale: a chain that keeps up holds its session, one that is too slow does not."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from liveavatar.serving import studio
from liveavatar.serving.testcard import start_test_card

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("serve").main
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(BENCH))]:
        del sys.modules[name]


def test_sessions_are_held_or_not(bench, tmp_path, capsys, monkeypatch):
    out = tmp_path / "serve.json"
    call = ["--engine", "testcard", "--sessions", "1", "--seconds", "6", "--settle", "1", "--out", str(out)]
    bench(call)
    good = json.loads(out.read_text())
    (row,) = good["rows"]
    assert row["holds"] and row["underrun"] < 0.01 and row["turn_p95_ms"] < 1000 and row["kbit_s"] > 0 and good["factor"] > 5
    monkeypatch.setattr(studio, "start_test_card", lambda config, **more: start_test_card(config, block_seconds=0.7, **more))  # 480 ms of pictures
    bench([*call, "--compare", str(out)])
    slow = json.loads(out.read_text())
    assert not slow["rows"][0]["holds"] and slow["rows"][0]["underrun"] > 0.15 and slow["factor"] < 1 and slow["admits"] == 1
    assert "underrun" in (said := capsys.readouterr().out) and "before" in said
