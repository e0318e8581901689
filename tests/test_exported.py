"""Every row of the table has a feeder: the server as `liveavatar serve` puts it together, watched, used and misused (MET-1, BP-1)."""

import asyncio
import contextlib
import datetime
import json
import logging
from dataclasses import replace

import httpx
import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")

from api_server import BASE, STATEMENT, bearer, portrait, problem, tone
from test_live import until
from test_metrics import values
from test_monitor import kept
from viewer_kit import Peer

from liveavatar.config import Config, RuntimeConfig
from liveavatar.core import ConfigError
from liveavatar.models.probe import Probe, ProbeSizes, save_probe
from liveavatar.serving import server
from liveavatar.serving.metrics import TABLE
from liveavatar.serving.problems import RateLimited
from liveavatar.serving.reloading import differing
from liveavatar.serving.settings import (
    AccessConfig, ListenConfig, MonitoringConfig, ServeConfig, SessionsConfig, SpeechConfig, StorageConfig, TalkConfig,
)  # fmt: skip
from liveavatar.serving.signing import local_chain

GPU = {row.name: "this machine may have no GPU: test_metrics plays a driver" for row in TABLE.values() if row.name.startswith("gpu_")}
ELSEWHERE = {
    **GPU, "block_seconds": "the test card has no ranks that report spans: test_metrics watches a chain of two",
    "realtime_factor": "as block_seconds", "rank_gpu_bytes": "as block_seconds",
    "frames_late_total": "only a busy machine is late: test_live", "clock_reanchors_total": "as frames_late_total",
    "audio_underruns_total": "the test card is never late: test_playout", "frames_dropped_total": "nobody is slow here: test_metrics fills a queue",
    "output_reconnects_total": "a destination that dies: test_hls, test_rtmp", "recording_errors_total": "a disk that is full: test_recorder",
    "provenance_errors_total": "nothing is wrong here: test_a_mark_that_is_not_there_is_told",
}  # fmt: skip
SIZES = ProbeSizes(size=32, widths=(16, 24), blocks=(1, 1), code=8, hidden=32, identity=8)


def whole(folder) -> ServeConfig:
    """All on that can be: a certificate, marks, a judge of faces."""
    chain, key, _ = local_chain(datetime.datetime.now(datetime.timezone.utc))
    (folder / "tls.pem").write_bytes(chain)
    (folder / "tls.key").write_bytes(key)
    save_probe(folder / "judge", Probe(SIZES), {})
    return ServeConfig(
        engine_kind="testcard", engine=Config(runtime=RuntimeConfig(sessions=2)), storage=StorageConfig(folder=str(folder / "var")),
        monitoring=MonitoringConfig(judge=str(folder / "judge")), access=AccessConfig(sessions=1),
        listen=ListenConfig(port=0, certificate=str(folder / "tls.pem"), key=str(folder / "tls.key")))  # fmt: skip


@contextlib.asynccontextmanager
async def assembled(config: ServeConfig):
    """(services, client, inspector) of a server that runs."""
    app, inspector = server.assemble(config)
    at = app.state.services
    await at.desk.studio.start()
    try:
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as http:
            http.headers.update(bearer(at.access.first_key()))
            yield at, http, inspector
    finally:
        await at.desk.studio.aclose()


async def on_air(http: httpx.AsyncClient, at) -> tuple:
    """(session, peer): a person's avatar before a viewer, a playlist, a recording, and a webhook that may not be reached."""
    photo = portrait()
    given = await http.post("/v1/consents", files={"media": photo}, data={**STATEMENT, "scope": ["conversation", "recording"], "expires_at": 4e9})
    made = await http.post("/v1/avatars", files={"portrait": photo}, data={"consent_id": given.json()["id"]})
    opened = await http.post("/v1/sessions", json={"avatar_id": made.json()["id"], "outputs": [{"kind": "hls"}, {"kind": "record"}]})
    assert opened.status_code == 201, opened.text
    live, peer = at.session(opened.json()["id"]), Peer()
    at.webhooks.follow(live, "http://127.0.0.1:1/", "x" * 16)
    answer = await http.post(f"/v1/sessions/{live.id}/whep", content=await peer.offer(), headers={"content-type": "application/sdp"})
    await peer.accept(answer.text)
    await until(lambda: peer.pictures and all(output.status.bytes for output in at.outputs.known()), 30)
    return live, peer


async def talk(live, peer: Peer) -> None:
    """A viewer reports; speech begins and is interrupted."""
    await until(lambda: peer.channel.readyState == "open", 30)
    peer.channel.send(json.dumps({"type": "stats", "report": {
        "framesDecoded": 10, "jitterBufferDelay": 1.0, "jitterBufferEmittedCount": 10, "freezeCount": 1, "pliCount": 1, "packetsLost": 1,
        "roundTripTime": 0.01, "soundLate": 0.02}}))  # fmt: skip
    await live.push_audio(tone(2.0), 16_000)
    await until(lambda: live.state == "speaking", 30)
    await live.interrupt()
    await until(lambda: live._cut is None, 30)


