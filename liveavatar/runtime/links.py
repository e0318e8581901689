"""Links: ordered one-to-one transport of messages from one stage to the next.

A message becomes a header (JSON: type, plain values, one line per tensor) and its tensors.
`pack`/`unpack` do that alone; `encode`/`decode` put both into one run of bytes for a socket;
`DistLink` sends them over torch.distributed; `QueueLink` hands the object over as it is.
Nothing is pickled: a header can only name a message type that exists here.
"""

from __future__ import annotations

import json
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
import torch.distributed as dist

from liveavatar.core import Block, Message

ALIGNMENT = 16  # bytes; every dtype can be viewed at such an offset
PREAMBLE = 1024  # bytes of a header that travel in the first, fixed-size send
LENGTH = struct.Struct("<I")
TAG_PREAMBLE, TAG_HEADER, TAG_PAYLOAD = 1, 2, 3


class LinkClosed(Exception):
    """This end was closed on purpose; nothing more comes."""


def one_line(error: BaseException | str) -> str:
    """The text of an exception on one line."""
    return " ".join(str(error).split())[:500]


class LinkBroken(Exception):
    """The peer is gone. `peer` is its rank; reason: in words, or what was raised."""

    def __init__(self, peer: int, reason: str | BaseException):
        self.peer = peer
        super().__init__(one_line(reason))


class Link(Protocol):
    """One direction of travel; one sender, one receiver, order kept, bounded (a full link makes send wait)."""

    def send(self, message: Message) -> None: ...

    def receive(self) -> Message | None: ...


# ---------------------------------------------------------------- a message as header + tensors


