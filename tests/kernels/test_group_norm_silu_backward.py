"""The backward pass of GroupNorm and all that is fused with it, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.comparing import assert_equal, assert_no_worse, assert_within, largest
from tests.kernels.conftest import (
    INTERPRETED,
    ON_OPERATIONS,
    Backend,
    Guarded,
    _forget_plans,
)
from tests.kernels.inputs import FLOATS, LAYOUTS, Arguments, in_float64, lay_out
from torch import Tensor

from ddpm_kernels.group_norm_silu.reference import (
    group_norm_silu_backward_reference,
    group_norm_silu_reference,
)

GRADIENTS = "x", "weight", "bias", "scale", "shift", "skip", "before", "owed"
"""What the operation returns the gradients of, in its order."""
MAPS = "dy", "x", "skip", "residual", "skip_residual"
Options = dict[str, Any]
NOTHING: Options = {
    "film": False, "before": False, "dropout": 0.0, "residuals": (False, False), "owes": False
}  # fmt: skip
EVERYTHING: Options = {
    "film": True, "before": True, "dropout": 0.4, "residuals": (True, True), "owes": True
}  # fmt: skip


def of_backward(
    shape: tuple[int, ...] = (3, 6, 5, 4),
    skip: int = 0,
    groups: int = 3,
    dtype: torch.dtype = torch.float32,
    *,
    film: bool,
    before: bool,
    dropout: float,
    residuals: tuple[bool, bool],
    owes: bool,
    activation: str = "silu",
    needs_dx: bool = True,
    mean: float = 0.0,
    eps: float = 1e-2,
) -> Arguments:
    """What the operation takes, x being of a shape and skip of so many channels."""
    batch, own, height, width = shape
    channels = own + skip
    generator = torch.Generator().manual_seed(channels + 31 * width)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def map_of(count: int) -> Tensor:
        return draw(batch, count, height, width)

    scale, shift = draw(batch, 2 * channels).chunk(2, dim=1)
    key = torch.randint(-(2**62), 2**62, (batch,), generator=generator)
    arguments = {
        "dy": map_of(channels),
        "x": map_of(own) + mean,
        "groups": groups,
        "weight": draw(channels).float(),
        "bias": draw(channels).float(),
        "scale": scale if film else None,
        "shift": shift if film else None,
        "statistics": None,
        "activation": activation,
        "needs_dx": needs_dx,
        "skip": map_of(skip) + mean if skip else None,
        "before": draw(batch, channels) if before else None,
        "dropout_key": key if dropout else None,
        "dropout_probability": dropout,
        "residual": map_of(own) if residuals[0] else None,
        "skip_residual": map_of(skip) if residuals[1] and skip else None,
        "owes": owes,
    }
    statistics = exact_statistics(arguments, eps)
    mean_ = statistics[:, 0].float()
    rest = (statistics[:, 0] - mean_.double()).float()
    arguments["statistics"] = torch.stack([mean_, rest, statistics[:, 2].float()], dim=1)
    return arguments


def exact_statistics(arguments: Arguments, eps: float) -> Tensor:
    """Those of the forward pass in float64; the mean is one number."""
    names = (
        "x", "groups", "weight", "bias", "scale", "shift", "eps", "activation", "skip", "before"
    )  # fmt: skip
    values = in_float64({**arguments, "eps": eps})
    _, statistics = group_norm_silu_reference(*(values[name] for name in names))
    statistics[:, 0] += statistics[:, 1]
    statistics[:, 1] = 0
    return statistics


def laid_out(arguments: Arguments, layout: str) -> Arguments:
    """All maps in one layout."""
    return {
        name: lay_out(value, layout) if name in MAPS and value is not None else value
        for name, value in arguments.items()
    }


def expected(arguments: Arguments) -> dict[str, Tensor]:
    """The reference's gradients by name, in the precision of the arguments."""
    return dict(
        zip(GRADIENTS, group_norm_silu_backward_reference(*arguments.values()), strict=True)
    )


def found(arguments: Arguments) -> dict[str, Tensor]:
    """Those of the operation."""
    gradients = torch.ops.ddpm.group_norm_silu_backward(*arguments.values())
    return dict(zip(GRADIENTS, gradients, strict=True))


