"""Who a synthetic head can be: face, colours, clothes, light and backdrop, all drawn from one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_HAIR = {
    "black": (28, 24, 24), "dark brown": (52, 36, 27), "brown": (92, 62, 40),
    "auburn": (112, 54, 32), "blond": (188, 148, 92), "grey": (116, 108, 98),
}  # fmt: skip
_EYES = {
    "brown": (82, 50, 28), "dark": (44, 28, 20), "green": (88, 122, 72),
    "blue": (80, 128, 176), "grey": (122, 136, 142), "hazel": (128, 96, 48),
}  # fmt: skip
_PLAIN = {
    "blue": (58, 92, 158), "grey": (132, 134, 138), "green": (66, 122, 84), "red": (156, 52, 48),
    "white": (222, 222, 216), "black": (38, 38, 42), "purple": (108, 74, 138),
    "yellow": (206, 172, 74), "teal": (48, 124, 132), "orange": (200, 112, 56),
    "beige": (202, 184, 156), "pink": (206, 132, 146),
}  # fmt: skip
DRESS = ("shirt", "background")  # what dressed() exchanges
HAIR, EYES, PLAIN = tuple(_HAIR), tuple(_EYES), tuple(_PLAIN)  # names; PLAIN: of shirts and backdrops
STYLES = ("long", "bob", "short", "buzz", "bald")
# Feature morphs driven by one signed number each: (negative, positive) file stems.
FEATURES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = tuple(
    (tuple(f"{s}-decr" for s in stems), tuple(f"{s}-incr" for s in stems))
    for stems in (
        ("nose/nose-scale-horiz",), ("nose/nose-scale-vert",), ("nose/nose-hump",),
        ("nose/nose-volume",), ("mouth/mouth-scale-horiz",), ("mouth/mouth-upperlip-volume",),
        ("mouth/mouth-lowerlip-volume",), ("chin/chin-width",), ("chin/chin-height",),
        ("head/head-fat",), ("head/head-scale-horiz",),
        ("eyes/l-eye-scale", "eyes/r-eye-scale"),
        ("cheek/l-cheek-bones", "cheek/r-cheek-bones"),
    )
)  # fmt: skip


def article(noun: str) -> str:
    """The one that goes before it."""
    return "an" if noun[0] in "aeiou" else "a"


def srgb(name: str) -> tuple[float, float, float]:
    """sRGB 0..1 of a colour of PLAIN, as it is before light falls on it."""
    return tuple(x / 255 for x in _PLAIN[name])


def _jitter(rng: np.random.Generator, colour: tuple[int, ...], amount: float) -> tuple:
    """sRGB 0..1 of an 8-bit colour, with a common and a per-channel multiplicative jitter."""
    gain = np.exp(rng.normal(0, amount) + rng.normal(0, amount * 0.4, 3))
    return tuple(float(x) for x in np.clip(np.array(colour) / 255.0 * gain, 0.02, 0.97))


@dataclass(frozen=True)
class Identity:
    """Everything that makes one person, their clothes, light and backdrop; all recorded.

    female and age in 0..1; mix = shares of (european, asian, african) morphs; features in -1..1;
    colours are sRGB 0..1; lights are (dx, dy, dz, r, g, b) rows, direction towards the light.
    """

    seed: int
    female: float
    age: float
    mix: tuple[float, float, float]
    features: tuple[float, ...]
    skin: tuple[float, float, float]
    hair_name: str
    hair: tuple[float, float, float]
    style: str
    iris_name: str
    iris: tuple[float, float, float]
    lips: tuple[float, float, float]
    brow: float
    shirt_name: str
    shirt: tuple[float, float, float]
    background_name: str
    background: tuple[float, float, float]
    lights: tuple[tuple[float, ...], ...]
    ambient: tuple[float, float, float]

    @staticmethod
    def sample(seed: int) -> Identity:
        """The same person for the same seed, on every machine."""
        rng = np.random.default_rng([0x4EAD, seed])
        woman = rng.random() < 0.5
        female = float(np.clip((0.92 if woman else 0.08) + rng.normal(0, 0.07), 0, 1))
        age = float(rng.beta(1.3, 2.6))
        mix = rng.dirichlet([0.45, 0.45, 0.45])
        features = tuple(float(x) for x in np.clip(rng.normal(0, 0.33, len(FEATURES)), -0.8, 0.8))
        tones = np.array([(226, 176, 150), (216, 168, 130), (112, 72, 52)])
        skin = _jitter(rng, tuple(np.exp(mix @ np.log(tones))), 0.07)
        dark = mix[0] < 0.5
        names = ["black", "dark brown"] if dark else list(_HAIR)[:5]
        hair_name = "grey" if age > 0.62 else str(rng.choice(names))
        style = str(rng.choice(STYLES, p=(0.5, 0.28, 0.22, 0, 0) if woman
                               else (0.05, 0.0, 0.62, 0.23, 0.10)))  # fmt: skip
        iris_name = str(rng.choice(["brown", "dark"] if dark else list(_EYES)))
        tint = np.array([0.80, 0.50, 0.52]) if woman else np.array([0.84, 0.62, 0.60])
        lips = np.clip(np.array(skin) * tint * rng.uniform(0.92, 1.05), 0, 1)
        shirt_name, background_name = (str(x) for x in rng.choice(list(_PLAIN), 2, replace=False))
        lights = []
        # Key in front and to one side, fill opposite, rim from behind: portraits, not horror.
        side = 1.0 if rng.random() < 0.5 else -1.0
        for azimuth, height, power in (
            (side * rng.uniform(15, 55), rng.uniform(15, 50), rng.uniform(1.5, 2.1)),
            (-side * rng.uniform(25, 70), rng.uniform(-5, 30), rng.uniform(0.3, 0.8)),
            (-side * rng.uniform(110, 150), rng.uniform(20, 55), rng.uniform(0.3, 1.1)),
        ):
            a, h = np.radians(azimuth), np.radians(height)
            warm = rng.normal(0, 0.07)
            colour = power * np.array([1 + warm, 1.0, 1 - warm])
            lights.append(tuple(float(x) for x in (
                np.sin(a) * np.cos(h), np.sin(h), np.cos(a) * np.cos(h), *colour)))  # fmt: skip
        ambient = tuple(float(x) for x in rng.uniform(0.28, 0.42) * (1 + rng.normal(0, 0.04, 3)))
        return Identity(
            seed=int(seed), female=female, age=age, mix=tuple(float(x) for x in mix),
            features=features, skin=skin, hair_name=hair_name,
            hair=_jitter(rng, _HAIR[hair_name], 0.1), style=style, iris_name=iris_name,
            iris=_jitter(rng, _EYES[iris_name], 0.08), lips=tuple(float(x) for x in lips),
            brow=float(rng.uniform(0.7, 1.2)),
            shirt_name=shirt_name, shirt=_jitter(rng, _PLAIN[shirt_name], 0.08),
            background_name=background_name,
            background=_jitter(rng, _PLAIN[background_name], 0.06),
            lights=tuple(lights), ambient=ambient,
        )  # fmt: skip

    def dressed(self, rng: np.random.Generator, parts: Sequence[str] = DRESS) -> Identity:
        """The same person and light in another shirt, before another backdrop; or only those of `parts` exchanged."""
        shirt, background = (str(x) for x in rng.choice(list(_PLAIN), 2, replace=False))
        new = {"shirt_name": shirt, "shirt": _jitter(rng, _PLAIN[shirt], 0.08),
               "background_name": background, "background": _jitter(rng, _PLAIN[background], 0.06)}  # fmt: skip
        return dataclasses.replace(self, **{key: value for key, value in new.items() if key.removesuffix("_name") in parts})

    @property
    def caption(self) -> str:
        """Plain English, from the numbers that were drawn."""
        return f"{self.looks}, {self.shirt_name} shirt, {self.background_name} background"

    @property
    def who(self) -> str:
        """Such as "middle-aged woman"."""
        return f"{self.years}{'woman' if self.female > 0.5 else 'man'}"

    @property
    def years(self) -> str:
        """Such as "older "; empty for the young."""
        return "older " if self.age > 0.62 else "middle-aged " if self.age > 0.35 else ""

    @property
    def looks(self) -> str:
        """The caption's beginning: what a person cannot change like a shirt."""
        look = {
            "bald": "with a bald head", "buzz": f"with {self.hair_name} buzz-cut hair",
            "bob": f"with {self.hair_name} chin-length hair",
        }.get(self.style, f"with {self.style} {self.hair_name} hair")  # fmt: skip
        return f"{article(self.who)} {self.who} {look}, {self.iris_name} eyes"

    def record(self) -> dict:
        """JSON-ready dictionary of every number."""
        return dataclasses.asdict(self)
