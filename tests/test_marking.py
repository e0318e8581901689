"""A session's pictures carry label and mark, unless the operator switched them off, which is logged."""

from dataclasses import replace

import numpy as np
import pytest
import structlog
from test_watermark import clip, read

from liveavatar.core import ConfigError
from liveavatar.serving.role import Role
from liveavatar.serving.server import marker, payload
from liveavatar.serving.settings import ProvenanceConfig, ServeConfig, StorageConfig
from liveavatar.serving.watermark import server_key

ROLE = Role(avatar="ada", picture=None, owner="acme")


@pytest.fixture
def settings(tmp_path):
    return ServeConfig(storage=StorageConfig(folder=str(tmp_path)))


def test_label_and_mark_are_on_by_default_and_verify_finds_the_key(settings, tmp_path):
    pictures = clip(128, 128, 5)
    mark = marker(settings)(ROLE, 128, 128)
    marked = [mark(p) for p in pictures]
    reading = read(marked, server_key(tmp_path))
    assert reading.found and reading.payload == payload(ROLE)
    change = np.abs(marked[0].astype(int) - pictures[0])
    assert change[:20, :24].max() > 60 and change[30:].max() < 12  # the label; the mark alone


def test_off_means_untouched_and_is_logged(settings):
    with structlog.testing.capture_logs() as lines:
        mark = marker(replace(settings, provenance=ProvenanceConfig(watermark=False, badge=False)))(ROLE, 128, 128)
    picture = clip(128, 128, 1)[0]
    assert mark(picture) is picture and {line["what"] for line in lines} == {"watermark", "badge"}


def test_unusable_settings_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="badge_text"):
        marker(replace(settings, provenance=ProvenanceConfig(badge_text="made by a machine")))(ROLE, 64, 64)
    (tmp_path / "short").write_bytes(b"short")
    for name in ("short", "nowhere"):
        with pytest.raises(ConfigError):
            marker(replace(settings, provenance=ProvenanceConfig(watermark_key_file=str(tmp_path / name))))(ROLE, 64, 64)
