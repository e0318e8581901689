"""Suites: what is to be spoken by whom, with the truth about it, in a folder that anybody can make videos for.

The pictures come from whoever can render them: `build` is handed that as a callable. `suite.json` names every file with
its SHA-256, so that two reports can know that they judged the same thing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from liveavatar.conditioning.framing import Box
from liveavatar.conditioning.media import VideoWriter
from liveavatar.conditioning.phones import Phone
from liveavatar.config import build as build_dataclass
from liveavatar.core import FPS, SAMPLE_RATE, ConfigError, InputError
from liveavatar.evaluation.clips import VideoFile, write_sound
from liveavatar.evaluation.judge import judge_video
from liveavatar.evaluation.landmarks import Truth
from liveavatar.evaluation.provenance import sha256
from liveavatar.evaluation.report import Item, absent
from liveavatar.evaluation.traces import read_trace

SCHEMA = "suite/1"
LONGEST = 10_000.0  # seconds
MANIFEST, POINT = "suite.json", "point_"
LICENCE = "CC0-1.0 head (MPFB2 data), rendered; voice: {}"
MACHINE, READ = "CMU flite (BSD-style); text: this project", "LibriVox reading of Jane Austen, Sense and Sensibility (public domain)"
READING = "reading"  # the voice that is a person's
FRAMINGS = ("close", "shoulders", "turned", "small", "wide")  # turned: the head 15 degrees to one side; wide: small and left of the middle
SOUNDS = ("clean", "noise", "reverb", "quiet", "fast")  # how the voice is heard: quiet as a whisper, or talking half as fast again
FILES = ("portrait", "audio", "gt_video", "mumbled_video", "gt_motion")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One item as ordered: who (a seed of the renderer's people), which voice, what is said (a seed of its sentences)."""

    id: str
    identity: int
    voice: str  # of flite, or READING
    seed: int
    seconds: float
    size: int  # pixels, both sides
    framing: str = "close"  # one of FRAMINGS
    sound: str = "clean"  # one of SOUNDS
    spoken: bool = False  # sound and portrait alone, with pauses up to long silences: streams too long to be rendered
    eventful: bool = False  # spoken, interrupted, and given another portrait: see turns.py


@dataclass(frozen=True, kw_only=True)
class Event:
    """What is done to a stream besides speaking. time: seconds from the first sample; kind: interrupt | portrait, a file then."""

    time: float
    kind: str
    portrait: str = ""


