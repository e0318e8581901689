"""A report for people: Markdown with every missing value spelled out, and published figures kept apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from liveavatar.evaluation.report import Check, Difference, Gate, Item, Measure, Report, number

PUBLISHED = Path(__file__).parent / "published.yaml"
SYNTHETIC = "synthetic suite"
STEADY = ("warp_error", "idle_var_face", "idle_var_background", "jerk", "flicker_mae", "tLPIPS")  # a frozen face is best at these
SYNCED = ("peak", "r0", "conf", "sync_index", "Sync-C", "Sync-D")  # a mouth of mean shape correlates too
ARROWS = {"higher": "up", "lower": "down", "target": "target"}


def markdown(report: Report) -> str:
    """report.md: summary, measures, gates, sanity, items, limits, published rows, how it was made."""
    label = f" ({SYNTHETIC})" if report.origin.synthetic else ""
    parts = [
        [f"# {report.system.name} on {report.origin.name}{label}", "", *_summary(report)],
        [f"## Measures{label}", "", *_measures(report), *_plots(report)],
        [f"## By kind of item{label}", *_groups(report.details.get("groups", {}))] if report.details.get("groups") else [],
        ["## Gates", "", *_gates(report.gates)] if report.gates else [],
        ["## Sanity ranking of the measures", "", *sanity_table(report.sanity)] if report.sanity else [],
        [f"## Items{label}", "", *_items(report.items)] if report.items else [],
        _limits(report),
        _published(report.kind),
        ["## How this was made", "", *_made(report)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def comparison(a: Report, b: Report, differences: Sequence[Difference]) -> str:
    """Two reports side by side."""
    label = f" ({SYNTHETIC})" if a.origin.synthetic else ""
    rows = [[d.name, d.a, d.b, _step(d), str(d.n), d.verdict + (f": {d.reason}" if d.reason else "")] for d in differences]
    head = [f"# B {b.system.name} against A {a.system.name} on {a.origin.name}{label}", "",
            f"B - A with 95 % intervals: over items or windows that both have, else as each row says. A: {a.date}. B: {b.date}.", ""]
    return "\n".join([*head, *table(["measure", "A", "B", "B - A", "pairs", "B is"], rows)]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


def _step(d: Difference) -> str:
    if d.value is None:
        return "-"
    spread = "no interval" if d.interval is None else f"{number(d.interval[0])} to {number(d.interval[1])}"
    return f"{d.value:+.4g} {d.unit} ({spread})".replace("  ", " ")


# ---------------------------------------------------------------- parts


def _summary(report: Report) -> list[str]:
    judged, met = [g for g in report.gates if g.ok is not None], [g for g in report.gates if g.ok]
    missing = [m for m in report.metrics if not m.measured]
    items = f"{len(report.items)} item{'' if len(report.items) == 1 else 's'}"
    lines = [f"{len(report.metrics) - len(missing)} measures taken, {len(missing)} not; {items} judged."]
    if report.gates:
        unjudged = len(report.gates) - len(judged)
        lines.append(f"Gates: {len(met)} met, {len(judged) - len(met)} FAILED, {unjudged} could not be judged.")
    if report.origin.synthetic:
        lines.append("All numbers come from rendered heads and never stand beside results on photographed people.")
    return lines


def _measures(report: Report) -> list[str]:
    """The table; below it, by reason, what is not in it."""
    shown = [m for m in report.metrics if m.status != "not_measured"]
    if report.kind == "drift":
        return [*_drift(report), *_why(report, shown)]
    rows = [[m.name, *_value(m), m.unit, ARROWS[m.better], str(m.n) if m.measured else "-", _by(m, report)] for m in shown]
    lines = table(["measure", "value", "95 % interval", "unit", "better", "n", "by"], rows) if rows else ["None."]
    return [*lines, *_why(report, shown)]


def _drift(report: Report) -> list[str]:
    """One row for each measure of the windows: the first one's value, the largest change from it, and the trend."""
    by_name = {m.name: m for m in report.metrics}
    rows = []
    for name, first in by_name.items():
        if first.status != "not_measured" and not name.endswith((".change", ".slope")):
            change, slope = by_name.get(f"{name}.change"), by_name.get(f"{name}.slope")
            where = change.reason.removeprefix("largest at ") if change else "-"
            rows.append([name, str(first), _bare(change), where, _bare(slope), str(first.n), _by(first, report)])
    return table(["measure", "first window", "largest change", "at", "slope per 1000 s", "n", "by"], rows)


def _bare(measure: Measure | None) -> str:
    """A value with its interval, without the unit that stands in the same row."""
    return "-" if measure is None or not measure.measured else str(replace(measure, unit=""))


def _why(report: Report, shown: Sequence[Measure]) -> list[str]:
    """Remarks on what was measured, and the reasons for what was not, each once."""
    shown = [m for m in shown if not (report.kind == "drift" and m.name.endswith(".change"))]
    notes = [f"- {names}: {reason}" for reason, names in _by_reason(m for m in shown if m.measured and m.reason)]
    missing = [[names, f"**not measured** ({reason})"] for reason, names in _by_reason(m for m in report.metrics if m.status == "not_measured")]
    return [*(["", *notes] if notes else []), *(["", *table(["measure", "why there is none"], missing)] if missing else [])]


