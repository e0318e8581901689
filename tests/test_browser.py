"""A real browser watches: the picture moves, sound plays, both together, not late (sections 7.5 and 20). bench/glass.py has the figures."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import numpy as np
import pytest

for package in ("aiortc", "playwright"):
    pytest.importorskip(package, reason="needs the extras: pip install 'liveavatar[dev]'")

from browser_kit import CHROMIUM, application, chromium, offsets, percentiles, serving
from viewer_kit import Card, playing, until

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Chromium is not installed (apt install chromium)")


async def watching(browser, url: str, **options):
    """A page that plays the card, and a list of what went wrong in it."""
    page, wrong = await browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    await page.goto(url)
    await page.evaluate("options => watch('/v1/sessions/card/whep', options)", options)
    await page.wait_for_function("seen.moved > 5")
    return page, wrong


def test_chromium_plays_the_card_and_gives_its_microphone():
    """One stay of a browser: a tab that is closed again, a viewer, a late joiner with a microphone, both leave."""

    async def body():
        async with playing(Card()) as card, serving(application(card)) as url, chromium() as browser:
            tab, _ = await watching(browser, url)
            (gone,) = card.sinks
            await tab.close()  # without a goodbye, as Chromium does it: 9 to 10 s
            noticed = asyncio.ensure_future(until(lambda: gone.state == "closed", 13))
            page, wrong = await watching(browser, url)
            await page.wait_for_function("seen.shown > 100 && seen.flashes.length > 2 && seen.beeps.length > 2 && seen.playout.length > 2")
            late, late_wrong = await watching(browser, url, microphone=True)
            await until(lambda: len(card.heard) > 50)
            seen, joined = await page.evaluate("measured()"), await late.evaluate("measured()")
            statuses = [await page.evaluate("leave()"), await late.evaluate("leave()")]
            await noticed
            await until(lambda: card.sinks == [])
            return card, seen, joined, wrong + late_wrong, statuses

    card, seen, joined, wrong, statuses = asyncio.run(asyncio.wait_for(body(), 120))
    assert wrong == [] and statuses == [200, 200]
    assert seen["codec"] == joined["codec"] == "video/H264" and seen["state"] == "connected"
    assert seen["moved"] > 0.8 * seen["shown"] and seen["decoded"] > 100
    assert seen["energy"] > 0.01, "an analyser of the page hears the beep"
    assert seen["pings"] >= 1, "the data channel is open"
    ages = percentiles(seen["ages"])
    assert 0 < ages["p50"] < 400 and ages["n"] > 80, ages  # 60 ms on an idle machine; this one may be busy
    assert abs(statistics.median(seen["playout"])) < 400, "sound against pictures by the browser's own clocks; 16 to 31 ms when it has the machine"
    assert abs(statistics.median(offsets(seen["flashes"], seen["beeps"]))) < 350
    assert joined["first"] < 5000
    sound = np.concatenate([pcm for pcm, _ in card.heard]).astype(float)
    assert {rate for _, rate in card.heard} == {16_000} and np.abs(sound).max() > 1000, "Chromium's microphone beeps"
