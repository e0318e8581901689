"""Before a metric is shown it must rank what is known to be better above what is known to be worse (evaluation.md section 3).

From the exact pictures of a suite, per item: A the pair as it is; B its sound 200 ms late; C another item's sound; D a
still face; E lips half as far apart; F one picture in ten shown twice; G another person; H blur and a colour cast; I luma
flicker of 4 %. Every order is tested by the bootstrap over items of the paired difference: a tie within it is a failure.
A ~ B: B lies certainly nearer to A than half the way to C. Equality within an interval cannot be asked for: two items whose
differences of .001 have one sign, or a video with one track, would fail it or have no interval.

Measures without an order here (where the face is, colours, blockiness, which a blur may raise, shares of faces, idle variance, what a
face is told besides its lips) describe, and a report marks them `not ranked`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from liveavatar.conditioning.face import FaceTracker
from liveavatar.conditioning.phones import Utterance
from liveavatar.core import SAMPLE_RATE
from liveavatar.evaluation import closure, landmarks, likeness, stability, sync, weighted
from liveavatar.evaluation.backends import Backends
from liveavatar.evaluation.clips import VideoFile
from liveavatar.evaluation.judge import five_of, read_portrait
from liveavatar.evaluation.landmarks import Track, Truth
from liveavatar.evaluation.quality import Quality
from liveavatar.evaluation.report import Check, Measure, bootstrap
from liveavatar.evaluation.suite import READING, Suite, SuiteItem, read_truth, write_video

SHIFT = 0.2  # seconds
REPEAT_EVERY, FLICKER, SEED = 10, 0.04, 0
BLUR, CAST = 1.5, (1.08, 1.0, 0.92)  # pixels; gains of red, green, blue
BRIEF = 75  # pictures of each item that steadiness and a still face are judged on: their differences are large
REPEATS = (BRIEF // REPEAT_EVERY) / BRIEF  # share of repeated pictures in F
WITHIN_FRAME = 40.0  # ms: how exactly the shift of B must be found again

Values = dict[str, dict[str, float]]  # variant -> measure -> value


# ---------------------------------------------------------------- the variants of the pictures


def still(frames: np.ndarray) -> np.ndarray:
    return np.repeat(frames[:1], len(frames), axis=0)


def stutter(frames: np.ndarray) -> np.ndarray:
    """Every tenth picture shows the ninth again."""
    order = np.arange(len(frames))
    order[REPEAT_EVERY - 1 :: REPEAT_EVERY] -= 1
    return frames[order]


def flicker(frames: np.ndarray) -> np.ndarray:
    gains = 1 + np.random.default_rng(SEED).choice([-FLICKER, FLICKER], len(frames))
    return np.clip(frames * gains[:, None, None, None], 0, 255).astype(np.uint8)


def spoil(frames: np.ndarray) -> np.ndarray:
    """Blur and a colour cast."""
    import cv2

    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), BLUR) for frame in frames])
    return np.clip(soft * np.array(CAST), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- one item's values


@dataclass
class Bench:
    """One item of a suite with what is needed to judge its variants: C takes the sound of `other`, G the face of `stranger`."""

    suite: Suite
    item: SuiteItem
    other: SuiteItem
    stranger: SuiteItem | None
    folder: Path
    backends: Backends = field(default_factory=Backends)
    values: Values = field(default_factory=dict)

    def note(self, variant: str, measures: Sequence[Measure]) -> None:
        """Keep what was measured. NaN stands for what was not."""
        row = self.values.setdefault(variant, {})
        row.update({m.name: m.value if m.measured else float("nan") for m in measures})

    def run(self) -> Values:
        """Make and judge every variant of this item."""
        truth, said = read_truth(self.suite.path(self.item, "gt_motion")), self._said(self.item)
        exact = VideoFile(self.suite.path(self.item, "gt_video"))
        frames = np.stack([frame for _, frame in exact.frames()])
        real = Track.through(exact)
        self._speech(real, said)
        self._mouth(real, truth, said)
        self._still(frames[:BRIEF], real, truth, said)
        self._steadiness(frames[:BRIEF], real)
        self._people(exact)
        self._quality(exact, frames)
        if self.backends.given:
            self._by_weights(exact, frames, said)
        return self.values

    def _said(self, item: SuiteItem) -> Utterance:
        return Utterance(VideoFile(self.suite.path(item, "gt_video")).sound(), item.phones, item.text, "suite")

    def _speech(self, track: Track, said: Utterance) -> None:
        """A, B, C: one track, three sounds; phones are aligned to what is heard, as they are for any file."""
        heard = {"A": (said.pcm, said.text), "B": (sync.offset(said.pcm, SHIFT), said.text), "C": (self._said(self.other).pcm, self.other.text)}
        for variant, (pcm, text) in heard.items():
            utterance, source = sync.heard(pcm, text)
            self.note(variant, [*sync.av_corr(track, utterance, source), *closure.closure(track, utterance, source)])

    def _mouth(self, real: Track, truth: Truth, said: Utterance) -> None:
        """Against the reference itself: A; pictures 200 ms late: B; lips half as far apart: E."""
        late = Track(real.times + SHIFT, real.points, real.faces)
        mumbled = Track.through(VideoFile(self.suite.path(self.item, "mumbled_video")))
        for variant, track in (("A", real), ("B", late), ("E", mumbled)):
            self.note(variant, [*landmarks.distances(track, real), *landmarks.true_distances(track, truth, real), *landmarks.response(track, truth, real)])
        self.note("E", closure.closure(mumbled, said))

    def _still(self, frames: np.ndarray, real: Track, truth: Truth, said: Utterance) -> None:
        seen = Track.through(self._written("D", still(frames)))
        again = np.arange(len(real.times)) % len(seen.times)  # the rest of a still video is the same once more
        frozen = Track(real.times, seen.points[again], seen.faces[again])
        silent = np.zeros(len(real.times), bool)
        self.note("D", [*sync.av_corr(frozen, said), *closure.closure(frozen, said), *stability.motion_energy(seen, silent[:BRIEF]),
                        *landmarks.distances(frozen, real), *landmarks.true_distances(frozen, truth, real)])  # fmt: skip
        self.note("A", stability.motion_energy(real, silent))

    def _steadiness(self, frames: np.ndarray, real: Track) -> None:
        """A, D, F, I through one encoder."""
        made = {"A": frames, "D": still(frames), "F": stutter(frames), "I": flicker(frames)}
        files = {variant: self._written(variant, pictures) for variant, pictures in made.items()}
        for variant, file in files.items():
            seen = stability.Steadiness(flow=variant != "F")
            for at, frame in file.frames():
                seen.see(at, frame)
            self.note(variant, seen.measures())
        self.note("A", [stability.jerk(Track(real.times[:BRIEF], real.points[:BRIEF], real.faces[:BRIEF]))])
        self.note("F", [stability.jerk(Track.through(files["F"]))])

    def _people(self, exact: VideoFile) -> None:
        who = read_portrait(self.suite.path(self.item, "portrait"))
        shown = {"A": exact} if self.stranger is None else {"A": exact, "G": VideoFile(self.suite.path(self.stranger, "gt_video"))}
        start = None
        for variant, file in shown.items():
            seen, tracker = likeness.Likeness(), FaceTracker()
            for at, frame in _one_a_second(file):
                seen.see(at, frame, tracker.follow(frame))
            start = seen.own if start is None else start  # A's: G is another face than the one the video began with
            self.note(variant, seen.measures(who.embedding, start))

    def _quality(self, exact: VideoFile, frames: np.ndarray) -> None:
        for variant, file in (("A", exact), ("H", self._written("H", spoil(frames)))):
            seen, tracker = Quality(), FaceTracker()
            for (at, frame), (_, reference) in zip(_one_a_second(file), _one_a_second(exact), strict=True):
                faces = tracker.follow(reference)
                seen.see(at, frame, faces, reference, faces)
            self.note(variant, seen.measures(paired=True))

    def _by_weights(self, exact: VideoFile, frames: np.ndarray, said: Utterance) -> None:
        """The user's networks: sync of A to D, distance from the reference of A, H and I, likeness of A and G."""
        true, other, late = list(exact.frames()), self._said(self.other).pcm, sync.offset(said.pcm, SHIFT)
        times = np.array([at for at, _ in true])
        for variant, pictures, pcm in (("A", frames, said.pcm), ("B", frames, late), ("C", frames, other), ("D", still(frames), said.pcm)):
            self.note(variant, weighted.sync(times, pictures, pcm, self.backends))
        for variant, change in (("A", np.asarray), ("H", spoil), ("I", flicker)):
            self.note(variant, weighted.lpips(times[:BRIEF], change(frames[:BRIEF]), true[:BRIEF], self.backends))
        who = read_portrait(self.suite.path(self.item, "portrait"))
        for variant, item in (("A", self.item), ("G", self.stranger)):
            sample, tracker = weighted.Sample(), FaceTracker()
            for at, frame in () if item is None else _one_a_second(VideoFile(self.suite.path(item, "gt_video"))):
                sample.see(at, frame, five_of(tracker.follow(frame)))
            if sample.frames:
                self.note(variant, weighted.dino(sample, who.picture, self.backends))
                self.note(variant, weighted.arcface(sample, who.picture, who.points, self.backends))

    def _written(self, variant: str, frames: np.ndarray) -> VideoFile:
        path = self.folder / f"{self.item.id}.{variant}.mp4"
        write_video(path, frames, np.zeros(round(len(frames) * SAMPLE_RATE / 25), np.float32))
        return VideoFile(path)


