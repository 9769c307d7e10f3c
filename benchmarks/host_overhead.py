"""Host time of operations and of a step, without launches: `python benchmarks/host_overhead.py`.

On a GPU the host must hand out work faster than the device does it. Here nothing is launched: the
path that a GPU's tensors take is followed to the last line of Python, on a CPU, and timed.

`training step` is a step of the Trainer, not captured, with the CIFAR-10 network of the preset, cut
to a few channels and pixels: as many layers, parameters, operations and casts, but next to nothing
to compute.

* Python, torch's dispatcher and autograd are all in it.
* Linear layers, additions and so on are torch's CPU operations on a few numbers each, in place of
  what it takes to launch them. Attention and dropout, for which a CPU does far more than to launch
  one kernel each way, are a product and a sum.
* Convolutions are functions that allocate their results. These are written in Python, as no
  convolution is: what they take is a row of its own, to be subtracted.
* Nothing is launched: what Triton, cuDNN and CUDA need for it is not in it. The launches that
  `step_traffic.py` counts, times 5 µs, are a model of that, not a measurement.
* Batches have been read before, as by a thread of the loader's where there is a GPU.
* Garbage is collected in few of the steps, of which a quartile shows nothing.

`one of 50 group_norm_silu …` is what a norm adds to the forward and backward passes of a network;
with one norm alone, half of the time is `torch.autograd.grad`'s.

With `--before TREE`, a checkout of another commit, the two are measured in turn:

    git worktree add /tmp/before COMMIT
    python benchmarks/host_overhead.py --before /tmp/before
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.cli.options import Positive, exit_on_error, parse_options
from ddpm_engine.config import RunConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.loader import make_batches
from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet import unet
from ddpm_engine.presets import cifar10
from ddpm_engine.training import trainer
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.trainer import Trainer
from ddpm_kernels import denoising_loss, group_norm_silu, q_sample, reverse_step
from ddpm_kernels.dispatch import assume_gpu

ROOT = Path(__file__).resolve().parents[1]

IN_A_ROW = 50
ONE_OF_MANY = f"one of {IN_A_ROW} group_norm_silu in a row and its gradients"


@dataclass(frozen=True)
class Options:
    """Host time of each operation with its launches left out."""

    before: Path | None = None
    """Checkout of another commit, to compare with; default: none."""
    rounds: Positive = 5
    """Processes for each tree, in turn."""
    calls: Positive = 1000
    """Timed calls of each operation in a process."""
    steps: int = 60
    """Timed training steps in a process; 0: none."""


def operations() -> dict[str, Callable[[], object]]:
    """One call of each operation, at a size of which the host's time does not depend."""
    batch, channels = 4, 128
    ids, timesteps = torch.arange(batch), torch.arange(batch)
    images = torch.zeros(batch, 3, 8, 8, dtype=torch.uint8)
    signal, sigma, ones = torch.rand(3, 10)
    seed, row = torch.tensor(0), torch.tensor(0)
    x = _channels_last(batch, channels).requires_grad_()
    weight, bias = torch.rand(2, channels)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    dy = _channels_last(batch, channels)
    prediction = _channels_last(batch, 3).requires_grad_()
    state, table = _channels_last(batch, 3).float(), torch.rand(10, 16)
    pixel = torch.rand(1, channels, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    norms = [tuple(torch.rand(2, channels).unbind()) for _ in range(IN_A_ROW)]
    affine = [parameter.requires_grad_() for norm in norms for parameter in norm]

    def norm() -> torch.Tensor:
        return group_norm_silu(x, 32, weight, bias)

    def norm_and_gradient() -> None:
        torch.autograd.grad(norm(), [x, weight, bias], dy)

    def norms_and_gradients() -> None:
        y = pixel
        for weight, bias in norms:
            y = group_norm_silu(y, 32, weight, bias)
        y.backward(pixel.detach())
        for parameter in affine:
            parameter.grad = None

    def loss_and_gradient() -> None:
        loss = denoising_loss(prediction, images, timesteps, None, ones, seed, ids)
        torch.autograd.grad(loss.sum(), prediction)

    return fused_operations(batch, channels) | {
        "group_norm_silu": norm,
        "group_norm_silu and gradient": norm_and_gradient,
        ONE_OF_MANY: norms_and_gradients,
        "q_sample": lambda: q_sample(images, timesteps, signal, sigma, seed, ids),
        "denoising_loss and gradient": loss_and_gradient,
        "reverse_step": lambda: reverse_step(state, state, table, row, seed, ids, in_place=True),
    }


def fused_operations(batch: int, channels: int) -> dict[str, Callable[[], object]]:
    """What ends a residual block, and the norms of the next; none for a commit without them."""
    try:
        from ddpm_kernels import group_norm_silu_residual, residual_sum
        from ddpm_kernels.dropout import Dropout
    except ImportError:
        return {}
    x, skip, dy = (_channels_last(batch, channels) for _ in range(3))
    x, skip, both = x.requires_grad_(), skip.requires_grad_(), _channels_last(batch, 2 * channels)
    gamma, beta = (weight.requires_grad_() for weight in torch.rand(2, 2 * channels).unbind())
    before = torch.rand(batch, channels, dtype=torch.bfloat16, requires_grad=True)
    owed = torch.rand(channels, dtype=torch.bfloat16, requires_grad=True)
    dropout = Dropout(0.1, torch.arange(batch))
    weight, bias = gamma[:channels], beta[:channels]

    def first_norm() -> None:
        outputs: Any = group_norm_silu_residual(x, 32, gamma, beta, skip=skip, owed=(owed, None))
        torch.autograd.grad(outputs, [x, skip, owed, gamma, beta], [both, dy, dy])

    def second_norm() -> None:
        y = group_norm_silu(x, 32, weight, bias, before=before, dropout=dropout)
        torch.autograd.grad(y, [x, before, gamma, beta], dy)

    def end() -> None:
        y, _ = residual_sum(x, skip, owed)
        torch.autograd.grad(y, [x, skip], dy)

    return {
        "norm of two maps, residual and owed bias, and gradients": first_norm,
        "norm with vector and dropout, and gradients": second_norm,
        "residual_sum and gradients": end,
    }


def tiny_cifar10(folder: Path, steps: int) -> RunConfig:
    """The run of the preset on digits, with as many layers of a few channels, in bfloat16."""
    preset = cifar10()
    model = replace(
        preset.model, sample_size=8, in_channels=1, out_channels=1,
        block_out_channels=(8, 16, 16, 16), norm_num_groups=8,
    )  # fmt: skip
    data = DataConfig(folder / "digits", source="digits", horizontal_flip=True, workers=1)
    training = replace(
        preset.training, steps=steps, batch_size=1, precision="bf16", allow_slow_bf16=True
    )
    log = replace(preset.log, every=10**9, checkpoint_every=10**9, sample_every=0)
    return replace(preset, out=folder / "run", data=data, model=model, training=training, log=log)


class StepTimes(Callback):
    """Nanoseconds of each step that this thread computed: neither for the data nor for a core."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_step_begin(self, run: Any) -> None:
        """See `Callback`."""
        self._start = time.thread_time_ns()

    def on_step_end(self, run: Any) -> None:
        """See `Callback`."""
        self.found.append(time.thread_time_ns() - self._start)


@contextmanager
def little_to_compute() -> Iterator[None]:
    """Let what a GPU does in one launch be little more on a CPU, gradients included."""
    with (
        no_convolutions(),
        patch.object(F, "dropout", lambda x, p, *_, **__: x * (1 - p)),
        patch.object(
            F,
            "scaled_dot_product_attention",
            lambda query, key, value, mask=None: torch.addcmul(query, key, value),
        ),
    ):
        yield


@contextmanager
def no_convolutions() -> Iterator[None]:
    """Let convolutions compute nothing."""
    library = torch.library.Library("aten", "IMPL")

    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], *_: Any
    ) -> Tensor:
        height, width = (
            (x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2]) // stride[i] + 1 for i in (0, 1)
        )
        shape = x.shape[0], weight.shape[0], height, width
        return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)

    def convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is replaced
        library.impl("convolution", convolution, "CPU")
        library.impl("convolution_backward", convolution_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def stand_ins(network: nn.Module, calls: int) -> float:
    """Microseconds of what stands in for a network's convolutions, both ways, and calling it."""
    ones, zeros, found = [1, 1], [0, 0], 0.0
    for layer in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
        weight = layer.weight.detach()
        x = torch.zeros(1, layer.in_channels, 2, 2, dtype=weight.dtype)
        times = []
        for _ in range(calls):
            start = time.thread_time_ns()
            y = torch.ops.aten.convolution.default(
                x, weight, layer.bias, ones, ones, ones, False, zeros, 1
            )
            torch.ops.aten.convolution_backward.default(
                y, x, weight, [weight.shape[0]], ones, ones, ones, False, zeros, 1, [True] * 3
            )
            times.append(time.thread_time_ns() - start)
        found += sorted(times)[calls // 4] / 1e3
    return found


def training_step(steps: int) -> dict[str, float]:
    """Microseconds of the main thread's work for a training step: the lower quartile."""
    times = StepTimes()
    channels_last = patch.object(unet, "_memory_format", lambda _: torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, channels_last, little_to_compute():
        read_before = patch.object(trainer, "make_batches", _read_before)
        run = Trainer(tiny_cifar10(Path(folder), steps + 5), [times], any_precision=True)
        with read_before:
            run.fit()
        with torch.no_grad():
            strategy: Any = run.run.strategy  # of either commit: both know its model
            idle = stand_ins(strategy.model, calls=20)
    return {
        "training step": sorted(times.found[5:])[steps // 4] / 1e3,
        "convolutions' stand-ins": idle,
    }


def _read_before(*arguments: Any, **options: Any) -> Iterator[Any]:
    return iter(list(make_batches(*arguments, **options)))


def measure(calls: int, steps: int) -> dict[str, float]:
    """Microseconds of each operation: the lower quartile, which other processes disturb least."""
    from triton.runtime.jit import JITFunction  # optional

    torch.set_num_threads(1)
    JITFunction.run = lambda *_, **__: None
    found = {}
    with assume_gpu("sm_90"):
        for name, call in operations().items():
            times = []
            repeats = max(calls // IN_A_ROW, 1) if name == ONE_OF_MANY else calls
            for k in range(-repeats // 10, repeats):
                start = time.thread_time_ns()
                call()
                if k >= 0:
                    times.append(time.thread_time_ns() - start)
            found[name] = sorted(times)[len(times) // 4] / 1e3
        found[ONE_OF_MANY] /= IN_A_ROW
        if steps:
            found |= training_step(steps)
    return found


def _channels_last(batch: int, channels: int) -> torch.Tensor:
    x = torch.rand(batch, channels, 8, 8, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def in_tree(tree: Path, calls: int, steps: int) -> dict[str, float]:
    """Measure in a process of its own, with the kernels of a checkout.

    Raises:
        UserError: there are no kernels in it.
    """
    if not (tree / "kernels/ddpm_kernels").is_dir():
        raise UserError(f"`before` {tree} is no checkout: it has no kernels/ddpm_kernels", "before")
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # wheels may lie there
    paths = os.pathsep.join([str(tree / "engine"), str(tree / "kernels"), *filter(None, others)])
    measured = subprocess.run(
        [
            sys.executable, __file__,
            "--calls", str(calls), "--steps", str(steps), "--rounds", "1",
        ],
        env={**os.environ, "PYTHONPATH": paths, _INSIDE: "1", **_ZEROS, **_NO_GPU},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = json.loads(measured.stdout.splitlines()[-1])
    return {name: float(value) for name, value in found.items()}


_INSIDE = "HOST_OVERHEAD_MEASURES"
_ZEROS = {"MALLOC_PERTURB_": "255", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""What no kernel has written is zero, so that gradients are finite and no step is skipped."""
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
"""It would be trained on, if there is one."""


def main() -> None:
    """Measure the trees in turn and print medians, and the median of the pairs' ratios."""
    with exit_on_error(Options):
        options = parse_options(Options)
        if _INSIDE in os.environ:
            print(json.dumps(measure(options.calls, options.steps)))
            return
        trees = {"now": ROOT} | ({} if options.before is None else {"before": options.before})
        found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                found[name].append(in_tree(tree.resolve(), options.calls, options.steps))
    for operation in found["now"][0]:
        row: dict[str, object] = {"operation": operation}
        with_it = {name: rounds for name, rounds in found.items() if operation in rounds[0]}
        for name, rounds in with_it.items():
            row[f"{name}_us"] = round(median(one[operation] for one in rounds), 1)
        if "before" in with_it:
            pairs = zip(found["before"], found["now"], strict=True)
            row["ratio"] = round(median(a[operation] / b[operation] for a, b in pairs), 2)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
