"""The published weights of Moonshine tiny (MIT, Useful Sensors; arXiv 2410.15608): what the embedded avatar's speech encoder begins as.

No hub is needed: the npm package `@moonshine-ai/moonshine-js` carries the encoder as ONNX, quantised to eight bits. `npm pack
@moonshine-ai/moonshine-js@0.1.29` and tar leave it as package/dist/model/tiny/quantized/encoder_model.onnx. Where there is a hub, the folder of
UsefulSensors/moonshine-tiny, in float32, does as well.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import torch

from liveavatar.core import ConfigError, WeightsError
from liveavatar.models import tensorfiles
from liveavatar.models.viseme_encoder import MoonshineVisemes

SOURCE = "Moonshine tiny (English), encoder | npm @moonshine-ai/moonshine-js 0.1.29"
LICENCE = """\
The first layers of this network are Moonshine tiny's, trained on; with them comes this notice.

MIT License

Copyright (c) 2025 Useful Sensors, Inc.

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
NOTICE = "LICENSE"  # of a viseme encoder's folder: goes wherever its weights go
CONVOLUTIONS = ("conv1", "conv2", "conv3")


def begin_as_published(encoder: MoonshineVisemes, path: str | Path) -> None:
    """Fill `encoder.encoder` with the first layers of the published weights; its head stays. path: the ONNX file or a transformers folder.

    Raises ConfigError without the package onnx, WeightsError where the file is not what it should be.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file; `npm pack @moonshine-ai/moonshine-js@0.1.29` and tar bring it (training/moonshine.py)")
    published = _of_folder(path) if path.is_dir() else _of_onnx(path)
    wanted = tensorfiles.expected_shapes(encoder.encoder)
    found = {name: tensor for name, tensor in published.items() if name in wanted}
    wrong = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in found or tuple(found[name].shape) != shape]
    if wrong:
        raise WeightsError(f"{path}: not Moonshine of these sizes; missing or of another shape: {tensorfiles.listing('tensors', wrong)}")
    encoder.encoder.load_state_dict(found)


def pass_on_licence(source: Path, target: Path) -> bool:
    """Copy the notice of one viseme encoder's folder to another; whether there is one, and the encoder so began as Moonshine."""
    if (source / NOTICE).is_file():
        shutil.copyfile(source / NOTICE, target / NOTICE)
        return True
    return False


def _of_folder(path: Path) -> dict[str, torch.Tensor]:
    source = tensorfiles.open_file(tensorfiles.find_weights(path))
    prefix = "model.encoder." if any(name.startswith("model.") for name in source.entries) else "encoder."
    return {name.removeprefix(prefix): tensorfiles.read(entry).float() for name, entry in source.entries.items() if name.startswith(prefix)}


def _of_onnx(path: Path) -> dict[str, torch.Tensor]:
    """Of the graph that onnxruntime's dynamic quantisation made. Linears are (q - zero) * scale and lie transposed; convolutions q * scale + zero,
    by nodes of their own; norms and biases have lost their names, not the nodes that use them."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError:
        raise ConfigError("reading Moonshine's weights needs onnx: pip install 'liveavatar[train]'") from None
    try:
        graph = onnx.load(str(path)).graph
    except (OSError, DecodeError) as error:
        raise WeightsError(f"{path}: not a readable ONNX file ({error}); fetch it again") from None
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}

    def stored(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(arrays[f"{name}_{part}"].astype(np.float32) for part in ("quantized", "zero_point", "scale"))

    try:
        for name in CONVOLUTIONS:
            values, zero, scale = stored(f"{name}.weight")
            found[f"{name}.weight"] = values * scale + zero
        for node in graph.node:
            place = re.sub(r"\.(MatMul|Mul|Add)(_quant)?$", "", node.name.strip("/").replace("/", ".")).replace("self_attn.dense", "self_attn.o_proj")
            vectors = [arrays[name].reshape(-1) for name in node.input if name in arrays and arrays[name].size > 1]
            if node.op_type == "MatMulInteger":
                values, zero, scale = stored(node.input[1].removesuffix("_quantized"))
                found[f"{place}.weight"] = ((values - zero) * scale).T
            elif node.op_type == "Mul" and "norm" in place and vectors:
                found[f"{place}.weight"] = vectors[0]
            elif node.op_type == "Add" and (place.endswith(("fc1", "fc2")) or place == "groupnorm"):
                found[f"{place}.bias"] = vectors[0]
            elif node.op_type == "Conv" and len(node.input) > 2:
                found[f"{place.removesuffix('.Conv')}.bias"] = arrays[node.input[2]]
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{path}: not the encoder of moonshine-js 0.1.29, quantised: {error}") from None
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in found.items()}
