"""A running chain as the head sees it: send to rank 0, receive what comes up, stop.

`ThreadChain` runs every stage on a thread of this process; `ProcessChain` talks to ranks that a `Crew`
(see launchers.py) started. Both are watched by the same supervisor and fail with the same RankFailure.
Queue policy: what comes up waits in a queue of UPWARD_ROOM messages; when the engine does not take them,
the ranks wait (nothing is dropped), and waiting for us is not held against them.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Protocol

import torch
import torch.distributed as dist

from liveavatar.config import Config
from liveavatar.core import ConfigError, Message, RankFailure, SessionClosed
from liveavatar.runtime import worker
from liveavatar.runtime.links import LinkClosed, QueueLink, decode, encode
from liveavatar.runtime.pump import Pump
from liveavatar.runtime.seats import seats_of
from liveavatar.runtime.supervisor import Limits, RankView, Supervisor

UPWARD_ROOM = 256  # messages
STOP_SECONDS = 3.0  # an orderly end may take this long, then ranks are killed
VERDICT_SECONDS = 5.0  # a send that failed waits this long for the supervisor to name the culprit


class Chain(Protocol):
    """What a launcher returns; all ranks are ready."""

    def send(self, message: Message) -> None:
        """To rank 0. Waits while the chain is full. Any thread. Raises RankFailure, SessionClosed after stop()."""

    def receive(self, timeout: float) -> Message | None:
        """The next message for the head (in order per rank), None after `timeout` s. Raises RankFailure."""

    def stop(self) -> None:
        """Orderly end, then kill. May be called often. No process or thread of the chain is left after it."""


class Base:
    """The parts both chains share: views, the upward queue, the failure, waiting until all are ready."""

    def __init__(self, config: Config):
        self.config, self.seats = config, seats_of(config)
        now = time.monotonic()
        self.views = [RankView(rank=seat.rank, roles=seat.roles, started=now) for seat in self.seats]
        self._up = QueueLink(UPWARD_ROOM)
        self._failure: RankFailure | None = None
        self._stopped = False
        self._supervisor = Supervisor(self.views, Limits.of(config.runtime), self._look, self._fail)
        self._threads: list[threading.Thread] = []

    def _spawn(self, name: str, target: Callable, *arguments) -> None:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _join(self) -> None:
        """Threads that hold tensors must not meet the end of the interpreter."""
        for thread in (*self._threads, self._supervisor):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(STOP_SECONDS)
        atexit.unregister(self.stop)

    def stop(self) -> None:
        raise AssertionError("each chain stops in its own way")

    def _look(self, now: float) -> None:
        raise AssertionError("each chain looks in its own way")

    def _end(self) -> None:
        """Make an end of all ranks, at once."""
        raise AssertionError("each chain ends in its own way")

    def _fail(self, failure: RankFailure) -> None:
        self._end()
        self._failure = failure
        self._up.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure = RankFailure(self._failure.rank, self._failure.roles, self._failure.reason)
            for note in getattr(self._failure, "__notes__", ()):
                failure.add_note(note)
            raise failure

    def _ready(self) -> bool:
        return all(view.ready for view in self.views)

    def _bring_up(self, start: Callable[[], object]) -> None:
        """Start the ranks and wait until all are ready; leave nothing behind when that fails."""
        atexit.register(self.stop)  # a process that forgets, or is interrupted, leaves nothing behind either
        try:
            start()
            self._supervisor.start()
            while not self._ready():
                self._raise_failure()
                time.sleep(0.01)
        except BaseException:
            self.stop()
            raise

    def receive(self, timeout: float) -> Message | None:
        try:
            return self._up.receive(timeout)
        except LinkClosed:
            self._raise_failure()
            time.sleep(timeout)  # stopped: nothing comes any more, and a reader in a loop shall not spin
            return None

    def _sent(self, put: Callable[[], None]) -> None:
        """Run `put`; when it finds the way closed, say why."""
        self._raise_failure()
        try:
            put()
            return
        except (LinkClosed, OSError):
            end = time.monotonic() + VERDICT_SECONDS
        while self._failure is None and not self._stopped and time.monotonic() < end:
            time.sleep(0.01)
        self._raise_failure()
        if self._stopped:
            raise SessionClosed("the chain was stopped")
        raise RankFailure(0, self.seats[0].roles, "took no more messages and gave no reason")


# ---------------------------------------------------------------- one process, one thread per stage


class ThreadChain(Base):
    """Stages on daemon threads. A hung thread cannot be killed: it is named and left behind."""

    def __init__(self, config: Config, source: worker.Source | None):
        super().__init__(config)
        if any(seat.shards > 1 for seat in self.seats):
            raise ConfigError("runtime.shards: ranks that share a stage are processes: say runtime.launcher=local, torchrun or ray")
        self._job = worker.Job(config, source, len(self.seats), None, {})
        self._links = [QueueLink(worker.inbox_room(config)) for _ in self.seats]
        self._pumps: list[Pump | None] = [None for _ in self.seats]
        self._bring_up(lambda: [self._spawn(f"rank{rank}", self._rank, rank) for rank in range(len(self.seats))])

    def _rank(self, rank: int) -> None:
        view = self.views[rank]
        try:
            self._work(rank, view)
        except Exception as error:  # the rank's main door: whatever went wrong is reported, nothing swallowed
            view.error = (time.monotonic(), worker.explain(error, self._pumps[rank]), traceback.format_exc())

    def _work(self, rank: int, view: RankView) -> None:
        torch.set_num_threads(worker.threads_of(self.config, len(self.seats)))
        device = worker.device_of(self.config, rank)
        worker.use(device)
        roles = worker.build(self._job, rank, device)
        down = self._links[rank + 1] if rank + 1 < len(self.seats) else None
        self._pumps[rank] = Pump(roles, self._links[rank], down, self._up.send, traced=worker.traced(self.config, rank))
        view.connected = view.ready = True
        if not self._stopped:
            self._pumps[rank].run()

    def _look(self, now: float) -> None:
        for view, pump in zip(self.views, self._pumps, strict=True):
            doing = pump.doing() if pump else None
            view.busy = (doing[0], now - doing[1]) if doing else None

    def _end(self) -> None:
        for link in self._links:
            link.close()
        for pump in self._pumps:
            if pump:
                pump.stop()
        self._up.close()

    def send(self, message: Message) -> None:
        self._sent(lambda: self._links[0].send(message))

    def stop(self) -> None:
        self._stopped = True
        self._supervisor.stop()
        self._end()
        self._join()


# ---------------------------------------------------------------- processes


class Crew(Protocol):
    """The processes of a chain, as their launcher knows them."""

    host: str  # the address of this machine that ranks reach
    environment: dict[str, str]  # set in each rank unless it is set already

    def start(self, address: tuple[str, int], key: bytes) -> None:
        """Start all ranks; they connect to `address`. Raises PlacementError when there is no room."""

    def ended(self, rank: int) -> str | None:
        """How the process of `rank` ended, in words; None while it runs or when that cannot be told."""

    def gone(self) -> bool:
        """Whether nothing of it is left."""

    def kill(self) -> None:
        """SIGKILL what is left."""

    def close(self) -> None:
        """Give back everything else (a Ray placement group, say); after kill()."""


def hang_up(connection: Connection) -> None:
    """End a connection for both sides, without taking its descriptor from a thread that is reading it."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was faster


