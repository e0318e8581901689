"""One rank == any cut == every launcher, byte for byte, with two interleaved sessions (toy roles; Ray with real ones: test_chain_equality.py)."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from liveavatar import core
from liveavatar.config import Config, ModelConfig, RuntimeConfig
from liveavatar.runtime import launchers, worker
from toy_roles import ToySource, play, script

WHOLE = (("condition", "step0", "step1", "step2", "step3", "decode"),)
FIVE = (("condition", "step0"), ("step1",), ("step2",), ("step3",), ("decode",))
CUTS = {
    "2": (("condition",), ("step0", "step1", "step2", "step3", "decode")),
    "3": (("condition", "step0", "step1"), ("step2", "step3"), ("decode",)),
    "5": FIVE,
    "6": tuple((name,) for name in WHOLE[0]),
}
TESTS = Path(__file__).parent


def config_of(stages, launcher="inproc", **limits) -> Config:
    return Config(stages=stages, model=ModelConfig(device="cpu"), runtime=RuntimeConfig(launcher=launcher, threads=1, **limits))


def run(stages, launcher, messages=None):
    before = set(psutil.Process().children(recursive=True))
    chain = launchers.launch(config_of(stages, launcher), source=ToySource())
    try:
        heard = play(chain, messages or script())
        born = [p for p in set(psutil.Process().children(recursive=True)) - before if is_rank(p)]
    finally:
        chain.stop()
    chain.stop()
    assert not [p for p in born if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "a rank outlived stop()"
    return heard


def is_rank(process: psutil.Process) -> bool:
    """Not the forkserver nor the resource tracker, which Python keeps for the life of this process."""
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "resource_tracker" not in command and not (process.ppid() == os.getpid() and "forkserver" in command)


@pytest.fixture(scope="module")
def expected():
    heard = run(WHOLE, "inproc")
    assert [x[0] for x in heard["a/Frames"]] == list(range(6)) and [x[0] for x in heard["b/Frames"]] == list(range(4))
    assert [x[1] for x in heard["a/Frames"]] == [0, 0, 0, 0, 1, 1]
    assert heard.keys() == {f"{s}/{kind}" for s in "ab" for kind in ("Opened", "CleanLatent", "Frames", "Closed")}
    return heard


def test_the_script_matters(expected):
    """Equality below means something: leaving out one control message changes the bytes."""
    for kind, session in ((core.SetPrompt, "a"), (core.Refresh, "b")):
        heard = run(WHOLE, "inproc", [m for m in script() if not isinstance(m, kind)])
        assert heard[f"{session}/Frames"] != expected[f"{session}/Frames"]
    alone = run(WHOLE, "inproc", [m for m in script() if m.session == "a"])
    assert alone["a/Frames"] == expected["a/Frames"], "sessions must not touch each other"


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_in_process(cut, expected):
    assert run(CUTS[cut], "inproc") == expected


@pytest.mark.parametrize("cut", ["1", *CUTS])
def test_any_cut_in_local_processes(cut, expected):
    assert run(CUTS.get(cut, WHOLE), "local") == expected


def test_torchrun_started_by_us(expected):
    assert run(CUTS["2"], "torchrun") == expected


UNDER_TORCHRUN = """
import sys
sys.path.insert(0, {tests!r})
from liveavatar.runtime import launchers, worker
if launchers.torchrun_role() == "rank":
    launchers.run_rank()
import pickle
from test_launchers import CUTS, config_of
from toy_roles import ToySource, play, script
chain = launchers.launch(config_of(CUTS["2"], "torchrun"), source=ToySource())
heard = play(chain, script())
chain.stop()
pickle.dump(heard, open({out!r}, "wb"))
"""


def test_inside_torchrun(expected, tmp_path):
    import pickle

    program, out = tmp_path / "program.py", tmp_path / "heard"
    program.write_text(UNDER_TORCHRUN.format(tests=str(TESTS), out=str(out)))
    done = torchrun(program, ranks=2)
    assert done.returncode == 0, done.stderr
    assert pickle.loads(out.read_bytes()) == expected


def test_inside_torchrun_with_the_wrong_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(core.PlacementError, match="--nproc-per-node=5"):
        launchers.launch(config_of(FIVE, "torchrun"), source=ToySource())


def torchrun(program, ranks):
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(program)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


# ---------------------------------------------------------------- small promises


def test_torchrun_role(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launchers.torchrun_role() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert launchers.torchrun_role() == "head"
    monkeypatch.setenv("RANK", "1")
    assert launchers.torchrun_role() == "rank"


def test_ray_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(core.ConfigError, match=r"liveavatar\[ray\]"):
        launchers.launch(config_of(FIVE, "ray"), source=ToySource())


def test_an_absent_ray_cluster_is_said():
    pytest.importorskip("ray")
    config = config_of(FIVE, "ray")
    with pytest.raises(core.ConfigError, match="runtime.ray_address=auto"):
        launchers.launch(replace(config, runtime=replace(config.runtime, ray_address="auto")), source=ToySource())


def test_unknown_launcher_is_refused():
    with pytest.raises(core.ConfigError, match="local"):
        launchers.launch(config_of(FIVE), launcher="locl")


def test_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("X_ONE", "1")
    monkeypatch.delenv("X_TWO", raising=False)
    with launchers.environment({"X_ONE": "2", "X_TWO": "2"}):
        assert os.environ["X_ONE"] == os.environ["X_TWO"] == "2"
    assert os.environ["X_ONE"] == "1" and "X_TWO" not in os.environ


def test_a_stopped_chain_says_so():
    chain = launchers.launch(config_of(FIVE), source=ToySource())
    chain.stop()
    assert chain.receive(0.01) is None
    with pytest.raises(core.SessionClosed):
        chain.send(core.Close("a"))
    assert not [t for t in threading.enumerate() if t.name.startswith("rank")]


@pytest.mark.parametrize("launcher", ["inproc", "local"])
def test_a_full_chain_makes_the_sender_wait(launcher):
    """Back-pressure end to end: nobody receives, so sends stop going in; when someone does, nothing is lost."""
    count = 900
    cut = (("condition", "step0", "step1"), ("step2", "step3", "decode"))
    chain = launchers.launch(config_of(cut, launcher), source=ToySource(swell=100))  # more than the kernel's buffers hold
    picture = core.torch.zeros(3, 8, 8, dtype=core.torch.uint8)
    messages = [core.Open("a", picture=picture), *(core.Audio("a", index=i, pcm=core.torch.zeros(20_000)) for i in range(count)),
                core.Close("a")]
    sender = threading.Thread(target=lambda: [chain.send(m) for m in messages])
    sender.start()
    sender.join(3.0)
    assert sender.is_alive(), "the chain swallowed everything"
    indices = [m.index for m in iter(lambda: chain.receive(60.0), core.Closed("a")) if isinstance(m, core.Frames)]
    sender.join(20.0)
    chain.stop()
    assert indices == list(range(count)) and not sender.is_alive()
