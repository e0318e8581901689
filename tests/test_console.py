"""A real browser uses the console against the real server with the test card engine (UI-1): every tab, zero console errors."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import wave
from pathlib import Path

import pytest

for package in ("aiortc", "playwright"):
    pytest.importorskip(package, reason="needs the extras: pip install 'liveavatar[dev]'")

from api_server import on_port, portrait, settings, tone
from browser_kit import CHROMIUM, chromium
from liveavatar.serving.conversations import Conversations, Parts
from liveavatar.serving.minds import Companion

CONSOLE = Path(__file__).parent.parent / "liveavatar/serving/console"
WAIT_MS = 30_000  # the machine may be busy


def spoken(seconds: float) -> bytes:
    """A WAV file of a tone."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes(tone(seconds).tobytes())
    return out.getvalue()


async def voice(text):
    """Text to speech of a test: a tone, the longer the text, the longer."""
    yield tone(0.1 * len(text)), 16_000


@contextlib.asynccontextmanager
async def visitor(browser, url: str, **options):
    """A page at the door, and what went wrong in it."""
    context = await browser.new_context(reduced_motion="reduce", locale="en-GB", **options)
    page, wrong = await context.new_page(), []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    await page.goto(url)
    try:
        yield page, wrong
    finally:
        print("the page said:", wrong)  # pytest shows it where a test fails
        await context.close()


async def enter(page, key: str) -> None:
    await page.fill("#key", key)
    await page.press("#key", "Enter")
    await page.wait_for_selector("#avatars .face input")


async def picture(page) -> list[int]:
    """A few pixels of the live picture."""
    return await page.evaluate("""() => {
        const c = document.createElement("canvas"); c.width = c.height = 32;
        const pen = c.getContext("2d"); pen.drawImage(document.getElementById("video"), 0, 0, 32, 32);
        return [...pen.getImageData(0, 0, 32, 32).data];
    }""")


async def holds(page, condition: str) -> None:
    """Returns when it is true in the page; playwright's own waiting needs eval, which the page's policy forbids."""
    async with asyncio.timeout(WAIT_MS / 1000):
        while not await page.evaluate(condition):
            await asyncio.sleep(0.05)


async def moving(page) -> None:
    """Returns when two looks at the live picture differ."""
    await holds(page, "document.getElementById('video').videoWidth > 0")
    first = await picture(page)
    while await picture(page) == first:
        await asyncio.sleep(0.05)


async def shot(page, name: str) -> None:
    """Kept where somebody wants to look at it."""
    if folder := os.environ.get("CONSOLE_SCREENSHOTS"):
        await page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.fixture(scope="module")
def running_browser():
    """(runner of coroutines, Chromium): one for the file, as it takes longer to start than many a test."""
    if not Path(CHROMIUM).exists():
        pytest.skip("Chromium is not installed (apt install chromium)")
    with asyncio.Runner() as runner:
        opened = chromium()
        yield runner, runner.run(opened.__aenter__())
        runner.run(opened.__aexit__(None, None, None))


