"""Which elements of which gradient each program of a launch takes: tables on the device.

The tables of a division depend on shapes alone and are uploaded once. Where the gradients lie is a
table of its own, one address a gradient, uploaded when an address changes. Uploads are copies from
pinned memory that nothing waits for. No pinned buffer is written twice: torch hands its memory out
again after the copy, as it does with the device's memory after the kernels that read it.

A graph repeats its copies at every replay, so a call that is captured copies addresses from a
pinned buffer of its own, which is kept and never written again. Not every torch can allocate pinned
memory in a capture: the call before, outside of one, has left buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.adamw_step.checks import check_dense, check_segments

GRADIENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPARES = 16
"""Sets of gradients that may be new in captures, between two calls outside of them."""


class Share(NamedTuple):
    """What one launch takes: pieces of gradients that are alike in dtype and alignment."""

    dtype: torch.dtype
    """Of the gradients."""
    alignment: int
    """1, 2, 4 or 8 elements: in every tensor, each piece begins at a multiple of this."""
    rows: Tensor
    """int64 `[programs, 4]` on the device: the index of a program's gradient, its first element in
    the gradient and in the flat buffers, and how many it takes."""


def divide(
    gradients: Sequence[Tensor],
    offsets: Sequence[int] | None,
    count: int,
    boundary: int,
    tile: int,
    widest: int,
    device: torch.device,
) -> tuple[tuple[Share, ...], Tensor]:
    """Divide gradients among programs of `tile` elements.

    Args:
        gradients: of any shapes, dense.
        offsets: of their segments in the flat buffers; None if there are none.
        count: elements of the flat buffers.
        boundary: an element of the flat buffers at which a tile begins, if it lies in a segment.
        tile: elements, a power of two.
        widest: elements that a thread moves at once, a power of two: no alignment is larger.
        device: of the tables.

    Returns:
        The launches, and the gradients' addresses: int64 `[len(gradients)]` on the device.

    Raises:
        ValueError: segments overlap or lie outside of the buffers, or a gradient is not dense or in
            none of `GRADIENT_DTYPES`.
        RuntimeError: in a capture, without a call before it for the same shapes.
    """
    addresses = [gradient.data_ptr() for gradient in gradients]
    shares = _divide(
        tuple([gradient.numel() for gradient in gradients]),
        tuple([gradient.dtype for gradient in gradients]),
        tuple([address % 16 for address in addresses]),
        None if offsets is None else tuple(offsets),
        count,
        boundary,
        tile,
        widest,
        device,
    )
    return shares, _addresses(len(addresses), device).on_device(addresses, gradients)


@cache  # and nothing is ever dropped, because a graph may read it
def _divide(
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    residues: tuple[int, ...],
    offsets: tuple[int, ...] | None,
    count: int,
    boundary: int,
    tile: int,
    widest: int,
    device: torch.device,
) -> tuple[Share, ...]:
    """Divide gradients whose addresses leave `residues` modulo 16; the rest as in `divide`."""
    if _capturing(device):
        raise RuntimeError(
            "adamw_step and gradient_norm must run once on gradients of the same shapes before "
            "they are captured"
        )
    for dtype in dtypes:
        if dtype not in GRADIENT_DTYPES:
            known = ", ".join(map(str, GRADIENT_DTYPES))
            raise ValueError(f"a gradient is {dtype}; choose from {known}")
    if offsets is None:
        offsets = (0,) * len(sizes)
    else:
        check_segments(sizes, offsets, count)
    pieces: dict[tuple[torch.dtype, int], list[tuple[int, int, int, int]]] = {}
    for index, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        cut = min(max(boundary - offset, 0), size)
        for start, end in ((0, cut), (cut, size)):
            if start < end:
                places = (start, offset + start)
                alignment = _alignment(widest, dtypes[index].itemsize, residues[index], *places)
                piece = (index, *places, end - start)
                pieces.setdefault((dtypes[index], alignment), []).append(piece)
    return tuple(
        Share(dtype, alignment, _uploaded(_rows(torch.tensor(alike), tile), device))
        for (dtype, alignment), alike in pieces.items()
    )


def _alignment(widest: int, itemsize: int, residue: int, *places: int) -> int:
    """Elements, `widest` at most, that the places and an address are multiples of."""
    alignment = widest
    while residue % min(16, alignment * itemsize) or any(p % alignment for p in places):
        alignment //= 2
    return alignment


def _rows(pieces: Tensor, tile: int) -> Tensor:
    """Cut pieces, given as rows, into tiles."""
    tiles = (pieces[:, 3] + tile - 1) // tile
    rows = pieces.repeat_interleave(tiles, dim=0)
    before = (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
    first = (torch.arange(len(rows)) - before) * tile
    rows[:, 1:3] += first[:, None]
    rows[:, 3] = (rows[:, 3] - first).clamp(max=tile)
    return rows


class _Addresses:
    """Addresses of gradients, on the device."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._device = device
        self._latest: list[int] = []
        self._table = torch.empty(0)
        self._spares: list[Tensor] = []
        self._captured: dict[tuple[int, ...], Tensor] = {}

    def on_device(self, addresses: list[int], gradients: Sequence[Tensor]) -> Tensor:
        """Return them as an int64 tensor; `gradients` are those that lie there."""
        if _capturing(self._device):
            host = self._host_of_capture(addresses)
            return torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
        if len(self._spares) < SPARES:
            block = torch.empty(SPARES, self._count, dtype=torch.int64)
            self._spares = list(_pinned(block, self._device))
        if addresses != self._latest:
            # Looked at only here: autograd lays gradients out as their weights.
            for gradient in gradients:
                check_dense(gradient)
            self._table = _uploaded(torch.tensor(addresses), self._device)
            self._latest = addresses
        return self._table

    def _host_of_capture(self, addresses: list[int]) -> Tensor:
        """A pinned buffer of these addresses, now and forever."""
        key = tuple(addresses)
        if key not in self._captured:
            if not self._spares:
                raise RuntimeError(
                    "adamw_step and gradient_norm must run once before each capture, outside of "
                    f"it, and capture at most {SPARES} sets of gradients"
                )
            self._captured[key] = self._spares.pop().copy_(torch.tensor(addresses))
        return self._captured[key]


_addresses = cache(_Addresses)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _uploaded(table: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(table, device=device).copy_(_pinned(table, device), non_blocking=True)


def _pinned(table: Tensor, device: torch.device) -> Tensor:
    return table.pin_memory() if device.type == "cuda" else table