def check(arguments: Arguments, inside: Arguments, ulps: float = 2, own: bool = True) -> None:
    """Hold all gradients to twice torch's `own` error, and some ulp of a typical sum of terms.

    In half precision σ is good to a millionth, which gradients in float32 show.
    """
    exact = expected(in_float64(arguments))
    torchs = expected(arguments) if own else exact
    half = arguments["x"].dtype != torch.float32
    for name, gradient in found(inside).items():
        if not exact[name].numel():
            assert not gradient.numel(), name
            continue
        like = arguments.get(name)
        assert like is None or gradient.dtype == like.dtype, name
        terms = arguments["dy"].numel() // exact[name].numel()
        # Of the vector's, which is a sum of dx, the terms are as large as dx.
        term = max(1.0, largest(exact["x"])) if name == "before" else 1.0
        unit = max(term * terms**0.5, largest(exact[name]))
        eps = max(torch.finfo(gradient.dtype).eps, 1e-6 if half else 0)
        assert_no_worse(gradient, torchs[name], exact[name], ulps * eps * unit, name)


@pytest.fixture
def narrow_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks on chip that are as narrow as can be: little tensors take several."""
    planning = importlib.import_module("ddpm_kernels.group_norm_silu.plan")
    monkeypatch.setattr(planning, "NARROWEST", 8)
    monkeypatch.setattr(planning, "NEAR", 1)
    _forget_plans()
    yield
    _forget_plans()


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "film": st.booleans(),
    "before": st.booleans(),
    "dropout": st.sampled_from([0.0, 0.3]),
    "residuals": st.tuples(st.booleans(), st.booleans()),
    "owes": st.booleans(),
    "activation": st.sampled_from(["silu", "none"]),
}
SIZES: dict[str, st.SearchStrategy[Any]] = {
    "batch": st.integers(1, 2),
    "groups": st.sampled_from([1, 2, 3]),
    "per_group": st.integers(1, 5),
    "own": st.floats(0, 1),
    "height": st.integers(1, 3),
    "width": st.integers(1, 6),
}


def drawn(
    batch: int, groups: int, per_group: int, own: float, height: int, width: int, **options: Any
) -> Arguments:
    """Inputs of which x has the given part of the channels, and skip the others."""
    channels = groups * per_group
    first = max(1, round(own * channels))
    return of_backward((batch, first, height, width), channels - first, groups, **options)


@pytest.mark.skipif(INTERPRETED, reason="no kernel")
@given(**SIZES, **OPTIONS)
def test_reference_is_the_gradient_of_the_forward_pass(**drawn_: Any) -> None:
    """By autograd, in float64: of y, of what else is computed from x and skip, of owed biases."""
    given_ = in_float64(drawn(**drawn_))
    given_["statistics"] = exact_statistics(given_, 1e-2)
    names = [name for name in GRADIENTS[:-1] if given_[name] is not None]
    leaves = {name: given_[name].clone().requires_grad_() for name in names}
    first = given_["x"].shape[1]
    owed = torch.zeros(given_["dy"].shape[1], dtype=torch.float64, requires_grad=True)
    inputs = {**given_, **leaves, "eps": 1e-2}
    inputs["x"] = inputs["x"] + owed[:first, None, None]
    if inputs["skip"] is not None:
        inputs["skip"] = inputs["skip"] + owed[first:, None, None]
    order = (
        "x", "groups", "weight", "bias", "scale", "shift", "eps", "activation", "skip", "before",
        "dropout_key", "dropout_probability",
    )  # fmt: skip
    y, _ = group_norm_silu_reference(*(inputs[name] for name in order))
    loss = (y * given_["dy"]).sum()
    for name, residual in (("x", "residual"), ("skip", "skip_residual")):
        if given_[residual] is not None:
            loss = loss + (inputs[name] * given_[residual]).sum()
    by_autograd = torch.autograd.grad(loss, [*leaves.values(), owed])
    gradients = expected(given_)
    for name, gradient in zip([*names, "owed"], by_autograd, strict=True):
        if name != "owed" or given_["owes"]:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9)


def check_drawn(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], layout: str, **drawn_: Any
) -> None:
    given_ = drawn(**drawn_)
    placed = laid_out(given_, layout)
    check(given_, {k: guarded(v) if isinstance(v, Tensor) else v for k, v in placed.items()})
    assert poisoned or not backend.runs_kernels


@ON_OPERATIONS
@pytest.mark.usefixtures("small_tiles")
@given(**SIZES, **OPTIONS, dtype=st.sampled_from(FLOATS), layout=st.sampled_from(LAYOUTS))
def test_slabs(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], layout: str, **drawn_: Any
) -> None:
    check_drawn(backend, guarded, poisoned, layout, **drawn_)


@ON_OPERATIONS
@pytest.mark.usefixtures("narrow_chunks")
@given(**SIZES, **OPTIONS, dtype=st.sampled_from(FLOATS), layout=st.sampled_from(LAYOUTS))
def test_on_chip(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], layout: str, **drawn_: Any
) -> None:
    check_drawn(backend, guarded, poisoned, layout, **drawn_)


@ON_OPERATIONS
@pytest.mark.parametrize(
    ("shape", "skip", "groups"),
    [
        ((2, 24, 9, 16), 24, 3),  # a group of both maps
        ((2, 56, 5, 5), 40, 8),  # several chunks, one of both maps; no power of two
        ((1, 10, 33, 32), 6, 2),  # slabs
        ((2, 3, 1, 1), 2, 5),  # groups of one element
        ((1, 515, 2, 2), 0, 1),  # wider than every tile
    ],
)
def test_tiles_of_the_table(
    backend: Backend, guarded: Guarded, shape: tuple[int, ...], skip: int, groups: int
) -> None:
    for dtype, options in ((torch.bfloat16, EVERYTHING), (torch.float32, NOTHING)):
        given_ = of_backward(shape, skip, groups, dtype, **options)
        placed = laid_out(given_, "nhwc")
        check(given_, {k: guarded(v) if isinstance(v, Tensor) else v for k, v in placed.items()})


@ON_OPERATIONS
@pytest.mark.parametrize("small", [True, False])
def test_mean_a_thousand_deviations_from_zero(
    backend: Backend, small: bool, request: pytest.FixtureRequest
) -> None:
    """Of x, with a vector added before: neither it nor the mean may be rounded to the other."""
    request.getfixturevalue("small_tiles" if small else "narrow_chunks")
    given_ = of_backward((2, 4, 5, 5), 4, 2, **EVERYTHING, mean=1000.0, eps=1e-5)
    check(given_, backend.moved(laid_out(given_, "nhwc")), ulps=8, own=not backend.runs_kernels)


@ON_OPERATIONS
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_spoils_only_itself(
    backend: Backend, small: bool, bad: float, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("small_tiles" if small else "narrow_chunks")
    given_ = laid_out(of_backward((3, 4, 4, 5), 4, 4, **EVERYTHING), "nhwc")
    good = found(backend.moved(given_))
    spoilt = {**given_, "dy": given_["dy"].clone()}
    spoilt["dy"][1, 2, 3, 1] = bad
    gradients = found(backend.moved(spoilt))
    for name in ("x", "skip", "before", "scale", "shift"):
        assert_equal(gradients[name][::2], good[name][::2], name)
    assert not gradients["x"][1, 2:].isfinite().any()  # the group
    assert_equal(gradients["x"][1, :2], good["x"][1, :2])
    assert_equal(gradients["skip"][1], good["skip"][1])


@ON_OPERATIONS
@pytest.mark.parametrize("small", [True, False])
def test_what_is_not_asked_for(
    backend: Backend, small: bool, request: pytest.FixtureRequest
) -> None:
    """The other gradients are the same to the bit without it."""
    request.getfixturevalue("small_tiles" if small else "narrow_chunks")
    given_ = laid_out(of_backward((2, 4, 3, 5), 4, 2, **EVERYTHING), "nhwc")
    whole = found(backend.moved(given_))
    for change, missing in (
        ({"needs_dx": False}, {"x", "skip"}),
        ({"owes": False}, {"owed"}),
        ({"needs_dx": False, "owes": False}, {"x", "skip", "owed"}),
    ):
        part = found(backend.moved({**given_, **change}))
        for name, gradient in part.items():
            if name in missing:
                assert not gradient.numel(), name
            else:
                assert_equal(gradient, whole[name], name)


@ON_OPERATIONS
def test_residual_gradients_are_added_as_autograd_would(backend: Backend) -> None:
    """One of two, of any strides; in half precision dx is rounded once and not twice."""
    for which in ((True, False), (False, True)):
        given_ = of_backward((2, 8, 3, 5), 8, 2, torch.float16, **{**NOTHING, "residuals": which})
        name = "residual" if which[0] else "skip_residual"
        given_[name] = given_[name][:1, :, :1, :1].expand_as(given_[name])
        placed = backend.moved(laid_out(given_, "nhwc"))
        placed[name] = placed[name][:1, :, :1, :1].expand_as(placed[name])
        exact = expected(in_float64(given_))
        for of, gradient in found(placed).items():
            if of in ("x", "skip"):
                allowed = exact[of].abs() * 2.0**-11 + 1e-5
                assert_within(gradient, exact[of], allowed, of)


@ON_OPERATIONS
def test_strides_of_the_vectors(backend: Backend) -> None:
    """Slices of one product, and one row for all samples."""
    given_ = of_backward((2, 6, 3, 5), 4, 2, **EVERYTHING)
    wide = torch.full((2, 21), float("nan"))
    wide[:, 1::2] = given_["before"]
    check(given_, backend.moved({**given_, "before": wide[:, 1::2]}))
    row = given_["before"][:1].expand(2, -1)
    given_ = {**given_, "before": row}
    given_["statistics"] = exact_statistics(given_, 1e-2).float()
    check(given_, backend.moved(given_))