def _one_a_second(file: VideoFile):
    return ((at, frame) for k, (at, frame) in enumerate(file.frames()) if k % max(1, round(file.fps)) == 0)


# ---------------------------------------------------------------- the orders


@dataclass(frozen=True)
class Order:
    """A demand on one metric. margin: of the better variant's value over the worse one's, per item; all must be certain."""

    metric: str
    needs: str
    margin: Callable[[Values], Sequence[float]]
    equal: bool = False  # the margins are distances that must not exceed zero, no bootstrap
    ties: bool = False  # "at least as good": certain only that it is not worse


def _above(metric: str, *variants: str) -> Callable[[Values], list[float]]:
    """Each variant's value over the next one's."""
    return lambda v: [v[a][metric] - v[b][metric] for a, b in pairwise(variants)]


def _below(metric: str, best: str, *worse: str) -> Callable[[Values], list[float]]:
    """Each worse variant's value over the best one's."""
    return lambda v: [v[w][metric] - v[best][metric] for w in worse]


def _best(metric: str, best: str, *worse: str) -> Callable[[Values], list[float]]:
    return lambda v: [v[best][metric] - v[w][metric] for w in worse]


def _is_zero(metric: str, variant: str) -> Callable[[Values], list[float]]:
    return lambda v: [abs(v[variant][metric])]


