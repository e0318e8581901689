"""Side stage `unpack`: a finished avatar's folder taken apart into a run, so that stages can go on from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from liveavatar.core import ConfigError, WeightsError
from liveavatar.models.s2v import S2VConfig
from liveavatar.models.weights import load_text_encoder, load_transformer, load_vae
from liveavatar.training.checkpoints import checkpoint_path, save_checkpoint
from liveavatar.training.forcing import ForcingConfig
from liveavatar.training.textcode import Reader, TextConfig

STAGE = "avatar"  # the name its transformer has among the stages


def unpack(folder: str | Path, forcing: ForcingConfig, text: TextConfig | None, run: str | Path, seed: int) -> None:
    """Write RUN/avatar.pt, RUN/vae and RUN/vae.pt, and RUN/text.pt of a checkpoint folder, as fp32 averages of iteration 0.

    text: the recipe's text encoder; its reader's heads start anew. Raises WeightsError, and ConfigError where the avatar is of
    other sizes than the recipe.
    """
    if text is None:
        raise ConfigError("unpack: the recipe has no text section, the avatar's words would be lost")
    model, vae, words = load_transformer(folder), load_vae(folder), load_text_encoder(folder)
    if model.config != S2VConfig.from_dict(forcing.model):
        raise ConfigError(f"{folder}: a transformer of other sizes than forcing.model: {model.config.to_dict()}")
    reader = Reader(text, model.config.text_dim, seed)
    try:
        reader.encoder.load_state_dict(words.module.state_dict())
    except RuntimeError as error:
        raise WeightsError(f"{folder}: its text encoder is not as the text section says: {error}") from None
    Path(run).mkdir(parents=True, exist_ok=True)
    for stage, module in ((STAGE, model), ("vae", vae.module), ("text", reader)):
        _keep(module, checkpoint_path(run, stage))
    vae.module.save_pretrained(Path(run) / "vae")


def _keep(module: nn.Module, path: Path) -> None:
    averages = {f"ema/{name}": p.detach().float() for name, p in module.named_parameters()}
    save_checkpoint(path, averages | {"iteration": torch.tensor(0)}, alone=True)
