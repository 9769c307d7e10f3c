"""Pipelines as published, at a fraction of their width, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
from torch import nn

STABLE_1: dict[str, Any] = {
    "act_fn": "silu", "attention_head_dim": 4, "block_out_channels": [16, 32],
    "cross_attention_dim": 24, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 1,
    "norm_num_groups": 8, "out_channels": 4, "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
STABLE_2: dict[str, Any] = {
    **STABLE_1, "attention_head_dim": [2, 4], "use_linear_projection": True,
    "upcast_attention": True,
}  # fmt: skip
DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
    "norm_elementwise_affine": False,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [8, 16], "down_block_types": 2 * ["DownEncoderBlock2D"],
    "up_block_types": 2 * ["UpDecoderBlock2D"], "latent_channels": 4, "norm_num_groups": 4,
    "sample_size": 16, "scaling_factor": 0.18215,
}  # fmt: skip
BETAS: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
}  # fmt: skip
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": (
        "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    ),
    "dpm++": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
}  # fmt: skip
CLASSES = ("cat, tabby", "dog", "owl", *(f"kind {number}" for number in range(3, 1000)))
"""The pipeline of diffusers takes class 1000 for no class."""
LENGTH = 77


def scheduler_named(name: str, prediction: str = "epsilon") -> Any:
    import diffusers

    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind)(**BETAS, prediction_type=prediction, **options)


def randomised(model: Any, seed: int) -> Any:
    """Fill parameters so that outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(noise + float(parameter.ndim == 1) * 0.5)
    return model.eval()


def autoencoder(seed: int = 3) -> Any:
    import diffusers

    return randomised(diffusers.AutoencoderKL(**AUTOENCODER), seed)


def stable_diffusion(unet: dict[str, Any], scheduler: Any, folder: Path) -> Any:
    """Build a pipeline, and save it to a folder.

    Args:
        unet: configuration of the network.
        scheduler: of the pipeline.
        folder: for it.
    """
    import diffusers
    import transformers

    vocabulary = folder / "words"
    vocabulary.mkdir(parents=True)
    letters = ascii_lowercase + digits
    tokens = ["!", *letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (vocabulary / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(tokens)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        vocabulary, model_max_length=LENGTH, pad_token="!"
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(4)
        encoder = transformers.CLIPTextModel(config).eval()
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=randomised(diffusers.UNet2DConditionModel(**unet), 1),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def dit(scheduler: Any, folder: Path) -> Any:
    """Build a pipeline of a transformer with a thousand classes, and save it to a folder.

    Args:
        scheduler: of the pipeline.
        folder: for it.
    """
    import diffusers

    network: nn.Module = diffusers.DiTTransformer2DModel(**DIT)
    pipeline = diffusers.DiTPipeline(
        transformer=randomised(network, 2),
        vae=autoencoder(),
        scheduler=scheduler,
        id2label=dict(enumerate(CLASSES)),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    # As in the published ones; the library of today leaves them out.
    index = folder / "model_index.json"
    labels = {str(number): name for number, name in enumerate(CLASSES)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": labels}))
    return pipeline
