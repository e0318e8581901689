"""Alert rules and the dashboard name what is exported and nothing else; promtool plays a case of every alert (serving.md 16, MET-1)."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")

from liveavatar.serving import dashboard
from liveavatar.serving.metrics import PREFIX, TABLE

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
SPEC = {"NoFrames", "OutputDown", "OutputStalled", "DeadAir", "RealtimeFactorLow", "AvDrift", "SlowBargeIn", "EngineFlapping", "QueueSaturated",
        "FrozenOrBlack", "IdentityDrift", "MemoryGrowth", "GpuFault", "ProvenanceBroken", "AuthAttack", "CapacityFull", "ConsentExpiring",
        "CertExpiring", "DiskLow"}  # fmt: skip
SERIES = {PREFIX + row.name + end for row in TABLE.values() for end in (("_bucket", "_sum", "_count") if row.kind == "histogram" else ("",))}
NOT_NAMES = {"and", "or", "unless", "on", "ignoring", "by", "without", "group_left", "group_right", "offset", "bool", "inf", "nan"}


def names(query: str) -> set[str]:
    """The metrics a PromQL expression asks for: its words, without functions, keywords, selectors, label lists, texts and times."""
    query = re.sub(r'"[^"]*"', "", query)
    query = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", query)
    return {word for word in re.findall(r"(?<![\w.$])[A-Za-z_:][\w:]*(?!\s*\()(?!\w)", query) if word.lower() not in NOT_NAMES}


def run_promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict]:
    groups = yaml.safe_load((dashboard.HERE / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict]:
    return json.loads((dashboard.HERE / "dashboard.json").read_text(encoding="utf-8"))["panels"]


def test_names_are_found_in_promql():
    assert names('sum by (le, x_y) (rate(a_total{b="c"}[5m] offset 1h)) / on(z) group_left(q) c:d_ratio > 1e6 and time() - f == 0') == {
        "a_total", "c:d_ratio", "f"}  # fmt: skip


# ---------------------------------------------------------------- alerts


@promtool
def test_rules_are_valid_and_every_case_comes_out_as_written():
    run_promtool("check", "rules", str(dashboard.HERE / "alerts.yml"))
    run_promtool("test", "rules", str(dashboard.HERE / "alerts_test.yml"))


def test_every_alert_of_the_spec_is_there_asks_for_what_exists_and_has_a_case():
    assert {rule["alert"] for rule in rules()} == SPEC
    cases = [case for test in yaml.safe_load((dashboard.HERE / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
             for case in test["alert_rule_test"]]  # fmt: skip
    fired = {(case["alertname"], alert["exp_labels"]["severity"]) for case in cases for alert in case["exp_alerts"]}
    assert fired == {(rule["alert"], rule["labels"]["severity"]) for rule in rules()}
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == SPEC  # silent while all is well
    for rule in rules():
        assert names(rule["expr"]) and names(rule["expr"]) <= SERIES, rule["alert"]
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) - {"instance"}
        known = {label for row in TABLE.values() for label in row.labels if PREFIX + row.name in rule["expr"]}
        assert used <= known, rule["alert"]


def test_label_values_in_rules_are_values_that_exist():
    for rule in rules():
        for name, label, value in re.findall(r'liveavatar_(\w+)\{(\w+)=~?"([^"]+)"', rule["expr"].replace("!", "")):
            assert set(value.split("|")) <= set(TABLE[name].labels[label]), rule["alert"]


# ---------------------------------------------------------------- dashboard


def test_the_dashboard_is_what_the_code_makes_and_shows_the_whole_table():
    assert (dashboard.HERE / "dashboard.json").read_text(encoding="utf-8") == dashboard.text(), "run: python -m liveavatar.serving.dashboard"
    asked = set().union(*(names(target["expr"]) for panel in panels() for target in panel.get("targets", ())))
    assert asked <= SERIES
    assert {PREFIX + row.name for row in TABLE.values()} == {name.removesuffix("_bucket") for name in asked}


def test_the_dashboard_has_what_an_import_needs():
    """Unique ids, panels inside the grid that do not overlap, a variable for the data source and no data source of ours."""
    board = json.loads((dashboard.HERE / "dashboard.json").read_text(encoding="utf-8"))
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert board["uid"] and len(board["uid"]) <= 40 and board["title"] and board["schemaVersion"] >= 36 and "id" not in board
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert cells and not cells & taken and all(0 <= x < 24 for x, _ in cells), panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}" and "defaults" in panel["fieldConfig"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs) and all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@promtool
def test_every_expression_of_the_dashboard_parses(tmp_path):
    """By Prometheus itself: each becomes a recording rule, Grafana's variables filled in as Grafana does."""
    queries = [target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*") for panel in panels() for target in panel.get("targets", ())]
    made = {"groups": [{"name": "dashboard", "rules": [{"record": f"panel:{n}", "expr": query} for n, query in enumerate(queries)]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(made), encoding="utf-8")
    run_promtool("check", "rules", str(tmp_path / "rules.yml"))
