"""The steps that are traced: this engine's own code, and what a textbook says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.reference.ddpm import GaussianDiffusion
from benchmarks.reference.plain_network import plain_network
from benchmarks.traffic.trace import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import Ranks
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.half_weights import to_half
from ddpm_engine.runtime import DTYPES
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.step_runner import StepRunner
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.ema import decays
from ddpm_engine.training.inputs import DeviceNumbers
from ddpm_engine.training.reports import Column
from ddpm_engine.training.step import device_step
from ddpm_engine.training.strategies.replicated import Replicated

META = torch.device("meta")
Step = Callable[[], None]


# --- This engine


class Inputs:
    """Micro-batches and numbers of a step, as they lie on the device when it begins."""

    def __init__(self, batches: list[Batch], averages: int) -> None:
        self.batches = batches
        self.numbers = DeviceNumbers(torch.zeros(4 + averages, device=META))


def engine_training(config: RunConfig, trace: Trace) -> Step:
    """Return the device's half of an optimizer step, which is what a graph captures."""
    model = _network(config).train()
    # Autocast has no meta device, and nothing to do here: weights have a half-precision shadow.
    strategy = Replicated(model, config, torch.device("cpu"))
    schedule = config.diffusion.build_schedule()
    objective = build_objective(config, schedule, META, model.conditioning)
    training = config.training
    batches = [_batch(config) for _ in range(training.accumulation)]
    inputs: Any = Inputs(batches, len(decays(training)))
    row = torch.zeros(len(Column), device=META)
    _mark(trace, model, "forward", "network")
    _mark(trace, strategy, "backward", "backward")
    _mark(trace, strategy, "step", "optimizer")
    return lambda: device_step(objective, strategy, inputs, row, Ranks())


def engine_sampling(config: RunConfig, trace: Trace) -> Step:
    """Return a step of the reverse process, which is what a graph captures."""
    model = _network(config).eval().requires_grad_(False)
    if config.training.precision in DTYPES:
        to_half(model, DTYPES[config.training.precision])
    batch = config.training.batch_size
    schedule = config.diffusion.build_schedule()
    sampling = config.sampling
    table = build_table(
        schedule, **sampling.table_options(), prediction=config.diffusion.prediction
    )
    conditions = _conditions(config, batch)
    _mark(trace, model, "forward", "network")
    runner = StepRunner(model, table, (batch, *model.sample_shape), conditions, META)

    def step() -> None:
        with torch.no_grad():
            runner.step()

    return step


def _network(config: RunConfig) -> Network:
    with META:
        return build_network(config.model)


def _batch(config: RunConfig) -> Batch:
    size = config.training.batch_size // config.training.accumulation
    shape = (size, config.model.in_channels, config.model.sample_size, config.model.sample_size)
    images = torch.empty(shape, dtype=torch.uint8, device=META, memory_format=torch.channels_last)
    index = torch.empty(size, dtype=torch.int64, device=META)
    return Batch(images, None if config.model.num_class_embeds is None else index, index)


def _conditions(config: RunConfig, batch: int) -> Conditioning:
    if config.model.num_class_embeds is None:
        return Conditioning()
    return Conditioning(labels=torch.zeros(batch, dtype=torch.int64, device=META))


def _mark(trace: Trace, owner: Any, method: str, part: str) -> None:
    """Let a method's operations belong to a part of the step."""
    plain = getattr(owner, method)

    def marked(self: Any, *arguments: Any, **options: Any) -> Any:
        with trace.during(part):
            return plain(*arguments, **options)

    setattr(owner, method, MethodType(marked, owner))


# --- A textbook's


