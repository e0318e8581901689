"""The chained log: every kind of tampering shows, a crash in mid-line is survived and said."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar.serving.eventlog import TORN, Broken, EventLog, LogError, canonical, check, read


@pytest.fixture
def path(tmp_path):
    """A log of five lines."""
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: 1_800_000_000.1234)
    for n in range(5):
        log.append("session.opened", {"id": f"s{n}", "name": "Zoë", "n": n})
    log.close()
    return log.path


def test_what_was_written_is_read_and_later_lines_follow(path):
    assert check(path) is None
    records = list(read(path))
    assert [r.data["id"] for r in records] == [f"s{n}" for n in range(5)] and records[0].t == 1_800_000_000.123
    log = EventLog(path, clock=lambda: 2.0)
    last = log.append("server.stopped", {})
    assert last.prev == records[-1].hash and log.head == (6, last.hash) and check(path) is None
    assert path.stat().st_mode & 0o777 == 0o600


def test_known_hash(tmp_path):
    """The format is a promise to whoever verifies with another program: sha256sum of the line without its hash."""
    log = EventLog(tmp_path / "a", clock=lambda: 0.0)
    assert log.append("a", {"b": 1}).hash == "88c825bf7bb4c33935a3db74afee7676634740c5b75609e85f823c2812e5feb8"


def changed(lines: list[bytes], how: str) -> list[bytes]:
    if how == "data":
        return [*lines[:2], lines[2].replace(b'"s2"', b'"s9"'), *lines[3:]]
    if how == "removed":
        return lines[:2] + lines[3:]
    if how == "first removed":
        return lines[1:]
    if how == "swapped":
        return [*lines[:2], lines[3], lines[2], lines[4]]
    if how == "doubled":
        return [*lines[:3], lines[2], *lines[3:]]
    if how == "blank":
        return [*lines[:2], lines[2].replace(b",", b", ", 1), *lines[3:]]
    if how == "rehashed":  # one line forged with a right hash of its own
        forged = json.loads(lines[2])
        forged["data"]["id"] = "s9"
        forged.pop("hash")
        import hashlib

        forged["hash"] = hashlib.sha256(canonical(forged)).hexdigest()
        return [*lines[:2], canonical(forged) + b"\n", *lines[3:]]
    return [*lines[:2], b"[1]\n", *lines[3:]]


@pytest.mark.parametrize("how, line", [("data", 3), ("removed", 3), ("first removed", 1), ("swapped", 3), ("doubled", 4), ("blank", 3),
                                       ("rehashed", 4), ("other JSON", 3)])  # fmt: skip
def test_the_first_wrong_line_is_named_and_the_log_takes_no_more(path, how, line):
    path.write_bytes(b"".join(changed(path.read_bytes().splitlines(keepends=True), how)))
    assert check(path).line == line
    with pytest.raises(LogError, match=f"line {line}"):
        EventLog(path)
    with pytest.raises(LogError, match=f"line {line}"):
        list(read(path))


@given(at=st.integers(0, 10_000), mask=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_shows(tmp_path_factory, at, mask):
    path = tmp_path_factory.mktemp("log") / "log"
    log = EventLog(path, clock=lambda: 5.0)
    for n in range(3):
        log.append("x", {"n": n})
    log.close()
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= mask
    path.write_bytes(data)
    assert isinstance(check(path), Broken)


@given(st.lists(st.binary(max_size=40), max_size=5))
@settings(max_examples=60, deadline=None)
def test_rubbish_is_broken_and_never_raises(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(b"\n".join(lines))
    assert (check(path) is None) == (not path.read_bytes())


def test_a_cut_off_end_shows_against_a_published_head(path):
    whole = path.read_bytes()
    log = EventLog(path)
    head = log.head
    log.close()
    assert check(path, head) is None
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert check(path) is None and check(path, head) == Broken(4, "is missing: 5 lines were published")
    path.write_bytes(whole)
    assert check(path, (5, "0" * 64)).line == 5


@pytest.mark.parametrize("left", [1, 40])
def test_an_unfinished_last_line_is_set_aside_and_said(path, left):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:-left])
    assert check(path) == Broken(5, "was not finished", torn=True)
    log = EventLog(path)
    records = list(read(path))
    assert [r.name for r in records[4:]] == [TORN] and records[4].data["bytes"] == len(lines[4]) - left
    assert (path.parent / records[4].data["file"]).read_bytes() == lines[4][:-left]
    log.append("goes.on", {})
    assert check(path) is None


def test_one_writer(path):
    log = EventLog(path)
    with pytest.raises(LogError, match="another process"):
        EventLog(path)
    log.close()
    EventLog(path).close()


def test_a_closed_log_and_what_is_no_json_are_refused(path):
    log = EventLog(path)
    with pytest.raises(ValueError):
        log.append("x", {"value": float("nan")})
    log.append("x", {})
    log.close()
    with pytest.raises(LogError, match="closed"):
        log.append("x", {})
    assert check(path) is None
