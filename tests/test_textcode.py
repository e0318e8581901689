"""Captions in other words say what they should, and the text code learns to say it too."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from liveavatar.core import ConfigError, WeightsError
from liveavatar.training import textcode
from liveavatar.training.loop import LoopConfig
from liveavatar.training.synth.people import DRESS, PLAIN, Identity
from liveavatar.training.wording import WAYS, worded

PERSON = Identity.sample(15)


def config(iterations: int) -> textcode.TextConfig:
    loop = LoopConfig(iterations=iterations, batch=16, lr=1e-2, warmup=5, ema=0.9, threads=1, bf16=False, muon=True, device="cpu")
    return textcode.TextConfig(loop=loop, layers=1)


def test_a_wording_names_the_parts_it_was_asked_for_and_no_others():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        parts = [part for part in DRESS if rng.random() < 0.5]
        text = worded(PERSON, parts, rng, "none").lower()
        for part in DRESS:
            assert (getattr(PERSON, f"{part}_name") in text) == (part in parts), text
        seen |= {way for part in parts for way in WAYS[part] if way.format(c=getattr(PERSON, f"{part}_name"), a="a") in text}
    assert seen >= set(WAYS["shirt"][:3]), "all ways come up"
    assert worded(PERSON, (), rng, "none").strip(".") == "" and worded(PERSON, (), rng, "whole").lower().startswith(PERSON.looks.lower())
    orange = PERSON.dressed(np.random.default_rng(0)).__class__(**{**PERSON.record(), "shirt_name": "orange"})
    assert not any(" a orange" in worded(orange, ("shirt",), rng, "none").lower() for _ in range(60))


def test_one_part_can_be_exchanged_alone():
    both, shirt, backdrop = (PERSON.dressed(np.random.default_rng(1), parts) for parts in (DRESS, ("shirt",), ("background",)))
    assert shirt.shirt == both.shirt and shirt.background == PERSON.background and shirt.background_name == PERSON.background_name
    assert backdrop.background == both.background and backdrop.shirt == PERSON.shirt and backdrop.caption.split(",")[0] == PERSON.caption.split(",")[0]


def test_what_a_caption_says_is_known():
    made = textcode.said(np.random.default_rng(3), 200)
    for caption, k in zip(made.captions, range(200)):
        for part, names in zip(DRESS, made.told[k]):
            value = textcode.VALUES[part][made.values[part][k]]
            assert bool(names) == (value != textcode.UNSAID) and (value == textcode.UNSAID or value in caption.lower()), caption
        eyes = textcode.VALUES["iris"][made.values["iris"][k]]
        assert (f"{eyes} eyes" in caption) == (eyes != textcode.UNSAID)
    assert set(textcode.VALUES["shirt"]) == {textcode.UNSAID, *PLAIN}


def test_the_code_is_learned_kept_and_resumed(tmp_path):
    """Losses fall, a run in two pieces repeats them, and the encoder that comes out is the one that was trained."""
    whole = textcode.train_text(config(30), 32, tmp_path / "a", 0)
    parts = [loss for stop in (11, None) for loss in textcode.train_text(config(30), 32, tmp_path / "b", 0, stop)]
    assert whole == parts and np.mean(whole[-5:]) < 0.75 * np.mean(whole[:5])
    report = json.loads((tmp_path / "a" / "text.json").read_text())
    assert report["iteration"] == 30 and 0 < report["sex"] <= 1 and set(textcode.VALUES) < set(report)
    trained, random = (textcode.text_encoder_of({"text_dim": 32}, 0, *how) for how in ((config(30), tmp_path / "a"), ()))
    rows = [encoder.encode("red shirt") for encoder in (trained, random)]
    assert rows[0].shape == rows[1].shape == (10, 32) and not torch.allclose(rows[0], rows[1])
    reader = textcode.Reader(config(30), 32, 0)
    textcode.load_average(reader, tmp_path / "a" / "text.pt")
    ids, mask = textcode.tokens(["red shirt", "a much longer caption than that"])
    padded = reader.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0, :10]
    assert torch.allclose(padded, rows[0], atol=1e-5), "padding in training changes nothing"


def test_it_is_trained_wherever_the_weights_lie():
    """Captions come from the CPU; meta stands for a GPU."""
    class Encoder(torch.nn.Module):  # transformers asks what is in a mask, which meta does not know
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 32, device=input_ids.device))

    reader = textcode.Reader(config(1), 32, 0)
    reader.encoder = Encoder()
    reader.to("meta")
    logits, colours = reader(*textcode.tokens(["red shirt", "a man"]))
    batch = textcode.said(np.random.default_rng(0), 2).to(torch.device("meta"))
    tensors = [colours, batch.colours, batch.told, *logits.values(), *batch.values.values()]
    assert {t.device.type for t in tensors} == {"meta"} and colours.shape == batch.colours.shape


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="layers=0"):
        textcode.TextConfig(loop=config(1).loop, layers=0)
    with pytest.raises(WeightsError):
        textcode.text_encoder_of({"text_dim": 32}, 0, config(1), tmp_path)
