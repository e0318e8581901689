"""A whole server for tests: the real studio on the test card engine, the real application, over ASGI or on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from liveavatar.serving import listen
from liveavatar.serving.access import SCOPES
from liveavatar.serving.app import create_app
from liveavatar.serving.problems import TYPES
from liveavatar.serving.services import Services
from liveavatar.serving.settings import AccessConfig, ListenConfig, ServeConfig, SessionsConfig, StorageConfig
from liveavatar.serving.studio import Studio
from liveavatar.serving.wire import ProblemBody

BASE = "http://127.0.0.1"
PCM = {"content-type": "audio/pcm"}
STATEMENT = {"subject": "Ada", "method": "self", "scope": "conversation"}  # of a consent


def settings(folder: Path, access: dict | None = None, sessions: dict | None = None, **more) -> ServeConfig:
    """Of a test card server whose files lie in `folder`. It keeps its door open when the machine is busy with other tests."""
    return ServeConfig(engine_kind="testcard", storage=StorageConfig(folder=str(folder)), access=AccessConfig(**(access or {})),
                       sessions=SessionsConfig(**{"degrade": False, **(sessions or {})}), **{"listen": ListenConfig(port=0), **more})  # fmt: skip


@dataclass
class Running:
    """A server that answers. http: a client with the operator's key."""

    app: FastAPI
    studio: Studio
    http: httpx.AsyncClient
    key: str

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return Path(self.studio.config.storage.folder)

    @property
    def at(self) -> Services:
        return self.app.state.services

    def tenant(self, owner: str, scopes=SCOPES[:3]) -> str:
        """A key of another tenant."""
        return self.at.access.create_key(owner, scopes)[1]

    async def opened(self, key: str | None = None, **wish) -> str:
        """Id of a new session."""
        answer = await self.http.post("/v1/sessions", json=wish, headers=bearer(key or self.key))
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@contextlib.asynccontextmanager
async def running(config: ServeConfig, **parts):
    """In this process, without a port."""
    studio = Studio(config)
    await studio.start()
    app = create_app(studio, config, **parts)
    key = app.state.services.access.first_key()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE, headers=bearer(key)) as http:
            yield Running(app, studio, http, key)
        await app.state.services.close()
    finally:
        await studio.aclose()


@contextlib.asynccontextmanager
async def on_port(config: ServeConfig, **parts):
    """On a real port of this process: (Running, "127.0.0.1:PORT")."""
    async with running(config, **parts) as server:
        listening = listen.bind(config)
        uvicorn = listen.server(server.app, config)
        serving = asyncio.create_task(uvicorn.serve([listening]))
        while not uvicorn.started:
            await asyncio.sleep(0.01)
        try:
            yield server, "127.0.0.1:%d" % listening.getsockname()[1]
        finally:
            uvicorn.should_exit = True
            await serving


def portrait(kind: str = "PNG", size: int = 96, seed: int = 0, **options) -> bytes:
    """A picture file of noise."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(out, kind, **options)
    return out.getvalue()


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    """int16 [n], 220 Hz."""
    return (8000 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate)) / rate)).astype(np.int16)


def changed(config: ServeConfig, **sections) -> ServeConfig:
    """With other values in some sections."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


async def until(events, name: str, count: int):
    """The next `count` events of this name."""
    async with asyncio.timeout(20):
        async for event in events:
            if event.name == name:
                count -= 1
                yield event
            if not count:
                return


def problem(answer) -> tuple[int, str]:
    """Status and kind of a refusal, which is a problem in every way (API-4)."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert body["status"] == answer.status_code and body["request_id"] and body["title"] and set(body) <= {*ProblemBody.model_fields}
    return answer.status_code, body["type"].removeprefix(TYPES)
