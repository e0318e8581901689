"""The HTTP side of a server, put together: who may pass, the routes, the console's files, what ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from liveavatar import __version__
from liveavatar.serving import (
    answers, livekit_compat, routes_avatars, routes_chain, routes_channels, routes_outputs, routes_provenance, routes_recordings, routes_server,
    routes_sessions, routes_talk, routes_watermark, stream_socket, viewer_report, whep,
)  # fmt: skip
from liveavatar.serving.access import Access
from liveavatar.serving.audit import Audit
from liveavatar.serving.channel_runner import Channels, Crew
from liveavatar.serving.channel_store import ChannelStore
from liveavatar.serving.consent import ConsentLog
from liveavatar.serving.conversations import Conversations, Parts
from liveavatar.serving.desk import Desk, Lease, Usable
from liveavatar.serving.ears import open_recogniser
from liveavatar.serving.gate import FORM_BYTES, OPENAPI, Gate
from liveavatar.serving.ice import IceServers
from liveavatar.serving.idempotency import REPLAYED, Idempotency
from liveavatar.serving.metrics import Metrics
from liveavatar.serving.minds import open_mind
from liveavatar.serving.moderation import Moderation
from liveavatar.serving.outputs import Outputs
from liveavatar.serving.probes import LoopProbe
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.realtime import Backend
from liveavatar.serving.services import BEARER, Services
from liveavatar.serving.settings import ServeConfig, TalkConfig
from liveavatar.serving.signing import Signer
from liveavatar.serving.stages import Stages
from liveavatar.serving.store import AvatarStore
from liveavatar.serving.studio import Studio
from liveavatar.serving.voices import Speak, Voice, key_of, open_voice
from liveavatar.serving.watermark import server_key
from liveavatar.serving.webhooks import Webhooks
from liveavatar.serving.whep import Viewers
from liveavatar.telemetry import now as monotonic

CONSOLE = Path(__file__).parent / "console"
EXPOSED = ("Location", "ETag", "Link", "Retry-After", "X-Request-Id", REPLAYED)  # headers a listed page may read


def create_app(studio: Studio, settings: ServeConfig, *, metrics: Metrics | None = None, stages: Stages | None = None,
               speak: Speak | None = None, conversations: Conversations | None = None) -> FastAPI:  # fmt: skip
    """The application of one server. It owns leases and whatever ends with the process, but not the studio.

    stages: what watches the chain, told by the studio's notes. speak, conversations: in place of what settings.speech
    and settings.talk name. Raises ConfigError, LogError for files in storage.folder that are not what they were.

    Its `state.services` (Services) is what other parts are mounted with: `desk.open` is the door for whoever opens
    sessions, `desk.lease` tells whose one is.
    """
    at = _services(studio, settings, metrics or studio.metrics, stages, speak, conversations)
    app = FastAPI(title="LiveAvatar", version=__version__, openapi_url=OPENAPI, docs_url=None, redoc_url=None, lifespan=_life,
                  description="Live avatars that people and agents talk to. Errors are RFC 9457 problems.")  # fmt: skip
    app.state.services = at
    if settings.listen.admin_port is None:
        app.include_router(routes_server.metrics)
    answers.install(app)
    routes = (routes_server, routes_avatars, routes_provenance, routes_watermark, routes_sessions, routes_outputs, routes_recordings,
              routes_channels, routes_chain, stream_socket)  # fmt: skip
    for router in (routes_server.probes, *(module.router for module in routes), livekit_compat.router()):
        app.include_router(router)
    microphone = at.microphone
    if at.conversations is not None:
        app.include_router(routes_talk.router(at.conversations))
        microphone = at.conversations.microphone(at.microphone)
    if settings.realtime is not None:
        app.include_router(routes_talk.realtime_router(Backend(url=settings.realtime.url, key=key_of(settings.realtime.key_file))))
    app.include_router(whep.router(at.session, at.authorise, at.viewers, heard=microphone), dependencies=[BEARER])
    if CONSOLE.is_dir():
        app.mount("/", StaticFiles(directory=CONSOLE, html=True), name="console")
    _guard(app, at)
    return app


def _services(studio: Studio, settings: ServeConfig, metrics: Metrics, stages: Stages | None, speak: Speak | None,
              conversations: Conversations | None) -> Services:  # fmt: skip
    quotas, folder = Quotas(settings.access), Path(settings.storage.folder)
    store, consents = AvatarStore(folder / "avatars"), ConsentLog(folder)
    voice = None if speak else open_voice(settings.speech)
    speak = voice.speak if voice else speak
    audit = Audit(folder, lambda: metrics.provenance_failed("log"))
    audit.note("server.started", {"version": __version__, **{name: getattr(settings.provenance, name) for name in ("watermark", "badge", "sign")}})
    moderation = Moderation(settings.moderation, audit.note)
    desk = Desk(studio, settings, quotas, _usable(store, consents), moderation, told=audit.note)
    webhooks = Webhooks(settings.outputs.private, metrics.webhook, metrics.edge)
    signer = Signer(folder, settings.provenance.certificate, settings.provenance.key) if settings.provenance.sign else None
    outputs = Outputs(settings, facts=_facts(store), recordable=_recordable(store, consents), sign=signer and signer.sign,
                      seal=signer and signer.seal, broke=metrics.recording_failed, told=audit.note)  # fmt: skip
    return Services(settings=settings, access=Access(folder, settings.access), quotas=quotas, store=store, idempotency=Idempotency(),
                    desk=desk, audit=audit, outputs=outputs, moderation=moderation,
                    channels=Channels(Crew(desk=desk, outputs=outputs, quotas=quotas, store=ChannelStore(folder / "channels"), speak=speak,
                                           webhooks=webhooks)),
                    webhooks=webhooks,
                    viewers=Viewers(IceServers(settings.network), settings.access.viewers, reports=lambda: _reports(metrics)),
                    consents=consents, metrics=metrics, probe=LoopProbe(metrics), mark_key=_mark_key(settings),
                    stages=stages or Stages(metrics, engine=settings.engine_kind), speak=speak,
                    conversations=conversations or (Conversations(_parts(settings.talk, voice)) if settings.talk else None))  # fmt: skip


def _parts(talk: TalkConfig, voice: Voice) -> Parts:
    """Who listens and answers. Raises ConfigError for what is not installed."""
    return Parts(mind=open_mind(talk.mind, model=talk.model, key=key_of(talk.mind_key_file)), voice=voice,
                 recogniser=open_recogniser(talk.ears, key=key_of(talk.ears_key_file)))  # fmt: skip


def _reports(metrics: Metrics) -> Callable[[object], None]:
    """What a viewer's page says of its reception (MET-2)."""
    viewer = viewer_report.Viewer(metrics, monotonic())
    return lambda figures: viewer.take(figures, monotonic()) and None


