"""What a person can ask to be judged, and the report that comes of it. One YAML file is one evaluation.

Pictures come from files. Where nobody gives them, whoever calls hands in a way to make them (`Ours`): nothing here
knows a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from liveavatar.config import build, load, one_of
from liveavatar.core import ConfigError, InputError
from liveavatar.evaluation import provenance, report, tables
from liveavatar.evaluation.backends import Backends, Given
from liveavatar.evaluation.landmarks import FLOOR
from liveavatar.evaluation.report import Measure, Origin, Report, System

SYNTHETIC_LIMIT = "Truth and speech of a synthetic suite are rule-based articulation on rendered heads, not people."
HEADLINES = ("sync_index", "r0", "closure_minus_false", "response_gap_r", "response_gap_slope", "lmd_gt", "lmd_gt_floor", "id_dlib", "sharpness",
             "face_share")  # fmt: skip
DRIVERS = {"wav2vec2": "wav2vec", "viseme encoder": "viseme_encoder"}  # what hears, and what its file is called; neither: the spectrum
SUITES = ("tiny", "short", "long", "turns")  # of suite.NAMED


# ---------------------------------------------------------------- what the user says


@dataclass(frozen=True, kw_only=True)
class SystemSettings:
    """Who made the videos, as the report names it. driver: the audio model behind the pictures (EVA-7), whose hash a judge's is compared
    with. What is not said is known of our own videos, and "unknown" of others', which are named after their file or folder."""

    name: str | None = None
    engine: str | None = None
    driver: str | None = None
    driver_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """folder: where suite.json lies; with `build` it is made there when it is missing. videos: folder of ID.mp4 by any system, with
    ID.trace.jsonl where the suite has events; None: we make them. items: the first so many, or those of these ids; None: all."""

    folder: str
    build: str | None = None
    seed: int = 1
    videos: str | None = None
    sanity: bool = True
    items: int | tuple[str, ...] | None = None
    real: str | None = None  # statistics of a real set, for FID and FVD: `evaluate statistics` writes them
    crop: str = "none"  # how the judged videos were cropped before; those of the real set must have been in the same way

    def __post_init__(self):
        if self.build is not None:
            one_of("suite.build", self.build, SUITES)
        if isinstance(self.items, int) and self.items < 1:
            raise ConfigError(f"suite.items={self.items}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """A long stream. probe, speech: recordings (None: the embedded one); video: made by any system from the plan's sound, with its trace
    if there is one; None: we make both, with the counter of time positions starting at first_position (counter warp)."""

    seconds: float = 60.0
    window: float = 10.0
    seed: int = 1
    probe: str | None = None
    text: str = ""  # of the probe
    speech: str | None = None
    portrait: str | None = None
    video: str | None = None
    trace: str | None = None
    first_position: int = 0
    synthetic: bool = False  # the portrait is a rendered head, as the embedded one is known to be

    def __post_init__(self):
        if self.first_position < 0 or (self.first_position and self.video is not None):
            raise ConfigError(f"drift.first_position={self.first_position}: must be >= 0, and 0 with drift.video, which was made already")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation. out: folder of the report. gates: measure -> {min, max}; backends: name -> {path, sha256}. config: of our generation."""

    out: str
    system: SystemSettings = field(default_factory=SystemSettings)
    suite: SuiteSettings | None = None
    drift: DriftSettings | None = None
    config: str | None = None
    language: str = "en"
    backends: dict = field(default_factory=dict)
    gates: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.suite is None and self.drift is None:
            raise ConfigError("suite or drift: say at least one of them")
        report.judge_gates((), self.gates)  # a gate of a wrong form shall not wait for the end

    def given(self) -> Backends:
        return Backends({name: build(Given, value, "backends", name) for name, value in self.backends.items()})


def read_evaluation(path: Path, overrides: Sequence[str] = ()) -> Evaluation:
    """A SUITE.yaml. Raises ConfigError."""
    return load(path, overrides, Evaluation)


class Ours(Protocol):
    """How this project makes what is to be judged; handed in by the command line."""

    speech: Path  # the embedded recording and portrait
    portrait: Path

    def generate(self, config: Path | None, portrait: Path, audio: Path, out: Path, prompt: str | None, seed: int | None, trace: Path,
                 first_position: int = 0) -> None: ...

    def converse(self, config: Path | None, portrait: Path, audio: Path, events: Sequence[tuple[float, str, Path | None]], out: Path,
                 prompt: str | None, seed: int | None, trace: Path) -> None: ...  # by the wall clock; seconds, interrupt | portrait, its file

    def weights(self, config: Path | None) -> dict[str, Path]: ...

    def stage(self) -> Callable: ...  # renders a suite.Line


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every report needs from outside. say: progress for people."""

    command: str
    ours: Ours
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    say: Callable[[str], None] = lambda line: None

    def begin(self, kind: str, system: System, origin: Origin, **more) -> Report:
        return Report(kind=kind, system=system, origin=origin, command=self.command, date=self.clock().isoformat(timespec="seconds"),
                      host=provenance.host(), **more)


def finish(made: Report, out: Path) -> Report:
    """Write report.json and report.md."""
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(made, out / "report.json")
    (out / "report.md").write_text(tables.markdown(made), encoding="utf-8")
    return made


def system_of(settings: SystemSettings, ours: Ours, config: Path | None) -> System:
    """The System of a report on videos that we made."""
    weights = {name: provenance.sha256(path) for name, path in ours.weights(config).items()}
    ears = {kind: "+".join(sha for name, sha in weights.items() if part in name) for kind, part in DRIVERS.items()}
    driver = next((kind for kind, sha in ears.items() if sha), None)
    known = System(name="embedded avatar" if config is None else "liveavatar", engine="diffusion", commit=provenance.commit(), weights=weights,
                   config_sha256=None if config is None else provenance.sha256(config),
                   driver=driver or "log-mel front end", driver_sha256=ears.get(driver))  # fmt: skip
    return _as_said(settings, known)


def stranger(settings: SystemSettings, path: Path) -> System:
    """The System of a report on videos that somebody else made, in this file or folder."""
    return _as_said(settings, System(name=path.resolve().name))


def _as_said(settings: SystemSettings, known: System) -> System:
    return replace(known, **{name: value for name, value in vars(settings).items() if value is not None})


# ---------------------------------------------------------------- a suite


def run_suite(order: Evaluation, setting: Setting) -> Report:
    """Build what is missing, make what nobody gave, judge, rank the measures, write."""
    from liveavatar.evaluation import sanity

    what, out, config = order.suite, Path(order.out), None if order.config is None else Path(order.config)
    suite, backends = open_suite(what, setting), order.given()
    if what.videos is None:
        videos, system = _make_videos(suite, out / "videos", config, setting, system_of(order.system, setting.ours, config))
    else:
        videos, system = Path(what.videos), stranger(order.system, Path(what.videos))
    setting.say(f"judging {len(suite.manifest.items)} videos of {videos}")
    items, metrics, drawn = _judged(suite, videos, order, backends)
    unusable = [(item.id, m.reason) for item in items for m in item.measures if m.name == "judged"]
    if len(unusable) == len(items):
        raise InputError(f"{videos}: none of the suite's {len(items)} videos can be judged: {unusable[0][1]}")
    checks, ranked = (), what.sanity and all(item.gt_video for item in suite.manifest.items)
    if ranked:
        setting.say("ranking the measures")
        checks = sanity.ranking(suite, backends)
        metrics = report.rejected(metrics, checks)
    synthetic = suite.manifest.synthetic
    limits = () if ranked else ("No sanity ranking: the suite has no true pictures." if what.sanity else "No sanity ranking: not asked for.",)
    if what.items is not None:
        limits = (*limits, f"A part of the suite: {', '.join(item.id for item in suite.manifest.items)}.")
    origin = Origin(name=suite.manifest.name, version=suite.manifest.version, sha256=suite.sha256, synthetic=synthetic)
    return finish(setting.begin(
        "suite", system, origin, items=items, metrics=metrics, sanity=checks,
        gates=report.judge_gates(metrics, order.gates), seeds={"suite": what.seed, "bootstrap": report.SEED}, plots=drawn,
        exclusions=tuple(f"{name}: {reason}" for name, reason in unusable), details={"groups": report.grouped(items, metrics, HEADLINES)},
        limits=(*limits, FLOOR, SYNTHETIC_LIMIT) if synthetic else (*limits, FLOOR)), out)  # fmt: skip


def _judged(suite, videos: Path, order: Evaluation, backends: Backends) -> tuple[tuple[report.Item, ...], tuple[Measure, ...], tuple[str, ...]]:
    """Items, measures over them, and plots."""
    from liveavatar.evaluation import closeup, turns
    from liveavatar.evaluation.suite import judge_suite

    if any(item.events for item in suite.manifest.items):
        return (*turns.judge_turns(suite, videos), ())
    items = judge_suite(suite, videos, backends=backends, language=order.language)
    metrics = (*report.aggregate(items), *_distribution(items, backends, order.suite))
    return items, metrics, closeup.draw(suite, videos, items, Path(order.out) / "plots")


def open_suite(what: SuiteSettings, setting: Setting):
    """The suite of the settings, or what they name of it. Raises InputError."""
    found, items = _whole_suite(what, setting), what.items
    known = {item.id: item for item in found.manifest.items}
    if isinstance(items, tuple) and (strange := [name for name in items if name not in known]):
        raise InputError(f"suite.items: {found.manifest.name} has no {', '.join(strange)}")
    kept = tuple(map(known.get, items)) if isinstance(items, tuple) else found.manifest.items[:items]
    return replace(found, manifest=replace(found.manifest, items=kept))


def _whole_suite(what: SuiteSettings, setting: Setting):
    """The suite's folder, built first where it is missing and the settings say how. Raises InputError where another suite is there."""
    from liveavatar.evaluation import suite as suites
    from liveavatar.evaluation import turns

    folder, name, version = Path(what.folder), f"suite_{what.build}", f"{suites.VERSIONS.get(what.build)}, seed {what.seed}"
    if what.build is not None and not (folder / suites.MANIFEST).exists():
        setting.say(f"building {name} in {folder}")
        return suites.build(folder, name, version, suites.NAMED[what.build](what.seed), turns.staged(setting.ours.stage()))
    found = suites.read_suite(folder)
    if what.build is not None and (found.manifest.name, found.manifest.version) != (name, version):
        raise InputError(f"{folder}: holds {found.manifest.name} {found.manifest.version}, not {name} {version}: name another folder")
    return found


def _make_videos(suite, folder: Path, config: Path | None, setting: Setting, system: System) -> tuple[Path, System]:
    """ID.mp4 of every item by our own generation, and the system that made them. Whole ones that are there already are kept if
    they are of the same suite, config and weights, with the commit they were made at."""
    card, asked = folder / "made.json", {"suite": suite.sha256, "config": system.config_sha256, "weights": system.weights}
    made = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
    kept = {name: made.get(name) for name in asked} == asked
    missing = [item for item in suite.manifest.items if not (kept and (folder / f"{item.id}.mp4").exists())]
    if not kept:
        made = asked | {"commits": []}
        for item in missing:
            (folder / f"{item.id}.mp4").unlink(missing_ok=True)
    if missing:
        made["commits"] = [*dict.fromkeys([*made["commits"], system.commit])]
        (folder / "part").mkdir(parents=True, exist_ok=True)
        card.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for item in missing:
        part, trace = folder / "part" / f"{item.id}.mp4", folder / f"{item.id}.trace.jsonl"  # one that was broken off would play too
        setting.say(f"making {folder / part.name}")
        given = config, suite.path(item, "portrait"), suite.path(item, "audio")
        if item.events:
            events = [(e.time, e.kind, suite.folder / e.portrait if e.portrait else None) for e in item.events]
            setting.ours.converse(*given, events, part, item.prompt, item.seed, trace)
        else:
            setting.ours.generate(*given, part, item.prompt, item.seed, trace)
        part.replace(folder / part.name)
    return folder, replace(system, commit=", ".join(made["commits"]))


def _distribution(items: Sequence[report.Item], backends: Backends, what: SuiteSettings) -> list[Measure]:
    """FID and FVD over the videos that could be judged."""
    from liveavatar.evaluation.clips import VideoFile
    from liveavatar.evaluation.weighted import Distribution, Real

    both = Distribution(backends, None if what.real is None else Real(Path(what.real), what.crop))
    for item in items:
        if item.sha256:
            both.add(VideoFile(item.video))
    return both.measures()


def write_statistics(videos: Sequence[Path], out: Path, backends: Backends, crop: str) -> str:
    """Statistics of a real set, of files or folders of mp4; returns the SHA-256 of the file. Raises ConfigError, InputError."""
    from liveavatar.evaluation.clips import VideoFile
    from liveavatar.evaluation.weighted import EXTRACTORS, write_real

    if not any(map(backends.has, EXTRACTORS)):
        raise ConfigError(f"statistics need {backends.needs('inception').removeprefix('needs ')} or "
                          f"{backends.needs('i3d').removeprefix('needs ')}: name their file with --config")  # fmt: skip
    files = [file for path in videos for file in (sorted(path.glob("*.mp4")) if path.is_dir() else [path])]
    if not files:
        raise InputError(f"{', '.join(map(str, videos))}: no mp4 in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_real(out, backends, map(VideoFile, files), crop)


# ---------------------------------------------------------------- one video


def run_video(video: Path, out: Path, setting: Setting, *, system: SystemSettings, gates: dict, backends: Backends, synthetic: bool = False,
              **options) -> Report:
    """One file of any system. synthetic: it shows a rendered head, as it does where the portrait is the embedded one. options: audio,
    reference, portrait, text, language of judge.judge_video."""
    from liveavatar.evaluation.clips import VideoFile
    from liveavatar.evaluation.judge import judge_video

    file = VideoFile(video)
    measures = tuple(judge_video(file, backends=backends, **options))
    item = report.Item(id=video.stem, video=str(video), sha256=file.sha256, picture=file.card, measures=measures)
    synthetic = synthetic or _is_ours(options.get("portrait"), setting)
    origin = Origin(name=video.name, sha256=_asked(file.sha256, options), synthetic=synthetic)
    limits = ("One file: intervals are over its seconds, not over items. No sanity ranking was run for it.", FLOOR)
    return finish(setting.begin("video", stranger(system, video), origin, items=(item,), metrics=measures,
                                gates=report.judge_gates(measures, gates), limits=limits), out)


def _is_ours(portrait: Path | None, setting: Setting) -> bool:
    """It is the embedded portrait, which is a render."""
    return portrait is not None and provenance.sha256(portrait) == provenance.sha256(setting.ours.portrait)


def _asked(own: str, options: dict) -> str:
    """What a video was judged against, so that two systems' videos of the same task compare; its own hash when that was nothing."""
    said = {name: value for name, value in options.items() if value is not None and name != "language"}
    task = {name: value if isinstance(value, str) else provenance.sha256(value) for name, value in said.items()}
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest() if task else own


# ---------------------------------------------------------------- drift


def run_drift(order: Evaluation, setting: Setting) -> Report:
    """Plan, make or take the video, judge every window, write. The plan and its sound stay in the folder."""
    from liveavatar.evaluation import drift
    from liveavatar.evaluation.clips import VideoFile
    from liveavatar.evaluation.judge import judge_video
    from liveavatar.evaluation.likeness import own_face

    what, out = order.drift, Path(order.out)
    plan = plan_drift(what, out, setting)
    target, trace, portrait = _stream(order, plan, setting)
    video, backends = VideoFile(target), order.given()
    start = own_face(drift.Window(video, plan.starts[0], plan.window))

    def judge(window) -> list[Measure]:
        setting.say(f"judging {window.start:g} s")
        return judge_video(window, portrait=portrait, text=plan.text or None, language=order.language, backends=backends, start=start)

    found, marks = drift.probes(video, plan, judge), _marks(trace)
    slopes = [*drift.trends(found), *_seams(video, marks, trace)]
    synthetic = what.synthetic or _is_ours(portrait, setting)
    measures = (*found[0].measures.values(), *slopes)
    config = None if order.config is None else Path(order.config)
    system = system_of(order.system, setting.ours, config) if what.video is None else stranger(order.system, target)
    windows = [{"start": p.start, **{m.name: m.value if m.measured else str(m) for m in p.measures.values()}} for p in found]
    return finish(setting.begin(
        "drift", system,
        Origin(name=f"drift {plan.seconds:g} s", version=f"seed {plan.seed}", sha256=plan.sha256, synthetic=synthetic), metrics=measures,
        items=(report.Item(id="stream", video=str(target), sha256=video.sha256, picture=video.card),), seeds={"plan": plan.seed},
        gates=(*drift.gates(found, slopes), *report.judge_gates(measures, order.gates)), limits=_drift_limits(what, plan, found),
        plots=_draw_drift(video, plan, found, marks, out, synthetic), details={"windows": windows, "marks": marks}), out)  # fmt: skip


def _stream(order: Evaluation, plan, setting: Setting) -> tuple[Path, Path | None, Path]:
    """The long video, its trace if there is one, and the portrait; made here when nobody gave a video."""
    what, out = order.drift, Path(order.out)
    portrait = setting.ours.portrait if what.portrait is None else Path(what.portrait)
    if what.video is not None:
        return Path(what.video), None if what.trace is None else Path(what.trace), portrait
    target, trace = out / "drift.mp4", out / "trace.jsonl"
    setting.say(f"making {target} ({plan.seconds:g} s)")
    setting.ours.generate(None if order.config is None else Path(order.config), portrait, out / plan.audio, target, None, what.seed, trace,
                          what.first_position)
    return target, trace, portrait


def _marks(trace: Path | None) -> list[tuple[float, str]]:
    """What changed on the way, by the trace."""
    from liveavatar.evaluation.traces import read_trace

    return [] if trace is None else [step for stream in read_trace(trace).streams[:1] for step in stream.steps()]


def _seams(video, marks: Sequence[tuple[float, str]], trace: Path | None) -> list[Measure]:
    """How far picture and face jump at each mark, the picture in usual changes from picture to picture: the largest of each."""
    from liveavatar.evaluation import drift, likeness

    of_picture = {"unit": "x", "better": "lower", "backend": drift.BACKEND}
    of_face = {"unit": "", "better": "lower", "backend": likeness.BACKEND}
    if not marks:
        reason = "needs the trace of the run" if trace is None else "nothing changed on the way, by the trace"
        return [report.absent("seam", reason, **of_picture), report.absent("seam_id", reason, **of_face)]
    jumps = [drift.seam(video, at) for at, _ in marks]
    picture = Measure(name="seam", value=max(jumps), n=len(jumps), **of_picture)
    faces = [face for at, _ in marks if (face := likeness.jump(video, at)) is not None]
    if not faces:
        return [picture, report.absent("seam_id", "no face of a usable size on both sides", **of_face)]
    far, usual = max(faces)
    return [picture, Measure(name="seam_id", value=far, n=len(faces), weights_sha256=likeness.NETWORK_SHA256,
                             reason=f"{usual:.3f} between halves of the seconds before or after it", **of_face)]


def _drift_limits(what: DriftSettings, plan, found) -> tuple[str, ...]:
    from liveavatar.evaluation import drift

    limits = (f"Worst window: {drift.worst(found).start:g} s.",
              "The same words are spoken in every window; intervals are within a window.", FLOOR)  # fmt: skip
    if what.first_position:
        warp = f"Counter warp: time positions start at {what.first_position}. That tests arithmetic, not drift: nothing has gone before."
        limits = (*limits, warp)
    return limits if plan.seconds >= 1000 else (*limits, f"{plan.seconds:g} s only: nothing is said about minutes or hours.")


def _draw_drift(video, plan, found, marks, out: Path, synthetic: bool) -> tuple[str, ...]:
    from liveavatar.evaluation import drift, plots

    plots.drift(out / "plots" / "drift.svg", plan, found, marks, synthetic)
    starts = dict.fromkeys(p.start for p in (found[0], drift.worst(found), found[-1]))
    near = {f"{start:g} s": next(picture for _, picture in drift.Window(video, start + plan.window / 2, 1.0).frames()) for start in starts}
    plots.contacts(out / "plots" / "windows.svg", near, "First, worst and last window", synthetic)
    return "plots/drift.svg", "plots/windows.svg"


def plan_drift(what: DriftSettings, out: Path, setting: Setting):
    """plan.json and audio.wav in `out`: those that are there, if they are of these settings, else new ones."""
    from liveavatar.conditioning.media import read_audio
    from liveavatar.evaluation import drift

    if what.video is not None:
        plan = drift.read_plan(out / "plan.json")
        if (plan.seconds, plan.window, plan.seed) != (what.seconds, what.window, what.seed):
            raise InputError(f"{out / 'plan.json'}: another plan than these settings ask for: the video was made for it")
        return plan
    probe, speech = (np.concatenate(list(read_audio(given or setting.ours.speech))) for given in (what.probe, what.speech))
    return drift.write_plan(out, what.seconds, what.seed, probe, speech, window=what.window, text=what.text)


# ---------------------------------------------------------------- a trace


def run_trace(path: Path, out: Path, setting: Setting, *, warmup: int, price: float | None, again: Path | None, gates: dict) -> Report:
    """Latency and throughput of a run."""
    from liveavatar.evaluation import plots, traces

    run = traces.read_trace(path)
    measures = tuple(traces.judge_trace(run, warmup=warmup, price=price, again=None if again is None else traces.read_trace(again)))
    facts = run.head["facts"]
    plots.latency(out / "plots" / "latency.svg", run)
    plots.timeline(out / "plots" / "intervals.svg", run)
    asked = [[s.pace, max((line["stop"] for line in s["received"]), default=0)] for s in run.streams]  # equal: two runs compare
    origin = Origin(name=path.name, version=f"{len(asked)} streams", sha256=hashlib.sha256(json.dumps(asked).encode()).hexdigest())
    limits = (f"Warm-up: the first {warmup} blocks of each stream are left out of latencies, intervals and rates.",
              "Stages of a GPU wait for their device while traced." if any(s["gpu"] for stream in run.streams for s in stream["span"]) else "")
    model = str(facts.get("model", "unknown"))
    system = System(name="embedded avatar" if model == "default" else model, engine="as traced")
    return finish(setting.begin("trace", system, origin, metrics=measures, gates=report.judge_gates(measures, gates), details={"run": facts},
                                limits=tuple(line for line in limits if line), plots=("plots/latency.svg", "plots/intervals.svg")), out)


# ---------------------------------------------------------------- people


def score_people(key_path: Path, files: Sequence[Path], out: Path, setting: Setting) -> Report:
    """What raters said."""
    from liveavatar.evaluation import human, ratings

    key = human.read_key(key_path)
    found = ratings.collect(key, files)
    origin = Origin(name=f"study {key.study}", sha256=provenance.sha256(key_path))
    limits = (f"Rule of exclusion: {key.exclusion}.", f"{len(found.raters)} raters counted.")
    return finish(setting.begin("human", System(name=" and ".join(key.systems)), origin, metrics=tuple(ratings.score(key, found)), limits=limits,
                                exclusions=found.excluded, seeds={"study": key.seed}), out)
