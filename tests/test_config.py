"""The strict loader: what it takes, what it refuses, and that the refusal names file, key and the nearest right key."""

import dataclasses
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from liveavatar import config as configs
from liveavatar.config import Config, apply_overrides, load
from liveavatar.core import ConfigError

CONFIGS = sorted(p for p in (Path(__file__).parent.parent / "configs").glob("*.yaml") if not p.name.startswith(("train_", "eval_", "serve_tiny")))
names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
paths = st.lists(names, min_size=1, max_size=4)
scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=20) | st.floats(allow_nan=False, width=32)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6)


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def said(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_their_stages_are_the_chain(path):
    config = load(path)
    assert sum(config.stages, ()) == config.chain


def test_nothing_said_is_all_defaults():
    assert load(None) == Config()
    assert Config().chain == ("condition", "step0", "step1", "step2", "step3", "decode")


def test_config_is_never_written_to():
    for node in (Config(), Config().model, Config().runtime):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, dataclasses.fields(node)[0].name, 1)


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("modl: {}", "modl", "model"),
        ("sampler: {stpes: 4}", "sampler.stpes", "steps"),
        ("runtime: {launcher: locl}", "runtime.launcher", "local"),
        ("model: {dtype: bfloat61}", "model.dtype", "bfloat16"),
    ],
)
def test_a_misspelt_word_gets_the_nearest_right_one(tmp_path, text, wrong, right):
    path = write(tmp_path, text)
    message = said(path)
    assert str(path) in message and wrong in message and f"did you mean {right!r}" in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sampler: {steps: four}", "sampler.steps"),
        ("sampler: {steps: true}", "sampler.steps"),
        ("sampler: {steps: 0}", "sampler.steps"),
        ("sampler: {finish_after: 5}", "sampler.finish_after"),
        ("sampler: {sink_distance: 31}", "sampler.sink_distance"),
        ("sampler: {refresh_block: -1}", "sampler.refresh_block"),
        ("sampler: {refresh_slices: 0}", "sampler.refresh_slices"),
        ("video: {height: -64}", "video.height"),
        ("runtime: {queued_seconds: 0}", "runtime.queued_seconds"),
        ("model: [1]", "model"),
        ("stages: condition", "stages"),
        ("stages: [[condition, 3]]", "stages[0][1]"),
        ("seed: 1.5", "seed"),
    ],
)
def test_wrong_types_and_impossible_values_name_file_and_key(tmp_path, text, key):
    path = write(tmp_path, text)
    message = said(path)
    assert str(path) in message and key in message


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\tx: 1", "just words"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = write(tmp_path, text)
    assert str(path) in said(path)


def test_missing_and_binary_files_are_refused(tmp_path):
    assert "cannot read" in said(tmp_path / "absent.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "run.yaml" in said(tmp_path / "run.yaml")


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load(write(tmp_path, "")) == Config()


def test_overrides_win_and_are_checked_like_the_file(tmp_path):
    path = write(tmp_path, "sampler: {steps: 4, shift: 3.0}\nseed: 1\n")
    config = load(path, ["sampler.steps=2", "seed=7", "prompt='a: b'", "video.height=null"])
    assert (config.sampler.steps, config.sampler.shift, config.seed, config.prompt) == (2, 3.0, 7, "a: b")
    assert "did you mean 'steps'" in said(path, "sampler.step=2")
    assert "is not a section" in said(path, "seed.deep=1")
    for text in ("seed", "=3", "a.b"):
        assert "must read a.b=value" in said(path, text)
    assert "not YAML" in said(path, "seed=[1")


def test_stages_can_be_overridden():
    assert load(None, ["stages=[[condition, step0], [step1, step2, step3, decode]]"]).stages[1][0] == "step1"


@given(paths, values)
def test_an_override_sets_exactly_its_leaf(path, value):
    made = apply_overrides({}, [f"{'.'.join(path)}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}"])
    for name in path:
        assert list(made) == [name]
        made = made[name]
    assert made == value


@given(st.dictionaries(names, st.dictionaries(names, st.integers(), max_size=3), max_size=3), names, names, st.integers())
def test_an_override_leaves_the_rest_and_its_source_alone(mapping, section, leaf, value):
    before = yaml.safe_load(yaml.safe_dump(mapping))
    made = apply_overrides(mapping, [f"{section}.{leaf}={value}"])
    assert mapping == before
    assert made.pop(section) == {**before.pop(section, {}), leaf: value}
    assert made == before


@given(st.lists(st.tuples(paths, st.integers()), max_size=4))
def test_overrides_apply_in_order_and_twice_is_once(pairs):
    texts = [f"{'.'.join(path)}={value}" for path, value in pairs]
    try:
        made = apply_overrides({}, texts)
    except ConfigError:
        return  # one wrote a value where another needs a section
    assert apply_overrides(made, texts[-1:]) == made


@given(st.text(max_size=30))
def test_any_override_is_taken_or_refused_in_one_line(text):
    try:
        load(None, [text])
    except ConfigError as error:
        assert "\n" not in str(error)


@given(st.integers())
def test_numbers_land_or_are_refused(value):
    if 1 <= value <= 100:
        assert load(None, [f"sampler.steps={value}"]).sampler.steps == value
    else:
        assert "sampler.steps" in said(None, f"sampler.steps={value}")


def test_every_setting_has_a_default_and_every_section_is_frozen():
    for cls in (c for c in vars(configs).values() if dataclasses.is_dataclass(c)):
        assert cls() == cls()
        assert cls.__dataclass_params__.frozen
