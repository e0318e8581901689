"""Side stage `unpack`: a finished avatar's folder taken apart into a run, so that stages can go on from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from liveavatar.conditioning.audio_features import LogMelFrontEnd
from liveavatar.conditioning.behaviour import LIDS_AND_HEAD
from liveavatar.core import ConfigError, InputError, WeightsError
from liveavatar.models.folders import open_folder
from liveavatar.models.s2v import CausalS2V, S2VConfig
from liveavatar.models.weights import load_hearing, load_text_encoder, load_transformer, load_vae, save_viseme_encoder
from liveavatar.training import shards
from liveavatar.training.checkpoints import checkpoint_path, save_checkpoint
from liveavatar.training.forcing import ForcingConfig
from liveavatar.training.lids import only_lids
from liveavatar.training.moonshine import pass_on_licence
from liveavatar.training.progress import counted
from liveavatar.training.stored import front_end_of_run, hears_visemes
from liveavatar.training.textcode import Reader, TextConfig

STAGE = "avatar"  # the name its transformer has among the stages
HEARD = 300  # clips that what the spectrum did to an avatar is fitted on
FIRST = ("conv1_local", "conv1_global")  # the convolutions that see features


def unpack(folder: str | Path, forcing: ForcingConfig, text: TextConfig | None, run: str | Path, seed: int, clips: str | Path | None = None) -> None:
    """Write RUN/avatar.pt, RUN/vae and RUN/vae.pt, RUN/text.pt, and RUN/visemes where it has one, of a checkpoint folder, as fp32 averages of
    iteration 0.

    text: the recipe's text encoder; its reader's heads start anew. An avatar that hears the spectrum, for a recipe with a viseme encoder, is
    fitted to it on the sound of the folder `clips`. Raises WeightsError, InputError without such clips, and ConfigError where the avatar is of
    other sizes than the recipe.
    """
    if text is None:
        raise ConfigError("unpack: the recipe has no text section, the avatar's words would be lost")
    model, vae, words, hearing = load_transformer(folder), load_vae(folder), load_text_encoder(folder), load_hearing(folder)
    wanted = S2VConfig.from_dict(forcing.model)
    if replace(model.config, audio_dim=wanted.audio_dim) != wanted or (hearing and not hears_visemes(forcing.model)):
        raise ConfigError(f"{folder}: a transformer of other sizes than forcing.model: {model.config.to_dict()}")
    reader = Reader(text, model.config.text_dim, seed)
    try:
        reader.encoder.load_state_dict(words.module.state_dict())
    except RuntimeError as error:
        raise WeightsError(f"{folder}: its text encoder is not as the text section says: {error}") from None
    Path(run).mkdir(parents=True, exist_ok=True)
    if hearing:
        save_viseme_encoder(Path(run) / "visemes", hearing)
        pass_on_licence(open_folder(folder).need("viseme_encoder"), Path(run) / "visemes")
    if open_folder(folder).control != LIDS_AND_HEAD:
        only_lids(model)
    if model.config != wanted:
        model = refitted(model, wanted, forcing, run, clips)
    for stage, module in ((STAGE, model), ("vae", vae.module), ("text", reader)):
        _keep(module, checkpoint_path(run, stage))
    vae.module.save_pretrained(Path(run) / "vae")


def _keep(module: nn.Module, path: Path) -> None:
    path.unlink(missing_ok=True)  # an avatar unpacked here before gives way
    averages = {f"ema/{name}": p.detach().float() for name, p in module.named_parameters()}
    save_checkpoint(path, averages | {"iteration": torch.tensor(0)}, alone=True)


@torch.no_grad()
def refitted(model: CausalS2V, wanted: S2VConfig, forcing: ForcingConfig, run: str | Path, clips: str | Path | None) -> CausalS2V:
    """The avatar with first audio convolutions that articulators move as the spectrum moved them: least squares over pictures of clips."""
    paths = shards.clip_paths(clips, "train")[:HEARD] if clips else []
    if not paths:
        raise InputError(f"{clips}: no clips, and what the avatar hears has to be fitted on the sound of some; run the data stage")
    front_ends, before, after = (LogMelFrontEnd(), front_end_of_run(forcing.model, run)), [], []
    for path in counted(paths, "clips heard"):
        clip = shards.read_clip(path)
        for kept, front_end in zip((before, after), front_ends):
            kept.append(_taps(front_end.features_of(clip.sound, len(clip.frames))[0]))
    before, after = torch.cat(before), torch.cat(after)
    with torch.random.fork_rng():
        made = CausalS2V(wanted)
    state = model.state_dict()
    for name in FIRST:
        key = f"casual_audio_encoder.encoder.{name}.conv"
        weight, bias = (state[f"{key}.{part}"].float() for part in ("weight", "bias"))
        moved = before @ weight.flatten(1).T + bias
        solved = torch.linalg.lstsq(torch.cat([after, torch.ones(len(after), 1)], dim=1), moved, driver="gelsd").solution
        state[f"{key}.weight"], state[f"{key}.bias"] = solved[:-1].T.reshape(len(weight), wanted.audio_dim, 3), solved[-1]
    made.load_state_dict(state)
    return made


def _taps(features: torch.Tensor) -> torch.Tensor:
    """Features [C,T] as a convolution of kernel 3 sees them, looking back: [T-2,3C], flattened as its weight is."""
    return features.unfold(1, 3, 1).permute(1, 0, 2).flatten(1)
