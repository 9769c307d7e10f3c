"""GroupNorm with scale, shift and SiLU: against float64, forward and backward, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.comparing import assert_equal, assert_no_worse, assert_within, largest
from tests.kernels.conftest import Backend, Guarded
from tests.kernels.inputs import (
    FLOATS,
    LAYOUTS,
    Arguments,
    copied,
    in_float64,
    lay_out,
    of_group_norm_silu,
)
from tests.kernels.norm_definition import definition
from torch import Tensor

from ddpm_kernels import group_norm_silu
from ddpm_kernels.group_norm_silu.op import NEAR
from ddpm_kernels.group_norm_silu.plan import MAX_SLABS, plan
from ddpm_kernels.group_norm_silu.reference import group_norm_silu_reference
from ddpm_kernels.tiles import TILES

DIFFERENTIABLE = ("x", "weight", "bias", "scale", "shift")
TILE = TILES["default"]["group_norm_silu"].elements
# Several slabs; groups of six, the last slab cut short; groups of ten; several chunks, the last one
# smaller; a group wider than every tile of the table; one pixel.
SHAPES = (
    ((2, 64, 8, 16), 8),
    ((1, 12, 23, 23), 2),
    ((1, 80, 5, 7), 8),
    ((1, 144, 3, 3), 24),
    ((1, 515, 2, 2), 1),
    ((1, 1, 1, 1), 1),
    ((3, 5, 1, 1), 5),
    ((1, 1, 31, 37), 1),
)


def reference(**arguments: Any) -> Tensor:
    """torch's own arithmetic in the precision of the arguments."""
    return group_norm_silu_reference(*arguments.values())[0]


def gradients(function: Callable[..., Tensor], arguments: Arguments) -> dict[str, Tensor]:
    """The output as "y", and its gradients against a fixed cotangent."""
    names = [name for name in DIFFERENTIABLE if arguments[name] is not None]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    y = function(**{**arguments, **leaves})
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    cotangent = cotangent.bfloat16().to(y)  # the same in every precision
    found = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


def check(
    arguments: Arguments, inside: Arguments, own: Callable[..., Tensor] = reference
) -> Tensor:
    """Hold y and all gradients to twice the error of torch, and two ulp; returns y.

    Terms of order one may cancel, in a sum over a batch and in the gradient of a group of two: the
    unit is that of a typical sum.
    """
    exact = gradients(definition, in_float64(arguments))
    torchs = gradients(own, arguments)
    got = gradients(group_norm_silu, inside)
    for name, result in got.items():
        assert result.dtype == arguments["x" if name == "y" else name].dtype, name
        terms = exact["y"].numel() // exact[name].numel()
        floor = 2 * torch.finfo(result.dtype).eps * max(terms**0.5, largest(exact[name]))
        assert_no_worse(result, torchs[name], exact[name], floor, name)
    return got["y"]


def close(got: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 8) -> None:
    """Within some roundings of `dtype`, relative to the largest value."""
    assert_within(got, exact, factor * torch.finfo(dtype).eps * max(1.0, largest(exact)))


