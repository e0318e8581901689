"""A picture of the console on a server that runs: `python bench/console.py URL OUT.png < key`.

The avatar speaks the packaged clip, is interrupted, and speaks again: text where the server has a voice, else the clip.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SPEECH = Path(__file__).parent.parent / "liveavatar/assets/speech.wav"
FLAGS = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required", "--disable-features=WebRtcHideLocalIpsWithMdns"]
TEXT = "Good evening. I am the avatar inside this package. What you see is made on two processor cores, block by block, while I speak."


def speak(page) -> None:
    """Again."""
    if page.is_enabled("#text"):
        page.fill("#text", TEXT)
        page.click("#speak_it")
    else:
        page.set_input_files("#sound_file", SPEECH)


def main() -> None:
    """Prints what the page measured."""
    from playwright.sync_api import sync_playwright

    said = argparse.ArgumentParser(description=__doc__)
    said.add_argument("url")
    said.add_argument("out", type=Path)
    said.add_argument("--height", type=int, default=960)
    asked = said.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(viewport={"width": 1360, "height": asked.height}, locale="en-GB", reduced_motion="reduce")
        page.on("console", lambda message: print(message.type, message.text, file=sys.stderr))
        page.set_default_timeout(45_000)
        page.goto(asked.url)
        page.fill("#key", sys.stdin.readline().strip())
        page.press("#key", "Enter")
        page.click("#start")
        page.wait_for_selector("#state[data-state=idle]")
        page.set_input_files("#sound_file", SPEECH)
        page.wait_for_selector("#state[data-state=speaking]")
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")
        page.wait_for_selector("#figure_silence >> text=ms")
        page.wait_for_timeout(3000)  # the notice goes
        speak(page)
        page.wait_for_selector("#state[data-state=speaking]")
        page.click("#panel_chain button")
        page.wait_for_selector("div.steps img")
        page.wait_for_timeout(2000)
        page.screenshot(path=asked.out, full_page=True)
        print({name.get_attribute("id"): name.inner_text() for name in page.query_selector_all("#figures dd")})
        page.click("#end")
        page.wait_for_selector("#start:visible")
        browser.close()


if __name__ == "__main__":
    main()
