"""The command line: generate | serve | talk | verify | consent | audit | parity | inspect | plan | train | evaluate.

Everything heavy is imported inside the command, so `--help` answers at once. A LiveAvatarError is one
line on stderr and exit status 2; Ctrl-C is 130; anything else is our fault and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from typer.core import TyperGroup

from liveavatar.evaluation.commands import commands as evaluation_commands
from liveavatar.evaluation.commands import commands_of
from liveavatar.serving import provenance_commands as provenance
from liveavatar.serving import talk_commands

if TYPE_CHECKING:
    import numpy as np

    from liveavatar.config import Config
    from liveavatar.core import Geometry
    from liveavatar.runtime.placement import Device, Plan

REFUSED = 2  # exit status of a LiveAvatarError, as of a wrong option; Ctrl-C is 130
USUAL_PICTURE = 720, 1280  # height and width of the portrait a plan is made for when nobody names a size

UsageError = typer.BadParameter.__base__  # of all that a wrong command line raises; typer names only this child of it


class Commands(TyperGroup):
    """The verbs. A wrong option is one line on stderr, as all other bad input is, and not a box of five."""

    def main(self, *args, **kwargs):
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except UsageError as error:
            path = error.ctx.command_path if error.ctx else "liveavatar"
            if message := " ".join(error.format_message().split()):  # empty: no arguments, the help was shown
                print(f"error: {message.rstrip('.')}; see {path} --help", file=sys.stderr)
            status = REFUSED
        sys.exit(status)


app = typer.Typer(
    cls=Commands, name="liveavatar", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A portrait and live speech become a talking avatar, made block by block on one GPU, several, or a CPU.",
    epilog="Every command explains itself: [bold]liveavatar generate --help[/bold]",
)  # fmt: skip


def _finite(value: float | None) -> float | None:
    """The value of an option, unless it is infinite."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


ConfigFile = Annotated[Optional[Path], typer.Option(
    "--config", "-c", metavar="FILE", help="YAML file with the whole run. Default: the embedded avatar, uncut.")]
Overrides = Annotated[Optional[list[str]], typer.Argument(
    metavar="[KEY=VALUE]...", help="Settings that win over the file, e.g. sampler.steps=3 model.dtype=float32.")]
Ranks = Annotated[Optional[int], typer.Option(
    "--ranks", "-n", min=1, metavar="N", help="Cut the chain into N ranks. Default: as the config's stages say, else 1.")]
Launcher = Annotated[Optional[str], typer.Option(
    metavar="inproc|local|torchrun|ray",
    help="Where ranks run: threads of this process, processes of this machine, torchrun, or Ray actors. "
         "Default: the config's; local for --ranks above 1 without a config.")]  # fmt: skip


def _config(path: Path | None, overrides: list[str] | None, ranks: int | None = None, launcher: str | None = None,
            **settings) -> Config:
    """The Config a command line means. settings: fields of Config, None where nothing was said."""
    from liveavatar.config import load
    from liveavatar.runtime.engine import with_launcher
    from liveavatar.runtime.launchers import torchrun_role
    from liveavatar.runtime.placement import cut

    config = load(path, overrides or ())
    config = dataclasses.replace(config, **{key: value for key, value in settings.items() if value is not None})
    if torchrun_role() is not None:  # it has decided already how many ranks there are
        launcher = launcher or "torchrun"
        ranks = ranks or (None if config.stages else int(os.environ["WORLD_SIZE"]))
    elif launcher is None and ranks is not None and ranks > 1 and path is None:
        launcher = "local"
    if ranks is not None:
        config = dataclasses.replace(config, stages=cut(config.chain, ranks))
    return config if launcher is None else with_launcher(config, launcher)


def _traced(config: Config, path: Path) -> Config:
    """config with the trace of its run written to `path`."""
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, trace=str(path)))


def guard(function):
    """`function` with its LiveAvatarErrors as one line on stderr. core brings torch, so it waits until work begins."""
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        from liveavatar.core import LiveAvatarError

        try:
            return function(*args, **kwargs)
        except LiveAvatarError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(REFUSED) from None

    return guarded


@contextlib.contextmanager
def _needs(extra: str, *packages: str):
    """Say which extra brings a package that is not here."""
    try:
        yield
    except ModuleNotFoundError as error:
        from liveavatar.core import ConfigError

        if error.name not in packages:
            raise
        raise ConfigError(f"this needs {error.name}: pip install 'liveavatar[{extra}]'") from None


SERVING = ("uvicorn", "fastapi", "aiortc", "structlog", "prometheus_client")


