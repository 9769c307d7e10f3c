"""Gated residual, norm, scale, shift: against float64, forward and backward, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.comparing import assert_equal, assert_no_worse, assert_within, largest
from tests.kernels.conftest import ON_OPERATIONS, Backend, Guarded
from tests.kernels.inputs import FLOATS, Arguments, copied, in_float64, of_modulate
from tests.watching import Watched
from torch import Tensor

from ddpm_kernels import modulate
from ddpm_kernels.modulate.launch import MAX_WARPS, divide
from ddpm_kernels.modulate.op import modulate_reference
from ddpm_kernels.tiles import Tile

DIFFERENTIABLE = ("x", "y", "gate", "scale", "shift", "weight")
Results = tuple[Tensor, Tensor]


def definition(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor,
    weight: Tensor | None, norm: str, eps: float,
) -> Results:  # fmt: skip
    """The operation in float64, differentiable."""
    r = x if y is None or gate is None else x + gate[:, None] * y
    centred = r - r.mean(2, keepdim=True) if norm == "layer" else r
    x_hat = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    n = x_hat if weight is None else x_hat * weight
    return r, (1 + scale[:, None]) * n + shift[:, None]


def reference(**arguments: Any) -> Results:
    """torch's own arithmetic in the precision of the arguments."""
    return modulate_reference(*arguments.values())


def gradients(
    function: Callable[..., Results], arguments: Arguments, uses: str = "rm"
) -> dict[str, Tensor]:
    """Both results, and gradients against fixed cotangents of those that are used."""
    names = [name for name in DIFFERENTIABLE if arguments[name] is not None]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    found = dict(zip("rm", function(**{**arguments, **leaves}), strict=True))
    generator = torch.Generator().manual_seed(9)
    cotangents = {
        use: torch.randn(found[use].shape, generator=generator).bfloat16().to(found[use])
        for use in uses
    }  # the same in every precision
    got = torch.autograd.grad(
        [found[use] for use in uses], list(leaves.values()), list(cotangents.values()),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {**{k: v.detach() for k, v in found.items()}, **dict(zip(names, got, strict=True))}


def check(arguments: Arguments, inside: Arguments, uses: str = "rm") -> None:
    """Hold results and gradients to twice the error of torch, and two roundings.

    Terms of order one may cancel in a sum over tokens: the unit is that of a typical sum. In half
    precision r is rounded before it is normalised, which all that follows from it inherits.
    """
    exact = gradients(definition, in_float64(arguments), uses)
    torchs = gradients(reference, arguments, uses)
    for name, result in gradients(modulate, inside, uses).items():
        like = arguments["x" if name in "rm" else name]
        assert result.dtype == like.dtype, name
        terms = max(1, exact["r"].numel() // exact[name].numel())
        precision = max(torch.finfo(result.dtype).eps, torch.finfo(arguments["x"].dtype).eps)
        floor = 2 * precision * max(terms**0.5, largest(exact[name]))
        assert_no_worse(result, torchs[name], exact[name], floor, name)


@pytest.mark.usefixtures("small_token_tiles")
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    channels=st.sampled_from([1, 2, 7, 16, 33, 64, 130]),
    dtype=st.sampled_from(FLOATS),
    branch_dtype=st.sampled_from([None, torch.bfloat16]),
    gated=st.booleans(),
    weighted=st.booleans(),
    norm=st.sampled_from(["layer", "rms"]),
    uses=st.sampled_from(["rm", "m", "r"]),
)
def test_definition(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], batch: int, length: int,
    channels: int, uses: str, **options: Any,
) -> None:  # fmt: skip
    given_ = of_modulate((batch, length, channels), **options)
    inside = {k: guarded(v) if isinstance(v, Tensor) else v for k, v in given_.items()}
    check(given_, inside, uses)
    assert poisoned or not backend.runs_kernels


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 384), {}),
        ((1, 2, 1152), {"norm": "rms", "weighted": True, "dtype": torch.bfloat16}),
        ((1, 5, 515), {"gated": False, "weighted": True, "dtype": torch.float16}),
        ((1, 1, 2048), {"norm": "rms"}),
    ],
)
def test_tiles_of_the_table(
    backend: Backend, guarded: Guarded, shape: tuple[int, int, int], options: Arguments
) -> None:
    given_ = of_modulate(shape, **options)
    check(given_, {k: guarded(v) if isinstance(v, Tensor) else v for k, v in given_.items()})


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_definition_of_this_file_is_that_of_torch(norm: str) -> None:
    """So that the oracle has an oracle."""
    given_ = of_modulate(dtype=torch.float64, gated=False, weighted=True, norm=norm)
    x, weight = given_["x"], given_["weight"]
    if norm == "layer":
        n = F.layer_norm(x, (6,), weight, None, 1e-2)
    else:
        n = F.rms_norm(x, (6,), weight, 1e-2)
    expected = n + n * given_["scale"][:, None] + given_["shift"][:, None]
    torch.testing.assert_close(definition(**given_)[1], expected)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_every_precision_in_absolute_terms(backend: Backend, dtype: torch.dtype, norm: str) -> None:
    """Whatever torch's own error is."""
    given_ = of_modulate(dtype=dtype, weighted=True, norm=norm)
    exact = gradients(definition, in_float64(given_))
    for name, result in gradients(modulate, backend.moved(given_)).items():
        allowed = 16 * torch.finfo(dtype).eps * max(1.0, largest(exact[name]))
        assert_within(result, exact[name], allowed, name)


