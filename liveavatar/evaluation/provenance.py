"""Where a result comes from: this machine, this commit, the bytes of a file."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from liveavatar.core import InputError

LIBRARIES = ("torch", "numpy", "av", "opencv-python-headless", "onnxruntime")  # those that change a number


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises InputError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def host() -> dict:
    """Commit of what judges, CPU, cores, GPU, its driver, and the libraries of this machine."""
    facts = {"judge": commit(), "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "gpu": _gpu(), "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue  # not part of this result
    return facts


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _gpu() -> str:
    """Name and driver of the first GPU."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    driver = Path("/proc/driver/nvidia/version")
    text = driver.read_text(encoding="utf-8").split("\n")[0] if driver.exists() else "driver unknown"
    return f"{torch.cuda.get_device_name()} ({text})"


def commit() -> str:
    """Short commit of the tree this package lies in, with + when tracked files are changed; "unknown" outside one."""
    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
