"""A live session over the real engine and the test card: what a viewer gets, through interruptions and a dying chain."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from liveavatar.config import Config, RuntimeConfig
from liveavatar.core import InputError
from liveavatar.serving import ladder, testcard
from liveavatar.serving.packets import H264, OPUS, Tick
from liveavatar.serving.problems import BufferFull, Capacity, Conflict
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig, SessionsConfig
from liveavatar.serving.studio import Studio


class Viewer:
    """Keeps all it is given."""

    def __init__(self, *wants: str):
        self.name, self.wants, self.items, self.flushed, self.closed = "viewer", frozenset(wants or ("raw",)), [], [], False

    def put(self, item):
        self.items.append(item)

    def flush(self, epoch):
        self.flushed.append((epoch, len(self.items)))

    def close(self):
        self.closed = True

    @property
    def ticks(self) -> list[Tick]:
        return [item for item in self.items if isinstance(item, Tick)]


def tone(seconds: float, rate: int = 24_000) -> np.ndarray:
    return (8000 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)).astype(np.int16)


@asynccontextmanager
async def studio(room: int = 2, **settings):
    made = Studio(ServeConfig(engine_kind="testcard", engine=Config(runtime=RuntimeConfig(sessions=room)), **settings))
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()


def role(portrait, avatar: str = "a") -> Role:
    return Role(avatar=avatar, picture=portrait)


async def until(condition, seconds: float = 8.0):
    """Wait for something that must happen; the bound is for a machine that is busy."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not happen"
        await asyncio.sleep(0.02)


def names(live) -> list[str]:
    return [event.name for event in live.happenings]


def test_speech_is_shown_and_heard_together_and_its_segment_is_announced(portrait):
    async def run():
        async with studio() as s:
            live = await s.open(role(portrait))
            live.add_sink(viewer := Viewer("raw", H264, OPUS))
            await live.push_audio(tone(0.7), 24_000, segment=5, end=True)
            await until(lambda: "speak.finished" in names(live))
            await live.close()
            return live, viewer

    live, viewer = asyncio.run(run())
    ticks = viewer.ticks
    assert [t.index for t in ticks] == list(range(ticks[0].index, ticks[0].index + len(ticks)))
    loud = [np.abs(t.sound.astype(int)).max() > 4000 for t in ticks]
    wide = [testcard.mouth_open(t.picture) > 0.15 for t in ticks]
    assert sum(loud) in (17, 18) and sum(a != b for a, b in zip(loud, wide)) <= 2  # the model hears 16 kHz, the viewer 48: edges differ
    said = [(t.index, m.name, m.segment) for t in ticks for m in t.marks]
    spoken = [t.index for t, heard in zip(ticks, loud) if heard]
    assert said == [(spoken[0], "started", 5), (spoken[-1], "finished", 5)]
    finished = next(e for e in live.happenings if e.name == "speak.finished")
    assert finished.data == {"segment": 5, "position_ms": 700, "interrupted": False}
    pictures = [p for p in viewer.items if not isinstance(p, Tick) and p.codec == H264]
    shown = [t.index * 3600 for t in ticks]
    assert pictures[0].keyframe and [p.pts for p in pictures] in (shown, shown[:-1])  # the last may be in the encoder when the session ends
    assert viewer.closed and live.state == "closed"


