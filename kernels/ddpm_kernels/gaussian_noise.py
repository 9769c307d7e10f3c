"""Standard normal noise for a batch of images, in one launch.

The values are those that every other kernel generates for itself; see `philox`. Samplers begin with
it, and inpainting adds it to what is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels import cpu_noise
from ddpm_kernels.dispatch import on_device_of, runs_triton, takes_op
from ddpm_kernels.philox import Stream, interleave4, normals4, random_normals
from ddpm_kernels.tiles import tile_for
from ddpm_kernels.tiling import as_scalar, is_wide, packed, tile_of
from ddpm_kernels.triton_shim import tl, triton


def gaussian_noise(
    seed: int | Tensor,
    sample_ids: Tensor,
    shape: tuple[int, int, int],
    step: int | Tensor,
    stream: Stream,
) -> Tensor:
    """Generate standard normal noise for a batch of images.

    Args:
        seed: any 64-bit integer, signed or not, or a 0-dim int64 tensor of its bits.
        sample_ids: int64 `[B]` in [0, 2⁵⁶).
        shape: `(channels, height, width)` of one sample.
        step: the sampler's step, an integer or a 0-dim int64 tensor; or 0 in training, where the id
            is the sample's position.
        stream: what the noise is for.

    Returns:
        float32 `[B, C, H, W]` in channels-last memory format. Each value depends only on the seed,
        stream, step, its sample's id and its place (channel, row, column, and C and W).
    """
    device = sample_ids.device
    call: Callable[..., Tensor] = gaussian_noise_reference
    if takes_op(sample_ids):
        call = torch.ops.ddpm.gaussian_noise.default
    return call(as_scalar(seed, device), sample_ids, *shape, as_scalar(step, device), int(stream))


# --- Reference


def gaussian_noise_reference(
    seed: Tensor,
    sample_ids: Tensor,
    channels: int,
    height: int,
    width: int,
    step: Tensor,
    stream: int,
) -> Tensor:
    """Compute what `gaussian_noise` specifies with torch's operations."""
    # Inductor fuses the plain form, and needs no blocks.
    in_blocks = sample_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    normals = cpu_noise.random_normals_in_blocks if in_blocks else random_normals
    noise = normals(seed, sample_ids, channels * height * width, step, Stream(stream))
    return noise.view(len(sample_ids), height, width, channels).permute(0, 3, 1, 2)


# --- Triton


@triton.jit
def _gaussian_noise_kernel(  # type: ignore[no-untyped-def]
    out,
    seed,
    sample_ids,
    step,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
):
    sample, elements, blocks, inside = tile_of(COUNT, TILE, WIDE)
    sample_id = tl.load(sample_ids + sample)
    a, b, c, d = normals4(tl.load(seed), blocks, tl.load(step), sample_id, STREAM)
    tl.store(out + sample * COUNT + elements, interleave4(a, b, c, d), mask=inside)


# --- Launcher


def _empty(sample_ids: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (len(sample_ids), channels, height, width), device=sample_ids.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


def _launch(
    seed: Tensor,
    sample_ids: Tensor,
    channels: int,
    height: int,
    width: int,
    step: Tensor,
    stream: int,
) -> Tensor:
    out = _empty(sample_ids, channels, height, width)
    count = channels * height * width
    if out.numel() == 0:
        return out
    # As q_sample, which does this and more.
    tile = tile_for("q_sample", out).fitted(count)
    with on_device_of(out):
        _gaussian_noise_kernel[(len(out) * triton.cdiv(count, tile.elements),)](
            out,
            seed,
            packed(sample_ids),
            step,
            COUNT=count,
            WIDE=is_wide(tile.elements, out),
            STREAM=stream,
            TILE=tile.elements,
            **tile.options(),
        )
    return out


# --- Registration


def _gaussian_noise(seed: Tensor, sample_ids: Tensor, *rest: Any) -> Tensor:
    run = _launch if runs_triton(sample_ids) else gaussian_noise_reference
    return run(seed, sample_ids, *rest)


_op = torch.library.custom_op(
    "ddpm::gaussian_noise",
    _gaussian_noise,
    mutates_args=(),
    schema=torch.library.infer_schema(gaussian_noise_reference, mutates_args=()),
)


@_op.register_fake
def _(seed: Tensor, sample_ids: Tensor, channels: int, height: int, width: int, *_: Any) -> Tensor:
    return _empty(sample_ids, channels, height, width)
