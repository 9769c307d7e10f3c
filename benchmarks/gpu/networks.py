"""The networks that are measured, their runs, and what they compute, counted on meta tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.norm import GroupNorm
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.presets import PRESETS

HEAVIEST = 8
"""Shapes of GroupNorm that are measured."""


@dataclass(frozen=True)
class NormCall:
    """One call of GroupNorm in a network."""

    shape: tuple[int, int, int, int]
    groups: int
    eps: float
    activation: str


def config_of(preset: str, dry: bool) -> RunConfig:
    """Return a preset; in a rehearsal with a network that a CPU trains in a blink."""
    config = PRESETS[preset]()
    if not dry:
        return config
    model = replace(
        config.model,
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return replace(config, model=model)


def with_training(config: RunConfig, **values: Any) -> RunConfig:
    """Replace fields of `config.training`."""
    return replace(config, training=replace(config.training, **values))


def unet(config: UNetConfig, device: torch.device) -> UNet:
    """Build a U-Net of random float32 weights, none of them zero, in eval mode."""
    torch.manual_seed(0)
    model = UNet(config)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model.to(device).eval().requires_grad_(False)


def evaluate_on_meta(
    config: UNetConfig, batch: int, backward: bool, model: UNet | None = None
) -> None:
    """Evaluate a network, and its gradient, on tensors without values."""
    meta = torch.device("meta")
    with meta:
        model = model or UNet(config)
        x = torch.empty(batch, config.in_channels, config.sample_size, config.sample_size)
        labels = None if config.num_class_embeds is None else torch.zeros(batch, dtype=torch.int64)
        output = model(x, torch.zeros(batch, dtype=torch.int64), Conditioning(labels))
        if backward:
            output.sum().backward()


def training_flop(config: UNetConfig, batch: int) -> int:
    """Count the floating-point operations of a network's forward and backward pass."""
    with FlopCounterMode(display=False) as counted:
        evaluate_on_meta(config, batch, backward=True)
    return int(counted.get_total_flops())


def norm_calls(config: UNetConfig, batch: int) -> Counter[NormCall]:
    """Count the calls of GroupNorm in one evaluation."""
    with torch.device("meta"):
        model = UNet(config)
    found: Counter[NormCall] = Counter()

    def note(module: Any, given: tuple[Any, ...]) -> None:
        n, c, h, w = given[0].shape
        found[NormCall((n, c, h, w), module.groups, module.eps, module.activation)] += 1

    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(note)
    evaluate_on_meta(config, batch, backward=False, model=model)
    return found


def all_norms(dry: bool) -> Counter[NormCall]:
    """Count the calls of GroupNorm in the networks that are measured, at their batches."""
    sizes: Iterable[tuple[str, int]] = (("cifar10", 128), ("celebahq256", 16))
    found: Counter[NormCall] = Counter()
    for preset, batch in sizes:
        found += norm_calls(config_of(preset, dry).model, 2 if dry else batch)
    return found


def heaviest_norms(dry: bool) -> list[NormCall]:
    """Return the calls that move most bytes, all of their kind together, heaviest first."""
    calls = all_norms(dry)
    ordered = sorted(calls, key=lambda call: -calls[call] * prod(call.shape))
    return ordered[: 2 if dry else HEAVIEST]
