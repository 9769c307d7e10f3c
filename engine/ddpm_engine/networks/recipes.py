"""Tensors of which the backward pass keeps how they were made, and makes them again.

A norm's output is kept only for the gradients of the weights of the layer that follows, while its
input is kept by the norm itself. To compute it again takes one pass over it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

_RECIPES = WeakTensorKeyDictionary()
_KEEP = nullcontext()


class _View(NamedTuple):
    make: Callable[[], Tensor]
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


def set_recipe(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Say how a tensor can be made again, for as long as it exists.

    Args:
        tensor: of any shape.
        make: returns a tensor of the same values and strides; it must not hold this one.
    """
    _RECIPES[tensor] = make


def keeping_recipe(tensor: Tensor) -> AbstractContextManager[object]:
    """Let what is called within keep the recipe of a tensor for its backward pass, if it has one.

    Args:
        tensor: of any shape, or a view of one that has a recipe.
    """
    # A compiler decides by itself what is kept.
    if torch.compiler.is_compiling() or not len(_RECIPES) or not torch.is_grad_enabled():
        return _KEEP
    base = tensor if tensor._base is None else tensor._base
    make = _RECIPES.get(base)
    if make is None:
        return _KEEP
    storage = base.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | _View:
        if saved.untyped_storage()._cdata != storage:
            return saved
        return _View(make, saved.size(), saved.stride(), int(saved.storage_offset()))

    return saved_tensors_hooks(pack, _unpack)


def _unpack(kept: Tensor | _View) -> Tensor:
    if not isinstance(kept, _View):
        return kept
    with torch.no_grad():
        return kept.make().as_strided(kept.shape, kept.strides, kept.offset)
