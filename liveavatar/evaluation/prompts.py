"""Whether a prompt is obeyed that names another shirt or backdrop than the portrait shows: the colour shown against the one named.

Light falls on cloth, so a "white" shirt is no white pixel. What a name looks like, and where, is learned from rendered
pictures whose colours are known: a pixel belongs to the shirt where its name explains most of the pixel's variance, and a
name looks like the median of such pixels over all pictures of that name. The same judge on pictures that it was not made
from is the ceiling. Of whom it misreads the portrait itself, it cannot judge: long hair hides a shirt.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from liveavatar.conditioning.clipfiles import Clip, clip_paths, read_arrays
from liveavatar.core import InputError
from liveavatar.evaluation.gate_runs import Avatar
from liveavatar.evaluation.report import Measure, absent, bootstrap

EXPLAINED = {"shirt": 0.7, "background": 0.85}  # of a pixel's variance by the name, for the pixel to count
FEWEST = 16  # pixels that a part must show
PER_PERSON = 12  # prompts
BLOCKS = 2  # of a clip, the last of which is judged
SAYINGS = ("whole", "bare", "shirt", "background")  # the person's own caption with both exchanged; both alone; one alone


def explained(pictures: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Share of each pixel's variance that a name explains, float [S,S] in 0..1: pictures float [n,S,S,3], names [n]."""
    within = sum(pictures[names == name].var(axis=0).sum(-1) * (names == name).sum() for name in np.unique(names)) / len(names)
    whole = pictures.var(axis=0).sum(-1)
    return np.where(whole > 0, 1 - within / np.maximum(whole, 1e-9), 0.0)


@dataclass(frozen=True)
class Part:
    """Shirt or background as a corpus shows it. where: bool [S,S]; looks: median sRGB 0..255 [3] by name."""

    where: np.ndarray
    looks: Mapping[str, np.ndarray]

    @classmethod
    def learn(cls, part: str, pictures: np.ndarray, names: Sequence[str]) -> Part:
        """From pictures uint8 [n,S,S,3] whose names are known. Raises InputError when the part is nowhere to be seen."""
        pictures, names = pictures.astype(np.float32), np.array(names)
        where = explained(pictures, names) > EXPLAINED[part]
        if where.sum() < FEWEST:
            raise InputError(f"prompts: only {int(where.sum())} pixels of these {len(names)} pictures show a {part}; give more pictures")
        shown = np.median(pictures[:, where], axis=1)
        return cls(where, {str(name): np.median(shown[names == name], axis=0) for name in np.unique(names)})

    def shown(self, pictures: np.ndarray) -> np.ndarray:
        """Median colour, sRGB 0..255 [3], of the part in uint8 [T,S,S,3]."""
        return np.median(pictures[:, self.where].reshape(-1, 3), axis=0)

    def away(self, colour: np.ndarray, name: str) -> float:
        """Root mean square distance of a colour [3] to what `name` looks like, grey levels."""
        return float(np.sqrt(np.square(colour - self.looks[name]).mean()))

    def nearest(self, colour: np.ndarray) -> str:
        """The name whose look is nearest."""
        return min(self.looks, key=lambda name: self.away(colour, name))

    def names(self, picture: np.ndarray) -> str:
        """What the part's colour in one picture uint8 [S,S,3] is called."""
        return self.nearest(self.shown(picture[None]))


def wardrobe(folder: Path) -> tuple[dict[str, Part], dict[str, float]]:
    """(the parts by name; share of pictures named right, each by a judge made from the others) from the portraits of a corpus'
    training clips. Raises InputError where cards say no colours."""
    cards, pictures = zip(*[read_arrays(path, "reference") for path in clip_paths(folder, "train")] or [({}, {})])
    if any(f"{part}_name" not in card.get("identity", {}) for card in cards for part in EXPLAINED):
        raise InputError(f"{folder}: holds no train/clip_*.npz with the colours of shirt and background in their cards")
    seen, parts, ceiling = np.stack([arrays["reference"] for arrays in pictures]), {}, {}
    for part in EXPLAINED:
        names = np.array([card["identity"][f"{part}_name"] for card in cards])
        parts[part], others = Part.learn(part, seen, names), ~np.eye(len(names), dtype=bool)
        right = [Part.learn(part, seen[rest], names[rest]).names(seen[i]) == names[i] for i, rest in enumerate(others)]
        ceiling[part] = float(np.mean(right))
    return parts, ceiling


@dataclass(frozen=True)
class Ask:
    """One prompt. named: colours it names, by part; worn: those of the portrait."""

    saying: str
    prompt: str
    named: dict[str, str]
    worn: dict[str, str]


def asks(card: dict, names: Mapping[str, Sequence[str]], count: int, rng: np.random.Generator) -> list[Ask]:
    """`count` prompts for the person of a clip's card, SAYINGS in turn, none naming what is worn or one colour twice."""
    worn, made = {part: card["identity"][f"{part}_name"] for part in EXPLAINED}, []
    for k in range(count):
        saying = SAYINGS[k % len(SAYINGS)]
        new: dict[str, str] = {}
        for part in EXPLAINED:
            new[part] = str(rng.choice([name for name in names[part] if name not in (worn[part], *new.values())]))
        named = {part: new[part] for part in EXPLAINED if saying in ("whole", "bare", part)}
        made.append(Ask(saying, _prompt(card["caption"], saying, named, worn), named, worn))
    return made


