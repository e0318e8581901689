"""One rank: connect to the head, build the roles of its stage, warm up, pump messages until told to stop.

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
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from typing import NoReturn, Protocol

import psutil
import torch
import torch.distributed as dist

from liveavatar.config import Config
from liveavatar.core import UPWARD, ConfigError, Message, Open, SetPrompt, SetReference, Span
from liveavatar.runtime.links import DistLink, Link, LinkBroken, LinkClosed, QueueLink, ReceiveAhead, decode, encode

BEAT_SECONDS = 0.25
NEVER = timedelta(days=3650)  # a silent session is not a fault: liveness is the supervisor's, not the transport's
ADDRESS_VARIABLE, KEY_VARIABLE = "LIVEAVATAR_HEAD", "LIVEAVATAR_KEY"  # set by launchers for started processes
MESSAGE_FRAME, NOTE_FRAME = b"M", b"J"  # first byte of a frame to the head: an encoded message, or a JSON note


class Source(Protocol):
    """Who makes the roles; picklable. None in its place means the checkpoint's own (runtime.roles)."""

    def build_stage(self, config: Config, stage_names: Sequence[str], device: torch.device) -> Sequence[Callable]: ...


@dataclass(frozen=True)
class Job:
    """All a rank must know; from the head. store: host and port of the rendezvous (None: one rank)."""

    config: Config
    source: Source | None
    world: int
    store: tuple[str, int] | None
    environment: dict[str, str]


def stages_of(config: Config) -> tuple[tuple[str, ...], ...]:
    """The cut of the chain, one tuple of role names per rank."""
    return config.stages or (config.chain,)


# ---------------------------------------------------------------- the pump


def describe(message: Message) -> str:
    """A message in words for errors and heartbeats."""
    index, step = getattr(message, "index", None), getattr(message, "step", None)
    what = type(message).__name__ if index is None else f"{type(message).__name__} {index}"
    at = "" if step is None else f" at step {step}"
    return f"{what}{at} of session {message.session!r}"


SLOW = (Open, SetPrompt, SetReference)  # may load an encoder, and hold the interpreter for seconds


class Pump:
    """Inbox -> roles one after the other -> next stage; what is meant for the head goes up at once.

    busy: (role, message, monotonic time it began) while a role runs, else None. Time spent waiting for
    a full link is not busy time: the blame belongs to whoever does not empty it. After a role raised it
    still says which and at what. announce: called before and after a SLOW message. traced: the rank's
    number if the head wants a Span of every role's work, else None.
    """

    def __init__(self, roles: Sequence[Callable], inbox: QueueLink, down: Link | None, up: Callable[[Message], None],
                 announce: Callable[[], None] = lambda: None, traced: int | None = None):
        self.roles, self.inbox, self.down, self.up, self.announce = tuple(roles), inbox, down, up, announce
        self.traced = traced
        self.busy: tuple[str, Message, float] | None = None
        self._stopping = False

    @torch.no_grad()
    def run(self) -> None:
        """Until stop(), or the inbox is closed. Raises LinkBroken and whatever a role raises."""
        while not self._stopping:
            try:
                self._pass(self.inbox.receive())
            except LinkClosed:
                return

    def stop(self) -> None:
        """End run() after the message at hand."""
        self._stopping = True
        self.inbox.close()

    def doing(self) -> tuple[str, float] | None:
        """What a role is at, in words, and for how many seconds."""
        busy = self.busy
        return (f"{busy[0]} on {describe(busy[1])}", time.monotonic() - busy[2]) if busy else None

    def slow(self) -> bool:
        """Whether a role is at a SLOW message."""
        busy = self.busy
        return busy is not None and isinstance(busy[1], SLOW)

    def _pass(self, message: Message) -> None:
        travelling = [message]
        for role in self.roles:
            made = [out for item in travelling for out in self._call(role, item)]
            for out in made:
                if isinstance(out, UPWARD):
                    self.up(out)
            travelling = [out for out in made if not isinstance(out, UPWARD)]
        if self.down is not None:
            for out in travelling:
                self.down.send(out)

    def _call(self, role: Callable, message: Message) -> list[Message]:
        self.busy = (type(role).__name__, message, time.monotonic())
        if isinstance(message, SLOW):
            self.announce()
        made = role(message)
        if self.traced is not None:
            self.up(span_of(self.traced, *self.busy[1:], role))
        self.busy = None
        if isinstance(message, SLOW):
            self.announce()
        return made


