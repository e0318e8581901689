"""`liveavatar evaluate ...`: every command reads files, writes report.json and report.md, and answers with an exit status.

0: judged, and every gate that could be judged is met. 1: a gate failed. 2: an input cannot be used. Everything heavy is
imported inside the command. How this project makes videos is handed in by __main__.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from typer.core import TyperGroup

from liveavatar.evaluation import gate_commands

if TYPE_CHECKING:
    from liveavatar.evaluation.backends import Backends
    from liveavatar.evaluation.jobs import Ours, Setting
    from liveavatar.evaluation.report import Report

GATE_FAILED = 1

Out = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for report.json, report.md and plots.")]
Gates = Annotated[Optional[list[str]], typer.Option(
    "--gate", "-g", metavar="'NAME>=VALUE'", help="Demand on a measure, also NAME<=VALUE; may be given often. One that fails: exit status 1.")]
Weights = Annotated[Optional[Path], typer.Option(
    "--config", "-c", metavar="FILE", help="YAML file whose `backends` name weights you have (see doctor).")]
Overrides = Annotated[Optional[list[str]], typer.Argument(
    metavar="[KEY=VALUE]...", help="Settings that win over the file, e.g. suite.videos=theirs/.")]
SuiteFile = Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="One evaluation, e.g. configs/eval_tiny.yaml.")]


class Verbs(TyperGroup):
    """`evaluate SUITE.yaml` is `evaluate suite SUITE.yaml`."""

    def parse_args(self, ctx, args):
        if args and args[0].lower().endswith((".yaml", ".yml")):
            args = ["suite", *args]
        return super().parse_args(ctx, args)


def commands(guard: Callable, ours: Ours) -> typer.Typer:
    """The sub-app. guard: makes of a function one whose errors are a line on stderr; ours: how this project makes videos."""
    app = typer.Typer(
        cls=Verbs, name="evaluate", no_args_is_help=True, rich_markup_mode="rich",
        help="Judge videos, traces and ratings of any system: lip sync, likeness, stability, drift, speed, opinion. "
             "What cannot be measured says which file it needs.",
        epilog="[bold]Examples[/bold]\n\nliveavatar evaluate configs/eval_tiny.yaml\n\n"
               "liveavatar evaluate video talk.mp4 --text 'hello there' --portrait me.png   [dim]any system's mp4[/dim]",
    )  # fmt: skip
    people = typer.Typer(name="human", no_args_is_help=True, rich_markup_mode="rich", help="A rating study that works from disk, and its scores.")
    app.add_typer(people)
    for add in (_suites, _files, _reports):
        add(commands_of(app, guard), ours)
    app.command(epilog=gate_commands.EPILOG)(guard(gate_commands.gates))
    app.command(epilog=gate_commands.PROMPTS_EPILOG)(guard(gate_commands.prompts))
    _people(commands_of(people, guard), ours)
    return app


def commands_of(group: typer.Typer, guard: Callable) -> Callable:
    """command(*examples): a decorator that makes a guarded command of `group`, whose help ends with the examples."""
    return lambda *examples: lambda function: group.command(epilog="\n\n".join(("[bold]Examples[/bold]", *examples)))(guard(function))


def _suites(command: Callable, ours: Ours) -> None:
    """What a SUITE.yaml asks for."""

    @command("liveavatar evaluate suite configs/eval_tiny.yaml",
             "liveavatar evaluate suite configs/eval_tiny.yaml suite.videos=theirs/ system.name=theirs")  # fmt: skip
    def suite(file: SuiteFile, overrides: Overrides = None) -> None:
        """Judge every video of a suite, ours or those of `suite.videos`, and whether the measures can be trusted on it; and drift, if asked for."""
        from liveavatar.evaluation import jobs

        order, setting = jobs.read_evaluation(file, overrides or ()), _setting(ours)
        made = [(jobs.run_suite(order, setting), Path(order.out))] if order.suite is not None else []
        if order.drift is not None:
            apart = dataclasses.replace(order, out=str(Path(order.out) / "drift")) if made else order
            made.append((jobs.run_drift(apart, setting), Path(apart.out)))
        _answer(*made)

    @command("liveavatar evaluate drift configs/eval_long.yaml   [dim]2.8 hours of video, made here, then judged[/dim]",
             "liveavatar evaluate drift configs/eval_long.yaml --plan   [dim]only the sound, for another system[/dim]")  # fmt: skip
    def drift(file: SuiteFile, overrides: Overrides = None,
              plan: Annotated[bool, typer.Option("--plan", help="Only write plan.json and audio.wav.")] = False) -> None:  # fmt: skip
        """Does a long stream change? The same words in every window, compared with the first."""
        from liveavatar.core import ConfigError
        from liveavatar.evaluation import jobs

        order, setting = jobs.read_evaluation(file, overrides or ()), _setting(ours)
        if order.drift is None:
            raise ConfigError(f"{file}: has no section drift")
        if plan:
            made = jobs.plan_drift(order.drift, Path(order.out), setting)
            starts = ", ".join(f"{s:g}" for s in made.starts)
            typer.echo(f"wrote {Path(order.out) / made.audio} ({made.seconds:g} s) and plan.json; windows at {starts} s")
        else:
            _answer((jobs.run_drift(order, setting), Path(order.out)))

    @command("liveavatar evaluate sanity configs/eval_tiny.yaml")
    def sanity(file: SuiteFile, overrides: Overrides = None) -> None:
        """Do the measures rank what everybody can rank? Real above shifted above wrong speech above a still face; exit status 1 if one does not."""
        from liveavatar.core import ConfigError
        from liveavatar.evaluation import jobs
        from liveavatar.evaluation import sanity as ranking
        from liveavatar.evaluation.tables import sanity_table

        order, setting = jobs.read_evaluation(file, overrides or ()), _setting(ours)
        if order.suite is None:
            raise ConfigError(f"{file}: has no section suite")
        checks = ranking.ranking(jobs.open_suite(order.suite, setting), order.given())
        typer.echo("\n".join(sanity_table(checks)))
        raise typer.Exit(GATE_FAILED if any(check.ok is False for check in checks) else 0)


def _files(command: Callable, ours: Ours) -> None:
    """One file."""

    @command("liveavatar evaluate video talk.mp4 --text 'what is said in it' --portrait me.png --gate 'sync_index>=0.3'",
             "liveavatar evaluate video fast.mp4 --reference slow.mp4   [dim]picture by picture[/dim]")  # fmt: skip
    def video(
        file: Annotated[Path, typer.Argument(metavar="VIDEO", help="mp4, or whatever else FFmpeg reads.")],
        audio: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Judge against this recording instead of the video's own sound.")] = None,
        reference: Annotated[Optional[Path], typer.Option(metavar="VIDEO", help="What it should show, picture by picture.")] = None,
        portrait: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Who it should be.")] = None,
        text: Annotated[Optional[str], typer.Option(help="What is said; else phones are recognised, which is less exact.")] = None,
        language: Annotated[str, typer.Option(help="Of the speech; only en has a phone map.")] = "en",
        system: Annotated[Optional[str], typer.Option(help="Who made it, for the report. Default: the file's name.")] = None,
        driver_sha256: Annotated[Optional[str], typer.Option(metavar="HASH", help="SHA-256 of the audio model that drove it, if you know it: a "
                                                                                  "judge that is that model is called circular.")] = None,
        synthetic: Annotated[bool, typer.Option("--synthetic", help="It shows a rendered head, as every video of the embedded avatar: label every "
                                                                    "number so. Known without asking where --portrait is the embedded one.")] = False,
        out: Out = Path("evaluation"), config: Weights = None, gate: Gates = None,
    ) -> None:  # fmt: skip
        """Judge one video of any system."""
        from liveavatar.evaluation import jobs

        made = jobs.run_video(file, out, _setting(ours), system=jobs.SystemSettings(name=system, driver_sha256=driver_sha256),
                              gates=_gates(gate), backends=_backends(config), audio=audio, reference=reference, portrait=portrait, text=text,
                              language=language, synthetic=synthetic)  # fmt: skip
        _answer((made, out))

    @command("liveavatar evaluate statistics real/ --out real.npz --config configs/eval_short.yaml   [dim]then suite.real=real.npz[/dim]")
    def statistics(
        videos: Annotated[list[Path], typer.Argument(metavar="VIDEOS...", help="Real ones, all of one size: files, or folders of mp4.")],
        out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The npz to write.")] = Path("real.npz"),
        crop: Annotated[str, typer.Option(help="How they were cropped before; suite.crop must say the same of the judged videos.")] = "none",
        config: Weights = None,
    ) -> None:  # fmt: skip
        """What Inception and I3D see in a real set, for FID and FVD of a suite."""
        from liveavatar.evaluation import jobs

        sha = jobs.write_statistics(videos, out, _backends(config), crop)
        typer.echo(f"wrote {out}, SHA-256 {sha}")

    @command("liveavatar generate runtime.trace=run.jsonl --out run.mp4", "liveavatar evaluate trace run.jsonl --gate 'rtf_unpaced>=1.15'")
    def trace(
        file: Annotated[Path, typer.Argument(metavar="TRACE", help="JSON lines, as runtime.trace writes them (telemetry.py has the format).")],
        warmup: Annotated[int, typer.Option(min=0, metavar="BLOCKS", help="First blocks of each stream that do not count.")] = 2,
        again: Annotated[Optional[Path], typer.Option(metavar="TRACE", help="A second run of the same: were the pictures equal?")] = None,
        price: Annotated[Optional[float], typer.Option(min=0.0, help="Of the machine per hour, for the cost of a stream-minute.")] = None,
        out: Out = Path("evaluation"), gate: Gates = None,
    ) -> None:  # fmt: skip
        """Latency, throughput, underruns, offsets and memory of a run."""
        from liveavatar.evaluation import jobs

        _answer((jobs.run_trace(file, out, _setting(ours), warmup=warmup, price=price, again=again, gates=_gates(gate)), out))


def _reports(command: Callable, ours: Ours) -> None:
    """What is there already."""

    @command("liveavatar evaluate compare old/report.json new/report.json")
    def compare(
        a: Annotated[Path, typer.Argument(metavar="A.json", help="The report compared with.")],
        b: Annotated[Path, typer.Argument(metavar="B.json", help="The report that may be better.")],
    ) -> None:
        """Differences B - A with intervals; two suites are never compared."""
        from liveavatar.evaluation import report, tables

        one, two = report.read_report(a), report.read_report(b)
        typer.echo(tables.comparison(one, two, report.compare(one, two)), nl=False)

    @command("liveavatar evaluate doctor --config configs/eval_tiny.yaml")
    def doctor(config: Weights = None) -> None:
        """Every judge: those that come with packages, and the weights that only you can supply; versions, licences, where they are
        published. Exit status 1 if a file that you named is unusable."""
        from liveavatar.evaluation.backends import examine, offline

        for judge in offline():
            typer.echo(f"{judge.name}: {judge.note and f'missing. {judge.note}' or f'found, SHA-256 {judge.sha256}'}")
            typer.echo(f"    {judge.version}, for {judge.measures}; {judge.licence}")
        found = examine(_backends(config))
        for f in found:
            typer.echo(f"{f.known.name}: {f.state}. {f.note}")
            typer.echo(f"    {f.known.file}, for {f.known.measures}; {f.known.licence}; {f.known.published}")
        typer.echo("Nothing is ever downloaded: without its file a measure is `not measured`.")
        raise typer.Exit(GATE_FAILED if any(f.state in ("absent", "another file", "does not load") for f in found) else 0)


def _people(command: Callable, ours: Ours) -> None:
    """People's opinion."""

    @command("liveavatar evaluate human build --system ours=out/a --system theirs=out/b --exact real/ --out study")
    def build(
        system: Annotated[list[str], typer.Option("--system", "-s", metavar="NAME=FOLDER", help="A system and its folder of ITEM.mp4; give two or more.")],
        out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The study; its key is written beside it as FOLDER.key.json.")] = Path("study"),
        exact: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="Real or exact ITEM.mp4, for the anchors. Default: the first system's.")] = None,
        portraits: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="ITEM.png, for the question of likeness.")] = None,
        seed: Annotated[int, typer.Option(help="Of names, sheets and sides.")] = 0,
        sheets: Annotated[int, typer.Option(min=1, help="Different orders; raters open index.html#1, #2, ...")] = 24,
        pairs: Annotated[int, typer.Option(min=1, help="Pairs in a sheet.")] = 12,
        singles: Annotated[int, typer.Option(min=0, help="Single clips to rate in a sheet.")] = 6,
        side: Annotated[int, typer.Option(min=64, metavar="PIXELS", help="All clips are fitted into a square of this side (even).")] = 512,
        sliders: Annotated[bool, typer.Option("--sliders", help="Also sliders from 0 to 100, as the published study has.")] = False,
    ) -> None:  # fmt: skip
        """Make a folder that raters open in a browser, with no network; which clip is whose stays in the key."""
        from liveavatar.evaluation.human import build_study

        key = build_study(_systems(system), out, exact=exact, portraits=portraits, seed=seed, sheets=sheets, pairs=pairs, singles=singles, side=side,
                          sliders=sliders, report=_say)  # fmt: skip
        typer.echo(f"wrote {out}/index.html; keep {key} to yourself")

    @command("liveavatar evaluate human score study.key.json ratings-*.json --out evaluation")
    def score(
        key: Annotated[Path, typer.Argument(metavar="KEY.json", help="The study's key.")],
        files: Annotated[Optional[list[Path]], typer.Argument(metavar="[RATINGS.json]...", help="What raters sent.")] = None,
        out: Out = Path("evaluation"),
    ) -> None:
        """Win rates, strengths, mean opinions and agreement of the raters who count."""
        from liveavatar.evaluation import jobs

        _answer((jobs.score_people(key, files or (), out, _setting(ours)), out))


