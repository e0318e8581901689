"""Check this implementation against a parity fixture: `liveavatar parity FIXTURE [--ranks N]`.

The kind of a fixture is read off its JSON, its sizes off its tensors; nothing is assumed about either. A
rollout fixture runs through the chain itself: roles, links and launcher are what a stream uses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from liveavatar.conditioning import audio_features
from liveavatar.conditioning.identity import output_size
from liveavatar.config import Config, ModelConfig, RuntimeConfig, SamplerConfig
from liveavatar.core import Audio, CleanLatent, Close, Closed, Failed, InputError, Latents, Open, Refresh
from liveavatar.diffusion import schedule
from liveavatar.models.layers import rope_angles, rotate
from liveavatar.models.s2v import CausalS2V
from liveavatar.runtime.placement import cut
from liveavatar.runtime.sources import Fixture, FixtureSource

SESSION = "parity"
PREFILL_DISTANCE = 30  # rel of the stage.* cases
STALL_SECONDS = 0.5  # how often a silent chain is asked again; a dead one raises RankFailure


@dataclass(frozen=True)
class Case:
    """One tensor compared. max_abs: max|d|; max_rel: max|d| / max|expected|; rms_rel: rms(d) / rms(expected)."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    rms_rel: float
    limit: str
    ok: bool


def compare(name: str, got, expected, *, max_abs: float = math.inf, max_rel: float = math.inf, rms_rel: float = math.inf) -> Case:
    """`got` against `expected` (tensors or nested numbers) under the limits that are given. A wrong shape or a NaN fails."""
    got, expected = (torch.as_tensor(t).double().cpu() for t in (got, expected))
    limits = {"max_abs": max_abs, "max_rel": max_rel, "rms_rel": rms_rel}
    limit = ", ".join(f"{key} {value:g}" for key, value in limits.items() if value < math.inf)
    if got.shape != expected.shape:
        return Case(name, tuple(expected.shape), math.inf, math.inf, math.inf, f"shape, got {list(got.shape)}", False)
    d = got - expected
    measured = {"max_abs": _peak(d), "max_rel": _ratio(_peak(d), _peak(expected)), "rms_rel": _ratio(_rms(d), _rms(expected))}
    ok = all(measured[key] <= value for key, value in limits.items()) and bool(torch.isfinite(got).all())
    return Case(name, tuple(expected.shape), **measured, limit=limit, ok=ok)