@dataclass(frozen=True, kw_only=True)
class SuiteItem:
    """One item as it lies in the folder. Files are names relative to it; sha256: file -> hash; consent: how the person shown
    agreed, required where it is one. person: who is shown, the same in every item of theirs. voice, sound: as in Line. All three are said of
    what is rendered."""

    id: str
    portrait: str
    audio: str
    text: str
    prompt: str
    seed: int
    framing: str
    phones: tuple[Phone, ...]
    licence: str
    person: str = ""
    voice: str = ""
    sound: str = ""
    gt_video: str = ""
    mumbled_video: str = ""  # the same with the lips half as far apart: for the sanity ranking
    gt_motion: str = ""
    consent: str = ""
    events: tuple[Event, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    schema: str
    name: str
    version: str
    synthetic: bool
    items: tuple[SuiteItem, ...]


@dataclass(frozen=True)
class Suite:
    """A manifest with its folder. sha256: of suite.json."""

    folder: Path
    manifest: Manifest
    sha256: str

    def path(self, item: SuiteItem, kind: str) -> Path | None:
        """One of FILES of an item; None where the suite has none."""
        name = getattr(item, kind)
        return self.folder / name if name else None


class Rendered(Protocol):
    """What a renderer makes of a Line. frames, mumbled uint8 [T, S, S, 3] at 25 pictures a second, None of a line that is only
    spoken; portrait uint8 [S, S, 3]; pcm float32 [n] 16 kHz from the first picture; motion, points: as in landmarks.Truth, none
    of a line that is only spoken."""

    frames: np.ndarray | None
    mumbled: np.ndarray | None
    portrait: np.ndarray
    pcm: np.ndarray
    phones: Sequence[Phone]
    text: str
    caption: str
    motion: dict[str, np.ndarray]
    points: dict[int, np.ndarray]


def tiny(seed: int = 1) -> tuple[Line, ...]:
    """suite_tiny: 2 heads x 2 voices, 6 s at 128 pixels; heads and the voice awb are not in any training set of ours."""
    return tuple(Line(id=f"tiny_{k}", identity=1_000_000 + 10 * seed + k // 2, voice=("awb", "slt")[k % 2], seed=1000 * seed + k, seconds=6.0,
                      size=128) for k in range(4))  # fmt: skip


def short(seed: int = 1) -> tuple[Line, ...]:
    """suite_short: 20 heads x 5 framings, 8 to 12 s at 128 pixels. In each framing every voice speaks four times and every
    sound but the clean one is heard twice. Half an hour of rendering on a core."""
    rng = np.random.default_rng([seed, 100])
    seconds, dealt = np.round(rng.uniform(8, 12, 100) * FPS) / FPS, [_dealt(rng) for _ in FRAMINGS]
    return tuple(Line(id=f"short_{k:03d}", identity=1_001_000 + 100 * seed + k // 5, seed=100_000 * seed + k, seconds=float(seconds[k]), size=128,
                      framing=FRAMINGS[k % 5], **dealt[k % 5][k // 5]) for k in range(100))  # fmt: skip


def _dealt(rng: np.random.Generator) -> list[dict[str, str]]:
    """Voice and sound of 20 lines; a reading is never fast."""
    while True:
        voices, sounds = rng.permutation(4 * ["awb", "slt", "rms", "kal16", READING]), rng.permutation([*2 * SOUNDS[1:], *12 * SOUNDS[:1]])
        if not ((voices == READING) & (sounds == "fast")).any():
            return [{"voice": str(voice), "sound": str(sound)} for voice, sound in zip(voices, sounds, strict=True)]


def long(seed: int = 1) -> tuple[Line, ...]:
    """suite_long: 14 streams of 301 to 360 s and one of 10,000 s, three heads in turn; sound and portrait, no true pictures."""
    rng = np.random.default_rng([seed, 300])
    seconds = [*np.round(rng.uniform(301, 360, 14)), LONGEST]
    return tuple(Line(id=f"long_{k:02d}", identity=1_002_000 + 100 * seed + k % 3, voice=("awb", "slt", "rms", "kal16")[k % 4], seed=10_000 * seed + k,
                      seconds=float(seconds[k]), size=128, spoken=True) for k in range(15))  # fmt: skip


def turns(seed: int = 1) -> tuple[Line, ...]:
    """suite_turns: 20 streams of 60 s, everybody interrupted and then somebody else; sound and portraits, no true pictures."""
    return tuple(Line(id=f"turns_{k:02d}", identity=1_003_000 + 100 * seed + k, voice=("awb", "slt", "rms", "kal16")[k % 4], seed=20_000 * seed + k,
                      seconds=60.0, size=128, spoken=True, eventful=True) for k in range(20))  # fmt: skip


NAMED = {"tiny": tiny, "short": short, "long": long, "turns": turns}
VERSIONS = {"tiny": 2, "short": 2, "long": 1, "turns": 1}  # what a name stands for; another number wherever another byte is built


def build(folder: str | Path, name: str, version: str, lines: Sequence[Line], render: Callable[[Line], Rendered]) -> Suite:
    """Make every item's files and the manifest. The same lines give the same bytes on one GL back end. Raises InputError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = tuple(_write(folder, line, render(line)) for line in lines)
    manifest = Manifest(schema=SCHEMA, name=name, version=version, synthetic=True, items=items)
    said = asdict(manifest)
    for item in said["items"]:
        del item["consent"]  # nobody was asked: heads are rendered
        for kind in ("person", "voice", "sound", "events"):
            if not item[kind]:
                del item[kind]
    (folder / MANIFEST).write_text(json.dumps(said, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return read_suite(folder)


def _write(folder: Path, line: Line, made: Rendered) -> SuiteItem:
    names = {"portrait": f"{line.id}.png", "audio": f"{line.id}.wav"}
    Image.fromarray(made.portrait).save(folder / names["portrait"])
    how = {} if line.spoken else {"person": str(line.identity), "voice": line.voice, "sound": line.sound}
    if line.spoken:
        write_sound(folder / names["audio"], _minutes(made.pcm[: round(line.seconds * SAMPLE_RATE)]))
    else:
        names |= {"gt_video": f"{line.id}.gt.mp4", "mumbled_video": f"{line.id}.mumbled.mp4", "gt_motion": f"{line.id}.motion.npz"}
        pcm = made.pcm[: round(len(made.frames) * SAMPLE_RATE / FPS)].astype(np.float32)
        write_sound(folder / names["audio"], _minutes(pcm))
        write_video(folder / names["gt_video"], made.frames, pcm)
        write_video(folder / names["mumbled_video"], made.mumbled, pcm)
        write_truth(folder / names["gt_motion"], Truth(np.arange(len(made.frames)) / FPS, made.motion, made.points))
    phones = tuple(Phone(p.name, round(p.start, 4), round(p.end, 4)) for p in made.phones)
    events = _write_events(folder, line, made) if line.eventful else ()
    hashes = {name: sha256(folder / name) for name in (*names.values(), *(event.portrait for event in events)) if name}
    return SuiteItem(id=line.id, text=made.text, prompt=made.caption, seed=line.seed, framing=line.framing, phones=phones,
                     licence=LICENCE.format(READ if line.voice == READING else MACHINE), events=events, sha256=hashes, **how, **names)  # fmt: skip


def _write_events(folder: Path, line: Line, made) -> tuple[Event, ...]:
    """The events of a turns.Scene, whose other portrait gets a file."""
    name = f"{line.id}.other.png"
    Image.fromarray(made.other).save(folder / name)
    return tuple(replace(event, portrait=name if event.kind == "portrait" else "") for event in made.events)


def _minutes(pcm: np.ndarray) -> Iterator[np.ndarray]:
    """Sound minute by minute: an hour of it as other numbers is larger than as a file."""
    for start in range(0, len(pcm), 60 * SAMPLE_RATE):
        yield pcm[start : start + 60 * SAMPLE_RATE]


def write_video(path: Path, frames: np.ndarray, pcm: np.ndarray) -> None:
    """An mp4 of frames uint8 [T, H, W, 3] at 25 pictures a second, and sound float32 [n] 16 kHz."""
    with VideoWriter(path, frames.shape[2], frames.shape[1]) as writer:
        writer.write(frames, pcm)


def write_truth(path: Path, truth: Truth) -> None:
    """An npz whose bytes are a function of its numbers (numpy's own archives carry no time of writing)."""
    named = {name: np.asarray(values, np.float32) for name, values in truth.channels.items()}
    named |= {f"{POINT}{landmark}": np.asarray(values, np.float32) for landmark, values in truth.points.items()}
    np.savez(path, times=truth.times, **named)


def read_truth(path: Path) -> Truth:
    """A file of write_truth. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name].astype(float) for name in stored.files}
        points = {int(name.removeprefix(POINT)): arrays.pop(name) for name in list(arrays) if name.startswith(POINT)}
        return Truth(arrays.pop("times"), arrays, points)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no commanded motion (npz with times and channels): {error}") from None


def read_suite(folder: str | Path) -> Suite:
    """A suite's folder, every file checked against its hash. Raises InputError naming the first that is missing or another, and
    where people are shown without licence or consent."""
    folder = Path(folder)
    path = folder / MANIFEST if folder.is_dir() else folder
    try:
        text = path.read_bytes()
        manifest = build_dataclass(Manifest, json.loads(text), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read the suite ({error.strerror})") from None
    except ConfigError as error:
        raise InputError(str(error)) from None
    except ValueError:
        raise InputError(f"{path}: not a {MANIFEST}") from None
    if manifest.schema != SCHEMA:
        raise InputError(f"{path}: schema {manifest.schema!r}: must be {SCHEMA}")
    for item in manifest.items:
        if not manifest.synthetic and not (item.licence.strip() and item.consent.strip()):
            raise InputError(f"{path}: {item.id} shows a person: say licence and consent")
        for name, wanted in item.sha256.items():
            if not (path.parent / name).is_file() or sha256(path.parent / name) != wanted:
                raise InputError(f"{path.parent / name}: missing or not the suite's file: build the suite again")
    return Suite(path.parent, manifest, hashlib.sha256(text).hexdigest())


# ---------------------------------------------------------------- a system's videos for a suite


def judge_suite(suite: Suite, videos: str | Path, **settings) -> tuple[Item, ...]:
    """Judge VIDEOS/ID.mp4 of every item; settings: further ones of judge_video. A video that is missing or unusable fails its item."""
    return tuple(_judged(suite, item, Path(videos) / f"{item.id}.mp4", settings) for item in suite.manifest.items)


def _judged(suite: Suite, item: SuiteItem, video: Path, settings: dict) -> Item:
    """A mute video is judged with the suite's sound."""
    motion = suite.path(item, "gt_motion")
    kinds = {"framing": item.framing, "voice": item.voice and (item.voice if item.voice == READING else "machine"), "sound": item.sound}
    named = {"id": item.id, "video": str(video), "kinds": {sort: kind for sort, kind in kinds.items() if kind}}
    try:
        file = VideoFile(video)
        sound = None if file.has_sound else suite.path(item, "audio")
        box = cut_of(video.with_suffix(".trace.jsonl"))
        measures = judge_video(file, sound, reference=_reference(suite, item, file, box), text=item.text,
                               truth=None if motion is None else read_truth(motion), portrait=suite.path(item, "portrait"), **settings)  # fmt: skip
        return Item(**named, sha256=file.sha256, picture=file.card | {"crop": _crop(box)}, measures=tuple(measures))
    except InputError as error:
        return Item(**named, measures=(absent("judged", str(error), status="failed"),))


def cut_of(trace: Path) -> Box | None:
    """What a system cut out of the portrait it was opened with, by its trace; None where there is no trace, or it says of no cut."""
    if not trace.is_file():
        return None
    cuts = [line["box"] for stream in read_trace(trace).streams[:1] for line in stream["portrait"][:1]]
    if cuts and not (isinstance(cuts[0], list) and len(cuts[0]) == 4 and all(isinstance(side, (int, float)) for side in cuts[0])):
        raise InputError(f"{trace}: portrait: box must be four numbers: left, top, right, bottom")
    return tuple(cuts[0]) if cuts else None


def _reference(suite: Suite, item: SuiteItem, file: VideoFile, box: Box | None) -> VideoFile | None:
    """The true pictures, framed as the system framed the portrait, which shows the head from where they do: then the tracker errs alike
    on both, and pictures pair. Landmarks need no such thing, nor the vertices': they are laid on each other by eyes and nose."""
    path = suite.path(item, "gt_video")
    if path is None or box is None:
        return None if path is None else VideoFile(path)
    true = VideoFile(path)
    with Image.open(suite.path(item, "portrait")) as portrait:
        alike = portrait.size == (true.width, true.height)
    return VideoFile(path, (box, file.width, file.height)) if alike else true  # else from elsewhere: the box says nothing of it


def _crop(box: Box | None) -> str:
    return "none" if box is None else "portrait " + " ".join(f"{side:.0f}" for side in box)
