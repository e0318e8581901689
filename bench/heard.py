"""What viseme encoders hear of strangers: correlation and slope with what is said, of pictures over all of a set.

    PYTHONPATH=. .venv/bin/python bench/heard.py liveavatar/assets/default/viseme_encoder

Sets: 60 sentences of flite's voice awb, which no encoder of ours was trained on; the two clips of a LibriVox reader that ship; and, where Debian's
asterisk-core-sounds-en-g722 and ffmpeg are installed, 60 prompts that Allison Smith recorded, aligned with their text. Times of phones come from
flite, else from pocketsphinx. Needs [train].
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measured import parser_of, write

from liveavatar.conditioning.audio_features import BLOCK_FRAMES, TICKS_PER_FRAME, AudioFrontEnd, viseme_front_end
from liveavatar.conditioning.phones import AlignmentError, Utterance, align
from liveavatar.conditioning.visemes import ARTICULATORS, ROUND, WIDE, arkit, lip_gap
from liveavatar.core import FPS
from liveavatar.models.viseme_encoder import load_viseme_encoder
from liveavatar.training.hearing import articulators_of
from liveavatar.training.probing import agreement
from liveavatar.training.synth import speech

SENTENCES, FIRST_SEED, SECONDS = 60, 900_000, 6.0
PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison"), Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
WORDS = 6  # at least, of a prompt


def prompts() -> Iterator[Utterance]:
    """Allison Smith's, those that can be aligned."""
    folder, texts = PROMPTS
    for line in gzip.open(texts, "rt", errors="ignore"):
        name, _, text = line.strip().partition(": ")
        sound = folder / f"{name}.g722"
        if not re.fullmatch(r"[A-Za-z' ,.!?-]+", text) or len(text.split()) < WORDS or not sound.is_file():
            continue
        raw = subprocess.run(["ffmpeg", "-v", "error", "-f", "g722", "-i", sound, "-ac", "1", "-ar", "16000", "-f", "s16le", "-"],
                             capture_output=True, check=True).stdout  # fmt: skip
        try:
            yield align(np.frombuffer(raw, "<i2"), re.sub(r"[-,.!?]", " ", text))
        except AlignmentError:
            continue


def sets() -> dict[str, list[Utterance]]:
    """What is heard, by name."""
    found = {speech.HELD_OUT_VOICE: [speech.synthesize(FIRST_SEED + k, SECONDS, (speech.HELD_OUT_VOICE,)) for k in range(SENTENCES)],
             speech.READER: list(speech.readings())}
    if all(path.exists() for path in PROMPTS) and shutil.which("ffmpeg"):
        found["allison"] = [said for said, _ in zip(prompts(), range(SENTENCES))]
    return found


def measured(front_end: AudioFrontEnd, utterances: list[Utterance]) -> dict:
    """r and slope of every articulator, of the lips' gap and of their width, over the whole blocks of all utterances."""
    told, true = [], []
    for said in utterances:
        frames = int(said.seconds * FPS) // BLOCK_FRAMES * BLOCK_FRAMES
        told.append(front_end.features_of(said.pcm, frames)[0].T.numpy())
        true.append(articulators_of(said)[::TICKS_PER_FRAME][:frames])
    told, true = np.concatenate(told), np.concatenate(true)
    parts = {name: (told[:, k], true[:, k]) for k, name in enumerate(ARTICULATORS)}
    parts["gap"] = tuple(lip_gap(arkit(np.clip(a, 0, 1))) for a in (told, true))
    parts["width"] = tuple(a[:, WIDE] - a[:, ROUND] for a in (told, true))
    agreed = {name: agreement(*pair) for name, pair in parts.items()}
    return {"utterances": len(utterances), "pictures": len(true)} | {name: {k: round(float(a[k]), 4) for k in ("r", "slope")} for name, a in agreed.items()}


def main() -> None:
    parser = parser_of(__doc__, "heard.json", compare=False)
    parser.add_argument("encoders", nargs="+", help="folders of viseme encoders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    heard = sets()
    rows = {folder: {name: measured(viseme_front_end(load_viseme_encoder(folder)), said) for name, said in heard.items()} for folder in args.encoders}
    for folder, by_set in rows.items():
        for name, row in by_set.items():
            print(f"{folder} {name}: " + ", ".join(f"{part} {row[part]['r']:.3f}" for part in ("gap", "width", "jaw", "close", "wide", "round")))
    write(args.out, config={"sentences": SENTENCES, "seconds": SECONDS}, encoders=rows)


if __name__ == "__main__":
    main()
