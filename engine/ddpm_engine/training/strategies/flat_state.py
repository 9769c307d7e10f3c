"""Weights, moments and averages as flat buffers, which one kernel updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm_engine.networks.half_weights import half_names

_ALIGNMENT = 8
"""Elements: 16 bytes of the half-precision buffer, which vectorised loads need."""


@dataclass(frozen=True)
class Segment:
    """Where a parameter is in the flat buffers, and how it lies there."""

    name: str
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """Offset behind the last element."""
        return self.offset + self.shape.numel()

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's part of a flat buffer `[N]`, in any shape that the parameter has."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


class FlatState:
    """The state that an optimizer step updates, in flat buffers.

    Weights are kept in the network's own precision, the master weights of mixed precision. Those
    that the network uses in half precision come first, so that their half-precision copy, the
    shadow, is a flat buffer as well. Gaps, which align parameters, are zero.

    Args:
        model: network on its device, its weights dense; they become views of the buffers: of the
            shadow where there is one, and of the masters otherwise. Gradients of shadowed weights
            are in half precision.
        averages: names of the averages of the weights, which begin equal to them.
        half: precision of the shadow; None: no shadow.
    """

    weights: Tensor
    """Master weights `[N]`."""
    exp_avg: Tensor
    """First moments `[N]`, zero at first."""
    exp_avg_sq: Tensor
    """Second moments `[N]`, zero at first."""
    averages: Tensor
    """`[K, N]`."""
    shadow: Tensor | None
    """Rounded copy of the first M weights, `[M]`."""
    step: Tensor
    """Updates done, 0-dim float32."""
    segments: list[Segment]
    """Of all parameters, in the order of the buffers."""

    def __init__(
        self, model: nn.Module, averages: Iterable[str], half: torch.dtype | None = None
    ) -> None:
        shadowed = [] if half is None else half_names(model)
        self.segments, size = _plan(model, shadowed)
        self._halves = ([segment.offset for segment in self.segments] + [size])[len(shadowed)]
        parameters = dict(model.named_parameters())
        first = next(iter(parameters.values()))
        self.weights = torch.zeros(size, dtype=first.dtype, device=first.device)
        for segment in self.segments:
            segment.view(self.weights).copy_(parameters[segment.name].detach())
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.weights) for _ in range(2))
        self._names = list(averages)
        self.averages = self.weights.repeat(len(self._names), 1)
        self.step = torch.zeros((), device=first.device)
        self.shadow = None if half is None else self.weights[: self._halves].to(half)
        self.bind(model, self.weights, self.shadow)

    def bind(self, network: nn.Module, weights: Tensor, halves: Tensor | None) -> None:
        """Let a network's parameters be views of flat buffers.

        Args:
            network: of the same architecture.
            weights: `[N]`.
            halves: the first M of them in half precision `[M]`, used in their place; or None.
        """
        parameters = dict(network.named_parameters())
        for segment in self.segments:
            flat = weights if halves is None or segment.offset >= len(halves) else halves
            parameters[segment.name].data = segment.view(flat)

    def halved(self, weights: Tensor) -> Tensor | None:
        """Round the first M of some weights `[N]` as the shadow is; None without a shadow."""
        return None if self.shadow is None else weights[: self._halves].to(self.shadow.dtype)

    def refresh(self) -> None:
        """Round the shadow again, after the weights have changed."""
        if self.shadow is not None:
            self.shadow.copy_(self.weights[: self._halves])

    def broadcast(self) -> None:
        """Take the weights of rank 0, before the first step; all ranks call this together."""
        dist.broadcast(self.weights, 0)
        self.averages.copy_(self.weights)
        self.refresh()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Parts of a flat buffer `[N]` by the parameters' names."""
        return {segment.name: segment.view(flat) for segment in self.segments}

    def named_averages(self) -> dict[str, dict[str, Tensor]]:
        """The averages by their names, in use."""
        return {
            name: self.views(flat) for name, flat in zip(self._names, self.averages, strict=True)
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments and step by the names that checkpoints give them, in use."""
        state = {}
        for name, moment in self.views(self.exp_avg).items():
            state[f"state.{name}.exp_avg"] = moment
            state[f"state.{name}.step"] = self.step
        for name, moment in self.views(self.exp_avg_sq).items():
            state[f"state.{name}.exp_avg_sq"] = moment
        return state

    def load_step(self, optimizer_state: Mapping[str, Any]) -> None:
        """Take the step of a loaded `optimizer_state`; everything else is in place."""
        self.step.copy_(optimizer_state[f"state.{self.segments[0].name}.step"])


def is_channels_last(model: nn.Module) -> bool:
    """Whether a network's convolutions are channels-last, of which a 1×1 kernel shows nothing."""
    return any(p.dim() == 4 and not p.is_contiguous() for p in model.parameters())


def _plan(model: nn.Module, first: list[str]) -> tuple[list[Segment], int]:
    """Lay out all parameters, some of them first; return the segments and the length."""
    parameters = dict(model.named_parameters())
    channels_last = is_channels_last(model)
    segments, offset = [], 0
    for name in dict.fromkeys([*first, *parameters]):
        parameter = parameters[name]
        stride = parameter.stride()
        if channels_last and parameter.dim() == 4:
            # A 1×1 kernel is contiguous in either format; its gradient has strides of this one.
            stride = _channels_last_stride(parameter.shape)
        segment = Segment(name, offset, parameter.shape, stride)
        segments.append(segment)
        offset = _aligned(segment.end)
    return segments, offset


def _channels_last_stride(shape: torch.Size) -> tuple[int, ...]:
    _, channels, height, width = shape
    return channels * height * width, 1, channels * width, channels


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
