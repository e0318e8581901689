"""A link hands over exactly what was sent: every message type, every dtype, headers of any length, in order."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing  # noqa: F401  (its reductions would send tensors as file descriptors)
from liveavatar import core
from liveavatar.runtime.links import (DistLink, LinkBroken, LinkClosed, QueueLink, ReceiveAhead, decode, encode, message_types,
                                      offsets, pack, read_specs, unpack)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int16, torch.int32, torch.int64,
          torch.bool, torch.float8_e4m3fn)


def same_tensor(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().reshape(-1).view(torch.uint8),
                                                                       b.contiguous().reshape(-1).view(torch.uint8))


def same(a: core.Message, b: core.Message) -> bool:
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(same_tensor(x, y) if isinstance(x, torch.Tensor) else x == y and type(x) is type(y)
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def filled(kind: type) -> core.Message:
    """An instance with every field set, tensors of differing dtypes and odd sizes."""
    values = {"session": "naïve ☃", "seed": 2**62, "prompt": 'quote " \\ \n', "index": 2**40, "epoch": 3, "step": 2,
              "sink_distance": 17, "sample": 10**12, "start": -5, "reason": "no", "extra": {"k": [1, 2.5, None]}}
    message = kind(session=values["session"])
    for n, name in enumerate(vars(message)):
        dtype = DTYPES[n % len(DTYPES)]
        value = values.get(name, (torch.arange(3 * 5 * 7).reshape(3, 5, 7) % 100).to(dtype))
        setattr(message, name, value)
    return message


MESSAGES = [make(kind) for kind in message_types().values() for make in (filled, lambda kind: kind(session="s"))]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_survives(message):
    header, tensors = pack(message)
    assert same(unpack(header, tensors), message)
    assert same(decode(bytes(encode(message))), message)


def test_every_message_type_of_core_is_known():
    kinds = {name for name, value in vars(core).items() if isinstance(value, type) and issubclass(value, core.Message)}
    assert kinds <= set(message_types())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (16, 3, 5, 7)], ids=str)
def test_every_dtype_and_shape(dtype, shape):
    value = torch.randint(0, 2, shape).to(dtype)
    message = core.Block("s", latents=value, features=torch.ones(3, dtype=torch.uint8))
    assert same(decode(bytes(encode(message))), message)
    specs = read_specs(pack(message)[0])
    assert (specs[0].dtype, specs[0].shape, specs[0].nbytes) == (dtype, shape, value.nbytes)


def test_views_and_nan_survive():
    base = torch.randn(6, 8)
    base[0, 0], base[1, 1] = float("nan"), -0.0
    message = core.Block("s", latents=base.t()[::2], features=base[:, 3])
    again = decode(bytes(encode(message)))
    assert same(again, message) and again.latents.is_contiguous()


def test_what_arrived_belongs_to_the_receiver():
    message = core.Block("s", latents=torch.zeros(4))
    data = bytes(encode(message))
    first, second = decode(data), decode(data)
    first.latents += 1
    assert torch.equal(second.latents, torch.zeros(4)) and torch.equal(message.latents, torch.zeros(4))


def test_what_is_not_plain_is_refused():
    with pytest.raises(TypeError):
        pack(core.Failed("s", extra={"x": object()}))
    with pytest.raises(KeyError):
        unpack(pack(core.Close("s"))[0].replace(b'"Close"', b'"Nothing"'), [])


def test_offsets_are_aligned():
    starts, total = offsets([1, 17, 0, 5])
    assert starts == [0, 16, 48, 48] and total == 53


# ---------------------------------------------------------------- queue


def test_queue_is_ordered_bounded_and_closes():
    link, taken = QueueLink(2), []
    sender = threading.Thread(target=lambda: [link.send(core.Audio("s", index=i)) for i in range(5)])
    sender.start()
    sender.join(0.1)
    assert sender.is_alive(), "a full link must make the sender wait"
    while len(taken) < 5:
        taken.append(link.receive(1.0).index)
    assert taken == list(range(5)) and link.receive(0.01) is None
    link.send(core.Close("s"))
    link.close()
    assert link.receive() == core.Close("s")
    with pytest.raises(LinkClosed):
        link.receive()
    with pytest.raises(LinkClosed):
        link.send(core.Close("s"))


# ---------------------------------------------------------------- gloo


def echo_rank(rank: int, path: str, count: int, results) -> None:
    """Rank 0 sends everything down and changes its tensors at once; rank 1 tells what arrived."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    link = DistLink(1 - rank, torch.device("cpu"))
    if rank == 0:
        link.send_warm()
        for message in stream(count):
            link.send(message)
            for value in vars(message).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        link.flush()
    else:
        link.receive_warm()
        got = [link.receive() for _ in range(count)]
        results.put([bytes(encode(message)) for message in got])
        try:
            link.receive()
        except LinkBroken as error:
            results.put(error.peer)


def stream(count: int) -> list[core.Message]:
    """All kinds in turn, small and large, headers longer than the preamble among them."""
    messages = [make(kind) for kind in message_types().values() for make in (filled, lambda kind: kind(session="s"))]
    large = torch.arange(16 * 3 * 64 * 64).view(16, 3, 64, 64).to(torch.bfloat16)
    messages += [core.Open("s", prompt="long " * 3000), core.Block("s", latents=large),
                 core.Open("s", prompt="x" * 1500, picture=torch.ones(3, 9, 9, dtype=torch.uint8))]
    return [copy.deepcopy(messages[i % len(messages)]) for i in range(count)]


def test_dist_link_carries_everything_in_order(tmp_path):
    count = 3 * 2 * len(message_types())
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["liveavatar.runtime.worker"])
    results = context.SimpleQueue()
    ranks = [context.Process(target=echo_rank, args=(rank, str(tmp_path / "store"), count, results)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    got = results.get()
    wanted = [bytes(encode(message)) for message in stream(count)]
    assert got == wanted
    assert results.get() == 0, "a peer that went away is a broken link that names it"
    for rank in ranks:
        rank.join(10)
        assert rank.exitcode == 0


def test_a_receiver_that_fails_says_so():
    class NoRoom:
        peer = 3

        def receive(self):
            raise torch.OutOfMemoryError("no memory for what arrived")

    inbox = QueueLink()
    receiver = ReceiveAhead(NoRoom(), inbox)
    receiver.start()
    with pytest.raises(LinkClosed):
        inbox.receive()
    receiver.join()
    assert receiver.broken.peer == 3 and "no memory for what arrived" in str(receiver.broken)
