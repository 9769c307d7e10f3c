"""Strategies take their steps on the device: a step skipped, in half precision, without copies."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tests.tiny import FAMILIES
from tests.watching import OnTheHost
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_engine.config import OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.networks.base import Network, Recompute
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet import unet
from ddpm_engine.training.strategies import replicated
from ddpm_engine.training.strategies.fsdp import FullySharded
from ddpm_engine.training.strategies.replicated import Replicated
from ddpm_engine.training.strategies.strategy import Strategy
from ddpm_kernels.dispatch import force_ops

CPU = torch.device("cpu")
GO, SKIP = torch.zeros(()), torch.ones(())

Path = Callable[[], AbstractContextManager[object]]


def run_config(
    precision: Any = "no", accumulation: int = 1, clip_norm: float = 1.0, family: str = "unet"
) -> RunConfig:
    return RunConfig(
        model=replace(FAMILIES[family], num_class_embeds=3),
        optimizer=OptimizerConfig(clip_norm=clip_norm, weight_decay=0.01),
        training=TrainingConfig(
            precision=precision, accumulation=accumulation, ema_sigma_rel=(0.1,)
        ),
    )


def network(config: RunConfig) -> Network:
    torch.manual_seed(0)
    model = build_network(config.model)
    with torch.no_grad():  # those that begin at zero would hide all others
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.train()


def inputs(number: int, device: torch.device = CPU) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    labels = torch.arange(4) % 3
    return x.to(device), (torch.arange(4) * 100).to(device), Conditioning(labels.to(device))


def loss_of(predict: Any, number: int, device: torch.device = CPU) -> Tensor:
    prediction: Tensor = predict(*inputs(number, device))
    return prediction.float().square().mean()


def step(strategy: Strategy, number: int, skip: Tensor = GO, bad: bool = False) -> tuple[Any, Any]:
    """One step of a micro-batch; loss and norm."""
    with strategy.accumulate(last=True):
        loss = loss_of(strategy.network, number, skip.device)
        strategy.backward(loss * torch.inf if bad else loss)
    rate, shares = torch.full_like(skip, 1e-3), torch.full_like(skip, 0.1).repeat(2)
    return loss.detach(), strategy.step(rate, shares, skip)


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("clip_norm", [1e9, 1e-3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_a_plain_loop_to_the_bit(
    family: str, precision: str, clip_norm: float
) -> None:
    """In half precision, weights are rounded by the optimizer and not at each use."""
    if precision == "bf16" and clip_norm < 1:
        pytest.skip("the norm is summed in another order")
    config = run_config(precision, clip_norm=clip_norm)
    strategy = Replicated(network(config), config, CPU)
    model = network(config)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=float(torch.tensor(1e-3)), weight_decay=0.01, fused=True
    )
    for number in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = model(*inputs(number))
        expected = prediction.float().square().mean()
        expected.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.data.lerp_(p.data, float(torch.tensor(0.1)))
        loss, _ = step(strategy, number)
        assert torch.equal(loss, expected)
    state = strategy.state()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state["model"][name], tensor), name
    for name, tensor in average.state_dict().items():
        assert torch.equal(state["ema"][name], tensor), name
    with strategy.averaged() as averaged, torch.no_grad():
        halves = {p.dtype for p in averaged.parameters()}
        assert (torch.bfloat16 in halves) == (precision == "bf16")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            assert torch.equal(averaged(*inputs(9)), average.eval()(*inputs(9)))
    assert {p.dtype for p in strategy._averaged.parameters()} == {torch.float32}


def whole_state(strategy: Strategy) -> dict[str, bytes]:
    state = {
        f"{part}.{name}": (t.to_local() if isinstance(t, DTensor) else t)
        for part, tensors in strategy.state().items()
        for name, t in tensors.items()
    }
    stored = {name: t.detach().contiguous().numpy().tobytes() for name, t in state.items()}
    if strategy.loss_scale is not None:
        stored["loss scale"] = repr(strategy.loss_scale.state()).encode()
    return stored


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("kind", ["torch", "torch summed", "op", "op summed", "fsdp"])
def test_a_skipped_step_changes_nothing_at_all(kind: str, precision: str, mesh: Any) -> None:
    config = run_config(precision, accumulation=2 if "summed" in kind else 1)
    strategy: Strategy
    if kind == "fsdp":
        strategy = FullySharded(network(config), config, Accelerator(cpu=True), mesh)
    else:
        strategy = Replicated(network(config), config, CPU)
    with force_ops() if "op" in kind else nullcontext():
        for number in (0, 1):
            step(strategy, number)
        before = whole_state(strategy)
        for bad in (False, True):
            step(strategy, 2, SKIP, bad)
            assert whole_state(strategy) == before
        _, norm = step(strategy, 3, GO, bad=True)
        assert not norm.isfinite()
        after = whole_state(strategy)
        changed = {name for name in before if after[name] != before[name]}
        assert changed == ({"loss scale"} if precision == "fp16" else set())
        _, norm = step(strategy, 4)  # the gradients of the bad step are gone
        assert norm.isfinite()
        assert norm.dtype == torch.float32
        moved = whole_state(strategy)
        # Labels of the null class are the only rows that a batch may leave out.
        assert all(moved[name] != before[name] for name in before if name.startswith("ema."))


@pytest.mark.parametrize(
    ("family", "recompute"),
    [("unet", "none"), ("unet", "norms"), ("unet", "blocks"), ("dit", "none"), ("dit", "blocks")],
)
@pytest.mark.parametrize("forced", [False, True], ids=["by torch", "by operations"])
def test_sharded_steps_are_those_of_a_whole_network(
    forced: bool, family: str, recompute: Recompute, mesh: Any
) -> None:
    config = run_config(family=family)
    whole = Replicated(network(config), config, CPU)
    sharded = FullySharded(network(config), config, Accelerator(cpu=True), mesh)
    sharded.model.recompute(recompute)
    for number in range(4):
        with force_ops() if forced else nullcontext():
            losses = zip(step(whole, number), step(sharded, number), strict=True)
        for one, other in losses:
            torch.testing.assert_close(other, one, rtol=1e-5 if forced else 1e-6, atol=0)
    for part, tensors in whole.state().items():
        theirs = sharded.state()[part]
        assert theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            other = theirs[name]
            other = other.full_tensor() if isinstance(other, DTensor) else other
            torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_and_makes_nothing_on_the_host(
    family: str, precision: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = torch.device("meta")
    # There is no autocast of meta tensors; half-precision weights work without.
    monkeypatch.setattr(replicated, "autocast_forward", lambda *_: None)
    config = run_config(precision, accumulation, family=family)
    strategy = Replicated(network(config).to(meta), config, meta)
    numbers = torch.zeros((), device=meta), torch.zeros(2, device=meta), GO.to(meta)
    for _ in range(2):
        for last in range(1, accumulation + 1):
            with strategy.accumulate(last == accumulation), force_ops():
                strategy.backward(loss_of(strategy.network, 0, meta))
        with force_ops(), OnTheHost() as host:
            strategy.step(*numbers)
        assert host.found == []


class Copies(TorchDispatchMode):
    """Counts copies of tensors that have the shapes of some convolutions' weights, by operation.

    `weights` are those that convolutions were given.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.weights: list[Tensor] = []
        shapes = [p.shape for p in network(config).parameters() if p.dim() == 4]
        self._shapes = {*shapes, *(torch.Size((o, h, w, i)) for o, i, h, w in shapes)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.weights.append(args[1])
        moved = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.shape in self._shapes]
        if name in ("clone", "copy_", "_to_copy") and moved:
            self.found[name] += 1
        return out


@pytest.fixture
def channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks on a CPU are laid out as on a GPU."""
    monkeypatch.setattr(unet, "_memory_format", lambda device: torch.channels_last)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_no_gradient_is_laid_out_again(precision: str, channels_last: None) -> None:
    """They have the strides of their weights, so that autograd keeps what it is given."""
    config = run_config(precision)
    strategy = Replicated(network(config), config, CPU)
    loss = loss_of(strategy.network, 0)
    with Copies(config) as copies:
        strategy.backward(loss)
    for name, parameter in strategy.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.stride() == parameter.stride(), name
    assert copies.found == {}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gathered_weights_are_channels_last(precision: str, channels_last: None, mesh: Any) -> None:
    config = run_config(precision)
    strategy = FullySharded(network(config), config, Accelerator(cpu=True), mesh)
    loss_of(strategy.network, 0).backward()
    with Copies(config) as copies:
        loss = loss_of(strategy.network, 0)
        loss.backward()
    assert len(copies.weights) > 10
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in copies.weights)
    assert copies.found == {}
    whole = network(config)
    for name, tensor in strategy.state()["model"].items():
        assert tensor.shape == whole.get_parameter(name).shape
