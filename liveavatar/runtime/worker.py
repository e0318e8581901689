"""One rank: connect to the head, build the roles of its stage, which warms them up, pump messages until told to stop.

The control connection carries heartbeats, messages for the head and errors; the data link carries
messages from rank to rank. Everything a rank needs to know comes from the head as a `Job`, so every
launcher starts the same thing with three words: address, key, rank.

`python -m liveavatar.runtime.worker` is the process that torchrun starts; it finds the three words in
its environment.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist

from liveavatar.config import Config
from liveavatar.core import ConfigError, Message
from liveavatar.runtime.bands import Bands
from liveavatar.runtime.links import DistLink, LinkBroken, LinkClosed, QueueLink, ReceiveAhead, decode, encode, one_line
from liveavatar.runtime.pump import Pump
from liveavatar.runtime.seats import Seat, seats_of

BEAT_SECONDS = 0.25
NEVER = timedelta(days=3650)  # a silent session is not a fault: liveness is the supervisor's, not the transport's
ADDRESS_VARIABLE, KEY_VARIABLE = "LIVEAVATAR_HEAD", "LIVEAVATAR_KEY"  # set by launchers for started processes
MESSAGE_FRAME, NOTE_FRAME = b"M", b"J"  # first byte of a frame to the head: an encoded message, or a JSON note


class Source(Protocol):
    """Who makes the roles, ready for the first block; picklable. None in its place means the checkpoint's own (runtime.stage_roles)."""

    def build_stage(self, config: Config, stage_names: Sequence[str], device: torch.device) -> Sequence[Callable]: ...


@dataclass(frozen=True)
class Job:
    """All a rank must know; from the head. store: host and port of the rendezvous (None: one rank)."""

    config: Config
    source: Source | None
    world: int
    store: tuple[str, int] | None
    environment: dict[str, str]


# ---------------------------------------------------------------- errors in words


def explain(error: Exception, pump: Pump | None) -> str:
    """One line: where it happened, if a role was at work, and what."""
    doing = pump.doing() if pump else None
    return f"{f'{doing[0]}: ' if doing else ''}{type(error).__name__}: {one_line(error)}"


# ---------------------------------------------------------------- the rank's side of the control connection


def host_identity() -> str:
    """Names this process's pid name space, so that the head signals a pid only where it means this process."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def greet(address: tuple[str, int], key: bytes, rank: int, channel: str) -> Connection:
    """Connect to the head as `channel` ("control" or "inlet") of `rank`."""
    connection = Client(tuple(address), authkey=key)
    hello = {"kind": "hello", "rank": rank, "channel": channel, "pid": os.getpid(), "host": host_identity()}
    connection.send_bytes(json.dumps(hello).encode())
    return connection


class Control:
    """Heartbeats and messages to the head; leaves the process at once when the head is gone."""

    def __init__(self, connection: Connection):
        self._connection, self._lock = connection, threading.Lock()
        self.pump: Pump | None = None
        self.stopped = threading.Event()

    def start(self) -> None:
        for target in (self._beat_on, self._listen):
            threading.Thread(target=target, name=f"control{target.__name__}", daemon=True).start()

    def note(self, kind: str, **values) -> None:
        self._send(NOTE_FRAME + json.dumps({"kind": kind, **values}).encode())

    def message(self, message: Message) -> None:
        """Hand a message to the head; waits while the head's own queue is full."""
        with memoryview(encode(message)) as body:
            self._send(MESSAGE_FRAME + body)

    def _send(self, frame: bytes) -> None:
        with self._lock:
            if self._connection.closed:
                return  # this rank has ended; a last heartbeat is of no use
            try:
                self._connection.send_bytes(frame)
            except OSError:
                os._exit(1)  # no head, nobody to work for

    def close(self) -> None:
        """The rank has ended: the head takes the end of the connection as the end of the rank."""
        with self._lock:
            self._connection.close()

    def _beat_on(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            self.beat()

    def beat(self) -> None:
        """A sign of life, with what a role is at and whether that may make us silent for a while."""
        pump = self.pump
        self.note("beat", busy=pump.doing() if pump else None, slow=pump.slow() if pump else True)

    def _listen(self) -> None:
        try:
            self._connection.recv_bytes()  # the head says one thing here: stop
        except (EOFError, OSError):
            os._exit(1)
        self.stopped.set()
        if self.pump:
            self.pump.stop()


# ---------------------------------------------------------------- a rank


def device_of(config: Config, rank: int) -> torch.device:
    """The accelerator of this rank, by its place on the host, or the CPU. Raises ConfigError."""
    wanted, found = config.model.device, torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("model.device=cuda: this host shows no CUDA device; say cpu or auto")
    if wanted == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())


