"""What the local ears and voices of `liveavatar talk` are worth: word errors, speed, and turns found in noise.

    PYTHONPATH=. python bench/listening.py --out bench/results/listening-cpu2.json

Readings: the five LibriVox clips of Debian's pocketsphinx-testdata with their own transcript (71 words: a sample, not a
benchmark), clean and with white noise 10 dB below. Voices: sentences said by hibari and flite, read back by the recogniser.
Words are compared in lower case without punctuation, "mr" as "mister"; the error is the edit distance over all words.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import numpy as np
from measured import parser_of, write

from liveavatar.conditioning.media import read_audio
from liveavatar.runtime.intake import Intake
from liveavatar.serving.ears import Began, Ears, Ended, WhisperRecogniser
from liveavatar.serving.voices import voice_named

CLIPS = Path("/usr/share/pocketsphinx/test/data/librivox")
SENTENCES = ("What is seven times eight?", "My name is Ada and I live in London.", "Please tell me what the weather will be like on Tuesday.",
             "Stop, that is not what I meant.", "How long does the train to Edinburgh take?", "Could you count from one to ten, slowly?",
             "I would like to order two coffees and a piece of cake.", "Who wrote the book on the table behind you?")  # fmt: skip


def words(text: str) -> list[str]:
    """As compared."""
    return re.sub(r"[^a-z' ]", " ", text.lower().replace("-", " ").replace("mister", "mr")).split()


def errors(said: list[str], read: list[str]) -> int:
    """Edit distance."""
    row = list(range(len(read) + 1))
    for i, a in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(read, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


async def judge(recognise, pairs) -> dict:
    """pairs: (float32 at 16 kHz, its text)."""
    wrong = total = 0
    seconds, read = [], []
    for pcm, text in pairs:
        start = time.perf_counter()
        read.append(await recognise(pcm))
        seconds.append(time.perf_counter() - start)
        wrong, total = wrong + errors(words(text), words(read[-1])), total + len(words(text))
    return {"word_error": round(wrong / total, 3), "wrong": wrong, "words": total, "seconds_p50": round(float(np.median(seconds)), 2), "read": read}


def sphinx():
    """The recogniser that was not chosen: pocketsphinx 5.1 with the model in its wheel."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=16_000, loglevel="FATAL")

    async def recognise(pcm: np.ndarray) -> str:
        decoder.start_utt()
        decoder.process_raw(np.rint(pcm * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        return decoder.hyp().hypstr if decoder.hyp() else ""

    return recognise


def readings() -> list[tuple[np.ndarray, str]]:
    """With their transcript, without the marks of begin and end."""
    lines = re.findall(r"<s> (.*) </s> \((.*)\)", (CLIPS / "transcription").read_text())
    return [(np.concatenate(list(read_audio(CLIPS / f"{name}.wav"))), text) for text, name in lines]


def noisy(pcm: np.ndarray, decibels: float = 10.0) -> np.ndarray:
    """float32, with white noise so far below."""
    noise = np.random.default_rng(0).normal(size=len(pcm)) * np.sqrt(np.mean(pcm**2)) / 10 ** (decibels / 20)
    return (pcm + noise).astype(np.float32)


async def spoken(name: str) -> tuple[list, dict]:
    """The sentences at 16 kHz, and how fast they were made."""
    voice, pairs, wall, length = voice_named(name), [], 0.0, 0.0
    for text in SENTENCES:
        start, down = time.perf_counter(), Intake(16_000)
        sound = [piece async for piece in voice.speak(text)]
        wall += time.perf_counter() - start
        length += sum(len(pcm) / rate for pcm, rate in sound)
        pairs.append((np.concatenate([*(down.push(pcm, rate) for pcm, rate in sound), down.flush()]), text))
    return pairs, {"real_time_factor": round(length / wall, 1)}


def turns(pcm: np.ndarray) -> list[str]:
    """What the ears make of a stream, with 1 s of silence behind."""
    return [type(event).__name__ for event in Ears().hear(np.concatenate([pcm, np.zeros(16_000, np.float32)]), 16_000)]


async def measure() -> dict:
    whisper, clean = WhisperRecogniser(), readings()
    rough = [(noisy(pcm), text) for pcm, text in clean]
    found = {"whisper_tiny_en": {"clean": await judge(whisper.recognise, clean), "noise_10_db": await judge(whisper.recognise, rough)},
             "pocketsphinx": {"clean": await judge(sphinx(), clean), "noise_10_db": await judge(sphinx(), rough)}}  # fmt: skip
    for name in ("hibari", "flite"):
        pairs, speed = await spoken(name)
        found[name] = speed | {"read_back": await judge(whisper.recognise, pairs)}
    one = [Began.__name__, Ended.__name__]
    rng, t = np.random.default_rng(1), np.arange(160_000) / 16_000
    found["turns"] = {
        "readings_found_as_one_turn": sum(turns(pcm) == one for pcm, _ in clean), "with_noise": sum(turns(pcm) == one for pcm, _ in rough), "of": len(clean),
        "false_turns_in_10_s": {"white noise": len(turns(rng.normal(0, 0.05, 160_000).astype(np.float32))) // 2,
                                "tone": len(turns((0.3 * np.sin(2 * np.pi * 440 * t)).astype(np.float32))) // 2},
    }  # fmt: skip
    start = time.perf_counter()
    Ears().hear(np.zeros(160_000, np.float32), 16_000)
    found["turns"]["cpu_per_second_of_sound"] = round((time.perf_counter() - start) / 10, 4)
    return found


if __name__ == "__main__":
    out = parser_of(__doc__, "listening.json", compare=False).parse_args().out
    result = asyncio.run(measure())
    print(json.dumps(result, indent=1))
    write(out, **result)
