"""Decode on a rank with steps: the same pictures whether it runs beside them or after them."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from test_register import config_of, played, script

from liveavatar.core import Block, Frames, Span
from liveavatar.runtime.beside import Decoding, DecoderBeside, decoder_on
from liveavatar.runtime.links import QueueLink
from liveavatar.runtime.pump import Pump
from liveavatar.runtime.roles import Decoder
from liveavatar.runtime.stage_roles import build_stage


def frames(heard: dict) -> dict:
    return {key: [(m.index, m.epoch, m.pictures.clone()) for m in messages] for key, messages in heard.items() if key[1] == "Frames"}


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys() and one
    for key in one:
        for mine, theirs in zip(one[key], two[key], strict=True):
            assert mine[:2] == theirs[:2] and torch.equal(mine[2], theirs[2])


def test_on_a_cpu_decode_follows_the_step(tiny_folder):
    decoder = Decoder(None)
    assert decoder_on(decoder, torch.device("cpu"), shares=True) is decoder
    same(frames(played(config_of(tiny_folder, decode_beside=True), script())[0]), frames(played(config_of(tiny_folder), script())[0]))


def test_the_wait_for_a_decode_is_its_own_blocks_alone():
    holder, spans = DecoderBeside.__new__(DecoderBeside), []
    holder.decoder, pictures = Decoder(None), torch.zeros(12, 2, 2, 3, dtype=torch.uint8)
    holder._queued = deque(Decoding(Block("s", index=n), pictures, SimpleNamespace(synchronize=lambda: None)) for n in (4, 5))
    Pump([holder], QueueLink(), None, spans.append, traced=0)._advance(0)
    assert [(type(m), m.index) for m in spans] == [(Span, 4), (Frames, 4)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", [{}, {"shift_register": True, "batch": 2}])
def test_on_a_gpu_decode_beside_the_steps_gives_the_same_pictures(runtime, tiny_folder):
    from dataclasses import replace

    def run(beside: bool) -> dict:
        config = config_of(tiny_folder, decode_beside=beside, **runtime)
        config = replace(config, model=replace(config.model, device="cuda"))
        roles, messages, heard = build_stage(config, config.chain, torch.device("cuda")), script(), {}
        assert isinstance(roles[-1], DecoderBeside) == beside
        inbox = QueueLink(len(messages))
        for message in messages:
            inbox.send(message)
        inbox.close()
        Pump(roles, inbox, None, lambda m: heard.setdefault((m.session, type(m).__name__), []).append(m)).run()
        assert all(m.pictures.is_cpu for (_, kind), came in heard.items() if kind == Frames.__name__ for m in came)
        return frames(heard)

    same(run(True), run(False))
