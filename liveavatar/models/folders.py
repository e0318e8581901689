"""Checkpoint folders: which layout it is and where its parts lie (model.md section 15.1).

Finding reads names and JSON only; no tensor. Three layouts:

- ours: `liveavatar.json`, `transformer.safetensors`, `vae/`, `text_encoder/`, perhaps `wav2vec2/` or `viseme_encoder/`.
- official: Wan-AI/Wan2.2-S2V-14B, transformer shards beside a root `config.json`.
- repack: sub-folders in diffusers style, told apart by what each `config.json` says it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from liveavatar.core import WeightsError
from liveavatar.models import tensorfiles

DEFAULT_FOLDER = Path(__file__).parent.parent / "assets" / "default"
SETTINGS_FILE = "liveavatar.json"
FORMAT = 1  # of SETTINGS_FILE
SECTIONS = ("transformer", "audio", "sampler", "geometry", "framing", "text", "control", "card")
TRANSFORMER_STEM = "diffusion_pytorch_model"
OFFICIAL_PARTS = {
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "google/umt5-xxl",
    "wav2vec": "wav2vec2-large-xlsr-53-english",
}
# What a run of the official weights needs beside them: pipeline settings of the distilled model (model.md section 2).
OFFICIAL_SETTINGS = {
    "audio": {"kind": "wav2vec2"},
    "sampler": {},
    "geometry": {"block_latents": 3, "ring_blocks": 4, "motion_frames": 73},
    "text": {"kind": "umt5"},
    "card": {},
}
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


@dataclass(frozen=True)
class CheckpointFolder:
    """Parts of a checkpoint. A part that the folder lacks is None.

    layout: "ours", "official" or "repack". transformer: weights file or index; transformer_config: the
    JSON it was described in, `config` its mapping. vae: diffusers folder or Wan2.1_VAE.pth.
    text_encoder: transformers folder or .pth. tokenizer, wav2vec, viseme_encoder: folders.
    audio, sampler, geometry, framing, text, control, card: sections of liveavatar.json, or what the layout implies.
    """

    path: Path
    layout: str
    transformer: Path
    transformer_config: Path
    config: dict
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    wav2vec: Path | None
    viseme_encoder: Path | None = None
    audio: dict = field(default_factory=dict)
    sampler: dict = field(default_factory=dict)
    geometry: dict = field(default_factory=dict)
    framing: dict = field(default_factory=dict)
    text: dict = field(default_factory=dict)
    control: dict = field(default_factory=dict)
    card: dict = field(default_factory=dict)

    def need(self, part: str) -> Path:
        """Path of `part` ("vae", "text_encoder", ...). Raises WeightsError when the folder has none."""
        path = getattr(self, part)
        if path is None:
            wanted = {"ours": _OURS.get(part, part), "official": OFFICIAL_PARTS.get(part, part)}
            hint = wanted.get(self.layout, "a sub-folder whose config.json names its class")
            raise WeightsError(f"{self.path}: {self.layout} checkpoint without {part} (looked for {hint}); fetch that part too")
        return path


_OURS = {"vae": "vae/", "text_encoder": "text_encoder/", "tokenizer": "text_encoder/", "wav2vec": "wav2vec2/",
         "viseme_encoder": "viseme_encoder/"}


def resolve(path: str | Path) -> Path:
    """Folder a config's `model.path` means: "default" is the embedded checkpoint."""
    return DEFAULT_FOLDER if str(path) == "default" else Path(path).expanduser()


def open_folder(path: str | Path) -> CheckpointFolder:
    """Recognise the layout of a checkpoint folder and find its parts. Raises WeightsError naming what is absent."""
    folder = resolve(path)
    if not folder.is_dir():
        kind = "is a file, not a checkpoint folder" if folder.exists() else "no such checkpoint folder"
        raise WeightsError(f"{folder}: {kind}; give the folder that holds the weights")
    if (folder / SETTINGS_FILE).is_file():
        return _open_ours(folder)
    if _is_official(folder):
        return _open_official(folder)
    parts = _classes(folder)
    if (folder / "model_index.json").is_file() or parts:
        return _open_repack(folder, parts)
    raise WeightsError(
        f"{folder}: no known checkpoint layout: holds neither {SETTINGS_FILE} (ours), nor config.json with "
        f"{TRANSFORMER_STEM}*.safetensors (Wan-AI/Wan2.2-S2V-14B), nor model_index.json with sub-folders (repack); "
        f"found: {', '.join(sorted(p.name for p in folder.iterdir())[:10]) or 'nothing'}"
    )