def test_a_person_speaks_through_the_avatar_and_an_operator_watches(running_browser, tmp_path):
    """Key, start, text, sound file, microphone, interruption, then every tab, the other language, and the end; on a desk."""

    runner, browser = running_browser

    async def body():
        parts = {"speak": voice, "conversations": conversations()}
        async with on_port(settings(tmp_path), **parts) as (server, port), visitor(browser, f"http://{port}") as (page, wrong):
            await enter(page, server.key)
            assert server.key not in await page.content() and await page.input_value("#key") == ""
            await page.click("#start")
            await moving(page)
            (session,) = server.studio.sessions.values()

            await page.fill("#text", "A sentence of some length")
            await page.press("#text", "Control+Enter")
            await holds(page, "document.getElementById('level').value > 0.05")
            await holds(page, "document.getElementById('state').dataset.state === 'speaking'")
            await holds(page, "/ms/.test(document.getElementById('figure_first').textContent)")
            await page.keyboard.press("Escape")
            await holds(page, "/ms/.test(document.getElementById('figure_silence').textContent)")
            assert session.epoch == 1
            figures = {name: await page.inner_text(f"#figure_{name}") for name in ("first", "silence", "heard")}

            await page.set_input_files("#sound_file", {"name": "hello.wav", "mimeType": "audio/wav", "buffer": spoken(0.6)})
            await page.wait_for_selector("text=hello.wav: 0.6 s of speech queued.")
            await page.click("#mic")
            await page.wait_for_selector("#mic[aria-pressed=true]")
            before = session.speech.total
            while session.speech.total < before + 16_000:  # the fake microphone beeps into the engine
                await asyncio.sleep(0.05)
            await page.click("#mic")
            await page.wait_for_selector("#mic[aria-pressed=false]")

            await talk(page)
            await visit_tabs(page, server, tmp_path)
            for name in ("webrtc_rtt_seconds", "webrtc_jitter_buffer_seconds", "webrtc_av_offset_seconds"):  # what the page reports (MET-2)
                while f'{name}_count{{sink="webrtc"}}' not in server.at.metrics.exposition().decode():
                    await asyncio.sleep(0.2)
            await page.click("#language")
            assert await page.inner_text("#tab_sessions") == "会话" and await page.get_attribute("html", "lang") == "zh-CN"
            await shot(page, "chinese")
            await page.click("#language")
            await page.click("#end")
            await page.wait_for_selector("#start:visible")
            while server.studio.sessions:  # the page has asked for the end, which takes a moment
                await asyncio.sleep(0.05)
            await page.click("#forget")
            await page.wait_for_selector("#key:visible")
            assert await page.evaluate("sessionStorage.length") == 0
            return wrong, figures

    wrong, figures = runner.run(asyncio.wait_for(body(), 150))
    assert wrong == []
    assert int(figures["first"].split()[0]) < 10_000 and int(figures["silence"].split()[0]) < 3000, figures


def conversations() -> Conversations:
    """Of the companion that needs no model, with a voice that is a short tone. Nobody listens to the microphone here."""

    class Parrot:
        async def speak(self, text):
            yield tone(0.4), 16_000

        async def recognise(self, pcm):
            return ""

    return Conversations(Parts(mind=Companion(), voice=Parrot(), recogniser=Parrot()))


async def talk(page) -> None:
    """A typed turn is answered in words and in sound."""
    await page.check("#talk_on")
    await page.fill("#text", "What is my name?")
    await page.press("#text", "Control+Enter")
    await page.wait_for_selector("#talk_lines .user >> text=What is my name?")
    await page.wait_for_selector("#talk_lines .assistant")
    await page.uncheck("#talk_on")


async def visit_tabs(page, server, folder: Path) -> None:
    await page.click("#tab_chain")
    await page.wait_for_selector(".node >> text=testcard")
    await page.wait_for_selector("text=This engine has no denoising steps")
    await page.wait_for_selector(".budget .part.network")
    await shot(page, "desktop")
    await page.focus("#tab_chain")
    await page.keyboard.press("ArrowRight")
    assert await page.evaluate("document.activeElement.id") == "tab_health"
    await holds(page, "[...document.querySelectorAll('#panel_health b')].some(b => b.textContent !== '–')")
    await shot(page, "history")

    assert await page.evaluate("""async () => {
        const {fill, h} = await import("/dom.js"), place = document.body.appendChild(h("table"));
        const row = name => h("tr", {title: name}, h("td", {}, h("button", {}, "End")));
        fill(place, row("a"), row("b"));
        place.querySelectorAll("button")[1].focus();
        fill(place, row("new"), row("a"), row("b"));
        const held = document.activeElement.closest("tr")?.title;
        place.remove();
        return held;
    }""") == "b", "a table that is drawn anew keeps the focus of who uses a keyboard"

    await page.click("#tab_outputs")
    await page.click("#panel_outputs button[type=submit]")
    await page.wait_for_selector("#panel_outputs td >> text=live")
    await shot(page, "outputs")
    for _ in ("stop", "sure"):
        await page.click("#panel_outputs .acts button")
    await page.wait_for_selector("#panel_outputs td >> text=closed")

    await page.click("#tab_provenance")
    await page.set_input_files("#panel_provenance input", next(folder.rglob("*.mp4")))
    await page.wait_for_selector("#panel_provenance [role=status] >> text=/watermark/")

    await channel_on_air(page, server)
    await add_a_face(page)
    await page.click("#tab_sessions")
    await page.wait_for_selector("#panel_sessions td >> text=/speaking|idle/i")
    await shot(page, "sessions")
    await page.click("#tab_log")
    await page.wait_for_selector("#panel_log b >> text=speak.started")
    await page.wait_for_selector("#panel_log b >> text=avatar.added")
    await shot(page, "log")
    await page.click("#tab_server")
    await page.wait_for_selector("#panel_server code >> text=/whep$/")
    await shot(page, "server")