@pytest.mark.usefixtures("small_token_tiles")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_bad_sample_spoils_only_itself(backend: Backend, bad: float, norm: str) -> None:
    given_ = of_modulate(norm=norm)
    found = gradients(modulate, backend.moved(given_))
    given_["x"][1, 2, 3] = bad
    spoilt = gradients(modulate, backend.moved(given_))
    for name in ("r", "m", "x", "y", "gate", "scale", "shift"):
        assert_equal(spoilt[name][::2], found[name][::2], name)
    for name in ("r", "m", "x", "y"):  # of the token alone
        assert_equal(spoilt[name][1, :2], found[name][1, :2], name)
        assert not spoilt[name][1, 2].isfinite().all(), name


# --- Hard inputs


@ON_OPERATIONS
@pytest.mark.parametrize("offset", [30.0, -1000.0])
def test_mean_a_thousand_deviations_from_zero(backend: Backend, offset: float) -> None:
    """Where torch's own LayerNorm, which a CPU takes, has lost three digits."""
    given_ = of_modulate((2, 4, 96), gated=False, eps=1e-6)
    given_["x"] = (given_["x"] - 0.5) / 2 + offset
    exact = gradients(definition, in_float64(given_))
    for name, result in gradients(modulate, backend.moved(given_)).items():
        allowed = 32 * torch.finfo(torch.float32).eps * max(1.0, largest(exact[name]))
        assert_within(result, exact[name], allowed, name)


@pytest.mark.parametrize("value", [0.0, 1000.1])
def test_constant_tokens(backend: Backend, value: float) -> None:
    """Normalised they are zero: what is left is the shift."""
    given_ = of_modulate(gated=False, eps=1e-6)
    given_["x"] = torch.full_like(given_["x"], value)
    found = gradients(modulate, backend.moved(given_))
    assert_within(found["m"], given_["shift"][:, None].expand(3, 5, 6).double(), 1e-6)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_squares_that_pass_the_range_of_half_precision(backend: Backend) -> None:
    for norm in ("layer", "rms"):
        given_ = of_modulate(dtype=torch.float16, gated=False, norm=norm)
        given_["x"] = given_["x"] * 5000
        check(given_, backend.moved(given_), "m")


# --- The residual stream


def test_without_a_branch_the_stream_is_what_came_in(backend: Backend) -> None:
    given_ = backend.moved(of_modulate(gated=False))
    r, _ = modulate(**given_)
    assert r.data_ptr() == given_["x"].data_ptr()


