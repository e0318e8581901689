"""Calls of a session at awkward moments and of a wrong kind: no hang, no name taken, nothing left, nothing mixed up."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from conftest import save_tiny, speech, tiny_model
from test_engine import collect, config, digest, run, speak, with_engine

from liveavatar import core, ops
from liveavatar.conditioning.behaviour import LIDS_AND_HEAD
from liveavatar.config import Config, ModelConfig
from liveavatar.core import InputError, RankFailure, SessionClosed
from liveavatar.runtime.sources import open_source


def test_a_live_utterance_is_spoken_to_its_end(tiny_folder, portrait):
    pcm = np.full(7680 + 4000, 0.25, np.float32)

    async def scenario(engine):
        session = await engine.open(portrait, pace="live")
        await session.push_audio(pcm)
        outputs = await collect(session, 2)
        while np.concatenate([o.pcm for o in outputs]).sum() < pcm.sum() - 1:
            outputs += await collect(session, 1)
        await session.close()

    run(with_engine, config(tiny_folder), scenario, timeout=60)


def test_an_end_waits_for_what_was_pushed_before_it(tiny_folder, portrait):
    pcm = speech(3)

    async def scenario(engine):
        session = await engine.open(portrait)
        calls = [asyncio.create_task(session.push_audio(part)) for part in np.split(pcm, 3)]
        calls.append(asyncio.create_task(session.end_audio()))
        await asyncio.sleep(0.2)
        late = asyncio.create_task(session.push_audio(pcm))
        outputs = await collect(session)
        await asyncio.gather(*calls)
        with pytest.raises(SessionClosed, match="ended"):
            await late
        return np.concatenate([o.pcm for o in outputs])

    assert np.array_equal(run(with_engine, config(tiny_folder, queued_seconds=0.7, in_flight=1), scenario)[: len(pcm)], pcm)


WRONG = (
    {"picture": None}, {"picture": object()}, {"picture": np.zeros((3, 64, 64), np.uint8)[:, ::-1]},
    {"picture": torch.zeros(3, 0, 5, dtype=torch.uint8)}, {"prompt": 3}, {"seed": 1.5}, {"seed": "x"},
    {"name": 5}, {"name": "\ud800"}, {"name": "two\nlines"}, {"name": ""},
)  # fmt: skip


def test_arguments_of_a_wrong_kind_take_no_place(tiny_folder, portrait):
    async def scenario(engine):
        for wrong in WRONG:
            with pytest.raises(InputError):
                await engine.open(**{"picture": portrait, **wrong})
            assert not engine.sessions, wrong
        assert len(await speak(await engine.open(portrait), speech(0.3))) == 1

    run(with_engine, config(tiny_folder, sessions=1), scenario)


def test_a_head_is_turned_from_its_block_on(tmp_path, tiny_folder, portrait):
    folder = save_tiny(tmp_path, transformer=tiny_model(cond_dim=20), control=LIDS_AND_HEAD)

    def scenario(poses, *cut):
        async def played(engine):
            session = await engine.open(portrait, seed=1, name="a")
            for wrong, why in ((np.zeros(3), "n,3"), (np.zeros((4, 2)), "n,3"), ("left", "n,3"), ([[0, 16, 0]], "15 degrees"), ([[0, np.nan, 0]], "15 degrees")):
                with pytest.raises(InputError, match=why):
                    session.push_head(wrong)
            session.push_head(poses)
            return [x[3] for x in digest(await speak(session, speech(3 * 0.48)))]

        return run(with_engine, config(folder, *cut), played)

    there = np.repeat([[0, 0, 0], [6, -3, 1]], 12, axis=0)
    still, turned = scenario(torch.zeros(30, 3)), scenario(there)
    assert still[0] == turned[0] and still[1] != turned[1]
    assert scenario(there, 2, "local") == turned, "it reaches other processes"

    async def untold(engine):
        with pytest.raises(InputError, match="not told how to hold it"):
            (await engine.open(portrait)).push_head([[0, 0, 0]])

    run(with_engine, config(tiny_folder), untold)


def test_a_seed_may_be_numpys_and_crosses_to_other_processes(tiny_folder, portrait):
    async def scenario(engine):
        return digest(await speak(await engine.open(portrait, seed=np.int64(3)), speech(0.3)))

    assert run(with_engine, config(tiny_folder, 2, "local"), scenario) == run(with_engine, config(tiny_folder), scenario)


def test_an_unnamed_session_takes_a_free_name(tiny_folder, portrait):
    async def scenario(engine):
        await engine.open(portrait, name="session-1")
        return (await engine.open(portrait)).name

    assert run(with_engine, config(tiny_folder), scenario) == "session-2"


@pytest.mark.parametrize("fault", ["rank", "aclose"])
def test_a_call_whose_message_is_on_its_way_ends_with_the_chain(tiny_folder, portrait, fault):
    failure, reached = RankFailure(0, ("condition",), "died"), threading.Event()

    async def scenario(engine):
        session = await engine.open(portrait)
        gate, send = threading.Event(), engine.chain.send

        def stuck(message):
            reached.set()
            gate.wait(10)
            if fault == "rank":
                raise failure
            send(message)

        engine.chain.send = stuck
        interrupting = asyncio.create_task(session.interrupt())
        await asyncio.to_thread(reached.wait)
        closing = asyncio.create_task(engine.aclose()) if fault == "aclose" else None
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(RankFailure if fault == "rank" else SessionClosed):
            await asyncio.wait_for(interrupting, 20)
        if closing:
            await closing

    run(with_engine, config(tiny_folder), scenario)


def test_a_session_closed_while_it_opens_leaves_nothing(tiny_folder, portrait, monkeypatch):
    sent = []

    async def scenario(engine):
        send = engine.chain.send
        monkeypatch.setattr(engine.chain, "send", lambda message: (sent.append(type(message)), send(message)))
        opening = asyncio.create_task(engine.open(portrait, name="gone"))
        while "gone" not in engine.sessions:
            await asyncio.sleep(0)
        await engine.sessions["gone"].close()
        with pytest.raises(SessionClosed):
            await opening

    run(with_engine, config(tiny_folder), scenario)
    assert core.Open not in sent[sent.index(core.Close) :]


def test_a_failed_open_leaves_its_name_to_the_next_one(tiny_folder, portrait):
    async def scenario(engine):
        async def as_soon_as_it_is_free():
            while "x" not in engine.sessions:
                await asyncio.sleep(0)
            while "x" in engine.sessions:
                await asyncio.sleep(0)
            return await engine.open(portrait, name="x")

        second = asyncio.create_task(as_soon_as_it_is_free())
        with pytest.raises(InputError, match="too many"):
            await engine.open(portrait, name="x", prompt="word " * 600)
        opened = await second
        assert engine.sessions["x"] is opened

    run(with_engine, config(tiny_folder), scenario, timeout=30)


def test_a_late_portrait_does_not_reach_the_next_session_of_that_name(tiny_folder, portrait):
    fitting = asyncio.Event()

    async def scenario(engine):
        session, fitted = await engine.open(portrait, name="x"), engine.fitted

        async def slowly(picture):
            await fitting.wait()
            return await fitted(picture)

        engine.fitted = slowly
        late = asyncio.create_task(session.set_reference(portrait.flip(1)))
        await asyncio.sleep(0)
        engine.fitted = fitted
        await session.close()
        await engine.open(portrait, name="x")
        fitting.set()
        with pytest.raises(SessionClosed):
            await late

    run(with_engine, config(tiny_folder), scenario)


@pytest.mark.parametrize("fast, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_where_the_cpu_is_fast_at_it(fast, expected, tiny_folder, monkeypatch):
    monkeypatch.setattr(ops, "cpu_is_fast_at_bfloat16", lambda: fast)
    source = open_source(Config(model=ModelConfig(path=str(tiny_folder))))
    assert source.dtype(torch.device("cpu")) == expected and source.dtype(torch.device("cuda")) == torch.bfloat16
