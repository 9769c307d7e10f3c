"""The device's half of a training step: the host reads nothing in it and copies nothing to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import TINY
from tests.watching import OnTheHost, Uploads
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.data.shards.manifest import LatentSpace
from ddpm_engine.distributed import Ranks
from ddpm_engine.networks.build import build_network
from ddpm_engine.objectives.base import Network, Objective
from ddpm_engine.presets import PRESETS
from ddpm_engine.runtime import DTYPES
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.ema import decays
from ddpm_engine.training.inputs import StaticInputs
from ddpm_engine.training.precompile import blank_batch
from ddpm_engine.training.reports import Reports
from ddpm_engine.training.step import device_step
from ddpm_engine.training.strategies import replicated
from ddpm_engine.training.strategies.replicated import Replicated
from ddpm_kernels.dispatch import force_ops

META = torch.device("meta")
SPACE = LatentSpace("autoencoder", "0" * 64, 4, 8, 0.5, 0.1, 256, 256, 3, True)
"""What networks of four channels are trained on."""


class Half(TorchFunctionMode):
    """Does what autocast does, which meta tensors do not know: casts what matrix products take."""

    PRODUCTS = (F.conv2d, F.linear, F.scaled_dot_product_attention, torch.baddbmm, torch.bmm)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = tree_map_only(Tensor, lambda tensor: tensor.to(self.dtype), args)
        return func(*args, **(kwargs or {}))


def autocast_on_meta(model: nn.Module, precision: str, _device: torch.device) -> None:
    """Stand in for `runtime.autocast_forward`."""
    if precision in DTYPES:
        forward = model.forward

        def half(*arguments: Any) -> Tensor:
            with Half(DTYPES[precision]):
                output: Tensor = forward(*arguments)
            return output

        model.forward = half


def found_on_the_host(
    config: RunConfig, changed: Callable[[Objective], Objective] = lambda objective: objective
) -> list[str]:
    """What the host would read, or copy to the device, in a step of a run; on meta tensors."""
    with META:
        network = build_network(config.model)
    network.recompute(config.training.recompute)
    schedule = config.diffusion.build_schedule()
    latents = SPACE if config.model.in_channels == SPACE.channels else None
    objective = changed(
        build_objective(config, schedule, META, network.conditioning, latents=latents)
    )
    strategy = Replicated(network.train(), config, META)
    inputs = StaticInputs(META, len(decays(config.training)))
    count = config.training.batch_size // config.training.accumulation
    batch = blank_batch(network, config, count, 8, latents is not None).to(META)
    inputs.batches = [batch] * config.training.accumulation
    row = Reports(META).row
    with force_ops():
        # The first step may prepare what all others use.
        device_step(objective, strategy, inputs, row, Ranks())
        with OnTheHost() as host, Uploads() as uploads:
            device_step(objective, strategy, inputs, row, Ranks())
    return host.found + uploads.found


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *((name, {"precision": "no"}) for name in PRESETS),
        ("cifar10", {"precision": "bf16", "accumulation": 2}),
        ("lsun256", {"precision": "bf16", "recompute": "blocks"}),
        ("digits-upscale", {"precision": "fp16", "ema_sigma_rel": (0.05, 0.1)}),
    ],
)
def test_the_host_reads_nothing_in_a_step(
    name: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicated, "autocast_forward", autocast_on_meta)
    preset = PRESETS[name]()
    assert found_on_the_host(replace(preset, training=replace(preset.training, **training))) == []


def accumulators(network: nn.Module) -> list[Any]:
    """The nodes of autograd that gradients of the weights end in: made where there are none."""
    return [
        weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        for weight in network.parameters()
    ]


def outlived(training: dict[str, Any], held: list[Tensor] | None = None) -> bool:
    """Whether such a node of a step is still there after it; `held` keeps its losses."""
    cpu = torch.device("cpu")
    config = RunConfig(model=TINY)
    config = replace(config, training=replace(config.training, batch_size=4, **training))
    network = build_network(config.model)
    network.recompute(config.training.recompute)
    objective = build_objective(config, config.diffusion.build_schedule())
    strategy = Replicated(network.train(), config, cpu)
    inputs = StaticInputs(cpu, len(decays(config.training)))
    count = config.training.batch_size // config.training.accumulation
    images = torch.zeros(count, *network.sample_shape, dtype=torch.uint8)
    inputs.batches = [Batch(images, None, torch.arange(count))] * config.training.accumulation

    def mark(loss: Tensor) -> None:
        for node in accumulators(network):
            node.metadata["of the step"] = True
        if held is not None:
            held.append(loss)

    with force_ops():
        device_step(Reading(objective, mark), strategy, inputs, Reports(cpu).row, Ranks())
    return any(node.metadata for node in accumulators(network))


@pytest.mark.parametrize(
    "training",
    [{}, {"accumulation": 2}, {"recompute": "blocks"}],
    ids=["plain", "accumulation", "checkpointing"],
)
def test_nothing_of_autograd_outlives_a_step(training: dict[str, Any]) -> None:
    """What does would belong to the stream of that step, which ends a capture of the next."""
    assert not outlived(training)
    assert outlived(training, held=[])


class Reading(Objective):
    """An objective that does what must not be done."""

    def __init__(self, objective: Objective, misdeed: Callable[[Tensor], object]) -> None:
        self.objective, self.misdeed = objective, misdeed

    def __call__(self, network: Network, batch: Batch) -> Tensor:
        loss = self.objective(network, batch)
        self.misdeed(loss)
        return loss


def test_what_the_host_copies_is_found() -> None:
    def uploaded(loss: Tensor) -> object:
        return loss * torch.tensor(2.0, device=META)

    def copied(loss: Tensor) -> object:
        return loss * torch.ones(len(loss)).to(META)

    digits = PRESETS["digits"]()
    assert "tensor" in found_on_the_host(digits, lambda o: Reading(o, uploaded))
    assert "aten._to_copy.default" in found_on_the_host(digits, lambda o: Reading(o, copied))
    with pytest.raises(RuntimeError, match="meta tensor"):
        found_on_the_host(digits, lambda o: Reading(o, lambda loss: float(loss.mean())))