def _by_reason(measures: Iterable[Measure]) -> list[tuple[str, str]]:
    """(reason, names that share it), in order of first appearance."""
    reasons: dict[str, list[str]] = {}
    for m in measures:
        reasons.setdefault(m.reason, []).append(m.name)
    return [(reason, _listed(names)) for reason, names in reasons.items()]


def _listed(names: Sequence[str]) -> str:
    return "every slope" if len(names) > 3 and all(name.endswith(".slope") for name in names) else ", ".join(names)


def _value(measure: Measure) -> tuple[str, str]:
    if not measure.measured:
        return f"**{measure.status}** ({measure.reason})", "-"
    interval = measure.interval
    return number(measure.value), "-" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def _by(measure: Measure, report: Report) -> str:
    judges, drivers = ((sha or "").split("+") for sha in (measure.weights_sha256, report.system.driver_sha256))
    weights = f" ({'+'.join(sha[:12] for sha in judges)})" if measure.weights_sha256 else ""
    circular = measure.weights_sha256 and not set(judges).isdisjoint(drivers)
    unranked = report.sanity and measure.name not in {check.metric for check in report.sanity if check.ok is not None}
    remarks = f"{', circular: the judge is the driver' if circular else ''}{', not ranked' if unranked else ''}"
    return f"{measure.backend or '-'}{weights}{remarks}"


def _plots(report: Report) -> list[str]:
    return ["", *(f"![{Path(name).stem}]({name})" for name in report.plots)] if report.plots else []


def _groups(groups: dict[str, dict[str, dict]]) -> list[str]:
    """A table for every sort of item: means, no intervals: groups are small."""
    lines = []
    for sort, kinds in groups.items():
        names = list(next(iter(kinds.values())))
        rows = [[kind, *("-" if found[name] is None else number(found[name]) for name in names)] for kind, found in kinds.items()]
        lines += ["", *table([sort, *names], rows)]
    return lines


def _gates(gates: Sequence[Gate]) -> list[str]:
    verdict = {True: "pass", False: "**FAIL**", None: "not judged"}
    rows = [[g.name, g.demand, g.reason if g.value is None else number(g.value), verdict[g.ok]] for g in gates]
    return table(["measure", "wanted", "value", "verdict"], rows)


def sanity_table(checks: Sequence[Check]) -> list[str]:
    """Lines of the ranking's table."""
    verdict = {True: "holds", False: "**does not hold: rejected**", None: "not judged"}
    return table(["measure", "must rank", "verdict", "found"], [[c.metric, c.needs, verdict[c.ok], c.detail] for c in checks])


def _items(items: Sequence[Item]) -> list[str]:
    columns = list(dict.fromkeys(key for item in items for key in item.picture))
    rows = [[item.id, *(_plain(item.picture.get(c, "-")) for c in columns), item.sha256[:12] or "-"] for item in items]
    return table(["item", *columns, "sha256"], rows)


def _plain(value) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _limits(report: Report) -> list[str]:
    names = {m.name for m in report.metrics if m.measured}
    lines = [*report.exclusions, *report.limits]
    if names & set(STEADY) and not any(n.startswith("motion_") for n in names):
        lines.append("Stability stands here without motion energy: a frozen face is perfectly stable.")
    if names & set(SYNCED) and not any(n.startswith("closure") for n in names):
        lines.append("Sync stands here without closure: a mouth of mean shape correlates too.")
    return ["## Exclusions and limits", "", *(f"- {line}" for line in lines)] if lines else []


def _published(kind: str) -> list[str]:
    """Other people's figures, under their own heading; never a column beside ours."""
    quoted = yaml.load(PUBLISHED.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # as text: 3.00 is not 3
    tables = [t for t in quoted if kind in t["kinds"]]
    if not tables:
        return []
    lines = ["## Published by others", "", "Quoted, not measured here: other test sets, crops and machines. No column compares with ours."]
    for entry in tables:
        rows = [[name, *("-" if v == "null" else v for v in values)] for name, values in entry["rows"].items()]
        lines += ["", f"### {entry['heading']}", "", f"Source: {entry['source']}. {entry.get('note', '')}".rstrip(), "",
                  *table(["system", *entry["columns"]], rows)]
    return lines


def _made(report: Report) -> list[str]:
    s, o = report.system, report.origin
    facts = {
        "command": f"`{report.command}`", "date": report.date, "system": f"{s.name}, engine {s.engine}, commit {s.commit}",
        "config": s.config_sha256, "weights": ", ".join(f"{name} {sha[:12]}" for name, sha in s.weights.items()),
        "driver": f"{s.driver} {(s.driver_sha256 or '')[:12]}".strip(), "judged on": f"{o.name} {o.version} sha256 {o.sha256[:12]}",
        "host": ", ".join(f"{key} {value}" for key, value in report.host.items()),
        "seeds": ", ".join(f"{key} {value}" for key, value in report.seeds.items()),
    }  # fmt: skip
    return [f"- {key}: {value}" for key, value in facts.items() if value]
