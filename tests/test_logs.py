"""Logs: JSON with session and epoch, no secret and no person in any line, repeats counted (serving.md 17.4, 18.7)."""

import asyncio
import io
import json
import logging

import pytest

structlog = pytest.importorskip("structlog", reason="needs the extra [serve]")

from hypothesis import given
from hypothesis import strategies as st

from liveavatar.core import ConfigError
from liveavatar.serving import logs

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhYmMifQ.s5Yh-Tt_0"


@pytest.fixture
def written(monkeypatch):
    """(clock, read): logging is set up on a clock of ours; read() gives the lines since the last call."""
    stream, now, root = io.StringIO(), [0.0], logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("info", stream=stream, clock=lambda: now[0])

    def read() -> list[dict]:
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        stream.seek(0)
        stream.truncate()
        return lines

    yield now, read
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def log():
    return structlog.get_logger("liveavatar.serving.test")


# ---------------------------------------------------------------- what a line holds


def test_lines_carry_session_and_epoch_of_their_task(written):
    async def talk(name: str, epoch: int):
        with logs.about(session=name, epoch=epoch):
            await asyncio.sleep(0)
            log().info("speaking", seconds=1.5)
            logging.getLogger("aiortc.rtp").warning("lost %d packets", 3)

    async def both():
        await asyncio.gather(talk("a", 1), talk("b", 7))

    asyncio.run(both())
    log().info("idle")
    lines = written[1]()
    assert [(line["event"], line.get("session"), line.get("epoch")) for line in lines] == [
        ("speaking", "a", 1), ("lost 3 packets", "a", 1), ("speaking", "b", 7), ("lost 3 packets", "b", 7), ("idle", None, None)]  # fmt: skip
    assert lines[0]["level"] == "info" and lines[0]["seconds"] == 1.5 and lines[0]["timestamp"].endswith("Z")
    assert lines[1]["logger"] == "aiortc.rtp" and lines[1]["level"] == "warning"


@pytest.mark.parametrize(("said", "stays"), [
    ("POST /v1/sessions?token=abc&x=1 HTTP/1.1", "POST /v1/sessions?*** HTTP/1.1"),
    ("key la_9f3a_Zk2-secretpart refused", "key la_9f3a_*** refused"),
    (f"token {JWT} expired", "token *** expired"),
    ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
    ("to rtmp://live.example.com/app/stream-KEY-1?backup=1 failed", "to rtmp://live.example.com/app/*** failed"),
    ("https://user:pass@cdn.example.com/a.m3u8", "https://***@cdn.example.com/a.m3u8"),
    ("api_key=hunter2, next", "api_key=***, next"),
    ("peer 203.0.114.9:5000 and 2001:4860:4860::8888 at 12:30:45", "peer 203.0.x.x:5000 and 2001:4860:x at 12:30:45"),
    ("listening on 127.0.0.1:8080, version 1.16.0", "listening on 127.0.0.1:8080, version 1.16.0"),
    ("what now? all is well", "what now? all is well"),
])  # fmt: skip
def test_free_text_is_cleaned(said, stays):
    assert logs.clean(said) == stays


def test_fields_are_struck_out_by_their_names_at_any_depth(written):
    log().error("egress lost", stream_key="s3cret", authorization="x", text="my name is Ann", keyframe=True, epoch_keys=3, prompt=None,
                output={"url": "rtmp://a.example/app/KEY", "turnCredential": "c", "tries": [1, {"password": "p"}]},
                error=ValueError(f"401 for {JWT}"))  # fmt: skip
    (line,) = written[1]()
    assert line["stream_key"] == line["authorization"] == line["output"]["turnCredential"] == "***"
    assert line["text"] == "<14 characters>" and line["keyframe"] is True and line["prompt"] is None and line["error"] == "401 for ***"
    assert line["output"] == {"url": "rtmp://a.example/app/***", "turnCredential": "***", "tries": [1, {"password": "***"}]}


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), st.text(), st.binary(max_size=40)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)), max_leaves=8),
       st.text(max_size=30))  # fmt: skip
def test_no_secret_survives_wherever_it_stands(value, around):
    secret = "la_0000_" + "S" * 24
    kept = json.dumps(logs.redact({"a": [value, {"b": f"{around} {secret} {around}"}], "token": [secret, value]}))
    assert "SSSS" not in kept and len(logs.clean(around * 200)) <= logs.LONGEST + 400


def test_an_exception_is_one_line_of_json_without_its_secrets(written):
    try:
        raise OSError(f"cannot open rtmps://x.example/live2/{'k' * 20}")
    except OSError:
        log().exception("egress lost")
    (line,) = written[1]()
    assert "OSError: cannot open rtmps://x.example/live2/***" in line["exception"] and "kkkk" not in json.dumps(line["exception"])


# ---------------------------------------------------------------- how many


def test_repeats_are_counted_instead_of_written(written):
    now, read = written
    for number in range(100):
        log().warning("packet late", by=number)  # a warning repeats whatever it says further
        log().info("session opened", number=number)  # news does not
        logging.getLogger("aioice").warning("no answer from %s", number)
    lines = read()
    assert sum(line["event"] == "packet late" for line in lines) == sum("no answer" in line["event"] for line in lines) == logs.BURST
    assert sum(line["event"] == "session opened" for line in lines) == 100
    with logs.about(session="another"):
        log().warning("packet late", by=1)
    now[0] = logs.PERIOD
    log().warning("packet late", by=100)
    other, again = read()
    assert other["session"] == "another" and again["suppressed"] == 100 - logs.BURST
    for number in range(3 * logs.EVENTS_KEPT):
        log().info("n", number=number)
    assert len(logging.getLogger().handlers[0].filters[0]._seen) == logs.EVENTS_KEPT


def test_the_level_changes_while_it_runs(written):
    read = written[1]
    log().debug("a")
    logging.getLogger("aiortc").info("b")
    logs.set_level("debug")
    log().debug("c")
    logs.set_level("error")
    log().warning("d")
    assert [line["event"] for line in read()] == ["c"]
    with pytest.raises(ConfigError, match="did you mean 'warning'"):
        logs.set_level("warn")
    with pytest.raises(ConfigError):
        logs.configure(form="xml")