async def misuse(http: httpx.AsyncClient, live) -> None:
    """Refused for want of a key, for an address, for a file, for quota."""
    refused = [await http.get("/v1/sessions", headers=bearer("la_0_x")),
               await http.post(f"/v1/sessions/{live.id}/outputs", json={"kind": "rtmp", "url": "rtmp://10.0.0.1/live/key"}),
               await http.post("/v1/avatars", files={"portrait": b"no picture"}, data={"synthetic": "true"}),
               await http.post("/v1/sessions", json={})]  # fmt: skip
    assert [problem(answer)[0] for answer in refused] == [401, 403, 415, 429]


def test_every_row_of_the_table_is_fed(tmp_path):
    async def story():
        async with assembled(whole(tmp_path)) as (at, http, inspector):
            live, peer = await on_air(http, at)
            await talk(live, peer)
            await misuse(http, live)
            while not {'watermark_selfcheck_ratio{output="webrtc"}', 'av_drift_seconds{sink="webrtc"}'} <= set(during := values(at.metrics)):
                await inspector.look()
                await asyncio.sleep(0.1)
            live._reopen = kept(gate := asyncio.Event(), live._reopen)
            at.desk.studio.engine.chain.fail()
            await until(lambda: live.broadcast.filler == "restart", 30)
            during |= values(at.metrics)
            gate.set()
            await until(lambda: live.broadcast.filler is None, 30)
            await peer.close()
            await http.delete(f"/v1/sessions/{live.id}")
            return during, values(at.metrics)

    during, after = asyncio.run(asyncio.wait_for(story(), 100))
    gauges = tuple(row.name for row in TABLE.values() if row.kind == "gauge")
    told = {name for seen in (during, after) for name, value in seen.items() if value or name.startswith(gauges)}
    fed = {row.name for row in TABLE.values() if any(name.startswith((row.name, f"{row.name}_count")) for name in told)}
    assert set(TABLE) - fed <= set(ELSEWHERE), sorted(set(TABLE) - fed - set(ELSEWHERE))
    edges = {name.split('"')[1] for name in during if name.startswith("queue_capacity")}
    assert edges == {"audio_in", "engine_in", "playout", "viewer", "hls", "record", "webhooks"}  # "events" is a socket's
    assert during['watermark_selfcheck_ratio{output="webrtc"}'] == 1 and during['frame_change_ratio{output="hls"}'] > 0.001
    assert 0.05 < during['frame_luma_mean{output="record"}'] < 0.95 and -1 <= during['identity_similarity{output="webrtc"}'] <= 1
    assert during["consent_expiry_timestamp_seconds"] == 4e9 and during['certificate_expiry_timestamp_seconds{certificate="tls"}'] > 1.7e9
    assert abs(after['stale_epoch_drops_total{edge="playout"}']) > 0 and after['sessions_rejected_total{reason="quota"}'] == 1
    assert sum(value for name, value in after.items() if name.startswith("sessions_ended_total")) == 1


async def too_large(app, key: str) -> None:
    """The gate goes by the new limit."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE, headers=bearer(key)) as http:
        answer = await http.post("/v1/avatars", content=bytes(1_000_000), headers={"content-type": "image/png"})
        assert problem(answer)[0] == 413


def test_settings_that_are_read_again(tmp_path, monkeypatch):
    """SIGHUP (17.4): limits, leases and the log's level from now on; what cannot be read changes nothing, what needs a restart is named."""
    access = AccessConfig(offers_per_minute=1, viewers=1, image_bytes=1000, token_seconds=60.0)
    stricter = replace(whole(tmp_path), access=access, monitoring=MonitoringConfig(log_level="error"), sessions=SessionsConfig(idle_seconds=7.0),
                       talk=TalkConfig(), speech=SpeechConfig(voice="flite"))  # fmt: skip
    levels = {name: logging.getLogger(name).level for name in (None, "liveavatar", "uvicorn")}
    said = []
    monkeypatch.setattr(server.log, "warning", lambda event, **facts: said.append((event, facts)))
    app = server.assemble(whole(tmp_path))[0]
    at, had = app.state.services, whole(tmp_path)
    try:
        server.reload(at, lambda: stricter)
        ((event, facts),) = said
        assert event == "settings_reloaded" and set(facts["changed"]) <= set(differing(had, stricter))
        assert {"access.viewers", "access.image_bytes", "sessions.idle_seconds", "monitoring.log_level"} <= set(facts["changed"])
        assert {"access.token_seconds", "talk", "speech.voice"} <= set(facts["need_restart"])
        assert at.settings is at.desk.settings is at.desk.studio.config and at.settings.talk is None and at.settings.access.token_seconds == 600
        assert at.viewers._limit == 1 and at.desk.settings.sessions.idle_seconds == 7.0
        asyncio.run(too_large(app, at.access.first_key()))
        assert logging.getLogger("liveavatar").level == logging.ERROR
        at.quotas.count("offers", "k")
        with pytest.raises(RateLimited):
            at.quotas.count("offers", "k")

        def broken() -> ServeConfig:
            raise ConfigError("serve.yaml: unknown key")

        server.reload(at, broken)
        assert logging.getLogger("liveavatar").level == logging.ERROR and len(said) == 1
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        asyncio.run(at.close())
