"""What `plan --device` says, against arithmetic of the specification."""

import json
from dataclasses import replace

import pytest
import torch
from test_cli import run

from liveavatar.config import FastConfig, load
from liveavatar.core import ConfigError, Geometry, InputError
from liveavatar.runtime.forecast import SHARE, Speeds, accelerator, accelerators, forecast, model_shape, overview, plot, read_measured, sweep
from liveavatar.runtime.placement import Device, check_together, forward_flops, plan, transformer_bytes

WIDE = Geometry(height=384, width=704)
CONFIG = load(None, ["runtime.sessions=1"])
MEASURED = {"step": 0.2, "decode": 0.08, "condition": 0.0}


def test_seconds_of_a_step_are_its_flops_over_the_share_of_the_peak():
    costs = Speeds(device=accelerator("h800")).costs(model_shape("14b"), WIDE, {}, CONFIG.chain, 1)
    assert costs.roles["step2"] == pytest.approx(forward_flops(model_shape("14b"), WIDE) / (989e12 * SHARE))
    assert 0.18 < costs.roles["step0"] < 0.2 and costs.roles["condition"] == 0
    fast = Speeds(device=accelerator("H200"), precision="fp8").costs(model_shape("14b"), WIDE, {}, CONFIG.chain, 1)
    assert fast.roles["step0"] == pytest.approx(0.141, abs=0.002) and fast.roles["decode"] == pytest.approx(0.08, abs=0.002), "as bench/LOG.md adds them up"


def test_the_papers_cut_gives_a_block_per_step_and_one_gpu_the_sum():
    speeds = Speeds(device=accelerator("H200"), measured=MEASURED)
    five, one = (forecast(CONFIG, model_shape("14b"), WIDE, speeds, n) for n in (5, 1))
    assert five.fps == pytest.approx(12 / 0.2, rel=0.01) and five.first_frame == pytest.approx(0.88, abs=0.01) and five.underrun == 0
    assert one.fps == pytest.approx(12 / 0.88, rel=0.01) and one.underrun > 10 and one.real_time < 0.6
    assert five.turn_microphone > five.turn_voice > five.first_frame
    assert one.dollars == pytest.approx(3.4 / 60) and five.dollars == pytest.approx(5 * one.dollars)
    assert one.watt_hours == pytest.approx(700 / 60, rel=0.02)  # at work all the time


def test_fp8_linears_halve_the_transformer_and_the_chain_waits_for_the_look_ahead_it_has():
    speeds = [Speeds(device=accelerator("H100"), precision=precision, measured=MEASURED) for precision in ("bf16", "fp8")]
    plain, fast = (forecast(CONFIG, model_shape("14b"), WIDE, s, 1) for s in speeds)
    assert plain.plan.problems and not fast.plan.problems  # four steps on 80 GB: 76.7 GB and working memory, about 61 with FP8
    assert fast.turn_microphone - fast.turn_voice > 0.48 + 0.9  # a block and the .96 s that the front end looks ahead


def test_batches_are_as_large_as_the_config_says(monkeypatch):
    asked = []
    monkeypatch.setattr(Speeds, "costs", lambda self, *what: [asked.append(what[-1]), None / 1])  # that is all it is asked for here
    for batch in (1, 3):
        with pytest.raises(TypeError):
            forecast(load(None, ["runtime.sessions=4", f"runtime.batch={batch}"]), model_shape("14b"), WIDE, Speeds(device=accelerator("H100")), 5)
    assert asked == [1, 3]
    costs = Speeds(device=accelerator("RTX4090"))
    monkeypatch.undo()
    (one, two) = costs.costs(model_shape("14b"), Geometry(height=64, width=64), {}, CONFIG.chain, 2).batch
    assert one == two == 1.0, "at 64x64 a forward is one read of the weights"


def test_a_shift_register_gains_where_reading_the_weights_is_the_work():
    speeds, shifted = Speeds(device=accelerator("H200")), load(None, ["runtime.sessions=1", "runtime.shift_register=true"])
    small = Geometry(height=64, width=64)
    for geometry, least, most in ((WIDE, 0.97, 1.03), (small, 1.5, 4.0)):
        one, together = (forecast(config, model_shape("14b"), geometry, speeds, 1).fps for config in (CONFIG, shifted))
        assert least < together / one < most


