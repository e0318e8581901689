"""`liveavatar evaluate gates`: the command. Registered by __main__; everything heavy is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from liveavatar.evaluation.report import Gate, Measure, Report

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "liveavatar evaluate gates --data data/tiny --probe runs/tiny/probe   [dim]the embedded avatar[/dim]\n\n"
    "liveavatar evaluate gates --data data/tiny --probe runs/tiny/probe --frames 1000 model.path=runs/tiny/default"
)
PROMPTS_EPILOG = "[bold]Example[/bold]\n\nliveavatar evaluate prompts --data data/tiny --prompt 'red shirt, green background'"
PICTURED = ("", "red shirt, white background", "blue shirt", "green background", "yellow shirt, purple background", "black shirt, orange background",
            "white shirt, black background", "wearing a green shirt, in front of a pink background")  # fmt: skip
FILE_WIDTH = 150  # columns of a table that goes into a file
VERDICTS = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[yellow]not measured[/yellow]"}


def gates(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Clips rendered by `train data`: its splits held and default are judged on.")],
    probe: Annotated[Path, typer.Option("--probe", metavar="DIR", help="The judge network: the folder that `train probe` wrote.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the run, e.g. model.path=DIR.")] = None,
    frames: Annotated[int, typer.Option(min=24, help="Length of the drift run in pictures.")] = 10_000,
    teacher: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Clips like those of --data whose pictures the teacher made.")] = None,
    full: Annotated[Optional[Path], typer.Option(metavar="DIR", help="The same checkpoint saved in float32.")] = None,
    speed: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="What bench/pipeline.py measured of the same weights.")] = None,
    clips: Annotated[Optional[int], typer.Option(min=2, help="At most so many clips of each group. Default: all.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.json", help="Report; export puts it into the card.")] = Path("gates.json"),
) -> None:
    """Judge a checkpoint by every gate of the training recipe. Exit status 1 when one fails; what was not measured says why."""
    from liveavatar import config as settings
    from liveavatar.core import InputError
    from liveavatar.evaluation import gates as judge
    from liveavatar.evaluation.report import write_json

    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.absolute().parent} does not exist: create it first")
    config = settings.load(None, overrides or ())
    job = judge.GateJob(data=data, probe=probe, frames=frames, teacher=teacher, full=full, speed=speed, clips=clips, seed=config.seed)
    report = judge.gates(config, job, " ".join(["liveavatar", *sys.argv[1:]]), lambda line: print(line, file=sys.stderr))
    write_json(report, out)
    show(report)
    typer.echo(f"wrote {out}")
    raise typer.Exit(1 if report.failed else 0)


def prompts(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Clips rendered by `train data`: portraits of held and default; colours of train.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the run, e.g. model.path=DIR.")] = None,
    prompt: Annotated[Optional[list[str]], typer.Option(metavar="TEXT", help="A row of the picture; may be repeated.")] = None,
    picture: Annotated[Path, typer.Option(metavar="FILE", help="What every person gives to every prompt.")] = Path("prompts.jpg"),
) -> None:
    """Ask people for other clothes and backdrops: how often the colour named is shown, and a picture to look at."""
    from liveavatar import config as settings
    from liveavatar.evaluation import prompts as asked
    from liveavatar.evaluation.gate_runs import Avatar, grouped_clips

    config = settings.load(None, overrides or ())
    parts, ceiling = asked.wardrobe(data)
    avatar, people, rows = Avatar(config), asked.people_of(grouped_clips(data)), prompt or list(PICTURED)
    answers = asked.answers_of(avatar, parts, people, asked.PER_PERSON, config.seed)
    for measure in asked.measures_of([answer for row in answers for answer in row], ceiling):
        typer.echo(f"{measure.name}: {measure} (n {measure.n}; {measure.reason})")
    asked.labelled(asked.table(avatar, people, rows, config.seed), ["portrait", *rows]).save(picture, quality=90)
    typer.echo(f"wrote {picture}")


def show(report: Report) -> None:
    """Tables of the gates and of the other measures."""
    from rich.console import Console
    from rich.table import Table

    known = {measure.name: measure for measure in report.metrics}
    table = Table(title=f"gates of {report.system.name} (synthetic suite {report.origin.name})")
    for column in ("gate", "value", "demand", "verdict", "n", "note"):
        table.add_column(column, justify="right" if column == "n" else "left")
    for gate in report.gates:
        table.add_row(*_row(gate, known.get(gate.name)))
    others = Table(title="other measures")
    for column in ("measure", "value", "n", "note"):
        others.add_column(column)
    for measure in report.metrics:
        if measure.name not in {gate.name for gate in report.gates}:
            others.add_row(measure.name, str(measure) if measure.measured else "not measured", str(measure.n), measure.reason)
    console = Console()
    console = console if console.is_terminal else Console(width=FILE_WIDTH)
    console.print(table, others)
    passed, failed = (sum(gate.ok is verdict for gate in report.gates) for verdict in (True, False))
    console.print(f"{passed} passed, {failed} failed, {len(report.gates) - passed - failed} not measured")


def _row(gate: Gate, measure: Measure | None) -> tuple[str, ...]:
    value = str(measure) if measure is not None and measure.measured else "-"
    note = measure.reason if measure is not None else gate.reason
    return gate.name, value, gate.demand, VERDICTS[gate.ok], str(measure.n) if measure is not None else "", note
