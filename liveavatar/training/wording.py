"""What can be said of a rendered person, in more ways than one: a model that only ever reads one wording learns it by heart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from liveavatar.training.synth.people import DRESS, Identity, article

WAYS = {
    "shirt": ("{c} shirt", "{a} {c} shirt", "wearing {a} {c} shirt", "dressed in {a} {c} shirt", "in {a} {c} shirt", "{c} top", "shirt: {c}"),
    "background": ("{c} background", "{a} {c} background", "in front of {a} {c} background", "{c} backdrop", "before {a} {c} wall",
                   "on {a} {c} background", "background: {c}"),
}  # fmt: skip
JOINTS = (", ", ", ", ", ", " and ", "; ")  # the comma is the usual one
LOOKS = ("whole", "short", "none", "none")  # what is left unsaid, the portrait shows


def worded(person: Identity, parts: Sequence[str], rng: np.random.Generator, looks: str | None = None) -> str:
    """A caption that names the colours of `parts` (of DRESS) and no other clothes. looks: "whole" describes the person as
    Identity.caption does, "short" says man or woman, "none" nothing; None draws one."""
    looks = looks or str(rng.choice(LOOKS))
    said = {"whole": [person.looks], "short": [f"{article(person.who)} {person.who}"], "none": []}[looks]
    said += [_phrase(person, part, rng) for part in rng.permutation([part for part in DRESS if part in parts])]
    text = str(rng.choice(JOINTS)).join(said)
    text = text[:1].upper() + text[1:] if rng.random() < 0.25 else text
    return text + "." if text and rng.random() < 0.2 else text


def _phrase(person: Identity, part: str, rng: np.random.Generator) -> str:
    colour = getattr(person, f"{part}_name")
    return str(rng.choice(WAYS[part])).format(c=colour, a=article(colour))
