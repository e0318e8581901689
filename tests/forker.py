"""Ranks for tests of training, forked from a process that has no threads.

What pytest has started by then (executors, progress bars, OpenMP's pool) does not follow into a forked child, but the locks
it held do: such a child may wait for ever. So one clean interpreter imports torch once and forks all ranks; with it, before the
first of them, what a test file names in FORKED_WITH: none of that starts a thread, and each rank would take 20 s for it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class Forker:
    """The clean interpreter, started when first needed."""

    def __init__(self):
        tests = Path(__file__).parent
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def start(self, function: Callable, *args, world: int = 2) -> list[int]:
        """function(rank, *args) in `world` processes; their pids. Wait for them with `outcome`."""
        pickle.dump((function, args, world), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def outcome(self) -> str | None:
        """Waits until all have ended: None, or what the first that failed says of it; the others are ended then."""
        return pickle.load(self._process.stdout)

    def run(self, function: Callable, *args, world: int = 2) -> None:
        self.start(function, *args, world=world)
        failure = self.outcome()
        assert failure is None, failure

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


@contextlib.contextmanager
def forking() -> Iterator[Forker]:
    forker = Forker()
    try:
        yield forker
    finally:
        forker.close()


def serve() -> None:
    """The interpreter's side: requests on stdin, pids and outcomes on what was stdout; prints go to stderr."""
    import torch

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, args, world = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        for name in getattr(sys.modules[function.__module__], "FORKED_WITH", ()):
            importlib.import_module(name)
        ranks = torch.multiprocessing.start_processes(function, args=args, nprocs=world, join=False, start_method="fork")
        pickle.dump(ranks.pids(), answers)
        answers.flush()
        pickle.dump(ended(ranks), answers)
        answers.flush()


def ended(ranks) -> str | None:
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    try:
        while not ranks.join():
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        return str(error)


if __name__ == "__main__":
    serve()
