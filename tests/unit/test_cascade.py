"""Chains of models: cascades of sizes, and priors with their decoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.texts import CHANNELS, TextNetwork, WordEncoder
from torch import Tensor

import ddpm_engine
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.generation.chain import Cascade
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.samples import sample
from ddpm_engine.samplers.stages import stage_seed

PROMPTS = ["forty-two", "the number seventeen", "three"]
EMBEDDING = 5


def model_of(shape: tuple[int, int, int], source: Any = "text", **network: Any) -> DiffusionModel:
    clip = shape[1:] != (1, 1)
    return DiffusionModel(
        TextNetwork(shape, **network), NoiseSchedule.linear(1000), "eps",
        SamplingConfig(sampler="ddpm", steps=3, clip_x0=clip),
        text_encoder=WordEncoder(8), vector=source,
    )  # fmt: skip


BASE = model_of((3, 4, 4))
UPSCALER = model_of((3, 8, 8), low_resolution=4)
PRIOR = model_of((EMBEDDING, 1, 1))
DECODER = model_of((3, 4, 4), source="image", text=None, vector=EMBEDDING)


def as_images(samples: Tensor) -> Tensor:
    codec = PixelCodec()
    return codec.encode(codec.levels(samples).permute(0, 3, 1, 2))


def test_the_base_model_is_sampled_and_then_upscaled() -> None:
    cascade = ddpm_engine.Cascade([BASE, UPSCALER])
    options: dict[str, Any] = {"guidance": 2.0, "progress": False}
    samples = cascade.sample(PROMPTS, seed=3, augmentation_level=50, **options)
    small = sample(BASE, PROMPTS, seed=3, **options).tensor
    by_hand = sample(
        UPSCALER, PROMPTS, seed=stage_seed(3, 1), low_resolution=as_images(small),
        augmentation_level=50, **options,
    )  # fmt: skip
    assert torch.equal(samples.tensor, by_hand.tensor)
    assert [image.size for image in samples.images] == [(8, 8)] * 3


def test_samples_depend_on_seed_id_and_prompt_alone() -> None:
    cascade = Cascade([BASE, UPSCALER])
    options: dict[str, Any] = {"prompts": PROMPTS, "seed": 3, "progress": False}
    whole = cascade.sample(6, **options).tensor
    torch.testing.assert_close(
        cascade.sample([5, 1], **options).tensor, whole[[5, 1]], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        cascade.sample(6, batch_size=4, **options).tensor, whole, rtol=0, atol=1e-5
    )
    other = cascade.sample(6, **{**options, "seed": 4}).tensor
    assert not torch.equal(other, whole)


def test_noise_of_stages_is_not_the_same() -> None:
    seeds = {stage_seed(seed, stage) for seed in (0, 1, -1, 2**63) for stage in range(4)}
    assert len(seeds) == 16
    assert stage_seed(7, 0) == 7
    assert all(0 <= stage_seed(seed, 1) < 2**64 for seed in (-5, 2**64 - 1))
    # SplitMix64's first output for the seed 0, as Vigna publishes it.
    assert stage_seed(0, 1) == 0xE220A8397B1DCDAF


def test_a_prior_samples_the_embedding_of_a_decoder() -> None:
    chain = Cascade([PRIOR, DECODER, UPSCALER])
    samples = chain.sample(PROMPTS, seed=3, guidance=2.0, progress=False).tensor
    embeddings = sample(PRIOR, PROMPTS, seed=3, guidance=2.0, progress=False).tensor
    assert embeddings.shape == (3, EMBEDDING, 1, 1)
    decoded = sample(
        DECODER, 3, seed=stage_seed(3, 1), embeddings=embeddings, guidance=2.0, progress=False
    ).tensor
    upscaled = sample(
        UPSCALER, PROMPTS, seed=stage_seed(3, 2), low_resolution=as_images(decoded), guidance=2.0,
        progress=False,
    ).tensor  # fmt: skip
    assert torch.equal(samples, upscaled)


def test_a_model_may_have_options_of_its_own() -> None:
    cascade = Cascade([BASE, UPSCALER])
    sampler = cascade.sampler([{}, {"guidance": 4.0, "steps": 5}], prompts=PROMPTS, guidance=2.0)
    assert sampler.request.guidance == Guidance(4.0)
    assert sampler.evaluations == 3 + 5
    assert sampler.stages[0].sampler.request.guidance == Guidance(2.0)


def test_progress_counts_the_evaluations_of_all_models() -> None:
    sampler = Cascade([PRIOR, DECODER]).sampler(prompts=PROMPTS, seed=1)
    counted: list[int] = []
    sampler.sample([0, 1, 2], batch_size=2, on_step=counted.append)
    assert sum(counted) == 3 * sampler.evaluations == 3 * 6


def test_settings_name_all_models_and_the_prompts() -> None:
    sampler = Cascade([PRIOR, DECODER]).sampler(prompts=PROMPTS, seed=9)
    settings = sampler.settings()
    assert settings["prompts"] == PROMPTS
    assert settings["seed"] == 9
    assert [stage["seed"] for stage in settings["stages"]] == [9]
    again = Cascade([PRIOR, DECODER]).sampler(prompts=PROMPTS, seed=9)
    assert again.settings() == settings
    changed = Cascade([PRIOR, DECODER]).sampler([{"steps": 2}], prompts=PROMPTS, seed=9)
    assert changed.settings()["embeddings"] != settings["embeddings"]


def test_warming_up_samples_nothing() -> None:
    sampler = Cascade([BASE, UPSCALER]).sampler(prompts=PROMPTS)
    sampler.warm_up([0, 1])
    sampler.sample([0])
    evaluated = len(BASE.network.batches)
    sampler.warm_up([0])
    assert len(BASE.network.batches) == evaluated + 1


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([BASE], "names 1 model"),
        ([BASE, BASE], "conditioned neither on low-resolution images nor on image embeddings"),
        ([UPSCALER, UPSCALER], "model 1 samples 8×8 with 3 channels, and model 2 upscales 4×4"),
        ([BASE, DECODER], "is conditioned on embeddings of 5 channels"),
    ],
)
def test_models_that_do_not_follow_each_other_are_refused(models: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cascade(models)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": torch.zeros(1, 3, 4, 4)}, "`images` does nothing in a cascade"),
        ({"classes": (1,)}, "`classes` is given, but no model of the cascade"),
        ({"guidance": 2.0, "prompts": None}, "`guidance` is given, but no model"),
        ({"stages": [{}, {}, {}]}, "`stages` has 3 entries for 2 models"),
        ({"stages": [{}, {"embeddings": torch.zeros(1, 4)}]}, "not conditioned on image"),
    ],
)
def test_options_that_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cascade([BASE, UPSCALER]).sampler(**{"prompts": PROMPTS, **options})


def test_models_without_text_make_a_cascade_too() -> None:
    base = replace(BASE, network=TextNetwork((3, 4, 4), text=None), text_encoder=None)
    upscaler = replace(
        UPSCALER, network=TextNetwork((3, 8, 8), text=None, low_resolution=4), text_encoder=None
    )
    assert Cascade([base, upscaler]).sample(2, progress=False).tensor.shape == (2, 3, 8, 8)
    assert BASE.spec.text == CHANNELS
