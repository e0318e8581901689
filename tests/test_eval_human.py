"""The rating study: what raters can and cannot see, and answers of known opinion come out as that opinion."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import speech

from liveavatar.conditioning.media import VideoWriter, read_audio
from liveavatar.core import InputError
from liveavatar.evaluation import human, ratings
from liveavatar.evaluation.clips import VideoFile

pytest.importorskip("cv2", reason="the extra [eval]")


def clip(path, shade: int, seed: int, seconds: float = 1.0):
    path.parent.mkdir(exist_ok=True)
    with VideoWriter(path, 32, 48) as writer:
        pictures = np.full((round(25 * seconds), 48, 32, 3), shade, np.uint8)
        pictures[::2, 10:20] = 255  # something that moves
        tone = np.sin(2 * np.pi * (200 + 170 * seed) * np.arange(round(16000 * seconds)) / 16000)
        writer.write(pictures, (tone * np.abs(speech(seconds))).astype(np.float32))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder of a study of systems x and y on three items, and its key."""
    root = tmp_path_factory.mktemp("study")
    for shade, name in enumerate(("x", "y", "real")):
        for item in range(3):
            clip(root / name / f"item{item}.mp4", 50 + 60 * shade, item)
    (root / "faces").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(root / "faces" / "item1.png")
    return root, built(root, root / "out", root / "faces")


def built(root, out, faces) -> human.Key:
    systems = {name: root / name for name in ("x", "y")}
    return human.read_key(human.build_study(systems, out, exact=root / "real", portraits=faces, seed=5, sheets=30, pairs=3, singles=4, side=32, sliders=True))


# ---------------------------------------------------------------- what is built


def test_the_folder_is_whole_and_tells_nothing(study):
    root, key = study
    text = (root / "out/index.html").read_text()
    names = set(re.findall(r'"([0-9a-f]{10})"', text))
    assert names and names <= set(key.clips) and {p.stem for p in (root / "out/clips").iterdir()} == set(key.clips)
    assert not re.search(r"https?://|item\d|anchor|exact|repeat", text.split("const STUDY = ")[1].split(";\n")[0])
    assert "http" not in text.replace("http-equiv", "") and (root / "out.key.json").exists() and not list((root / "out").rglob("*key*"))
    assert not any(bytes(f"item{k}", "utf8") in p.read_bytes() for p in (root / "out/clips").iterdir() for k in range(3))


def test_clips_are_alike_in_size_rate_and_loudness_and_anchors_are_what_they_say(study):
    root, key = study
    found = {(c["item"], c["system"]): root / "out/clips" / f"{name}.mp4" for name, c in key.clips.items()}
    assert len(found) == 3 * 6
    levels = []
    for path in found.values():
        video, pcm = VideoFile(path), np.concatenate(list(read_audio(path)))
        assert (video.width, video.height, video.fps, video.codec) == (32, 32, 25.0, "h264")
        levels.append(np.sqrt((pcm[np.abs(pcm) > 0.01] ** 2).mean()))
    assert max(levels) / min(levels) < 1.3
    sound = {what: np.concatenate(list(read_audio(found["item0", f"anchor:{what}"]))) for what in ("exact", "shift", "wrong", "static")}
    lags = np.correlate(sound["shift"], sound["exact"][:8000], "valid")
    assert lags.argmax() == pytest.approx(6400, abs=20)  # 0.4 s late
    same, other = (np.corrcoef(sound["exact"][:15000], sound[what][:15000])[0, 1] for what in ("static", "wrong"))
    assert same > 0.99 and abs(other) < 0.5
    motion = {what: np.ptp([p.mean() for _, p in VideoFile(found["item0", f"anchor:{what}"]).frames()]) for what in ("exact", "static")}
    assert motion["exact"] > 10 > 1 > motion["static"]


