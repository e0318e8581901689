"""What training says while it works."""

import logging

from liveavatar.training import progress


def test_a_long_count_says_now_and_then_where_it_is(monkeypatch, caplog):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO, progress.LOG.name):
        assert list(progress.counted("abcdefghij", "letters")) == list("abcdefghij")
    assert [record.getMessage() for record in caplog.records] == ["letters: 3 of 10", "letters: 7 of 10"]
    assert not list(progress.counted([], "nothing"))