# ---------------------------------------------------------------- ours


def read_settings(folder: Path) -> dict:
    """`liveavatar.json`, checked for format and sections. Raises WeightsError."""
    path = folder / SETTINGS_FILE
    settings = tensorfiles.read_json(path)
    if settings.get("format") != FORMAT:
        raise WeightsError(f"{path}: format {settings.get('format')!r}, this version reads {FORMAT}; update liveavatar or save the folder again")
    unknown = sorted(settings.keys() - {"format", *SECTIONS})
    broken = [name for name in SECTIONS if not isinstance(settings.get(name, {}), dict)]
    missing = [name for name in ("transformer", "audio") if name not in settings]
    for problem, names in (("unknown", unknown), ("missing", missing), ("not a mapping:", broken)):
        if names:
            raise WeightsError(f"{path}: {problem} section(s) {', '.join(names)}; save the folder again")
    return settings


def _open_ours(folder: Path) -> CheckpointFolder:
    settings = read_settings(folder)
    text = _existing(folder / "text_encoder")
    return CheckpointFolder(
        path=folder,
        layout="ours",
        transformer=folder / "transformer.safetensors",
        transformer_config=folder / SETTINGS_FILE,
        config=settings["transformer"],
        vae=_existing(folder / "vae"),
        text_encoder=text,
        tokenizer=text,
        wav2vec=_existing(folder / "wav2vec2"),
        viseme_encoder=_existing(folder / "viseme_encoder"),
        **{name: settings.get(name, {}) for name in SECTIONS if name != "transformer"},
    )


# ---------------------------------------------------------------- official


def _is_official(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob(f"{TRANSFORMER_STEM}*.safetensors*"))


def _open_official(folder: Path) -> CheckpointFolder:
    return CheckpointFolder(
        path=folder,
        layout="official",
        transformer=tensorfiles.find_weights(folder, TRANSFORMER_STEM),
        transformer_config=folder / "config.json",
        config=tensorfiles.read_json(folder / "config.json"),
        **{part: _existing(folder / name) for part, name in OFFICIAL_PARTS.items()},
        **OFFICIAL_SETTINGS,
    )


# ---------------------------------------------------------------- repack


def _classes(folder: Path) -> dict[str, Path]:
    """Class name -> sub-folder, as each sub-folder's config.json says it."""
    found = {}
    for path in sorted(folder.glob("*/config.json")):
        config = tensorfiles.read_json(path)
        names = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or []
        found |= {str(name): path.parent for name in names}
    return found


def _open_repack(folder: Path, classes: dict[str, Path]) -> CheckpointFolder:
    parts = {part: _one(folder, part, classes, test) for part, test in _IS_PART.items()}
    transformer = parts.pop("transformer")
    if transformer is None:
        seen = ", ".join(f"{path.name}/ is {name}" for name, path in classes.items()) or "no sub-folder with a config.json"
        raise WeightsError(f"{folder}: read as a repack, but no sub-folder holds an S2V transformer ({seen})")
    marked = sorted({path.parent for mark in TOKENIZER_MARKS for path in folder.glob(f"*/{mark}")} - {parts["wav2vec"]})
    return CheckpointFolder(
        path=folder,
        layout="repack",
        transformer=tensorfiles.find_weights(transformer),
        transformer_config=transformer / "config.json",
        config=tensorfiles.read_json(transformer / "config.json"),
        tokenizer=marked[0] if marked else None,
        **parts,
        **OFFICIAL_SETTINGS,
    )


_IS_PART = {
    "transformer": lambda name: "S2V" in name,
    "vae": lambda name: name == "AutoencoderKLWan",
    "text_encoder": lambda name: name == "UMT5EncoderModel",
    "wav2vec": lambda name: name.startswith("Wav2Vec2"),
}


def _one(folder: Path, part: str, classes: dict[str, Path], test) -> Path | None:
    found = sorted({path for name, path in classes.items() if test(name)})
    if len(found) > 1:
        raise WeightsError(f"{folder}: several sub-folders could be the {part}: {', '.join(p.name for p in found)}; keep one")
    return found[0] if found else None


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None
