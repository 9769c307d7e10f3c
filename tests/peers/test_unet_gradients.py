"""Outputs and every gradient of the U-Net against diffusers' `UNet2DModel` of the same weights."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tests.peers.test_unet import SMALL_VARIANTS, peer_of, randomise

from ddpm_engine.networks.base import Recompute
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.unet import UNet
from ddpm_kernels.dispatch import force_ops

torch.set_num_threads(1)


@pytest.mark.parametrize("recompute", ["none", "norms", "blocks"])
@pytest.mark.parametrize("forced", [False, True], ids=["by torch", "by operations"])
@pytest.mark.parametrize("name", SMALL_VARIANTS)
def test_gradients(name: str, forced: bool, recompute: Recompute) -> None:
    """In float64, where only another formula would show."""
    config = SMALL_VARIANTS[name]
    ours, theirs = UNet(config).double(), peer_of(config).double()
    randomise(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.recompute(recompute)

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, *ours.sample_shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([3, 700])
    labels = None if config.num_class_embeds is None else torch.tensor([0, 1])
    with force_ops() if forced else nullcontext():
        actual = ours(x, t, Conditioning(labels))
        cotangent = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
        actual.backward(cotangent)
    expected = theirs(x, t, class_labels=labels).sample
    expected.backward(cotangent)

    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = gradients[name].grad
        assert parameter.grad is not None, name
        assert reference is not None, name
        scale = reference.abs().max().item()
        torch.testing.assert_close(parameter.grad, reference, rtol=0, atol=1e-10 * max(scale, 1.0))
