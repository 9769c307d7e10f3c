"""Compile kernels ahead: several processes fill one cache, which all later items read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from benchmarks.gpu.item import Context
from benchmarks.gpu.items import norms, operations, tokens
from benchmarks.gpu.networks import NormCall, all_norms

from ddpm_kernels.dispatch import force_ops

IMAGES = ((128, 3, 32, 32), (64, 3, 256, 256), (16, 3, 256, 256), (64, 1, 16, 16))
"""Shapes of images in the items."""


def _norm(call: NormCall, dtype: torch.dtype, device: torch.device) -> None:
    given = norms.arguments(call, device, leaves=True, dtype=dtype)
    norms.gradients(norms.engine(call, device, residual=True), **given)


def _calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    for call in all_norms(dry):
        for dtype in (torch.bfloat16, torch.float32):
            yield partial(_norm, call, dtype, device)
    shapes = ((2, 3, 8, 8),) if dry else IMAGES
    for shape in shapes:
        for jobs in (
            operations.q_sample_jobs, operations.denoising_loss_jobs, operations.reverse_step_jobs,
        ):  # fmt: skip
            for job in jobs(device, (shape,)):
                yield lambda job=job: job.ways["engine"](**job.make())  # type: ignore[misc]
    for job in operations.latent_jobs(device, ((2, 4, 8, 8),) if dry else operations.LATENTS):
        yield lambda job=job: job.ways["engine"](**job.make())  # type: ignore[misc]
    for job in tokens.modulate_jobs(device, tokens.shapes(dry)):
        yield lambda job=job: job.ways["engine"](**job.make())  # type: ignore[misc]
    for job in operations.adamw_step_jobs(device, (1024,)):
        yield lambda job=job: job.ways["engine"](**job.make())  # type: ignore[misc]


def ahead(context: Context, share: int, of: int) -> None:
    """Call every `of`-th operation at a shape of the networks, which compiles its kernels."""
    done = 0
    with force_ops():
        for number, call in enumerate(_calls(context.device, context.dry)):
            if number % of != share:
                continue
            call()
            done += 1
    context.add({"what": f"operations compiled by process {share + 1} of {of}", "size": str(done)})