def _near(metric: str) -> Callable[[Values], list[float]]:
    """B is nearer to A than half the way to C."""
    return lambda v: [abs(v["A"][metric] - v["C"][metric]) / 2 - abs(v["A"][metric] - v["B"][metric])]


def _found_shift(v: Values) -> list[float]:
    return [abs(v["B"]["lag_ms"] - v["A"]["lag_ms"] - 1000 * SHIFT) - WITHIN_FRAME]


SEARCHING = ("peak", "conf", "margin")  # fields that an offset must not lower
ORDERS = (
    Order("sync_index", "A > B > C > D", _above("sync_index", *"ABCD")),
    Order("sync_index", "D = 0", _is_zero("sync_index", "D"), equal=True),
    Order("r0", "A > B, A > C", _best("r0", *"ABC")),
    Order("r0", "D = 0", _is_zero("r0", "D"), equal=True),
    *(Order(name, "A > C > D, B > C", lambda v, name=name: [*_above(name, *"ACD")(v), *_above(name, *"BC")(v)]) for name in SEARCHING),
    *(Order(name, "A ~ B", _near(name)) for name in SEARCHING),
    Order("lag_ms", "B - A = 200 ms within one picture", _found_shift, equal=True),
    *(order for name in ("lmd", "f_lmd", "lvd", "lmd_gt", "lvd_gt") for order in (Order(name, "A < B", _below(name, *"AB")),
                                                                                  Order(name, "A < D, A < E", _below(name, *"ADE")))),
    Order("response_gap_slope", "A > E", _best("response_gap_slope", *"AE")),
    Order("closure_minus_false", "A > C, A > D", _best("closure_minus_false", *"ACD")),
    Order("closure_minus_false", "A >= E", _best("closure_minus_false", *"AE"), ties=True),
    Order("closure_minus_false", "D = 0", _is_zero("closure_minus_false", "D"), equal=True),
    Order("warp_error", "D < A < I", lambda v: [v["A"]["warp_error"] - v["D"]["warp_error"], v["I"]["warp_error"] - v["A"]["warp_error"]]),
    Order("flicker_mae", "D > A > I", _above("flicker_mae", *"DAI")),
    Order("motion_speech", "A > D", _best("motion_speech", *"AD")),
    Order("jerk", "A < F", _below("jerk", *"AF")),
    Order("repeated_frames", "F - A counted exactly", lambda v: [abs(v["F"]["repeated_frames"] - v["A"]["repeated_frames"] - REPEATS)], equal=True),
    Order("id_dlib", "A < G by more than A's own spread", lambda v: [v["G"]["id_dlib"] - v["A"]["id_dlib_worst"]]),
    Order("id_dlib_own", "A < G by more than A's own spread",
          lambda v: [v["G"]["id_dlib_own"] - v["A"]["id_dlib_own"] - (v["A"]["id_dlib_worst"] - v["A"]["id_dlib"])]),
    *(Order(name, "A > H", _best(name, *"AH")) for name in ("sharpness", "psnr_full", "psnr_face", "psnr_mouth", "psnr_eyes", "ssim_full",
                                                             "ssim_face", "ssim_mouth", "ssim_eyes")),
)  # fmt: skip


