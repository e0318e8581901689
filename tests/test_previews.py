"""A look into the chain: every step's latents of one block, in small colours; the operator's routes."""

import asyncio
import base64
import io
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from api_server import bearer, running, settings
from liveavatar.config import Config, ModelConfig, RuntimeConfig, SamplerConfig
from liveavatar.core import InputError
from liveavatar.runtime.engine import Engine
from liveavatar.runtime.observing import Observation
from liveavatar.serving.previews import colours, data_url, fit_colours, previews


def test_one_block_is_observed_and_no_other(tiny_folder, portrait):
    """The asked-for block comes up after each step, with its pictures, and plays as if nobody had looked."""

    async def play(look: bool):
        engine = await Engine.start(Config(model=ModelConfig(path=str(tiny_folder), dtype="float32", device="cpu"), sampler=SamplerConfig(steps=2),
                                           runtime=RuntimeConfig(threads=1), stages=(("condition", "step0"), ("step1", "decode"))))  # fmt: skip
        session, seen = await engine.open(portrait, name="same"), []
        await session.push_audio(np.zeros(7680, np.float32))
        if look:
            seen = [asyncio.create_task(session.observe()), asyncio.create_task(session.observe())]
            await asyncio.sleep(0)
        await session.push_audio(np.zeros(2 * 7680, np.float32))
        await session.end_audio()
        blocks = [out async for out in session]
        found = await asyncio.gather(*seen)
        await session.close()
        await engine.aclose()
        return blocks, found, session.observed

    blocks, (seen, twin), left = asyncio.run(asyncio.wait_for(play(True), 120))
    plain, _, _ = asyncio.run(asyncio.wait_for(play(False), 120))
    assert left == [] and sorted(seen.latents) == sorted(twin.latents) == [0, 1]
    assert all(np.array_equal(a.pictures, b.pictures) for a, b in zip(blocks, plain, strict=True))
    block = blocks[seen.index]
    assert block.index == seen.index and np.array_equal(seen.pictures.numpy()[: len(block.pictures)], block.pictures)
    assert not torch.equal(seen.latents[0], seen.latents[1])
    shown = list(previews(seen))
    assert [step for step, _ in shown] == [0, 1, None]
    h, w = seen.latents[0].shape[2:]
    assert shown[0][1].shape == (h, w, 3) and shown[2][1].shape == block.pictures[0].shape


def test_a_linear_map_is_found_and_drawn():
    """Pictures that are a linear function of the latents come back as they were, to a rounding."""
    random = np.random.default_rng(0)
    latents, truth = random.random((4, 3, 6, 5)), random.random((5, 3)) / 5
    cells = np.concatenate([latents, np.ones((1, 3, 6, 5))]).transpose(1, 2, 3, 0) @ truth  # [3, 6, 5, 3]
    pictures = (cells.repeat(4, 0).repeat(8, 1).repeat(8, 2) * 255).round().astype(np.uint8)
    fitted = fit_colours(latents, pictures)
    assert np.abs(fitted - truth).max() < 0.02
    drawn = colours(latents, fitted)
    assert drawn.shape == (3, 6, 5, 3) and np.abs(drawn - cells * 255).max() < 2
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data_url(drawn[0]).split(",")[1]))), drawn[0])


def test_a_chain_without_steps_cannot_be_observed():
    with pytest.raises(InputError, match="no denoising steps"):
        Observation(0, (("testcard",),))


def test_operators_see_chain_and_log_and_nobody_else(tmp_path):
    async def body():
        async with running(settings(tmp_path)) as server:
            session, tenant = await server.opened(), bearer(server.tenant("other"))
            http: httpx.AsyncClient = server.http
            refused = [(await http.get(path, headers=tenant)).status_code for path in ("/v1/chain", "/v1/audit")]
            hidden = await http.post(f"/v1/sessions/{session}/preview", headers=tenant)
            preview = await http.post(f"/v1/sessions/{session}/preview")
            server.at.audit._thread.submit(lambda: None).result()  # lines are written behind the requests' backs
            told = [await http.get(path) for path in ("/v1/chain", "/v1/audit?lines=1", "/v1/audit?lines=0")]
            return refused, hidden, preview, *told, session

    refused, hidden, preview, chain, audit, wrong, session = asyncio.run(asyncio.wait_for(body(), 60))
    assert refused == [403, 403] and hidden.status_code == 404 and wrong.status_code == 422
    assert preview.status_code == 422 and "no denoising steps" in preview.json()["detail"]
    chain = SimpleNamespace(**chain.json())
    assert chain.up and chain.engine == "testcard" and chain.sessions == 1 and not chain.steps
    assert [rank["roles"] for rank in chain.ranks] == [["testcard"]] and chain.ranks[0]["busy"] is None
    (line,) = audit.json()["lines"]
    assert line["name"] == "session.opened" and line["data"]["session"] == session and len(line["hash"]) == 64
