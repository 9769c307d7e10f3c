"""The U-Net against diffusers' `UNet2DModel`: same names, same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.files import config_entries
from ddpm_engine.networks.unet.unet import UNet

UNet2DModel = pytest.importorskip("diffusers").UNet2DModel

# The network published as google/ddpm-cifar10-32.
CIFAR10 = UNetConfig()

# Six levels with attention at 16×16, as the paper's 256-pixel networks, a quarter as wide or less.
SIX_LEVELS = UNetConfig(
    sample_size=256,
    block_out_channels=(32, 32, 64, 64, 96, 96),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
)

SMALL = UNetConfig(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)

SMALL_VARIANTS = {
    "heads": replace(SMALL, attention_head_dim=8),
    "class_conditional": replace(SMALL, num_class_embeds=11, flip_sin_to_cos=True, freq_shift=0),
    "odd_channels": replace(SMALL, block_out_channels=(15, 25), norm_num_groups=5),
    "scale_shift": replace(SMALL, resnet_time_scale_shift="scale_shift"),
    "scale_shift_with_norm": replace(
        SMALL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4
    ),
    "downsample_padding": replace(SMALL, downsample_padding=1, freq_shift=0, norm_eps=0.1),
    "mid_block_scale_factor": replace(SMALL, mid_block_scale_factor=2**0.5, layers_per_block=1),
    "learned_variance": replace(SMALL, in_channels=1, out_channels=2, layers_per_block=3),
    "asymmetric": replace(
        SMALL,
        block_out_channels=(32, 64, 48),
        down_block_types=("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=3,
    ),
}


# In float64 only a different formula would show.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-11}


def peer_of(config: UNetConfig) -> nn.Module:
    peer: nn.Module = UNet2DModel(
        **{name: value for name, value in config_entries(config).items() if name != "_class_name"}
    )
    return peer.eval()


def randomise(module: nn.Module, seed: int) -> None:
    """Make every parameter matter, those that start at zero or one included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and name != "class_embedding.weight":
                noise /= parameter[0].numel() ** 0.5
            elif parameter.dim() == 1:
                noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(noise)


def assert_same_predictions(
    config: UNetConfig, timesteps: torch.Tensor, bounds: dict[torch.dtype, float] = BOUNDS
) -> None:
    ours, theirs = UNet(config).eval(), peer_of(config)
    randomise(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(timesteps), *ours.sample_shape, generator=generator)
    labels = None
    if config.num_class_embeds is not None:
        labels = torch.arange(len(timesteps)) % (config.num_class_embeds - 1)
        labels[-1] = config.num_class_embeds - 1

    for dtype, bound in bounds.items():
        with torch.no_grad():
            actual = ours.to(dtype)(x.to(dtype), timesteps, Conditioning(labels))
            expected = theirs.to(dtype)(x.to(dtype), timesteps, class_labels=labels).sample
        assert 0.2 < expected.std() < 5, "the bounds are meant for outputs of order one"
        difference = (actual - expected).abs().max().item()
        assert difference <= bound


@pytest.mark.parametrize("name", SMALL_VARIANTS)
def test_predictions(name: str) -> None:
    assert_same_predictions(SMALL_VARIANTS[name], torch.tensor([0, 1, 500, 999]))


@pytest.mark.parametrize(
    "config", [CIFAR10, replace(SIX_LEVELS, sample_size=32)], ids=["cifar10", "six levels"]
)
def test_predictions_of_published_shapes(config: UNetConfig) -> None:
    assert_same_predictions(config, torch.tensor([1, 999]), {torch.float32: 1e-5})


@pytest.mark.slow
def test_predictions_at_256_pixels() -> None:
    assert_same_predictions(SIX_LEVELS, torch.tensor([0, 999]), {torch.float32: 1e-5})


def test_fractional_timesteps() -> None:
    assert_same_predictions(SMALL, torch.tensor([0.25, 500.5]))


def test_gradients() -> None:
    ours, theirs = UNet(SMALL), peer_of(SMALL)
    randomise(theirs, seed=4)
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    target = torch.randn(2, 3, 16, 16, generator=generator)
    t = torch.tensor([7, 700])
    (ours(x, t) - target).square().mean().backward()
    (theirs(x, t).sample - target).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
