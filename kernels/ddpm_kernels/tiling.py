"""How elementwise kernels divide a batch of images among programs, and where its elements lie.

`q_sample`, `denoising_loss` and `reverse_step` share these. A program takes one tile of one sample.
Elements are counted within the sample in channels-last order, the order of the counter map,
whatever the strides of the tensor that holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_kernels.triton_shim import tl, triton

INDEX_LIMIT = 2**31
"""Samples that extend to this many elements are indexed with 64 bits."""


# --- On the host


def as_scalar(value: int | Tensor, device: torch.device) -> Tensor:
    """Return a 0-dim int64 tensor on `device`, without a copy from the host.

    A Python integer becomes a fill: `torch.as_tensor` would upload it, which waits for the device
    and is illegal during graph capture.

    Args:
        value: in [-2⁶³, 2⁶⁴), of which the tensor has the 64 bits; or a 0-dim tensor of it.
        device: of the result.
    """
    if isinstance(value, Tensor):
        return value.to(device, torch.int64)
    if value >= 2**63:
        value -= 2**64  # the same bits
    return torch.full((), value, dtype=torch.int64, device=device)


def check_per_sample(batch: int, **values: Tensor | None) -> None:
    """Check that there is one value per sample; a kernel would read past the end of fewer.

    Raises:
        ValueError: a value is given whose shape is not `(batch,)`.
    """
    for name, value in values.items():
        if value is not None and value.shape != (batch,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({batch},)")


def packed(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor of any shape; booleans as uint8, as kernels read them."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """Return the strides of the last four dimensions of `[..., B, C, H, W]`; zeros for None."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()[-4:]


def layout_of(tensor: Tensor | None, channels: int) -> str:
    """Name the layout of the first `channels` channels of each sample, for `offsets_of`.

    Args:
        tensor: `[..., C, H, W]` with C ≥ `channels`, or None, which is "dense".
        channels: that a kernel counts as elements.

    Returns:
        "dense": elements follow each other in memory; "pixels": the distance from one pixel to the
        next is constant, as in NCHW or in the first half of 2C channels; "strided": anything else.
    """
    if tensor is None:
        return "dense"
    c_stride, h_stride, w_stride = tensor.stride()[-3:]
    height, width = tensor.shape[-2:]
    if height > 1 and h_stride != width * w_stride:
        return "strided"
    pixels_touch = w_stride == channels or height * width == 1
    return "dense" if pixels_touch and (c_stride == 1 or channels == 1) else "pixels"


def is_wide(tile: int, *tensors: Tensor | None) -> bool:
    """Whether offsets within a sample, rounded up to whole tiles, need 64 bits.

    Args:
        tile: elements per program.
        tensors: `[..., C, H, W]`; None is skipped.
    """
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            shape, strides = tensor.shape[-3:], tensor.stride()[-3:]
            span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            if max(shape.numel(), span) >= INDEX_LIMIT - tile:
                return True
    return False


# --- In kernels


@triton.jit
def tile_of(  # type: ignore[no-untyped-def]
    COUNT: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr
):
    """Find a program's part of a batch of samples of COUNT elements.

    COUNT is a constant so that no division finds the sample, and nothing is masked where whole
    tiles cover it.

    Returns:
        The sample (int64), the tile's element indices in it, those of its counter blocks, and
        which elements exist.
    """
    TILES: tl.constexpr = (COUNT + TILE - 1) // TILE
    program = tl.program_id(0).to(tl.uint32)
    sample = program // TILES
    tile = (program - sample * TILES).to(tl.int32)
    if WIDE:
        tile = tile.to(tl.int64)
    elements = tile * TILE + tl.arange(0, TILE)
    blocks = (tile * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.uint32)
    if COUNT % TILE == 0:  # noqa: SIM108 (Triton takes a branch on a constant, no selection)
        inside = tl.full((TILE,), True, tl.int1)
    else:
        inside = elements < COUNT
    return sample.to(tl.int64), elements, blocks, inside


@triton.jit
def divide(index, DIVISOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """index // DIVISOR for an index that is not negative: unsigned division is cheaper."""
    if index.dtype == tl.int32:
        quotient = (index.to(tl.uint32) // DIVISOR).to(tl.int32)
    else:
        quotient = index // DIVISOR
    return quotient


@triton.jit
def offsets_of(  # type: ignore[no-untyped-def]
    elements,
    stride_c,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Offsets within a sample of elements in channels-last order; LAYOUT as in `layout_of`."""
    if LAYOUT == "dense":
        offsets = elements
    else:
        pixel = divide(elements, CHANNELS)
        channel = elements - pixel * CHANNELS
        if LAYOUT == "pixels":
            offsets = pixel * stride_w + channel * stride_c
        else:
            row = divide(pixel, WIDTH)
            offsets = row * stride_h + (pixel - row * WIDTH) * stride_w + channel * stride_c
    return offsets


@triton.jit
def mirrored(elements, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of the same rows and channels in column WIDTH − 1 − w for column w."""
    column = divide(elements, CHANNELS)
    column -= divide(column, WIDTH) * WIDTH
    return elements + (WIDTH - 1 - 2 * column) * CHANNELS


@triton.jit
def load_elements(  # type: ignore[no-untyped-def]
    sample,
    elements,
    inside,
    stride_c,
    stride_h,
    stride_w,
    mirror,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    MAY_MIRROR: tl.constexpr,
):
    """Load elements of one sample in float32; zero where not `inside`.

    Args:
        sample: pointer to the sample's first element.
        elements: indices in channels-last order, int32 or int64.
        inside: mask.
        stride_c: in elements, as are `stride_h` and `stride_w`. Unused for a dense sample.
        stride_h: of rows.
        stride_w: of columns.
        mirror: scalar; whether to take column WIDTH − 1 − w for column w.
        CHANNELS: constant, like WIDTH, because it is divided by.
        WIDTH: of the image.
        LAYOUT: see `layout_of`.
        MAY_MIRROR: whether `mirror` can be true.
    """
    if MAY_MIRROR:
        # A branch rather than a selection: images that are not mirrored keep their vector loads.
        if mirror:
            source = offsets_of(
                mirrored(elements, CHANNELS, WIDTH), stride_c, stride_h, stride_w,
                CHANNELS, WIDTH, LAYOUT,
            )  # fmt: skip
            values = tl.load(sample + source, mask=inside, other=0).to(tl.float32)
        else:
            source = offsets_of(elements, stride_c, stride_h, stride_w, CHANNELS, WIDTH, LAYOUT)
            values = tl.load(sample + source, mask=inside, other=0).to(tl.float32)
    else:
        source = offsets_of(elements, stride_c, stride_h, stride_w, CHANNELS, WIDTH, LAYOUT)
        values = tl.load(sample + source, mask=inside, other=0).to(tl.float32)
    return values