@pytest.mark.parametrize("gpus", [1, 4, 5])
def test_a_shipped_config_can_be_run_and_fits(gpus):
    config = load(f"configs/serve_{gpus}gpu.yaml")
    check_together(config, config.stages)
    devices = [Device(name="H100", kind="cuda", memory=80 * 10**9)] * gpus
    assert not plan(config, model_shape("14b"), WIDE, devices, host=10**12).problems
    assert config.model.fast.fp8 and config.model.fast.graphs and config.runtime.decode_beside == (gpus < 5)


def test_other_sizes_have_the_parameters_their_names_promise():
    for name, billions in (("14b", 16.3), ("30b", 32), ("100b", 104), ("5120x40", 16.3)):
        assert transformer_bytes(model_shape(name), torch.float32) / 4e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("wrong", ["13b", "5000x40", "0x4", "5120x0", "x"])
def test_a_model_of_no_size_is_refused(wrong):
    with pytest.raises(ConfigError, match="WIDTHxLAYERS"):
        model_shape(wrong)


def test_every_row_of_the_table_makes_sense():
    assert all(a.fp8 is None or a.fp8 >= 1.9 * a.bf16 for a in accelerators().values())
    with pytest.raises(ConfigError, match="no FP8"):
        Speeds(device=accelerator("A100"), precision="fp8").costs(model_shape("14b"), WIDE, {}, CONFIG.chain, 1)


def test_measured_files_win_and_bad_ones_are_named(tmp_path):
    good, bad, other = tmp_path / "step.json", tmp_path / "bad.json", tmp_path / "other.json"
    good.write_text(json.dumps({"roles": MEASURED}))
    other.write_text('{"roles": {"decode": 0.05}}')
    assert read_measured([good], FastConfig(), WIDE) == MEASURED
    assert read_measured([good, other], FastConfig(), WIDE) == {**MEASURED, "decode": 0.05}
    for content in ('{"rows": []}', "[]", '{"roles": {"step": "fast"}}', '{"rows": [{"way": "all", "problem": "no"}]}', "{"):
        bad.write_text(content)
        with pytest.raises(InputError, match=bad.name):
            read_measured([good, bad], FastConfig(), WIDE)
    with pytest.raises(InputError, match="none.json"):
        read_measured([tmp_path / "none.json"], FastConfig(), WIDE)


def test_what_is_missing_is_said_with_its_share():
    made = forecast(CONFIG, model_shape("14b"), WIDE, Speeds(device=accelerator("H200"), measured=MEASURED), 5)
    said = {underrun: dict(replace(made, underrun=underrun, real_time=rate).rows())["pictures missing"]
            for underrun, rate in ((0.0, 2.0), (0.015, 2.0), (0.08, 2.0), (0.13, 0.99), (20.0, 0.5))}
    assert list(said.values()) == ["none", "none", "0.2% of the time", "0.3% of the time: not real time", "50.0% of the time: not real time"]


def test_a_sweep_is_drawn_and_written(tmp_path):
    made = sweep(CONFIG, model_shape("14b"), WIDE, Speeds(device=accelerator("H800"), measured=MEASURED))
    assert [f.devices for f in made] == [1, 2, 3, 4, 5, 6] and [not f.plan.problems for f in made] == [False, True, True, True, True, True]
    plot(made, "a title", tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()[:600] and json.loads(json.dumps(overview(made)))["forecasts"][4]["stages"][4] == ["decode"]


def test_the_command_says_what_it_assumed(tmp_path):
    said = run("plan", "--device", "H200", "--ranks", 2, "runtime.sessions=1")
    shares = "assuming of the stated peak: bf16 64%, FP8 linears 54%, decode 35%"
    assert said.exit_code == 0 and shares in " ".join(said.output.split()) and "turn, live microphone" in said.output
    files = [tmp_path / "step.json", tmp_path / "decode.json"]
    for path, roles in zip(files, ({"step": 0.123}, {"decode": 0.045})):
        path.write_text(json.dumps({"roles": roles}))
    said = run("plan", "--device", "H200", "--ranks", 2, "--measured", files[0], "--measured", files[1], "runtime.sessions=1")
    assert "measured: step 123 ms, decode 45 ms;" in " ".join(said.output.split())
    assert run("plan", "--device", "RTX4090", "--ranks", 1, "runtime.sessions=1").exit_code == 1  # 24 GB
    assert "known are H100" in run("plan", "--device", "K80").stderr