def span_of(rank: int, message: Message, start: float, role: Callable) -> Span:
    """The Span of a role's work that is over now; what it queued on a GPU is waited for, or its time would be nobody's."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    step = getattr(role, "index", None)
    return Span(message.session, what=type(message).__name__, index=getattr(message, "index", None), rank=rank,
                role=type(role).__name__ + ("" if step is None else str(step)), start=start, end=time.monotonic(),
                rss=psutil.Process().memory_info().rss, gpu=torch.cuda.memory_allocated() if on_gpu else 0)


def explain(error: Exception, pump: Pump | None) -> str:
    """One line: where it happened, if a role was at work, and what."""
    doing = pump.doing() if pump else None
    return f"{f'{doing[0]}: ' if doing else ''}{type(error).__name__}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """The text of an exception on one line."""
    return " ".join(str(error).split())[:500]


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


def threads_of(config: Config, world: int) -> int:
    """CPU threads of one rank: what the config says, else an equal share of the cores, at least 1."""
    return config.runtime.threads or max(1, len(os.sched_getaffinity(0)) // world)


class Neighbours:
    """The torch.distributed side of a rank: joins the group, and makes the links to rank-1 and rank+1."""

    def __init__(self, job: Job, rank: int, device: torch.device):
        self.rank, self.world, self.device = rank, job.world, device
        self.payload_group = None
        if job.world > 1:
            self._join(job, rank)

    def _join(self, job: Job, rank: int) -> None:
        try:
            store = dist.TCPStore(*job.store, is_master=False, timeout=NEVER)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world, timeout=NEVER)
            self.payload_group = self._nccl(store)
        except RuntimeError as error:
            raise LinkBroken(rank, f"cannot join the group: {one_line(error)}") from error

    def _nccl(self, store: dist.Store):
        """A group for tensors if every rank has a GPU of its own, else None; all ranks answer alike."""
        mine = "cpu"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            mine = f"{host_identity()}/{torch.cuda.get_device_properties(self.device).uuid}"
        store.set(f"device{self.rank}", mine)
        devices = [store.get(f"device{rank}").decode() for rank in range(self.world)]
        alone = "cpu" not in devices and len(set(devices)) == self.world
        return dist.new_group(backend="nccl", timeout=NEVER) if alone else None

    def links(self) -> tuple[DistLink | None, DistLink | None]:
        """(from the rank before, to the rank after), both warm."""
        before = DistLink(self.rank - 1, self.device, self.payload_group) if self.rank > 0 else None
        after = DistLink(self.rank + 1, self.device, self.payload_group) if self.rank + 1 < self.world else None
        if before:
            before.receive_warm()
        if after:
            after.send_warm()
        return before, after


def traced(config: Config, rank: int) -> int | None:
    """What Pump wants to know of tracing."""
    return rank if config.runtime.spans or config.runtime.trace is not None else None


def build(job: Job, rank: int, device: torch.device) -> Sequence[Callable]:
    """The roles of this rank, each warmed up if it knows how. Raises whatever loading raises."""
    source = job.source
    if source is None:
        from liveavatar.runtime import roles as source  # only ranks load models; the head never does
    roles = source.build_stage(job.config, stages_of(job.config)[rank], device)
    for role in roles:
        if hasattr(role, "warm"):
            role.warm()
    return roles


def read_inlet(connection: Connection, inbox: QueueLink) -> None:
    """Messages from the head into rank 0's inbox, until either end closes."""
    try:
        while True:
            inbox.send(decode(connection.recv_bytes()))
    except (EOFError, OSError, LinkClosed):
        return


def work(job: Job, rank: int, control: Control, inlet: Connection | None) -> None:
    """Build, warm, say ready, pump. Raises LinkBroken, and what building or a role raises."""
    torch.set_num_threads(threads_of(job.config, job.world))
    device = device_of(job.config, rank)
    before, after = Neighbours(job, rank, device).links()
    inbox = QueueLink()
    pump = Pump(build(job, rank, device), inbox, after, control.message, control.beat,
                traced(job.config, rank))
    control.pump = pump
    receiver = ReceiveAhead(before, inbox) if before else threading.Thread(target=read_inlet, args=(inlet, inbox), daemon=True)
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
