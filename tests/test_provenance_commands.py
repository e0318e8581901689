"""`liveavatar verify FILE`: one line on the mark, one on the manifest, and the exit status."""

import hashlib
import subprocess
import sys
import zlib

import numpy as np
import pytest
import typer
from test_watermark import KEY, PAYLOAD, clip, marked
from typer.testing import CliRunner

from liveavatar.__main__ import app
from liveavatar.conditioning.media import VideoWriter
from liveavatar.core import LiveAvatarError
from liveavatar.generate import PORTRAIT, Done
from liveavatar.serving.audit import FILE, FINISHED
from liveavatar.serving.eventlog import EventLog
from liveavatar.serving.provenance_commands import audit_commands, verify


@pytest.fixture
def run(tmp_path):
    """Runs verify on a file of tmp_path, with its folder as the server's."""
    (tmp_path / "watermark.key").write_bytes(KEY)
    app = typer.Typer()
    app.command()(verify)
    return lambda *words: CliRunner().invoke(app, [*map(str, words), "--folder", str(tmp_path)])


def written(path, pictures) -> None:
    with VideoWriter(path, *pictures[0].shape[1::-1]) as out:
        out.write(np.stack(pictures), np.zeros(len(pictures) * 640, np.float32))


def test_a_recording_as_the_server_leaves_it(run, tmp_path):
    pytest.importorskip("c2pa", reason="signing needs liveavatar[serve]")
    from liveavatar.serving.signing import Signer

    path = tmp_path / "talk.mp4"
    written(path, marked(clip(128, 128)))
    Signer(tmp_path / "keys").sign(path)
    result = run(path)
    assert result.exit_code == 0, result.output
    mark, manifest = result.output.splitlines()
    assert mark.startswith(f"watermark: found, payload 0x{PAYLOAD:08x}, confidence 1.0000, false alarm below ") and "25 pictures" in mark
    assert manifest == "C2PA: valid, says made by a machine, signed by liveavatar local signer, who is in no trust list here"
    known = {"kind": "record", "session": "S", "avatar": "ada", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    log = EventLog(tmp_path / FILE)
    log.append("server.started", {})
    log.append(FINISHED, known)
    log.close()
    assert run(path).output.splitlines()[2].startswith("event log: line 2, record of session S, avatar ada, finished 2")
    path.write_bytes(path.read_bytes().replace(b"trainedAlgorithmicMedia", b"digitalCaptureNotMadeXX"))
    result = run(path)
    assert result.exit_code == 0 and "C2PA: NOT valid: " in result.output  # the mark is in the pictures
    assert result.output.splitlines()[2] == "event log: no output of this server was exactly this file"
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes().replace(b"ada", b"bob"))
    assert "line 2 was changed" in run(path).output.splitlines()[2]


def test_what_make_demo_installs_is_enough(tmp_path):
    """Who has no liveavatar[serve] looks for the mark in what `generate` made."""
    written(tmp_path / "talk.mp4", marked(clip(128, 128)))
    (tmp_path / "watermark.key").write_bytes(KEY)
    missing = ("structlog", "fastapi", "aiortc", "c2pa", "cryptography", "httpx", "jwt", "prometheus_client", "uvicorn")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); from liveavatar.__main__ import main; sys.argv[0] = 'liveavatar'; main()"

    def run(*words):
        return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)

    made = run("verify", str(tmp_path / "talk.mp4"), "--folder", str(tmp_path))
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("watermark: found, ") and "C2PA: not checked" in made.stdout
    refused = run("audit", "verify")
    assert refused.returncode == 2 and refused.stderr == "error: this needs structlog: pip install 'liveavatar[serve]'\n"


def test_another_video_and_another_key(run, tmp_path):
    pytest.importorskip("c2pa", reason="signing needs liveavatar[serve]")
    path = tmp_path / "other.mp4"
    written(path, clip(128, 128))
    result = run(path, "--pictures", 5)
    assert result.exit_code == 1
    mark, manifest = result.output.splitlines()
    assert mark.startswith("watermark: not found with this key (correlation ") and mark.endswith("5 pictures)")
    assert manifest == "C2PA: no manifest"


def test_files_are_marked_unless_somebody_says_no(run, tmp_path, monkeypatch):
    """`generate` marks what it writes, with the portrait's checksum and the key that `verify` reads (WM-1)."""
    jobs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("liveavatar.generate.generate", lambda settings, job, report: jobs.append(job) or Done())
    monkeypatch.setattr("liveavatar.display.show_outcome", lambda done, out: None)
    for words in ([], ["--key", "own.key"], ["--no-watermark"]):
        (tmp_path / "own.key").write_bytes(KEY)
        assert CliRunner().invoke(app, ["generate", *words]).exit_code == 0
    assert jobs[2].marker is None and len((tmp_path / "var" / "watermark.key").read_bytes()) == 32
    mark = jobs[1].marker(128, 128)
    written(tmp_path / "made.mp4", [mark(picture) for picture in clip(128, 128, 12)])
    assert f"found, payload 0x{zlib.crc32(PORTRAIT.read_bytes()):08x}" in run(tmp_path / "made.mp4", "--key", tmp_path / "own.key").output
    assert run(tmp_path / "made.mp4", "--key", tmp_path / "var" / "watermark.key").exit_code == 1


def test_what_cannot_be_read_and_a_missing_key(run, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    assert isinstance(run(tmp_path / "text.mp4").exception, LiveAvatarError)  # the guard of the command line makes it status 2
    (tmp_path / "watermark.key").unlink()
    result = run(tmp_path / "text.mp4")
    assert isinstance(result.exception, LiveAvatarError) and "--key" in str(result.exception) and not (tmp_path / "watermark.key").exists()


def test_the_audit_log(tmp_path):
    log, app = EventLog(tmp_path / FILE), typer.Typer()
    for n in range(3):
        log.append("session.closed", {"id": n})
    log.close()
    app.add_typer(audit_commands(lambda function: function))
    check = lambda *words: CliRunner().invoke(app, ["audit", "verify", "--folder", str(tmp_path), *words])  # noqa: E731
    whole = check()
    assert whole.exit_code == 0 and whole.output.startswith("3 lines, all whole; head 3:")
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(lines[:2]))
    assert check().exit_code == 0 and check("--head", whole.output.split("head ")[1].strip()).exit_code == 1
    (tmp_path / FILE).write_bytes(lines[0] + lines[2])
    broken = check()
    assert broken.exit_code == 1 and "line 2 does not follow" in broken.output
