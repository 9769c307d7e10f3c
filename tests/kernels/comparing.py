"""The rules that results are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_kernels.philox import Stream, random_normals
from ddpm_kernels.tiling import as_scalar

EPS32 = torch.finfo(torch.float32).eps


def largest(values: Tensor) -> float:
    """The largest magnitude; zero of nothing."""
    return float(values.abs().max()) if values.numel() else 0.0


def rounding(got: Tensor, exact: Tensor, times: float = 1) -> Tensor:
    """The most that rounding to the precision of a result can change, times a factor."""
    precision = torch.finfo(got.dtype)
    # The interpreter truncates to bfloat16, which a GPU rounds.
    truncated = got.dtype == torch.bfloat16 and not got.is_cuda
    ulps = 1.0 if truncated else 0.5
    return times * ulps * precision.eps * exact.abs().clamp(min=precision.tiny)


def reference_noise(
    seed: int, ids: Tensor, shape: tuple[int, int, int], step: int, stream: Stream
) -> Tensor:
    """The counter map's noise, `[B, C, H, W]`, whichever way the operations take."""
    channels, height, width = shape
    place = as_scalar(seed, ids.device), ids, channels * height * width
    noise = random_normals(*place, as_scalar(step, ids.device), stream)
    return noise.view(len(ids), height, width, channels).permute(0, 3, 1, 2)


def assert_within(got: Tensor, exact: Tensor, allowed: Tensor | float, what: str = "") -> None:
    """Hold a result to a float64 one; a NaN fails."""
    assert got.shape == exact.shape, what
    error = (got.cpu().double() - exact).abs()
    excess = error - allowed
    assert bool((excess <= 0).all()), f"{what} exceeds what is allowed by {excess.max()}"


def assert_no_worse(
    got: Tensor, own: Tensor, exact: Tensor, floor: Tensor | float, what: str = ""
) -> None:
    """Hold a result to twice the error of torch in the same precision, its rounding and a floor."""
    allowed = 2 * largest(own.double() - exact) + rounding(got, exact) + floor
    assert_within(got, exact, allowed, what)


def assert_equal(got: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Hold a result to be the same to the bit."""
    assert (got is None) == (expected is None), what
    if got is not None and expected is not None:
        assert got.dtype == expected.dtype, what
        assert torch.equal(got.cpu(), expected.cpu()), what
