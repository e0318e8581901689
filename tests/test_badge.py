"""The visible label: where it stands, that it can be read, that the rest of the picture is left alone."""

import numpy as np
import pytest

from liveavatar.core import ConfigError
from liveavatar.serving.badge import Badge
from liveavatar.serving.settings import CORNERS


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("height, width", [(128, 128), (512, 512), (384, 704)])
def test_a_label_stands_in_its_corner_and_nowhere_else(height, width, corner):
    picture = np.full((height, width, 3), 128, np.uint8)
    drawn = Badge("AI", height, width, corner).draw(picture)
    rows, columns = np.nonzero((drawn != 128).any(-1))
    assert (picture == 128).all() and np.ptp(rows) < height * 0.11 and np.ptp(columns) < width * 0.2
    assert (rows.max() < height / 2) == corner.startswith("top") and (columns.max() < width / 2) == corner.endswith("left")
    assert 0 < rows.min() and rows.max() < height - 1 and 0 < columns.min() and columns.max() < width - 1


@pytest.mark.parametrize("value", [0, 255])
def test_white_letters_on_dark_whatever_is_behind(value):
    drawn = Badge("AI", 256, 256).draw(np.full((256, 256, 3), value, np.uint8))
    label = drawn[5:20, 5:22].astype(int)
    assert label.max() > 220 and label.min() < 90


def test_unusable_labels_are_refused():
    for text in ("", "  ", "a\nb", "x" * 25):
        with pytest.raises(ConfigError, match="badge_text"):
            Badge(text, 256, 256)
    with pytest.raises(ConfigError, match="does not fit"):
        Badge("made by a machine", 64, 64)
    with pytest.raises(ConfigError, match="corner"):
        Badge("AI", 64, 64, "middle")
