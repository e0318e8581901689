"""Reports: what a number must carry, how items become a table, gates, sanity, comparison, and what people read."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from liveavatar.core import ConfigError, InputError
from liveavatar.evaluation.report import (
    Check, Item, Measure, Origin, Report, System, absent, aggregate, bootstrap, compare, grouped, judge_gates, read_report, rejected, write_json,
)  # fmt: skip
from liveavatar.evaluation.tables import PUBLISHED, comparison, markdown


def measure(name="psnr", value=30.0, **more) -> Measure:
    return Measure(**{"name": name, "value": value, "unit": "dB", "better": "higher", "n": 1, "backend": "ours", **more})


def report(values=(30.0, 32.0, 34.0), suite="a" * 64, **more) -> Report:
    items = tuple(Item(id=f"i{k}", measures=(measure(value=v), absent("Sync-C", "needs syncnet_v2.pth"))) for k, v in enumerate(values))
    return Report(**{"kind": "suite", "system": System(name="ours"), "origin": Origin(name="suite_tiny", version="1", sha256=suite, synthetic=True),
                     "command": "liveavatar evaluate", "date": "2026-11-21", "host": {"cpu": "x"}, "items": items,
                     "metrics": aggregate(items), **more})  # fmt: skip


# ---------------------------------------------------------------- measures


def test_a_measure_says_why_it_has_no_value():
    for wrong in ({"value": None}, {"value": None, "status": "not_measured"}, {"status": "failed"}, {"value": float("nan")},
                  {"value": 1.0, "interval": (0.0, float("inf"))}, {"better": "lowest"}, {"status": "ok"},
                  {"value": None, "status": "failed", "reason": "no face", "interval": (0.0, 1.0)}):
        with pytest.raises(ConfigError, match="psnr"):
            measure(**wrong)
    assert str(absent("FID", "needs inception.pt")) == "not measured (needs inception.pt)"
    assert str(measure(value=30.126, interval=(29.0, 31.0))) == "30.13 dB [29, 31]"


def test_bootstrap_covers_the_mean_and_is_the_same_each_time():
    rng = np.random.default_rng(5)
    covered = sum(low <= 0.0 <= high for low, high in (bootstrap(rng.normal(size=40), draws=200) for _ in range(100)))
    assert 85 <= covered <= 100
    samples = rng.normal(size=(30, 2))
    assert bootstrap(samples, lambda rows: rows[:, 0].mean()) == bootstrap(samples, lambda rows: rows[:, 0].mean())
    assert bootstrap([1.0]) is None and bootstrap([2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap([1.0, np.nan, np.nan, np.nan, np.nan]) is None


def test_items_become_one_row_each_with_what_is_missing_counted():
    items = [Item(id="a", measures=(measure(value=1.0), absent("r0", "too short"))),
             Item(id="b", measures=(measure(value=3.0), measure("r0", 0.5, interval=(0.4, 0.6)))),
             Item(id="c", measures=(absent("psnr", "no face", status="failed"), absent("lost", "no face"), absent("r0", "too short")))]
    psnr, r0, lost = aggregate(items)
    assert (psnr.value, psnr.n, psnr.interval) == (2.0, 2, (1.0, 3.0)) and psnr.reason == "1 of 3 items failed: no face"
    assert (r0.value, r0.interval, r0.reason) == (0.5, (0.4, 0.6), "2 of 3 items not measured: too short")
    assert lost.status == "not_measured"


def test_kinds_of_items_are_told_apart_by_what_was_measured_of_all():
    def item(framing, value, **more):
        return Item(id=framing, kinds={"framing": framing, "voice": "machine"}, measures=(measure(value=value), measure("lmd", **more)))

    items = [item("close", 3.0), item("close", 1.0), item("small", 0.5)]
    metrics = rejected(aggregate(items), [Check(metric="lmd", needs="A < B", ok=False)])
    groups = grouped(items, metrics, ("lmd", "psnr", "FID"))
    assert groups == {"framing": {"close": {"items": 2, "psnr": 2.0}, "small": {"items": 1, "psnr": 0.5}}}
    lost = [*items, Item(id="wide", kinds={"framing": "wide"}, measures=(absent("psnr", "no face"),))]
    text = markdown(report(details={"groups": grouped(lost, metrics, ("psnr",))}))
    assert "## By kind of item (synthetic suite)" in text and "| framing | items | psnr |" in text
    assert "| close | 2 | 2 |" in text and "| wide | 1 | - |" in text
    assert "By kind" not in markdown(report(details={"groups": {}}))


# ---------------------------------------------------------------- gates and sanity


def test_gates_are_inclusive_and_what_was_not_measured_is_not_judged():
    metrics = report().metrics
    gates = judge_gates(metrics, {"psnr": {"min": 32}, "Sync-C": {"min": 5}, "absent": {"max": 1.5}})
    assert [g.ok for g in gates] == [True, None, None]
    assert "needs syncnet_v2.pth" in gates[1].reason and "no such measure" in gates[2].reason
    (failed,) = judge_gates(metrics, {"psnr": {"min": 10, "max": 31.9}})
    assert failed.ok is False and failed.demand == "10 to 31.9" and report(gates=(failed,)).failed and not report(gates=gates).failed
    for wrong in ({"psnr": {}}, {"psnr": 3}, {"psnr": {"least": 3}}, {"psnr": {"min": "3"}}):
        with pytest.raises(ConfigError, match="gate psnr"):
            judge_gates(metrics, wrong)


def test_a_measure_that_fails_its_order_is_printed_as_rejected():
    checks = [Check(metric=name, needs=f"A > {worse}", ok=ok) for name, worse, ok in (("psnr", "H", False), ("Sync-C", "C", None), ("other", "B", True))]
    psnr, sync = rejected(report().metrics, checks)
    assert psnr.status == "rejected" and psnr.value is None and "A > H" in psnr.reason and sync.status == "not_measured"
    text = markdown(report(metrics=(psnr, sync), sanity=tuple(checks)))
    assert "**rejected** (sanity ranking: A > H does not hold)" in text and "32" not in text.split("## Items")[0].split("## Sanity")[0]


def test_what_no_order_exists_for_is_marked_where_there_was_a_ranking():
    checks = (Check(metric="psnr", needs="A > H", ok=True), Check(metric="lost", needs="A > B", ok=None))
    lines = markdown(report(metrics=(measure(), measure("lost"), measure("lab_L")), sanity=checks)).splitlines()
    marked = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.endswith("not ranked |")}
    assert marked == {"lost", "lab_L"} and "not ranked" not in markdown(report())


# ---------------------------------------------------------------- files


def test_json_reads_back_and_refuses_what_is_none(tmp_path):
    path, made = tmp_path / "report.json", report(gates=judge_gates(report().metrics, {"psnr": {"min": 1}}))
    write_json(made, path)
    assert read_report(path) == made and json.loads(path.read_text())["schema"] == "eval/1"
    document = json.loads(path.read_text())
    for text in ("", "[]", json.dumps({**document, "schema": "eval/0"}), json.dumps({**document, "surprise": 1})):
        path.write_text(text)
        with pytest.raises(InputError, match="report.json"):
            read_report(path)
    with pytest.raises(InputError, match="absent.json"):
        read_report(tmp_path / "absent.json")


def test_markdown_spells_out_what_is_missing_and_labels_rendered_heads():
    text = markdown(report(gates=judge_gates(report().metrics, {"psnr": {"min": 33}})))
    assert "**not measured** (needs syncnet_v2.pth)" in text and "**FAIL**" in text
    headings = [line for line in text.splitlines() if line.startswith(("# ", "## Measures", "## Items"))]
    assert len(headings) == 3 and all("synthetic suite" in line for line in headings)
    assert "synthetic suite" not in markdown(report(origin=Origin(name="user")))


def test_published_rows_stand_apart_and_are_whole():
    text = markdown(report())
    ours, theirs = text.split("## Published by others")
    assert "45.2" in theirs and "| 3.00 |" in theirs and "arXiv 2512.04677 v5" in theirs and "Ditto" not in ours
    for table in yaml.safe_load(PUBLISHED.read_text()):
        assert {"heading", "source", "kinds", "columns", "rows"} <= set(table) <= {"heading", "source", "kinds", "columns", "rows", "note"}
        assert all(len(row) == len(table["columns"]) for row in table["rows"].values()), table["heading"]


def test_stability_and_sync_never_stand_alone():
    lonely = markdown(report(metrics=(measure("warp_error", 0.1), measure("r0", 0.5))))
    assert "frozen face" in lonely and "mean shape" in lonely
    together = markdown(report(metrics=(measure("warp_error", 0.1), measure("motion_speech", 1.0), measure("r0", 0.5), measure("closure", 0.9))))
    assert "frozen face" not in together and "mean shape" not in together


def test_a_judge_that_is_the_driver_is_called_circular():
    system = System(name="ours", driver="whisper", driver_sha256="d" * 64)
    assert "circular" in markdown(report(system=system, metrics=(measure(weights_sha256="d" * 64),)))
    assert "circular" in markdown(report(system=system, metrics=(measure(weights_sha256=f"{'e' * 64}+{'d' * 64}"),)))
    assert "circular" not in markdown(report(system=system, metrics=(measure(weights_sha256="e" * 64), measure("plain"))))
    assert "circular" not in markdown(report(metrics=(measure(weights_sha256="e" * 64), measure("plain"))))


# ---------------------------------------------------------------- comparison


def test_comparison_is_paired_by_item():
    a, b = report((30.0, 40.0, 50.0)), report((31.0, 41.2, 50.9))
    psnr, sync = compare(a, b)
    assert psnr.value == pytest.approx(1.0333, abs=1e-3) and psnr.verdict == "better" and psnr.n == 3 and psnr.interval[0] > 0.8
    assert sync.verdict == "not comparable" and "not measured" in sync.reason
    assert compare(b, a)[0].verdict == "worse" and compare(a, a)[0].verdict == "same"
    assert compare(a, report((20.0, 45.0, 50.1)))[0].verdict == "same"  # the interval holds 0
    assert "| psnr |" in comparison(a, b, compare(a, b)) and "better" in comparison(a, b, compare(a, b))


def test_one_value_each_is_compared_by_its_own_interval_or_says_that_there_is_none():
    """A trace and a single video have no items to draw from."""
    one, two = (report((), kind="trace", metrics=(measure("rtf", v, interval=(v - 3, v + 3)), measure("fps", v))) for v in (10.0, 15.0))
    rtf, fps = compare(one, two)
    assert rtf.interval == pytest.approx((5 - 18**0.5, 5 + 18**0.5)) and rtf.verdict == "better" and "independently" in rtf.reason
    assert fps.interval is None and fps.verdict == "differs" and fps.reason == "no interval: one value each"
    assert compare(one, dataclasses.replace(two, metrics=(measure("rtf", 13.0, interval=(10.0, 16.0)),)))[0].verdict == "same"
    single = [report((v,), kind="video", metrics=(measure(value=v, interval=(v - 1, v + 1)),)) for v in (30.0, 35.0)]
    assert compare(*single)[0].verdict == "better" and compare(*single)[0].n == 1


def test_streams_are_compared_window_by_window():
    def stream(shift: float) -> Report:
        windows = [{"start": 10.0 * k, "id_dlib": 0.3 + 0.1 * k + shift, "r0": "not measured"} for k in range(4)]
        return report((), kind="drift", details={"windows": windows}, metrics=(measure("id_dlib", windows[0]["id_dlib"], better="lower"),
                                                                              measure("id_dlib.slope", 1.0, interval=(0.0, 2.0))))  # fmt: skip

    found, slope = compare(stream(0.0), stream(0.05))
    assert found.value == pytest.approx(0.05) and found.interval == pytest.approx((0.05, 0.05)) and (found.n, found.verdict) == (4, "worse")
    assert found.reason == "mean over 4 windows" and slope.verdict == "same"


def test_lower_is_better_where_it_is_and_a_target_only_differs():
    for better, verdict in (("lower", "worse"), ("target", "differs")):
        a, b = (report(values) for values in ((1.0, 2.0), (2.0, 3.0)))
        a, b = (dataclasses.replace(r, metrics=tuple(dataclasses.replace(m, better=better) for m in r.metrics)) for r in (a, b))
        assert compare(a, b)[0].verdict == verdict


def test_other_suites_and_other_weights_are_not_compared():
    with pytest.raises(InputError, match="same suite"):
        compare(report(), report(suite="b" * 64))
    other = report()
    other = dataclasses.replace(other, metrics=tuple(dataclasses.replace(m, backend="theirs") for m in other.metrics))
    assert compare(report(), other)[0].verdict == "not comparable"
