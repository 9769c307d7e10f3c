"""A text-to-image pipeline of diffusers, fed our noise and embeddings, gives our samples."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peers.test_interop import run_card
from tests.peers.test_unet import randomise
from tests.texts import CHANNELS, WordEncoder
from tests.tiny import TINY_TEXT

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.networks.files.layout import INDEX
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_kernels import Stream, gaussian_noise

diffusers = pytest.importorskip("diffusers")

LENGTH = 4
CONFIG = replace(TINY_TEXT, sample_size=(8, 16), cross_attention_dim=12, encoder_hid_dim=CHANNELS)
PROMPTS = ["a red fox", "two grey cats"]
"""As long as each other: that pipeline knows no masks."""


def model_of(config: UNetConfig, **run: Any) -> LoadedModel:
    """A network as if a run had trained it."""
    unet = UNet(config).eval().requires_grad_(False)
    randomise(unet, seed=1)
    return LoadedModel.from_config(unet, RunConfig(model=config, **run), "0" * 64)


@pytest.mark.parametrize("negative", [None, "an old photograph"])
def test_the_pipeline_generates_our_samples(negative: str | None, tmp_path: Path) -> None:
    model = model_of(
        CONFIG,
        diffusion=DiffusionConfig(prediction="v", schedule="cosine"),
        sampling=SamplingConfig(sampler="ddim", steps=8, spacing="trailing", clip_x0=False),
    )
    export_pipeline(model, tmp_path)
    model = replace(model, text_encoder=WordEncoder(LENGTH))  # type: ignore[arg-type]
    assert not (tmp_path / INDEX).exists()  # such pipelines have further parts
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    parts: dict[str, Any] = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    )
    warnings.simplefilter("ignore", FutureWarning)  # an offset of steps, which trailing ones lack
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts
    )
    pipeline.set_progress_bar_config(disable=True)

    ids = torch.tensor([0, 1])
    encoder = WordEncoder(LENGTH)
    null = torch.zeros(2, LENGTH, CHANNELS)
    expected = pipeline(
        prompt_embeds=encoder.encode(PROMPTS).tokens,
        negative_prompt_embeds=null if negative is None else encoder.encode([negative] * 2).tokens,
        latents=gaussian_noise(6, ids, model.shape, 0, Stream.INITIAL_NOISE),
        height=8 * pipeline.vae_scale_factor,
        width=16 * pipeline.vae_scale_factor,
        guidance_scale=3.0,
        num_inference_steps=8,
        output_type="latent",
    ).images

    options: dict[str, Any] = {} if negative is None else {"negative_prompt": negative}
    samples = model.sample(PROMPTS, seed=6, guidance=3.0, **options).tensor
    assert expected.std() > 0.2
    assert (samples - expected).abs().max() <= 1e-4


def test_the_card_generates_our_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = DiffusionConfig(schedule="flow", prediction="flow", shift=3.0)
    sampling = SamplingConfig(sampler="euler", steps=6)
    export_pipeline(model_of(CONFIG, diffusion=diffusion, sampling=sampling), tmp_path)
    back = replace(load_model(tmp_path), text_encoder=WordEncoder(LENGTH))  # type: ignore[arg-type]
    assert back.config.model == CONFIG
    prompts = ["fox", "two grey cats", "a fox", ""]
    initial = gaussian_noise(6, torch.arange(4), back.shape, 0, Stream.INITIAL_NOISE)
    encoded = WordEncoder(LENGTH).encode(prompts)
    names = run_card(tmp_path, initial, monkeypatch, text=encoded.tokens, mask=encoded.mask)
    samples = back.sample(prompts, seed=6, sampler="euler", steps=6).tensor
    assert names["x"].std() > 0.2
    assert (samples - names["x"]).abs().max() <= 1e-4