def use(device: torch.device) -> None:
    """From here on this thread's device: kernels of ours, events and pinned memory go to the current one, which each thread has by itself."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def threads_of(config: Config, world: int) -> int:
    """CPU threads of one rank: what the config says, else an equal share of the cores, at least 1."""
    return config.runtime.threads or max(1, len(os.sched_getaffinity(0)) // world)


class Neighbours:
    """The torch.distributed side of a rank: joins the group, makes the links to the stages around and to who shares this one."""

    def __init__(self, job: Job, rank: int, device: torch.device):
        self.seats, self.rank, self.world, self.device = seats_of(job.config), rank, job.world, device
        self.seat, self.payload_group, self.stage_group = self.seats[rank], None, None
        if job.world > 1:
            self._join(job, rank)

    def _join(self, job: Job, rank: int) -> None:
        try:
            store = dist.TCPStore(*job.store, is_master=False, timeout=NEVER)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world, timeout=NEVER)
            self.payload_group = self._nccl(store)
            for seat in self.seats:  # every rank makes every group, in one order
                if seat.shards > 1 and seat.shard == 0:
                    self._share(seat)
        except RuntimeError as error:
            raise LinkBroken(rank, f"cannot join the group: {error}") from error

    def _share(self, leader: Seat) -> None:
        ranks = [leader.rank, *leader.others]
        group = dist.new_group(ranks, backend="nccl" if self.payload_group is not None else "gloo", timeout=NEVER)
        if self.rank in ranks:
            self.stage_group = group

    def _nccl(self, store: dist.Store):
        """A group for tensors if every rank has a GPU of its own, else None; all ranks answer alike."""
        mine = "cpu"
        if self.device.type == "cuda":
            mine = f"{host_identity()}/{torch.cuda.get_device_properties(self.device).uuid}"
        store.set(f"device{self.rank}", mine)
        devices = [store.get(f"device{rank}").decode() for rank in range(self.world)]
        alone = "cpu" not in devices and len(set(devices)) == self.world
        return dist.new_group(backend="nccl", timeout=NEVER) if alone else None

    def exchange(self) -> Bands | None:
        """With the ranks that share this stage; None where it is this rank's alone."""
        return Bands(self.stage_group, self.seat, self.device) if self.seat.shards > 1 else None

    def links(self) -> tuple[DistLink | None, DistLink | None, list[DistLink]]:
        """(from the stage before or the leader of this one, to the stage after, to those who follow this rank), all warm."""
        seat, leads = self.seat, self.seat.shard == 0
        first_after = seat.leader + seat.shards
        before = next((s.rank for s in self.seats if s.stage == seat.stage - 1 and s.shard == 0), None) if leads else seat.leader
        received = None if before is None else self._link(before)
        after = self._link(first_after) if leads and first_after < self.world else None
        followers = [self._link(rank) for rank in seat.others] if leads else []
        if received:
            received.receive_warm()
        for link in (after, *followers):
            if link:
                link.send_warm()
        return received, after, followers

    def _link(self, peer: int) -> DistLink:
        return DistLink(peer, self.device, self.payload_group)