async def channel_on_air(page, server) -> None:
    """Made, changed with what was there kept, started, switched to another face, stopped and erased, with buttons that ask once more."""
    await page.click("#tab_channels")
    await page.click("#panel_channels button >> text=New channel")
    await page.fill("#channel [name=channel_name]", "night")
    for words, entry in (("Add an entry", "hello"), ("Add an entry", "news")):
        await page.click(f"#channel button >> text={words}")
        await page.fill("#channel .rows:first-of-type .part_row:last-child .wide input", entry)
    await page.fill("#channel .part_row:last-child input[type=datetime-local]", "2100-01-02T03:04:05")
    await page.click("#channel button >> text=Add a destination")
    await page.select_option("#channel fieldset:nth-of-type(2) select", "hls")
    await shot(page, "channel_form")
    await page.click("#channel button[type=submit]")
    await page.wait_for_selector("#panel_channels h3 >> text=night")
    (made,) = (await server.http.get("/v1/channels")).json()["channels"]
    assert [(entry["text"], entry["at"] is None) for entry in made["schedule"]["entries"]] == [("hello", True), ("news", False)]
    await page.click("#panel_channels button >> text=Edit")
    await page.set_input_files("#channel input[type=file]", {"name": "a.wav", "mimeType": "audio/wav", "buffer": spoken(0.5)})
    await page.wait_for_selector("#channel option >> text=Sound 1", state="attached")
    await page.select_option("#channel .part_row:first-child select[data-sounds]", label="Sound 1, 0.5 s")
    await page.fill("#channel input[type=url]", "https://8.8.8.8/hook")
    await page.fill("#channel fieldset:last-of-type input[type=password]", "sixteen characters")
    await shot(page, "channel_edit")
    await page.click("#channel button[type=submit]")
    await page.wait_for_selector("#channel", state="hidden")
    (now,) = (await server.http.get("/v1/channels")).json()["channels"]
    assert now["schedule"]["entries"][0]["sound"] == now["sounds"][0]["id"] and now["schedule"]["entries"][1] == made["schedule"]["entries"][1]
    assert now["outputs"] == made["outputs"] and now["webhook"] == "https://8.8.8.8"
    await page.click("#panel_channels button >> text=Edit")
    await page.check("#channel fieldset:last-of-type input[type=checkbox]")
    await page.click("#channel button[type=submit]")
    await page.wait_for_selector("#channel", state="hidden")
    assert (await server.http.get("/v1/channels")).json()["channels"] == [{**now, "webhook": None}]
    await page.click("#panel_channels button >> text=Start")
    await page.wait_for_selector("#panel_channels .pill >> text=On air")
    await page.select_option("#panel_channels select", "trained_9")
    for words in ("Switch", "Sure?"):
        await page.click(f"#panel_channels button >> text={words}")
    await page.wait_for_selector("#panel_channels dd >> text=trained 9")
    await shot(page, "channels")
    for words in ("Stop", "Sure?"):
        await page.click(f"#panel_channels button >> text={words}")
    await page.wait_for_selector("#panel_channels .pill >> text=Off air")
    for words in ("Erase", "Sure?"):
        await page.click(f"#panel_channels button >> text={words}")
    await page.wait_for_selector("text=No channels yet.")


async def add_a_face(page) -> None:
    """With a record of consent: the avatar on stage becomes the new one."""
    await page.click("button.add")
    await page.set_input_files("#upload input[type=file]", {"name": "me.png", "mimeType": "image/png", "buffer": portrait()})
    await page.fill("#upload input[maxlength='64']", "Ada")
    await page.check("#upload input[value=person]")
    await page.fill("#upload input[maxlength='200']", "Ada L.")
    await shot(page, "upload")
    await page.click("#upload button[type=submit]")
    await page.wait_for_selector("#avatars .face:has-text('Ada') input:checked", state="attached")
    await page.click("#tab_provenance")
    await page.wait_for_selector("#panel_provenance td >> text=Ada L.")
    await page.wait_for_selector("#panel_provenance td >> text=C2PA")
    assert "Invalid" not in await page.inner_text("#panel_provenance")
    await shot(page, "provenance")