# ---------------------------------------------------------------- between the words and the work


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _setting(ours: Ours) -> Setting:
    from liveavatar.evaluation.jobs import Setting

    return Setting(command=" ".join(["liveavatar", *sys.argv[1:]]), ours=ours, say=_say)


def _answer(*made: tuple[Report, Path]) -> None:
    """Say what was found and where it stands; exit status 1 when a gate failed."""
    for report, out in made:
        measured = [m for m in report.metrics if m.measured]
        typer.echo(f"{report.kind}: {len(measured)} measures taken, {len(report.metrics) - len(measured)} not; see {out / 'report.md'}")
        for line in report.exclusions:
            typer.echo(f"left out: {line}")
        for gate in report.gates:
            verdict = {True: "met", False: "FAILED", None: "not judged"}[gate.ok]
            typer.echo(f"gate {gate.name} {gate.demand}: {verdict} ({gate.reason if gate.value is None else f'{gate.value:.4g}'})")
    if any(report.failed for report, _ in made):
        raise typer.Exit(GATE_FAILED)


def _gates(texts: Sequence[str] | None) -> dict:
    """"NAME>=VALUE" -> {NAME: {"min": VALUE}}; both sides of one name come together. Raises ConfigError."""
    from liveavatar.core import ConfigError

    demands: dict[str, dict[str, float]] = {}
    for text in texts or ():
        name, sign, value = next(((n, s, v) for s in (">=", "<=") for n, found, v in [text.rpartition(s)] if found), ("", "", ""))
        try:
            demands.setdefault(name.strip(), {})[{">=": "min", "<=": "max"}[sign]] = float(value)
        except (KeyError, ValueError):
            raise ConfigError(f"--gate {text!r}: must read NAME>=NUMBER or NAME<=NUMBER") from None
    return demands


def _backends(config: Path | None) -> Backends:
    """The weights a YAML file names under `backends`; its other keys are those of an evaluation and are not looked at."""
    from liveavatar.config import build, load_mapping
    from liveavatar.core import ConfigError
    from liveavatar.evaluation.backends import Backends, Given

    named = load_mapping(config).get("backends") or {} if config is not None else {}
    if not isinstance(named, dict):
        raise ConfigError(f"{config}: backends must be a mapping")
    return Backends({name: build(Given, value, str(config), f"backends.{name}") for name, value in named.items()})


def _systems(texts: Sequence[str]) -> dict[str, Path]:
    from liveavatar.core import ConfigError

    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, sign, folder) in zip(texts, pairs, strict=True) if not (name and sign and folder) or name.startswith("anchor:")]
    if wrong or len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"--system {wrong[0] if wrong else texts!r}: must read NAME=FOLDER, every name once")
    return {name: Path(folder) for name, _, folder in pairs}
