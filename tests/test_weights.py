"""Checkpoints: every layout loads, every kind of broken folder gives the error that says what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from liveavatar.config import FastConfig
from liveavatar.core import WeightsError
from liveavatar.models import lora, tensorfiles, weights
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.fast import fp8_linears, prepare
from liveavatar.models.folders import open_folder
from liveavatar.models.s2v import FAR_WEIGHT, CausalS2V, S2VConfig, stored_dtype
from liveavatar.models.vae import StreamingVAE

from conftest import tiny_moonshine

GOLDEN = Path(__file__).parent / "golden" / "tensors_s2v.txt"
CONFIG = S2VConfig(
    dim=32, ffn_dim=48, freq_dim=16, text_dim=24, text_len=16, num_heads=2, num_layers=3, audio_dim=20,
    audio_layers=5, audio_inject_layers=(0, 2),
)  # fmt: skip
# What the official config.json leaves out.
OMITTED = ("patch_size", "text_dim", "audio_layers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalS2V(CONFIG).eval()


@pytest.fixture(scope="module")
def vae():
    return StreamingVAE.from_module(AutoencoderKLWan(base_dim=8, dim_mult=[1, 2], temperal_downsample=[True], num_res_blocks=1).eval())


@pytest.fixture(scope="module")
def text():
    config = UMT5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return TextEncoder(UMT5EncoderModel(config).eval(), ByT5Tokenizer())


def same(a, b):
    state = b.state_dict()
    return a.keys() == state.keys() and all(torch.equal(tensor, state[name]) for name, tensor in a.items())


def contiguous(state):
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


# ---------------------------------------------------------------- the layouts


@pytest.fixture
def ours(model, vae, text, tmp_path):
    return weights.save_folder(
        tmp_path / "ours", transformer=model, vae=vae, text_encoder=text, audio={"kind": "log_mel"},
        sampler={"sigmas": [1.0, 0.0]}, geometry={"height": 64, "width": 64}, card={"name": "tiny"},
    )  # fmt: skip


@pytest.fixture
def official(model, tmp_path):
    """Sharded, as Wan-AI/Wan2.2-S2V-14B: index, two shards, root config.json without the defaults."""
    folder = tmp_path / "official"
    folder.mkdir()
    config = {key: value for key, value in CONFIG.to_dict().items() if key != "patch_size"}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel_S2V", "model_type": "s2v", "zero_init": True, **config}))
    state, weight_map = contiguous(model.state_dict()), {}
    for i, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def repack(model, vae, text, tmp_path):
    """FastVideo's: parts under names of their own, found by what their config.json says."""
    folder = tmp_path / "repack"
    (folder / "dit").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "dit" / "config.json").write_text(json.dumps({"_class_name": "WanS2VTransformer3DModel", **CONFIG.to_dict()}))
    save_file(contiguous(model.state_dict()), folder / "dit" / "diffusion_pytorch_model.safetensors")
    vae.module.save_pretrained(folder / "codec")
    text.module.save_pretrained(folder / "words")
    return folder


@pytest.mark.parametrize("layout", ["ours", "official", "repack"])
def test_layout_is_recognised_and_loads(layout, model, request):
    folder = request.getfixturevalue(layout)
    found = open_folder(folder)
    assert found.layout == layout
    loaded = weights.load_transformer(folder)
    assert loaded.config == CONFIG and same(loaded.state_dict(), model) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_our_folder_holds_all_parts(ours, vae, text):
    codec, words = weights.load_vae(ours), weights.load_text_encoder(ours)
    assert same(codec.module.state_dict(), vae.module)
    assert torch.equal(words.encode("hello"), text.encode("hello"))
    found = open_folder(ours)
    assert found.sampler == {"sigmas": [1.0, 0.0]} and found.audio == {"kind": "log_mel"} and found.card == {"name": "tiny"}
    assert not [p for p in ours.rglob("*.partial")]


def test_repack_parts_are_found_by_class(repack, vae):
    found = open_folder(repack)
    assert (found.vae.name, found.text_encoder.name, found.audio["kind"]) == ("codec", "words", "wav2vec2")
    assert same(weights.load_vae(repack).module.state_dict(), vae.module)
    with pytest.raises(WeightsError, match="repack checkpoint without tokenizer"):
        weights.load_text_encoder(repack)


