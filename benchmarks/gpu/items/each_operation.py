"""Call every operation once on a device: `python -m benchmarks.gpu.items.each_operation cuda`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain

import torch
from benchmarks.gpu.items import norms, operations, tokens
from benchmarks.gpu.networks import NormCall
from benchmarks.gpu.timing import Job

from ddpm_kernels.dispatch import force_ops

UNEVEN = ((3, 3, 7, 13), (2, 3, 16, 16))
"""Shapes with a remainder in every direction, and without."""
NORMS = (
    NormCall((3, 30, 7, 5), 6, 1e-6, "silu", skip=12, before=True, dropout=0.1),
    NormCall((2, 64, 16, 16), 32, 1e-6, "none"),
    NormCall((2, 64, 48, 48), 32, 1e-6, "silu", before=True, dropout=0.1),
    NormCall((2, 96, 48, 48), 32, 1e-6, "silu", skip=32, kept=True),
)
"""On chip and not, with all that is fused with them and without."""


def jobs(device: torch.device) -> Iterator[Job]:
    """Yield a job for each operation and shape."""
    yield from tokens.modulate_jobs(device, ((3, 7, 130), (2, 16, 384)))
    yield from chain.from_iterable(
        make(device, UNEVEN)
        for make in (
            operations.q_sample_jobs, operations.denoising_loss_jobs, operations.latent_jobs,
            operations.reverse_step_jobs,
        )
    )  # fmt: skip
    yield from norms.norm_jobs(device, NORMS)
    yield from norms.residual_sum_jobs(device, ((3, 30, 7, 5), (2, 64, 40, 40)))
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
