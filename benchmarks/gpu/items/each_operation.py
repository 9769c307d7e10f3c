"""Call every operation once on a device: `python -m benchmarks.gpu.items.each_operation cuda`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain

import torch
from benchmarks.gpu.items import operations
from benchmarks.gpu.networks import NormCall
from benchmarks.gpu.timing import Job

from ddpm_kernels.dispatch import force_ops

UNEVEN = ((3, 3, 7, 13), (2, 3, 16, 16))
"""Shapes with a remainder in every direction, and without."""
NORMS = (NormCall((3, 30, 7, 5), 6, 1e-6, "silu"), NormCall((2, 64, 16, 16), 32, 1e-6, "none"))


def jobs(device: torch.device) -> Iterator[Job]:
    """Yield a job for each operation and shape."""
    yield from chain.from_iterable(
        make(device, UNEVEN)
        for make in (
            operations.q_sample_jobs, operations.denoising_loss_jobs, operations.reverse_step_jobs,
        )
    )  # fmt: skip
    yield from operations.norm_jobs(device, NORMS)
    yield from operations.adamw_step_jobs(device, (1000,))


def main() -> None:
    """Call the engine's way of each job."""
    device = torch.device(sys.argv[1])
    with force_ops():
        for job in jobs(device):
            job.ways["engine"](**job.make())
            print(job.operation, job.shape, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