def guard_serving(function):
    """guard, of what wants the packages of serving."""
    return guard(_needs("serve", *SERVING)(function))


command = commands_of(app, guard)


@command(
    "liveavatar generate --out avatar.mp4   [dim]the embedded portrait speaks the embedded recording[/dim]",
    "liveavatar generate --image me.png --audio speech.mp3 --out me.mp4",
    "liveavatar generate --audio speech.wav --ranks 2 --length 5   [dim]two local processes, five seconds[/dim]",
    "ffmpeg -i talk.mkv -f s16le -ar 16000 -ac 1 - | liveavatar generate --audio -   [dim]live PCM[/dim]",
    "liveavatar generate --config configs/serve_5gpu.yaml --image me.png --audio speech.wav model.path=/weights/s2v",
)
def generate(
    overrides: Overrides = None,
    image: Annotated[Optional[Path], typer.Option("--image", "-i", metavar="FILE", help="Portrait, PNG, JPEG or WebP, at least 64 pixels a side. Default: the embedded one.")] = None,
    audio: Annotated[Optional[str], typer.Option("--audio", "-a", metavar="FILE|-", help="Speech, whatever ffmpeg reads; '-': raw PCM on stdin, 16-bit little-endian, mono, 16 kHz. Default: the embedded recording.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.mp4", help="The video to write: H.264 and AAC, 25 frames per second.")] = Path("out.mp4"),
    prompt: Annotated[Optional[str], typer.Option("--prompt", "-p", help="What the scene shows. Default: the config's.")] = None,
    config: ConfigFile = None,
    seed: Annotated[Optional[int], typer.Option(help="Same seed and input, same pictures. Default: the config's.")] = None,
    ranks: Ranks = None,
    launcher: Launcher = None,
    length: Annotated[Optional[float], typer.Option(min=0.04, callback=_finite, metavar="SECONDS", help="Use only this much of the speech.")] = None,
    trace: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Also write when everything happened, for `liveavatar evaluate trace FILE`.")] = None,
    watermark: Annotated[bool, typer.Option("--watermark/--no-watermark", help="Mark every picture, invisibly, as made by a machine: `liveavatar verify` finds it.")] = True,
    key: Annotated[Optional[Path], typer.Option("--key", "-k", metavar="FILE", help="The watermark's key. Default: var/watermark.key, made at first use.")] = None,
) -> None:
    """Make an mp4 of a portrait speaking a recording, written as it is made. Ctrl-C leaves a file that plays."""
    from liveavatar.runtime.launchers import run_rank, torchrun_role

    if torchrun_role() == "rank":  # the config comes from the head, rank 0's process
        raise typer.Exit(run_rank())
    settings = _config(config, overrides, ranks, launcher, prompt=prompt, seed=seed)
    settings = settings if trace is None else _traced(settings, trace)
    from liveavatar import display
    from liveavatar import generate as main_job
    from liveavatar.conditioning.media import recording_seconds

    portrait = image or main_job.PORTRAIT
    job = main_job.Job(image=portrait, audio=str(main_job.SPEECH) if audio is None else audio, out=out, length=length,
                       marker=provenance.file_marker(portrait, key) if watermark else None)  # fmt: skip
    seconds = recording_seconds(job.audio)
    with display.JobDisplay(seconds if length is None or seconds is None else min(length, seconds)) as bar:
        try:
            done = main_job.generate(settings, job, bar)
        except KeyboardInterrupt:
            if bar.done is not None:
                display.show_outcome(bar.done, out, verb="interrupted after")
            raise
    display.show_outcome(done, out)


@command(
    "liveavatar parity tests/golden/causal_s2v",
    "liveavatar parity tests/golden/rollout_s2v.json --ranks 4   [dim]the chain cut over four processes[/dim]",
)
def parity(
    fixture: Annotated[Path, typer.Argument(metavar="FIXTURE", help="NAME.json or NAME.safetensors (either, or NAME alone).")],
    ranks: Annotated[int, typer.Option("--ranks", "-n", min=1, metavar="N", help="Ranks that a rollout fixture runs on.")] = 1,
    launcher: Annotated[Optional[str], typer.Option(metavar="inproc|local|torchrun|ray", help="Where they run. Default: inproc for one, local for more.")] = None,
) -> None:
    """Compare this implementation with a fixture: a table, one JSON line, exit status 0 only within its tolerances."""
    from liveavatar.runtime.parity import run

    raise typer.Exit(0 if run(fixture, ranks, launcher) else 1)


