"""Host time of each operation, everything but the launches: `python benchmarks/host_overhead.py`.

On a GPU the host must hand out work faster than the device does it. Here nothing is launched: the
path that a GPU's tensors take is followed to the last line of Python, on a CPU, and timed. With
`--before TREE`, a checkout of another commit, the two are measured in turn:

    git worktree add /tmp/before COMMIT
    python benchmarks/host_overhead.py --before /tmp/before
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ddpm_engine.cli.options import Positive, exit_on_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_kernels import denoising_loss, group_norm_silu, q_sample, reverse_step
from ddpm_kernels.dispatch import assume_gpu

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """Host time of each operation with its launches left out."""

    before: Path | None = None
    """Checkout of another commit, to compare with; default: none."""
    rounds: Positive = 5
    """Processes for each tree, in turn."""
    calls: Positive = 1000
    """Timed calls of each operation in a process."""


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

    def norm() -> torch.Tensor:
        return group_norm_silu(x, 32, weight, bias)

    def norm_and_gradient() -> None:
        torch.autograd.grad(norm(), [x, weight, bias], dy)

    def loss_and_gradient() -> None:
        loss = denoising_loss(prediction, images, timesteps, None, ones, seed, ids)
        torch.autograd.grad(loss.sum(), prediction)

    return {
        "group_norm_silu": norm,
        "group_norm_silu and gradient": norm_and_gradient,
        "q_sample": lambda: q_sample(images, timesteps, signal, sigma, seed, ids),
        "denoising_loss and gradient": loss_and_gradient,
        "reverse_step": lambda: reverse_step(state, state, table, row, seed, ids, in_place=True),
    }


def measure(calls: int) -> dict[str, float]:
    """Microseconds of each operation: the lower quartile, which other processes disturb least."""
    from triton.runtime.jit import JITFunction  # optional

    torch.set_num_threads(1)
    JITFunction.run = lambda *_, **__: None
    found = {}
    with assume_gpu("sm_90"):
        for name, call in operations().items():
            times = []
            for k in range(-calls // 10, calls):
                start = time.perf_counter_ns()
                call()
                if k >= 0:
                    times.append(time.perf_counter_ns() - start)
            found[name] = sorted(times)[calls // 4] / 1e3
    return found


def _channels_last(batch: int, channels: int) -> torch.Tensor:
    x = torch.rand(batch, channels, 8, 8, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def in_tree(tree: Path, calls: int) -> dict[str, float]:
    """Measure in a process of its own, with the kernels of a checkout.

    Raises:
        UserError: there are no kernels in it.
    """
    if not (tree / "kernels/ddpm_kernels").is_dir():
        raise UserError(f"`before` {tree} is no checkout: it has no kernels/ddpm_kernels", "before")
    paths = os.pathsep.join([str(tree / "engine"), str(tree / "kernels")])
    measured = subprocess.run(
        [sys.executable, __file__, "--calls", str(calls), "--rounds", "1"],
        env={**os.environ, "PYTHONPATH": paths, _INSIDE: "1"},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return {name: float(value) for name, value in json.loads(measured.stdout).items()}


_INSIDE = "HOST_OVERHEAD_MEASURES"


def main() -> None:
    """Measure the trees in turn and print medians, and the median of the pairs' ratios."""
    with exit_on_error(Options):
        options = parse_options(Options)
        if _INSIDE in os.environ:
            print(json.dumps(measure(options.calls)))
            return
        trees = {"now": ROOT} | ({} if options.before is None else {"before": options.before})
        found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                found[name].append(in_tree(tree.resolve(), options.calls))
    for operation in found["now"][0]:
        row: dict[str, object] = {"operation": operation}
        for name, rounds in found.items():
            row[f"{name}_us"] = round(median(one[operation] for one in rounds), 1)
        if "before" in found:
            pairs = zip(found["before"], found["now"], strict=True)
            row["ratio"] = round(median(a[operation] / b[operation] for a, b in pairs), 2)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
