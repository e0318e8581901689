"""Prompts: the judge of colours on pictures whose colours are known, what is asked, and how answers are counted."""

import numpy as np
import pytest
from drawn_clips import drawn_clip

from liveavatar.conditioning.clipfiles import clip_path, write_clip
from liveavatar.core import InputError
from liveavatar.evaluation import prompts

COLOURS = {"red": (160, 50, 48), "green": (66, 122, 84), "blue": (58, 92, 158), "white": (222, 222, 216)}
NAMES = list(COLOURS)


def portrait(shirt: str, background: str, gain: float = 1.0) -> np.ndarray:
    """uint8 [32,32,3]: a backdrop, a grey head that is the same for all, a shirt in the four lowest rows."""
    picture = np.zeros((32, 32, 3))
    picture[:] = COLOURS[background]
    picture[6:28, 8:24] = 128
    picture[28:] = np.array(COLOURS[shirt]) * gain
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture
def dressed():
    """All 12 pairs of different colours under two lights: pictures and the names of both parts."""
    pairs = [(s, b) for s in NAMES for b in NAMES if s != b] * 2
    pictures = np.stack([portrait(s, b, 0.9 if i < 12 else 1.1) for i, (s, b) in enumerate(pairs)])
    return pictures, {"shirt": [s for s, _ in pairs], "background": [b for _, b in pairs]}


def test_a_part_is_found_where_its_name_explains_the_pixels(dressed):
    pictures, names = dressed
    shirt, backdrop = (prompts.Part.learn(part, pictures, names[part]) for part in ("shirt", "background"))
    assert shirt.where[28:].all() and not shirt.where[:28].any()
    assert backdrop.where[:6].all() and not backdrop.where[28:].any() and not backdrop.where[6:28, 8:24].any()
    assert np.allclose(shirt.looks["red"], np.array(COLOURS["red"]), atol=1), "the middle of both lights"
    made = portrait("green", "white", 1.1)[None].repeat(3, axis=0)
    assert shirt.nearest(shirt.shown(made)) == "green" and backdrop.nearest(backdrop.shown(made)) == "white"
    assert backdrop.away(np.array(COLOURS["white"]) + 6, "white") == pytest.approx(6)


def test_the_ceiling_is_judged_on_pictures_that_the_judge_was_not_made_from(dressed, tmp_path):
    pictures, names = dressed
    with pytest.raises(InputError, match="holds no train/clip"):
        prompts.wardrobe(tmp_path)
    for i, picture in enumerate(pictures):
        clip = drawn_clip("train", i, size=32, pictures=2)
        clip.card["identity"] |= {"shirt_name": names["shirt"][i], "background_name": names["background"][i]}
        object.__setattr__(clip, "reference", picture)
        write_clip(clip_path(tmp_path, "train", i), clip)
    parts, ceiling = prompts.wardrobe(tmp_path)
    assert set(parts["shirt"].looks) == set(NAMES) and ceiling == {"shirt": 1.0, "background": 1.0}


CARD = {"caption": "a man with green eyes, red shirt, blue background", "identity": {"shirt_name": "red", "background_name": "blue"}}


def test_prompts_name_neither_what_is_worn_nor_one_colour_twice():
    made = prompts.asks(CARD, {"shirt": NAMES, "background": NAMES}, 40, np.random.default_rng(0))
    assert [a.saying for a in made[:4]] == list(prompts.SAYINGS)
    for ask in made:
        assert ask.named.get("shirt") != "red" and ask.named.get("background") != "blue" and len(set(ask.named.values())) == len(ask.named)
        assert all(f"{name} {part}" in ask.prompt for part, name in ask.named.items())
    whole = made[0]
    assert whole.prompt == f"a man with green eyes, {whole.named['shirt']} shirt, {whole.named['background']} background"
    assert made[2].prompt == f"{made[2].named['shirt']} shirt" and set(made[2].named) == {"shirt"}


def test_answers_are_counted_by_what_was_to_be_seen(dressed):
    pictures, names = dressed
    parts = {part: prompts.Part.learn(part, pictures, names[part]) for part in names}
    worn = {"shirt": "red", "background": "blue"}
    both = prompts.Ask("bare", "", {"shirt": "green", "background": "white"}, worn)
    alone = prompts.Ask("shirt", "", {"shirt": "white"}, worn)
    given = [(both, portrait("green", "white")), (both, portrait("green", "blue")), (alone, portrait("white", "blue")), (alone, portrait("red", "green"))]
    answers = [prompts.answer(ask, portrait("red", "blue"), picture[None], parts) for ask, picture in given]
    found = prompts.figures(answers)
    assert found["shirt"].tolist() == [1, 1, 1, 0] and found["background"].tolist() == [1, 0] and found["kept"].tolist() == [1, 0]
    assert found["background_away"][0] < 1 < found["background_away"][1]
    measures = {m.name: m for m in prompts.measures_of(answers, {"shirt": 0.9, "background": 1.0})}
    assert measures["prompt_shirt"].value == 0.75 and measures["prompt_kept"].n == 2
    assert "; 0 prompts" in measures["prompt_shirt"].reason
    assert not {m.name: m for m in prompts.measures_of([], {"shirt": 1, "background": 1})}["prompt_kept"].measured


def test_whose_shirt_is_hidden_is_not_judged_by_it(dressed):
    pictures, names = dressed
    parts = {part: prompts.Part.learn(part, pictures, names[part]) for part in names}
    ask = prompts.Ask("bare", "", {"shirt": "green", "background": "white"}, {"shirt": "red", "background": "blue"})
    hidden = prompts.answer(ask, portrait("blue", "blue"), portrait("blue", "white")[None], parts)
    seen = prompts.answer(ask, portrait("red", "blue"), portrait("blue", "white")[None], parts)
    assert prompts.figures([hidden, seen])["shirt"].tolist() == [0], "and that is the one who is seen"
    measures = {m.name: m for m in prompts.measures_of([hidden, seen], {"shirt": 1.0, "background": 1.0})}
    assert measures["prompt_shirt"].n == 1 and "; 1 prompts" in measures["prompt_shirt"].reason and measures["prompt_background"].n == 2


def test_the_picture_has_a_row_for_each_prompt():
    sheet = prompts.labelled(np.zeros((30, 20, 3), np.uint8), ["portrait", "a very long prompt that must be wrapped to fit", "b"], width=240)
    assert sheet.size == (260, 30)