@command(
    "liveavatar inspect default   [dim]the embedded avatar[/dim]",
    "liveavatar inspect /weights/Wan2.2-S2V-14B --lora /weights/liveavatar.safetensors",
)
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint folder: Wan2.2-S2V-14B, a diffusers-style repack, or ours; 'default' for the embedded one.")],
    lora: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Also judge this Live-Avatar LoRA file against it.")] = None,
) -> None:
    """Say what a checkpoint folder holds and whether it will load, without reading a tensor. Exit status 1 if not."""
    from liveavatar.models.weights import inspect_folder

    report = inspect_folder(path, lora)
    typer.echo(str(report))
    raise typer.Exit(0 if report.will_load else 1)


@command(
    "liveavatar plan --ranks 2   [dim]the embedded avatar in two processes of this machine[/dim]",
    "liveavatar plan --config configs/serve_5gpu.yaml   [dim]on this machine's GPUs, weights at hand[/dim]",
    "liveavatar plan --official --ranks 5 --memory 80 --tflops 400 runtime.sessions=2   [dim]the 14B model on five GPUs[/dim]",
    "liveavatar plan --device H200 --ranks 1 --precision fp8 sampler.finish_after=3   [dim]what to expect of it, simulated[/dim]",
    "liveavatar plan --device H800 --plot fps.svg --model 30b   [dim]every cut of another size, and a picture of it[/dim]",
)
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    ranks: Ranks = None,
    official: Annotated[bool, typer.Option("--official", help="Plan for the official 14B model, whose folder need not be here.")] = False,
    memory: Annotated[Optional[float], typer.Option(min=0.001, callback=_finite, metavar="GB", help="Plan for GPUs of this memory, one a rank, instead of this machine's devices.")] = None,
    tflops: Annotated[Optional[float], typer.Option(min=0.001, callback=_finite, help="TFLOP/s one rank reaches in this model; predicts the speed.")] = None,
    device: Annotated[Optional[str], typer.Option(metavar="NAME", help="Forecast for GPUs of this name (H800, H100, H200, A100, B200, L40S, RTX4090, ...): the chain is simulated.")] = None,
    model: Annotated[str, typer.Option(metavar="14b|30b|100b|WIDTHxLAYERS", help="With --device: size of the transformer.")] = "14b",
    precision: Annotated[Optional[str], typer.Option(metavar="bf16|fp8", help="With --device: of its linear layers. Default: as model.fast.fp8 says.")] = None,
    measured: Annotated[Optional[list[Path]], typer.Option(metavar="FILE.json", help="With --device: seconds per role from bench/step.py or bench/decode.py instead of arithmetic, of the way that the config's model.fast names; may be given again.")] = None,
    price: Annotated[Optional[float], typer.Option(min=0.0, callback=_finite, help="With --device: dollars per GPU and hour.")] = None,
    plot: Annotated[Optional[Path], typer.Option(metavar="FILE.svg", help="With --device: pictures per second and latency against the number of GPUs.")] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", metavar="FILE", help="With --device: the forecasts as JSON.")] = None,
) -> None:
    """Print what each rank would load and memory per session; with --device or --tflops also the speed. Exit status 1 if it does not fit."""
    from rich.console import Console

    settings = _config(config, overrides, ranks)
    if device is not None:
        raise typer.Exit(_forecast(settings, ranks, device, model, precision, measured, price, plot, json_file))
    devices = _devices(settings, memory, tflops)
    result = _official_plan(settings, devices) if official else _plan(settings, devices)
    Console().print(result.table())
    for problem in result.problems:
        typer.echo(f"does not fit: {problem}")
    raise typer.Exit(1 if result.problems else 0)


app.command(epilog=provenance.VERIFY_EPILOG)(guard(provenance.verify))
app.add_typer(provenance.consent_commands(guard_serving))
app.add_typer(provenance.audit_commands(guard_serving))
talk_commands.register(app, guard_serving)


@command(
    "liveavatar serve configs/serve_tiny.yaml   [dim]the embedded avatar on this machine; open the address it prints[/dim]",
    "liveavatar serve configs/serve_tiny.yaml --engine testcard listen.port=9000   [dim]no model: a test picture[/dim]",
)
def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The whole server; configs/serve_tiny.yaml is one.")],
    overrides: Overrides = None,
    engine: Annotated[Optional[str], typer.Option(metavar="model|testcard", help="What makes the pictures. Default: the config's.")] = None,
    standby: Annotated[bool, typer.Option("--standby", help="Warm up, and go on air when the server that has the storage folder is gone: told to end, or dead.")] = False,
) -> None:
    """Serve live sessions: HTTP API, WebRTC, destinations, console. SIGTERM drains, a second one ends at once; SIGHUP reads limits, leases, outputs and log level anew."""
    from liveavatar.config import load

    with _needs("serve", *SERVING):
        from liveavatar.serving import server
        from liveavatar.serving.settings import ServeConfig

    def read() -> ServeConfig:
        return load(config, [*(overrides or ()), *([f"engine_kind={engine}"] if engine else [])], cls=ServeConfig)

    settings = read()
    try:
        server.run(settings, typer.echo, read, standby)
    except OSError as error:
        from liveavatar.core import ConfigError

        raise ConfigError(f"listen {settings.listen.host}:{settings.listen.port}: {error.strerror}; choose another with listen.port=...") from None


