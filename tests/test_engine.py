"""The head over real chains: a tiny checkpoint, several cuts, interleaved sessions, control, faults."""

import asyncio
import dataclasses
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import save_tiny, speech, tiny_model

from liveavatar import core
from liveavatar.config import Config, ModelConfig, RuntimeConfig, SamplerConfig, VideoConfig
from liveavatar.core import ConfigError, InputError, PlacementError, RankFailure, SessionClosed
from liveavatar.evaluation import gate_runs
from liveavatar.runtime import engine as engine_module
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.placement import cut, fewer_steps
from liveavatar.runtime.roles import Denoiser, StageSinks
from liveavatar.runtime.stage_roles import build_stage

CHAIN = Config().chain
AHEAD = 1320 / 16000  # seconds the log-mel front end looks ahead


def config(folder, ranks: int = 1, launcher: str = "inproc", **runtime) -> Config:
    base = Config(model=ModelConfig(path=str(folder), dtype="float32", device="cpu"), sampler=SamplerConfig(steps=2, refresh_block=2),
                  runtime=RuntimeConfig(launcher=launcher, threads=1, **runtime), seed=7)
    return dataclasses.replace(base, stages=cut(base.chain, ranks))


def run(scenario, *args, timeout: float = 300):
    """Run an async scenario; a hang is a failure, not a wait."""
    async def bounded():
        return await asyncio.wait_for(scenario(*args), timeout)

    return asyncio.run(bounded())


async def with_engine(settings: Config, scenario):
    engine = await Engine.start(settings)
    try:
        return await scenario(engine)
    finally:
        await engine.aclose()


async def collect(session, count: int | None = None) -> list:
    outputs = []
    while count is None or len(outputs) < count:
        try:
            outputs.append(await anext(session))
        except StopAsyncIteration:
            break
    return outputs


async def speak(session, pcm, chunk: int = 1000) -> list:
    """Push while taking, as a client does; returns all outputs."""
    async def feed():
        for start in range(0, len(pcm), chunk):
            await session.push_audio(pcm[start : start + chunk])
        await session.end_audio()

    feeding = asyncio.create_task(feed())
    outputs = await collect(session)
    await feeding
    return outputs


def digest(outputs) -> list:
    return [(o.index, o.epoch, o.pts, o.pictures.tobytes(), o.pcm.tobytes()) for o in outputs]


# ---------------------------------------------------------------- a stream


def test_a_stream_from_start_to_end(tiny_folder, portrait):
    pcm = speech(5 * 0.48 + 0.1)

    async def scenario(engine):
        session = await engine.open(portrait, prompt="a person")
        outputs = await speak(session, pcm)
        await session.close()
        assert not engine.sessions
        return outputs

    outputs = run(with_engine, config(tiny_folder), scenario)
    assert [o.pictures.shape for o in outputs] == [(12, 64, 64, 3)] * 5 + [(3, 64, 64, 3)]
    assert all(o.pictures.dtype == np.uint8 and o.pcm.dtype == np.float32 for o in outputs)
    assert [o.pts for o in outputs] == [Fraction(12 * b, 25) for b in range(6)]
    sound = np.concatenate([o.pcm for o in outputs])
    assert np.array_equal(sound[: len(pcm)], pcm) and not sound[len(pcm) :].any()
    assert len({o.pictures[:3].tobytes() for o in outputs}) == 6


@pytest.mark.parametrize("position, anchors, blocks", [(44_990, 0, 3), (2**31, 1, 6)])
def test_the_counter_may_start_anywhere(tiny_folder, portrait, position, anchors, blocks):
    """Counter warp: the Engine far in a stream is the rollout numbered so, with anchors too; its pictures are those of no other place."""
    pcm, made, portrait = speech(blocks * 0.48 + AHEAD), {}, portrait[:, :64, :64]
    for start in (0, position):
        settings = config(tiny_folder)
        settings = dataclasses.replace(settings, sampler=SamplerConfig(steps=2, refresh_block=0, first_position=start, anchor_blocks=anchors))

        async def scenario(engine):
            session = await engine.open(portrait, prompt="a person", seed=0, name=gate_runs.SESSION)
            return np.concatenate([o.pictures for o in await speak(session, pcm)])[: 12 * blocks]

        made[start] = run(with_engine, settings, scenario)
        alone = gate_runs.Avatar(settings)
        assert alone.geometry.first_block == start // 3
        assert np.array_equal(made[start], alone.make(portrait.permute(1, 2, 0).numpy(), pcm, "a person", blocks, 0)[1])
    assert not np.array_equal(made[0], made[position]) and made[position].std() > 0