def orders_of(backends: Backends) -> tuple[Order, ...]:
    """Of the measures by the user's weights, under the names that these weights have."""
    c, d, found = (backends.title(name, "syncnet", "s3fd") for name in ("Sync-C", "Sync-D", "sync_offset"))
    lpips, tlpips = (backends.title(name, "lpips_backbone", "lpips_heads") for name in ("LPIPS", "tLPIPS"))
    likeness_of = (lambda v, name=name: [v["A"][f"{name}_worst"] - v["G"][name]] for name in ("Dino-S", "ArcFace"))
    return (
        Order(c, "A > C, B > C", lambda v: [v["A"][c] - v["C"][c], v["B"][c] - v["C"][c]]),
        Order(c, "A ~ B", _near(c)),
        Order(c, "C > D", _above(c, *"CD")),  # not judged where D has none
        Order(d, "A < C, A < D", _below(d, *"ACD")),
        Order(d, "A ~ B", _near(d)),
        Order(found, "B - A = 200 ms within one picture", lambda v: [abs(v["B"][found] - v["A"][found] - 1000 * SHIFT) - WITHIN_FRAME], equal=True),
        Order(lpips, "A < H", _below(lpips, *"AH")),
        Order(tlpips, "A < I", _below(tlpips, *"AI")),  # its best is the reference itself, not a still face
        *(Order(name, "A > G by more than A's own spread", margin) for name, margin in zip(("Dino-S", "ArcFace"), likeness_of, strict=True)),
    )  # fmt: skip


def examine(order: Order, found: Sequence[Values]) -> Check:
    """One order over all items. None where a variant was not measured on two items."""
    margins = np.array([m for v in found if np.isfinite(m := _margin(order, v)).all()], float)
    detail = f"margins {', '.join(f'{m:.3g}' for m in margins.mean(0))} over {len(margins)} items" if len(margins) else "not measured"
    if len(margins) < (1 if order.equal else 2):
        return Check(metric=order.metric, needs=order.needs, ok=None, detail=detail)
    if order.equal:
        return Check(metric=order.metric, needs=order.needs, ok=bool((margins <= 1e-9).all()), detail=detail)
    lows = [bootstrap(column)[0] for column in margins.T]
    ok = all(low >= 0 if order.ties else low > 0 for low in lows)
    return Check(metric=order.metric, needs=order.needs, ok=bool(ok), detail=f"{detail}; lowest {', '.join(f'{low:.3g}' for low in lows)}")


def _margin(order: Order, values: Values) -> list[float]:
    """NaN where a variant was not made or judged."""
    try:
        return list(order.margin(values))
    except KeyError:
        return [float("nan")]


def values_of(suite: Suite, items: Sequence[SuiteItem] | None = None, backends: Backends | None = None) -> list[Values]:
    """Every variant of every item, judged."""
    items = list(items or suite.manifest.items)
    with TemporaryDirectory(prefix="sanity") as folder:
        return [Bench(suite, item, _other(items, k), _stranger(items, k), Path(folder), backends or Backends()).run()
                for k, item in enumerate(items)]


def _other(items: Sequence[SuiteItem], k: int) -> SuiteItem:
    """The next item; not from one reading to another, which are the same sentences."""
    return next((item for item in _after(items, k) if {item.voice, items[k].voice} != {READING}), items[k])


def _stranger(items: Sequence[SuiteItem], k: int) -> SuiteItem | None:
    """The next item that shows another person, known by another portrait where the suite does not say who it is."""
    return next((item for item in _after(items, k) if _who(item) != _who(items[k])), None)


def _after(items: Sequence[SuiteItem], k: int) -> Iterator[SuiteItem]:
    return (items[(k + step) % len(items)] for step in range(1, len(items)))


def _who(item: SuiteItem) -> str:
    return item.person or item.sha256[item.portrait]


def ranking(suite: Suite, backends: Backends | None = None) -> tuple[Check, ...]:
    """All orders on a suite with true pictures, those of the user's networks too; report.rejected takes out the metrics that fail."""
    found = values_of(suite, backends=backends)
    taken = {name for row in found for name, value in row["A"].items() if np.isfinite(value)}
    more = orders_of(backends) if backends is not None else ()
    return tuple(examine(order, found) for order in (*ORDERS, *(order for order in more if order.metric in taken)))
