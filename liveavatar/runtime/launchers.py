"""How the ranks of a chain come to run: threads, local processes, torchrun, Ray. The same worker everywhere.

`launch(config)` returns a Chain whose ranks are all ready. A launcher is a `Crew` (chains.py): it starts
processes, says how one ended, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from liveavatar.config import LAUNCHERS, Config, one_of
from liveavatar.core import ConfigError, PlacementError, RankFailure
from liveavatar.runtime import worker
from liveavatar.runtime.chains import Chain, Crew, ProcessChain, ThreadChain
from liveavatar.runtime.links import one_line
from liveavatar.runtime.seats import seats_of
from liveavatar.runtime.supervisor import describe_exit

LOOPBACK = "127.0.0.1"
KILL_SECONDS = 5.0  # a killed process is waited for this long
TERM_SECONDS = 6.0  # inside torchrun: what the head keeps of its life after SIGTERM, to name the rank that died
HEAD_KEY = "liveavatar/head"  # in torchrun's own store: where the head listens
# Imported once by the forkserver instead of by every rank: torch, and for a checkpoint what reading one takes.
WORKER_MODULES = ("liveavatar.runtime.worker",)
CHECKPOINT_MODULES = ("liveavatar.runtime.stage_roles", "liveavatar.models.vae", "liveavatar.models.encoders")
# Freed tensors stay in the process: without this every VAE call pays for its pages again (platform.md).
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


def launch(config: Config, launcher: str | None = None, source: worker.Source | None = None) -> Chain:
    """Start every rank of config.stages and wait until all are ready.

    launcher: inproc | local | torchrun | ray, instead of config.runtime.launcher. source: who makes the
    roles, instead of the checkpoint (tests). Raises ConfigError, PlacementError, RankFailure.
    """
    name = launcher or config.runtime.launcher
    one_of("runtime.launcher", name, LAUNCHERS)
    if name == "inproc":
        return ThreadChain(config, source)
    return ProcessChain(config, source, _crew(name, config, WORKER_MODULES if source else WORKER_MODULES + CHECKPOINT_MODULES))


def _crew(name: str, config: Config, modules: Sequence[str]) -> Crew:
    world = len(seats_of(config))
    if name == "local":
        return LocalCrew(config, world, modules)
    if name == "ray":
        return RayCrew(config, world)
    return TorchrunCrew(config, world) if torchrun_role() is None else JoinedCrew(config, world)


def rank_environment(config: Config, world: int) -> dict[str, str]:
    """What a process must find in its environment from its first instruction on."""
    return {"OMP_NUM_THREADS": str(worker.threads_of(config, world)), **ALLOCATION}


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """os.environ with `values`, for what is started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def child_environment(config: Config, world: int, address: tuple[str, int], key: bytes) -> dict[str, str]:
    """Environment of a started interpreter that is to become a rank by `python -m liveavatar.runtime.worker`."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {**os.environ, **rank_environment(config, world), "PYTHONPATH": paths,
            worker.ADDRESS_VARIABLE: f"{address[0]}:{address[1]}", worker.KEY_VARIABLE: key.hex()}


# ---------------------------------------------------------------- local processes


class LocalCrew:
    """One process per rank from a forkserver that has imported `modules` already."""

    host, environment = LOOPBACK, ON_LOOPBACK

    def __init__(self, config: Config, world: int, modules: Sequence[str]):
        self._config, self._world = config, world
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        self._processes: list[multiprocessing.Process] = []

    def start(self, address: tuple[str, int], key: bytes) -> None:
        with environment(rank_environment(self._config, self._world)):
            for rank in range(self._world):
                process = self._context.Process(target=worker.process, args=(address, key, rank), name=f"rank{rank}", daemon=True)
                try:
                    process.start()
                except (EOFError, ConnectionError):  # the forkserver died, by its imports or for want of memory
                    raise RankFailure(rank, seats_of(self._config)[rank].roles, "the process that starts it has died") from None
                self._processes.append(process)

    def ended(self, rank: int) -> str | None:
        if rank >= len(self._processes) or self._processes[rank].exitcode is None:
            return None
        return describe_exit(self._processes[rank].exitcode)

    def gone(self) -> bool:
        return all(process.exitcode is not None for process in self._processes)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(KILL_SECONDS)

    def close(self) -> None:
        """Processes are all there is."""


# ---------------------------------------------------------------- torchrun


def torchrun_role() -> str | None:
    """None outside torchrun; inside it "head" for RANK 0, whose process hosts the head, and "rank" for all others."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or worker.ADDRESS_VARIABLE in os.environ:
        return None
    return "head" if os.environ["RANK"] == "0" else "rank"


def run_rank() -> NoReturn:
    """Be the rank that torchrun started (torchrun_role() == "rank") and end this process with its status.

    Config and roles come from the head, found through torchrun's own store.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store, rank, _ = next(dist.rendezvous("env://", timeout=worker.NEVER))
    place = json.loads(store.get(HEAD_KEY))
    worker.process((place["host"], place["port"]), bytes.fromhex(place["key"]), rank)


def on_one_host() -> bool:
    """Whether torchrun started all its processes on this host."""
    return os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) == os.environ["WORLD_SIZE"]


def linger_on_sigterm() -> None:
    """Answer torchrun's SIGTERM by ending a little later: it sends it as soon as any rank died, and the head
    shall first say which. Only the main thread may do this; elsewhere it does nothing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(signum: int, frame: object) -> None:
    timer = threading.Timer(TERM_SECONDS, os._exit, (128 + signum,))
    timer.daemon = True
    timer.start()


