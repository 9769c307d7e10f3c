"""The sum that ends a residual branch, held to float64, and its moments to what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.comparing import EPS32, assert_equal, assert_within, rounding
from tests.kernels.conftest import ON_KERNELS, ON_OPERATIONS, Backend, Guarded
from tests.kernels.inputs import LAYOUTS, Arguments, lay_out, of_residual_sum
from torch import Tensor

from ddpm_kernels import residual_sum
from ddpm_kernels.group_norm_silu.plan import fits_on_chip
from ddpm_kernels.residual_sum.op import residual_sum_reference, slab_pixels

CASES = [
    ((3, 6, 5, 4), torch.float32), ((2, 6, 5, 4), torch.bfloat16), ((2, 6, 5, 4), torch.float16),
    ((2, 24, 5, 5), torch.float32), ((1, 1, 1, 1), torch.float32), ((1, 35, 3, 5), torch.bfloat16),
]  # fmt: skip


def summed(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """By the registered operation: y, and moments of slabs of a given size."""
    y, values = torch.ops.ddpm.residual_sum(*arguments.values())
    return y, values


def exactly(arguments: Arguments) -> Tensor:
    """y in float64."""
    h, x, bias, divisor, _ = (
        v.double() if isinstance(v, Tensor) else v for v in arguments.values()
    )
    return residual_sum_reference(h, x, bias, float(divisor), 0)[0]


def check_moments(values: Tensor, y: Tensor, slab: int) -> None:
    """Hold moments to float64 ones of y itself, relative to its deviation and not to its mean."""
    exact = residual_sum_reference(y.double().cpu(), None, None, 1.0, slab)[1]
    assert values.shape == exact.shape
    assert values.dtype == torch.float32
    pixels = y.shape[2] * y.shape[3]
    for index in range(values.shape[1]):
        count = min(slab, pixels - index * slab)
        mean, rest, squares = values[:, index].cpu().double().unbind(1)
        right, right_rest, right_squares = exact[:, index].unbind(1)
        deviation = (right_squares / count).sqrt()
        # What is left of the sums of deviations from one of the slab's first pixels.
        assert_within(mean + rest, right + right_rest, 32 * EPS32 * (deviation + 1e-30), "mean")
        assert_within(squares, right_squares, 256 * EPS32 * (right_squares + 1e-30), "squares")


@ON_OPERATIONS
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_sum_and_moments(
    backend: Backend, guarded: Guarded, small_tiles: None, poisoned: list[Tensor],
    shape: tuple[int, ...], dtype: torch.dtype,
) -> None:  # fmt: skip
    for number, optional in enumerate((True, False)):
        plain = of_residual_sum(shape, dtype, slab_pixels=8, optional=optional)
        exact = exactly(plain)
        layout = LAYOUTS[number]
        given = {
            k: guarded(lay_out(v, layout) if v.ndim == 4 else v) if isinstance(v, Tensor) else v
            for k, v in plain.items()
        }
        y, values = summed(given)
        assert y.dtype == dtype
        assert y.is_contiguous(
            memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format
        )
        assert_within(y, exact, rounding(y, exact) + 4 * EPS32 * exact.abs().max())
        check_moments(values, y, 8)


@ON_OPERATIONS
@pytest.mark.parametrize("pixels", [1, 7, 8, 9, 16, 33])
def test_slabs_of_any_number_of_pixels(
    backend: Backend, small_tiles: None, poisoned: list[Tensor], pixels: int
) -> None:
    plain = of_residual_sum((2, 12, pixels, 1), slab_pixels=16)
    y, values = summed(backend.moved(plain))
    check_moments(values, y, 16)
    y_alone, none = summed({**backend.moved(plain), "slab_pixels": 0})
    assert_equal(y_alone, y)
    assert none.numel() == 0


@ON_OPERATIONS
def test_means_far_from_zero(backend: Backend, small_tiles: None) -> None:
    """A thousand deviations, rising from slab to slab."""
    x = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    x = lay_out(x + 1000 + torch.arange(8.0)[:, None], "nhwc").to(backend.device)
    y, values = summed(
        {"h": x, "x": torch.zeros_like(x), "bias": None, "divisor": 1.0, "slab_pixels": 8}
    )
    check_moments(values, y, 8)


@ON_OPERATIONS
def test_a_sample_that_is_not_finite_spoils_itself_alone(
    backend: Backend, small_tiles: None
) -> None:
    given = backend.moved(of_residual_sum((3, 12, 5, 5)))
    right = summed(given)
    given["h"][1, 3, 2, 2] = float("inf")
    for got, expected in zip(summed(given), right, strict=True):
        assert_equal(got[0], expected[0])
        assert_equal(got[2], expected[2])
        assert not got[1].isfinite().all()


@pytest.mark.parametrize("divisor", [1.0, 2**0.5])
@pytest.mark.parametrize("absent", [(), ("x",), ("bias",), ("x", "bias")])
def test_gradients(backend: Backend, divisor: float, absent: tuple[str, ...]) -> None:
    given: dict[str, Any] = backend.moved(of_residual_sum())
    given |= {"divisor": divisor} | dict.fromkeys(absent)
    del given["slab_pixels"]
    for name in ("h", "x", "bias"):
        given[name] = None if given[name] is None else given[name].requires_grad_()
    y, _ = residual_sum(**given)
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    y.backward(cotangent)
    for name in ("h", "x"):
        if given[name] is not None:
            assert_equal(given[name].grad, cotangent if divisor == 1 else cotangent / divisor)
    assert given["bias"] is None or given["bias"].grad is None


def test_moments_where_the_norm_would_read_the_map_for_them(backend: Backend) -> None:
    small, large = (torch.ones(1, 4, 32, width, device=backend.device) for width in (32, 33))
    assert fits_on_chip(32 * 32)
    assert not fits_on_chip(32 * 33)
    assert residual_sum(small, small)[1] is None
    assert residual_sum(large, large, moments=False)[1] is None
    _, moments = residual_sum(large, large)
    assert (moments is None) == (backend.name == "reference")
    if moments is not None:
        slab = slab_pixels(1, 4, 32 * 33)
        assert moments.slab_pixels == slab
        assert moments.values.shape == (1, -(-32 * 33 // slab), 3, 4)
        assert_equal(moments.values[:, :, 0] + moments.values[:, :, 1], 2 * torch.ones(1, 4, 4))


def test_a_sum_of_one_is_itself(backend: Backend) -> None:
    h = torch.ones(1, 4, 8, 8, device=backend.device)
    y, moments = residual_sum(h)
    assert y is h
    assert moments is None


@pytest.mark.parametrize("batch", [1, 16, 64, 128])
@pytest.mark.parametrize("channels", [1, 128, 512])
@pytest.mark.parametrize("pixels", [1089, 4096, 65536])
def test_slabs_are_even_and_not_too_many(batch: int, channels: int, pixels: int) -> None:
    slab = slab_pixels(batch, channels, pixels)
    slabs = -(-pixels // slab)
    assert slab % 64 == 0
    assert 1 <= slabs <= 64
    assert pixels - (slabs - 1) * slab > 0


@ON_KERNELS
def test_tokens_as_a_map(backend: Backend, small_tiles: None) -> None:
    """Attention's `[N, pixels, C]` is a channels-last map, and is read as it is."""
    tokens = torch.randn(2, 20, 12, device=backend.device)
    h = tokens.transpose(1, 2).unflatten(2, (4, 5))
    x = torch.randn(2, 12, 4, 5, device=backend.device)
    y, _ = residual_sum(h, x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_equal(y, x + h)


def test_reference_of_other_branches(backend: Backend) -> None:
    """Callable without a bias, or without another branch."""
    h = torch.randn(2, 12, 4, 5, device=backend.device)
    bias = torch.randn(12, device=backend.device)
    calls: list[Callable[[], tuple[Tensor, Any]]] = [
        lambda: residual_sum(h, None, bias), lambda: residual_sum(h, None, None, 2.0)
    ]  # fmt: skip
    for call, right in zip(calls, (h + bias[:, None, None], h / 2), strict=True):
        assert_equal(call()[0], right)