@pytest.mark.usefixtures("small_tiles")
@given(
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3, 5]),
    per_group=st.integers(1, 5),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    dtype=st.sampled_from(FLOATS),
    affine_dtype=st.sampled_from([None, torch.float32]),
    layout=st.sampled_from([*LAYOUTS, "expanded"]),
    film=st.booleans(),
    activation=st.sampled_from(["silu", "none"]),
)
def test_definition(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], batch: int, groups: int,
    per_group: int, height: int, width: int, layout: str, dtype: torch.dtype, **options: Any,
) -> None:  # fmt: skip
    given_ = of_group_norm_silu(
        (batch, groups * per_group, height, width), groups, dtype, **options
    )
    inside = {k: guarded(v) if isinstance(v, Tensor) else v for k, v in given_.items()}
    if layout == "expanded":
        given_["x"] = given_["x"][:1].expand(batch, -1, -1, -1)
        inside["x"] = guarded(lay_out(given_["x"][:1], "nhwc")).expand(batch, -1, -1, -1)
    else:
        inside["x"] = guarded(lay_out(given_["x"], layout))
    y = check(given_, inside)
    assert poisoned or not backend.runs_kernels
    if layout == "nhwc":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_tiles_of_the_table(
    backend: Backend, guarded: Guarded, shape: tuple[int, ...], groups: int
) -> None:
    at = SHAPES.index((shape, groups))
    for i, layout in enumerate(("nhwc", "nchw")):
        given_ = of_group_norm_silu(shape, groups, FLOATS[(at + i) % 3], film=(at + i) % 2 == 0)
        inside = {k: guarded(v) if isinstance(v, Tensor) else v for k, v in given_.items()}
        check(given_, {**inside, "x": guarded(lay_out(given_["x"], layout))})


