"""Consents (serving.md 19.2): granted, checked, revoked, erased; forged ones show."""

import json
import threading

import pytest
import typer
from typer.testing import CliRunner

from liveavatar.core import ConfigError
from liveavatar.serving import consent
from liveavatar.serving.consent import ConsentLog, Statement, consents, media_hash, verify
from liveavatar.serving.eventlog import START, LogError, canonical
from liveavatar.serving.problems import Forbidden, NotFound, Unprocessable
from liveavatar.serving.provenance_commands import consent_commands

NOW, PICTURE = 1_800_000_000.0, media_hash(b"a picture")


def statement(**changes) -> Statement:
    return Statement(**{"subject": "Ada Lovelace", "scope": ("conversation", "recording"), "expires": NOW + 100, "uploader": "acme", "method": "document",
                        **changes})  # fmt: skip


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(tmp_path, clock):
    log = ConsentLog(tmp_path, clock)
    yield log
    log.close()


def refusal(log, *args, **named) -> str:
    with pytest.raises(Forbidden) as error:
        log.check(*args, **named)
    return error.value.kind


def test_a_consent_covers_what_it_says_and_no_more(log, clock):
    given = log.grant(statement(), PICTURE)
    assert log.check(given.id, "acme", use="recording", media=PICTURE) == given == log.get(given.id)
    assert refusal(log, given.id, "acme", use="livestream") == "consent_scope"
    assert refusal(log, given.id, "acme", media=media_hash(b"another")) == "consent_media"
    assert refusal(log, given.id, "others") == refusal(log, "con_" + "0" * 24, "acme") == "consent_required"
    clock.now += 100
    assert refusal(log, given.id, "acme") == "consent_expired" and given.state(clock.now) == "expired"


def test_revocation_counts_at_once_and_outlives_a_restart(log, clock, tmp_path):
    given = log.grant(statement(expires=None), PICTURE)
    for _ in range(2):
        assert log.revoke(given.id, by="acme", reason="asked").state(NOW) == "revoked" == log.get(given.id).state(NOW)
    assert refusal(log, given.id, "acme") == "consent_revoked"
    log.close()
    again = ConsentLog(tmp_path, clock)
    assert refusal(again, given.id, "acme") == "consent_revoked" and verify(tmp_path) == []
    again.close()


def test_who_asks_does_not_wait_for_the_disk(log, monkeypatch):
    """The media clock asks twice a second for every session, while a thread may wait for an fsync."""
    given, begun, go = log.grant(statement(), PICTURE), threading.Event(), threading.Event()
    monkeypatch.setattr(consent, "replace_file", lambda file, data: begun.set() or go.wait(10))
    writing = threading.Thread(target=lambda: log.grant(statement(subject="Grace"), PICTURE))
    writing.start()
    assert begun.wait(10)
    asking = threading.Thread(target=lambda: [log.check(given.id, "acme"), log.get(given.id), log.all()], daemon=True)
    asking.start()
    asking.join(5)
    waited = asking.is_alive()
    go.set()
    writing.join()
    assert not waited and len(log.all()) == 2


def test_erasure_leaves_no_word_about_the_person_and_the_chain_whole(log, tmp_path):
    kept, given = log.grant(statement(subject="Grace"), PICTURE), log.grant(statement(), PICTURE)
    erased = log.erase(given.id, by="acme")
    assert erased.statement is None and erased.state(NOW) == "erased" and log.erase(given.id, by="acme") == erased
    assert refusal(log, given.id, "acme") == "consent_revoked"
    everything = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert b"Lovelace" not in everything and b"Grace" in everything
    assert verify(tmp_path) == [] and consents(tmp_path)[0] == kept


def test_the_chain_itself_names_nobody(log, tmp_path):
    log.grant(statement(), PICTURE)
    line = (tmp_path / consent.LOG).read_text()
    assert "Ada" not in line and "acme" not in line
    twin = log.grant(statement(), PICTURE)
    assert len({c.details for c in log.all()}) == 2 and twin.details in (tmp_path / consent.LOG).read_text()  # salted


def test_a_changed_or_missing_statement_shows(log, tmp_path):
    one, two = log.grant(statement(), PICTURE), log.grant(statement(), PICTURE)
    file = tmp_path / consent.DETAILS / f"{one.id}.json"
    file.write_bytes(file.read_bytes().replace(b"Ada", b"Eve"))
    (tmp_path / consent.DETAILS / f"{two.id}.json").unlink()
    assert [p.split(":")[0] for p in verify(tmp_path)] == [one.id, two.id]