def _prompt(caption: str, saying: str, named: dict[str, str], worn: dict[str, str]) -> str:
    if saying != "whole":
        return ", ".join(f"{name} {part}" for part, name in named.items())
    for part, name in named.items():
        caption = caption.replace(f"{worn[part]} {part}", f"{name} {part}")
    return caption


@dataclass(frozen=True)
class Answer:
    """What a prompt gave. shown: colour [3] by part; taken: the name it is nearest to; away: grey levels from what was to be
    seen, which is what was named, else what the portrait shows. judged: the parts that the judge knows in the portrait itself."""

    ask: Ask
    picture: np.ndarray
    judged: tuple[str, ...]
    shown: dict[str, np.ndarray]
    taken: dict[str, str]
    away: dict[str, float]

    def right(self, part: str) -> bool:
        """Whether the part has the colour that was to be seen."""
        return self.taken[part] == self.ask.named.get(part, self.ask.worn[part])


def answer(ask: Ask, portrait: np.ndarray, pictures: np.ndarray, parts: Mapping[str, Part]) -> Answer:
    """Judge pictures uint8 [T,S,S,3] of whom portrait uint8 [S,S,3] shows."""
    judged = tuple(name for name, part in parts.items() if part.names(portrait) == ask.worn[name])
    shown = {name: part.shown(pictures) for name, part in parts.items()}
    away = {name: part.away(shown[name], ask.named.get(name, ask.worn[name])) for name, part in parts.items()}
    return Answer(ask, pictures[-1], judged, shown, {name: part.nearest(shown[name]) for name, part in parts.items()}, away)


def people_of(clips: Sequence[tuple[str, Clip]]) -> list[Clip]:
    """One clip of every person among (group, clip), in order."""
    first: dict[int, Clip] = {}
    for _, clip in clips:
        first.setdefault(clip.card["identity"]["seed"], clip)
    return list(first.values())


def answers_of(avatar: Avatar, parts: Mapping[str, Part], people: Sequence[Clip], count: int, seed: int) -> list[list[Answer]]:
    """Every person's answers to `count` prompts of their own, which are a function of the seed."""
    rng, made = np.random.default_rng([0xA5C, seed]), []
    for clip in people:
        row = []
        for k, ask in enumerate(asks(clip.card, {name: list(part.looks) for name, part in parts.items()}, count, rng)):
            pictures = avatar.make(clip.reference, clip.sound, ask.prompt, BLOCKS, seed + k)[1]
            row.append(answer(ask, clip.reference, pictures[-avatar.geometry.frames_per_block :], parts))
        made.append(row)
    return made


def figures(answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """Per measure one number per prompt that it is about and can be judged: of each part 0 or 1 whether the colour named is shown and
    how many grey levels it is off; kept: whether a part that was not named stays as the portrait has it."""
    found = {}
    for part in EXPLAINED:
        named = [a for a in answers if part in a.ask.named and part in a.judged]
        found[part] = np.array([a.right(part) for a in named], float)
        found[f"{part}_away"] = np.array([a.away[part] for a in named])
    found["kept"] = np.array([a.right(part) for a in answers for part in a.judged if part not in a.ask.named], float)
    return found


def measures_of(answers: Sequence[Answer], ceiling: Mapping[str, float]) -> list[Measure]:
    """Shares and distances over all prompts, with the judge's own share on pictures whose colours are known."""
    found, made = figures(answers), []
    for part in EXPLAINED:
        unseen = sum(part in a.ask.named and part not in a.judged for a in answers)
        note = f"the judge names {ceiling[part]:.3g} of rendered portraits right; {unseen} prompts to whom it misreads the portrait itself are left out"
        made.append(_measure(f"prompt_{part}", found[part], "", "higher", note))
        made.append(_measure(f"prompt_{part}_away", found[f"{part}_away"], "grey levels", "lower", "from what the colour named looks like"))
    return [*made, _measure("prompt_kept", found["kept"], "", "higher", "parts that the prompt does not name stay as in the portrait")]


def _measure(name: str, values: np.ndarray, unit: str, better: str, reason: str) -> Measure:
    if not len(values):
        return absent(name, "no prompt is about it", unit=unit, better=better)
    return Measure(name=name, value=float(values.mean()), unit=unit, better=better, n=len(values), interval=bootstrap(values), backend="pixels", reason=reason)


# ---------------------------------------------------------------- to look at


def table(avatar: Avatar, people: Sequence[Clip], prompts: Sequence[str], seed: int) -> np.ndarray:
    """uint8 [(1+rows)S,columns*S,3]: the portraits, then a row per prompt of what each person gives."""
    rows = [[clip.reference for clip in people]]
    rows += [[avatar.make(clip.reference, clip.sound, prompt, BLOCKS, seed)[1][-1] for clip in people] for prompt in prompts]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def labelled(picture: np.ndarray, labels: Sequence[str], width: int = 240) -> Image.Image:
    """The picture, one label to the left of each of its equal rows."""
    sheet = Image.new("RGB", (width + picture.shape[1], picture.shape[0]), "white")
    sheet.paste(Image.fromarray(picture), (width, 0))
    pen, height = ImageDraw.Draw(sheet), picture.shape[0] // len(labels)
    for row, label in enumerate(labels):
        pen.multiline_text((8, row * height + height // 2 - 8), "\n".join(textwrap.wrap(label, 36)), fill="black")
    return sheet
