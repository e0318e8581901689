"""Text to speech: two local voices and any server that speaks OpenAI's /audio/speech; and the way a voice's sound takes.

A voice turns one sentence into sound, piece by piece as it is made. It knows no session, and no avatar.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import tempfile
import wave
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.serving import tls
from liveavatar.serving.problems import BufferFull, Problem, Unprocessable
from liveavatar.serving.settings import SpeechConfig

Sound = tuple[np.ndarray, int]  # int16 [n] mono, Hz
Speak = Callable[[str], AsyncGenerator[Sound]]  # text -> its sound, as it is made

VOICES = ("hibari", "flite", "openai")
TEXT_LIMIT = 5000  # characters of one request
VOICE_SECONDS = 60.0  # a voice that says nothing for so long has failed
OPENAI_RATE = 24_000  # Hz, of OpenAI's response_format "pcm"
PUSH_SECONDS = 0.5  # of sound at a time
ROOM_SECONDS = 0.1  # between two tries when the avatar is full: the sound waits, none is lost


class VoiceFailed(Problem):
    """The voice cannot be reached, refused, or broke off."""

    status, kind, title = 502, "voice", "The voice failed"


class Voice(Protocol):
    """Says text. Pieces come as they are made; leaving the iteration early stops the work."""

    def speak(self, text: str) -> AsyncIterator[Sound]: ...


def open_voice(config: SpeechConfig) -> Voice | None:
    """What the section `speech` names; None for "none". Raises ConfigError where it is not installed."""
    if config.voice == "none":
        return None
    return voice_named(config.voice, speaker=config.speaker, url=config.url, model=config.model, key=key_of(config.key_file))


def key_of(file: str | None) -> str | None:
    """The key in a file of the operator's; None without one. Raises ConfigError."""
    try:
        return Path(file).read_text(encoding="utf-8").strip() if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the key cannot be read ({error}): name a text file that holds it") from None


def voice_named(name: str, *, speaker: str | None = None, url: str | None = None, model: str | None = None, key: str | None = None) -> Voice:
    """One of VOICES. url, model, key: of a server. Raises ConfigError."""
    one_of("speech.voice", name, VOICES)
    match name:
        case "hibari":
            return HibariVoice(speaker or "heart")
        case "flite":
            return FliteVoice(speaker or "slt")
    if url is None:
        raise ConfigError("speech.voice=openai needs speech.url, e.g. https://api.openai.com/v1")
    return OpenAIVoice(url, model=model or "tts-1", speaker=speaker or "alloy", key=key)


def speakable(text: str) -> str:
    """`text` on one line. Raises Unprocessable when there is nothing to say, or too much at once."""
    line = " ".join(text.split())
    if not re.search(r"\w", line):
        raise Unprocessable("there is nothing to say: the text has no letter and no digit")
    if len(line) > TEXT_LIMIT:
        raise Unprocessable(f"{len(line)} characters at once: {TEXT_LIMIT} is the limit, send it in parts")
    return line


# ---------------------------------------------------------------- local voices


class HibariVoice:
    """hibari-tts (Apache-2.0): American English, 24 kHz, on one CPU core; model and lexicon are in its wheel.

    speaker: "heart" is in the wheel; others only where they were put beforehand, nothing is downloaded here.
    """

    def __init__(self, speaker: str = "heart"):
        try:
            from hibari import Hibari
            from hibari.voices import VOICES, voice_path
        except ImportError:
            raise ConfigError("speech.voice=hibari needs hibari-tts: pip install 'liveavatar[talk]'") from None
        if speaker not in VOICES:
            raise ConfigError(f"speech.speaker={speaker}: hibari has {', '.join(VOICES)}")
        try:
            self._model = Hibari(speaker, model=voice_path(speaker, download_missing=False))
        except FileNotFoundError as error:
            raise ConfigError(f"speech.speaker={speaker}: {error} is not here; only heart comes with the package") from None
        self._model("Ready.")  # the first sentence pays for lexicon and tagger: 0.5 s
        self._thread = ThreadPoolExecutor(1, "hibari")  # the model is one object: one piece at a time, also after one that nobody waits for

    async def speak(self, text: str) -> AsyncIterator[Sound]:
        """See Voice. Raises Unprocessable."""
        pieces, loop = self._model.stream(speakable(text), seed=0), asyncio.get_running_loop()
        while (pcm := await loop.run_in_executor(self._thread, next, pieces, None)) is not None:
            yield np.rint(np.clip(pcm, -1, 1) * 32767).astype(np.int16), self._model.sample_rate


