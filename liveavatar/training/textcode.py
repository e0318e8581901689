"""Stage `text`: the tiny text encoder learns to say colours, on captions alone.

A random encoder is a fixed code of the bytes; what it says of "red shirt" is spread over rows that change with every other
word, more than a few hundred clips teach a transformer to read. Here a throw-away linear reader has to find what a caption
says in the mean of its rows, so that afterwards one linear layer finds it too. Minutes on one core, no picture needed.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from liveavatar.core import ConfigError
from liveavatar.models.encoders import TextEncoder
from liveavatar.training.checkpoints import checkpoint_path, load_average
from liveavatar.training.loop import Draws, LoopConfig, Trainer
from liveavatar.training.synth.people import DRESS, EYES, HAIR, PLAIN, STYLES, Identity, srgb
from liveavatar.training.wording import LOOKS, worded

UNSAID = ""  # the first value of every trait
TRAITS = {"shirt": PLAIN, "background": PLAIN, "hair": HAIR, "style": STYLES, "iris": EYES, "sex": ("man", "woman"),
          "years": ("young", "middle-aged", "older")}  # fmt: skip
VALUES = {trait: (UNSAID, *names) for trait, names in TRAITS.items()}
HELD_CAPTIONS = 1000


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """layers, heads: of the encoder, whose width is the transformer's text_dim. colours: weight of the squared error of
    shirt and backdrop in sRGB beside the cross entropies of what is said."""

    loop: LoopConfig
    layers: int = 2
    heads: int = 2
    colours: float = 20.0

    def __post_init__(self):
        if self.layers < 1 or self.heads < 1 or self.colours < 0:
            raise ConfigError(f"text: layers={self.layers}, heads={self.heads}: at least 1; colours={self.colours}: not negative")


def new_encoder(width: int, seed: int, layers: int = 2, heads: int = 2) -> UMT5EncoderModel:
    """A UMT5 over bytes, randomly started: rows of `width`."""
    config = UMT5Config(vocab_size=384, d_model=width, d_kv=32, d_ff=2 * width, num_layers=layers, num_heads=heads,
                        feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6, dropout_rate=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UMT5EncoderModel(config)


class Reader(nn.Module):
    """The encoder and the linear reader of its mean row, which is thrown away afterwards."""

    def __init__(self, config: TextConfig, width: int, seed: int):
        super().__init__()
        self.encoder = new_encoder(width, seed, config.layers, config.heads)
        self.sizes = [len(values) for values in VALUES.values()]
        self.head = nn.Linear(width, sum(self.sizes) + 3 * len(DRESS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Tokens and mask int64 [B,n], on any device -> (per trait: logits [B, its values], colours of DRESS in sRGB [B,2,3])."""
        ids, mask = (t.to(self.head.weight.device) for t in (ids, mask))
        rows = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        *logits, colours = self.head(mean).split([*self.sizes, 3 * len(DRESS)], dim=1)
        return dict(zip(VALUES, logits)), colours.unflatten(1, (len(DRESS), 3))


@dataclass(frozen=True)
class Said:
    """Captions and what they say: per trait int64 [B], 0 where nothing; colours float32 [B,2,3] of DRESS, told bool [B,2]."""

    captions: list[str]
    values: dict[str, torch.Tensor]
    colours: torch.Tensor
    told: torch.Tensor

    def to(self, device: torch.device) -> Said:
        """The same on another device; captions are bytes until they are read."""
        values = {trait: t.to(device) for trait, t in self.values.items()}
        return replace(self, values=values, colours=self.colours.to(device), told=self.told.to(device))


def said(rng: np.random.Generator, count: int) -> Said:
    """Captions of people drawn at random, dressed at random."""
    rows = [_one(rng) for _ in range(count)]
    values = {trait: torch.tensor([VALUES[trait].index(row[1][trait]) for row in rows]) for trait in VALUES}
    dress = [[row[1][part] for part in DRESS] for row in rows]
    colours = torch.tensor([[srgb(name) if name else (0.0, 0.0, 0.0) for name in names] for names in dress])
    return Said([row[0] for row in rows], values, colours, torch.tensor([[bool(name) for name in names] for names in dress]))


