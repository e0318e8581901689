"""A rank that is killed, stopped, hung or broken is named within 5 s, and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from liveavatar import core
from liveavatar.config import Config, ModelConfig, RuntimeConfig
from liveavatar.runtime import launchers
from liveavatar.runtime.supervisor import EXIT_WAIT, LINK_GRACE, SLOW_SILENCE, Limits, RankView, decide
from toy_roles import ToySource

STAGES = (("condition", "step0"), ("step1", "step2"), ("step3", "decode"))
TESTS = Path(__file__).parent
pytestmark = pytest.mark.timeout(180)


def launch(launcher="local", source=None, **limits):
    runtime = RuntimeConfig(launcher=launcher, threads=1, **limits)
    return launchers.launch(Config(stages=STAGES, model=ModelConfig(device="cpu"), runtime=runtime), source=source or ToySource())


def talk(chain, seconds: float = 8.0) -> float:
    """Keep a session going until the chain fails; the time that took. Fails the test if it goes on."""
    begin = time.monotonic()
    chain.send(core.Open("a", picture=torch.zeros(3, 8, 8, dtype=torch.uint8)))
    for index in range(10**6):
        chain.send(core.Audio("a", index=index, pcm=torch.ones(64)))
        while chain.receive(0.02) is not None:
            continue
        assert time.monotonic() - begin < seconds, "no RankFailure"
    raise AssertionError("unreachable")


def rank_processes(chain) -> list[psutil.Process]:
    return [psutil.Process(chain._pids[rank]) for rank in range(len(STAGES))]


def assert_gone(processes) -> None:
    """Zombies count as gone: nobody may be there to collect the children of a killed parent."""
    end = time.monotonic() + 3.0
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < end, f"left behind: {alive}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------- killed and stopped


@pytest.mark.parametrize("rank", range(len(STAGES)))
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_a_killed_or_stopped_rank_is_named(rank, how):
    chain = launch()
    processes = rank_processes(chain)
    os.kill(processes[rank].pid, how)
    begin = time.monotonic()
    with pytest.raises(core.RankFailure) as caught:
        talk(chain)
    assert time.monotonic() - begin < 5.0
    assert (caught.value.rank, caught.value.roles) == (rank, STAGES[rank])
    assert ("SIGKILL" if how == signal.SIGKILL else "heartbeat") in caught.value.reason
    assert_gone(processes)
    with pytest.raises(core.RankFailure):
        chain.receive(0.0)
    with pytest.raises(core.RankFailure):
        chain.send(core.Close("a"))
    chain.stop()


def test_an_idle_chain_notices_too():
    chain = launch()
    processes = rank_processes(chain)
    processes[1].kill()
    with pytest.raises(core.RankFailure, match=r"rank 1 \(step1\+step2\)"):
        assert chain.receive(5.0) is None
    assert_gone(processes)
    chain.stop()


def test_stop_ends_even_a_stopped_rank():
    chain = launch(heartbeat_seconds=60.0)
    processes = rank_processes(chain)
    processes[2].suspend()
    chain.stop()
    assert_gone(processes)


def test_a_chain_can_follow_a_failed_one():
    first = launch()
    rank_processes(first)[0].kill()
    with pytest.raises(core.RankFailure):
        talk(first)
    second = launch()
    second.send(core.Open("a", picture=torch.zeros(3, 8, 8, dtype=torch.uint8)))
    assert second.receive(10.0) == core.Opened("a")
    second.stop()


def test_torchrun_names_the_killed_rank():
    chain = launch("torchrun")
    processes = rank_processes(chain)
    processes += [parent for p in processes[:1] for parent in p.parents() if "torch.distributed.run" in " ".join(parent.cmdline())]
    assert len(processes) == len(STAGES) + 1
    processes[1].kill()
    with pytest.raises(core.RankFailure) as caught:
        talk(chain)
    assert caught.value.rank == 1
    assert_gone(processes)
    chain.stop()


# ---------------------------------------------------------------- raising, hanging, leaving


@pytest.mark.parametrize("launcher", ["inproc", "local"])
def test_a_role_that_raises_is_quoted(launcher):
    chain = launch(launcher, ToySource("raise", "step2", 3))
    with pytest.raises(core.RankFailure, match="the toy broke") as caught:
        talk(chain)
    assert caught.value.rank == 1 and "Block 3" in caught.value.reason and "\n" not in caught.value.reason
    assert "Traceback" in "".join(caught.value.__notes__) and "toy_roles.py" in "".join(caught.value.__notes__)
    chain.stop()


@pytest.mark.parametrize("launcher", ["inproc", "local"])
def test_a_hung_role_is_named(launcher):
    chain = launch(launcher, ToySource("hang", "step3"), block_seconds=1.0)
    with pytest.raises(core.RankFailure, match="hung: Trouble on Block 1") as caught:
        talk(chain)
    assert caught.value.rank == 2
    chain.stop()


def test_a_rank_that_leaves_is_named():
    chain = launch(source=ToySource("exit", "step1"))
    with pytest.raises(core.RankFailure, match="ended with status 3") as caught:
        talk(chain)
    assert caught.value.rank == 1
    chain.stop()


@pytest.mark.parametrize("launcher", ["inproc", "local"])
def test_a_rank_that_cannot_load_says_why(launcher):
    with pytest.raises(core.RankFailure, match="WeightsError: weights of the toy are missing") as caught:
        launch(launcher, ToySource("build", "step1"))
    assert caught.value.rank == 1


# ---------------------------------------------------------------- the head goes first

HEAD = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
if __name__ == "__main__":
    from test_failures import launch
    chain = launch()
    print(*chain._pids.values(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("then", ["killed", "ctrl-c"])
def test_ranks_end_with_their_head(then, tmp_path):
    program = tmp_path / "head.py"
    program.write_text(HEAD.format(root=str(TESTS.parent), tests=str(TESTS)))
    head = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            start_new_session=True)
    ranks = [psutil.Process(int(pid)) for pid in head.stdout.readline().split()]
    assert len(ranks) == len(STAGES)
    if then == "killed":
        head.kill()
    if then == "ctrl-c":
        os.killpg(head.pid, signal.SIGINT)  # as a terminal does: to everyone
    head.wait(20)
    assert_gone(ranks)


# ---------------------------------------------------------------- decisions

LIMITS = Limits(heartbeat=2.0, block=10.0, start=100.0)


def views(**changes_of_1):
    """Three ranks that were well at time 50; rank 1 with changes."""
    made = [RankView(rank=r, roles=STAGES[r], started=0.0, connected=True, ready=True, slow=False, seen=50.0) for r in range(3)]
    for name, value in changes_of_1.items():
        setattr(made[1], name, value)
    return made


def test_all_well():
    assert decide(views(), LIMITS, 51.9) is None
    assert decide(views(busy=("x", 45.0)), LIMITS, 51.0) is None


@pytest.mark.parametrize(("changes", "now", "words"), [
    ({"seen": 48.0}, 50.5, "no heartbeat for 2.5 s"),
    ({"busy": ("Step on Block 3", 39.0)}, 50.0, "hung: Step on Block 3 has run for 11.0 s"),
    ({"error": (50.0, "ValueError: no", "Traceback")}, 50.0, "ValueError: no"),
    ({"lost": 50.0}, 50.0 + 2 * EXIT_WAIT, "its process is gone"),
    ({"lost": 50.0, "ended": (50.1, "killed by SIGSEGV")}, 50.1, "killed by SIGSEGV"),
    ({"ended": (50.0, "ended with status 1"), "connected": False, "ready": False, "seen": None}, 50.0, "before it was ready"),
    ({"broken": (50.0, "lost its link with rank 0")}, 50.1 + LINK_GRACE, "lost its link"),
    ({"ready": False, "seen": 100.0}, 100.5, "not ready after 100 s"),
    ({"ready": False, "seen": 60.0}, 60.1 + SLOW_SILENCE, "no heartbeat"),
])
def test_the_guilty_rank_is_blamed(changes, now, words):
    made = views(**changes)
    for view in (made[0], made[2]):
        view.seen = now
    failure = decide(made, LIMITS, now)
    assert failure.rank == 1 and failure.roles == STAGES[1] and words in failure.reason


@pytest.mark.parametrize(("changes", "now"), [
    ({"lost": 50.0}, 50.0 + EXIT_WAIT / 2),  # its exit status may still come
    ({"broken": (50.0, "x")}, 50.0 + LINK_GRACE / 2),  # another rank may turn out to be dead
    ({"seen": 40.0, "held": True}, 50.0),  # it waits for the head
    ({"ready": False, "seen": 40.0}, 50.0),  # it loads
    ({"slow": True, "seen": 40.0}, 50.0),  # it opens a session and may have to load an encoder
])
def test_no_hasty_verdict(changes, now):
    assert decide(views(**changes), LIMITS, now) is None


def test_the_first_fault_wins_over_its_consequences():
    made = views(lost=50.0, ended=(50.2, "killed by SIGKILL"))
    made[0].broken = made[2].broken = (50.01, "lost its link with rank 1")
    made[2].lost, made[2].ended = 50.3, (50.3, "killed by SIGTERM")  # torchrun sweeping up
    assert decide(made, LIMITS, 55.0).rank == 1


def test_the_heads_own_pause_is_forgiven():
    made = views(busy=("x", 45.0))
    for view in made:
        view.forgive(30.0)
    assert decide(made, LIMITS, 81.0) is None


def test_a_start_that_fails_is_named(tmp_path):
    """The forkserver dies while it imports, as it does for want of memory."""
    (tmp_path / "dies.py").write_text("import os\nos._exit(3)\n")
    script = ("from test_failures import *\nlaunchers.WORKER_MODULES = ('dies',)\n"
              "try:\n    launch()\nexcept core.RankFailure as error:\n    print(error)\n")
    paths = os.pathsep.join([str(tmp_path), str(TESTS), str(TESTS.parent)])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "rank 0 (condition+step0): the process that starts it has died", done.stderr