@command(
    "liveavatar train all --config configs/train_tiny.yaml   [dim]the embedded avatar, from nothing[/dim]",
    "liveavatar train vae --config configs/train_tiny.yaml run=runs/other   [dim]one stage, into another folder[/dim]",
    "liveavatar train plan --config configs/train_s2v14b.yaml --gpus 8 --memory 80   [dim]will it fit? nothing is started[/dim]",
)
def train(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="data, vae, decoder, text, probe, latents, teacher, forcing, ode, consistency, dmd, choose, lids, painter, lips or export; all: those the recipe has, in order; unpack: the exported avatar, to go on training it; preview: look at the last checkpoint; ablations: a table; teacher_clips: for the gates; pack: latents as tar shards; plan: memory and FLOP of each stage.")],
    config: Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the recipe, e.g. configs/train_tiny.yaml.")],
    overrides: Overrides = None,
    gpus: Annotated[Optional[int], typer.Option(min=1, metavar="N", help="plan: so many GPUs. Default: the recipe's processes.")] = None,
    memory: Annotated[Optional[float], typer.Option(min=0.001, callback=_finite, metavar="GB", help="plan: of this memory each. Default: this machine's.")] = None,
) -> None:
    """Train the embedded avatar on rendered talking heads, or adapters on large weights; every stage resumes where it was stopped."""
    if stage == "plan":
        raise typer.Exit(_training_plan(config, overrides or [], gpus, memory))
    from liveavatar.training.recipe import run

    run(stage, config, overrides or (), sync_judge=_sync_verdict, told=True)


def _sync_verdict(faces: list, pcm: np.ndarray) -> tuple[float, float] | None:
    """AVCorr's confidence and lag in ms of faces per picture and float32 pcm; None where it cannot say. What training asks evaluation."""
    from liveavatar.core import FPS
    from liveavatar.evaluation.landmarks import Track
    from liveavatar.evaluation.sync import av_corr, heard

    utterance, source = heard(pcm)
    found = {m.name: m.value for m in av_corr(Track.of([i / FPS for i in range(len(faces))], faces), utterance, source)}
    return None if found["conf"] is None or found["lag_ms"] is None else (found["conf"], found["lag_ms"])


def _training_plan(path: Path, overrides: list[str], gpus: int | None, memory: float | None) -> int:
    """Print what the stages of a recipe take; 1 if one does not fit."""
    import torch
    from rich.console import Console

    from liveavatar.training import memory as sizes
    from liveavatar.training.planning import model_of, plans_of
    from liveavatar.training.recipe import read_recipe

    recipe = read_recipe(path, overrides)
    plans, remark = plans_of(recipe, gpus or recipe.processes), model_of(recipe)[1]
    size = round(memory * 1e9) if memory else torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    Console().print(sizes.table(plans, size))
    problems = [p for plan in plans if size and (p := plan.problem(size))]
    for line in [remark] * bool(remark) + [f"does not fit: {p}" for p in problems]:
        typer.echo(line)
    return int(bool(problems))


class Ours:
    """How this project makes what `evaluate` judges: evaluation itself knows no model and no renderer."""

    speech, portrait = (Path(__file__).parent / "assets" / name for name in ("speech.wav", "portrait.png"))

    @staticmethod
    def generate(config: Path | None, portrait: Path, audio: Path, out: Path, prompt: str | None, seed: int | None, trace: Path,
                 first_position: int = 0) -> None:
        """An mp4 of the portrait speaking the recording, and its trace. first_position: as sampler.first_position."""
        from liveavatar import generate as main_job

        settings = _traced(_config(config, None, prompt=prompt, seed=seed), trace)
        sampler = dataclasses.replace(settings.sampler, first_position=first_position)
        settings = dataclasses.replace(settings, sampler=sampler) if first_position else settings
        main_job.generate(settings, main_job.Job(image=portrait, audio=str(audio), out=out))

    @staticmethod
    def converse(config: Path | None, portrait: Path, audio: Path, events, out: Path, prompt: str | None, seed: int | None, trace: Path) -> None:
        """An mp4 and the trace of a live session that speaks the recording by the wall clock. events: of taping.Event."""
        from liveavatar.serving import taping

        taping.tape(_traced(_config(config, None, prompt=prompt, seed=seed), trace), portrait, audio, events, out)

    @staticmethod
    def weights(config: Path | None) -> dict[str, Path]:
        """Name -> file of every tensor file that `generate` reads."""
        from liveavatar.models.folders import resolve

        folder = resolve(_config(config, None).model.path)
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.safetensors"))}

    @staticmethod
    def stage():
        """Renders the lines of a suite."""
        from liveavatar.training.synth.performance import Stage

        return Stage()