@dataclass(frozen=True)
class Spec:
    """One tensor of a header. on_device: it lay on an accelerator and shall lie on the receiver's."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    on_device: bool

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def message_types(base: type = Message) -> dict[str, type]:
    """Every message type by name, subclasses of subclasses included."""
    found = {base.__name__: base}
    for child in base.__subclasses__():
        found.update(message_types(child))
    return found


def pack(message: Message) -> tuple[bytes, list[torch.Tensor]]:
    """Header bytes and the tensors in the header's order, contiguous, each on the device it was on.

    Raises TypeError when a value is neither a tensor nor plain JSON.
    """
    values, specs, tensors = {}, [], []
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous()
            specs.append([item.name, str(value.dtype).removeprefix("torch."), list(value.shape), not value.is_cpu])
            tensors.append(value)
        else:
            values[item.name] = value
    header = json.dumps({"type": type(message).__name__, "values": values, "tensors": specs}, separators=(",", ":"))
    return header.encode(), tensors


def read_specs(header: bytes) -> list[Spec]:
    """The tensors a header announces."""
    return [Spec(name, getattr(torch, dtype), tuple(shape), far) for name, dtype, shape, far in json.loads(header)["tensors"]]


def unpack(header: bytes, tensors: list[torch.Tensor]) -> Message:
    """The message again, from its header and its tensors in order. Raises KeyError for an unknown type."""
    document = json.loads(header)
    names = [spec[0] for spec in document["tensors"]]
    assert len(names) == len(tensors), "header and tensors disagree"
    return message_types()[document["type"]](**document["values"], **dict(zip(names, tensors, strict=True)))


# ---------------------------------------------------------------- tensors as one run of bytes


def offsets(sizes: list[int]) -> tuple[list[int], int]:
    """Aligned start of each of `sizes` bytes, and the total."""
    starts, end = [], 0
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        starts.append(start)
        end = start + size
    return starts, end


def stage(tensors: list[torch.Tensor], buffer: torch.Tensor, starts: list[int]) -> None:
    """Copy contiguous tensors into uint8 `buffer` [n]; from an accelerator too."""
    for tensor, start in zip(tensors, starts, strict=True):
        if tensor.numel():
            buffer[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))


def unstage(specs: list[Spec], buffer: torch.Tensor) -> list[torch.Tensor]:
    """Views of uint8 `buffer` [n] with the dtypes and shapes of `specs`."""
    starts, _ = offsets([spec.nbytes for spec in specs])
    tensors = []
    for spec, start in zip(specs, starts, strict=True):
        flat = buffer[start : start + spec.nbytes]
        tensors.append((flat.view(spec.dtype) if spec.nbytes else flat.new_empty(0, dtype=spec.dtype)).view(spec.shape))
    return tensors


def encode(message: Message) -> memoryview:
    """A message as bytes for a socket: length of the header, header, padding, tensors."""
    header, tensors = pack(message)
    (_, body), _ = offsets([LENGTH.size + len(header), 0])
    starts, total = offsets([tensor.nbytes for tensor in tensors])
    buffer = torch.zeros(body + total, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    view[: LENGTH.size + len(header)] = LENGTH.pack(len(header)) + header
    stage(tensors, buffer[body:], starts)
    return view


def decode(data: bytes) -> Message:
    """The message of `encode`; its tensors are on the CPU and own their bytes."""
    (size,) = LENGTH.unpack_from(data)
    header = bytes(data[LENGTH.size : LENGTH.size + size])
    (_, body), _ = offsets([LENGTH.size + size, 0])
    payload = bytearray(data[body:])
    buffer = torch.frombuffer(payload, dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    return unpack(header, unstage(read_specs(header), buffer))


# ---------------------------------------------------------------- in one process


class QueueLink:
    """A bounded queue between two threads. Full: send waits. The message object itself is handed over."""

    def __init__(self, size: int = 2):
        self._items: deque = deque()
        self._size = size
        self._changed = threading.Condition()
        self._closed = False

    def send(self, message: Message) -> None:
        """Wait for room, then put. Raises LinkClosed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if self._closed:
                raise LinkClosed
            self._items.append(message)
            self._changed.notify_all()

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message, or None after `timeout` seconds. Raises LinkClosed once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items, timeout)
            if self._items:
                message = self._items.popleft()
                self._changed.notify_all()
                return message
            if self._closed:
                raise LinkClosed
            return None

    def close(self) -> None:
        """No more sends; what is inside can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


# ---------------------------------------------------------------- between processes


@dataclass
class Outgoing:
    """Buffers of one message under way; reused once its sends are done."""

    preamble: torch.Tensor = field(default_factory=lambda: torch.zeros(PREAMBLE, dtype=torch.uint8))
    rest: torch.Tensor | None = None
    payload: torch.Tensor | None = None
    works: list = field(default_factory=list)


def roomy(buffer: torch.Tensor | None, size: int, device: torch.device, pinned: bool) -> torch.Tensor:
    """`buffer` if `size` bytes fit, else a new uint8 one of twice the room on `device`."""
    if buffer is not None and buffer.numel() >= size:
        return buffer
    return torch.empty(2 * size, dtype=torch.uint8, device=device, pin_memory=pinned)


def settle(works: list, peer: int) -> None:
    """Wait for sends or receives. Raises LinkBroken when the peer is gone."""
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise LinkBroken(peer, error) from error
    works.clear()


class DistLink:
    """One hop over torch.distributed: headers over gloo, tensors over `payload_group` (nccl) or gloo.

    peer: rank at the other end. device: where this rank computes; tensors that lay on an accelerator
    arrive there, all others on the CPU. Sending copies into one of `slots` preallocated buffers and
    returns; it waits only while all slots are under way, which is how a slow peer holds us back.
    The payload is received only once its header is here, so that an idle link spins no kernel. The header leaves when the sender's
    host has queued the work, not when its GPU has done it: the receive, on a stream of its own, may spin for up to a step's time,
    which costs the running block a few of the GPU's multiprocessors; to hold the header back the sender's host would have to wait.
    """

    def __init__(self, peer: int, device: torch.device, payload_group=None, slots: int = 2):
        self.peer, self.device, self.group = peer, device, payload_group
        self._staging = device if payload_group is not None else torch.device("cpu")
        self._pinned = device.type == "cuda" and self._staging.type == "cpu"
        self._slots = [Outgoing() for _ in range(slots)]
        self._turn = 0
        self._preamble = torch.zeros(PREAMBLE, dtype=torch.uint8)
        self._incoming: torch.Tensor | None = None
        self._stream = None

    def send(self, message: Message) -> None:
        """Start sending. Raises LinkBroken."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        settle(slot.works, self.peer)
        header, tensors = pack(message)
        self._send_header(slot, header)
        starts, total = offsets([tensor.nbytes for tensor in tensors])
        if total:
            slot.payload = roomy(slot.payload, total, self._staging, self._pinned)
            stage(tensors, slot.payload, starts)
            self._start(slot, slot.payload[:total], TAG_PAYLOAD, self.group)

    def _send_header(self, slot: Outgoing, header: bytes) -> None:
        data = LENGTH.pack(len(header)) + header
        first = data[:PREAMBLE]
        slot.preamble[: len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        self._start(slot, slot.preamble, TAG_PREAMBLE, None)
        if len(data) > PREAMBLE:
            slot.rest = torch.frombuffer(bytearray(data[PREAMBLE:]), dtype=torch.uint8)
            self._start(slot, slot.rest, TAG_HEADER, None)

    def _start(self, slot: Outgoing, buffer: torch.Tensor, tag: int, group) -> None:
        try:
            slot.works.append(dist.isend(buffer, self.peer, group=group, tag=tag))
        except RuntimeError as error:
            raise LinkBroken(self.peer, error) from error

    def flush(self) -> None:
        """Wait until everything sent has left. Raises LinkBroken."""
        for slot in self._slots:
            settle(slot.works, self.peer)

    def receive(self) -> Message:
        """Wait for the next message. Raises LinkBroken."""
        header = self._receive_header()
        specs = read_specs(header)
        _, total = offsets([spec.nbytes for spec in specs])
        if not total:
            return unpack(header, unstage(specs, torch.empty(0, dtype=torch.uint8)))
        self._incoming = roomy(self._incoming, total, self._staging, self._pinned)
        if self._staging.type == "cuda":
            return unpack(header, self._receive_beside(specs, total))
        self._fetch(self._incoming[:total], TAG_PAYLOAD, None)
        return unpack(header, self._own(specs, self._incoming))

    def _receive_header(self) -> bytes:
        self._fetch(self._preamble, TAG_PREAMBLE, None)
        first = self._preamble.numpy().tobytes()
        (size,) = LENGTH.unpack_from(first)
        missing = LENGTH.size + size - PREAMBLE
        if missing <= 0:
            return first[LENGTH.size : LENGTH.size + size]
        rest = torch.empty(missing, dtype=torch.uint8)
        self._fetch(rest, TAG_HEADER, None)
        return first[LENGTH.size :] + rest.numpy().tobytes()

    def _receive_beside(self, specs: list[Spec], total: int) -> list[torch.Tensor]:
        """On a stream of its own, so that the running block's kernels do not wait for this one's bytes."""
        self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            self._fetch(self._incoming[:total], TAG_PAYLOAD, self.group)
            tensors = self._own(specs, self._incoming)
        self._stream.synchronize()
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.default_stream(self.device))
        return tensors

    def _fetch(self, buffer: torch.Tensor, tag: int, group) -> None:
        try:
            works = [dist.irecv(buffer, self.peer, group=group, tag=tag)]
        except RuntimeError as error:
            raise LinkBroken(self.peer, error) from error
        settle(works, self.peer)

    def _own(self, specs: list[Spec], buffer: torch.Tensor) -> list[torch.Tensor]:
        """Copies out of the reused buffer, each on the device it belongs on."""
        places = [self.device if spec.on_device else torch.device("cpu") for spec in specs]
        return [view.to(place, copy=True) for view, place in zip(unstage(specs, buffer), places, strict=True)]

    def send_warm(self) -> None:
        """Open the connection (an NCCL communicator takes seconds) before the first block needs it."""
        self.send(Block(session="", latents=torch.zeros(1, device=self.device)))
        self.flush()

    def receive_warm(self) -> None:
        """The other end of send_warm."""
        greeting = self.receive()
        assert greeting.session == "", "a link must be warmed before it is used"


class ReceiveAhead(threading.Thread):
    """Takes from a DistLink into a bounded inbox while the stage computes. `broken` holds why it ended. begin: called first, on its thread."""

    def __init__(self, link: DistLink, inbox: QueueLink, begin: Callable[[], None] = lambda: None):
        super().__init__(name=f"receive-from-{link.peer}", daemon=True)
        self.link, self.inbox, self.begin = link, inbox, begin
        self.broken: LinkBroken | None = None

    def run(self) -> None:
        self.begin()
        try:
            while True:
                self.inbox.send(self.link.receive())
        except LinkBroken as error:
            self.broken = error
            self.inbox.close()
        except RuntimeError as error:  # no memory for what arrives, say: the rank shall end with a name, not fall silent
            self.broken = LinkBroken(self.link.peer, f"{type(error).__name__}: {error}")
            self.inbox.close()
        except LinkClosed:
            return
