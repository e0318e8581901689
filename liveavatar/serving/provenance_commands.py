"""`liveavatar verify FILE`, `liveavatar consent verify|list` and `liveavatar audit verify`."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    import numpy as np

    from liveavatar.serving.consent import Consent
    from liveavatar.serving.signing import Manifest
    from liveavatar.serving.watermark import Reading

Mark = Callable[["np.ndarray"], "np.ndarray"]  # uint8 [H, W, 3] -> the same
NOT_FOUND = 1  # exit status of verify without a mark, and of the others with a problem; unreadable is 2
VERIFY_EPILOG = (
    "[bold]Examples[/bold]\n\nliveavatar verify talk.mp4   [dim]with the key of the server in ./var[/dim]\n\n"
    "liveavatar verify clip.mkv --key watermark.key --pictures 2000"
)

FOLDER = Path("var")
Folder = Annotated[Path, typer.Option("--folder", "-f", metavar="FOLDER", help="The server's storage.folder.")]
Head = Annotated[Optional[str], typer.Option(metavar="LINES:HASH", help="A head that was noted earlier: shows a cut-off end too.")]


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Any video that FFmpeg reads.")],
    key: Annotated[Optional[Path], typer.Option("--key", "-k", metavar="FILE", help="The watermark's key. Default: watermark.key in the folder.")] = None,
    folder: Folder = FOLDER,
    pictures: Annotated[int, typer.Option(min=1, help="How many pictures to read; 25 are enough of most video.")] = 500,
    deep: Annotated[bool, typer.Option("--deep", help="Also try every size from 0.6 to 1.6 times: a part cut out and enlarged. Slow: give --pictures 25.")] = False,
) -> None:
    """Is this video ours? Its watermark and its C2PA manifest, a line each. Exit status 0: watermark found, 1: not found, 2: cannot be read."""
    from liveavatar.core import ConfigError
    from liveavatar.serving import watermark

    key = key or folder / watermark.KEY_FILE
    if not key.is_file():
        raise ConfigError(f"{key}: no such key: name the watermark's key with --key, or the server's folder with --folder")
    reading = watermark.read_video(file, watermark.server_key(folder, key), pictures, deep)
    typer.echo(watermark_line(reading))
    typer.echo(_manifest(file))
    raise typer.Exit(0 if reading.found else NOT_FOUND)


def file_marker(portrait: Path, key: Path | None) -> Callable[[int, int], Mark]:
    """(height, width) -> what marks every picture of a file made of this portrait: its CRC-32 is the payload. key: None: that of FOLDER,
    made at first use. Raises ConfigError."""
    from liveavatar.serving import watermark

    secret = watermark.server_key(FOLDER, key)
    return lambda height, width: watermark.Watermark(secret, zlib.crc32(portrait.read_bytes()), height, width).mark


def watermark_line(reading: Reading) -> str:
    """One line about a mark."""
    seen = f"correlation {reading.z:.1f}, {reading.needed:.1f} needed; {reading.pictures} pictures"
    if not reading.found:
        return f"watermark: not found with this key ({seen})"
    return (f"watermark: found, payload 0x{reading.payload:08x}, confidence {reading.confidence:.4f}, "
            f"false alarm below {max(reading.false_alarm, 1e-99):.0e} ({seen})")  # fmt: skip


def manifest_line(manifest: Manifest) -> str:
    """One line about a manifest."""
    if not manifest.found:
        return "C2PA: no manifest"
    if not manifest.valid:
        return f"C2PA: NOT valid: {', '.join(manifest.problems)}"
    trust = "who is in a trust list" if manifest.trusted else "who is in no trust list here"
    made = "says made by a machine" if manifest.made_by_machine else "does not say how it was made"
    return f"C2PA: valid, {made}, signed by {manifest.signer or 'somebody without a name'}, {trust}"


def _manifest(file: Path) -> str:
    import importlib.util

    from liveavatar.serving import signing

    if importlib.util.find_spec("c2pa") is None:
        return "C2PA: not checked (pip install 'liveavatar[serve]')"
    return manifest_line(signing.inspect(file))


def consent_commands(guard: Callable) -> typer.Typer:
    """The sub-app `consent`. guard: makes of a function one whose errors are a line on stderr."""
    app = typer.Typer(name="consent", no_args_is_help=True, rich_markup_mode="rich", help="Who allowed what to be done with whose face.")
    app.command("verify")(guard(verify_consents))
    app.command("list")(guard(list_consents))
    return app


def verify_consents(folder: Folder = FOLDER, head: Head = None) -> None:
    """Check the chain, every signature and every statement. Exit status 1 when something is wrong."""
    from liveavatar.serving import consent, eventlog

    problems = consent.verify(folder, _head(head))
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(NOT_FOUND)
    lines, last = eventlog.head(folder / consent.LOG)
    typer.echo(f"{len(consent.consents(folder))} consents, all whole; head {lines}:{last}")


def list_consents(folder: Folder = FOLDER) -> None:
    """All consents: id, state, what for, until when, how it is known, by whom, whose face."""
    from liveavatar.serving import consent

    for given in consent.consents(folder):
        typer.echo(consent_line(given, time.time()))


def audit_commands(guard: Callable) -> typer.Typer:
    """The sub-app `audit`. guard: as of consent_commands."""
    app = typer.Typer(name="audit", no_args_is_help=True, rich_markup_mode="rich", help="What a server did: its tamper-evident log.")
    app.callback()(lambda: None)  # one command, and still named
    app.command("verify")(guard(verify_audit))
    return app


def verify_audit(folder: Folder = FOLDER, head: Head = None) -> None:
    """Check the chain of the event log. Exit status 1 at the first wrong line."""
    from liveavatar.serving import eventlog
    from liveavatar.serving.audit import FILE

    path = folder / FILE
    broken = eventlog.check(path, _head(head))
    if broken is not None:
        typer.echo(f"{path}: line {broken.line} {broken.reason}")
        raise typer.Exit(NOT_FOUND)
    lines, last = eventlog.head(path)
    typer.echo(f"{lines} lines, all whole; head {lines}:{last}")


def consent_line(consent: Consent, now: float) -> str:
    """One line about a consent. now: Unix seconds."""
    until = "for ever" if consent.expires is None else time.strftime("until %Y-%m-%d %H:%M UTC", time.gmtime(consent.expires))
    who = "(erased)" if consent.statement is None else f"by {consent.statement.uploader}: {consent.statement.subject}"
    return f"{consent.id}  {consent.state(now):8} {','.join(consent.scope)} {until} {consent.method} {who}"


def _head(text: str | None) -> tuple[int, str] | None:
    if text is None:
        return None
    lines, _, last = text.partition(":")
    if not lines.isdigit() or len(last) != 64:
        raise typer.BadParameter("a head is LINES:HASH, as `consent verify` prints it")
    return int(lines), last
