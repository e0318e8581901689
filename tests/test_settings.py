"""What an operator may not say: doors without keys, tokens that live too long, corners there are none of."""

import pytest

from liveavatar.config import build
from liveavatar.core import ConfigError
from liveavatar.serving.settings import AccessConfig, ListenConfig, ProvenanceConfig, ServeConfig


@pytest.mark.parametrize("make, words", [
    (lambda: ListenConfig(admin_host="0.0.0.0", admin_port=9000), "admin_host"),
    (lambda: ServeConfig(listen=ListenConfig(host="0.0.0.0"), access=AccessConfig(required=False)), "insecure=true"),
    (lambda: ListenConfig(origins=("*",)), "name the origins"),
    (lambda: ListenConfig(proxies=("10.0.0.300",)), "'10.0.0.300' is no network"),
    (lambda: ListenConfig(proxies=("10.0.0.1", "0.0.0.0/0")), "name the proxies' own addresses"),
    (lambda: AccessConfig(token_seconds=601), "at most 600"),
    (lambda: AccessConfig(upload_bytes_per_day=0), "must be positive"),
    (lambda: ProvenanceConfig(badge_corner="middle"), "badge_corner"),
    (lambda: build(ServeConfig, {"profiles": {"tv": {"bitrate": 0}}}), "profiles.tv: media.bitrate=0: must be positive"),
    (lambda: build(ServeConfig, {"profiles": {"tv": {"mode": "show"}}}), "profiles.tv: mode"),
    (lambda: build(ServeConfig, {"profiles": {"tv": {"bitrat": 9}}}), "profiles.tv.bitrat'; did you mean 'bitrate'"),
    (lambda: build(ServeConfig, {"profiles": {7: {}}}), "profiles must be str"),
])  # fmt: skip
def test_refused_with_a_way_out(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_an_operator_may_know_better():
    assert ListenConfig(admin_host="10.0.0.7", admin_port=9000, insecure=True).admin_host == "10.0.0.7"
    assert ListenConfig(admin_host="10.0.0.7").admin_port is None  # no such door
