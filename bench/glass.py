"""Glass to glass: how old a picture is when Chromium shows it, and how far sound and picture are apart.

    PYTHONPATH=. python bench/glass.py --seconds 60 [--relay] [--interruptions 12] --out bench/results/glass-cpu2.json

A card with a painted millisecond clock goes through our encoders, viewer and WHEP endpoint into headless Chromium on the
same machine; the page reads the clock off each picture it presents. --relay: once more, through coturn on both sides.
--interruptions: of a whole server with the test card engine, until an aiortc viewer hears silence (BRG-1).
Onsets (flash against beep) contain the page's own path of sound (Web Audio); playout is the browser's own account.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

from measured import HERE, parser_of, write

sys.path.insert(0, str(HERE.parent / "tests"))  # the card and the page are those of tests/test_browser.py

import api_server
from browser_kit import application, chromium, offsets, percentiles, serving
from viewer_kit import HEIGHT, WIDTH, Card, Peer, coturn, interrupted, own_address, playing, until

from liveavatar.serving.settings import NetworkConfig, ServeConfig

GATES = {"glass_ms_p95": 150, "playout_ms_p95": 45, "late_joiner_ms": 500, "silence_ms_p95": 250}


async def watch(browser, url: str, configuration: dict, seconds: float):
    """A page that has played for so long."""
    page = await browser.new_page()
    await page.goto(url)
    await page.evaluate("configuration => watch('/v1/sessions/card/whep', {configuration})", configuration)
    await asyncio.sleep(seconds)
    await page.wait_for_function("seen.first !== null")
    return page, await page.evaluate("measured()")


async def measure(config: ServeConfig, seconds: float, picture: Path | None = None) -> dict:
    """Figures of one run: a viewer, and at the end three late joiners, one after the other."""
    async with playing(Card()) as card, serving(application(card, config)) as url, chromium() as browser:
        page = await browser.new_page()
        await page.goto(url)
        configuration = {key: value for key, value in (await page.evaluate("fetch('/v1/ice-servers').then(r => r.json())")).items() if key != "ttl"}
        page, seen = await watch(browser, url, configuration, seconds)
        if picture:
            await page.screenshot(path=picture, clip={"x": 0, "y": 0, "width": WIDTH + 16, "height": HEIGHT + 16})
        late = [round((await watch(browser, url, configuration, 2))[1]["first"]) for _ in range(3)]
        sent = [sink.stats for sink in card.sinks]
    settled = lambda name: seen[name][len(seen[name]) // 4 :]  # noqa: E731  the first quarter finds its jitter buffers
    figures = {
        "candidate": seen["candidate"], "codec": seen["codec"], "glass_ms": percentiles(seen["ages"]), "playout_ms": percentiles(settled("playout")),
        "onset_ms": percentiles(offsets(settled("flashes"), seen["beeps"])), "late_joiner_ms": late, "decoded": seen["decoded"],
        "freezes": seen["freezes"],
        "video_jitter_buffer_ms": round(seen["jitter_ms"], 1), "sound_jitter_buffer_ms": round(seen["sound_jitter_ms"], 1),
        "concealed_ratio": round(seen["concealed"] / seen["samples"], 4), "lost": sum(s.lost for s in sent), "drops": [s.drops for s in sent],
    }  # fmt: skip
    return figures


async def relayed(seconds: float) -> dict:
    """The same through coturn."""
    with tempfile.TemporaryDirectory() as folder:
        path, secret = Path(folder) / "secret", secrets.token_hex(16)
        path.write_text(secret)
        async with coturn(Path(folder), own_address(), secret) as url:
            return await measure(ServeConfig(network=NetworkConfig(turn=(url,), turn_secret_file=str(path), relay_only=True)), seconds)


async def silences(count: int) -> dict:
    """ms from POST interrupt to silence at a viewer."""
    with tempfile.TemporaryDirectory() as folder:
        async with api_server.running(api_server.settings(Path(folder))) as server:
            name, peer = await server.opened(), Peer()
            made = await server.http.post(f"/v1/sessions/{name}/whep", content=await peer.offer(), headers={"Content-Type": "application/sdp"})
            await peer.accept(made.text)
            await until(lambda: peer.pictures and peer.sound)
            found = [1000 * (await interrupted(server.http, server.studio.sessions[name], peer))[0] for _ in range(count)]
            await peer.close()
    return percentiles(found)


def main() -> None:
    parser = parser_of(__doc__, "glass.json", compare=False)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--relay", action="store_true")
    parser.add_argument("--interruptions", type=int, default=0)
    args = parser.parse_args()
    report = {"command": " ".join(["python", "bench/glass.py", *sys.argv[1:]]), "picture": [WIDTH, HEIGHT], "seconds": args.seconds, "gates": GATES}
    report["direct"] = asyncio.run(measure(ServeConfig(), args.seconds, args.out.with_suffix(".png")))
    if args.relay:
        report["relay"] = asyncio.run(relayed(args.seconds))
    if args.interruptions:
        report["silence_ms"] = asyncio.run(silences(args.interruptions))
    report["load_average"], report["realtime"] = [round(load, 1) for load in os.getloadavg()], os.sched_getscheduler(0) != os.SCHED_OTHER
    print(json.dumps(report, indent=1))
    write(args.out, **report)


if __name__ == "__main__":
    main()