app.add_typer(evaluation_commands(guard, Ours))


def _devices(config: Config, memory: float | None, tflops: float | None) -> list[Device]:
    """One device per stage: this machine's, or GPUs of `memory` GB; with a rate where one was given."""
    from liveavatar.runtime.placement import Device, local_devices
    from liveavatar.runtime.seats import seats_of

    count, rate = len(seats_of(config)), tflops and tflops * 1e12
    if memory is not None:
        return [Device(name=f"GPU of {memory:g} GB", kind="cuda", memory=round(memory * 1e9), rate=rate)] * count
    return [dataclasses.replace(device, rate=rate) for device in local_devices(config.model.device, count)]


def _forecast(config: Config, ranks: int | None, device: str, model: str, precision: str | None, measured: list[Path] | None, price: float | None,
              plot: Path | None, json_file: Path | None) -> int:
    """Print what to expect of `ranks` GPUs, or of every number of them; 1 if none of that fits."""
    from rich.console import Console

    from liveavatar.config import one_of
    from liveavatar.runtime import forecast as f

    precision = precision or ("fp8" if config.model.fast.fp8 else "bf16")
    one_of("--precision", precision, ("bf16", "fp8"))
    geometry, console = _official_geometry(config), Console()
    times = f.read_measured(measured or (), dataclasses.replace(config.model.fast, fp8=precision == "fp8"), geometry)
    speeds = f.Speeds(device=f.accelerator(device), precision=precision, measured=times)
    what = config, f.model_shape(model), geometry, speeds
    made = [f.forecast(*what, ranks, name=device, price=price)] if ranks else f.sweep(*what, name=device, price=price)
    console.print(f.table(made, f"{model} on {device}, {precision}"))
    shares = f"bf16 {f.SHARE:.0%}, FP8 linears {f.FP8_SHARE:.0%}, decode {f.DECODE_SHARE:.0%}"
    console.print(made[-1].plan.table() if ranks else "", "measured: " + (", ".join(f"{role} {1000 * t:.0f} ms" for role, t in times.items()) or "nothing")
                  + f"; the rest by arithmetic, assuming of the stated peak: {shares}", sep="\n")  # fmt: skip
    if plot is not None:
        f.plot(made, f"{model} on {device}, {precision}, {config.runtime.sessions} session(s)", plot)
    if json_file is not None:
        json_file.write_text(json.dumps(f.overview(made), indent=1) + "\n", encoding="utf-8")
    for problem in [p for one in made[-1:] for p in one.plan.problems] if ranks else []:
        typer.echo(f"does not fit: {problem}")
    return int(all(one.plan.problems for one in made))


def _plan(config: Config, devices: list[Device]) -> Plan:
    import torch

    from liveavatar.runtime.engine import plan_for
    from liveavatar.runtime.sources import open_source, sized

    return plan_for(config, open_source(sized(config, torch.empty(3, *USUAL_PICTURE, dtype=torch.uint8))), devices)


def _official_plan(config: Config, devices: list[Device]) -> Plan:
    """As for Wan2.2-S2V-14B in bfloat16; its text encoder is freed after each prompt, so it is not counted."""
    from liveavatar.models.s2v import S2VConfig
    from liveavatar.runtime.placement import plan

    return plan(config, S2VConfig(), _official_geometry(config), devices, stages=config.stages or (config.chain,))


def _official_geometry(config: Config) -> Geometry:
    from liveavatar.conditioning.identity import output_size
    from liveavatar.core import Geometry
    from liveavatar.runtime.sources import AREA_CAP

    height, width = config.video.height, config.video.width
    if height is None or width is None:
        height, width = output_size(*USUAL_PICTURE, config.video.area_cap or AREA_CAP)
    return Geometry(height=height, width=width, anchor_blocks=config.sampler.anchor_blocks)


def main() -> None:
    """Entry point of `liveavatar` and `python -m liveavatar`."""
    app()


if __name__ == "__main__":
    main()