def test_saving_over_a_loaded_folder_is_safe(ours, vae):
    loaded = weights.load_transformer(ours)
    before = contiguous(loaded.state_dict())
    other = CausalS2V(CONFIG)
    weights.save_folder(ours, transformer=other, audio={"kind": "log_mel"}, sampler={}, geometry={})
    assert same(before, loaded)
    assert same(weights.load_transformer(ours).state_dict(), other)


def test_cast_on_load_keeps_fp32_parts(ours):
    loaded = weights.load_transformer(ours, dtype=torch.bfloat16)
    assert loaded.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert loaded.time_projection[1].weight.dtype == torch.float32
    assert weights.load_vae(ours, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_half_precision_files_load(model, ours, vae, text):
    weights.save_folder(ours, transformer=model, vae=vae, text_encoder=text, audio={"kind": "log_mel"}, sampler={}, geometry={}, dtype=torch.bfloat16)
    assert load_file(ours / "transformer.safetensors")["blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    loaded = weights.load_transformer(ours)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.state_dict()["blocks.0.ffn.0.weight"], model.state_dict()["blocks.0.ffn.0.weight"], atol=1e-2, rtol=1e-2)


def test_all_names_and_shapes_at_full_size():
    """1260 tensors of the real checkpoint, on the meta device: nothing is allocated."""
    rows = [line.split("\t") for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    expected = {name: tuple(json.loads(shape)) for name, shape in rows}
    with torch.device("meta"):
        found = tensorfiles.expected_shapes(CausalS2V(S2VConfig()))
    assert len(expected) == 1260 and found == expected
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 16_295_755_609


def test_full_size_lora_targets():
    with torch.device("meta"):
        targets = lora.lora_targets(CausalS2V(S2VConfig()))
    assert len(targets) == 448 and sum(name.startswith("blocks.") for name in targets) == 400


# ---------------------------------------------------------------- broken folders


def rewrite(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_missing_unexpected_and_misshapen_are_all_listed(ours):
    path = ours / "transformer.safetensors"

    def change(state):
        state.pop("blocks.1.self_attn.q.bias")
        state["blocks.1.extra"] = torch.zeros(3)
        state["blocks.2.ffn.2.bias"] = torch.zeros(7)

    rewrite(path, change)
    with pytest.raises(WeightsError) as error:
        weights.load_transformer(ours)
    text = str(error.value)
    count = len(load_file(path))
    for piece in (
        str(path), "our checkpoint folder", f"expected {count} tensors, found {count}", "1 missing: blocks.1.self_attn.q.bias [32]",
        "1 unexpected: blocks.1.extra [3]", "1 wrongly shaped: blocks.2.ffn.2.bias expected [32] found [7]",
    ):  # fmt: skip
        assert piece in text
    assert "\n" not in text


def test_first_twenty_keys_and_the_count_of_the_rest(ours):
    def change(state):
        for name in [n for n in state if n.startswith("blocks.0.")]:
            state.pop(name)

    rewrite(ours / "transformer.safetensors", change)
    with pytest.raises(WeightsError, match="27 missing: .*, and 7 more") as error:
        weights.load_transformer(ours)
    assert str(error.value).count("blocks.0.") == 20


def test_quantised_tensors_are_not_taken_for_plain_ones(ours):
    rewrite(ours / "transformer.safetensors", lambda s: s.update({"head.head.bias": s["head.head.bias"].to(torch.int8)}))
    with pytest.raises(WeightsError, match="1 quantised.*head.head.bias int8"):
        weights.load_transformer(ours)


def test_config_that_contradicts_the_tensors(ours):
    path = ours / "liveavatar.json"
    settings = json.loads(path.read_text())
    settings["transformer"] |= {"num_layers": 5, "ffn_dim": 64}
    path.write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="contradicts.*ffn_dim=64, the tensors say 48; num_layers=5, the tensors say 3"):
        weights.load_transformer(ours)


@pytest.mark.parametrize("change, message", [
    ({"dimm": 5}, "unknown key 'dimm'; did you mean 'dim'"),
    ({"enable_tsm": True}, "enable_tsm=True is not supported"),
    ({"num_heads": 5}, "num_heads=5"),
])  # fmt: skip
def test_refused_config_names_the_file(official, change, message):
    path = official / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=message) as error:
        weights.load_transformer(official)
    assert str(path) in str(error.value)


def test_official_defaults_may_be_absent(official):
    path = official / "config.json"
    config = json.loads(path.read_text())
    assert "patch_size" not in config
    config.pop("text_dim")
    path.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="text_dim=4096, the tensors say 24"):
        weights.load_transformer(official)  # the default is the 14B value, and is checked like any other


def test_index_names_an_absent_shard(official):
    (official / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="1 absent shard.*diffusion_pytorch_model-00002-of-00002.safetensors"):
        weights.load_transformer(official)


def test_index_and_shards_disagree(official):
    path = official / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="disagree about 1 tensors: ghost"):
        weights.load_transformer(official)