async def script(engine, portrait):
    """Two interleaved sessions with a refresh, a prompt, a portrait, an interrupt and a demanded refresh; all at known blocks."""
    a, b = await engine.open(portrait, seed=1, name="a"), await engine.open(portrait.flip(2), seed=2, name="b")
    other = asyncio.create_task(speak(b, speech(6 * 0.48, seed=2)))
    await a.push_audio(speech(4 * 0.48 + AHEAD, seed=1))
    seen = await collect(a, 4)
    await a.set_prompt("somebody else")
    await a.push_audio(speech(0.48, seed=3))
    seen += await collect(a, 1)
    await a.set_reference(portrait.flip(1))
    await a.push_audio(speech(0.48, seed=4))
    seen += await collect(a, 1)
    await a.refresh()
    await a.push_audio(speech(0.48, seed=5))
    seen += await collect(a, 1)
    assert await a.interrupt() == 1
    seen += await speak(a, speech(0.9, seed=6))
    return digest(seen), digest(await other)


@pytest.fixture(scope="module")
def whole(tiny_folder, portrait):
    """The script on one rank."""
    return run(with_engine, config(tiny_folder), lambda engine: script(engine, portrait))


@pytest.mark.parametrize("ranks, launcher", [(2, "inproc"), (4, "inproc"), (2, "local")])
def test_every_cut_gives_the_same_bytes(tiny_folder, portrait, whole, ranks, launcher):
    assert run(with_engine, config(tiny_folder, ranks, launcher), lambda engine: script(engine, portrait)) == whole


def test_a_new_sink_in_slices_comes_at_its_block_whatever_the_cut(tiny_folder, portrait, whole):
    """Slices before blocks 2, 3 and 4, a prompt before block 4 whether or not its slice went ahead: the rollout that refreshes at 4."""
    def sliced(settings):
        return dataclasses.replace(settings, sampler=dataclasses.replace(settings.sampler, refresh_slices=3))

    one, *others = (run(with_engine, sliced(config(tiny_folder, ranks)), lambda engine: script(engine, portrait)) for ranks in (1, 2, 4))
    assert others == [one, one]
    assert [[x[3] == y[3] for x, y in zip(*pair)] for pair in zip(one, whole)] == [[True] * 2 + [False] * 7, [True] * 2 + [False] * 4]
    pcm, small = speech(6 * 0.48 + AHEAD), portrait[:, :64, :64]

    async def scenario(engine):
        session = await engine.open(small, prompt="a person", seed=0, name=gate_runs.SESSION)
        return np.concatenate([o.pictures for o in await speak(session, pcm)])[: 12 * 6]

    alone = gate_runs.Avatar(sliced(config(tiny_folder)))
    assert alone.source.swap_block == 4
    assert np.array_equal(run(with_engine, sliced(config(tiny_folder)), scenario), alone.make(small.permute(1, 2, 0).numpy(), pcm, "a person", 6, 0)[1])


def test_sessions_do_not_influence_each_other(tiny_folder, portrait, whole):
    async def scenario(engine):
        b = await engine.open(portrait.flip(2), seed=2, name="b")
        return digest(await speak(b, speech(6 * 0.48, seed=2), chunk=7777))

    assert run(with_engine, config(tiny_folder), scenario) == whole[1]


def test_every_control_changes_the_picture_from_its_block_on(tiny_folder, portrait, whole):
    async def scenario(engine):
        a = await engine.open(portrait, seed=1, name="a")
        pcm = np.concatenate([speech(4 * 0.48 + AHEAD, seed=1), *(speech(0.48, seed=s) for s in (3, 4, 5))])
        return digest(await speak(a, pcm))

    plain = run(with_engine, config(tiny_folder), scenario)
    same = [x[3] == y[3] for x, y in zip(plain, whole[0])]
    assert same[:4] == [True] * 4 and not any(same[4:7])
    assert [x[1] for x in whole[0]] == [0] * 7 + [1] * 2 and [x[0] for x in whole[0]] == list(range(9))