class FliteVoice:
    """CMU Flite (BSD-like), the Debian package `flite`, as a process of its own for each sentence: 16 kHz, plainly a machine."""

    def __init__(self, speaker: str = "slt", program: str = "flite"):
        self.program = shutil.which(program)
        if self.program is None:
            raise ConfigError("speech.voice=flite needs the program flite; Debian: apt install flite")
        if not re.fullmatch(r"[a-z0-9_]+", speaker):  # flite would also load a file or an address
            raise ConfigError(f"speech.speaker={speaker}: flite has kal, kal16, awb, rms and slt")
        self.speaker = speaker

    async def speak(self, text: str) -> AsyncIterator[Sound]:
        """See Voice. Raises Unprocessable, VoiceFailed."""
        with tempfile.TemporaryDirectory(prefix="voice-") as folder:
            source, target = Path(folder, "text"), Path(folder, "out.wav")
            source.write_text(speakable(text) + "\n", encoding="utf-8")  # not an argument: those can be read by everybody
            await self._run(source, target)
            with wave.open(str(target)) as file:  # flite writes a whole file only: into a pipe it hangs
                pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                yield pcm, file.getframerate()

    async def _run(self, source: Path, target: Path) -> None:
        process = await asyncio.create_subprocess_exec(
            self.program, "-voice", self.speaker, "-f", str(source), "-o", str(target),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)  # fmt: skip
        try:
            await asyncio.wait_for(process.wait(), VOICE_SECONDS)
        except TimeoutError:
            raise VoiceFailed(f"flite said nothing for {VOICE_SECONDS:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # it is over
                process.kill()
        if process.returncode or not target.is_file():
            raise VoiceFailed(f"flite ended with status {process.returncode}")


# ---------------------------------------------------------------- a server


class OpenAIVoice:
    """POST {url}/audio/speech with response_format "pcm": 16-bit little-endian mono, played as it arrives.

    url: the operator's, e.g. https://api.openai.com/v1. rate: Hz of what it sends, unless its content type says another.
    """

    def __init__(self, url: str, *, model: str, speaker: str, key: str | None = None, rate: int = OPENAI_RATE):
        self.url, self.body, self.rate = url.rstrip("/"), {"model": model, "voice": speaker, "response_format": "pcm"}, rate
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def speak(self, text: str) -> AsyncIterator[Sound]:
        """See Voice. Raises Unprocessable, VoiceFailed."""
        import httpx

        body = {**self.body, "input": speakable(text)}
        try:
            async with httpx.AsyncClient(timeout=VOICE_SECONDS, verify=await tls.context()) as client:
                async with client.stream("POST", f"{self.url}/audio/speech", json=body, headers=self._headers) as answer:
                    rate = await self._accepted(answer)
                    async for pcm in _whole_samples(answer.aiter_bytes()):
                        yield pcm, rate
        except httpx.HTTPError as error:
            raise VoiceFailed(f"{self.url}: {type(error).__name__}: {error}") from None

    async def _accepted(self, answer) -> int:
        """Hz. Raises VoiceFailed."""
        kind = answer.headers.get("content-type", "")
        if answer.status_code != 200:
            detail = (await answer.aread())[:200].decode("utf-8", "replace")
            raise VoiceFailed(f"{self.url}: status {answer.status_code}: {detail}")
        if re.match(r"(audio/(wav|x-wav|mpeg|ogg|flac|aac|opus)|application/json|text/)", kind):
            raise VoiceFailed(f"{self.url}: sends {kind} although raw PCM was asked for (response_format=pcm)")
        said = re.search(r"rate=(\d+)", kind)
        return int(said[1]) if said else self.rate


async def _whole_samples(chunks: AsyncIterator[bytes]) -> AsyncIterator[np.ndarray]:
    """A chunk may end within a sample."""
    rest = b""
    async for chunk in chunks:
        data = rest + chunk
        whole = len(data) // 2 * 2
        rest = data[whole:]
        if whole:
            yield np.frombuffer(data[:whole], "<i2")


# ---------------------------------------------------------------- into the avatar


async def say_to(avatar, sound: Sound, *, segment: int, epoch: int | None = None, end: bool = False,
                 sleep: Callable[[float], Awaitable] = asyncio.sleep) -> None:  # fmt: skip
    """Push a sound into a LiveSession, waiting while that is full: long speech is held back, never dropped. Raises Conflict.

    epoch: in which it was meant (None: the present one). After an interruption the rest is of no use to anybody: the session drops it.
    """
    pcm, rate = sound
    step = max(1, round(PUSH_SECONDS * rate))
    pieces = [pcm[at : at + step] for at in range(0, len(pcm), step)] or [pcm]
    epoch = avatar.epoch if epoch is None else epoch
    for number, piece in enumerate(pieces):
        while True:
            try:
                await avatar.push_audio(piece, rate, segment=segment, epoch=epoch, end=end and number == len(pieces) - 1)
                break
            except BufferFull:
                await sleep(ROOM_SECONDS)
