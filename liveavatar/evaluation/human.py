"""A listening and looking test that works from a folder on disk: build it here, `ratings` scores what comes back.

The folder holds index.html, clips under meaningless names and the portraits; nothing in it tells which system made a clip
or which clip is an anchor. That stands in the key file, which stays with whoever runs the test. Sheets (who sees what, in
which order, on which side) are drawn beforehand from the seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from liveavatar.conditioning.media import VideoWriter
from liveavatar.config import build
from liveavatar.core import FPS, SAMPLE_RATE, ConfigError, InputError
from liveavatar.evaluation.clips import VideoFile

SCHEMA = "study/1"
PAGE = Path(__file__).parent / "human_page.html"
SLOT = "/*STUDY*/null"  # where the page takes its sheets
QUESTIONS = ("sync", "natural", "likeness")
SHIFT_SECONDS = 0.4
LEVEL = 0.05  # RMS of what is loud, equal in all clips
ANCHORS = ("shift", "wrong", "static")  # each is shown beside the exact clip
GROSS = ("wrong", "static")  # whoever misses both is not counted
EXACT = "anchor:exact"
REPEATS = 2


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What a meaningless name stands for. system: a judged system's name, or anchor:exact, anchor:shift ..."""

    item: str
    system: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One screen. right: "" for a single clip that is rated. repeat: number of the trial it repeats with sides changed, or -1."""

    left: str
    right: str = ""
    portrait: str = ""
    repeat: int = -1


@dataclass(frozen=True, kw_only=True)
class Key:
    """The sealed half of a study. clips: name -> Clip; sheets: the trials of each."""

    schema: str = SCHEMA
    study: str
    seed: int
    systems: tuple[str, ...]
    clips: dict
    sheets: dict  # number -> list of trials
    sliders: bool = False
    exclusion: str = "a rater who prefers neither exact clip to wrong speech and to a still picture in lip sync, or plays nothing, is not counted"

    def clip(self, name: str) -> Clip:
        return build(Clip, self.clips[name], "key")

    def trials(self, sheet: int) -> list[Trial]:
        return [build(Trial, t, "key") for t in self.sheets[str(sheet)]]


def read_key(path: Path) -> Key:
    """Raises InputError."""
    try:
        key = build(Key, json.loads(path.read_text(encoding="utf-8")), str(path))
        for sheet in key.sheets:
            key.trials(sheet)
        return key
    except OSError as error:
        raise InputError(f"{path}: cannot read the key ({error.strerror})") from None
    except ConfigError as error:
        raise InputError(str(error)) from None
    except ValueError:
        raise InputError(f"{path}: not the key of a study") from None


# ---------------------------------------------------------------- building


def build_study(systems: dict[str, Path], out: Path, *, exact: Path | None = None, portraits: Path | None = None, seed: int = 0, sheets: int = 24,
                pairs: int = 12, singles: int = 6, side: int = 512, sliders: bool = False, report: Callable[[str], None] = lambda line: None) -> Path:
    """Write the study into folder `out` and its key beside it; returns the key's path.

    systems: name -> folder of ITEM.mp4. exact: folder of real or exact clips of the same items; without it the first
    system's stand in. portraits: folder of ITEM.png. pairs, singles: trials of each kind in a sheet, anchors and repeats
    apart. side: pixels of the square all clips are fitted into. Raises InputError.
    """
    items = _items(systems, exact)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty: name a new folder for the study")
    (out / "clips").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    study = hashlib.sha256(json.dumps([seed, sorted(systems), items]).encode()).hexdigest()[:12]
    names: dict[tuple[str, str], str] = {}
    for item, system, make in _wanted(systems, items, exact or next(iter(systems.values())), rng):
        name = names[item, system] = hashlib.sha256(f"{study} {item} {system} {rng.integers(1 << 62)}".encode()).hexdigest()[:10]
        report(f"{item} {system}")
        make(out / "clips" / f"{name}.mp4", side)
    faces = _copy_portraits(portraits, items, out)
    drawn = {str(number): _sheet(rng, tuple(systems), items, names, faces, pairs, singles) for number in range(1, sheets + 1)}
    key = Key(study=study, seed=seed, systems=tuple(systems), sliders=sliders, sheets={n: [asdict(t) for t in s] for n, s in drawn.items()},
              clips={name: {"item": item, "system": system} for (item, system), name in names.items()})
    _write_page(out / "index.html", key)
    path = out.parent / f"{out.name}.key.json"
    path.write_text(json.dumps(asdict(key), indent=1) + "\n", encoding="utf-8")
    return path


def _items(systems: dict[str, Path], exact: Path | None) -> list[str]:
    """Names that every folder has a clip of."""
    if not systems:
        raise InputError("a study needs a system: NAME=FOLDER with ITEM.mp4 files")
    folders = [*systems.values(), *([exact] if exact else [])]
    found = [{p.stem for p in folder.glob("*.mp4")} if folder.is_dir() else set() for folder in folders]
    for folder, stems in zip(folders, found, strict=True):
        if not stems:
            raise InputError(f"{folder}: no folder with mp4 files")
    items = sorted(set.intersection(*found))
    if len(items) < 2:
        raise InputError(f"the folders share {len(items)} items: at least two are needed, named alike in all")
    return items


def _wanted(systems, items, exact: Path, rng) -> Iterator[tuple[str, str, Callable]]:
    """(item, system, function that writes the clip) of all clips of the study."""
    for item, (name, folder) in itertools.product(items, systems.items()):
        yield item, name, lambda path, side, source=folder / f"{item}.mp4": _copy(source, path, side)
    for k, item in enumerate(items):
        source, other = exact / f"{item}.mp4", exact / f"{items[(k + 1) % len(items)]}.mp4"
        yield item, EXACT, lambda path, side, source=source: _copy(source, path, side)
        yield item, "anchor:shift", lambda path, side, source=source: _copy(source, path, side, late=SHIFT_SECONDS)
        yield item, "anchor:wrong", lambda path, side, source=source, other=other: _copy(source, path, side, sound=other)
        yield item, "anchor:static", lambda path, side, source=source: _copy(source, path, side, still=True)


def _copy(source: Path, path: Path, side: int, *, late: float = 0.0, sound: Path | None = None, still: bool = False) -> None:
    """A clip of the study: 25 pictures a second inside a square, sound of the common level, the same encoder for all."""
    video = VideoFile(source)
    pcm = np.concatenate([np.zeros(round(late * SAMPLE_RATE), np.float32), VideoFile(sound or source).sound()])
    pcm, first, written = _levelled(pcm), None, 0
    with VideoWriter(path, side, side) as writer:
        for at, picture in video.frames():
            first = _fitted(picture, side) if first is None or not still else first
            while written / FPS <= at + 0.5 / FPS:
                writer.write(first[None], np.pad(pcm[written * 640 : written * 640 + 640], (0, max(0, 640 - max(0, len(pcm) - written * 640)))))
                written += 1
    if not written:
        raise InputError(f"{source}: holds no pictures")


def _levelled(pcm: np.ndarray) -> np.ndarray:
    loud = pcm[np.abs(pcm) > 0.01]
    return pcm if not len(loud) else np.clip(pcm * (LEVEL / np.sqrt((loud**2).mean())), -1, 1).astype(np.float32)


def _fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """Scaled into the middle of a black square."""
    import cv2

    scale = side / max(picture.shape[:2])
    size = [max(1, round(n * scale)) for n in picture.shape[:2]]
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square[top : top + size[0], left : left + size[1]] = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    return square


def _copy_portraits(folder: Path | None, items: Sequence[str], out: Path) -> dict[str, str]:
    """item -> path in the study of its portrait, under a number."""
    if folder is None:
        return {}
    (out / "portraits").mkdir()
    found = {}
    for number, item in enumerate(items):
        if (folder / f"{item}.png").is_file():
            found[item] = f"portraits/{number}.png"
            shutil.copyfile(folder / f"{item}.png", out / found[item])
    return found


# ---------------------------------------------------------------- sheets


def _sheet(rng, systems, items, names, faces, pairs: int, singles: int) -> list[Trial]:
    """Pairs, single clips, anchors and repeats in the order of one rater."""
    def pair(item: str, one: str, two: str) -> Trial:
        left, right = (one, two) if rng.random() < 0.5 else (two, one)
        return Trial(left=names[item, left], right=names[item, right], portrait=faces.get(item, ""))

    choices = [(item, *two) for item in items for two in itertools.combinations(systems, 2)]
    compared = [pair(*choices[k]) for k in rng.permutation(len(choices))[:pairs]]
    anchors = [pair(items[rng.integers(len(items))], EXACT, f"anchor:{what}") for what in ANCHORS]
    rated = [(item, system) for item in items for system in systems]
    alone = [rated[k] for k in rng.permutation(len(rated))[:singles]]
    alone += [(items[rng.integers(len(items))], anchor) for anchor in (EXACT, "anchor:static")]
    single = [Trial(left=names[who], portrait=faces.get(who[0], "")) for who in alone]
    first = [compared[k] if k < len(compared) else anchors[k - len(compared)] for k in rng.permutation(len(compared) + len(anchors))]
    again = rng.permutation(len(first) // 2 or 1)[:REPEATS]  # of what was seen in the first half, at the end
    repeats = [Trial(left=first[k].right, right=first[k].left, portrait=first[k].portrait, repeat=int(k)) for k in again]
    return [*first, *repeats, *(single[k] for k in rng.permutation(len(single)))]


def _write_page(path: Path, key: Key) -> None:
    """The page with its sheets; a trial shows names of clips only, and not that it repeats another."""
    shown = {n: [[t["left"], t["right"], t["portrait"]] for t in sheet] for n, sheet in key.sheets.items()}
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(SLOT) == 1, "the page has one place for its sheets"
    study = json.dumps({"study": key.study, "sheets": shown, "sliders": key.sliders}, separators=(",", ":")).replace("</", "<\\/")
    path.write_text(text.replace(SLOT, study), encoding="utf-8")
