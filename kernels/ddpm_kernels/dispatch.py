"""Which tensors take the registered operation, and which the reference directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Let kernels be launched on the device of a tensor of any shape.

    As `torch.cuda.device_of`, which takes longer to find that nothing is to be done.
    """
    device = tensor.get_device()
    here = device < 0 or device == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(device)


_HERE = nullcontext()


def skips_dispatcher(tensor: Tensor) -> bool:
    """Whether a registered operation on this tensor, of any shape, may be called as a function.

    Torch's dispatcher costs a call more host time than the launches themselves. It is needed only
    where something traces, transforms or watches operations, or stands in for a tensor.
    """
    return (
        type(tensor) in _PLAIN
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


_PLAIN = (Tensor, nn.Parameter)


def traces_gradients(tensor: Tensor) -> bool:
    """Whether something traces or transforms what becomes of a tensor of any shape.

    It is then to see registered operations and torch's own, not an `autograd.Function`. What only
    watches operations, a dispatch mode, sees those that are called inside of one.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in _PLAIN
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def differentiable(
    op: torch.library.CustomOpDef,
    run: Callable[..., tuple[Tensor, ...]],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    results: int = 1,
) -> Callable[..., Any]:
    """Make an operation differentiable, once, and return it as a function without the dispatcher.

    Args:
        op: returns its results, and tensors that only its backward pass needs.
        run: the same without the dispatcher; a result may be an argument.
        save: given a context, the arguments and all that is returned, keeps what is needed.
        differentiate: given that context and the gradients of the results, None where there is
            none, returns the gradients of the arguments.
        results: how many of what the operation returns are results; they come first.

    Returns:
        A function that returns the results alone: a tensor, or a tuple of several.
    """

    def save_of_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[results:])
        ctx.set_materialize_grads(False)  # or zeros would be made for their gradients
        save(ctx, inputs, output)

    def differentiate_op(ctx: Any, *gradients: Tensor | None) -> Any:
        return differentiate(ctx, *gradients[:results])

    op.register_autograd(differentiate_op, setup_context=save_of_op)
    refuse_twice = once_differentiable(differentiate)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
            output = run(*arguments)
            ctx.set_materialize_grads(False)
            save(ctx, arguments, output)
            return output[0] if results == 1 else output[:results]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            # Gradients are enabled where a graph of the backward pass is wanted.
            call = refuse_twice if torch.is_grad_enabled() else differentiate
            return call(ctx, *gradients)

    # `Function.apply` itself first looks for functorch, which would have taken the dispatcher.
    apply: Callable[..., Any] = super(torch.autograd.Function, Function).apply
    return apply


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