def test_sheets_have_anchors_repeats_and_both_sides(study):
    _, key = study
    lefts = []
    for number in range(1, 31):
        trials = key.trials(number)
        pairs = [t for t in trials if t.right]
        kinds = [{key.clip(t.left).system, key.clip(t.right).system} for t in pairs if t.repeat < 0]
        assert all({human.EXACT, f"anchor:{a}"} in kinds for a in human.ANCHORS) and kinds.count({"x", "y"}) == 3
        assert all(key.clip(t.left).item == key.clip(t.right).item for t in pairs)
        repeats = [t for t in trials if t.repeat >= 0]
        assert len(repeats) == 2 and all((trials[t.repeat].left, trials[t.repeat].right) == (t.right, t.left) for t in repeats)
        assert len(trials) - len(pairs) == 4 + 2
        lefts += [key.clip(t.left).system for t in pairs if {key.clip(t.left).system, key.clip(t.right).system} == {"x", "y"} and t.repeat < 0]
    assert 25 < lefts.count("x") < 65 and len({json.dumps(key.sheets[str(n)]) for n in range(1, 31)}) == 30


def test_the_same_seed_builds_the_same_study(study, tmp_path):
    root, key = study
    for name in ("x", "y", "real"):
        shutil.copytree(root / name, tmp_path / name)
    assert built(tmp_path, tmp_path / "out", root / "faces") == key


