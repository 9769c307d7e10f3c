"""What a test sees of operations: which there are, and what they ask of the host.

Meta tensors stand for those of a GPU: what would read one fails, and what makes or takes a tensor
of the host is seen here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watched(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class OnTheHost(TorchDispatchMode):
    """Collects the operations that read or make a CPU tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.found.append(str(func))
        return out


class Uploads(TorchFunctionMode):
    """Collects the calls that make a tensor elsewhere of numbers of the host.

    Below, such a tensor is made in one piece, so that nothing could be seen of the copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.found.append(func.__name__)
        return func(*args, **kwargs)
