"""Clip files with drawn faces (an ellipse, eyes that blink, a mouth that opens and turns): labels are exact, nothing is rendered."""

from __future__ import annotations

import numpy as np

from liveavatar.conditioning.clipfiles import Clip, clip_path, write_clip

SKINS = ((224, 172, 140), (120, 80, 60), (200, 140, 170), (150, 170, 120))


def draw(size: int, person: int, aperture: float, lid: float, yaw: float) -> np.ndarray:
    """uint8 [S,S,3]: aperture and lid in eye distances, of .25 of the side; yaw in degrees moves nose and mouth."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    picture = np.full((size, size, 3), (40, 60, 90), float)
    skin = np.array(SKINS[person % len(SKINS)], float)

    def paint(cx, cy, rx, ry, colour):
        soft = np.clip((1 - np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / max(ry, 1e-3)) ** 2)) * size * min(rx, max(ry, 1e-3)) + 0.5, 0, 1)[..., None]
        picture[:] = picture * (1 - soft) + np.array(colour, float) * soft

    paint(0.5, 0.5, 0.3, 0.4, skin)
    shift = 0.012 * yaw
    for side in (-1, 1):
        paint(0.5 + shift / 2 + side * 0.125, 0.42, 0.05, 0.25 * lid / 2 + 0.002, (250, 250, 250))
    paint(0.5 + shift, 0.52, 0.02, 0.05, skin * 0.7)
    paint(0.5 + shift, 0.68, 0.11, 0.25 * aperture / 2 + 0.02, (150, 50, 50))
    paint(0.5 + shift, 0.68, 0.09, 0.25 * aperture / 2 + 1e-3, (30, 5, 5))
    return picture.round().astype(np.uint8)


def drawn_clip(split: str, index: int, *, size: int = 64, pictures: int = 25, person: int = 0, voice: str = "drawn") -> Clip:
    """A clip whose mouth opens with its sound: phones aa and m take turns of 240 ms, one blink in its middle."""
    rng, t = np.random.default_rng([pictures, index]), np.arange(pictures) / 25
    aperture = (0.24 * np.clip(np.sin(2 * np.pi * (t / 0.48 + rng.random())), 0, 1)).astype(np.float32)
    lid = np.where(np.abs(np.arange(pictures) - pictures // 2) <= 1, 0.02, 0.2).astype(np.float32)
    yaw = (4 * np.sin(2 * np.pi * t * 0.7 + index)).astype(np.float32)
    sound = rng.normal(size=pictures * 640 + 2560) * np.interp(np.arange(pictures * 640 + 2560) / 16000, t, aperture)
    phones = [["m" if gap < 0.01 else "aa", round(i / 25 - 0.02, 3), round(i / 25 + 0.02, 3)] for i, gap in enumerate(aperture) if i % 3 == 0]
    eyes = np.array([[[0.325, 0.37, 0.425, 0.47], [0.575, 0.37, 0.675, 0.47]]], np.float32) * size
    card = {"generator": 1, "seed": index, "split": split, "index": index, "caption": f"drawn person {person}", "voice": voice,
            "identity": {"seed": person}, "phones": phones}
    return Clip(frames=np.stack([draw(size, person, a, e, w) for a, e, w in zip(aperture, lid, yaw)]), reference=draw(size, person, 0, 0.2, 0),
                pcm=np.round(np.clip(sound, -1, 1) * 8000).astype(np.int16),
                mouth=np.tile(np.array([0.36, 0.58, 0.64, 0.78], np.float32) * size, (pictures, 1)),
                eyes=np.repeat(eyes, pictures, axis=0), aperture=aperture, width=np.full(pictures, 0.8, np.float32) + 0.3 * aperture, lid=lid,
                units=np.zeros((pictures, 52), np.float32), pose=np.stack([yaw, 0 * yaw, 0 * yaw], axis=1), card=card)


def write_corpus(folder, **splits: int):
    """So many clips per split under `folder`, people taking turns; returns it."""
    for split, count in splits.items():
        for index in range(count):
            voice = "reader" if split == "default" and index % 2 else "drawn"
            write_clip(clip_path(folder, split, index), drawn_clip(split, index, person=index % 4, voice=voice))
    return folder