def test_shards_without_an_index(official):
    (official / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match="no index"):
        weights.load_transformer(official)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_corrupt_safetensors(ours, damage):
    path = ours / "transformer.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"\xff" * 200, "empty": b""}[damage])
    with pytest.raises(WeightsError, match="transformer.safetensors: not a readable safetensors file") as error:
        weights.load_transformer(ours)
    assert "\n" not in str(error.value)


def test_corrupt_pth(tmp_path):
    path = tmp_path / "Wan2.1_VAE.pth"
    for content in (b"", b"garbage" * 50, b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="Wan2.1_VAE.pth: not a readable torch weights file") as error:
            tensorfiles.open_file(path)
        assert "\n" not in str(error.value)
    torch.save({"a": torch.zeros(2), "b": "text"}, path)
    with pytest.raises(WeightsError, match="mapping of names to tensors"):
        tensorfiles.open_file(path)


def test_absent_files_and_folders(ours, tmp_path):
    with pytest.raises(WeightsError, match="no such checkpoint folder"):
        weights.load_transformer(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="is a file, not a checkpoint folder"):
        weights.load_transformer(ours / "liveavatar.json")
    (tmp_path / "void").mkdir()
    with pytest.raises(WeightsError, match="no known checkpoint layout"):
        weights.load_transformer(tmp_path / "void")
    (ours / "transformer.safetensors").unlink()
    with pytest.raises(WeightsError, match="transformer.safetensors: no such file"):
        weights.load_transformer(ours)
    shutil.rmtree(ours / "vae")
    with pytest.raises(WeightsError, match="without vae .looked for vae/"):
        weights.load_vae(ours)


@pytest.mark.parametrize("change, message", [
    ({"format": 2}, "format 2, this version reads 1"),
    ({"sampeler": {}}, "unknown section.*sampeler"),
    ({"audio": []}, "not a mapping: section.*audio"),
])  # fmt: skip
def test_settings_are_strict(ours, change, message):
    path = ours / "liveavatar.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=message):
        open_folder(ours)
    path.write_text("{")
    with pytest.raises(WeightsError, match="cannot read JSON"):
        open_folder(ours)


def test_repack_without_a_transformer(repack):
    shutil.rmtree(repack / "dit")
    with pytest.raises(WeightsError, match="no sub-folder holds an S2V transformer.*codec/ is AutoencoderKLWan"):
        weights.load_transformer(repack)


# ---------------------------------------------------------------- inspect


def test_inspect_promises_what_load_does(ours):
    report = weights.inspect_folder(ours)
    assert report.will_load and report.layout == "ours" and not report.problems
    parts = {part.name: part for part in report.parts}
    assert set(parts) == {"transformer", "vae", "text_encoder"}
    stored = load_file(ours / "transformer.safetensors")
    assert parts["transformer"].tensors == len(stored) and parts["transformer"].dtypes == {"float32": len(stored)}
    assert parts["transformer"].nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert "will load" in str(report)


def test_inspect_lists_every_problem_and_never_raises(ours, tmp_path):
    rewrite(ours / "transformer.safetensors", lambda state: state.pop("head.head.bias"))
    (ours / "vae" / "config.json").write_text("[]")
    report = weights.inspect_folder(ours, lora=tmp_path / "none.safetensors")
    assert not report.will_load and len(report.problems) == 3
    assert "head.head.bias" in report.problems[0] and "NOT load: 3 problem" in str(report)
    nothing = weights.inspect_folder(tmp_path / "nowhere")
    assert nothing.layout is None and not nothing.will_load and "nowhere" in str(nothing)


def test_inspect_official_says_which_parts_are_absent(official):
    report = weights.inspect_folder(official)
    text = str(report)
    assert report.layout == "official" and not report.will_load
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "wav2vec2-large-xlsr-53-english"):
        assert name in text


# ---------------------------------------------------------------- LoRA

RANK = 4


