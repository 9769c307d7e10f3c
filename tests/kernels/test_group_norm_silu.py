# mypy: ignore-errors
"""GroupNorm with scale, shift and SiLU: against float64, forward and backward, on both paths."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_kernels import group_norm_silu
from ddpm_kernels.dispatch import force_ops
from ddpm_kernels.group_norm_silu import NEAR

PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "reference": nullcontext,
    "op": force_ops,
}
LayOut = Callable[[Tensor, str], Tensor]
LAYOUTS = ("nchw", "nhwc", "columns", "view")
SHAPES = (
    ((3, 6, 5, 4), "nchw"),
    ((3, 6, 5, 4), "nhwc"),
    ((1, 6, 7, 11), "columns"),
    ((2, 3, 1, 13), "view"),
)
ACTIVATIONS = ("silu", "none")
DIFFERENTIABLE = ("x", "weight", "bias", "scale", "shift")


def arguments(
    shape: tuple[int, ...] = (3, 6, 5, 4),
    groups: int = 3,
    dtype: torch.dtype = torch.float32,
    film: bool = True,
    affine_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Everything `group_norm_silu` takes but the activation; scale and shift if `film`."""
    generator = torch.Generator().manual_seed(shape[0] + shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(*shape) * 2 + 0.5
    weight, bias = draw(shape[1]), draw(shape[1])
    return {
        "x": x,
        "groups": groups,
        "weight": weight.to(affine_dtype or dtype),
        "bias": bias.to(affine_dtype or dtype),
        "scale": draw(*shape[:2]) if film else None,
        "shift": draw(*shape[:2]) if film else None,
        "eps": 1e-5,
    }


def expected_output(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """The definition, in float64, differentiable."""
    wide = x.double()
    grouped = wide.reshape(x.shape[0], groups, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
    z = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    z = torch.einsum("nchw,c->nchw", z, weight.double()) + bias.double().reshape(-1, 1, 1)
    if scale is not None and shift is not None:
        z = torch.einsum("nchw,nc->nchw", z, 1 + scale.double()) + shift.double()[..., None, None]
    return z / (1 + torch.exp(-z)) if activation == "silu" else z


def gradients(
    function: Any, arguments: dict[str, Any], activation: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and its gradients against a fixed cotangent."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in DIFFERENTIABLE
        if arguments[name] is not None
    }
    y = function(**{**arguments, **leaves}, activation=activation)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return y.detach(), dict(zip(leaves, found, strict=True))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 8) -> None:
    """Within a few roundings of `dtype`, relative to the largest value."""
    tolerance = factor * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 3, 5]),
    per_group=st.integers(1, 4),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
    film=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_forward(
    lay_out: LayOut, path: str, batch: int, groups: int, per_group: int, height: int, width: int,
    dtype: torch.dtype, layout: str, film: bool, activation: str,
) -> None:  # fmt: skip
    given_ = arguments((batch, groups * per_group, height, width), groups, dtype, film)
    given_["eps"] = 1e-2  # two nearly equal pixels have a steep norm
    expected = expected_output(**given_, activation=activation)
    given_["x"] = lay_out(given_["x"], layout)
    with PATHS[path]():
        y = group_norm_silu(**given_, activation=activation)
    assert y.dtype == dtype
    assert y.shape == given_["x"].shape
    if layout == "nhwc":
        assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, expected, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gradients(
    lay_out: LayOut,
    path: str,
    shape: tuple[int, ...],
    layout: str,
    film: bool,
    activation: str,
    dtype: torch.dtype,
) -> None:
    given_ = arguments(shape, 3, dtype, film)
    expected = gradients(expected_output, given_, activation)[1]
    given_["x"] = lay_out(given_["x"], layout)
    with PATHS[path]():
        _, found = gradients(group_norm_silu, given_, activation)
    for name, gradient in found.items():
        assert gradient.dtype == given_[name].dtype, name
        assert gradient.shape == given_[name].shape, name
        close(gradient, expected[name], dtype, factor=32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("film", [True, False])
def test_half_precision_data_with_float32_parameters(path: str, film: bool) -> None:
    given_ = arguments(dtype=torch.bfloat16, film=film, affine_dtype=torch.float32)
    y, expected = gradients(expected_output, given_, "silu")
    with PATHS[path]():
        actual, found = gradients(group_norm_silu, given_, "silu")
    assert actual.dtype == torch.bfloat16
    close(actual, y, torch.bfloat16)
    assert {name: g.dtype for name, g in found.items() if name in ("weight", "bias")} == {
        "weight": torch.float32, "bias": torch.float32,
    }  # fmt: skip
    for name, gradient in found.items():
        close(gradient, expected[name], torch.bfloat16)


@pytest.mark.parametrize("path", PATHS)
def test_zero_scale_and_shift_change_nothing(path: str) -> None:
    given_ = arguments(film=False)
    zeros = torch.zeros(given_["x"].shape[:2])
    with PATHS[path]():
        plain = group_norm_silu(**given_)
        film = group_norm_silu(**{**given_, "scale": zeros, "shift": zeros})
    torch.testing.assert_close(film, plain)


@pytest.mark.parametrize("path", PATHS)
def test_samples_do_not_see_each_other(path: str) -> None:
    given_ = arguments()
    with PATHS[path]():
        whole = group_norm_silu(**given_)
        for b in range(3):
            one = {**given_, **{name: given_[name][b : b + 1] for name in ("x", "scale", "shift")}}
            torch.testing.assert_close(group_norm_silu(**one)[0], whole[b])


# --- Hard inputs: a mean far from zero


def in_torch(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str, **_: None
) -> Tensor:
    """Torch's own group norm, NCHW, where it is careful; no scale and shift."""
    y = F.group_norm(x.contiguous(), groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def no_worse(actual: Tensor, torchs: Tensor, expected: Tensor, terms: int = 1) -> None:
    """At most twice torch's error, and two units in the last place.

    Sums over many terms of order one may cancel: their unit is that of a typical sum.
    """
    typical = terms**0.5 if terms > 1 else 0.0
    unit = torch.finfo(actual.dtype).eps * max(typical, expected.abs().max().item())
    allowed = 2 * (torchs.double() - expected).abs().max().item() + 2 * unit
    assert (actual.double() - expected).abs().max().item() <= allowed


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("offset", [0.0, 1.0, -3.8, 7.0, 30.0, -1000.0, 1000.0])
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (1, 8, 31, 37), (1, 4, 96, 96)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mean_a_thousand_deviations_from_zero(
    lay_out: LayOut, path: str, layout: str, offset: float, shape: tuple[int, ...], activation: str
) -> None:
    given_ = arguments(shape, 4, film=False)
    given_["x"] = (given_["x"] - 0.5) / 2 + offset
    exact, exact_found = gradients(expected_output, given_, activation)
    torchs, torchs_found = gradients(in_torch, given_, activation)
    given_["x"] = lay_out(given_["x"], layout)
    with PATHS[path]():
        y, found = gradients(group_norm_silu, given_, activation)
    no_worse(y, torchs, exact)
    close(y, exact, torch.float32)  # torch's error grows with the mean, this one does not
    for name, gradient in found.items():
        expected = exact_found[name]
        no_worse(gradient, torchs_found[name], expected, exact.numel() // gradient.numel())
        # Where torch's own is taken, the mean is not taken off the sum that makes dγ.
        factor = 64 * max(1, abs(offset) / 4) if abs(offset) < NEAR else 32
        close(gradient, expected, torch.float32, factor=factor)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3, 1000.1])
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (1, 8, 7, 7), (1, 4, 31, 37)])
def test_constant_input(
    lay_out: LayOut, path: str, layout: str, value: float, shape: tuple[int, ...]
) -> None:
    """Normalised it is zero: what is left is the bias."""
    given_ = arguments(shape, 4, film=False)
    given_["x"] = torch.full(shape, value)
    given_["x"] = lay_out(given_["x"], layout)
    with PATHS[path]():
        y = group_norm_silu(**given_, activation="none")
    expected = given_["bias"].reshape(1, -1, 1, 1).expand(shape)
    assert (y - expected).abs().max().item() <= 1e-6