def traced(config: Config, rank: int) -> int | None:
    """What Pump wants to know of tracing."""
    return rank if config.runtime.spans or config.runtime.trace is not None else None


def build(job: Job, rank: int, device: torch.device, exchange: Bands | None = None) -> Sequence[Callable]:
    """The roles of this rank, warm. exchange: with those who share its stage. Raises whatever loading raises."""
    source = job.source
    if source is None:
        from liveavatar.runtime import stage_roles as source  # only ranks load models; the head never does
    shared = () if exchange is None else (exchange,)
    return source.build_stage(job.config, seats_of(job.config)[rank].roles, device, *shared)


def inbox_room(config: Config) -> int:
    """Messages that wait in front of a stage: the next one, and enough to fill a batch of several sessions."""
    return max(2, config.runtime.batch + 1)


def read_inlet(connection: Connection, inbox: QueueLink) -> None:
    """Messages from the head into rank 0's inbox, until either end closes."""
    try:
        while True:
            inbox.send(decode(connection.recv_bytes()))
    except (EOFError, OSError, LinkClosed):
        return


def work(job: Job, rank: int, control: Control, inlet: Connection | None) -> None:
    """Join, build, say ready, pump. Raises LinkBroken, and what building or a role raises."""
    torch.set_num_threads(threads_of(job.config, job.world))
    device = device_of(job.config, rank)
    use(device)
    neighbours = Neighbours(job, rank, device)
    before, after, followers = neighbours.links()
    inbox = QueueLink(inbox_room(job.config))
    up = control.message if neighbours.seat.shard == 0 else lambda message: None  # the leader says it
    pump = Pump(build(job, rank, device, neighbours.exchange()), inbox, after, up, control.beat, traced(job.config, rank), followers)
    control.pump = pump
    receiver = ReceiveAhead(before, inbox, lambda: use(device)) if before else threading.Thread(target=read_inlet, args=(inlet, inbox), daemon=True)
    receiver.start()
    control.beat()
    control.note("ready")
    if control.stopped.is_set():
        pump.stop()
    pump.run()
    if before and receiver.broken and not control.stopped.is_set():
        raise receiver.broken


def run(address: tuple[str, int], key: bytes, rank: int) -> int:
    """One rank from start to end; returns its exit status. address, key: the head's listener.

    After a fault it waits: the head decides when all ends, so that a launcher which watches exit codes
    (torchrun) does not tear the others down before the head has named the culprit.
    """
    connection = greet(address, key, rank, "control")
    job: Job = pickle.loads(connection.recv_bytes())
    inlet = greet(address, key, rank, "inlet") if rank == 0 else None
    for name, value in job.environment.items():
        os.environ.setdefault(name, value)
    control = Control(connection)
    control.start()
    status = _guarded_work(job, rank, control, inlet)
    control.stopped.wait()
    control.close()
    return status


def _guarded_work(job: Job, rank: int, control: Control, inlet: Connection | None) -> int:
    try:
        work(job, rank, control, inlet)
        return 0
    except LinkBroken as error:
        control.note("link", peer=error.peer, line=one_line(error))
    except Exception as error:  # the rank's main door: whatever went wrong is reported, nothing swallowed
        control.note("error", line=explain(error, control.pump), traceback=traceback.format_exc())
    return 1


# ---------------------------------------------------------------- processes that are a rank


def process(address: tuple[str, int], key: bytes, rank: int) -> NoReturn:
    """Main of a process that is a rank. Ctrl-C is the head's to answer; no destructor may hang the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = run(address, key, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class RankActor:
    """The same as a Ray actor; Ray ends the process."""

    def run(self, address: tuple[str, int], key: bytes, rank: int) -> int:
        return run(address, key, rank)


if __name__ == "__main__":
    host, _, port = os.environ[ADDRESS_VARIABLE].rpartition(":")
    process((host, int(port)), bytes.fromhex(os.environ[KEY_VARIABLE]), int(os.environ["RANK"]))
