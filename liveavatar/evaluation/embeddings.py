"""Pictures into vectors by networks the user supplies: DINOv2, ArcFace, the Inception of FID, the I3D of FVD, Q-Align."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from liveavatar.core import ConfigError, WeightsError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCFACE_SIDE = 112
ARCFACE_POINTS = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
CLIP = 16  # pictures of one FVD clip


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [n] of rows a [n, d] with b [n, d] or [d]."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


# ---------------------------------------------------------------- DINOv2


@torch.inference_mode()
def dino(model, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Class tokens [n, d] of pictures uint8 [H, W, 3]: short side 256 (bicubic), centre 224, ImageNet statistics."""
    return np.concatenate([model(pixel_values=_dino_input(p)).last_hidden_state[:, 0].float().numpy() for p in pictures])


def _dino_input(picture: np.ndarray) -> torch.Tensor:
    from PIL import Image

    image = Image.fromarray(picture)
    scale = 256 / min(image.size)
    image = image.resize((max(256, round(image.width * scale)), max(256, round(image.height * scale))), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    values = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    return torch.from_numpy((values - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).permute(2, 0, 1)[None]


def load_dino(folder: Path):
    """A DINOv2 folder as transformers saves it. Raises WeightsError."""
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: no DINOv2 folder of transformers: {' '.join(str(error).split())[:200]}") from None
    if model.config.model_type not in ("dinov2", "dinov2_with_registers"):
        raise WeightsError(f"{folder}: holds a {model.config.model_type} and no DINOv2")
    return model.eval()


# ---------------------------------------------------------------- ArcFace


def arcface(session, pictures: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
    """Embeddings [n, d] of faces in pictures uint8 [H, W, 3]; points [n, 5, 2]: eyes (person's right first), nose tip, mouth corners."""
    import cv2

    name, made = session.get_inputs()[0].name, []
    for picture, five in zip(pictures, points, strict=True):
        aligned = cv2.warpAffine(picture, similarity(five, ARCFACE_POINTS), (ARCFACE_SIDE, ARCFACE_SIDE))
        values = ((aligned.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]
        made.append(session.run(None, {name: values})[0][0])
    return np.stack(made)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift [2, 3] that brings points source [n, 2] nearest to target [n, 2] (least squares)."""
    a, b = source - source.mean(0), target - target.mean(0)
    norm = (a**2).sum()
    cosine_part, sine_part = (a * b).sum() / norm, (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / norm
    turn = np.array([[cosine_part, -sine_part], [sine_part, cosine_part]])
    return np.concatenate([turn, (target.mean(0) - turn @ source.mean(0))[:, None]], axis=1)


def load_onnx(path: Path):
    """An onnxruntime session on the CPU. Raises ConfigError without the package, WeightsError on another file."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("ArcFace needs onnxruntime: pip install 'liveavatar[eval]'") from None
    try:
        return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except (OSError, RuntimeError, ValueError, *_onnx_errors()) as error:
        raise WeightsError(f"{path}: no ONNX model: {' '.join(str(error).split())[:200]}") from None


def _onnx_errors() -> tuple[type, ...]:
    """The exceptions of onnxruntime, which share no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile


# ---------------------------------------------------------------- FID and FVD


@torch.inference_mode()
def inception(module, pictures: np.ndarray, batch: int = 8) -> np.ndarray:
    """Features [n, 2048] of pictures uint8 [n, H, W, 3] by the TorchScript port of the standard Inception, which resizes by itself."""
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return torch.cat([module(part, return_features=True) for part in images.split(batch)]).float().numpy()


@torch.inference_mode()
def i3d(module, pictures: np.ndarray) -> np.ndarray:
    """Features [n, 400] of consecutive clips of 16 pictures, uint8 [T, H, W, 3], by the TorchScript port of the standard I3D (224 pixels)."""
    count = len(pictures) // CLIP
    clips = torch.from_numpy(pictures[: count * CLIP]).unflatten(0, (count, CLIP)).permute(0, 4, 1, 2, 3).float()
    if not count:
        return np.zeros((0, 400), np.float32)
    return torch.cat([module(clip[None], rescale=True, resize=True, return_features=True) for clip in clips]).float().numpy()


def load_script(path: Path):
    """A TorchScript file. Raises WeightsError."""
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(f"{path}: no TorchScript module: {' '.join(str(error).split())[:200]}") from None


# ---------------------------------------------------------------- Q-Align


def load_qalign(folder: Path):
    """Q-Align's folder; its own code is run, which the config must allow. Raises WeightsError."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, trust_remote_code=True)
    except (OSError, ValueError, ImportError, AttributeError) as error:  # its code was written for another transformers
        raise WeightsError(f"{folder}: Q-Align does not load with this transformers: {' '.join(str(error).split())[:200]}") from None
    if not hasattr(model, "score"):
        raise WeightsError(f"{folder}: no Q-Align: the model has no `score`")
    return model.eval()


@torch.inference_mode()
def qalign(model, pictures: Sequence[np.ndarray], task: str) -> np.ndarray:
    """Scores [n] from 1 to 5 of pictures uint8 [H, W, 3]; task: "quality" (IQA) or "aesthetics" (ASE)."""
    from PIL import Image

    images = [Image.fromarray(p) for p in pictures]
    return torch.as_tensor(model.score(images, task_=task, input_="image")).float().flatten().numpy()