def test_definition_of_this_file_is_that_of_torch() -> None:
    """So that the oracle has an oracle."""
    given_ = of_group_norm_silu(dtype=torch.float64, film=False)
    y = F.silu(F.group_norm(given_["x"], 3, given_["weight"], given_["bias"], 1e-2))
    np.testing.assert_allclose(definition(**given_), y, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_every_precision_in_absolute_terms(backend: Backend, dtype: torch.dtype) -> None:
    """Whatever torch's own error is."""
    for film, layout in ((True, "nhwc"), (False, "nchw")):
        given_ = of_group_norm_silu((3, 6, 5, 4), 3, dtype, film=film)
        exact = gradients(definition, in_float64(given_))
        given_["x"] = lay_out(given_["x"], layout)
        for name, result in gradients(group_norm_silu, backend.moved(given_)).items():
            close(result, exact[name], dtype, factor=32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_spoils_only_itself(backend: Backend, bad: float) -> None:
    given_ = of_group_norm_silu((3, 6, 4, 5), 3)
    found = gradients(group_norm_silu, backend.moved(given_))
    given_["x"][1, 2, 3, 4] = bad
    spoilt = gradients(group_norm_silu, backend.moved(given_))
    for name in ("y", "x", "scale", "shift"):
        torch.testing.assert_close(spoilt[name][::2], found[name][::2], rtol=1e-5, atol=1e-6)
    assert not spoilt["y"][1, 2:4].isfinite().any()  # the group
    torch.testing.assert_close(spoilt["y"][1, :2], found["y"][1, :2], rtol=1e-5, atol=1e-6)


# --- Hard inputs: a mean far from zero


def in_torch(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *_: None, **rest: Any) -> Tensor:
    """Torch's own group norm, NCHW, where it is careful; no scale and shift."""
    y = F.group_norm(x.contiguous(), groups, weight, bias, rest["eps"])
    return F.silu(y) if rest["activation"] == "silu" else y


@pytest.mark.parametrize("offset", [-3.8, 30.0, -1000.0])
def test_mean_a_thousand_deviations_from_zero(backend: Backend, offset: float) -> None:
    """With a trend or without, so that slabs and channels have different means."""
    cases = zip(
        ((2, 8, 16, 16), (1, 8, 19, 23), (1, 4, 96, 96)), ("nchw", "nhwc", "nchw"),
        ("silu", "none", "none"), strict=True,
    )  # fmt: skip
    for i, (shape, layout, activation) in enumerate(cases):
        if backend.name == "interpreter" and shape[2] > 90:
            continue
        given_ = of_group_norm_silu(shape, 4, film=False, eps=1e-5, activation=activation)
        x = (given_["x"] - 0.5) / 2
        if i % 2:
            x = x + torch.linspace(-5, 5, shape[2])[:, None] + torch.arange(shape[1])[:, None, None]
        given_["x"] = x + offset
        y = check(given_, backend.moved({**given_, "x": lay_out(given_["x"], layout)}), in_torch)
        # torch's error grows with the mean, this one does not
        close(y, definition(**in_float64(given_)), torch.float32, factor=16)


def test_a_mean_near_zero_takes_torchs_own_norm_on_a_cpu() -> None:
    """Which is several times as fast; farther away than `NEAR` its error would show."""
    for offset, same in ((0.9 * NEAR, True), (1.2 * NEAR, False)):
        given_ = of_group_norm_silu((2, 8, 16, 16), 4, film=False, eps=1e-5)
        x = given_["x"].reshape(2, 4, -1)
        x = (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True)
        given_["x"] = x.reshape(2, 8, 16, 16) + offset
        by_torch = in_torch(**given_)
        assert torch.equal(group_norm_silu(**given_), by_torch) == same


@pytest.mark.parametrize("value", [0.0, 1000.1])
def test_constant_input(backend: Backend, value: float) -> None:
    """Normalised it is zero: what is left is the bias."""
    for shape, layout in (((2, 8, 16, 16), "nchw"), ((1, 4, 19, 23), "nhwc")):
        given_ = of_group_norm_silu(shape, 4, film=False, eps=1e-5, activation="none")
        given_["x"] = lay_out(torch.full(shape, value), layout)
        found = gradients(group_norm_silu, backend.moved(given_))
        expected = given_["bias"].reshape(1, -1, 1, 1).expand(shape)
        assert_within(found["y"], expected.double(), 1e-6)
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_half_data_far_from_zero(backend: Backend) -> None:
    """Spread over few representable values, still normalised to unit variance."""
    given_ = of_group_norm_silu((1, 8, 16, 16), 2, torch.float16, film=False, eps=1e-5)
    given_["x"] = given_["x"] / 2 + 1000
    check(given_, backend.moved(given_))
    beyond = {**given_, "x": given_["x"] * 60, "activation": "none"}  # squares pass half's range
    check(beyond, backend.moved(beyond))


def test_op_returns_the_statistics_of_each_group(backend: Backend) -> None:
    given_ = of_group_norm_silu((2, 20, 5, 7), 4)
    given_["x"] += 1000
    _, statistics = torch.ops.ddpm.group_norm_silu(*backend.moved(given_).values())
    mean, rest, rstd = statistics.cpu().double().unbind(1)
    grouped = given_["x"].double().reshape(2, 4, -1)
    torch.testing.assert_close(mean + rest, grouped.mean(2), rtol=0, atol=1e-6)
    deviation = (grouped.var(2, unbiased=False) + 1e-2).sqrt()
    torch.testing.assert_close(rstd, 1 / deviation, rtol=1e-5, atol=0)


# --- Arguments


def test_strides_of_the_arguments(backend: Backend) -> None:
    plain = of_group_norm_silu()
    expected = gradients(
        group_norm_silu, backend.moved({**plain, "x": lay_out(plain["x"], "nhwc")})
    )
    spread = torch.full((12,), float("nan"))
    spread[::2] = plain["weight"]
    for changes in (
        {"scale": plain["scale"].T.contiguous().T, "shift": plain["shift"].T.contiguous().T},
        {"scale": plain["scale"].T.contiguous().T, "shift": plain["shift"].contiguous()},
        {"weight": spread[::2]},
    ):
        given_ = backend.moved({**plain, "x": lay_out(plain["x"], "nhwc"), **changes})
        for name, result in gradients(group_norm_silu, given_).items():
            torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6)
    one = {**plain, "scale": plain["scale"][:1].expand(3, -1), "weight": torch.ones(1).expand(6)}
    check(copied(one), backend.moved(one))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_cotangent_of_a_sum_has_no_strides(backend: Backend, layout: str) -> None:
    plain = of_group_norm_silu()
    given_ = backend.moved({**plain, "x": lay_out(plain["x"], layout)})
    x, exact_x = given_["x"].requires_grad_(), plain["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(group_norm_silu(**given_).sum(), x)
    (expected,) = torch.autograd.grad(definition(**plain).sum(), exact_x)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-4, atol=1e-5)


class _StopGradient(torch.autograd.Function):
    """The identity, which passes no gradient on: not zeros, none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


def test_no_gradient_of_the_output(backend: Backend) -> None:
    given_ = backend.moved(of_group_norm_silu())
    y = _StopGradient.apply(group_norm_silu(**{**given_, "x": given_["x"].requires_grad_()}))
    assert torch.autograd.grad(y.sum(), given_["x"], allow_unused=True) == (None,)


def test_gradients_of_the_parameters_alone(backend: Backend) -> None:
    """Where x needs none; the others are the same to the bit."""
    for film, layout in ((True, "nhwc"), (False, "nchw")):
        plain = of_group_norm_silu(film=film)
        given_ = backend.moved({**plain, "x": lay_out(plain["x"], layout)})
        expected = gradients(group_norm_silu, given_)
        names = [n for n in DIFFERENTIABLE if n != "x" and given_[n] is not None]
        leaves = {name: given_[name].detach().requires_grad_() for name in names}
        y = group_norm_silu(**{**given_, **leaves})
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        found = torch.autograd.grad(y, list(leaves.values()), cotangent.bfloat16().to(y))
        for name, gradient in zip(names, found, strict=True):
            assert_equal(gradient, expected[name], name)


def test_an_empty_batch(backend: Backend) -> None:
    given_ = backend.moved(of_group_norm_silu((0, 6, 5, 4)))
    assert group_norm_silu(**given_).shape == (0, 6, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, r"activation is 'relu'; it must be 'silu' or 'none'"),
        ({"groups": 4}, r"6 channels cannot be normalised in 4 groups"),
        ({"shift": None}, r"scale and shift must be given together"),
    ],
)
def test_errors(change: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**of_group_norm_silu(), **change})


# --- The division of work


@settings(max_examples=100)
@given(
    batch=st.integers(1, 2000),
    groups=st.integers(1, 64),
    per_group=st.integers(1, 700),
    pixels=st.integers(1, 2**22),
    tile=st.sampled_from([64, 2048, 4096]),
)
def test_plan_covers_everything_once(
    batch: int, groups: int, per_group: int, pixels: int, tile: int
) -> None:
    division = plan(batch, groups * per_group, pixels, groups, tile)
    for size in (division.rows, division.width, division.padded_groups):
        assert size & (size - 1) == 0
    chunk_groups, chunks = division.chunk_groups, division.chunks
    assert chunk_groups * per_group <= division.width
    assert chunk_groups <= division.padded_groups
    assert (chunks - 1) * chunk_groups < groups <= chunks * chunk_groups
    assert (division.slabs - 1) * division.slab_pixels < pixels
    assert pixels <= division.slabs * division.slab_pixels
    assert division.slab_pixels % division.rows == 0
    assert 1 <= division.slabs <= MAX_SLABS
    assert division.rows == 1 or division.rows * division.width <= tile


def test_a_small_map_takes_one_launch_where_there_are_many() -> None:
    """A sample that is read twice costs less than it takes to launch a second kernel."""
    assert plan(128, 256, 8 * 8, 32, TILE).slabs == 1
    assert plan(4, 256, 8 * 8, 32, TILE).slabs > 1
    assert plan(128, 128, 32 * 32, 32, TILE).slabs > 1


def test_chunks_are_of_one_size_as_far_as_that_aligns() -> None:
    division = plan(128, 384, 1024, 32, TILE)
    assert (division.chunk_groups, division.chunks) == (8, 4)


def test_chunks_of_usual_widths_begin_at_16_bytes_and_are_full() -> None:
    for groups in (8, 16, 32):
        for channels in (64, 96, 128, 192, 224, 256, 320, 384, 448, 512, 640, 960):
            division = plan(8, channels, 1024, groups, TILE)
            assert division.chunks == 1 or division.chunk_groups * (channels // groups) % 8 == 0
            assert channels >= 0.7 * division.chunks * division.width
