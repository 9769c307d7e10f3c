"""Super-resolution: conditioning in training and sampling, and invalid inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.sampling import sample
from torch import Tensor

from ddpm_engine.config import RunConfig, TrainingConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.super_resolution import (
    MAX_LEVEL,
    NoiseConditioningAugmentation,
    downsample,
    upsample,
)
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.files import config_entries
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.objectives.level_sampling import LevelSampler, LogNormalSigma
from ddpm_engine.presets import digits_upscale
from ddpm_engine.rules import validate
from ddpm_engine.samplers import sampler as loop_module
from ddpm_kernels import Stream, gaussian_noise

SCHEDULE = NoiseSchedule.linear(100, 1e-3, 0.1)
IDS = torch.tensor([5, 0, 2**40, 7])
LABELS = torch.tensor([1, 3, 0, 2])
LOW = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
SHAPE = (3, 8, 8)
TINY = replace(tiny.TINY, num_class_embeds=5, low_resolution=4)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(TINY).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.requires_grad_(False)


def stored(count: int) -> Tensor:
    levels = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(2))
    return levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


class Recording:
    """Record the conditioning of every evaluation."""

    conditioning = ConditioningSpec(classes=4, low_resolution=4)
    sample_shape = SHAPE

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        image, levels = given.low_resolution, given.augmentation_level
        assert image is not None
        assert levels is not None
        assert image.shape == x.shape
        assert levels.shape == t.shape
        self.inputs.append((image.clone(), levels.clone()))
        return x.sin() + 0.3 * image


# --- Downsampling, upsampling, augmentation


def test_downsampling_is_the_mean_of_blocks() -> None:
    images = stored(2)
    blocks = images.double().reshape(2, 3, 4, 2, 4, 2).mean((3, 5)) / 127.5 - 1
    assert torch.allclose(downsample(images, 4).double(), blocks, rtol=0, atol=1e-6)
    assert torch.allclose(downsample(images / 127.5 - 1, 4).double(), blocks, rtol=0, atol=1e-6)


def test_upsampling_interpolates_between_centres() -> None:
    # Pixel i of n lies at (i + ½) / n. Interpolation reproduces a plane, and goes on flat beyond
    # the outermost centres.
    def plane(side: int) -> Tensor:
        at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        at = at.clamp(0.5 / 4, 1 - 0.5 / 4)
        return (0.7 * at[:, None] - 0.4 * at + 0.1)[None, None]

    assert torch.allclose(upsample(plane(4), 12), plane(12), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", [1, 250, MAX_LEVEL])
def test_level_k_adds_k_steps_of_the_linear_schedule(level: int) -> None:
    augmented = NoiseConditioningAugmentation()(LOW, 8, torch.full_like(IDS, level), 3, IDS)
    alpha_bar = NoiseSchedule.linear(1000).alpha_bar[level - 1]
    noise = gaussian_noise(3, IDS, SHAPE, 0, Stream.AUGMENTATION_NOISE).double()
    clean = upsample(LOW.double(), 8)
    expected = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(augmented.double(), expected, rtol=0, atol=1e-6)
    at_zero = NoiseConditioningAugmentation()(LOW, 8, torch.zeros_like(IDS), 3, IDS)
    assert torch.equal(at_zero, upsample(LOW, 8))


def test_augmentation_noise_does_not_depend_on_the_batch() -> None:
    augmented = NoiseConditioningAugmentation()
    levels = torch.tensor([10, 0, 250, 999])
    whole = augmented(LOW, 8, levels, 3, IDS)
    for k in range(4):
        part = slice(k, k + 1)
        assert torch.equal(augmented(LOW[part], 8, levels[part], 3, IDS[part]), whole[part])


# --- In training


def inputs_of(levels: int, flip: bool = False) -> TrainingInputs:
    spec = ConditioningSpec(classes=4, low_resolution=4)
    return TrainingInputs(
        3, spec, horizontal_flip=flip, condition_dropout=0.2, augmentation_levels=levels
    )


def objective(levels: int, flip: bool = False) -> DenoisingObjective:
    return DenoisingObjective(SCHEDULE, "eps", inputs_of(levels, flip))


@pytest.mark.parametrize(
    ("prediction", "levels_of"), [("eps", None), ("edm", LogNormalSigma())], ids=["eps", "edm"]
)
@pytest.mark.parametrize("flip", [False, True])
def test_training_conditions_on_the_clean_upsampled_image_at_level_zero(
    flip: bool, prediction: str, levels_of: LevelSampler | None
) -> None:
    network, images, positions = Recording(), stored(6), torch.arange(6) + 2**33
    inputs = inputs_of(1, flip)
    given = Batch(images, positions % 4, positions)
    DenoisingObjective(SCHEDULE, prediction, inputs, levels=levels_of)(network, given)
    ((augmented, levels),) = network.inputs
    expected = upsample(downsample(images, 4), 8)
    mirrored = inputs.prepare(given).flip
    if mirrored is not None:
        assert 0 < int(mirrored.sum()) < 6
        expected = torch.where(mirrored[:, None, None, None], expected.flip(-1), expected)
    assert torch.equal(augmented, expected)
    assert levels.tolist() == [0] * 6


def test_augmentation_noise_is_independent_of_training_noise() -> None:
    positions = torch.arange(64)
    network = Recording()
    black = torch.full((64, *SHAPE), 0.0)
    objective(MAX_LEVEL + 1)(network, Batch(black, positions % 4, positions))
    ((augmented, levels),) = network.inputs
    noise = gaussian_noise(3, positions, SHAPE, 0, Stream.TRAINING_NOISE)
    scale = augmented.std((1, 2, 3), keepdim=True)
    correlation = (
        noise * (augmented - augmented.mean((1, 2, 3), keepdim=True)) / scale.clamp(min=1e-6)
    )
    assert abs(float(correlation.mean())) < 4 / (64 * 192) ** 0.5
    assert 0 <= levels.min() <= MAX_LEVEL / 2 < levels.max()
    again = Recording()
    objective(MAX_LEVEL + 1)(again, Batch(black[8:], positions[8:] % 4, positions[8:]))
    assert torch.equal(levels[8:], again.inputs[0][1])


# --- The network


def test_low_resolution_adds_only_its_own_parameters(unet: UNet) -> None:
    plain = UNet(replace(TINY, low_resolution=None)).state_dict()
    with_low = unet.state_dict()
    added = {name for name in with_low if name.startswith("augmentation_embedding.")}
    assert with_low.keys() - added == plain.keys()
    different = [name for name in plain if plain[name].shape != with_low[name].shape]
    assert different == ["conv_in.weight"]
    assert unet.conv_in.weight.shape[1] == 6
    assert unet.sample_shape == SHAPE


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (TINY, (), "needs low-resolution images of 4×4 pixels"),
        (TINY, (upsample(LOW, 8),), "needs low-resolution images of 4×4 pixels"),
        (replace(TINY, low_resolution=None), (upsample(LOW, 8), IDS), "built without"),
        (replace(TINY, low_resolution=None), (None, IDS), "built without"),
    ],
)
def test_network_refuses_the_wrong_conditioning(
    model: UNetConfig, given: tuple[Tensor | None, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(model)(torch.zeros(4, *SHAPE), torch.zeros(4), Conditioning(LABELS, *given))


@pytest.mark.parametrize("side", [0, 3, 8])
def test_sides_that_do_not_divide(side: int) -> None:
    with pytest.raises(UserError, match=f"`low_resolution` is {side}; it must"):
        UNet(replace(TINY, low_resolution=side))


def test_invalid_augmentation_levels() -> None:
    for levels in (0, MAX_LEVEL + 2):
        training = TrainingConfig(augmentation_levels=levels)
        with pytest.raises(UserError, match=f"`training.augmentation_levels` is {levels}"):
            validate(replace(digits_upscale(), training=training))
    validate(digits_upscale())


def test_diffusers_has_no_such_network() -> None:
    with pytest.raises(UserError, match=r"`model\.low_resolution` is 8.*UNet2DModel"):
        config_entries(digits_upscale().model)
    assert "low_resolution" not in config_entries(RunConfig().model)


# --- In sampling


def generate(model: Any, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "sample_ids": IDS, "labels": LABELS, "seed": 3, "steps": 6, "low_resolution": LOW,
        "augmentation_level": 100,
    }  # fmt: skip
    return sample(model, SCHEDULE, **{**given, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpm++2m"},
        {"guidance": Guidance(2.0, two_passes=True)},
        {"guidance": Guidance(2.0, interval=(0.5, 2.0)), "cache_interval": 2},
    ],
)
def test_samples_do_not_depend_on_the_batch(unet: UNet, options: dict[str, Any]) -> None:
    whole = generate(unet, **options)
    assert float((whole - generate(unet, **options, low_resolution=-LOW)).abs().max()) > 0.01
    order = torch.tensor([2, 0, 3, 1])
    shuffled = generate(
        unet, **options, sample_ids=IDS[order], labels=LABELS[order], low_resolution=LOW[order],
        batch_size=3,
    )  # fmt: skip
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=2e-4)


@pytest.mark.parametrize("level", [0, 100])
def test_every_evaluation_has_the_same_low_resolution_image(level: int) -> None:
    network = Recording()
    generate(network, guidance=Guidance(2.0), batch_size=2, augmentation_level=level)
    expected = NoiseConditioningAugmentation()(LOW, 8, torch.full_like(IDS, level), 3, IDS)
    assert len(network.inputs) == 12
    for number, (image, levels) in enumerate(network.inputs):
        part = expected[:2] if number < 6 else expected[2:]
        assert torch.equal(image, part.repeat(2, 1, 1, 1))
        assert levels.tolist() == [level] * 4


def test_captured_steps_see_the_image_of_their_batch(
    unet: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands for a CUDA graph: what is read while capturing is what is read when replayed.
    monkeypatch.setattr(loop_module, "captured", lambda step: step)
    options: dict[str, Any] = {"guidance": Guidance(2.0), "batch_size": 2}
    assert torch.equal(
        generate(unet, **options, capture=True), generate(unet, **options, capture=False)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_resolution": None, "augmentation_level": 0}, "upscales images of 4×4; give some"),
        ({"low_resolution": upsample(LOW, 8)}, r"low_resolution` has shape \(4, 3, 8, 8\)"),
        ({"augmentation_level": -1}, r"`augmentation_level` is -1; it must lie in \[0, 1000\]"),
        ({"augmentation_level": 1001}, "`augmentation_level` is 1001"),
    ],
)
def test_sampling_refuses(unet: UNet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(unet, **options)