def admin_app(app: FastAPI) -> FastAPI:
    """Metrics, probes and drain of the same server, for a socket that only operators reach."""
    admin = FastAPI(title="LiveAvatar operations", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    admin.state.services = app.state.services
    answers.install(admin)
    for router in (routes_server.probes, routes_server.metrics, routes_server.operations):
        admin.include_router(router)
    return admin


def _recordable(store: AvatarStore, consents: ConsentLog) -> Callable[[Lease], None]:
    def recordable(lease: Lease) -> None:
        """Raises Forbidden where the person shown did not allow recordings."""
        avatar = store.get(lease.wish.avatar)
        if avatar.consent is not None:
            consents.check(avatar.consent, avatar.owner, use="recording", media=avatar.media)

    return recordable


def _facts(store: AvatarStore) -> Callable[[Lease], dict]:
    def facts(lease: Lease) -> dict:
        """What the side-car of a recording says of its session (REC-4)."""
        avatar = lease.wish.avatar
        return {"session": lease.id, "owner": lease.owner, "avatar": avatar, "consent": store.get(avatar).consent}

    return facts


def _usable(store: AvatarStore, consents: ConsentLog) -> Usable:
    def usable(avatar_id: str, mode: str, sees: Callable[[str], bool]) -> Path:
        avatar = store.get(avatar_id, sees)
        if avatar.consent is not None:
            consents.check(avatar.consent, avatar.owner, use=mode, media=avatar.media)
        return store.portrait(avatar.id)

    return usable


def _mark_key(settings: ServeConfig) -> bytes | None:
    """Of the invisible mark, where pictures are marked. Raises ConfigError."""
    wanted, file = settings.provenance, settings.provenance.watermark_key_file
    return server_key(Path(settings.storage.folder), Path(file) if file else None) if wanted.watermark else None


def _guard(app: FastAPI, at: Services) -> None:
    """What every request passes; the last one added comes first."""
    required, listen = at.settings.access.required, at.settings.listen
    app.add_middleware(Gate, access=at.access, quotas=at.quotas, listen=listen, required=required, metrics=at.metrics, bounds=(
        ("/v1/avatars|/v1/consents|/v1/compat/bithuman", lambda: at.settings.access.image_bytes + FORM_BYTES),
        ("/v1/watermark:detect", lambda: routes_watermark.VIDEO_BYTES),
        ("/v1/sessions/[^/]+/audio|/v1/channels/[^/]+/sounds", lambda: at.settings.access.audio_bytes),
    ))  # fmt: skip
    if listen.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(listen.origins), allow_methods=["GET", "POST", "PATCH", "DELETE"],
                           allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "If-Match"], expose_headers=list(EXPOSED))  # fmt: skip


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    at: Services = app.state.services
    at.channels.resume()
    tasks = [asyncio.create_task(work) for work in (at.desk.run(), at.probe.run(), at.outputs.housekeep())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await at.close()
