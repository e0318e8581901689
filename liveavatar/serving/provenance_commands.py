"""`liveavatar verify VIDEO`, `liveavatar consent verify|list` and `liveavatar audit verify`."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    import numpy as np

    from liveavatar.serving.consent import Consent
    from liveavatar.serving.fragments import Stream
    from liveavatar.serving.signing import Manifest
    from liveavatar.serving.watermark import Reading

Mark = Callable[["np.ndarray"], "np.ndarray"]  # uint8 [H, W, 3] -> the same
NOT_FOUND = 1  # exit status of verify without a mark, and of the others with a problem; unreadable is 2
VERIFY_EPILOG = (
    "[bold]Examples[/bold]\n\nliveavatar verify talk.mp4   [dim]with the key of the server in ./var[/dim]\n\n"
    "liveavatar verify clip.mkv --key watermark.key --pictures 2000\n\n"
    "liveavatar verify https://host/live/index.m3u8   [dim]HLS, also as a folder: mark and signed side-car; a bearer in LIVEAVATAR_TOKEN[/dim]\n\n"
    "liveavatar verify rtmp://host/live/name --seconds 20   [dim]whatever FFmpeg reads: rtmp, rtsp, srt, http[/dim]"
)
TOKEN = "LIVEAVATAR_TOKEN"  # environment: for an HLS playlist that is not public; keys are no arguments
TRUST = {"C2PA": ("who is in no trust list here", "who is in a trust list"),
         "side-car": ("whom the folder does not know", "who is the folder's server")}  # fmt: skip

FOLDER = Path("var")
Folder = Annotated[Path, typer.Option("--folder", "-f", metavar="FOLDER", help="The server's storage.folder.")]
Head = Annotated[Optional[str], typer.Option(metavar="LINES:HASH", help="A head that was noted earlier: shows a cut-off end too.")]


def verify(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="What FFmpeg reads: a file, the URL of a stream, the folder or playlist of HLS.")],
    key: Annotated[Optional[Path], typer.Option("--key", "-k", metavar="FILE", help="The watermark's key. Default: watermark.key in the folder.")] = None,
    folder: Folder = FOLDER,
    pictures: Annotated[int, typer.Option(min=1, help="How many pictures to read; 25 are enough of most video.")] = 500,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long to listen to a stream, at most.")] = 60.0,
    deep: Annotated[bool, typer.Option("--deep", help="Also try every size from 0.6 to 1.6 times: a part cut out and enlarged. Slow: give --pictures 25.")] = False,
) -> None:
    """Is this video ours? Its watermark and its signature, a line each. Exit status 0: watermark found, 1: not found, 2: cannot be read."""
    from liveavatar.core import ConfigError
    from liveavatar.serving import watermark

    key = key or folder / watermark.KEY_FILE
    if not key.is_file():
        raise ConfigError(f"{key}: no such key: name the watermark's key with --key, or the server's folder with --folder")
    fragments, is_url = _fragments(video, folder), "://" in video
    source = fragments.media if fragments else video if is_url else Path(video)
    reading = watermark.read_video(source, watermark.server_key(folder, key), pictures, deep, seconds=seconds)
    typer.echo(watermark_line(reading))
    if fragments:
        typer.echo(f"{fragments.checked} fragments: {manifest_line(fragments.manifest, 'side-car')}")
    else:
        typer.echo("C2PA: a stream carries no manifest" if is_url else _manifest(Path(video)))
    if not (fragments or is_url) and (line := _logged(Path(video), folder)):
        typer.echo(line)
    raise typer.Exit(0 if reading.found else NOT_FOUND)


def _fragments(video: str, folder: Path) -> Stream | None:
    """Of an HLS stream of fragmented mp4, where `video` names one. Raises InputError."""
    import importlib.util
    from urllib.parse import urlsplit

    from liveavatar.core import ConfigError
    from liveavatar.serving import fragments, signing

    path = Path(video)
    if video.startswith(("http://", "https://")) and (name := urlsplit(video).path.rpartition("/")[2]).endswith(".m3u8"):
        read = fragments.web_reader(video, os.environ.get(TOKEN))
    elif path.is_dir() or path.suffix == ".m3u8":
        home, name = (path, fragments.PLAYLIST) if path.is_dir() else (path.parent, path.name)
        read = fragments.folder_reader(home)
    else:
        return None
    if missing := [name for name in ("httpx", "jwt", "cryptography") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"an HLS stream is checked with {', '.join(missing)}: pip install 'liveavatar[serve]'")
    authority = folder / signing.AUTHORITY
    return fragments.fetched(read, name, authority.read_bytes() if authority.is_file() else b"")


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


def manifest_line(manifest: Manifest, what: str = "C2PA") -> str:
    """One line about a manifest, or what stands for one."""
    if not manifest.found:
        return f"{what}: {'no manifest' if what == 'C2PA' else 'none'}"
    if not manifest.valid:
        return f"{what}: NOT valid: {', '.join(manifest.problems)}"
    trust = TRUST[what][manifest.trusted]
    made = "says made by a machine" if manifest.made_by_machine else "does not say how it was made"
    return f"{what}: valid, {made}, signed by {manifest.signer or 'somebody without a name'}, {trust}"


def _manifest(file: Path) -> str:
    import importlib.util

    from liveavatar.serving import signing

    if importlib.util.find_spec("c2pa") is None:
        return "C2PA: not checked (pip install 'liveavatar[serve]')"
    return manifest_line(signing.inspect(file))


def _logged(file: Path, folder: Path) -> str | None:
    """What the server's event log says of a file; None where no server has been, as without what serving needs."""
    import importlib.util

    if importlib.util.find_spec("structlog") is None:
        return None
    from liveavatar.serving.audit import FILE

    return log_line(file, folder / FILE) if (folder / FILE).is_file() else None


def log_line(file: Path, log: Path) -> str:
    """One line about what an event log says of a file."""
    from hashlib import file_digest

    from liveavatar.serving import eventlog
    from liveavatar.serving.audit import FINISHED

    with file.open("rb") as stream:
        digest = file_digest(stream, "sha256").hexdigest()
    try:
        found = [record for record in eventlog.read(log) if record.name == FINISHED and record.data["sha256"] == digest]
    except eventlog.LogError as error:
        return f"event log: {error}"
    if not found:
        return "event log: no output of this server was exactly this file"
    line, said = found[0], found[0].data
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(line.t))
    return f"event log: line {line.n + 1}, {said['kind']} of session {said.get('session')}, avatar {said.get('avatar')}, finished {when}"


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
