"""What a chain will do on given devices: seconds per role from FLOPs or a measurement, the rest from the simulation.

Where nothing was measured a role takes max(arithmetic / (peak x share), bytes of weights / bandwidth). The shares of a GPU's stated
peak are assumptions, and a forecast prints them: SHARE of bf16 arithmetic, passes over memory included, is this project's target of
195 ms on an H200 (a matmul alone reaches .8 of it, model.md section 18); FP8_SHARE is less, as only products are faster in FP8
and the passes between them are not (141 ms, added up in bench/LOG.md); DECODE_SHARE is the target of 80 ms for the VAE.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from rich.box import SIMPLE
from rich.table import Table

from liveavatar.conditioning.audio_features import WAV2VEC_LOOKAHEAD
from liveavatar.config import Config, FastConfig, build
from liveavatar.core import FPS, ConfigError, Geometry, InputError
from liveavatar.models.s2v import S2VConfig
from liveavatar.runtime.placement import WAN_VAE, Device, Plan, attention_flops, cut, decode_flops, linear_flops, plan, steps_of, transformer_bytes
from liveavatar.runtime.simulation import Costs, Simulation, turn_seconds
from liveavatar.runtime.sources import REFRESH_BLOCK

SHARE = 0.64
FP8_SHARE = 0.54  # in FP8 linears
DECODE_SHARE = 0.35  # in the VAE's convolutions
HOP_SECONDS = 50e-6  # of a send and a receive, whatever their size
BLOCKS = 80  # simulated for a rate
LIVE_SECONDS = 40.0  # simulated for real time
SHAPES = {"14b": S2VConfig(), "30b": (6656, 48, 17920), "100b": (10240, 68, 27648)}


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A row of devices.yaml; see there for the units."""

    memory: float
    bf16: float
    fp8: float | None
    bandwidth: float
    link: float
    watts: float
    idle_watts: float
    price: float


@lru_cache(maxsize=1)
def accelerators() -> dict[str, Accelerator]:
    """The table, by name."""
    text = (Path(__file__).parent / "devices.yaml").read_text(encoding="utf-8")
    return {name: build(Accelerator, row, f"devices.yaml {name}") for name, row in yaml.safe_load(text).items()}


def accelerator(name: str) -> Accelerator:
    """By name, in any case. Raises ConfigError listing those there are."""
    found = {known.lower(): row for known, row in accelerators().items()}.get(name.lower())
    if found is None:
        raise ConfigError(f"device {name!r}: known are {', '.join(accelerators())}; for another give --memory and --tflops")
    return found