# --- The registered operation


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(path: str, film: bool, activation: str) -> None:
    given_ = arguments((2, 4, 3, 2), 2, torch.float64, film)
    names = [name for name in DIFFERENTIABLE if given_[name] is not None]

    def function(*values: Tensor) -> Tensor:
        return group_norm_silu(
            **{**given_, **dict(zip(names, values, strict=True))}, activation=activation
        )

    leaves = tuple(given_[name].requires_grad_() for name in names)
    with PATHS[path]():
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_and_reference_agree(lay_out: LayOut, film: bool, activation: str, layout: str) -> None:
    given_ = arguments(film=film)
    given_["x"] = lay_out(given_["x"], layout)
    y, found = gradients(group_norm_silu, given_, activation)
    with force_ops():
        op_y, op_found = gradients(group_norm_silu, given_, activation)
    torch.testing.assert_close(op_y, y, rtol=1e-5, atol=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(op_found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(
    lay_out: LayOut, shape: tuple[int, ...], layout: str, film: bool, activation: str
) -> None:
    given_ = arguments(shape, film=film)
    given_["x"] = lay_out(given_["x"], layout)
    for name in DIFFERENTIABLE:
        if given_[name] is not None:
            given_[name] = given_[name].detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.ddpm.group_norm_silu.default, (*given_.values(), activation), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_backward(
    lay_out: LayOut, shape: tuple[int, ...], layout: str, film: bool, activation: str
) -> None:
    given_ = arguments(shape, film=film)
    x = given_["x"] = lay_out(given_["x"], layout)
    _, statistics = torch.ops.ddpm.group_norm_silu(*given_.values(), activation)
    del given_["eps"]
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.library.opcheck(
        torch.ops.ddpm.group_norm_silu_backward.default,
        (lay_out(dy, layout), x, *list(given_.values())[1:], statistics, activation),
    )


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_op_returns_the_statistics_of_each_group(offset: float) -> None:
    given_ = arguments()
    given_["x"] += offset
    _, statistics = torch.ops.ddpm.group_norm_silu(*given_.values(), "silu")
    mean, rest, rstd = statistics.double().unbind(1)
    grouped = given_["x"].double().reshape(3, 3, -1)
    torch.testing.assert_close(mean + rest, grouped.mean(2), rtol=0, atol=1e-6)
    deviation = (grouped.var(2, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(rstd, 1 / deviation, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.1, 1000.1])
def test_deviation_of_a_constant_is_zero(value: float) -> None:
    given_ = arguments((1, 6, 31, 37), film=False)
    given_["x"] = torch.full((1, 6, 31, 37), value)
    _, statistics = torch.ops.ddpm.group_norm_silu(*given_.values(), "silu")
    mean, rest, rstd = statistics.unbind(1)
    torch.testing.assert_close(mean + rest, torch.full((1, 3), value), rtol=1e-7, atol=0)
    torch.testing.assert_close(rstd, torch.full((1, 3), 1e-5**-0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_compiles_as_one_graph(lay_out: LayOut, path: str, film: bool, layout: str) -> None:
    given_ = arguments(film=film)
    given_["x"] = lay_out(given_["x"], layout)
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    with PATHS[path]():
        y, found = gradients(group_norm_silu, given_, "silu")
        compiled_y, compiled_found = gradients(compiled, given_, "silu")
    torch.testing.assert_close(compiled_y, y)
    assert compiled_y.stride() == y.stride()
    for name, gradient in found.items():
        torch.testing.assert_close(compiled_found[name], gradient, rtol=1e-4, atol=1e-5)


# --- Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, r"activation is 'relu'; it must be 'silu' or 'none'"),
        ({"groups": 4}, r"6 channels cannot be normalised in 4 groups"),
        ({"scale": None}, r"scale and shift must be given together"),
        ({"shift": None}, r"scale and shift must be given together"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**arguments(), **change})


def test_formula_of_this_file_is_that_of_torch() -> None:
    """So that the oracle has an oracle."""
    given_ = arguments(dtype=torch.float64, film=False)
    x, weight, bias = given_["x"], given_["weight"], given_["bias"]
    np.testing.assert_allclose(
        expected_output(**given_, activation="silu"), F.silu(F.group_norm(x, 3, weight, bias, 1e-5))
    )
