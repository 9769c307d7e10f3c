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
from ddpm_engine.networks.unet.features import Features
from ddpm_engine.networks.unet.norm import GroupNorm
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.presets import PRESETS
from ddpm_engine.sizes import height_and_width
from ddpm_kernels.dispatch import force_ops

HEAVIEST = 8
"""Shapes of GroupNorm that are measured."""


@dataclass(frozen=True)
class NormCall:
    """One call of GroupNorm in a network."""

    shape: tuple[int, int, int, int]
    groups: int
    eps: float
    activation: str
    skip: int = 0
    """Channels of the skip connection, which are a map of their own."""
    before: bool = False
    """Whether a vector is added first."""
    dropout: float = 0.0
    kept: bool = False
    """Whether the moments of the maps are known."""

    @property
    def options(self) -> str:
        """What is fused with it, for people."""
        named = {
            "two maps": self.skip, "vector": self.before, "dropout": self.dropout,
            "moments kept": self.kept,
        }  # fmt: skip
        return "".join(f", {name}" for name, present in named.items() if present)


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
        x = torch.empty(batch, config.in_channels, *height_and_width(config.sample_size))
        index = torch.zeros(batch, dtype=torch.int64)
        labels = None if config.num_class_embeds is None else index
        output = model(x, index, Conditioning(labels, dropout_key=index))
        if backward:
            output.sum().backward()


def training_flop(config: UNetConfig, batch: int) -> int:
    """Count the floating-point operations of a network's forward and backward pass."""
    with FlopCounterMode(display=False) as counted:
        evaluate_on_meta(config, batch, backward=True)
    return int(counted.get_total_flops())


def norm_calls(config: UNetConfig, batch: int) -> Counter[NormCall]:
    """Count the calls of GroupNorm in one evaluation while training, on a GPU."""
    with torch.device("meta"):
        model = UNet(config)
    found: Counter[NormCall] = Counter()

    def note(module: Any, maps: tuple[Features, ...], options: dict[str, Any]) -> None:
        n, _, h, w = maps[0].map.shape
        dropout = options.get("dropout")
        call = NormCall(
            (n, len(module.weight), h, w), module.groups, module.eps, module.activation,
            skip=sum(each.map.shape[1] for each in maps[1:]),
            before=options.get("before") is not None,
            dropout=0.0 if dropout is None else dropout.probability,
            kept=all(each.moments is not None for each in maps),
        )  # fmt: skip
        found[call] += 1

    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(note, with_kwargs=True)
    with force_ops():
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