def model_shape(name: str) -> S2VConfig:
    """14b (the official one), 30b, 100b, or WIDTHxLAYERS: the same architecture in another size. Raises ConfigError."""
    shape = SHAPES.get(name.lower())
    if isinstance(shape, S2VConfig):
        return shape
    if shape is None:
        match = re.fullmatch(r"(\d+)x(\d+)", name)
        if match is None or int(match[1]) % 128 or not int(match[1]) or not int(match[2]):
            raise ConfigError(f"model {name!r}: say {', '.join(SHAPES)}, or WIDTHxLAYERS with a width that is a multiple of 128")
        shape = int(match[1]), int(match[2]), round(2.7 * int(match[1]) / 128) * 128
    dim, layers, ffn = shape
    inject = tuple(sorted({round(k * (layers - 1) / 11) for k in range(12)}))  # as often as in the official one
    return replace(S2VConfig(), dim=dim, ffn_dim=ffn, num_heads=dim // 128, num_layers=layers, audio_inject_layers=inject)


# ---------------------------------------------------------------- seconds


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How fast one rank works. precision: "bf16" or "fp8", of the linear layers. measured: seconds per role, or per kind ("step",
    "decode", "condition"), wins."""

    device: Accelerator
    precision: str = "bf16"
    measured: Mapping[str, float] | None = None

    @property
    def fp8(self) -> bool:
        return self.precision == "fp8"

    def costs(self, model: S2VConfig, geometry: Geometry, vae: Mapping, chain: Iterable[str], batch: int) -> Costs:
        """Of every role of the chain; batch: the most blocks in one forward. Raises ConfigError for fp8 where the device has none."""
        if self.fp8 and self.device.fp8 is None:
            raise ConfigError("this device has no FP8 units: say --precision bf16")
        linear, attention = linear_flops(model, geometry), attention_flops(model, geometry)
        slow = self.device.bf16 * 1e12 * SHARE
        fast = self.device.fp8 * 1e12 * FP8_SHARE if self.fp8 else slow
        weights = transformer_bytes(model, torch.bfloat16, self.fp8) / (self.device.bandwidth * 1e12)
        work = linear / fast + attention / slow
        decode = decode_flops(vae, geometry) / (self.device.bf16 * 1e12 * DECODE_SHARE)
        seconds = {"condition": 0.0, "step": max(work, weights), "decode": decode, **(self.measured or {})}
        g, latents, features = geometry, 2 * model.in_dim * geometry.block_latents, 4 * model.audio_layers * model.audio_dim
        size = latents * g.latent_height * g.latent_width + features * g.frames_per_block  # bytes of a block: bf16 and fp32
        return Costs(
            roles={role: seconds.get(role, seconds.get(role.rstrip("0123456789"))) for role in chain},
            hop=HOP_SECONDS + size / (self.device.link * 1e9), refresh=linear / fast * geometry.sink_tokens / geometry.block_tokens,
            batch=tuple(max(n * work, weights) / max(work, weights) for n in range(1, batch + 1)),
        )  # fmt: skip


def read_measured(paths: Iterable[Path], fast: FastConfig, geometry: Geometry) -> dict[str, float]:
    """Seconds per role from files of bench/step.py and bench/decode.py, or of {"roles": {"step": 0.19, ...}}. Of a bench's rows those are taken
    that ran with the options `fast` at this size; "fast" of a row: options of FastConfig that bear on it. Raises InputError."""
    found: dict[str, float] = {}
    for path in paths:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: no measurement: {error}") from None
        value = value if isinstance(value, dict) else {}
        roles = value.get("roles") or _roles_of([row for row in value.get("rows", []) if "role" in row and "seconds" in row], fast, geometry, path)
        if not isinstance(roles, dict) or not all(isinstance(v, (int, float)) and v >= 0 for v in roles.values()):
            raise InputError(f'{path}: "roles" must be seconds per role')
        found |= {name: float(seconds) for name, seconds in roles.items()}
    return found


def _roles_of(rows: list[dict], fast: FastConfig, geometry: Geometry, path: Path) -> dict[str, float]:
    size = f"{geometry.width}x{geometry.height}"
    if not rows:
        raise InputError(f'{path}: holds neither rows of bench/step.py or bench/decode.py nor "roles" with seconds per role')
    fitting = {row["role"]: row["seconds"] for row in rows if row["size"] == size and all(getattr(fast, name) == on for name, on in row["fast"].items())}
    if not fitting:
        known = "; ".join(f"{row['size']} with {_said(row['fast'])}" for row in rows)
        raise InputError(f"{path}: nothing was measured at {size} with {_said(asdict(fast))}; there is: {known}")
    return fitting


def _said(options: Mapping) -> str:
    """Options of model.fast as one would write them, but for those that say nothing new."""
    return " ".join(f"model.fast.{name}={str(on).lower()}" for name, on in options.items() if getattr(FastConfig, name) != on) or "no option"


# ---------------------------------------------------------------- forecast


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to expect. fps: of all sessions together as fast as it goes; real_time: that over 25 a session. first_frame: from a
    block's audio to its pictures. turn_voice, turn_microphone: from the first sound of an answer to its first picture, worst
    case, sound all at once or as it is spoken. busy: share of real time per rank. underrun: seconds without a fresh picture in
    LIVE_SECONDS, the first wait excluded. watt_hours, dollars: per session and minute on air."""

    plan: Plan
    devices: int
    fps: float
    real_time: float
    first_frame: float
    turn_voice: float
    turn_microphone: float
    busy: tuple[float, ...]
    bottleneck: int
    underrun: float
    watt_hours: float
    dollars: float

    @property
    def missing(self) -> float:
        """Share of the time without a fresh picture, as it is shown."""
        return round(self.underrun / LIVE_SECONDS, 3)

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        stage = "+".join(self.plan.ranks[self.bottleneck].roles)
        return [
            ("pictures per second, all sessions", f"{self.fps:.1f}"), ("real time, each session", f"{self.real_time:.2f} x"),
            ("time to first frame", f"{self.first_frame:.2f} s"), ("turn, voice faster than real time", f"{self.turn_voice:.2f} s"),
            ("turn, live microphone", f"{self.turn_microphone:.2f} s"), ("bottleneck", f"rank {self.bottleneck} ({stage})"),
            ("load at 25 pictures per second", ", ".join(f"{b:.0%}" for b in self.busy)),
            ("pictures missing", f"{self.missing:.1%} of the time{': not real time' if self.real_time < 1 else ''}" if self.missing else "none"),
            ("energy per minute on air", f"{self.watt_hours:.1f} Wh"), ("cost per minute on air", f"${self.dollars:.3f} on {self.devices} GPU(s)"),
        ]  # fmt: skip


def forecast(config: Config, model: S2VConfig, geometry: Geometry, speeds: Speeds, ranks: int, *, name: str = "GPU", vae: Mapping | None = None,
             price: float | None = None) -> Forecast:
    """Plan and simulate `ranks` devices. price: dollars per GPU and hour instead of the table's. Raises ConfigError, PlacementError."""
    vae, sessions, refresh = vae or WAN_VAE, config.runtime.sessions, config.sampler.refresh_block
    config = replace(config, model=replace(config.model, fast=replace(config.model.fast, fp8=speeds.fp8)))
    together = {"shift": config.runtime.shift_register, "batch": config.runtime.batch}
    costs = speeds.costs(model, geometry, vae, config.chain, together["batch"] * (steps_of(config.chain) if together["shift"] else 1))
    stages = cut(config.chain, ranks, costs.roles)
    devices = [Device(name=name, kind="cuda", memory=round(speeds.device.memory * 1e9))] * ranks
    planned = plan(config, model, geometry, devices, stages=stages, vae=vae, times=costs.roles)
    chain = {"lookahead": WAV2VEC_LOOKAHEAD, "refresh_block": REFRESH_BLOCK if refresh is None else refresh, **together}
    chain |= {"credits": config.runtime.in_flight, "refresh_slices": config.sampler.refresh_slices}
    pipe = Simulation(stages, costs, geometry, **chain).offline(BLOCKS // sessions + 8, sessions)
    live = Simulation(stages, costs, geometry, **chain).live(LIVE_SECONDS, sessions)
    busy = live.utilisation()
    power = sum(speeds.device.idle_watts + share * (speeds.device.watts - speeds.device.idle_watts) for share in busy)
    return Forecast(
        plan=planned, devices=ranks, fps=pipe.fps, real_time=pipe.fps / FPS / sessions, first_frame=pipe.pass_seconds,
        turn_voice=turn_seconds(stages, costs, geometry, lookahead=WAV2VEC_LOOKAHEAD, microphone=False, **together),
        turn_microphone=turn_seconds(stages, costs, geometry, lookahead=WAV2VEC_LOOKAHEAD, microphone=True, **together),
        busy=tuple(busy), bottleneck=max(range(ranks), key=lambda rank: busy[rank]),
        underrun=max(0.0, live.underrun - sessions * pipe.pass_seconds * sessions), watt_hours=power / 60 / sessions,
        dollars=(speeds.device.price if price is None else price) * ranks / 60 / sessions,
    )  # fmt: skip


def sweep(config: Config, model: S2VConfig, geometry: Geometry, speeds: Speeds, **more) -> list[Forecast]:
    """One forecast for each number of ranks the chain can be cut into."""
    return [forecast(config, model, geometry, speeds, ranks, **more) for ranks in range(1, len(config.chain) + 1)]


COLUMNS = ("GPUs", "fits", "FPS", "x real\ntime", "first\nframe", "turn,\nvoice", "turn,\nmic", "load\nby rank", "mis-\nsing", "Wh/\nmin", "$/\nmin")  # 80 wide


def table(forecasts: list[Forecast], title: str) -> Table:
    """Of one forecast all that is known; of several a row each."""
    shown = Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    if len(forecasts) == 1:
        for column in ("", f"{forecasts[0].devices} GPU(s)"):
            shown.add_column(column)
        for row in (*forecasts[0].rows(), ("fits into memory", "no" if forecasts[0].plan.problems else "yes")):
            shown.add_row(*row)
        return shown
    for column in COLUMNS:
        shown.add_column(column, no_wrap=True)
    for f in forecasts:
        shown.add_row(str(f.devices), "no" if f.plan.problems else "yes", f"{f.fps:.1f}", f"{f.real_time:.2f}", f"{f.first_frame:.2f}s",
                      f"{f.turn_voice:.2f}s", f"{f.turn_microphone:.2f}s", _runs(f"{b:.0%}" for b in f.busy),
                      f"{f.missing:.1%}", f"{f.watt_hours:.1f}", f"{f.dollars:.2f}")  # fmt: skip
    return shown


def _runs(loads: Iterable[str]) -> str:
    """Loads rank by rank, those that are alike once: 4x27% 16%."""
    runs = [(load, len(list(same))) for load, same in itertools.groupby(loads)]
    return " ".join(f"{count}x{load}" if count > 1 else load for load, count in runs)


def plot(forecasts: list[Forecast], title: str, path: Path) -> None:
    """Pictures per second and latency against the number of GPUs, as SVG or PNG by the name. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401  a backend that needs no screen
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib: pip install 'liveavatar[eval]'") from None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    rate, wait = figure.subplots(1, 2)
    gpus, fits = [f.devices for f in forecasts], [not f.plan.problems for f in forecasts]
    rate.bar(gpus, [f.fps for f in forecasts], color=["#2a6f97" if fit else "#c9ced3" for fit in fits])
    rate.axhline(FPS * forecasts[0].plan.sessions, color="#d1495b", linewidth=1, label="real time")
    rate.set(xlabel="GPUs", ylabel="pictures per second", xticks=gpus)
    for values, label, colour in (([f.first_frame for f in forecasts], "one pass", "#2a6f97"), ([f.turn_voice for f in forecasts], "turn, voice", "#66a182"),
                                  ([f.turn_microphone for f in forecasts], "turn, microphone", "#edae49")):  # fmt: skip
        wait.plot(gpus, values, marker="o", label=label, color=colour)
    wait.set(xlabel="GPUs", ylabel="seconds", xticks=gpus, ylim=(0, None))
    for axes in (rate, wait):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title + ("" if all(fits) else "  (grey: does not fit into memory)"), fontsize=10)
    figure.savefig(path, dpi=130)


def overview(forecasts: list[Forecast]) -> dict:
    """What a forecast says, for JSON."""
    numbers = [field.name for field in fields(Forecast) if field.name != "plan"]
    return {"forecasts": [{**{name: getattr(f, name) for name in numbers}, "stages": f.plan.stages, "fits": not f.plan.problems} for f in forecasts]}
