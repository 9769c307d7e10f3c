"""One distribution, `ddpm-engine`, from two source roots: `engine/` and `kernels/`."""

from setuptools import find_packages, setup

setup(
    name="ddpm-engine",
    version="0.1.0",
    description="A training and sampling engine for denoising diffusion models",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    package_dir={"ddpm_engine": "engine/ddpm_engine", "ddpm_kernels": "kernels/ddpm_kernels"},
    packages=find_packages("engine") + find_packages("kernels"),
    package_data={"ddpm_engine": ["py.typed"], "ddpm_kernels": ["py.typed"]},
    entry_points={
        "console_scripts": [
            "ddpm-train = ddpm_engine.cli.start:train",
            "ddpm-train-autoencoder = ddpm_engine.cli.start:train_autoencoder",
            "ddpm-sample = ddpm_engine.cli.start:sample",
            "ddpm-evaluate = ddpm_engine.cli.start:evaluate",
            "ddpm-distill = ddpm_engine.cli.start:distill",
            "ddpm-export = ddpm_engine.cli.start:export",
            "ddpm-make-shards = ddpm_engine.cli.start:make_shards",
            "ddpm-checkpoints = ddpm_engine.cli.start:checkpoints",
            "ddpm-visualize = ddpm_engine.cli.start:visualize",
        ]
    },
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; sys_platform == 'linux'",
        "accelerate>=1.10",
        "docstring-parser>=0.15",
        "fsspec>=2023.5",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "tyro>=1.0",
        "webdataset>=1.0",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19"],
        "xformers": ["xformers>=0.0.33"],
        "huggingface": ["datasets>=3.0"],
        "text": ["transformers>=4.56"],
        "latents": ["diffusers>=0.34"],
        "peers": ["diffusers>=0.34"],
        "test": [
            "datasets>=3.0",
            "diffusers>=0.34",
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "mypy>=1.13",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "scipy>=1.11",
            "transformers>=4.56",
        ],
    },
)
