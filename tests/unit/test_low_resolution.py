"""Networks that enlarge: what they are shown in training and sampling, and what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.sampling import sample, trajectory
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
from ddpm_engine.samplers.sampler import initial_noise
from ddpm_kernels import Stream, gaussian_noise

SCHEDULE = NoiseSchedule.linear(100, 1e-3, 0.1)
IDS = torch.tensor([5, 0, 2**40, 7])
LABELS = torch.tensor([1, 3, 0, 2])
SMALL = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
LARGE = (3, 8, 8)
TINY = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    num_class_embeds=5,
    low_resolution=4,
)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(TINY).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.requires_grad_(False)


def stored(count: int) -> Tensor:
    levels = torch.randint(0, 256, (count, *LARGE), generator=torch.Generator().manual_seed(2))
    return levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


class Watched:
    """A network that keeps what it was shown."""

    conditioning = ConditioningSpec(classes=4, low_resolution=4)
    sample_shape = LARGE

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        image, levels = given.low_resolution, given.augmentation_level
        assert image is not None
        assert levels is not None
        assert image.shape == x.shape
        assert levels.shape == t.shape
        self.shown.append((image.clone(), levels.clone()))
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
def test_a_level_is_so_many_steps_of_the_linear_chain(level: int) -> None:
    shown = NoiseConditioningAugmentation()(SMALL, 8, torch.full_like(IDS, level), 3, IDS)
    alpha_bar = NoiseSchedule.linear(1000).alpha_bar[level - 1]
    noise = gaussian_noise(3, IDS, LARGE, 0, Stream.AUGMENTATION_NOISE).double()
    clean = upsample(SMALL.double(), 8)
    expected = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(shown.double(), expected, rtol=0, atol=1e-6)


def test_level_zero_is_the_clean_image_to_the_bit() -> None:
    assert torch.equal(
        NoiseConditioningAugmentation()(SMALL, 8, torch.zeros_like(IDS), 3, IDS), upsample(SMALL, 8)
    )


def test_noise_of_a_picture_does_not_depend_on_its_batch() -> None:
    augmented = NoiseConditioningAugmentation()
    levels = torch.tensor([10, 0, 250, 999])
    whole = augmented(SMALL, 8, levels, 3, IDS)
    for k in range(4):
        part = slice(k, k + 1)
        assert torch.equal(augmented(SMALL[part], 8, levels[part], 3, IDS[part]), whole[part])


# --- In training


def inputs_of(levels: int, flip: bool = False) -> TrainingInputs:
    spec = ConditioningSpec(classes=4, low_resolution=4)
    return TrainingInputs(
        3, spec, horizontal_flip=flip, label_dropout=0.2, augmentation_levels=levels
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
    network, images, positions = Watched(), stored(6), torch.arange(6) + 2**33
    inputs = inputs_of(1, flip)
    given = Batch(images, positions % 4, positions)
    DenoisingObjective(SCHEDULE, prediction, inputs, levels=levels_of)(network, given)
    ((shown, levels),) = network.shown
    expected = upsample(downsample(images, 4), 8)
    mirrored = inputs.prepare(given).flip
    if mirrored is not None:
        assert 0 < int(mirrored.sum()) < 6
        expected = torch.where(mirrored[:, None, None, None], expected.flip(-1), expected)
    assert torch.equal(shown, expected)
    assert levels.tolist() == [0] * 6


def test_training_noise_says_nothing_about_augmentation_noise() -> None:
    # Were the two the same, the network could read the answer off its input.
    positions = torch.arange(64)
    network = Watched()
    black = torch.full((64, *LARGE), 0.0)
    objective(MAX_LEVEL + 1)(network, Batch(black, positions % 4, positions))
    ((shown, levels),) = network.shown
    noise = gaussian_noise(3, positions, LARGE, 0, Stream.TRAINING_NOISE)
    scale = shown.std((1, 2, 3), keepdim=True)
    correlation = noise * (shown - shown.mean((1, 2, 3), keepdim=True)) / scale.clamp(min=1e-6)
    assert abs(float(correlation.mean())) < 4 / (64 * 192) ** 0.5
    assert levels.min() >= 0
    assert levels.max() > MAX_LEVEL / 2
    again = Watched()
    objective(MAX_LEVEL + 1)(again, Batch(black[8:], positions[8:] % 4, positions[8:]))
    assert torch.equal(levels[8:], again.shown[0][1])


def test_loss_does_not_depend_on_the_batch(unet: UNet) -> None:
    images, positions = stored(6), torch.arange(6) + 2**33
    loss_of = objective(250, flip=True)
    whole = loss_of(unet, Batch(images, positions % 4, positions))
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        piece = loss_of(unet, Batch(images[part], positions[part] % 4, positions[part]))
        torch.testing.assert_close(piece, whole[part], rtol=1e-5, atol=0)


# --- The network


def test_only_what_low_resolution_needs_is_added(unet: UNet) -> None:
    plain = UNet(replace(TINY, low_resolution=None)).state_dict()
    enlarging = unet.state_dict()
    added = {name for name in enlarging if name.startswith("augmentation_embedding.")}
    assert enlarging.keys() - added == plain.keys()
    different = [name for name in plain if plain[name].shape != enlarging[name].shape]
    assert different == ["conv_in.weight"]
    assert unet.conv_in.weight.shape[1] == 6
    assert unet.sample_shape == LARGE


def test_prediction_depends_on_image_and_level(unet: UNet) -> None:
    x, t = initial_noise(0, IDS, LARGE), torch.tensor([3, 50, 99, 0])
    image, levels = upsample(SMALL, 8), torch.tensor([0, 10, 20, 249])
    output = unet(x, t, Conditioning(LABELS, image, levels))
    assert output.shape == x.shape
    assert (
        float((unet(x, t, Conditioning(LABELS, image + 0.1, levels)) - output).abs().max()) > 1e-3
    )
    assert (
        float((unet(x, t, Conditioning(LABELS, image, levels + 100)) - output).abs().max()) > 1e-3
    )


@pytest.mark.parametrize(
    ("model", "shown", "message"),
    [
        (TINY, (), "needs low-resolution images of side 4"),
        (TINY, (upsample(SMALL, 8),), "needs low-resolution images of side 4"),
        (replace(TINY, low_resolution=None), (upsample(SMALL, 8), IDS), "built without"),
        (replace(TINY, low_resolution=None), (None, IDS), "built without"),
    ],
)
def test_network_refuses_what_does_not_belong_to_it(
    model: UNetConfig, shown: tuple[Tensor | None, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(model)(torch.zeros(4, *LARGE), torch.zeros(4), Conditioning(LABELS, *shown))


@pytest.mark.parametrize("side", [0, 3, 8, 16])
def test_sides_that_do_not_divide(side: int) -> None:
    with pytest.raises(UserError, match=f"`low_resolution` is {side}; it must"):
        UNet(replace(TINY, low_resolution=side))


def test_levels_that_are_none() -> None:
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


def draw(model: Any, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "sample_ids": IDS, "labels": LABELS, "seed": 3, "steps": 6, "low_resolution": SMALL,
        "augmentation_level": 100,
    }  # fmt: skip
    return sample(model, SCHEDULE, **{**given, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "dpm++2m"},
        {"guidance": Guidance(2.0)},
        {"guidance": Guidance(2.0, two_passes=True)},
        {"guidance": Guidance(2.0, interval=(0.5, 2.0)), "cache_interval": 2},
    ],
)
def test_a_picture_is_the_same_in_every_batch(unet: UNet, options: dict[str, Any]) -> None:
    whole = draw(unet, **options)
    assert float((whole - draw(unet, **options, low_resolution=-SMALL)).abs().max()) > 0.01
    torch.testing.assert_close(draw(unet, **options, batch_size=1), whole, rtol=0, atol=2e-4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = draw(
        unet, **options, sample_ids=IDS[order], labels=LABELS[order], low_resolution=SMALL[order],
        batch_size=3,
    )  # fmt: skip
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=2e-4)


def test_every_evaluation_is_shown_the_same_image() -> None:
    network = Watched()
    draw(network, guidance=Guidance(2.0), batch_size=2)
    expected = NoiseConditioningAugmentation()(SMALL, 8, torch.full_like(IDS, 100), 3, IDS)
    assert len(network.shown) == 12
    for number, (image, levels) in enumerate(network.shown):
        part = expected[:2] if number < 6 else expected[2:]
        assert torch.equal(image, part.repeat(2, 1, 1, 1))
        assert levels.tolist() == [100] * 4


def test_level_zero_samples_from_the_clean_image() -> None:
    network = Watched()
    draw(network, augmentation_level=0)
    assert all(torch.equal(image, upsample(SMALL, 8)) for image, _ in network.shown)
    assert all(levels.tolist() == [0] * 4 for _, levels in network.shown)


def test_steps_one_by_one_are_those_of_sample() -> None:
    whole = draw(Watched(), sampler="ddim")
    last = None
    for step in trajectory(
        Watched(), SCHEDULE, sampler="ddim", steps=6, seed=3, sample_ids=IDS, labels=LABELS,
        low_resolution=SMALL, augmentation_level=100,
    ):  # fmt: skip
        last = step.x
    assert last is not None
    assert torch.equal(last, whole)


def test_captured_steps_see_the_image_of_their_batch(
    unet: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands for a CUDA graph: what is read while capturing is what is read when replayed.
    monkeypatch.setattr(loop_module, "captured", lambda step: step)
    options: dict[str, Any] = {"guidance": Guidance(2.0), "batch_size": 2}
    assert torch.equal(draw(unet, **options, capture=True), draw(unet, **options, capture=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_resolution": None, "augmentation_level": 0}, "upscales images of 4×4; give some"),
        ({"low_resolution": upsample(SMALL, 8)}, r"low_resolution` has shape \(4, 3, 8, 8\)"),
        ({"augmentation_level": -1}, r"`augmentation_level` is -1; it must lie in \[0, 1000\]"),
        ({"augmentation_level": 1001}, "`augmentation_level` is 1001"),
    ],
)
def test_sampling_refuses(unet: UNet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(unet, **options)


def test_a_network_that_enlarges_nothing_refuses_small_pictures() -> None:
    plain = UNet(replace(TINY, low_resolution=None)).eval()
    with pytest.raises(UserError, match="no super-resolution network"):
        draw(plain)
