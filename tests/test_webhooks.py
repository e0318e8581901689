"""Webhooks (API-6): what a real receiver on loopback gets, and what happens when it does not answer."""

import asyncio
import json

from aiohttp import web

from api_server import changed, running, settings, tone
from liveavatar.serving.problems import Forbidden
from liveavatar.serving.webhooks import FIRST_WAIT, TRIES, WAIT_FACTOR, WAITING, DeliveryFailed, Target, Webhook, Webhooks, signature

SECRET = "a secret of the client"


async def receiver(got: list, statuses: list):
    """A server of the client's; answers with `statuses` in turn, then 200. Returns (runner, port)."""

    async def take(request):
        got.append((dict(request.headers), await request.read()))
        return web.Response(status=statuses.pop(0) if statuses else 200, headers={"Location": "http://127.0.0.1:1/"})

    app = web.Application()
    app.router.add_post("/hook", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, site._server.sockets[0].getsockname()[1]


def test_a_session_tells_a_real_receiver_signed_and_in_order(tmp_path):
    async def story():
        got: list = []
        runner, port = await receiver(got, [])
        async with running(changed(settings(tmp_path), outputs={"private": ("127.0.0.0/8",)})) as server:
            session = await server.opened(webhook={"url": f"http://127.0.0.1:{port}/hook", "secret": SECRET})
            await server.http.post(f"/v1/sessions/{session}/audio", content=tone(0.1).tobytes(), headers={"content-type": "audio/pcm"})
            async with asyncio.timeout(10):
                while not any(b"speak.finished" in body for _, body in got):
                    await asyncio.sleep(0.02)
            await server.http.delete(f"/v1/sessions/{session}")
        await runner.cleanup()  # after the server: what waited was delivered before it ended
        events = [json.loads(body) for _, body in got]
        assert [event["n"] for event in events] == list(range(1, len(events) + 1)) and {event["session"] for event in events} == {session}
        assert (events[-1]["type"], events[-1]["state"]) == ("state", "closed")
        assert {"speak.started", "speak.finished"} <= {event["type"] for event in events}
        for headers, body in got:
            assert headers["LiveAvatar-Signature"] == f"v1={signature(SECRET, headers['LiveAvatar-Timestamp'], body)}"
            assert SECRET not in str(headers) and SECRET.encode() not in body
        metrics = server.at.metrics.exposition().decode()
        assert f'liveavatar_webhook_deliveries_total{{outcome="delivered"}} {len(got)}.0' in metrics

    asyncio.run(story())


def deliver(post, events=1):
    """A Webhook that got `events` events, run to its end; what it counted, and how long it waited each time."""
    counted, waits = [], []

    async def sleep(seconds):
        waits.append(seconds)

    async def story():
        hook = Webhook(Target("s", "https://x/", SECRET, {"session": "s"}), post, count=counted.append, sleep=sleep)
        for n in range(events):
            hook.put({"n": n, "type": "epoch"})
        hook.put({"n": events, "type": "stats"})
        hook.end()
        await hook.run()
        return hook

    return asyncio.run(story()), counted, waits


def test_five_tries_with_growing_pauses():
    tried = []

    async def down(url, body, headers):
        tried.append(headers)
        raise DeliveryFailed("status 500")

    _, counted, waits = deliver(down)
    assert len(tried) == TRIES == 5 and counted == ["retried"] * 4 + ["failed"]
    for n, wait in enumerate(waits):
        assert 0.5 <= wait / (FIRST_WAIT * WAIT_FACTOR**n) <= 1.5


def test_a_name_that_is_not_found_for_now_is_tried_again():
    async def post(url, body, headers):
        await Webhooks()._post("https://nobody.invalid/hook", body, headers)  # what the system's resolver says of it

    assert deliver(post)[1] == ["retried"] * 4 + ["failed"]


def test_an_address_that_is_not_allowed_any_more_is_not_tried_again():
    async def forbidden(url, body, headers):
        raise Forbidden("rebound", kind="ssrf")

    assert deliver(forbidden)[1:] == (["refused"], [])


def test_what_waits_is_bounded_and_the_oldest_goes():
    numbers = []

    async def post(url, body, headers):
        numbers.append(json.loads(body)["n"])

    hook, counted, _ = deliver(post, WAITING + 3)
    assert hook.drops == 3 and numbers == list(range(3, WAITING + 3)) and counted == ["delivered"] * WAITING