def rewritten(tmp_path, **changes) -> None:
    """The log anew with a right chain, as somebody without the key can."""
    import hashlib

    previous, lines = START, []
    for n, line in enumerate((tmp_path / consent.LOG).read_bytes().splitlines()):
        body = {**json.loads(line), "prev": previous, "n": n}
        body["data"] = {**body["data"], **changes}
        body.pop("hash")
        previous = hashlib.sha256(canonical(body)).hexdigest()
        lines.append(canonical({**body, "hash": previous}) + b"\n")
    (tmp_path / consent.LOG).write_bytes(b"".join(lines))


def test_a_longer_consent_cannot_be_forged_without_the_key(log, tmp_path):
    log.grant(statement(), PICTURE)
    rewritten(tmp_path)
    assert verify(tmp_path) == []
    rewritten(tmp_path, expires=NOW + 1e6)
    assert "signature" in verify(tmp_path)[0]


@pytest.mark.parametrize("changes", [{"id": "../../etc/passwd"}, {"id": 7}, {"scope": 5}, {"extra": 1}])
def test_a_rewritten_log_names_no_files_and_crashes_nothing(log, tmp_path, changes):
    log.grant(statement(), PICTURE)
    rewritten(tmp_path, **changes)
    with pytest.raises(LogError, match="line 1"):
        verify(tmp_path)


def test_what_a_crash_left_half_done_is_finished(log, clock, tmp_path):
    given = log.grant(statement(), PICTURE)
    file = tmp_path / consent.DETAILS / f"{given.id}.json"
    words = file.read_bytes()
    log.erase(given.id, by="acme")
    log.close()
    file.write_bytes(words)  # the power went before the file was gone
    orphan = tmp_path / consent.DETAILS / f"con_{'1' * 24}.json"  # ... or before the grant was in the log
    orphan.write_bytes(words)
    assert "still there" in verify(tmp_path)[0]
    ConsentLog(tmp_path, clock).close()
    assert not file.exists() and not orphan.exists() and verify(tmp_path) == []


@pytest.mark.parametrize("changes", [{"subject": ""}, {"subject": "a\nb"}, {"subject": "x" * 201}, {"scope": ()}, {"scope": ("fame",)},
                                     {"scope": ("recording", "recording")}, {"method": "trust me"}, {"expires": float("nan")},
                                     {"expires": -1.0}, {"uploader": " "}])  # fmt: skip
def test_unusable_statements_are_refused(changes):
    with pytest.raises(Unprocessable, match="consent"):
        statement(**changes)


def test_unusable_grants_are_refused(log):
    with pytest.raises(Unprocessable, match="past"):
        log.grant(statement(expires=NOW), PICTURE)
    with pytest.raises(Unprocessable, match="SHA-256"):
        log.grant(statement(), "me.png")
    with pytest.raises(NotFound):
        log.revoke("con_none", by="acme")


def test_a_foreign_public_key_is_refused(log, clock, tmp_path):
    log.close()
    (tmp_path / consent.PUBLIC).write_text("-----BEGIN PUBLIC KEY-----")
    with pytest.raises(ConfigError, match="public"):
        ConsentLog(tmp_path, clock)
    with pytest.raises(ConfigError, match="PEM"):
        verify(tmp_path)


def test_the_command_line(log, tmp_path):
    given = log.grant(statement(expires=None), PICTURE)
    app, run = typer.Typer(), CliRunner()
    app.add_typer(consent_commands(lambda function: function))
    listed = run.invoke(app, ["consent", "list", "--folder", str(tmp_path)])
    assert listed.exit_code == 0 and given.id in listed.output and "valid" in listed.output and "Ada Lovelace" in listed.output
    whole = run.invoke(app, ["consent", "verify", "--folder", str(tmp_path)])
    assert whole.exit_code == 0 and whole.output.startswith("1 consents, all whole; head 1:")
    head = whole.output.split("head ")[1].strip()
    (tmp_path / consent.LOG).write_bytes(b"")
    cut = run.invoke(app, ["consent", "verify", "--folder", str(tmp_path), "--head", head])
    assert cut.exit_code == 1 and "is missing" in cut.output
