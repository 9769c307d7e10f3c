"""Which tensors take the registered operation, and which the reference directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


def skips_dispatcher(tensor: Tensor) -> bool:
    """Whether a registered operation on this tensor, of any shape, may be called as a function.

    Torch's dispatcher costs a call more host time than the launches themselves. It is needed only
    where something traces, transforms or watches operations, or stands in for a tensor.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def as_function(
    run: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """Make an operation differentiable, once, without the dispatcher.

    Args:
        run: the operation.
        save: `setup_context` of its `register_autograd`.
        differentiate: its backward pass.
    """

    refuse_twice = once_differentiable(differentiate)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            # Gradients are enabled where a graph of the backward pass is wanted.
            call = refuse_twice if torch.is_grad_enabled() else differentiate
            return call(ctx, *gradients)

    return Function.apply


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