def test_a_phone_in_the_dark_with_a_key_that_may_only_watch_and_steer(running_browser, tmp_path):
    """Nothing is wider than the phone; what the key or the server does not give is disabled and says why; a wrong key is told."""

    runner, browser = running_browser

    async def body():
        async with on_port(settings(tmp_path)) as (server, port):
            phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "is_mobile": True, "has_touch": True}
            async with visitor(browser, f"http://{port}", **phone) as (page, wrong):
                await page.fill("#key", "la_000000000000_wrong")
                await page.press("#key", "Enter")
                await page.wait_for_selector("text=This key does not open the server.")
                refused, wrong[:] = list(wrong), []  # the browser writes refused requests down itself
                await enter(page, server.tenant("guest", ("view", "control")))
                await page.tap("#start")
                await moving(page)
                assert await page.is_disabled("#mic") and await page.is_disabled("#interrupt") and await page.is_disabled("#text")
                assert await page.query_selector("#tab_chain") is None, "the chain is the operator's"
                for tab in ("health", "sessions", "outputs", "channels", "provenance", "server", "log"):
                    await page.tap(f"#tab_{tab}")
                    assert await page.evaluate("document.documentElement.scrollWidth <= 390"), tab
                await shot(page, "phone_dark")
                await page.tap("button.add")
                await page.check("#upload input[value=person]")
                spare = """document.getElementById("upload").getBoundingClientRect().right
                    - document.querySelector("#upload .primary").getBoundingClientRect().right"""
                assert await page.evaluate(spare) > 20, "the form stays within its dialog"
                await shot(page, "phone_upload")
                await page.tap("#upload button[type=button]")
                await page.tap("#tab_channels")
                await page.tap("#panel_channels button >> text=New channel")
                await page.tap("#channel button >> text=Add an entry")
                await page.tap("#channel button >> text=Add a destination")
                assert await page.evaluate("channel.scrollWidth <= channel.clientWidth && document.documentElement.scrollWidth <= 390")
                await shot(page, "phone_channel")
                unnamed = await page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, [role=img], video, meter")]
                    .filter(e => e.checkVisibility() && !(e.innerText || e.ariaLabel || e.title || e.labels?.length)).map(e => e.outerHTML)""")
                return refused, wrong, unnamed

    refused, wrong, unnamed = runner.run(asyncio.wait_for(body(), 120))
    assert len(refused) == 1 and "401" in refused[0]
    assert wrong == [] and unnamed == []


def test_a_page_that_is_loaded_anew_gives_its_place_back_unless_it_is_on_air(running_browser, tmp_path):
    runner, browser = running_browser

    async def begun(page, server):
        await page.click("#start")
        await moving(page)
        (session,) = server.studio.sessions.values()
        return session

    async def until(true) -> None:
        async with asyncio.timeout(WAIT_MS / 1000):
            while not true():
                await asyncio.sleep(0.05)

    async def body():
        async with on_port(settings(tmp_path)) as (server, port), visitor(browser, f"http://{port}") as (page, wrong):
            await enter(page, server.key)
            session = await begun(page, server)
            await page.reload()
            await until(lambda: session.state == "closed")
            session = await begun(page, server)
            made = await server.http.post(f"/v1/sessions/{session.id}/outputs", json={"kind": "hls"})
            assert made.status_code == 201
            await holds(page, "document.getElementById('state').dataset.state === 'idle'")
            await asyncio.sleep(2)  # the page is told once a second who else takes the picture
            await page.reload()
            await until(lambda: len(session.broadcast.sinks) == 1)  # the playlist's
            assert session.state == "idle" and wrong == []

    runner.run(body())


def test_the_page_takes_nothing_from_elsewhere_and_says_everything_twice():
    """No other host, no inline script or style, no HTML from strings; each word in both languages, each that is used known."""
    files = {path.name: path.read_text(encoding="utf-8") for path in CONSOLE.iterdir()}
    whole = "\n".join(files.values()).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|innerHTML|insertAdjacentHTML|\beval\(|document\.write", whole)
    assert not re.search(r"\son\w+=|\sstyle=|<script(?![^>]*src=)", files["index.html"])
    words = dict(re.findall(r'(\w+): \[("(?:[^"\\]|\\.)*", "(?:[^"\\]|\\.)*")\]', files["words.js"]))
    used = set(re.findall(r'data-t(?:-label|-placeholder)?="(\w+)"', files["index.html"])) | set(re.findall(r'\bt\("(\w+)"', whole))
    assert used <= set(words) == set(re.findall(r"(\w+): \[", files["words.js"])) and len(words) > 100
    assert max(text.count("\n") for text in files.values()) < 450
