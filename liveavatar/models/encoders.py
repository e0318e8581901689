"""Text and speech encoders of transformers, filled strictly (model.md sections 9 and 11).

transformers' own `from_pretrained` fills gaps with random numbers and a warning; here a tensor that is
missing, left over or of another shape is an error, as for the transformer and the VAE.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, ByT5Tokenizer, UMT5Config, UMT5EncoderModel, Wav2Vec2Config, Wav2Vec2Model

from liveavatar.core import InputError, WeightsError
from liveavatar.models import tensorfiles

TIED = {"encoder.embed_tokens.weight": "shared.weight"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
BUCKET_DISTANCE = 128  # relative positions beyond this share one bucket; stored nowhere in the official file

_OFFICIAL_ROOT = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_OFFICIAL_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


class TextEncoder:
    """umT5 with its tokenizer: prompt -> text rows. `module` and `tokenizer` are transformers' own."""

    def __init__(self, module: UMT5EncoderModel, tokenizer):
        if len(tokenizer) > module.config.vocab_size:
            raise WeightsError(
                f"the tokenizer knows {len(tokenizer)} tokens, the text encoder only {module.config.vocab_size}; they do not belong together"
            )
        self.module, self.tokenizer = module, tokenizer

    @property
    def text_dim(self) -> int:
        return self.module.config.d_model

    @property
    def needs_tokenizer_files(self) -> bool:
        """Whether a saved copy must hold the tokenizer too (bytes need no vocabulary)."""
        return not isinstance(self.tokenizer, ByT5Tokenizer)

    @torch.no_grad()
    def encode(self, prompt: str, max_rows: int = 512) -> torch.Tensor:
        """Prompt -> rows [n, text_dim], n = its tokens with the end token, in the encoder's dtype.

        The prompt should be cleaned already. Not padded: the encoder masks padding, so its rows are the
        same without, and the transformer pads with zeros itself. A prompt of more than max_rows tokens is
        an InputError.
        """
        tokens = self.tokenizer(prompt, add_special_tokens=True, verbose=False).input_ids
        if len(tokens) > max_rows:
            raise InputError(f"the prompt has {len(tokens)} tokens, {len(tokens) - max_rows} too many; shorten it")
        ids = torch.tensor([tokens], device=self.module.device)
        return self.module(input_ids=ids).last_hidden_state[0]


# ---------------------------------------------------------------- umT5


def official_name(name: str) -> str:
    """Name of an official umT5 .pth tensor in transformers; unknown names stay and fail the strict check."""
    if name in _OFFICIAL_ROOT:
        return _OFFICIAL_ROOT[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if not match or match[2] not in _OFFICIAL_BLOCK:
        return name
    return f"encoder.block.{match[1]}.{_OFFICIAL_BLOCK[match[2]]}.weight"


def _official_config(source: tensorfiles.TensorSource) -> UMT5Config:
    """Sizes of an official umT5 file, from its shapes (it comes without a config)."""
    needed = ("token_embedding", "blocks.0.attn.q", "blocks.0.ffn.fc1", "blocks.0.pos_embedding.embedding")
    lacking = [name for name in needed if len(getattr(source.entries.get(f"{name}.weight"), "shape", ())) != 2]
    if lacking:
        raise WeightsError(f"{source.label}: not an official umT5 encoder file (no {', '.join(lacking)}); fetch it again")
    (vocab, width), (inner, _), (hidden, _), (buckets, heads) = (source.entries[f"{name}.weight"].shape for name in needed)
    layers = 1 + max(int(name.split(".")[1]) for name in source.entries if re.match(r"blocks\.\d+\.", name))
    return UMT5Config(
        vocab_size=vocab, d_model=width, d_kv=inner // heads, d_ff=hidden, num_layers=layers, num_heads=heads,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=BUCKET_DISTANCE,
        feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6,
    )  # fmt: skip


def plan_text_encoder(path: Path) -> tensorfiles.LoadPlan:
    """How a UMT5EncoderModel is filled from a transformers folder or an official .pth. Raises WeightsError."""
    if path.is_dir():
        config = _read_config(UMT5Config, path / "config.json")
        source, layout = tensorfiles.open_file(tensorfiles.find_weights(path)), "a transformers UMT5EncoderModel folder"
    else:
        official = tensorfiles.open_file(path)
        config = _official_config(official)
        source, layout = official.renamed(official_name), "the official umT5 encoder (names as in transformers)"
    return tensorfiles.LoadPlan(_on_meta(UMT5EncoderModel, config), _untied(source), layout, TIED)


def _untied(source: tensorfiles.TensorSource) -> tensorfiles.TensorSource:
    """The embedding under its one name `shared.weight`; files hold it under either name or under both."""
    entries = dict(source.entries)
    for alias, name in TIED.items():
        if alias in entries:
            entries.setdefault(name, entries[alias])
            del entries[alias]
    return tensorfiles.TensorSource(source.label, entries)


def load_tokenizer(folder: Path | None):
    """The tokenizer of `folder`; ByT5 (bytes, needs no files) when there is none. Raises WeightsError."""
    if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return ByT5Tokenizer()
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise WeightsError(f"{folder}: not a readable tokenizer ({str(error).splitlines()[0]}); fetch it again") from None


# ---------------------------------------------------------------- wav2vec2


def plan_wav2vec(folder: Path) -> tensorfiles.LoadPlan:
    """How a Wav2Vec2Model is filled from a transformers folder, with or without a CTC head. Raises WeightsError."""
    config = _read_config(Wav2Vec2Config, folder / "config.json")
    source = tensorfiles.open_file(tensorfiles.find_weights(folder))
    # The CTC head turns features into letters: known, and not needed here.
    body = {name: entry for name, entry in source.entries.items() if not name.startswith("lm_head.")}
    source = tensorfiles.TensorSource(source.label, body).renamed(_wav2vec_name)
    return tensorfiles.LoadPlan(_on_meta(Wav2Vec2Model, config), source, "a transformers wav2vec2 folder")


def _wav2vec_name(name: str) -> str:
    name = name.removeprefix("wav2vec2.")
    # Files of before torch 2 spell the weight norm of the positional convolution so.
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        name = re.sub(rf"^(encoder\.pos_conv_embed\.conv)\.{old}$", rf"\1.parametrizations.weight.{new}", name)
    return name


def load_wav2vec(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Wav2Vec2Model:
    """transformers' Wav2Vec2Model from its folder, strictly. Raises WeightsError."""
    return plan_wav2vec(Path(folder)).load(tensorfiles.cast_to(dtype, device))


# ---------------------------------------------------------------- shared


def _read_config(cls, path: Path):
    mapping = tensorfiles.read_json(path)
    try:
        return cls(**{key: value for key, value in mapping.items() if key not in ("model_type", "architectures")})
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: no {cls.__name__} ({str(error).splitlines()[0]})") from None


def _on_meta(cls, config):
    try:
        with torch.device("meta"):
            return cls(config)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{cls.__name__} cannot be built from its config ({str(error).splitlines()[0]})") from None
