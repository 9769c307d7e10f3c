"""Which tensors take the registered operation, and which the reference directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ddpm_kernels.triton_shim import HAS_TRITON, triton

_forced = False
_gpu_assumed: str | None = None


def takes_op(tensor: Tensor) -> bool:
    """Whether a call on this tensor, of any shape, goes through the registered operation.

    CUDA and ROCm tensors do. Elsewhere the reference is called directly, so that inductor sees
    plain torch operations and fuses them.
    """
    return tensor.is_cuda or _forced


def runs_triton(tensor: Tensor) -> bool:
    """Whether a registered operation on this tensor, of any shape, launches its Triton kernel.

    On GPUs, and on any device under Triton's interpreter (`TRITON_INTERPRET=1`, for tests).
    """
    return HAS_TRITON and (tensor.is_cuda or bool(_gpu_assumed) or triton.knobs.runtime.interpret)


@contextmanager
def force_ops() -> Iterator[None]:
    """Take the registered operations on every device: the path of a GPU, run on a CPU."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def assumed_architecture() -> str | None:
    """That of the innermost `assume_gpu`."""
    return _gpu_assumed


@contextmanager
def assume_gpu(architecture: str) -> Iterator[None]:
    """Go as far as the launch of a Triton kernel on every device, to see what is launched."""
    global _gpu_assumed
    before, _gpu_assumed = _gpu_assumed, architecture
    try:
        with force_ops():
            yield
    finally:
        _gpu_assumed = before
