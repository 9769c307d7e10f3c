"""Count launches, bytes and FLOP of a step as it runs on tensors without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.traffic.launches import HOST_READS, NONE, is_channels_last, launches_of
from benchmarks.traffic.passes import (
    ACCUMULATED,
    BIAS_GRADIENTS,
    CONV_BIAS,
    CONVOLUTIONS,
    LAYOUT,
    is_compute,
    pass_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ddpm_kernels.dispatch import assume_gpu

_WRITTEN_ONLY = {"aten.copy_", "aten.fill_", "aten.zero_", "aten.normal_", "aten.uniform_"}
"""Operations that write their first argument without reading it."""
_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass(frozen=True)
class Entry:
    """One operation, or a part of it."""

    step_pass: str
    name: str
    launches: int
    bytes: int
    flop: int = 0


class Trace(TorchDispatchMode):
    """Counts what every operation on meta tensors would launch, read and write on a GPU.

    An operation of this engine goes as far as its launches, which are counted instead of made:
    what is counted is the code's own. Bytes are those of each tensor that an operation reads and
    writes, once; of a convolution or a matrix product only the passes beside it are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.unknown: Counter[str] = Counter()
        """Operations of which no table says what they launch; counted as one launch each."""
        self.host_reads = 0
        """Times that the host waited for a value."""
        self.part = "noise"
        self._inside: str | None = None
        self._launched: list[int] = []

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Set the part of the step that operations belong to; see `pass_of`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).rsplit(".", 1)[0]
        if name.startswith("ddpm."):
            return self._own(name, func, args, kwargs)
        # This one has no meta kernel, and returns nothing.
        out: Any = None if name == "aten._fused_adamw_" else func(*args, **kwargs)
        if name == "aten.convolution":
            self._convolution(func, args, out)
            out = _as_cudnn(out)
        elif name == "aten.convolution_backward":
            self._convolution_backward(func, args, out)
            out = (*map(_as_cudnn, out[:2]), out[2])
        elif not func.is_view and name not in NONE:
            self._plain(name, func, args, kwargs, out)
        return out

    def _add(self, step_pass: str, name: str, launches: int, moved: int, flop: int = 0) -> None:
        self.entries.append(Entry(self._inside or step_pass, name, launches, moved, flop))

    def _plain(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        launches = launches_of(name, args)
        if launches is None:
            launches = 1
            self.unknown[name] += 1
        self.host_reads += name in HOST_READS
        compute = is_compute(name)
        moved = 0 if compute or not launches else _traffic(name, func, args, kwargs, out)
        flop = _flop(func, args, kwargs, out) if compute else 0
        self._add(pass_of(name, args, out, self.part), name, launches, moved, flop)
        if name == "aten.addmm_":  # reads and writes once more what a product before it wrote
            self._add(ACCUMULATED, name, 0, 2 * _nbytes(out))

    def _copies(self, name: str, *tensors: Tensor) -> None:
        """Copies that cuDNN needs where tensors are not channels-last."""
        for tensor in tensors:
            if not is_channels_last(tensor):
                self._add(LAYOUT, f"{name} layout", 1, 2 * _nbytes(tensor))

    def _convolution(self, func: Any, args: Any, out: Tensor) -> None:
        x, weight, bias = args[:3]
        self._copies("aten.convolution", x, weight)
        self._add(CONVOLUTIONS, "aten.convolution", 1, 0, _flop(func, args, {}, out))
        if bias is not None:  # which torch adds to cuDNN's result
            self._add(CONV_BIAS, "bias", 1, 2 * _nbytes(out) + _nbytes(bias))

    def _convolution_backward(self, func: Any, args: Any, out: Any) -> None:
        dy, x, weight, mask = args[0], args[1], args[2], args[-1]
        self._copies("aten.convolution_backward", dy, x, weight)
        flop = _flop(func, args, {}, out)
        launches = sum(mask[:2])
        self._add(CONVOLUTIONS, "aten.convolution_backward", launches, 0, flop)
        if mask[2]:
            self._add(BIAS_GRADIENTS, "bias gradient", 1, _nbytes(dy) + _nbytes(out[2]))

    def _own(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one of the engine's operations up to its launches."""
        before = self._inside, self._launched
        step_pass = pass_of(name, args, None, self.part)
        self._inside, self._launched = self._inside or step_pass, []
        try:
            # Not the meta kernel, but the one that runs. Torch's operations on the way count, too.
            with self:
                out = func.redispatch(_KERNEL, *args, **kwargs)
            launched = self._launched
        finally:
            self._inside, self._launched = before
        moved = _traffic(name, func, args, kwargs, out)
        if not func._schema.is_mutable:  # what is read by several launches counts for each
            moved = max(moved, sum(launched))
        self._add(step_pass, name, len(launched), moved)
        return out

    def launch(self, *args: Any, **kwargs: Any) -> None:
        """Stand in for the launch of a Triton kernel: note what it reads and writes."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        self._launched.append(sum(_nbytes(t) for t in {id(t): t for t in tensors}.values()))


@contextmanager
def tracing(trace: Trace, architecture: str = "sm_90") -> Iterator[None]:
    """Count everything in the block, on meta tensors, as if they were a GPU's."""
    from triton.runtime.jit import JITFunction  # optional

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(JITFunction, "run", lambda _, *a, **k: trace.launch(*a, **k))
        )
        stack.enter_context(patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        stack.enter_context(patch("torch.nn.functional.dropout", _dropout))
        stack.enter_context(assume_gpu(architecture))
        stack.enter_context(trace)
        yield


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Torch's choice on CUDA: flash attention takes half precision, heads up to 256 and no mask."""
    flash = query.dtype != torch.float32 and query.shape[-1] <= 256 and attn_mask is None
    if flash:
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    else:
        needs_sums = torch.is_grad_enabled()
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None
        if attn_mask is not None:
            shape = (*query.shape[:-1], key.shape[-2])
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).expand(shape)
        out = attend(query, key, value, bias, needs_sums)[0]
    return out


def _dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """One kernel on CUDA."""
    return torch.ops.aten.native_dropout(x, p, training)[0] if training and p else x


def _as_cudnn(tensor: Tensor | None) -> Tensor | None:
    """Lay out a result as cuDNN does where all is channels-last; a meta tensor does not know."""
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the elements that there are in memory: those of an expanded tensor once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else min(size, 1)
    return numel * tensor.element_size()


def _traffic(name: str, func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operation reads and writes, each tensor once; what it changes, twice."""
    changed: dict[int, Tensor] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            changed |= {id(t): t for t in tree_leaves(value) if isinstance(t, Tensor)}
    read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    if name in _WRITTEN_ONLY:
        read = {key: tensor for key, tensor in read.items() if key not in changed}
    elif name in _LOOK_UPS:
        table = tree_leaves(args)[0]
        read.pop(id(table), None)  # of which only what is looked up is read
    written = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)} | changed
    moved = sum(map(_nbytes, read.values())) + sum(map(_nbytes, written.values()))
    if name in _FILLED_FIRST and args[0].numel() < out.numel():
        moved += _nbytes(args[0])
    return moved + (sum(map(_nbytes, written.values())) if name in _LOOK_UPS else 0)


_FILLED_FIRST = {"aten.constant_pad_nd", "aten.slice_backward"}
"""Operations that write their first argument, where it belongs, into what they filled before."""
_LOOK_UPS = {"aten.embedding", "aten.index", "aten.index_select", "aten.gather"}


def _flop(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    in_place = func is torch.ops.aten.addmm_.default
    count = flop_registry[torch.ops.aten.addmm if in_place else func._overloadpacket]
    return int(count(*args, **kwargs, out_val=out))