class Exchange:
    """The head's sockets: where ranks connect, and the store through which they find each other."""

    def __init__(self, host: str, world: int):
        self.key = os.urandom(32)
        self.closing = False
        self.listener = Listener((host, 0), family="AF_INET", backlog=2 * world + 2, authkey=self.key)
        self.address = self.listener.address
        self.store = self._store(host) if world > 1 else None

    def _store(self, host: str) -> dist.TCPStore:
        server = socket.create_server((host, 0), backlog=64)  # ours, because a TCPStore by itself listens on every interface
        port = server.getsockname()[1]
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach(),
                             timeout=worker.NEVER)

    @property
    def store_address(self) -> tuple[str, int] | None:
        return (self.address[0], self.store.port) if self.store else None

    def accept(self) -> tuple[Connection, dict] | None:
        """The next caller who knows the key, and its greeting; None for one who does not."""
        try:
            connection = self.listener.accept()
            return connection, json.loads(connection.recv_bytes())
        except (AuthenticationError, EOFError, ConnectionError):  # it does not know the key, or died while it greeted
            return None

    def close(self) -> None:
        """Wake whoever accepts (who then closes the listener) and end the store."""
        self.closing, self.store = True, None
        try:
            socket.create_connection(self.address, timeout=1.0).close()
        except OSError:
            return  # nobody accepts any more