@ON_OPERATIONS
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_the_stream_are_added_in_the_kernel(backend: Backend, gated: bool) -> None:
    """So that autograd adds no pass over all tokens."""
    given_ = backend.moved(of_modulate(gated=gated))
    with Watched() as watched:
        gradients(modulate, given_)
    ours = [name for name in watched.names if name.startswith("ddpm.")]
    assert ours == ["ddpm.modulate.default", "ddpm.modulate_backward.default"]
    assert not [name for name in watched.names if name.startswith("aten.add")]


class _StopGradient(torch.autograd.Function):
    """The identity, which passes no gradient on: not zeros, none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


def test_no_gradient_of_the_results(backend: Backend) -> None:
    given_ = backend.moved(of_modulate())
    x = given_["x"].requires_grad_()
    r, m = (_StopGradient.apply(result) for result in modulate(**given_))
    assert torch.autograd.grad((r + m).sum(), x, allow_unused=True) == (None,)


# --- Arguments


def test_strides_of_the_arguments(backend: Backend) -> None:
    plain = of_modulate(weighted=True)
    expected = gradients(modulate, backend.moved(copied(plain)))  # dense
    spread = torch.full((12,), float("nan"))
    spread[::2] = plain["weight"]
    for changes in (
        {},  # slices of one product
        {"scale": plain["scale"].T.contiguous().T, "gate": plain["gate"].T.contiguous().T},
        {"x": plain["x"].mT.contiguous().mT, "y": plain["y"].mT.contiguous().mT},
        {"weight": spread[::2]},
    ):
        given_ = backend.moved({**plain, **changes})
        for name, result in gradients(modulate, given_).items():
            torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6)
    one = {**plain, "scale": plain["scale"][:1].expand(3, -1)}
    check(copied(one), backend.moved(one))


def test_cotangent_of_a_sum_has_no_strides(backend: Backend) -> None:
    plain = of_modulate()
    given_ = backend.moved(plain)
    x, exact_x = given_["x"].requires_grad_(), plain["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(torch.cat(modulate(**given_)).sum(), x)
    (expected,) = torch.autograd.grad(torch.cat(definition(**plain)).sum(), exact_x)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_an_empty_batch(backend: Backend) -> None:
    given_ = backend.moved(of_modulate((0, 5, 6)))
    assert [result.shape for result in modulate(**given_)] == [(0, 5, 6)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, r"norm is 'batch'; it must be one of 'layer', 'rms'"),
        ({"gate": None}, r"y and gate must be given together"),
        ({"x": torch.zeros(3, 6)}, r"x has shape \(3, 6\); it must be \[B, L, C\]"),
        ({"y": torch.zeros(3, 4, 6)}, r"y has shape \(3, 4, 6\); it must be \(3, 5, 6\), as x"),
        ({"scale": torch.zeros(3, 5)}, r"scale has shape \(3, 5\); it must be \(3, 6\)"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\); it must be \(6,\)"),
    ],
)
def test_errors(change: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modulate(**{**of_modulate(), **change})


# --- The division of work


@settings(max_examples=100)
@given(
    batch=st.integers(1, 3000),
    length=st.integers(1, 70_000),
    channels=st.integers(1, 8192),
    programs=st.sampled_from([1, 512, 2048]),
)
def test_every_token_has_one_program(batch: int, length: int, channels: int, programs: int) -> None:
    division = divide(batch, length, channels, Tile(512, 2, programs=programs))
    assert channels <= division.width < 2 * channels
    assert division.block_tokens % division.rows == 0
    assert (division.blocks - 1) * division.block_tokens < length
    assert length <= division.blocks * division.block_tokens
    assert division.rows == 1 or division.rows * division.width <= 512
    assert 1 <= division.warps <= MAX_WARPS
    assert batch * (division.blocks - 1) * division.warps < 2 * max(programs, division.warps)