class CudaAutocast(TorchFunctionMode):
    """What autocast does on CUDA, which has no meta device: half precision, except for norms."""

    HALF = (F.conv2d, F.linear)
    FLOAT = (F.group_norm, F.mse_loss)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._kept: dict[int, Tensor] = {}
        """Weights that need gradients are converted once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.HALF:
            args = [self._half(a) if isinstance(a, Tensor) else a for a in args]
        elif func in self.FLOAT:
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
        return func(*args, **kwargs)

    def _half(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self._dtype)
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor.to(self._dtype)
        return self._kept[id(tensor)]


@contextmanager
def _textbook(precision: str) -> Iterator[None]:
    """Torch's own operations; autocast over float32 weights."""
    with plain_network():
        if precision in DTYPES:
            with CudaAutocast(DTYPES[precision]):
                yield
        else:
            yield


def textbook_training(config: RunConfig, trace: Trace) -> Step:
    """Return a step of Ho et al. 2020, algorithm 1, with torch's fastest optimizer."""
    model = _network(config).train()
    averaged = _network(config).requires_grad_(False)
    weights: list[Tensor] = list(model.parameters())
    averages: list[Tensor] = list(averaged.parameters())
    moments = [torch.zeros_like(weight) for weight in weights]
    squares = [torch.zeros_like(weight) for weight in weights]
    counts = [torch.zeros((), device=META) for _ in weights]
    alpha_bar = config.diffusion.build_schedule().alpha_bar.float().to(META)
    batch, optimizer = _batch(config), config.optimizer

    def loss() -> Tensor:
        images = batch.images.float() / 127.5 - 1
        if config.data.horizontal_flip:
            flips = torch.rand(len(images), 1, 1, 1, device=META) < 0.5
            images = torch.where(flips, images.flip(3), images)
        t = torch.randint(len(alpha_bar), (len(images),), device=META)
        noise = torch.randn_like(images)
        kept = alpha_bar[t][:, None, None, None]
        x = kept.sqrt() * images + (1 - kept).sqrt() * noise
        conditions = Conditioning(batch.labels, dropout_key=batch.positions)
        with trace.during("network"):
            output = model(x, t, conditions)
        return F.mse_loss(output.float(), noise)

    def step() -> None:
        with _textbook(config.training.precision):
            error = loss()
        with trace.during("backward"):
            error.backward()
        with trace.during("optimizer"), torch.no_grad():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            # clip_grad_norm_, AdamW(fused=True) and a `_foreach` average, as torch runs them
            norms = torch._foreach_norm(gradients)
            norm = torch.linalg.vector_norm(torch.stack(norms))
            torch._foreach_mul_(gradients, (optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            torch._foreach_add_(counts, 1)
            torch._fused_adamw_(
                weights, gradients, moments, squares, [], counts, lr=optimizer.learning_rate,
                beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
            torch._foreach_lerp_(averages, weights, 0.0001)
        for weight in weights:
            weight.grad = None

    return step


def textbook_sampling(config: RunConfig, trace: Trace) -> Step:
    """Return a step of Ho et al. 2020, algorithm 2, on averaged float32 weights."""
    model = _network(config).eval().requires_grad_(False)
    schedule = config.diffusion.build_schedule()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with trace.during("network"), _textbook(config.training.precision):
            output: Tensor = model(x, t, _conditions(config, len(x)))
        return output.float()

    process = GaussianDiffusion(predict, schedule.betas, 50, device=META)
    x = torch.empty(config.training.batch_size, *model.sample_shape, device=META)

    def step() -> None:
        with torch.no_grad():
            process.p_sample(x, 25)

    return step


STEPS: dict[tuple[str, str], Callable[[RunConfig, Trace], Step]] = {
    ("training", "engine"): engine_training,
    ("training", "textbook"): textbook_training,
    ("sampling", "engine"): engine_sampling,
    ("sampling", "textbook"): textbook_sampling,
}
"""By what is done, and whose code does it."""


def with_precision(config: RunConfig, precision: Any, batch_size: int) -> RunConfig:
    """The same run in another precision and of another batch size."""
    training = replace(config.training, precision=precision, batch_size=batch_size)
    return replace(config, training=training)
