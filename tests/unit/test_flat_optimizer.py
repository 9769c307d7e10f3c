"""Optimizer steps over flat buffers, against torch's AdamW and averages in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from ddpm_engine.config import OptimizerConfig
from ddpm_engine.training.strategies.flat_optimizer import FlatOptimizer
from ddpm_engine.training.strategies.flat_state import FlatState
from ddpm_kernels.dispatch import force_ops

CONFIG = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=2.0)
STEPS = 200
BAD = (0, 7, 8, 120)
"""Steps with a gradient that is not finite, as fp16's overflows."""
SCALE = 512.0
"""What gradients are multiplied by, as by fp16's loss scale."""

Path = Callable[[], AbstractContextManager[object]]
paths = pytest.mark.parametrize(
    "path", [pytest.param(nullcontext, id="torch"), pytest.param(force_ops, id="op")]
)
halves = pytest.mark.parametrize(
    "half", [None, torch.bfloat16, torch.float16], ids=["float", "bf16", "fp16"]
)


class Layers(nn.Module):
    """Some that half precision shadows, in either memory format, and some that it does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.GroupNorm(1, 3)
        self.conv = nn.Conv2d(3, 5, 3)
        self.one = nn.Conv2d(5, 7, 1)
        self.linear = nn.Linear(7, 3)
        self.double()
        for layer in (self.conv, self.one):  # as networks lay themselves out
            weight = layer.weight.data
            layer.weight.data = weight.contiguous(memory_format=torch.channels_last)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Gradients of a step as they come from a backward pass: in the parameters' precision."""
    generator = torch.Generator().manual_seed(step)
    named = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        gradient = torch.empty_like(parameter).copy_(noise * (0.1 + step % 3) * SCALE)
        named[name] = gradient
    if step in BAD:
        named["conv.weight"][0, 0, 0, 0] = torch.inf
    return named


def numbers(step: int) -> tuple[float, list[float]]:
    """Learning rate and weights of two averages."""
    return 1e-2 * min(1.0, (step + 1) / 10), [1 / (step + 1), 0.01]


class Ours:
    """A flat state and its optimizer."""

    def __init__(self, half: torch.dtype | None) -> None:
        self.model = Layers()
        self.state = FlatState(self.model, ["a", "b"], half)
        self.optimizer = FlatOptimizer(self.state, CONFIG, whole=False)

    def step(self, step: int, skip: float = 0.0) -> None:
        rate, shares = numbers(step)
        named = gradients(self.model, step)
        self.optimizer.update(
            [named[segment.name] for segment in self.state.segments],
            torch.tensor(SCALE),
            torch.tensor(rate, dtype=torch.float64),
            torch.tensor(shares, dtype=torch.float64),
            torch.tensor(skip),
        )

    def tensors(self) -> dict[str, Tensor]:
        named = dict(self.state.optimizer_state())
        flats = {"weights": self.state.weights, **dict(zip("ab", self.state.averages, strict=True))}
        for kind, flat in flats.items():
            named |= {f"{kind}.{name}": view for name, view in self.state.views(flat).items()}
        return named


class Theirs:
    """Torch's AdamW and clipping, and averages, tensor by tensor."""

    def __init__(self) -> None:
        self.model = Layers()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), weight_decay=CONFIG.weight_decay, foreach=False
        )
        self.averages = {
            name: {n: p.detach().clone() for n, p in self.model.named_parameters()} for name in "ab"
        }

    def step(self, step: int, named: dict[str, Tensor]) -> None:
        rate, shares = numbers(step)
        for name, parameter in self.model.named_parameters():
            parameter.grad = named[name].double() / SCALE
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CONFIG.clip_norm)
        if not norm.isfinite():
            return
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        for share, average in zip(shares, self.averages.values(), strict=True):
            for name, parameter in self.model.named_parameters():
                average[name] = (1 - share) * average[name] + share * parameter.detach()

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            named |= {f"state.{name}.{key}": value for key, value in state.items()}
            named[f"weights.{name}"] = parameter.detach()
            named |= {f"{a}.{name}": average[name] for a, average in self.averages.items()}
        return named


def assert_close(ours: Ours, theirs: Theirs) -> None:
    found, expected = ours.tensors(), theirs.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].to(tensor), rtol=1e-9, atol=1e-12)


@paths
@halves
def test_two_hundred_steps_are_those_of_torch(path: Path, half: torch.dtype | None) -> None:
    ours, theirs = Ours(half), Theirs()
    for step in range(STEPS):
        theirs.step(step, gradients(ours.model, step))
        with path():
            ours.step(step)
        if ours.state.shadow is not None:
            rounded = ours.state.weights[: len(ours.state.shadow)].to(ours.state.shadow.dtype)
            assert torch.equal(ours.state.shadow, rounded)
    assert int(ours.state.step) == STEPS - len(BAD)
    assert_close(ours, theirs)


@halves
@pytest.mark.parametrize("first", ["torch", "op"])
def test_either_goes_on_from_the_other(first: str, half: torch.dtype | None) -> None:
    theirs, one, other = Theirs(), Ours(half), Ours(half)
    order: list[Path] = [nullcontext, force_ops]
    before, after = order if first == "torch" else reversed(order)
    for step in range(40):
        theirs.step(step, gradients(one.model, step))
        if step == 20:
            for name, tensor in other.tensors().items():
                tensor.copy_(one.tensors()[name])
            other.state.refresh()
        with (before if step < 20 else after)():
            (one if step < 20 else other).step(step)
    assert_close(other, theirs)


@paths
@halves
def test_a_skipped_step_changes_nothing(path: Path, half: torch.dtype | None) -> None:
    ours = Ours(half)
    with path():
        for step in (1, 2):
            ours.step(step)
        before = {name: tensor.clone() for name, tensor in ours.tensors().items()}
        shadow = None if ours.state.shadow is None else ours.state.shadow.clone()
        ours.step(3, skip=1.0)
        ours.step(7)  # not finite
    for name, tensor in ours.tensors().items():
        assert tensor.numpy().tobytes() == before[name].numpy().tobytes(), name
    if shadow is not None:
        assert ours.state.shadow is not None
        assert torch.equal(ours.state.shadow, shadow)


def test_parameters_are_views_in_their_own_layout() -> None:
    state = FlatState(model := Layers(), ["a"], torch.bfloat16)
    assert state.shadow is not None
    names = [segment.name for segment in state.segments]
    assert names == [
        "conv.weight", "one.weight", "linear.weight", "linear.bias",
        "norm.weight", "norm.bias", "conv.bias", "one.bias",
    ]  # fmt: skip
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    # As the gradient of a 1×1 convolution in this format has it.
    assert model.one.weight.stride() == (5, 1, 5, 5)
    assert model.linear.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float64
    state.weights.zero_()
    state.refresh()
    assert all(not p.any() for p in model.parameters())
    assert all(segment.offset % 8 == 0 for segment in state.segments)
    assert all(len(flat) % 8 == 0 for flat in (state.weights, state.shadow))
