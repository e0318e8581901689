"""Text and speech encoders: strict filling, official names, rows that do not depend on padding."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel, Wav2Vec2Config, Wav2Vec2ForCTC

from liveavatar.core import InputError, WeightsError
from liveavatar.models import encoders, tensorfiles

TINY = dict(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
PLAIN = tensorfiles.cast_to(torch.float32, "cpu")
# The table of model.md section 11, written from the other side: transformers -> official.
TO_OFFICIAL = (
    ("encoder.final_layer_norm", "norm"),
    ("encoder.block", "blocks"),
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
    ("layer.0.SelfAttention", "attn"),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.layer_norm", "norm2"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ("shared", "token_embedding"),
)


@pytest.fixture(scope="module")
def umt5():
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms at 1 and a plain init would hide a swapped name
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def official_state(model):
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in TO_OFFICIAL:
            name = name.replace(ours, theirs)
        state[name] = tensor
    state.pop("encoder.embed_tokens.weight")
    return state


def rows(model, prompt):
    return encoders.TextEncoder(model, ByT5Tokenizer()).encode(prompt)


def test_rows_match_the_padded_masked_call(umt5):
    prompt = "a woman is speaking, é"
    padded = ByT5Tokenizer()(prompt, padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = umt5(**padded).last_hidden_state[0]
    found = rows(umt5, prompt)
    n = int(padded.attention_mask.sum())
    assert found.shape == (n, 32) and n == len(prompt.encode()) + 1  # bytes and the end token
    torch.testing.assert_close(found, expected[:n], atol=1e-5, rtol=1e-5)


def test_empty_prompt_is_the_end_token_and_a_long_one_is_refused(umt5):
    assert rows(umt5, "").shape == (1, 32)
    with pytest.raises(InputError, match="89 too many"):
        rows(umt5, "x" * 600)


def test_official_pth_equals_the_model(umt5, tmp_path):
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(official_state(umt5), path)
    loaded = encoders.plan_text_encoder(path).load(PLAIN)
    for key, value in TINY.items():
        assert getattr(loaded.config, key) == value, key
    torch.testing.assert_close(rows(loaded, "hello"), rows(umt5, "hello"), atol=4e-6, rtol=0)


@pytest.mark.parametrize("drop, add, message", [
    ("blocks.1.ffn.fc2.weight", None, "1 missing: encoder.block.1.layer.1.DenseReluDense.wo.weight"),
    (None, "blocks.0.attn.z.weight", "1 unexpected: blocks.0.attn.z.weight"),
    ("token_embedding.weight", None, "not an official umT5 encoder file.*token_embedding"),
])  # fmt: skip
def test_broken_official_pth(umt5, tmp_path, drop, add, message):
    state = official_state(umt5)
    state.pop(drop, None)
    if add:
        state[add] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "t5.pth")
    with pytest.raises(WeightsError, match=message):
        encoders.plan_text_encoder(tmp_path / "t5.pth").load(PLAIN)


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]])
def test_tied_embedding_under_any_name(umt5, tmp_path, names):
    umt5.config.save_pretrained(tmp_path)
    state = umt5.state_dict()
    table = state.pop("shared.weight")
    state.pop("encoder.embed_tokens.weight")
    save_file(state | {name: table.clone() for name in names}, tmp_path / "model.safetensors")
    loaded = encoders.plan_text_encoder(tmp_path).load(PLAIN)
    assert loaded.shared.weight.data_ptr() == loaded.encoder.embed_tokens.weight.data_ptr()
    assert torch.equal(rows(loaded, "hello"), rows(umt5, "hello"))


def test_tokenizer_and_encoder_must_belong_together(umt5):
    config = UMT5Config(**TINY | {"vocab_size": 300})
    with pytest.raises(WeightsError, match="384 tokens, the text encoder only 300"):
        encoders.TextEncoder(UMT5EncoderModel(config), ByT5Tokenizer())


def test_unreadable_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(WeightsError, match="not a readable tokenizer"):
        encoders.load_tokenizer(tmp_path)
    assert isinstance(encoders.load_tokenizer(None), ByT5Tokenizer)


# ---------------------------------------------------------------- wav2vec2


@pytest.fixture(scope="module")
def wav2vec():
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7, vocab_size=12,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    return Wav2Vec2ForCTC(config).eval()


@pytest.mark.parametrize("form", ["ctc", "bare", "old"])
def test_wav2vec_from_each_form(wav2vec, tmp_path, form):
    wav2vec.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in (wav2vec.wav2vec2 if form == "bare" else wav2vec).state_dict().items()}
    if form == "old":  # spelling of the weight norm in files of before torch 2, in the file type of that time
        state = {k.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): v for k, v in state.items()}
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    pcm = torch.randn(1, 3200, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = wav2vec.wav2vec2(pcm).last_hidden_state
        found = encoders.load_wav2vec(tmp_path)(pcm).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_wav2vec_with_a_hole(wav2vec, tmp_path):
    wav2vec.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("wav2vec2.encoder.layers.1.attention.k_proj.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing: encoder.layers.1.attention.k_proj.bias \[32\]"):
        encoders.load_wav2vec(tmp_path)
