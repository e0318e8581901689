"""What a running server exports: sessions over the real engine and the test card, watched through interruption and a dying chain."""

import asyncio

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")

from test_live import Viewer, role, tone, until
from test_metrics import values

from liveavatar.config import Config, RuntimeConfig
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.monitor import watch_studio
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.stages import Stages
from liveavatar.serving.studio import Studio


def watched(scenario, folder) -> tuple[dict[str, float], object]:
    """Run scenario(studio, metrics) on a studio; returns what it exports at the end, and the outcome."""
    metrics = Metrics(version="1")

    async def run():
        studio = Studio(ServeConfig(engine_kind="testcard", engine=Config(runtime=RuntimeConfig(sessions=2))), metrics=metrics,
                        notes=Stages(metrics, engine="testcard").note)  # fmt: skip
        watch_studio(metrics, studio, folder)
        await studio.start()
        try:
            return await scenario(studio, metrics)
        finally:
            await studio.aclose()

    outcome = asyncio.run(asyncio.wait_for(run(), 60))
    return values(metrics), outcome


def named(name: str, *wants: str) -> Viewer:
    viewer = Viewer(*wants)
    viewer.name = name
    return viewer


def kept(gate: asyncio.Event, reopen):
    """A reopening that waits for the gate, so that the gap is long enough to be seen."""
    async def later(role):
        await gate.wait()
        return await reopen(role)

    return later


def test_a_conversation_is_counted(portrait, tmp_path):
    async def talk(studio, metrics):
        live = await studio.open(role(portrait))
        viewer = named("webrtc:4f2a", "raw", "h264", "opus")
        live.add_sink(viewer)
        await live.push_audio(tone(1.0), 24_000)
        await until(lambda: sum(tick.kind == "speech" for tick in viewer.ticks) > 8)
        during = values(metrics)
        await live.interrupt()
        ticks = len(viewer.ticks)
        await until(lambda: len(viewer.ticks) > ticks + 2)
        await live.close()
        return during, viewer

    after, (during, viewer) = watched(talk, tmp_path)
    assert during['sessions_active{mode="conversation"}'] == 1 == during['viewers_active{sink="webrtc"}'] and during['engine_up{group="0"}'] == 1
    assert 0 < during['audio_buffered_seconds{group="0"}'] < 1 and during['queue_capacity{edge="audio_in"}'] == 60
    assert during["draining"] == 0 < during['process_open_tasks{process="head"}'] and 0 <= during["disk_free_ratio"] <= 1
    assert after['sessions_active{mode="conversation"}'] == 0 == after['viewers_active{sink="webrtc"}'] and after["draining"] == 1
    assert after['frames_sent_total{sink="webrtc"}'] == len(viewer.ticks) == after['encode_seconds_count{codec="h264"}']
    assert after['frame_interval_seconds_count{sink="webrtc"}'] >= len(viewer.ticks) - 1
    assert after['frames_generated_total{engine="testcard"}'] > sum(tick.kind != "filler" for tick in viewer.ticks)
    assert after['sessions_created_total{mode="conversation"}'] == after['session_create_seconds_count{engine="testcard"}'] == 1
    assert after['interrupts_total{reason="api"}'] == 1 == after['sessions_ended_total{reason="closed"}']
    assert after['first_frame_seconds_count{engine="testcard"}'] == 1


def test_a_chain_that_dies_shows(portrait, tmp_path):
    async def lose(studio, metrics):
        live = await studio.open(role(portrait))
        live.add_sink(viewer := named("livekit"))
        await until(lambda: len(viewer.ticks) > 3)
        studio.sessions[live.id]._reopen = kept(gate := asyncio.Event(), live._reopen)
        studio.engine.chain.fail()
        await until(lambda: viewer.ticks[-1].kind == "filler")
        during = values(metrics)
        gate.set()
        await until(lambda: studio.restarts == 1 and viewer.ticks[-1].kind != "filler")
        await live.close("drain")
        return during, sum(tick.kind == "filler" for tick in viewer.ticks)

    seen, (during, filler) = watched(lose, tmp_path)
    assert during['filler_active{output="livekit",reason="restart"}'] == 1 and 'filler_active{output="livekit",reason="restart"}' not in seen
    assert seen['engine_restarts_total{group="0",reason="rank_failure"}'] == 1 == seen['engine_restore_seconds_count{group="0"}']
    assert seen['engine_up{group="0"}'] == 1 and seen['sessions_ended_total{reason="drain"}'] == 1
    assert sum(value for name, value in seen.items() if name.startswith("filler_seconds_total")) == pytest.approx(0.04 * filler)