def test_folders_that_do_not_fit_are_refused(study, tmp_path):
    root, _ = study
    clip(tmp_path / "z" / "other.mp4", 50, 0)
    with pytest.raises(InputError, match="share 0 items"):
        human.build_study({"x": root / "x", "z": tmp_path / "z"}, tmp_path / "out")
    with pytest.raises(InputError, match="no folder with mp4"):
        human.build_study({"x": tmp_path / "absent"}, tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        human.build_study({"x": root / "x"}, root / "out")


@pytest.mark.skipif(not shutil.which("node"), reason="node runs the page's script without a browser")
def test_the_script_of_the_page_parses(study, tmp_path):
    root, _ = study
    script = (root / "out/index.html").read_text().split("<script>")[1].split("</script>")[0]
    (tmp_path / "page.js").write_text(script)
    done = subprocess.run(["node", "--check", str(tmp_path / "page.js")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what comes back


def answer(key, number: int, rater: str, opinion, path):
    """A rater's file; opinion(system) -> how good it is, compared and rounded to a grade."""
    given = []
    for trial in key.trials(number):
        one = opinion(key.clip(trial.left).system)
        if trial.right:
            two = opinion(key.clip(trial.right).system)
            choice = "A" if one > two else "B" if two > one else "same"
            given.append({"left": trial.left, "right": trial.right, **dict.fromkeys(("sync", "natural"), choice), "played": [1, 2], "seconds": 9.0})
        else:
            given.append({"left": trial.left, "right": "", **dict.fromkeys(("sync", "natural", "overall"), str(round(one))), "slide_sync": 20 * one,
                          "played": [1], "seconds": 5.0})  # fmt: skip
    path.write_text(json.dumps({"schema": "ratings/1", "study": key.study, "sheet": number, "rater": rater, "answers": given}))
    return path


GOOD = {"x": 4.0, "y": 3.0, "anchor:exact": 5.0, "anchor:shift": 2.0, "anchor:wrong": 1.0, "anchor:static": 1.0}


def test_a_clear_opinion_comes_out_clear(study, tmp_path):
    _, key = study
    paths = [answer(key, n, f"r{n}", GOOD.get, tmp_path / f"{n}.json") for n in range(1, 26)]
    found = ratings.collect(key, paths)
    table = {m.name: m for m in ratings.score(key, found)}
    wins = table["win_rate.sync.x>y"]
    assert wins.value == 1.0 and wins.n == 75 and wins.interval == (pytest.approx(0.951, abs=0.002), 1.0)
    assert table["strength.sync.x"].value > 2 and table["strength.sync.x"].value == pytest.approx(-table["strength.sync.y"].value)
    assert table["MOS.overall.x"].value == 4.0 and table["MOS.overall.anchor:static"].value == 1.0 and table["slider.sync.x"].value == 80.0
    assert table["anchor.shift"].value == 1.0 and table["consistency"].value == 1.0
    assert table["alpha.MOS.overall"].value == pytest.approx(1.0) and not found.excluded
    assert "pilot" not in wins.reason and wins.reason == "0 of 75 no difference"


def test_few_raters_are_a_pilot_and_none_is_not_measured(study, tmp_path):
    _, key = study
    few = ratings.collect(key, [answer(key, n, f"r{n}", GOOD.get, tmp_path / f"{n}.json") for n in (1, 2)])
    assert all("pilot: 2 of 24 raters" in m.reason for m in ratings.score(key, few) if m.measured)
    none = ratings.score(key, ratings.collect(key, []))
    assert none and all(str(m) == "not measured (no ratings collected)" for m in none)


def test_raters_who_miss_both_gross_anchors_or_play_nothing_do_not_count(study, tmp_path):
    _, key = study
    blind = {**GOOD, "anchor:exact": 0.6, "anchor:wrong": 3.0}
    half = {**GOOD, "anchor:static": 6.0}
    paths = [answer(key, 1, "good", GOOD.get, tmp_path / "1.json"), answer(key, 2, "blind", blind.get, tmp_path / "2.json"),
             answer(key, 3, "half", {**half, "anchor:static": 5.0}.get, tmp_path / "3.json"), answer(key, 4, "idle", GOOD.get, tmp_path / "4.json")]
    paths[3].write_text(paths[3].read_text().replace('"played": [1, 2]', '"played": [0, 0]').replace('"played": [1]', '"played": [0]'))
    found = ratings.collect(key, paths)
    assert found.raters == ("good", "half") and found.excluded == ("rater blind: missed both gross anchors", "rater idle: played nothing")


def test_forged_and_second_files_are_refused(study, tmp_path):
    _, key = study
    good = answer(key, 1, "r", GOOD.get, tmp_path / "a.json")
    second = answer(key, 2, "r", GOOD.get, tmp_path / "b.json")
    with pytest.raises(InputError, match="rater r is in"):
        ratings.collect(key, [good, second])
    document = json.loads(good.read_text())
    changes = [{"study": "other"}, {"sheet": 99}, {"surprise": 1}, {"answers": document["answers"][1:]},
               {"answers": [{**document["answers"][0], "sync": "C"}]}, {"answers": [*document["answers"], document["answers"][0]]}]
    for change in changes:
        (tmp_path / "c.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(InputError, match=r"c\.json"):
            ratings.collect(key, [tmp_path / "c.json"])


# ---------------------------------------------------------------- arithmetic


def test_bradley_terry_recovers_strengths():
    true, rng = {"a": 1.0, "b": 0.0, "c": -1.0}, np.random.default_rng(0)
    wins = {(p, q): float(rng.binomial(4000, 1 / (1 + np.exp(true[q] - true[p])))) for p, q in (("a", "b"), ("a", "c"), ("b", "c"))}
    wins |= {(q, p): 4000 - count for (p, q), count in wins.items()}
    assert ratings.bradley_terry(list(true), wins) == pytest.approx(true, abs=0.08)
    assert ratings.bradley_terry(["a", "b"], {("a", "b"): 30.0, ("b", "a"): 10.0})["a"] == pytest.approx(np.log(30.1 / 10.1) / 2)


def test_krippendorffs_alpha_is_that_of_his_example():
    """Krippendorff (2011), section D: four observers, twelve units; nominal .743, ordinal .815."""
    table = ["1 2 3 3 2 1 4 1 2 * * *", "1 2 3 3 2 2 4 1 2 5 * 3", "* 3 3 3 2 3 4 2 2 5 1 *", "1 2 3 3 2 4 4 1 2 5 1 *"]
    units = [[float(v) for v in column if v != "*"] for column in zip(*(row.split() for row in table), strict=True)]
    assert ratings.krippendorff(units, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert ratings.krippendorff(units, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert ratings.krippendorff([[1, 1], [1, 1]]) is None and ratings.krippendorff([[1], [2]]) is None


def test_an_interval_over_raters_and_items_is_wider_when_raters_differ():
    rng = np.random.default_rng(0)
    rows = [ratings.Grade(f"r{r}", f"i{i}", "x", {}) for r in range(12) for i in range(12)]
    noise, taste = rng.normal(size=144), np.repeat(rng.normal(size=12), 12)
    widths = [np.diff(ratings.twofold(rows, lambda w, v=values: (w * v).sum() / w.sum()))[0] for values in (noise, taste)]
    assert widths[1] == pytest.approx(3.92 * np.std(taste) / np.sqrt(12), rel=0.2) and widths[1] > 1.3 * widths[0]
    assert ratings.twofold(rows[:5], lambda w: 1.0) is None