class ProcessChain(Base):
    """Ranks in processes of their own, started by `crew`."""

    def __init__(self, config: Config, source: worker.Source | None, crew: Crew):
        super().__init__(config)
        self._crew, self._exchange = crew, Exchange(crew.host, len(self.seats))
        self._job = pickle.dumps(worker.Job(config, source, len(self.seats), self._exchange.store_address, crew.environment))
        self._controls: dict[int, Connection] = {}
        self._pids: dict[int, int] = {}  # of ranks whose pids mean something here
        self._inlet: Connection | None = None
        self._inlet_lock = threading.Lock()
        self._ending = threading.RLock()
        self._spawn("welcome", self._welcome)
        self._bring_up(lambda: crew.start(self._exchange.address, self._exchange.key))

    def _welcome(self) -> None:
        """Let every rank in once; then close the door."""
        while not self._exchange.closing and (len(self._controls) < len(self.seats) or self._inlet is None):
            caller = self._exchange.accept()
            if caller is not None:
                self._admit(*caller)
        self._exchange.listener.close()

    def _admit(self, connection: Connection, hello: dict) -> None:
        rank = hello["rank"]
        if hello["channel"] == "inlet":
            self._inlet = connection
            return
        assert rank not in self._controls and 0 <= rank < len(self.seats), f"an unexpected rank {rank} connected"
        if hello["host"] == worker.host_identity():
            self._pids[rank] = hello["pid"]
        view = self.views[rank]
        view.connected, view.seen = True, time.monotonic()
        self._controls[rank] = connection
        try:
            connection.send_bytes(self._job)
        except OSError:
            view.lost = time.monotonic()
            return
        self._spawn(f"read{rank}", self._read, view, connection)

    def _read(self, view: RankView, connection: Connection) -> None:
        try:
            while True:
                self._take(view, connection.recv_bytes())
        except LinkClosed:
            return
        except (EOFError, OSError):
            view.lost = time.monotonic()

    def _take(self, view: RankView, frame: bytes) -> None:
        now = view.seen = time.monotonic()
        if frame[:1] == worker.MESSAGE_FRAME:
            message = decode(memoryview(frame)[1:])
            view.held = True
            self._up.send(message)
            view.seen, view.held = time.monotonic(), False
            return
        note = json.loads(frame[1:])
        match note["kind"]:
            case "beat":
                view.busy = (note["busy"][0], now - note["busy"][1]) if note["busy"] else None
                view.slow = note["slow"]
            case "ready":
                view.ready = True
            case "error":
                view.error = (now, note["line"], note["traceback"])
            case "link":
                view.broken = (now, f"lost its link with rank {note['peer']}: {note['line']}")

    def _ready(self) -> bool:
        return super()._ready() and self._inlet is not None

    def _look(self, now: float) -> None:
        for view in self.views:
            if view.ended is None:
                how = self._crew.ended(view.rank)
                view.ended = (now, how) if how else None

    def send(self, message: Message) -> None:
        data = encode(message)
        with self._inlet_lock:
            self._sent(lambda: self._inlet.send_bytes(data))

    def stop(self) -> None:
        self._supervisor.stop()
        with self._ending:
            if self._stopped:
                return
            for rank, control in self._controls.items():
                if self.views[rank].lost is None:
                    self._tell_stop(control)
            end = time.monotonic() + (STOP_SECONDS if self._failure is None else 0.0)
            while not self._all_gone() and time.monotonic() < end:
                time.sleep(0.01)
            self._end()
            self._stopped = True
            self._up.close()
        self._join()
        for connection in (*self._controls.values(), self._inlet):
            if connection is not None:
                connection.close()  # nobody reads them any more

    def _all_gone(self) -> bool:
        return self._crew.gone() and all(view.lost is not None for view in self.views if view.connected)

    def _tell_stop(self, control: Connection) -> None:
        try:
            control.send_bytes(b"stop")
        except OSError:
            return  # it is gone already, which is what we ask for

    def _end(self) -> None:
        with self._ending:
            for rank, pid in self._pids.items():
                if self.views[rank].lost is None:
                    self._kill(pid)
            self._crew.kill()
            self._close_sockets()
            self._crew.close()

    def _kill(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _close_sockets(self) -> None:
        self._exchange.close()
        for connection in (*self._controls.values(), self._inlet):
            if connection is not None:
                hang_up(connection)
