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
from liveavatar.serving import answers, routes_avatars, routes_server, routes_sessions, stream_socket
from liveavatar.serving.access import Access, Principal
from liveavatar.serving.desk import Desk
from liveavatar.serving.gate import FORM_BYTES, OPENAPI, Gate
from liveavatar.serving.idempotency import REPLAYED, Idempotency
from liveavatar.serving.quotas import Quotas
from liveavatar.serving.recorded import Decode
from liveavatar.serving.services import Consents, Services, Speak
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.store import AvatarStore
from liveavatar.serving.studio import Studio
from liveavatar.serving.webhooks import Webhooks

CONSOLE = Path(__file__).parent / "console"
GOODBYE_SECONDS = 5.0  # for webhooks that wait when the server ends
EXPOSED = ("Location", "ETag", "Link", "Retry-After", "X-Request-Id", REPLAYED)  # headers a listed page may read


def create_app(studio: Studio, settings: ServeConfig, *, portraits: Callable[[bytes], bytes], decode: Decode, consents: Consents, webhooks: Webhooks,
               speak: Speak | None = None) -> FastAPI:  # fmt: skip
    """The application of one server. It owns leases and whatever ends with the process, but not the studio.

    Its `state.services` (Services) is what other parts are mounted with: `desk.open` is the door for whoever opens
    sessions, `desk.lease` tells whose one is.
    """
    quotas, folder = Quotas(settings.access), Path(settings.storage.folder)
    store = AvatarStore(folder / "avatars")
    at = Services(settings=settings, access=Access(folder, settings.access), quotas=quotas, store=store, idempotency=Idempotency(),
                  desk=Desk(studio, settings, quotas, _usable(store, consents)), webhooks=webhooks, portraits=portraits, decode=decode,
                  consents=consents, speak=speak)  # fmt: skip
    app = FastAPI(title="LiveAvatar", version=__version__, openapi_url=OPENAPI, docs_url=None, redoc_url=None, lifespan=_life,
                  description="Live avatars that people and agents talk to. Errors are RFC 9457 problems.")  # fmt: skip
    app.state.services = at
    answers.install(app)
    for router in (routes_server.probes, routes_server.router, routes_avatars.router, routes_sessions.router, stream_socket.router):
        app.include_router(router)
    if CONSOLE.is_dir():
        app.mount("/", StaticFiles(directory=CONSOLE, html=True), name="console")
    _guard(app, at)
    return app


def _usable(store: AvatarStore, consents: Consents) -> Callable[[str, Principal], Path]:
    def usable(avatar_id: str, who: Principal) -> Path:
        """The portrait of an avatar this one may use now. Raises NotFound, Forbidden (consent_revoked)."""
        avatar = store.get(avatar_id, lambda owner: who.sees(owner, who.session))
        if avatar.consent is not None:
            consents.check(avatar.consent, avatar.owner)
        return store.portrait(avatar.id)

    return usable


def _guard(app: FastAPI, at: Services) -> None:
    """What every request passes; the last one added comes first."""
    access, listen = at.settings.access, at.settings.listen
    app.add_middleware(Gate, access=at.access, quotas=at.quotas, listen=listen, required=access.required, bounds=(
        ("/v1/avatars", access.image_bytes + FORM_BYTES),
        ("/v1/sessions/[^/]+/audio", access.audio_bytes),
    ))  # fmt: skip
    if listen.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(listen.origins), allow_methods=["GET", "POST", "PATCH", "DELETE"],
                           allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "If-Match"], expose_headers=list(EXPOSED))  # fmt: skip


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    at: Services = app.state.services
    ticking = asyncio.create_task(at.desk.run())
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        await at.desk.close_all("drain")
        await at.webhooks.close(GOODBYE_SECONDS)