def _peak(t: torch.Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


def _ratio(a: float, b: float) -> float:
    return a / b if b else (0.0 if a == 0 else math.inf)


# ---------------------------------------------------------------- the command


def run(path: str | Path, ranks: int = 1, launcher: str | None = None) -> bool:
    """Compare everything `path` (a fixture, with or without suffix) expects; print a table and one JSON line.

    ranks: rollout fixtures run on that many. launcher: None is inproc for one rank, local for more. The
    last line is {"max_rel_err", "max_abs_err", "cases", "ok"}; true when all is within tolerance. Raises
    InputError on what is no fixture, PlacementError on more ranks than roles, RankFailure.
    """
    fixture = Fixture(path)
    kind, check = _kind(fixture)
    if kind == "rollout":
        cases = list(rollout_cases(fixture, ranks, launcher or ("inproc" if ranks == 1 else "local")))
    else:
        cases = list(check(fixture))
    if not cases:
        raise InputError(f"{fixture.json_path}: a {kind} fixture that expects nothing")
    Console().print(_table(f"{fixture.name} ({kind}{f', {ranks} rank(s)' if kind == 'rollout' else ''})", cases))
    ok = all(case.ok for case in cases)
    worst = {f"{key}_err": _finite(max(getattr(case, key) for case in cases)) for key in ("max_rel", "max_abs")}
    print(json.dumps({**worst, "cases": len(cases), "ok": ok}), flush=True)
    return ok


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _kind(fixture: Fixture) -> tuple[str, Callable[[Fixture], Iterator[Case]] | None]:
    facts = fixture.facts
    marks = {"rollout": (("blocks", "sigmas"), None), "causal": (("timestep", "rel_per_block"), causal_cases),
             "vae": (("call_sizes",), vae_cases), "schedule": (("tables",), schedule_cases),
             "size rule": (("pairs",), size_cases), "audio time base": (("cases", "frame_to_row"), bucket_cases)}
    for kind, (keys, check) in marks.items():
        if all(key in facts for key in keys):
            return kind, check
    raise InputError(f"{fixture.json_path}: no fixture this version knows (keys: {', '.join(list(facts)[:8])})")


def _table(title: str, cases: list[Case]) -> Table:
    table = Table(title=title)
    for column in ("tensor", "shape", "max |d|", "max |d| / max", "rms / rms", "limit", ""):
        table.add_column(column)
    for case in cases:
        table.add_row(case.name, "x".join(map(str, case.shape)), *(f"{v:.2e}" for v in (case.max_abs, case.max_rel, case.rms_rel)),
                      case.limit, "ok" if case.ok else "[bold red]FAIL[/]")
    return table


def _causal_limits(fixture: Fixture) -> dict[str, float]:
    fp32 = fixture.facts["tolerance"]["fp32"]
    return {"max_rel": fp32["max_abs_over_max_ref"], "rms_rel": fp32["rms_over_rms_ref"]}


def _refuse_unknown(fixture: Fixture, patterns: str) -> None:
    """A tensor nobody compares must not pass for one that agrees."""
    unknown = [name for name in fixture.entries if not re.fullmatch(rf"weights\..*|in\..*|{patterns}", name)]
    if unknown:
        raise InputError(f"{fixture.tensor_path}: nothing is known to compare with {', '.join(sorted(unknown)[:10])}")


# ---------------------------------------------------------------- one forward at a time


class Forwards:
    """A causal fixture's inputs and the calls of its `procedure`."""

    def __init__(self, fixture: Fixture):
        self.fixture, self.model, self.geometry = fixture, fixture.model(), fixture.geometry()
        self.text = self.model.encode_text(fixture.tensor("in.context"))
        self.motion = fixture.tensor("in.motion")
        self.pose = fixture.tensor("in.pose") if "in.pose" in fixture else None

    def prefill(self, reference: str):
        return self.model.prefill(self.fixture.tensor(reference), self.motion, self.text)

    def cache(self, sink):
        g = self.geometry
        cache = self.model.new_cache(g.latent_height, g.latent_width, g.block_latents, g.ring_blocks)
        self.set_sink(cache, sink)
        return cache

    def set_sink(self, cache, sink) -> None:
        self.model.set_sink(cache, sink, self.geometry.latent_height, self.geometry.latent_width)

    def audio(self, block: int):
        return self.model.encode_audio(self.fixture.tensor(f"block.{block}.audio"))

    def velocity(self, cache, modulation, block: int, distance: int) -> torch.Tensor:
        return self.model(self.fixture.tensor(f"block.{block}.x"), modulation, self.audio(block), self.text, cache,
                          block=block, sink_distance=distance, pose=self.pose)


@torch.inference_mode()
def causal_cases(fixture: Fixture) -> Iterator[Case]:
    """Prefills, blocks in sequence on one ring, its contents, the other timesteps, rotation vectors."""
    _refuse_unknown(fixture, r"prefill[01]\.[kv]\.\d+|block\.\d+\.(x|v|audio|audio_tokens|audio_global)|ring\.[kv]\.\d+"
                             r"|stage\.\d+\.v|rope\.(positions|x|y)")
    limits, calls = _causal_limits(fixture), Forwards(fixture)
    yield from _rope_cases(fixture, limits)
    again = fixture.facts.get("sink_reprefill_before_block")
    modulation = calls.model.modulation(fixture.facts["timestep"])
    sink = calls.prefill("in.ref0")
    yield from _sink_cases(fixture, "prefill0", sink, limits)
    cache = calls.cache(sink)
    for block, distance in enumerate(fixture.facts["rel_per_block"]):
        if again is not None and block == again:
            calls.set_sink(cache, second := calls.prefill("in.ref1"))
            yield from _sink_cases(fixture, "prefill1", second, limits)
        yield from _audio_cases(fixture, block, calls, limits)
        velocity = calls.velocity(cache, modulation, block, distance)
        if (name := f"block.{block}.v") in fixture:
            yield compare(name, velocity, fixture.tensor(name), **limits)
    for name, kind, layer in _named(fixture, r"ring\.([kv])\.(\d+)"):
        yield compare(name, cache.ring(int(layer))["kv".index(kind)], fixture.tensor(name), **limits)
    for name, stage in _named(fixture, r"stage\.(\d+)\.v"):
        modulation = calls.model.modulation(fixture.facts["stage_timesteps"][int(stage)])
        yield compare(name, calls.velocity(calls.cache(sink), modulation, 0, PREFILL_DISTANCE), fixture.tensor(name), **limits)


def _named(fixture: Fixture, pattern: str) -> Iterator[tuple[str, ...]]:
    for name in sorted(fixture.entries):
        if match := re.fullmatch(pattern, name):
            yield name, *match.groups()


def _rope_cases(fixture: Fixture, limits: dict) -> Iterator[Case]:
    if "rope.x" in fixture:
        x = fixture.tensor("rope.x")
        y = rotate(x[None, :, None], rope_angles(fixture.tensor("rope.positions"), x.shape[-1]))
        yield compare("rope.y", y[0, :, 0], fixture.tensor("rope.y"), **limits)


def _sink_cases(fixture: Fixture, prefix: str, sink, limits: dict) -> Iterator[Case]:
    for name, kind, layer in _named(fixture, re.escape(prefix) + r"\.([kv])\.(\d+)"):
        yield compare(name, getattr(sink, kind)[int(layer)], fixture.tensor(name), **limits)


def _audio_cases(fixture: Fixture, block: int, calls: Forwards, limits: dict) -> Iterator[Case]:
    for name, field in ((f"block.{block}.audio_tokens", "tokens"), (f"block.{block}.audio_global", "pooled")):
        if name in fixture:
            yield compare(name, getattr(calls.audio(block), field)[0], fixture.tensor(name), **limits)


# ---------------------------------------------------------------- the whole chain


@dataclass
class Rollout:
    """What came out of the chain. clean: latents by block; velocity: by (block, step)."""

    clean: dict[int, torch.Tensor]
    velocity: dict[tuple[int, int], torch.Tensor]


def rollout_cases(fixture: Fixture, ranks: int, launcher: str) -> Iterator[Case]:
    """From noise to clean latents through `ranks` ranks; prefills are compared on a model of this process."""
    _refuse_unknown(fixture, r"expect\.(prefill[01]\.[kv]\.\d+|v\.\d+\.\d+|x0)")
    limits, result = _causal_limits(fixture), roll_out(fixture, ranks, launcher)
    yield from _rollout_sinks(fixture, result, limits)
    for name, block, step in _named(fixture, r"expect\.v\.(\d+)\.(\d+)"):
        yield compare(name, result.velocity[int(block), int(step)], fixture.tensor(name), **limits)
    if "expect.x0" in fixture:
        for block, expected in enumerate(fixture.tensor("expect.x0")):
            yield compare(f"expect.x0[{block}]", result.clean[block], expected, **limits)


@torch.inference_mode()
def _rollout_sinks(fixture: Fixture, result: Rollout, limits: dict) -> Iterator[Case]:
    if any(_named(fixture, r"expect\.prefill.*")):
        model: CausalS2V = fixture.model()
        text, motion = model.encode_text(fixture.tensor("in.context")), fixture.tensor("in.motion")
        for index, reference in enumerate((fixture.tensor("in.ref0"), result.clean[0][:, :1])):
            yield from _sink_cases(fixture, f"expect.prefill{index}", model.prefill(reference, motion, text), limits)


def roll_out(fixture: Fixture, ranks: int, launcher: str) -> Rollout:
    """Run a rollout fixture on a chain cut into `ranks`. Raises PlacementError, RankFailure, InputError."""
    from liveavatar.runtime.launchers import launch

    source = FixtureSource(fixture.json_path)
    config = Config(model=ModelConfig(path=str(fixture.json_path), dtype="float32", device="cpu"),
                    sampler=SamplerConfig(steps=len(source.timesteps)), runtime=RuntimeConfig(launcher=launcher, threads=1),  # bits may depend on the number of threads
                    stages=cut(source.chain, ranks))
    chain = launch(config)
    try:
        return _stream(chain, fixture, source, in_flight=ranks + 1)
    finally:
        chain.stop()


def _stream(chain, fixture: Fixture, source: FixtureSource, in_flight: int) -> Rollout:
    noise, audio = fixture.tensor("in.noise"), fixture.tensor("in.audio")
    distances, blocks, last = fixture.facts["rel_per_block"], fixture.facts["blocks"], len(source.timesteps) - 1
    result, sent, first = Rollout({}, {}), 0, None
    chain.send(Open(SESSION, reference=fixture.tensor("in.ref0"), motion=fixture.tensor("in.motion"),
                    context=fixture.tensor("in.context")))
    while len(result.clean) < blocks:
        while sent < blocks and sent - len(result.clean) < in_flight:
            if sent and sent == source.refresh_block:
                if first is None:
                    break
                chain.send(Refresh(SESSION, reference=first))
            chain.send(Audio(SESSION, index=sent, noise=noise[sent], features=audio[sent], sink_distance=distances[sent]))
            sent += 1
        match _next(chain):
            case CleanLatent() as message:
                first = message.latent
            case Latents() as message:
                result.velocity[message.index, message.step] = message.velocity
                if message.step == last:
                    result.clean[message.index] = message.latents
    chain.send(Close(SESSION))
    while not isinstance(_next(chain), Closed):
        pass
    return result


def _next(chain):
    while (message := chain.receive(STALL_SECONDS)) is None:
        pass
    if isinstance(message, Failed):
        raise InputError(message.reason)
    return message


# ---------------------------------------------------------------- codec and tables


@torch.inference_mode()
def vae_cases(fixture: Fixture) -> Iterator[Case]:
    """Decoding whole and in the calls of the fixture; encoding one picture, alone and held."""
    from liveavatar.models.vae import StreamingVAE, plan_named_by_wan, stored_as

    _refuse_unknown(fixture, r"expect\.(decode|image_latent|repeat\d+_latents)")
    plan = plan_named_by_wan(fixture.facts["config"], fixture.weights(), "a VAE parity fixture", str(fixture.json_path))
    vae = StreamingVAE(plan.load(stored_as(torch.float32, "cpu")))
    tolerance = fixture.facts["tolerance"]
    yield from _decode_cases(fixture, vae, tolerance["decode_max_abs"])
    yield from _encode_cases(fixture, vae, tolerance["encode_max_abs"])


def _decode_cases(fixture: Fixture, vae, limit: float) -> Iterator[Case]:
    z, expected = fixture.tensor("in.z")[0], fixture.tensor("expect.decode")[0]
    yield compare("decode, whole", vae.decode(z, vae.new_state()), expected, max_abs=limit)
    state, pieces = vae.new_state(), []
    for part, size in zip(z.split(fixture.facts["call_sizes"], dim=1), fixture.facts["frames_per_call"], strict=True):
        pieces.append(vae.decode(part, state))
        yield compare(f"pictures of {part.shape[1]} latents", pieces[-1].shape[1], size, max_abs=0)
    yield compare("decode, in calls", torch.cat(pieces, dim=1), expected, max_abs=limit)


def _encode_cases(fixture: Fixture, vae, limit: float) -> Iterator[Case]:
    if "in.image" in fixture:
        image = fixture.tensor("in.image")[0]
        yield compare("expect.image_latent", vae.encode(image), fixture.tensor("expect.image_latent")[0], max_abs=limit)
        for name, count in _named(fixture, r"expect\.repeat(\d+)_latents"):
            yield compare(name, vae.encode(image.expand(-1, int(count), -1, -1)), fixture.tensor(name)[0], max_abs=limit)


def schedule_cases(fixture: Fixture) -> Iterator[Case]:
    """Noise levels and timesteps for each number of steps."""
    for steps, table in fixture.facts["tables"].items():
        yield compare(f"sigmas, {steps} steps", schedule.sigmas(int(steps)), table["sigmas"], max_abs=fixture.facts["tolerance_sigma"])
        yield compare(f"timesteps, {steps} steps", schedule.timesteps(int(steps)), table["timesteps"],
                      max_abs=fixture.facts["tolerance_timestep"])


def size_cases(fixture: Fixture) -> Iterator[Case]:
    """Picture size and area cap -> output size, exactly."""
    for height, width, cap, *expected in fixture.facts["pairs"]:
        yield compare(f"{height}x{width}, cap {cap}", output_size(height, width, cap), expected, max_abs=0)


def bucket_cases(fixture: Fixture) -> Iterator[Case]:
    """50 Hz -> 30 Hz -> 25 pictures per second: row counts, picture rows, values."""
    facts = fixture.facts
    rows = [(r["samples"], r["rows"]) for r in facts["rows_50hz_of_samples"]]
    yield compare("rows at 50 Hz", [audio_features.rows_50hz(n) for n, _ in rows], [r for _, r in rows], max_abs=0)
    odd = set(facts["rows_30hz_exceptions"]["t50"])
    lengths = range(1, max(odd, default=0) + 1)
    yield compare("rows at 30 Hz", [audio_features.rows_30hz(t) for t in lengths], [3 * t // 5 - (t in odd) for t in lengths], max_abs=0)
    expected = facts["frame_to_row"]
    yield compare("frame_to_row", [audio_features.frame_to_row(i) for i in range(len(expected))], expected, max_abs=0)
    for number, case in enumerate(facts["cases"]):
        yield from _bucket_values(number, case, facts["tolerance_relative"])


def _bucket_values(number: int, case: dict, tolerance: float) -> Iterator[Case]:
    features = torch.tensor(case["features_50hz"])
    yield compare(f"case {number}: rows at 30 Hz", audio_features.rows_30hz(features.shape[1]), case["rows_30hz"], max_abs=0)
    rows = audio_features.interpolate_rows(features, case["rows_30hz"])
    expected = torch.tensor(case["features_30hz"])
    yield compare(f"case {number}: 30 Hz", rows, expected, max_abs=tolerance * max(1.0, _peak(expected)))
    expected = torch.tensor(case["frames_25fps"])
    frames = audio_features.rows_to_frames(rows, expected.shape[1]).transpose(1, 2)
    yield compare(f"case {number}: 25 fps", frames, expected, max_abs=tolerance * max(1.0, _peak(expected)))
