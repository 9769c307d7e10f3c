"""Tensors on their way from a GPU to the host, while the GPU goes on with something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Pending = Callable[[], NDArray[Any]]
"""Waits for an array that a device is still computing, and returns it."""


def to_host(tensor: Tensor) -> Pending:
    """Begin to copy a tensor, of any shape, to the host; what is queued afterwards need not wait.

    Whatever writes to the tensor later, on the same stream, does so after the copy.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> NDArray[Any]:
        done.synchronize()
        return copied.numpy()

    return wait
