"""Packaging. Tools are configured in pyproject.toml; what was tested together is pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.11",
    "triton>=3.6; platform_system == 'Linux'",
    "deepspeed>=0.19",
    "webdataset>=1.0",
    "fvcore>=0.1.5",
    "numpy>=1.26",
    "scipy>=1.11",
    "pillow>=10.1",
    "safetensors>=0.4.5",
    "isal>=1.6",  # crc32 of every member that is read, 13 times zlib's speed
    "pydantic>=2.7",
    "PyYAML>=6",
    "typer>=0.12",
    "rich>=13",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "packaging>=23",
    "psutil>=5.9",
]
EXTRAS = {
    "gpu": ["xformers", "nvidia-ml-py"],
    # Needs CUDA's compiler and an installed torch: see README, "Optional packages".
    "flash": ["flash-attn"],
    "fa4": ["flash-attn-4"],
    # sentencepiece reads the tokenizer that most T5 folders hold (spiece.model).
    "hub": ["diffusers>=0.35", "transformers>=5", "sentencepiece>=0.2"],
    "track": ["wandb", "mlflow"],
    "eval": ["torchmetrics>=1.4"],  # not torchmetrics[image]: it needs torchvision
    # Shards at http(s):// and s3:// URLs. webdataset's transport needs the program curl instead.
    "remote": ["fsspec[http]>=2024.2", "s3fs>=2024.2"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.10",
        "types-PyYAML",
        "types-psutil",
        "kubernetes-validate",  # Kubernetes's own schemas, for the manifests' tests
        "liger-kernel",
    ],
}

setup(
    name="longskip",
    version="0.1.0",
    description="Train text-to-image U-ViT diffusion transformers, from a laptop to a GPU cluster",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["longskip", "longskip.*"]),
    # An explicit root makes editable installs plain paths, which type checkers follow.
    package_dir={"": "."},
    package_data={
        "longskip": [
            "py.typed",
            "profiling/templates/*",
            "launcher/demo.yaml",
            "engine/diffusers_pipeline/*.py",
            "kernels/tuned/*.json",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["longskip=longskip.launcher.cli:main"]},
)