def test_same_seed_same_bytes_and_another_seed_others(tiny_folder, portrait):
    async def scenario(engine):
        results = []
        for seed in (3, 3, 4):
            session = await engine.open(portrait, seed=seed, name="again")
            results.append(digest(await speak(session, speech(1.0))))
            await session.close()
        return results

    first, again, other = run(with_engine, config(tiny_folder), scenario)
    assert first == again and first != other


def test_refresh_happens_at_its_block_and_zero_is_never(tiny_folder, portrait):
    async def scenario(engine):
        return [o.pictures.tobytes() for o in await speak(await engine.open(portrait), speech(4 * 0.48))]

    runs = {}
    for block in (0, 1, 3, 9):
        settings = config(tiny_folder, 2)
        settings = dataclasses.replace(settings, sampler=dataclasses.replace(settings.sampler, refresh_block=block))
        runs[block] = run(with_engine, settings, scenario)
    assert runs[0] == runs[9]
    assert [a == b for a, b in zip(runs[0], runs[3])] == [True, True, True, False]
    assert [a == b for a, b in zip(runs[0], runs[1])] == [True, False, False, False]


# ---------------------------------------------------------------- bounds


def test_a_block_may_leave_its_last_step_out(tiny_folder):
    """BP-2: block by block, the same bytes as a chain that was built without that step; the step begins its history anew."""
    def heard(finish_in_config, wanted):
        settings = dataclasses.replace(config(tiny_folder), sampler=SamplerConfig(finish_after=finish_in_config))
        roles, up = build_stage(settings, settings.chain, "cpu"), []

        def put(message, place=0):
            for made in roles[place](message):
                if isinstance(made, core.UPWARD):
                    up.append(made)
                else:
                    put(made, place + 1)

        put(core.Open("a", seed=1, prompt="p", picture=torch.full((3, 64, 64), 90, dtype=torch.uint8)))
        pcm = torch.from_numpy(speech(4.0))
        for index, finish in enumerate(wanted):
            start, stop = (0 if index == 0 else 7680 * index + 2000), 7680 * (index + 1) + 2000
            put(core.Audio("a", index=index, start=start, pcm=pcm[start:stop], observe=True, finish_after=finish))
        return up, roles

    cut, _ = heard(3, [None] * 3)
    (short, _), (again, roles) = heard(None, [3] * 3), heard(None, [3, 3, None, None])
    def pictures(up):
        return [m.pictures for m in up if isinstance(m, core.Frames)]

    assert all(torch.equal(a, b) for a, b in zip(pictures(cut), pictures(short), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(pictures(cut)[:2], pictures(again)[:2])) and not torch.equal(pictures(cut)[2], pictures(again)[2])
    assert [role.cache("a").written for role in roles if isinstance(role, Denoiser)] == [4, 4, 4, 2]
    assert [m.index for m in again if isinstance(m, core.CleanLatent)] == [0]
    assert [m.step for m in again if isinstance(m, core.Latents)] == [0, 1, 2, 3] * 4  # whoever looks in sees every step, idle ones too


@pytest.mark.parametrize("stages, runtime, steps", [
    (None, {}, 3), ((CHAIN[:3], CHAIN[3:]), {}, 3), ((*((name,) for name in CHAIN),), {}, None), (None, {"shift_register": True}, None),
])
def test_where_a_step_less_makes_something_faster(stages, runtime, steps):
    settings = Config(stages=stages or (CHAIN,), runtime=RuntimeConfig(**runtime))
    assert fewer_steps(settings) == steps


def test_push_audio_waits_and_the_chain_holds_no_more_than_its_credits(tiny_folder, portrait):
    async def scenario(engine):
        session = await engine.open(portrait)
        pushing = asyncio.create_task(session.push_audio(speech(20)))
        await asyncio.sleep(1.5)
        timeline = session.timeline
        assert not pushing.done() and timeline.in_flight == 3 and timeline.queued_seconds <= 2.001
        taken = await collect(session, 30)
        assert max(o.index for o in taken) == 29
        await asyncio.sleep(0.3)
        assert timeline.in_flight <= 3 and timeline.queued_seconds <= 2.001
        await session.close()
        with pytest.raises(SessionClosed):
            await pushing

    run(with_engine, config(tiny_folder, queued_seconds=2.0, in_flight=3), scenario)


def test_live_pace_fills_with_silence_and_follows_the_clock(tiny_folder, portrait):
    async def scenario(engine):
        session = await engine.open(portrait, pace="live")
        outputs = await collect(session, 2)
        assert not any(o.pcm.any() for o in outputs)
        pcm = speech(0.48 + AHEAD)
        await session.push_audio(pcm)
        while not outputs[-1].pcm.any():
            outputs += await collect(session, 1)
        assert np.array_equal(outputs[-1].pcm, pcm[:7680])
        assert [o.pts for o in outputs] == [Fraction(12 * i, 25) for i in range(len(outputs))]
        await session.close()

    run(with_engine, config(tiny_folder), scenario)


def test_sessions_are_limited_and_names_unique(tiny_folder, portrait):
    async def scenario(engine):
        first = await engine.open(portrait, name="x")
        with pytest.raises(InputError, match="'x' is taken"):
            await engine.open(portrait, name="x")
        await engine.open(portrait)
        with pytest.raises(PlacementError, match=r"holds 2 session"):
            await engine.open(portrait)
        await first.close()
        await engine.open(portrait, name="x")

    run(with_engine, config(tiny_folder, sessions=2), scenario)


# ---------------------------------------------------------------- what people get wrong


def test_bad_input_is_refused_and_the_engine_goes_on(tiny_folder, portrait, tmp_path):
    (tmp_path / "not.png").write_bytes(b"no picture")

    async def scenario(engine):
        with pytest.raises(InputError):
            await engine.open(tmp_path / "not.png")
        with pytest.raises(InputError, match="tokens"):
            await engine.open(portrait, prompt="long " * 50)  # found out by the rank: Failed comes back
        with pytest.raises(ConfigError, match="pace"):
            await engine.open(portrait, pace="slow")
        assert not engine.sessions
        good, bad = await engine.open(portrait), await engine.open(portrait)
        with pytest.raises(InputError, match="NaN"):
            await good.push_audio(np.array([np.nan], np.float32))
        await bad.set_prompt("long " * 50)
        with pytest.raises(InputError, match="tokens"):
            await collect(bad)
        with pytest.raises(InputError):
            await bad.push_audio(speech(1))
        await bad.close()
        assert len(await speak(good, speech(1.0))) == 3
        with pytest.raises(SessionClosed, match="ended"):
            await good.push_audio(speech(1))

    run(with_engine, config(tiny_folder), scenario)


def test_ending_without_audio_ends_the_iteration(tiny_folder, portrait):
    async def scenario(engine):
        session = await engine.open(portrait)
        await session.end_audio()
        return await collect(session)

    assert run(with_engine, config(tiny_folder), scenario) == []


def test_closing_in_the_middle_ends_the_iteration(tiny_folder, portrait):
    async def scenario(engine):
        session = await engine.open(portrait)
        await session.push_audio(speech(5))
        waiting = asyncio.create_task(collect(session))
        await asyncio.sleep(0.1)
        await session.close()
        await session.close()
        outputs = await waiting
        with pytest.raises(SessionClosed):
            await session.interrupt()
        return outputs

    assert len(run(with_engine, config(tiny_folder), scenario)) < 11


def test_settings_that_cannot_work_are_refused_at_start(tiny_folder, tmp_path):
    async def start(settings):
        await Engine.start(settings)

    good = config(tiny_folder)
    with pytest.raises(PlacementError, match="step1"):
        run(start, dataclasses.replace(good, stages=(("condition", "step0"), ("decode",))))
    with pytest.raises(ConfigError, match="queued_seconds"):
        run(start, config(tiny_folder, queued_seconds=0.3))
    with pytest.raises(core.WeightsError, match="no such"):
        run(start, config(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="set both"):
        run(start, dataclasses.replace(good, video=VideoConfig(height=64)))


# ---------------------------------------------------------------- faults


def test_a_failing_rank_reaches_every_session_and_caller(tiny_folder, portrait, monkeypatch):
    from liveavatar.runtime import roles

    sound = roles.Denoiser._denoise

    def breaks(self, block):
        if self.index == 1 and block.index == 2:
            raise ArithmeticError("the rank is broken")
        return sound(self, block)

    monkeypatch.setattr(roles.Denoiser, "_denoise", breaks)

    async def scenario(engine):
        one, two = await engine.open(portrait), await engine.open(portrait)
        results = await asyncio.gather(speak(one, speech(9)), speak(two, speech(9)), return_exceptions=True)
        assert all(isinstance(r, RankFailure) and "the rank is broken" in str(r) and r.rank == 1 for r in results), results
        for call in (one.push_audio(speech(1)), two.interrupt(), engine.open(portrait)):
            with pytest.raises(RankFailure):
                await call
        await one.close()

    run(with_engine, config(tiny_folder, 2), scenario)


def test_broken_weights_are_named_at_start(tmp_path):
    folder = save_tiny(tmp_path / "broken")
    (folder / "transformer.safetensors").write_bytes(b"rubbish")

    async def start():
        await Engine.start(config(folder))

    with pytest.raises((RankFailure, core.WeightsError), match="transformer.safetensors"):
        run(start)


def test_nothing_is_left_after_aclose(tiny_folder, portrait):
    before = {t for t in threading.enumerate()}

    async def scenario(engine):
        session = await engine.open(portrait)
        await session.push_audio(speech(4))
        await collect(session, 1)
        await engine.aclose()
        await engine.aclose()
        with pytest.raises(SessionClosed):
            await collect(session)

    run(with_engine, config(tiny_folder, 2), scenario)
    left = {t for t in threading.enumerate() if t.is_alive()} - before
    assert not {t for t in left if not t.daemon or t.name.startswith(("head", "rank"))}, left


# ---------------------------------------------------------------- memory


def test_state_is_dropped_at_close_and_flat_in_between(tiny_folder, portrait, monkeypatch):
    made = []
    build = engine_module.launch.__globals__["worker"].build

    def spy(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(engine_module.launch.__globals__["worker"], "build", spy)

    def held(role) -> int:
        return sum(len(v) for v in vars(role).values() if isinstance(v, (dict, set)))

    def tensors() -> int:
        import gc

        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    async def settled() -> int:
        """The least of a few counts: a rank may still hold the message of the last block."""
        counts = []
        for _ in range(5):
            counts.append(tensors())
            await asyncio.sleep(0.05)
        return min(counts)

    async def scenario(engine):
        session = await engine.open(portrait)
        sizes = []
        for part in range(3):
            await session.push_audio(speech(4 * 0.48 + (AHEAD if part == 0 else 0), seed=part))
            await collect(session, 4)
            sizes.append(await settled())
        assert sizes[1] == sizes[2], sizes
        assert all(held(role) for role in made[0] if not isinstance(role, Denoiser))  # a step's histories are with its stage's sinks
        await session.close()
        assert not any(held(role) for role in made[0]) and [len(role.spare) for role in made[0] if isinstance(role, StageSinks)] == [1]

    run(with_engine, config(tiny_folder), scenario)


def test_a_cancelled_open_leaves_nothing(tiny_folder, portrait):
    async def scenario(engine):
        opening = asyncio.create_task(engine.open(portrait, name="gone"))
        while "gone" not in engine.sessions:
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        while engine.sessions:
            await asyncio.sleep(0.01)
        await engine.open(portrait, name="gone")

    run(with_engine, config(tiny_folder, sessions=1), scenario)


def test_two_thousand_blocks_through_the_chain_in_flat_memory(tmp_path):
    """Sixteen minutes of video from one small, real checkpoint: sizes of the process, after the first 200 blocks."""
    import psutil

    folder = save_tiny(tmp_path / "small", transformer=tiny_model(dim=24, ffn_dim=24, num_heads=1, num_layers=1),
                       geometry={"height": 32, "width": 32, "block_latents": 3, "ring_blocks": 4, "motion_frames": 9})
    sizes = {}

    async def scenario(engine):
        session = await engine.open(torch.zeros(3, 64, 64, dtype=torch.uint8))

        async def feed():
            for second in range(960):
                await session.push_audio(speech(1.0, second % 7))
            await session.end_audio()

        feeding = asyncio.create_task(feed())
        async for out in session:
            if out.index % 200 == 199:
                sizes[out.index] = psutil.Process().memory_info().rss
        await feeding
        assert out.index == 1999 and out.pts == 960 - Fraction(12, 25)

    settings = config(folder)
    run(with_engine, dataclasses.replace(settings, sampler=SamplerConfig(steps=1), stages=None), scenario)
    assert max(sizes.values()) - sizes[199] < 8 * 2**20, sizes
