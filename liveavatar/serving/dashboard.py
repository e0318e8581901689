"""The Grafana dashboard and the documentation of the metrics, made of code so that they cannot name what is not there.

`python -m liveavatar.serving.dashboard` writes monitoring/dashboard.json and the table of docs/monitoring.md anew; tests
hold both to what this file makes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from liveavatar.serving.metrics import PREFIX, TABLE, Metric

HERE = Path(__file__).parent / "monitoring"
DOCUMENT = Path(__file__).parents[2] / "docs" / "monitoring.md"
BEGIN, END = "<!-- table: made by python -m liveavatar.serving.dashboard -->", "<!-- end of table -->"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 7
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """queries: legend -> PromQL in which ~name is a metric of ours and $only its selector's part. unit: Grafana's."""

    title: str
    unit: str
    queries: dict[str, str]
    width: int = 8
    kind: str = "timeseries"
    limits: tuple[float, ...] = ()  # from the first on yellow, from the second on red
    low_is_bad: bool = False


def rate(name: str, by: str) -> str:
    return f"sum by ({by}) (rate(~{name}{{$only}}{RATE}))"


def share(name: str, by: str, part: float = 0.95) -> str:
    """A percentile of a histogram."""
    inner = ", ".join(filter(None, (by, "le")))
    return f"histogram_quantile({part}, sum by ({inner}) (rate(~{name}_bucket{{$only}}{RATE})))"


def level(name: str, by: str, join: str = "max") -> str:
    return f"{join} by ({by}) (~{name}{{$only}})" if by else f"{join}(~{name}{{$only}})"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        Panel("Engine", "bool_on_off", {"group {{group}}": level("engine_up", "group", "min")}, 4, "stat", (1,), True),
        Panel("Real-time factor", "none", {"group {{group}}": level("realtime_factor", "group", "min")}, 4, "stat", (1.0, 1.05), True),
        Panel("Sessions", "none", {"active": level("sessions_active", "", "sum"), "capacity": level("sessions_capacity", "", "sum")}, 4, "stat"),
        Panel("Viewers", "none", {"{{sink}}": level("viewers_active", "sink", "sum")}, 4, "stat"),
        Panel("Degradation", "none", {"step": level("degradation_step", "")}, 4, "stat", (1, 3)),
        Panel("Version", "none", {"{{version}} {{commit}}": level("build_info", "version, commit"), "draining": level("draining", "")}, 4, "stat"),
    ),
    "Stream": (
        Panel("Pictures sent", "fps", {"{{sink}}": rate("frames_sent_total", "sink"), "made": rate("frames_generated_total", "engine")}),
        Panel("Late, repeated, dropped", "fps", {"late {{sink}}": rate("frames_late_total", "sink"), "old picture: {{reason}}": rate(
            "frames_repeated_total", "reason"), "dropped at {{edge}}": rate("frames_dropped_total", "edge")}),
        Panel("Between pictures (p99)", "s", {"{{sink}}": share("frame_interval_seconds", "sink", 0.99)}, limits=(0.06, 0.08)),
        Panel("Sound after picture", "s", {"p95 {{sink}}": share("av_offset_seconds", "sink"), "p5 {{sink}}": share("av_offset_seconds", "sink", 0.05),
                                           "drift {{sink}}": level("av_drift_seconds", "sink")}, limits=(0.03, 0.045)),
        Panel("Filler", "percentunit", {"{{output}} {{reason}}": rate("filler_seconds_total", "output, reason"),
                                        "now {{output}} {{reason}}": level("filler_active", "output, reason")}),
        Panel("Picture", "percentunit", {"brightness {{output}}": level("frame_luma_mean", "output"), "change {{output}}": level("frame_change_ratio", "output"),
                                         "likeness {{output}}": level("identity_similarity", "output"),
                                         "likeness asked for": level("identity_similarity_floor", "")}),
    ),
    "Conversation": (
        Panel("Speech to picture", "s", {"p50": share("first_frame_seconds", "", 0.5), "p95": share("first_frame_seconds", "")}),
        Panel("Interruption to silence (p95)", "s", {"{{sink}}": share("time_to_silence_seconds", "sink")}, limits=(0.2, 0.25)),
        Panel("Interruptions", "cps", {"{{reason}}": rate("interrupts_total", "reason"), "stale at {{edge}}": rate("stale_epoch_drops_total", "edge")}),
        Panel("Opening a session (p95)", "s", {"{{engine}}": share("session_create_seconds", "engine")}),
        Panel("Sessions", "cps", {"opened {{mode}}": rate("sessions_created_total", "mode"), "refused: {{reason}}": rate("sessions_rejected_total", "reason"),
                                  "over: {{reason}}": rate("sessions_ended_total", "reason")}),
        Panel("Speech", "s", {"waiting": level("audio_buffered_seconds", "group"), "missing (per s)": rate("audio_underruns_total", "mode")}),
    ),
    "Engine": (
        Panel("A block, by stage (p95)", "s", {"{{stage}}": share("block_seconds", "stage")}, 12),
        Panel("Real-time factor", "none", {"group {{group}}": level("realtime_factor", "group", "min")}, 12, limits=(1.0, 1.05), low_is_bad=True),
        Panel("Encoding and sending (p95)", "s", {"encode {{codec}}": share("encode_seconds", "codec"), "send {{sink}}": share("send_seconds", "sink")}),
        Panel("Queues", "percentunit", {"{{edge}}": "max by (edge) (~queue_depth{$only} / on (edge, instance) ~queue_capacity{$only})"}, limits=(0.7, 0.9)),
        Panel("Restarts", "none", {"{{group}} {{reason}}": "sum by (group, reason) (increase(~engine_restarts_total{$only}[15m]))",
                                   "seconds to restore (p95)": share("engine_restore_seconds", ""), "clocks set anew: {{reason}}":
                                       "sum by (reason) (increase(~clock_reanchors_total{$only}[15m]))"}),
        Panel("Since the last block", "s", {"group {{group}}": "max by (group) (time() - ~engine_last_progress_timestamp_seconds{$only})"}),
        Panel("GPU", "percentunit", {"GPU {{gpu}}": level("gpu_utilization_ratio", "gpu")}),
        Panel("GPU memory", "bytes", {"GPU {{gpu}}": level("gpu_memory_used_bytes", "gpu"), "tensors of {{process}}": level("rank_gpu_bytes", "process")}),
        Panel("GPU heat, power and faults", "none", {"°C {{gpu}}": level("gpu_temperature_celsius", "gpu"), "W {{gpu}}": level("gpu_power_watts", "gpu"),
                                                     "Xid {{gpu}}": "increase(~gpu_xid_errors_total{$only}[15m])"}, 12, limits=(85,)),
        Panel("This process", "none", {"tasks": level("process_open_tasks", "process"), "late loop, ms (p99)":
                                       f"1000 * {share('event_loop_lag_seconds', '', 0.99)}"}, 12),
    ),
    "Destinations and viewers": (
        Panel("Destinations", "bool_on_off", {"{{output}}": level("output_up", "output", "min")}, 6, "stat", (1,), True),
        Panel("Bit rate", "bps", {"{{output}}": f"8 * {rate('output_bytes_total', 'output')}"}, 6),
        Panel("Since a destination took a packet", "s", {"{{output}}": "max by (output) (time() - ~output_last_progress_timestamp_seconds{$only})"}, 6,
              limits=(5, 10)),
        Panel("Connections made again", "none", {"{{output}}": "sum by (output) (increase(~output_reconnects_total{$only}[15m]))",
                                                 "recordings: {{reason}}": "sum by (reason) (increase(~recording_errors_total{$only}[15m]))"}, 6),
        Panel("Viewers' round trip, jitter buffer and sound after picture (p95)", "s", {"round trip": share("webrtc_rtt_seconds", ""),
              "jitter buffer": share("webrtc_jitter_buffer_seconds", ""), "sound after picture": share("webrtc_av_offset_seconds", "")}, 12),
        Panel("Viewers' trouble", "cps", {"freezes": rate("webrtc_freezes_total", "sink"), "lost packets": rate("webrtc_packets_lost_total", "sink"),
                                          "key pictures asked for": rate("webrtc_pli_total", "sink")}, 12),
    ),
    "Safety and host": (
        Panel("Refused", "cps", {"login: {{reason}}": rate("auth_failures_total", "reason"), "limit: {{reason}}": rate("rate_limited_total", "reason"),
                                 "address: {{reason}}": rate("ssrf_blocked_total", "reason"), "file: {{reason}}": rate("uploads_rejected_total", "reason")}),
        Panel("Marks", "percentunit", {"read back {{output}}": level("watermark_selfcheck_ratio", "output", "min"),
                                       "failed: {{reason}}": rate("provenance_errors_total", "reason")}),
        Panel("Webhooks", "cps", {"{{outcome}}": rate("webhook_deliveries_total", "outcome")}),
        Panel("Memory", "bytes", {"{{process}}": level("process_resident_bytes", "process")}),
        Panel("Disk free", "percentunit", {"free": level("disk_free_ratio", "", "min")}, limits=(0.1, 0.2), low_is_bad=True),
        Panel("Days left", "d", {"{{certificate}} certificate": "min by (certificate) (~certificate_expiry_timestamp_seconds{$only} - time()) / 86400",
                                 "first consent": "min(~consent_expiry_timestamp_seconds{$only} - time()) / 86400"}, limits=(3, 14), low_is_bad=True),
    ),
}  # fmt: skip


def expression(query: str) -> str:
    """PromQL of a query of ROWS."""
    return query.replace("~", PREFIX).replace("$only", 'instance=~"$instance"')


def build() -> dict:
    """The dashboard, as Grafana imports it."""
    panels, y = [], 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})  # fmt: skip
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + HEIGHT
            panels.append(_panel(panel, len(panels) + 1, x, y))
            x += panel.width
        y += HEIGHT
    return {"uid": "liveavatar", "title": "liveavatar", "tags": ["liveavatar"], "schemaVersion": 39, "version": 1, "editable": True,
            "timezone": "browser", "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "graphTooltip": 1, "links": [],
            "annotations": {"list": []}, "templating": {"list": _variables()}, "panels": panels}  # fmt: skip


def text() -> str:
    """build() as the file holds it, a panel a line."""
    rest = build()
    panels = ",\n  ".join(json.dumps(panel, ensure_ascii=False) for panel in rest.pop("panels"))
    return json.dumps(rest, indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "panels": [\n  {panels}\n ]\n}}\n'


def _variables() -> list[dict]:
    instances = f"label_values({PREFIX}build_info, instance)"
    return [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0, "refresh": 1, "regex": "",
             "multi": False, "includeAll": False, "options": [], "current": {}},
            {"name": "instance", "label": "Server", "type": "query", "datasource": SOURCE,
             "query": {"query": instances, "refId": "instances"}, "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*", "hide": 0,
             "regex": "", "sort": 1, "options": [], "current": {"text": "All", "value": "$__all"}}]  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int) -> dict:
    targets = [{"refId": chr(ord("A") + n), "datasource": SOURCE, "editorMode": "code", "range": True, "legendFormat": legend, "expr": expression(query)}
               for n, (legend, query) in enumerate(panel.queries.items())]  # fmt: skip
    options = ({"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value", "graphMode": "area", "textMode": "auto"}
               if panel.kind == "stat" else {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                                             "tooltip": {"mode": "multi", "sort": "desc"}})  # fmt: skip
    names = ", ".join(sorted({name for name in TABLE if any("~" + name in query for query in panel.queries.values())}))
    return {"id": number, "type": panel.kind, "title": panel.title, "description": names, "datasource": SOURCE, "targets": targets, "options": options,
            "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT}, "fieldConfig": {"defaults": _defaults(panel), "overrides": []}}  # fmt: skip


def _defaults(panel: Panel) -> dict:
    """Unit and colours."""
    colours = ("red", "orange", "green") if panel.low_is_bad and len(panel.limits) > 1 else ("red", "green") if panel.low_is_bad else (
        "green", "orange", "red") if len(panel.limits) > 1 else ("green", "red")
    steps = [{"color": colour, "value": value} for colour, value in zip(colours, (None, *panel.limits))]
    lines = {"custom": {"thresholdsStyle": {"mode": "line" if panel.limits else "off"}, "fillOpacity": 8}} if panel.kind == "timeseries" else {}
    return {"unit": panel.unit, "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
            "thresholds": {"mode": "absolute", "steps": steps}, "mappings": [], **lines}  # fmt: skip


# ---------------------------------------------------------------- documentation


def table() -> str:
    """TABLE as Markdown."""
    return "\n".join(("| Name | Type | Labels | What it tells |", "|---|---|---|---|", *(_line(row) for row in TABLE.values())))


def _line(row: Metric) -> str:
    labels = "; ".join(f"`{label}`" + (f": {', '.join(values)}" if values else "") for label, values in row.labels.items()) or "-"
    return f"| `{PREFIX}{row.name}` | {row.kind} | {labels} | {row.help} |"


def document(page: str) -> str:
    """docs/monitoring.md with the table as it is now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the dashboard and the table."""
    (HERE / "dashboard.json").write_text(text(), encoding="utf-8")
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
