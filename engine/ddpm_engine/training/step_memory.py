"""How much memory of a GPU a training step takes: a model of it, from a trace that allocates none.

The network's forward and backward pass run on meta tensors, which have shapes and no contents, and
every storage is counted from the operation that makes it to the moment that nothing refers to it.
That is what torch's allocator hands out. It does not see what is beside that: the context, the
libraries' workspaces, and what fragmentation wastes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.half_weights import half_names, to_half
from ddpm_engine.runtime import DTYPES
from ddpm_engine.training.ema import decays
from ddpm_engine.training.text import DEFAULT_LENGTH
from ddpm_kernels.dispatch import force_ops

RESERVED = 3 * 2**30
"""Bytes left to what the trace does not see: an allowance, which nobody has measured."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step of one rank holds at its peak, by what they are."""

    weights: int
    """float32, and half-precision copies of those that compute in it."""
    moments: int
    """Both moments of AdamW."""
    averages: int
    """Averages of the weights."""
    gradients: int
    """Sums of gradients over micro-batches and ranks; 0 if each is used as it comes."""
    kept: int
    """What the forward pass of a micro-batch keeps for its backward pass."""
    backward: int
    """What the backward pass holds more than that at its peak."""

    @property
    def state(self) -> int:
        """What is there between steps."""
        return self.weights + self.moments + self.averages + self.gradients

    @property
    def total(self) -> int:
        """All of it, without `RESERVED`."""
        return self.state + self.kept + self.backward

    def divided(self, pieces: int) -> StepMemory:
        """Return what it would be with micro-batches of one in `pieces` of the size."""
        return replace(
            self,
            gradients=self.moments // 2,
            kept=self.kept // pieces,
            backward=self.backward // pieces,
        )


def step_memory(config: RunConfig, ranks: int = 1, shards: int = 1) -> StepMemory:
    """Model a run's training step on a GPU, without kernels that compile fuses.

    Args:
        config: the run, its precision settled. Distillation takes more.
        ranks: processes that share the batch.
        shards: processes that share the state.
    """
    training = config.training
    dtype = DTYPES.get(training.precision)
    with torch.device("meta"):
        network = build_network(config.model).train()
    names = half_names(network) if dtype is not None else []
    halves = sum(network.get_parameter(name).numel() for name in names)
    count = sum(parameter.numel() for parameter in network.parameters())
    if dtype is not None:
        to_half(network, dtype)
    network.recompute(training.recompute)
    batch = max(1, training.batch_size // (ranks * training.accumulation))
    kept, peak = traced(network, batch, text_length=config.data.text_length or DEFAULT_LENGTH)
    summed = ranks > 1 or training.accumulation > 1
    return StepMemory(
        weights=(4 * count + 2 * halves) // shards,
        moments=8 * count // shards,
        averages=4 * count * len(decays(training)) // shards,
        gradients=4 * count // shards if summed else 0,
        kept=kept,
        backward=peak - kept,
    )


def traced(
    network: Network, batch: int, *, on_gpu: bool = True, text_length: int = DEFAULT_LENGTH
) -> tuple[int, int]:
    """Count what a forward and backward pass allocates, on the network's device and dtype.

    Args:
        network: on meta tensors, or on a device, where it is really computed.
        batch: samples.
        on_gpu: take the registered operations, as GPUs do, and not their references.
        text_length: tokens of a caption, if the network is conditioned on text.

    Returns:
        Bytes at the end of the forward pass, and at the peak; gradients of weights are included.
    """
    device = next(network.parameters()).device
    channels, height, width = network.sample_shape
    spec = network.conditioning
    index = torch.zeros(batch, dtype=torch.int64, device=device)
    x = torch.zeros(batch, channels, height, width, device=device)
    small = spec.low_resolution is not None

    def zeros(*shape: int | None) -> Tensor | None:
        sizes = [size for size in shape if size is not None]
        return None if len(sizes) < len(shape) else torch.zeros(*sizes, device=device)

    conditioning = Conditioning(
        labels=None if spec.null_class is None else index,
        low_resolution=x if small else None,
        augmentation_level=index if small else None,
        dropout_key=index,
        text=zeros(batch, text_length, spec.text),
        text_mask=(
            None if spec.text is None
            else torch.ones(batch, text_length, dtype=torch.bool, device=device)
        ),
        vector=zeros(batch, spec.vector),
    )  # fmt: skip
    given = conditioning.present().values()
    ops = force_ops() if on_gpu else nullcontext()
    with ops, _fused_attention(), LiveMemory([*network.parameters(), x, index, *given]) as live:
        prediction = network(x, index, conditioning)
        kept = live.now
        prediction.backward(torch.ones_like(prediction))
        del prediction
    return kept, live.peak


class LiveMemory(TorchDispatchMode):
    """Count the bytes of all storages that operations make, until they are freed.

    Args:
        existing: tensors that were there before, which are not counted.
    """

    now: int = 0
    """Bytes alive."""
    peak: int = 0
    """Most bytes that were ever alive at once."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS and args[0].is_meta:
            output = tree_map(_as_cudnn, output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, freed).atexit = False
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)


_CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
)


def _as_cudnn(tensor: Tensor | None) -> Tensor | None:
    """Lay out a result as cuDNN does where all is channels-last; a meta tensor does not know."""
    if tensor is None or tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Trace attention as GPUs compute it, by kernels that never hold a matrix of all pairs.

    On meta tensors torch takes its reference, which holds several. Replaced by name, since a mode
    would not be in force where the backward pass recomputes.
    """
    reference = F.scaled_dot_product_attention
    fused = torch.ops.aten._scaled_dot_product_efficient_attention.default

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **named: Any
    ) -> Any:
        if named or not query.is_meta:
            return reference(query, key, value, mask, **named)
        bias = None
        if mask is not None:
            # One row for all queries and heads, in the precision of the products.
            shape = (*query.shape[:-1], key.shape[-2])
            bias = query.new_zeros(mask.shape).expand(shape)
        return fused(query, key, value, bias, True)[0]

    setattr(F, "scaled_dot_product_attention", attend)  # noqa: B010
    try:
        yield
    finally:
        setattr(F, "scaled_dot_product_attention", reference)  # noqa: B010
