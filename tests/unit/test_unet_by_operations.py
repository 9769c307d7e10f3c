"""The U-Net by the registered operations, as on a GPU: what they fuse changes rounding only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import TINY
from torch import Tensor

from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_kernels.dispatch import force_ops

VARIANTS = {
    "plain": TINY,
    "dropout": replace(TINY, dropout=0.3),
    "scale and shift": replace(
        TINY, resnet_time_scale_shift="scale_shift", mid_block_scale_factor=2**0.5
    ),
    # Maps so large that their moments are kept.
    "kept moments": replace(TINY, sample_size=64, block_out_channels=(4, 8)),
}


def randomised(config: UNetConfig) -> UNet:
    """Build the network, always the same, without any zero among its weights."""
    torch.manual_seed(0)
    unet = UNet(config).double()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return unet


def run(unet: UNet, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output and the gradients of all weights, in float64, where rounding hides nothing."""
    generator = torch.Generator().manual_seed(1)
    shape = 2, *unet.sample_shape
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    key = Conditioning(dropout_key=torch.tensor([5, 2**40]))
    unet.zero_grad()
    output = unet(x, torch.tensor([3, 700]), key, **options)
    outputs = output if isinstance(output, tuple) else (output,)
    weights = [torch.randn(each.shape, generator=generator) for each in outputs]
    torch.autograd.backward(outputs, [weight.double() for weight in weights])
    return output, {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}


def assert_close(actual: tuple[Any, dict[str, Tensor]], expected: tuple[Any, Any]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-10)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            actual[1][name], gradient, rtol=0, atol=1e-10 * max(scale, 1.0), msg=name
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_and_gradients_are_those_without(name: str) -> None:
    unet = randomised(VARIANTS[name])
    expected = run(unet)
    with force_ops():
        assert_close(run(unet), expected)


def test_features_that_are_returned_owe_nothing() -> None:
    unet = randomised(TINY)
    expected = run(unet, return_features=True)
    with force_ops():
        assert_close(run(unet, return_features=True), expected)
        _, features = expected[0]
        shallow = run(unet, features=features.detach())
    assert_close(run(unet, features=features.detach()), shallow)


@pytest.mark.parametrize("name", ["dropout", pytest.param("kept moments", marks=pytest.mark.slow)])
def test_compiled_blocks(name: str) -> None:
    torch._dynamo.reset()  # what other tests have compiled counts towards its limit
    unet = randomised(VARIANTS[name])
    with force_ops():
        expected = run(unet)
        unet.compile_blocks(backend="aot_eager", fullgraph=True)
        assert_close(run(unet), expected)