def test_after_an_interruption_nothing_of_the_old_epoch_is_seen_or_heard(portrait):
    async def run():
        async with studio() as s:
            live = await s.open(role(portrait))
            live.add_sink(viewer := Viewer())
            await live.push_audio(tone(5.0), 24_000, segment=1)
            await until(lambda: live.speech.position_ms > 300)
            done = await live.interrupt()
            await until(lambda: len(viewer.items) > viewer.flushed[0][1])
            await live.push_audio(tone(0.3), 24_000, epoch=0)  # a straggler of the old epoch
            await live.push_audio(tone(0.3) // 4, 24_000, segment=2, end=True)
            await until(lambda: names(live).count("speak.finished") == 2)
            await live.close()
            return live, viewer, done

    live, viewer, done = asyncio.run(run())
    (epoch, at), = viewer.flushed
    after = [item for item in viewer.items[at:] if isinstance(item, Tick)]
    assert done.epoch == epoch == 1 and 300 < done.position_ms < 3000 and live.stale_pushes == 1
    assert all(t.epoch == 1 for t in after)
    assert not after[0].sound[400:].any()  # what was cut off is faded within 8 ms
    peaks = [int(np.abs(t.sound.astype(int)).max()) for t in after[1:]]
    assert max(peaks) < 2100 and sum(peak > 1000 for peak in peaks) in (7, 8)  # 0.3 s of segment 2 and nothing of the five seconds
    assert testcard.read_code(after[-1].picture)[1] == 1  # painted for the new epoch
    ends = [e.data for e in live.happenings if e.name == "speak.finished"]
    assert ends[0] == {"segment": 1, "position_ms": done.position_ms, "interrupted": True} and ends[1]["position_ms"] == 300


def test_a_dead_chain_is_started_again_the_picture_goes_on_and_no_word_is_lost(portrait):
    async def run():
        async with studio() as s:
            live = await s.open(role(portrait))
            live.add_sink(viewer := Viewer())
            ramp = np.repeat(np.arange(1, 51, dtype=np.int16) * 400, 640)  # tick n of the speech sounds like n
            await live.push_audio(ramp, 16_000, segment=1, end=True)
            await until(lambda: live.speech.position_ms > 400)
            s.engine.chain.fail()
            await until(lambda: "speak.finished" in names(live))
            restarts = s.restarts
            await live.close()
            return live, viewer, restarts

    live, viewer, restarts = asyncio.run(run())
    heard = [round(int(np.median(t.sound)) / 400) for t in viewer.ticks if t.sound.any()]
    assert heard == list(range(1, 51)) and restarts == 1
    assert [e.data["state"] for e in live.happenings if e.name == "engine"] == ["lost", "up"]
    indices = [t.index for t in viewer.ticks]
    assert indices == list(range(indices[0], indices[0] + len(indices)))  # not one tick without a picture


def test_the_mark_names_who_is_shown(portrait):
    """The watermark says which avatar it is (WM-1): after another portrait it says the other one."""
    drawn = {"a": 10, "b": 20}

    def marker(role, height, width):
        return lambda picture: np.full_like(picture, drawn[role.avatar])

    async def run():
        made = Studio(ServeConfig(engine_kind="testcard"), marker=marker)
        await made.start()
        live = await made.open(role(portrait))
        live.add_sink(viewer := Viewer())
        await until(lambda: viewer.ticks)
        await live.set_reference("b", portrait)
        count = len(viewer.ticks)
        await until(lambda: len(viewer.ticks) > count + 1)
        await made.aclose()
        return [int(tick.picture[0, 0, 0]) for tick in viewer.ticks]

    seen = asyncio.run(run())
    assert seen[0] == 10 and seen[-1] == 20


def test_full_closed_and_refused(portrait):
    async def run():
        async with studio(room=1) as s:
            with pytest.raises(InputError):
                await s.open(role(b"no picture"))
            live = await s.open(role(portrait))
            with pytest.raises(Capacity, match="all 1 sessions are taken") as refused:
                await s.open(role(portrait))
            assert refused.value.headers["Retry-After"] and refused.value.status == 503
            with pytest.raises(BufferFull):
                await live.push_audio(tone(61), 24_000)
            await live.close()
            await live.close()
            with pytest.raises(Conflict, match="is closed"):
                await live.push_audio(tone(0.1), 24_000)
            again = await s.open(role(portrait))
            assert again.id != live.id and list(s.sessions) == [again.id]
            s.draining = True
            with pytest.raises(Capacity) as refused:
                await s.open(role(portrait))
            await s.aclose()
            assert refused.value.kind == "draining" and not s.sessions and again.reason == "drain"

    asyncio.run(run())


def test_a_session_nobody_watches_costs_no_blocks_until_it_speaks(portrait):
    async def run():
        async with studio(sessions=SessionsConfig(park_seconds=0.2)) as s:
            live = await s.open(role(portrait))
            for viewer in (viewers := [Viewer(), Viewer()]):
                live.add_sink(viewer)
            await until(lambda: len(viewers[1].ticks) > 10)
            assert not live._engine.parked
            for viewer in viewers:
                live.remove_sink(viewer)
            left = live.used_at
            await until(lambda: live._engine.parked)
            live.remove_sink(viewers[0])  # a connection that is closed twice: the lease counts from the last viewer (API-2)
            assert live.used_at == left
            await asyncio.sleep(0.6)
            before = live.gauges.blocks
            await asyncio.sleep(0.7)
            assert live.gauges.blocks == before
            await live.push_audio(tone(0.3), 24_000, end=True)
            await until(lambda: "speak.finished" in names(live))

    asyncio.run(run())


def test_a_session_that_fails_gives_its_place_in_the_chain_back(portrait):
    async def run():
        async with studio(room=1) as s:
            live = await s.open(role(portrait))
            live._engine.fail(InputError("the chain refuses its new portrait"))
            await until(lambda: live.state == "failed" and not s.engine.sessions)
            await s.open(role(portrait))

    asyncio.run(run())


def test_opening_that_fails_leaves_no_place_taken(portrait):
    async def run():
        async with studio(room=1) as s:
            s._marker = lambda *_: {}["no key"]
            with pytest.raises(KeyError):
                await s.open(role(portrait))
            s._marker = lambda *_: lambda picture: picture
            await s.open(role(portrait))

    asyncio.run(run())


def test_after_an_interruption_the_picture_goes_on_at_once(portrait):
    """Pictures that waited are gone, so the next block is due now and not when they would have been shown."""
    async def run():
        async with studio() as s:
            live = await s.open(role(portrait))
            live.add_sink(viewer := Viewer())
            await until(lambda: len(live.playout) > 10)
            before = len(viewer.ticks)
            await live.interrupt()
            await until(lambda: any(tick.kind == "idle" for tick in viewer.ticks[before + 1 :]))
            return [tick.kind for tick in viewer.ticks[before + 1 :]]

    assert asyncio.run(run()).index("idle") < 4  # of the ten and more that were thrown away


def test_an_interruption_or_a_beginning_is_no_overload(portrait):
    async def run():
        async with studio() as s:
            s.engine.chain.block_seconds = 0.25  # so long without pictures, each time
            live = await s.open(role(portrait))
            live.add_sink(Viewer())
            for _ in range(4):
                await asyncio.sleep(0.5)
                await live.interrupt()
            assert live.factor._missing < live.gauges.kinds["filler"] / 4 > 4

    asyncio.run(run())


def test_a_server_that_is_too_slow_leaves_things_out_and_gives_them_back(portrait, monkeypatch):
    """BP-2: fewer pictures, then none of who is silent, each told and shown; speech still comes, nobody else is let in."""
    for name, value in {"WINDOW": 25, "PERSIST_SECONDS": 0.6, "CALM_SECONDS": 0.8}.items():
        monkeypatch.setattr(ladder, name, value)

    def steps(live) -> list[int]:
        return [event.data["step"] for event in live.happenings if event.name == "degraded"]

    async def run():
        async with studio() as s:
            live = await s.open(role(portrait))
            live.add_sink(viewer := Viewer(H264, "raw"))
            await until(lambda: live.playout.can_loop)
            s.engine.chain.block_seconds = 0.8  # of 0.48 s of pictures
            await until(lambda: live.rung is ladder.IDLE_LOOP and live.broadcast.filler == "degraded", 15)
            shown, stats = len(viewer.items), live.stats()
            with pytest.raises(Capacity, match="too slow already"):
                await s.open(role(portrait))
            await live.push_audio(tone(0.4), 24_000, segment=3, end=True)
            await until(lambda: "speak.finished" in names(live))
            s.engine.chain.block_seconds = 0.0
            await until(lambda: live.rung is ladder.GROUND, 15)
            await s.open(role(portrait))
            return live, viewer.items[shown:], steps(live), stats

    live, items, told, stats = asyncio.run(run())
    assert told[:3] == [2, 3, 5] and told[-1] == 0 and (stats["degradation_step"], stats["left_out"]) == (5, ladder.IDLE_LOOP.what)
    ticks, pictures = [t.index for t in items if isinstance(t, Tick)], [p.pts // 3600 for p in items if not isinstance(p, Tick)]
    assert ticks == list(range(ticks[0], ticks[0] + len(ticks)))  # no tick is lost, and of those of the first second every second picture
    # An encoder's picture may come after the next tick, so that the cut's first may be of the tick before it.
    assert [n for n in pictures if ticks[0] <= n < ticks[0] + 20] == [n for n in ticks[:20] if n % 2 == 0]
    moving = [t for t in items if isinstance(t, Tick)][:12]
    assert any(not np.array_equal(a.picture, b.picture) for a, b in zip(moving, moving[1:]))  # an idle loop moves


def test_fifty_sessions_leave_nothing_behind(portrait):
    async def run():
        async with studio(room=1) as s:
            before = len(asyncio.all_tasks())
            for _ in range(50):
                live = await s.open(role(portrait))
                live.add_sink(Viewer("raw", H264))
                await live.close()
            assert len(asyncio.all_tasks()) == before and not s.sessions and not s.engine.sessions

    asyncio.run(run())