def _one(rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    person = Identity.sample(int(rng.integers(1 << 31))).dressed(rng)
    if rng.random() < 0.2:
        return person.caption, _told(person, "whole", DRESS)
    looks, parts = str(rng.choice(LOOKS)), [part for part in DRESS if rng.random() < 0.8]
    return worded(person, parts, rng, looks), _told(person, looks, parts)


def _told(person: Identity, looks: str, parts) -> dict[str, str]:
    """What a caption with these parts says of every trait."""
    bald = person.style == "bald"
    whole = {"hair": UNSAID if bald else person.hair_name, "style": person.style, "iris": person.iris_name}
    short = {"sex": person.who.split()[-1], "years": person.years.strip() or "young"}
    told = {"whole": whole | short, "short": short, "none": {}}[looks] | {part: getattr(person, f"{part}_name") for part in parts}
    return dict.fromkeys(VALUES, UNSAID) | told


@functools.cache
def byte_tokenizer() -> ByT5Tokenizer:
    """The one of all captions; it has no state."""
    return ByT5Tokenizer()


def tokens(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes int64 [B,n] with the end token, padded, and their mask."""
    made = byte_tokenizer()(captions, padding=True, return_tensors="pt")
    return made.input_ids, made.attention_mask


def reading_loss(reader: Reader, batch: Said, weight: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross entropies of what is said plus the weighted squared error of the colours that are; and both as metrics."""
    logits, colours = reader(*tokens(batch.captions))
    entropy = sum(F.cross_entropy(logits[trait].float(), batch.values[trait]) for trait in VALUES)
    error = (colours.float() - batch.colours)[batch.told].square().mean()
    return entropy + weight * error, {"entropy": float(entropy.detach()), "colour": float(error.detach().sqrt())}


def train_text(config: TextConfig, width: int, run: str | Path, seed: int, stop_after: int | None = None) -> list[float]:
    """Train (or go on training) the encoder; returns the losses of this call. Writes RUN/text.json when it is done."""
    reader = Reader(config, width, seed)
    trainer = Trainer("text", reader, config.loop, run, seed)

    def loss_of(draws: Draws):
        return reading_loss(reader, said(draws.numpy, config.loop.batch).to(trainer.device), config.colours)

    losses = trainer.run(loss_of, stop_after)
    if trainer.iteration == config.loop.iterations:
        (Path(run) / "text.json").write_text(json.dumps(worth(config, width, run, seed), indent=1))
    return losses


@torch.no_grad()
def worth(config: TextConfig, width: int, run: str | Path, seed: int) -> dict[str, float]:
    """How often a linear reader finds what captions that were not trained on say, per trait; root mean square colour error."""
    reader = Reader(config, width, seed)
    iteration = load_average(reader, checkpoint_path(run, "text"))
    held = said(np.random.default_rng([0x7E87, seed]), HELD_CAPTIONS)
    logits, colours = reader.eval()(*tokens(held.captions))
    right = {trait: float((logits[trait].argmax(1) == held.values[trait]).float().mean()) for trait in VALUES}
    return {"iteration": iteration, "captions": len(held.captions), **right,
            "colour rmse": float((colours - held.colours)[held.told].square().mean().sqrt())}


def text_encoder_of(model: dict, seed: int, config: TextConfig | None = None, run: str | Path | None = None) -> TextEncoder:
    """The tiny text encoder of a transformer's sizes: as RUN/text.pt has it where there is a `text` section, else random, a
    fixed code of the prompt. Raises WeightsError without the checkpoint."""
    if config is None:
        encoder = new_encoder(model["text_dim"], seed)
    else:
        reader = Reader(config, model["text_dim"], seed)
        load_average(reader, checkpoint_path(run, "text"))
        encoder = reader.encoder
    return TextEncoder(encoder.eval().requires_grad_(False), byte_tokenizer())
