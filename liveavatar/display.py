"""What the command line shows of a running job: a bar on stderr, the outcome on stdout."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from liveavatar.core import FPS


class JobDisplay:
    """The bar of one `generate` job; call it after each block with what has been done so far.

    seconds: length of the speech where it is known, else None (a live source) and the bar has no end.
    done: the last that was heard of the job, None before its first block.
    """

    def __init__(self, seconds: float | None):
        self.done = None
        console = Console(stderr=True)
        self.bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("loading the models", total=seconds, state="")

    def __enter__(self) -> JobDisplay:
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def __call__(self, done) -> None:
        """done: generate.Done."""
        self.done = done
        state = f"{done.seconds:.1f} s, {done.rate:.1f} frames/s, first after {done.wait:.2f} s"
        self.bar.update(self.task, description="generating", completed=done.seconds, state=state)


def show_outcome(done, path: Path, verb: str = "wrote") -> None:
    """Print what a job made: the file, its length, frames per second, how long the first picture took."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{verb} [bold]{path}[/bold]: {done.seconds:.2f} s, {done.pictures} frames of "
                  f"{done.width}x{done.height} at {FPS} per second", markup=True)
    console.print(f"{done.rate:.1f} frames per second, first frame after {done.wait:.2f} s "
                  f"(models loaded in {done.loading:.1f} s)")
