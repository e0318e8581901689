"""What every bench has in common: its options, the machine, the commit, seconds of a call, rows that outlive each other, the JSON and the table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GPU_LOST = 75  # exit status: a kernel has broken this process's GPU; another one, with --resume, goes on
TRIES = 2  # at a row that never ended (a crash, the time was up), over all runs with --resume


def machine() -> dict:
    """Host, processor and GPU as the JSON names them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "python": platform.python_version(), "torch": torch.__version__}


def commit() -> str:
    """Commit of the working tree, with + when it is changed; in a copy without its history, or without git, LIVEAVATAR_COMMIT or "unknown"."""
    run = lambda *args: subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
    try:
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LIVEAVATAR_COMMIT", "unknown")


def settle(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeat: int, warm: int = 2) -> list[float]:
    """Wall-clock seconds of `repeat` calls, each waited for, after `warm` untimed ones."""
    taken = []
    for number in range(warm + repeat):
        settle(device)
        began = time.perf_counter()
        call()
        settle(device)
        if number >= warm:
            taken.append(time.perf_counter() - began)
    return taken


def spread_of(taken: Sequence[float]) -> dict[str, float]:
    """Median and worst of some seconds."""
    return {"seconds": statistics.median(taken), "worst": max(taken)}


def matmul_rate(device: torch.device, size: int, fp8: bool = False) -> float:
    """TFLOP/s of a square bf16 (or E4M3, per-row scales) product of random numbers: the roofline of this machine, now."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if fp8:
        ones = torch.ones(size, 1, device=device)
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        call = lambda: torch._scaled_mm(a, b.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    else:
        call = lambda: a @ b  # noqa: E731
    return 2 * size**3 / statistics.median(seconds(call, device, 10, warm=3)) / 1e12


def parser_of(doc: str, out: str, compare: bool = True, resume: bool = False) -> argparse.ArgumentParser:
    """Options of a bench that explains itself by `doc`: --out (default: results/`out`), if its rows can be compared --compare, if it has Rows --resume."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS / out)
    if compare:
        made.add_argument("--compare", type=Path, metavar="JSON", help="of an earlier run: its figures become columns")
    if resume:
        made.add_argument("--resume", action="store_true", help="keep the rows that --out has from this commit, and make the others")
    return made


def write(out: Path, *, complete: bool = True, **content: object) -> None:
    """The JSON of a run: machine, commit and what the bench has, usually config and rows. complete: False while rows are to come, so that
    a run that is cut off leaves what it had."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps({"machine": machine(), "commit": commit(), "complete": complete, **content}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out)
    if complete:
        print(out)


class Rows:
    """Rows of a bench, one after the other: each is in the JSON before the next begins, and one that fails is a row that says why.

    keys: what names a row. said: what else the JSON has. resume: rows that `out` has from this commit are not made again.
    """

    def __init__(self, out: Path, keys: Sequence[str], device: torch.device, said: dict, resume: bool = False):
        self.out, self.keys, self.device, self.said = out, keys, device, said
        before = json.loads(out.read_text(encoding="utf-8")) if resume and out.exists() else {}
        self.made: list[dict] = before["rows"] if before.get("commit") == commit() else []

    def add(self, name: dict, measure: Callable[[], dict], problem: str | None = None) -> None:
        """The row `name` with what measure() finds. problem: why it is not even tried. Ends the process where its GPU is lost."""
        found = next((row for row in self.made if all(row.get(key) == name.get(key) for key in self.keys)), None)
        if found is not None and found.get("tries", TRIES) >= TRIES:
            return
        row, lost = name | {"problem": "did not end", "tries": (found or {}).get("tries", 0) + 1}, False
        self.made = [other for other in self.made if other is not found] + [row]
        self.write(complete=False)
        try:
            result = {"problem": problem} if problem else measure()
        except Exception as error:  # whatever it is, the other ways are wanted too
            result = {"problem": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            lost = self._lost()
        self.made[-1] = name | result
        print(" ".join(f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.made[-1].items()), flush=True)
        self.write(complete=False)
        if lost:
            sys.exit(GPU_LOST)
        gc.collect()

    def write(self, complete: bool = True) -> None:
        """The JSON as it stands."""
        write(self.out, complete=complete, **self.said, rows=self.made)

    def _lost(self) -> bool:
        """After an illegal access every call to the GPU fails until the process ends."""
        try:
            settle(self.device)
        except RuntimeError:
            return True
        return False


def earlier(path: Path | None, keys: Sequence[str]) -> dict[tuple, dict]:
    """Rows of an earlier run by their keys; none without a path."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path else []
    return {tuple(row.get(key) for key in keys): row for row in rows}


def show(title: str, rows: list[dict], columns: dict[str, str], keys: Sequence[str] = (), before: dict[tuple, dict] | None = None,
         compared: Sequence[str] = ("seconds",)) -> None:
    """A table of rows. columns: key -> format; before: `earlier` rows by their `keys`, whose figures `compared` become columns."""
    table = Table(title=title)
    for name in (*columns, *(text for key in compared if before for text in (f"{key} before", "change"))):
        table.add_column(name)
    for row in rows:
        cells = ["-" if row.get(name) is None else format(row[name], form) for name, form in columns.items()]
        for name in compared if before else ():
            old, new = before.get(tuple(row.get(key) for key in keys), {}).get(name), row.get(name)
            cells += ["-" if old is None else format(old, columns.get(name, "")), f"{new / old - 1:+.1%}" if old and new is not None else "-"]
        table.add_row(*cells)
    Console(width=170).print(table)
