"""A session's pictures carry label and mark, unless the operator switched them off, which is logged."""

import numpy as np
import pytest
import structlog
from test_watermark import clip, read

from liveavatar.core import ConfigError
from liveavatar.serving.live import Role
from liveavatar.serving.marking import marker, payload_of
from liveavatar.serving.settings import ProvenanceConfig
from liveavatar.serving.watermark import server_key

ROLE = Role(avatar="ada", picture=None, owner="acme")


def test_label_and_mark_are_on_by_default(tmp_path):
    pictures = clip(128, 128, 5)
    mark = marker(ProvenanceConfig(), tmp_path)(ROLE, 128, 128)
    marked = [mark(p) for p in pictures]
    reading = read(marked, server_key(tmp_path))
    assert reading.found and reading.payload == payload_of("acme", "ada")
    assert np.abs(marked[0].astype(int) - pictures[0])[:20, :24].max() > 60  # the label
    assert np.abs(marked[0].astype(int) - pictures[0])[30:].max() < 12


def test_off_means_untouched_and_is_logged(tmp_path):
    with structlog.testing.capture_logs() as lines:
        mark = marker(ProvenanceConfig(watermark=False, badge=False), tmp_path)(ROLE, 128, 128)
    picture = clip(128, 128, 1)[0]
    assert mark(picture) is picture and {line["what"] for line in lines} == {"watermark", "badge"} and not list(tmp_path.iterdir())


def test_tags_tell_tenants_and_avatars_apart():
    assert len({payload_of("a", "bc"), payload_of("ab", "c"), payload_of("", "abc"), payload_of("a", "b")}) == 4


def test_unusable_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="badge_text"):
        marker(ProvenanceConfig(badge_text="made by a machine"), tmp_path)(ROLE, 64, 64)
    with pytest.raises(ConfigError, match="nowhere"):
        marker(ProvenanceConfig(watermark_key_file=str(tmp_path / "nowhere")), tmp_path)