@pytest.fixture(scope="module")
def update(model):
    """A and B of every target, plainly named."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, (rows, columns) in lora.lora_targets(model).items():
        state[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.1
        state[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.1
    return state


def expected_weight(model, update, name, alpha=64.0):
    product = update[f"{name}.lora_B.weight"] @ update[f"{name}.lora_A.weight"]
    return model.get_submodule(name).weight + alpha / RANK * product


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("middle", ["", ".default"])
def test_lora_key_forms(ours, model, update, tmp_path, prefix, middle):
    path = tmp_path / "lora.safetensors"
    save_file({prefix + key.replace(".weight", f"{middle}.weight"): value for key, value in update.items()}, path)
    loaded = weights.load_transformer(ours, lora=path)
    targets = lora.lora_targets(model)
    for name in targets:
        torch.testing.assert_close(loaded.get_submodule(name).weight, expected_weight(model, update, name), atol=1e-6, rtol=1e-6)
    untouched = {name for name in model.state_dict() if name.removesuffix(".weight") not in targets}
    assert all(torch.equal(loaded.state_dict()[name], model.state_dict()[name]) for name in untouched)


def test_lora_merge_in_place_equals_merge_at_load(ours, update, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(update, path)
    loaded = weights.load_transformer(ours)
    assert weights.merge_lora(loaded, path) == 3 * 10 + 2 * 4
    assert same(loaded.state_dict(), weights.load_transformer(ours, lora=path))
    assert not same(loaded.state_dict(), weights.load_transformer(ours))  # the file itself is as it was


def test_lora_is_rounded_once(ours, model, update, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(update, path)
    loaded = weights.load_transformer(ours, dtype=torch.bfloat16, lora=path)
    name = "blocks.1.ffn.0"
    assert torch.equal(loaded.get_submodule(name).weight, expected_weight(model, update, name).to(torch.bfloat16))


@pytest.mark.parametrize("packed", [False, True])
def test_fp8_is_rounded_as_it_is_read(ours, update, tmp_path, packed):
    """As a whole model that is rounded afterwards, to the bit; with the LoRA in it, and packed before or after."""
    path, fast = tmp_path / "lora.safetensors", FastConfig(fp8=True, packed_qkv=packed)
    save_file(update, path)
    read = prepare(weights.load_transformer(ours, dtype=torch.bfloat16, lora=path, fp8=True), fast)
    whole = prepare(weights.load_transformer(ours, dtype=torch.bfloat16, lora=path), fast)
    got, expected = ({name: tensor.float() for name, tensor in made.state_dict().items()} for made in (read, whole))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert read.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn and not fp8_linears(read) and not any(p.requires_grad for p in read.parameters())


def test_lora_alpha_overrides(ours, model, update, tmp_path):
    path, name = tmp_path / "lora.safetensors", "blocks.0.self_attn.q"
    save_file(update | {f"{name}.alpha": torch.tensor(2.0)}, path)
    loaded = weights.load_transformer(ours, lora=path)
    torch.testing.assert_close(loaded.get_submodule(name).weight, expected_weight(model, update, name, alpha=2.0))
    other = "blocks.0.self_attn.k"
    torch.testing.assert_close(loaded.get_submodule(other).weight, expected_weight(model, update, other))


@pytest.mark.parametrize("drop, add, message", [
    ("audio_injector.injector.1.o.lora_B.weight", {}, r"1 missing: audio_injector.injector.1.o.lora_B.weight"),
    (None, {"blocks.0.norm3.lora_A.weight": torch.zeros(4, 32)}, r"1 unexpected: blocks.0.norm3.lora_A.weight \[4, 32\]"),
    (None, {"lora_unet_blocks_0.lora_down.weight": torch.zeros(4, 32)}, r"1 unexpected: lora_unet_blocks_0.lora_down.weight"),
    (None, {"transformer.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 32)}, r"1 unexpected: transformer.blocks.0.ffn.0"),
    (None, {"blocks.0.ffn.2.lora_A.weight": torch.zeros(4, 32)}, r"1 wrongly shaped: blocks.0.ffn.2 is \[32, 48\], its A is \[4, 32\]"),
    (None, {"blocks.0.ffn.2.alpha": torch.zeros(3)}, r"blocks.0.ffn.2.alpha is \[3\]"),
    (None, {"blocks.9.ffn.2.alpha": torch.zeros(())}, r"1 unexpected: blocks.9.ffn.2.alpha"),
])  # fmt: skip
def test_broken_lora(model, ours, update, tmp_path, drop, add, message):
    path = tmp_path / "lora.safetensors"
    save_file({k: v for k, v in update.items() if k != drop} | add, path)
    loaded = weights.load_transformer(ours)
    with pytest.raises(WeightsError, match=message):
        weights.merge_lora(loaded, path)
    assert same(loaded.state_dict(), model)  # judged as a whole before any weight moves
    with pytest.raises(WeightsError, match="lora.safetensors: not a LoRA for this transformer"):
        weights.load_transformer(ours, lora=path)


def test_a_lora_of_another_spelling_never_passes_silently(ours, update, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"module." + key: value for key, value in update.items()}, path)
    with pytest.raises(WeightsError, match="76 unexpected: .*, and 56 more; 76 missing"):
        weights.load_transformer(ours, lora=path)


def test_the_weight_of_motion_that_there_is_none_of_is_left_out(tmp_path, model):
    """With three latents of motion the packer's bucket of 16 holds zeros: the loaded model does what the saved one did."""
    near, far = (weights.save_folder(tmp_path / str(frames), transformer=model, audio={"kind": "log_mel"}, sampler={}, geometry={"motion_frames": frames})
                 for frames in (9, 73))  # fmt: skip
    assert FAR_WEIGHT not in load_file(near / "transformer.safetensors") and FAR_WEIGHT in load_file(far / "transformer.safetensors")
    loaded, draw = weights.load_transformer(near), torch.Generator().manual_seed(0)
    assert not loaded.get_parameter(FAR_WEIGHT).any() and model.get_parameter(FAR_WEIGHT).any()
    reference, motion = torch.randn(16, 1, 8, 8, generator=draw), torch.randn(16, 3, 8, 8, generator=draw)
    with torch.no_grad():
        was, now = (m.prefill(reference, motion, m.encode_text(torch.zeros(1, CONFIG.text_dim))) for m in (model, loaded))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in ((was.k, now.k), (was.v, now.v)))
    settings = json.loads((near / "liveavatar.json").read_text())
    settings["geometry"]["motion_frames"] = 73
    (near / "liveavatar.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="1 missing: frame_packer.proj_4x.weight"):
        weights.load_transformer(near)


def test_matrices_in_rows_of_eight_bits_stay_within_half_a_step(tmp_path, model):
    """Only those that compute in bf16 anyway; a matrix without its scales is refused."""
    folder = weights.save_folder(tmp_path / "ours", transformer=model, audio={"kind": "log_mel"}, sampler={}, geometry={"motion_frames": 73},
                                 dtype=torch.float16, eight_bits=True)  # fmt: skip
    held, loaded = load_file(folder / "transformer.safetensors"), weights.load_transformer(folder).state_dict()
    for name, tensor in model.state_dict().items():
        exact = stored_dtype(name, torch.float16) == torch.float32
        if exact or tensor.dim() < 2:
            assert held[name].dtype == stored_dtype(name, torch.float16) and torch.equal(loaded[name], tensor.to(held[name].dtype).float()), name
        else:
            assert held[name].dtype == torch.int8, name
            step = tensor.flatten(1).abs().amax(1) / 127
            assert ((loaded[name] - tensor).flatten(1).abs().amax(1) <= 0.501 * step).all(), name
    assert weights.inspect_folder(folder).parts[0].problem is None
    del held["blocks.0.ffn.0.weight" + tensorfiles.SCALE]
    save_file(held, folder / "transformer.safetensors")
    with pytest.raises(WeightsError, match=r"1 quantised \(unsupported\): blocks.0.ffn.0.weight int8"):
        weights.load_transformer(folder)


def test_a_report_counts_what_lies_in_files(tmp_path, model):
    """Rows of eight bits as such, and nothing for the weight that is left out."""
    folder = weights.save_folder(tmp_path / "ours", transformer=model, audio={"kind": "visemes"}, viseme_encoder=tiny_moonshine(), sampler={},
                                 geometry={"motion_frames": 9})  # fmt: skip
    parts = {part.name: part for part in weights.inspect_folder(folder).parts}
    for name, path in (("transformer", "transformer.safetensors"), ("viseme_encoder", "viseme_encoder/model.safetensors")):
        held = load_file(folder / path)
        assert parts[name].nbytes == sum(t.nbytes for t in held.values())
        assert parts[name].tensors == sum(not key.endswith(tensorfiles.SCALE) for key in held)
    assert set(parts["viseme_encoder"].dtypes) == {"int8", "float32"}