class Popened:
    """One child interpreter and how it ended."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        # a session of its own: Ctrl-C in the terminal reaches the head alone
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def ended(self) -> str | None:
        code = self.process.poll()
        return None if code is None else describe_exit(code)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(KILL_SECONDS)


class TorchrunCrew:
    """Started from outside: `python -m torch.distributed.run --standalone` with one worker process per rank."""

    host, environment = LOOPBACK, ON_LOOPBACK

    def __init__(self, config: Config, world: int):
        self._config, self._world = config, world
        self._agent: Popened | None = None

    def start(self, address: tuple[str, int], key: bytes) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._world}",
                   "--max-restarts=0", "-m", "liveavatar.runtime.worker"]
        self._agent = Popened(command, child_environment(self._config, self._world, address, key))

    def ended(self, rank: int) -> str | None:
        how = self._agent.ended() if self._agent else None
        return f"torchrun has ended ({how})" if how else None

    def gone(self) -> bool:
        return self._agent is None or self._agent.ended() is not None

    def kill(self) -> None:
        if self._agent:
            self._agent.kill()

    def close(self) -> None:
        """Processes are all there is."""


class JoinedCrew:
    """Inside torchrun: the other processes are ranks already, this one hosts the head and starts rank 0 beside it."""

    def __init__(self, config: Config, world: int):
        if int(os.environ["WORLD_SIZE"]) != world:
            raise PlacementError(f"torchrun started {os.environ['WORLD_SIZE']} processes but the chain is cut into {world} "
                                 f"stages: start it with --nproc-per-node={world} or change stages")
        self._config, self._world = config, world
        self.host = LOOPBACK if on_one_host() else socket.gethostbyname(os.environ["MASTER_ADDR"])
        self.environment = ON_LOOPBACK if on_one_host() else {}
        self._first: Popened | None = None
        self._store, _, _ = next(dist.rendezvous("env://", timeout=worker.NEVER))

    def start(self, address: tuple[str, int], key: bytes) -> None:
        linger_on_sigterm()
        command = [sys.executable, "-m", "liveavatar.runtime.worker"]
        self._first = Popened(command, child_environment(self._config, self._world, address, key))
        self._store.set(HEAD_KEY, json.dumps({"host": address[0], "port": address[1], "key": key.hex()}))

    def ended(self, rank: int) -> str | None:
        return self._first.ended() if rank == 0 and self._first else None

    def gone(self) -> bool:
        return self._first is None or self._first.ended() is not None

    def kill(self) -> None:
        if self._first:
            self._first.kill()

    def close(self) -> None:
        """torchrun ends its other processes; they have been told to stop, or killed by their pids."""


# ---------------------------------------------------------------- Ray


def import_ray():
    """Ray, or a ConfigError that says how to get it."""
    try:
        import ray
    except ImportError:
        raise ConfigError("runtime.launcher=ray: Ray is not installed; pip install 'liveavatar[ray]'") from None
    return ray


class RayCrew:
    """One actor per rank in a placement group, one GPU each where the cluster has GPUs. Ray carries no data."""

    def __init__(self, config: Config, world: int):
        self._ray, self._config, self._world = import_ray(), config, world
        self._mine = not self._ray.is_initialized()
        if self._mine:
            self._connect(config.runtime.ray_address)
        alone = len(self._ray.nodes()) == 1
        self.host = LOOPBACK if alone else self._ray.util.get_node_ip_address()
        self.environment = ON_LOOPBACK if alone else {}
        self._group, self._actors, self._runs = None, [], []

    def _connect(self, address: str | None) -> None:
        # Ray's workers would run at nice 15; usage reports leave the house
        with environment({"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}):
            if address is not None:
                try:
                    self._ray.init(address=address, log_to_driver=False)
                except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                    raise ConfigError(f"runtime.ray_address={address}: cannot reach a Ray cluster there: {one_line(error)}") from None
                return
            cores = max(os.cpu_count() or 1, self._world)  # ranks wait more than they compute where cores are few
            self._ray.init(num_cpus=cores, num_gpus=torch.cuda.device_count(), include_dashboard=False,
                           object_store_memory=100 * 2**20, log_to_driver=False, logging_level="ERROR")

    def start(self, address: tuple[str, int], key: bytes) -> None:
        gpus = 1 if self._config.model.device != "cpu" and self._ray.cluster_resources().get("GPU", 0) > 0 else 0
        bundle = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
        self._group = self._ray.util.placement_group([bundle] * self._world, strategy="PACK")
        if not self._group.wait(min(60.0, self._config.runtime.start_seconds)):
            raise PlacementError(f"Ray has no room for {self._world} ranks of {bundle}; it offers {self._ray.available_resources()}")
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        variables = {**rank_environment(self._config, self._world), "PYTHONPATH": paths}
        kind = self._ray.remote(worker.RankActor)
        for rank in range(self._world):
            place = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, rank)
            actor = kind.options(num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy=place,
                                 runtime_env={"env_vars": variables}).remote()
            self._actors.append(actor)
            self._runs.append(actor.run.remote(address, key, rank))

    def ended(self, rank: int) -> str | None:
        if rank >= len(self._runs) or not self._ray.wait([self._runs[rank]], timeout=0)[0]:
            return None
        try:
            return f"its actor returned {self._ray.get(self._runs[rank])}"
        except self._ray.exceptions.RayError as error:
            return f"its actor is gone ({one_line(error)})"

    def gone(self) -> bool:
        return not self._runs or len(self._ray.wait(self._runs, num_returns=len(self._runs), timeout=0)[0]) == len(self._runs)

    def kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        self._actors, self._runs = [], []

    def close(self) -> None:
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        if self._mine and self._ray.is_initialized():
            self._ray.shutdown()
