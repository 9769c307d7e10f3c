# mypy: ignore-errors
"""The Triton kernels of GroupNorm with scale, shift and SiLU, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_kernels import group_norm_silu
from ddpm_kernels.tiles import TILES, Tile, trying

module = importlib.import_module("ddpm_kernels.group_norm_silu")

Guarded = Callable[[Tensor], Tensor]
LayOut = Callable[[Tensor, str], Tensor]
LAYOUTS = ("nchw", "nhwc", "columns", "view", "expanded")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = TILES["default"]["group_norm_silu"]
DIFFERENTIABLE = ("x", "weight", "bias", "scale", "shift")
aten = torch.ops.aten


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that little tensors take several slabs and chunks."""
    monkeypatch.setattr(module, "WIDTHS", (8, 16))
    module._plan.cache_clear()
    with (
        trying("group_norm_silu", Tile(128, 4)),
        trying("group_norm_silu_backward", Tile(64, 4)),
    ):
        yield
    module._plan.cache_clear()


def arguments(
    shape: tuple[int, ...] = (2, 6, 5, 4),
    groups: int = 3,
    dtype: torch.dtype = torch.float32,
    film: bool = True,
    affine_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Everything `group_norm_silu` takes but the activation; scale and shift are strided views."""
    generator = torch.Generator().manual_seed(shape[1] + 31 * shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    scale, shift = draw(shape[0], 2 * shape[1]).chunk(2, dim=1)
    return {
        "x": draw(*shape) * 2 + 0.5,
        "groups": groups,
        "weight": draw(shape[1]).to(affine_dtype or dtype),
        "bias": draw(shape[1]).to(affine_dtype or dtype),
        "scale": scale if film else None,
        "shift": shift if film else None,
        "eps": 1e-2,  # two nearly equal pixels have a steep norm
    }


def expected_output(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """The definition, in float64, differentiable."""
    grouped = x.double().reshape(x.shape[0], groups, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
    z = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    z = z * weight.double().reshape(-1, 1, 1) + bias.double().reshape(-1, 1, 1)
    if scale is not None and shift is not None:
        z = z * (1 + scale.double()[..., None, None]) + shift.double()[..., None, None]
    return z / (1 + torch.exp(-z)) if activation == "silu" else z


def in_torch(activation: str, groups: int, eps: float, **tensors: Any) -> Tensor:
    """The reference, called where no operation is forced: torch's own arithmetic."""
    x = tensors["x"]
    return module.group_norm_silu_reference(
        x, groups, tensors["weight"], tensors["bias"], tensors["scale"], tensors["shift"],
        eps, activation,
    )[0]  # fmt: skip


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


def no_worse(
    actual: Tensor, torchs: Tensor, expected: Tensor, name: str = "y", terms: int = 1
) -> None:
    """At most twice torch's error in the same precision, and two units in the last place.

    One of the two is for the interpreter, which truncates to bfloat16. Sums over many terms of
    order one may cancel: their unit is that of a typical sum.
    """
    assert actual.shape == expected.shape, name
    typical = terms**0.5 if terms > 1 else 0.0
    unit = torch.finfo(actual.dtype).eps * max(typical, expected.abs().max().item())
    allowed = 2 * (torchs.double() - expected).abs().max().item() + 2 * unit
    error = (actual.double() - expected).abs().max().item()
    assert error <= allowed, f"{name}: {error} against {allowed}"  # NaN fails too


def check(given_: dict[str, Any], activation: str) -> Tensor:
    """Forward and all gradients; returns y."""
    exact, exact_found = gradients(expected_output, given_, activation)
    torchs, torchs_found = gradients(in_torch, given_, activation)
    y, found = gradients(group_norm_silu, given_, activation)
    assert y.dtype == given_["x"].dtype
    no_worse(y, torchs, exact)
    for name, gradient in found.items():
        assert gradient.dtype == given_[name].dtype, name
        terms = exact.numel() // gradient.numel()
        no_worse(gradient, torchs_found[name], exact_found[name].double(), name, terms)
    return y


def place(given_: dict[str, Any], guarded: Guarded, lay_out: LayOut, layout: str) -> dict[str, Any]:
    """Lay x out, and put every tensor between guard pages."""
    placed = {
        name: guarded(value) if isinstance(value, Tensor) else value
        for name, value in given_.items()
    }
    x = given_["x"]
    if layout == "expanded":
        one = guarded(x[:1].contiguous(memory_format=torch.channels_last))
        placed["x"] = one.expand(x.shape[0], -1, -1, -1)
    else:
        placed["x"] = guarded(lay_out(x, layout))
    return placed


SHAPES_OF_PROPERTY = {
    "batch": st.integers(1, 3),
    "groups": st.sampled_from([1, 2, 3, 5]),
    "per_group": st.integers(1, 5),
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "dtype": st.sampled_from(DTYPES),
    "layout": st.sampled_from(LAYOUTS),
    "film": st.booleans(),
    "activation": st.sampled_from(["silu", "none"]),
}


@pytest.mark.usefixtures("small_tiles")
@given(**SHAPES_OF_PROPERTY)
def test_any_shape(
    guarded: Guarded, lay_out: LayOut, batch: int, groups: int, per_group: int, height: int,
    width: int, dtype: torch.dtype, layout: str, film: bool, activation: str,
) -> None:  # fmt: skip
    given_ = arguments((batch, groups * per_group, height, width), groups, dtype, film)
    given_ = place(given_, guarded, lay_out, layout)
    y = check(given_, activation)
    if layout == "nhwc":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 64, 16, 16), 8),  # several slabs
        ((1, 12, 23, 23), 2),  # groups of six, the last slab cut short
        ((1, 80, 5, 7), 8),  # groups of ten
        ((1, 144, 3, 3), 24),  # several chunks, the last one smaller
        ((1, 515, 2, 2), 1),  # a group wider than every tile of the table
        ((1, 1, 1, 1), 1),
        ((3, 5, 1, 1), 5),
        ((1, 1, 31, 37), 1),
    ],
)
def test_tiles_as_they_are_on_a_gpu(
    guarded: Guarded, lay_out: LayOut, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    given_ = arguments(shape, groups, dtype)
    check(place(given_, guarded, lay_out, "nhwc"), "silu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(guarded: Guarded, lay_out: LayOut, layout: str, dtype: torch.dtype) -> None:
    given_ = place(arguments((2, 6, 5, 7), 3, dtype), guarded, lay_out, layout)
    y = check(given_, "silu")
    like = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert y.is_contiguous(memory_format=like)


# --- Nothing outside is read or written, and everything inside is written


class Poisoned(TorchDispatchMode):
    """Memory that is allocated is NaN, and so are the pages around it and around copies."""

    def __init__(self, guarded: Guarded) -> None:
        super().__init__()
        self.guarded = guarded
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = (aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default)
        if func in fresh and out.numel():
            self.count += 1
            return self.guarded(out.fill_(float("nan")))
        return self.guarded(out) if func is aten.clone.default else out


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "film"), [("nhwc", True), ("nhwc", False), ("view", True)])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 5, 7), 3), ((1, 7, 1, 1), 7), ((1, 20, 3, 11), 2), ((1, 24, 3, 5), 24)],
)
def test_guard_pages(
    guarded: Guarded,
    lay_out: LayOut,
    shape: tuple[int, ...],
    groups: int,
    layout: str,
    film: bool,
    dtype: torch.dtype,
) -> None:
    given_ = place(arguments(shape, groups, dtype, film), guarded, lay_out, layout)
    x, dy = given_["x"], guarded(lay_out(torch.randn(shape).to(dtype), layout))
    eps = given_.pop("eps")
    with Poisoned(guarded) as mode:
        y, statistics = module._launch_forward(*given_.values(), eps, "silu")
        found = module._launch_backward(dy, *given_.values(), statistics, "silu")
    assert mode.count >= 6
    exact = expected_output(**given_, eps=eps, activation="silu")
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)
    for tensor in (statistics, *found):
        assert tensor.isfinite().all()
    assert x.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_spoils_only_itself(bad: float) -> None:
    given_ = arguments((3, 6, 5, 7), 3)
    y, found = gradients(group_norm_silu, given_, "silu")
    given_["x"] = given_["x"].clone()
    given_["x"][1, 2, 3, 4] = bad
    spoiled, spoiled_found = gradients(group_norm_silu, given_, "silu")
    for name in ("x", "scale", "shift"):
        assert torch.equal(spoiled_found[name][::2], found[name][::2]), name
    assert torch.equal(spoiled[::2], y[::2])
    assert not spoiled[1, 2:4].isfinite().any()  # the group
    assert torch.equal(spoiled[1, :2], y[1, :2])


# --- Hard inputs


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("offset", [30.0, -1000.0, 1000.0])
@pytest.mark.parametrize("shape", [(2, 8, 6, 11), (1, 12, 7, 7)])
@pytest.mark.parametrize("trend", [False, True])
def test_mean_a_thousand_deviations_from_zero(
    lay_out: LayOut, shape: tuple[int, ...], offset: float, trend: bool
) -> None:
    given_ = {**arguments(shape, 4), "eps": 1e-5}
    x = (given_["x"] - 0.5) / 2
    if trend:  # slabs and channels of different means
        x = x + torch.linspace(-5, 5, shape[2])[:, None] + torch.arange(shape[1])[:, None, None]
    given_["x"] = lay_out(x + offset, "nhwc")
    exact = expected_output(**given_, activation="none")
    y = group_norm_silu(**given_, activation="none")
    no_worse(y, in_torch(**given_, activation="none"), exact)
    check(given_, "silu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1000.1])
@pytest.mark.parametrize("shape", [(1, 8, 3, 7), (1, 12, 11, 5)])
def test_constant_input(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> None:
    """Normalised it is zero: what is left is the bias."""
    given_ = {**arguments(shape, 4, dtype, film=False), "eps": 1e-5}
    given_["x"] = torch.full(shape, value, dtype=dtype)
    _, statistics = module._launch_forward(*given_.values(), "none")
    mean, rest, rstd = statistics.unbind(1)
    y, found = gradients(group_norm_silu, given_, "none")
    expected = given_["bias"].reshape(1, -1, 1, 1).expand(shape)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    assert (mean == given_["x"][0, 0, 0, 0].float()).all()
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-7)
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e5**0.5), rtol=1e-6, atol=0)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_half_data_far_from_zero() -> None:
    """Spread over few representable values, still normalised to unit variance."""
    given_ = {**arguments((1, 8, 16, 16), 2, torch.float16, film=False), "eps": 1e-5}
    given_["x"] = given_["x"] / 2 + 1000
    check(given_, "silu")
    check({**given_, "x": given_["x"] * 60}, "none")  # squares pass half's range


# --- Arguments


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_data_with_float32_parameters(
    dtype: torch.dtype, film: bool, activation: str
) -> None:
    check(arguments((2, 6, 7, 11), 3, dtype, film, torch.float32), activation)


@pytest.mark.parametrize("strides", ["chunk", "columns", "expanded", "dense", "differing"])
def test_strides_of_scale_and_shift(guarded: Guarded, strides: str) -> None:
    given_ = arguments((3, 6, 5, 4), 3)
    scale, shift = given_["scale"].clone(), given_["shift"].clone()
    if strides == "chunk":
        scale, shift = guarded(torch.cat([scale, shift], 1)).chunk(2, 1)
    elif strides == "columns":
        scale, shift = guarded(scale.T.contiguous()).T, guarded(shift.T.contiguous()).T
    elif strides == "expanded":
        scale, shift = guarded(scale[:1]).expand(3, -1), guarded(shift[:1]).expand(3, -1)
    elif strides == "differing":
        scale, shift = guarded(scale.T.contiguous()).T, guarded(shift)
    check({**given_, "scale": scale, "shift": shift}, "silu")


@pytest.mark.parametrize("stride", [2, 0])
def test_strides_of_weight_and_bias(stride: int) -> None:
    given_ = arguments()
    given_["weight"] = torch.randn(12).as_strided((6,), (stride,))
    given_["bias"] = torch.randn(12).as_strided((6,), (stride,), 1)
    check(given_, "silu")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_cotangent_of_a_sum_has_no_strides(lay_out: LayOut, layout: str) -> None:
    given_ = arguments()
    x = given_["x"] = lay_out(given_["x"], layout).requires_grad_()
    (gradient,) = torch.autograd.grad(group_norm_silu(**given_).sum(), x)
    (expected,) = torch.autograd.grad(expected_output(**given_, activation="silu").sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_of_each_group(offset: float) -> None:
    given_ = arguments((2, 20, 5, 7), 4)
    given_["x"] += offset
    _, statistics = torch.ops.ddpm.group_norm_silu(*given_.values(), "silu")
    mean, rest, rstd = statistics.double().unbind(1)
    grouped = given_["x"].double().reshape(2, 4, -1)
    torch.testing.assert_close(mean + rest, grouped.mean(2), rtol=0, atol=1e-6)
    deviation = (grouped.var(2, unbiased=False) + 1e-2).sqrt()
    torch.testing.assert_close(rstd, 1 / deviation, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_which_precision_takes_the_kernels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    calls = []
    for name in ("_launch_forward", "_launch_backward"):
        launch = getattr(module, name)

        def counted(*args: Any, name: str = name, launch: Any = launch) -> Any:
            calls.append(name)
            return launch(*args)

        monkeypatch.setattr(module, name, counted)
    gradients(group_norm_silu, arguments(dtype=dtype), "silu")
    assert calls == ([] if dtype == torch.float64 else ["_launch_forward", "_launch_backward"])


def test_an_empty_batch() -> None:
    given_ = arguments()
    for name in ("x", "scale", "shift"):
        given_[name] = given_[name][:0]
    assert group_norm_silu(**given_).shape == (0, 6, 5, 4)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (1, 3, 1, 4)])
def test_opcheck(lay_out: LayOut, shape: tuple[int, ...], film: bool, layout: str) -> None:
    """Strides and dtypes are those that compilers are told."""
    given_ = arguments(shape, 3, torch.bfloat16, film)
    x = given_["x"] = lay_out(given_["x"], layout)
    tests = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.ddpm.group_norm_silu, torch.ops.ddpm.group_norm_silu_backward
    torch.library.opcheck(forward.default, (*given_.values(), "silu"), test_utils=tests)
    _, statistics = forward(*given_.values(), "silu")
    del given_["eps"]
    torch.library.opcheck(
        backward.default, (x, *given_.values(), statistics, "silu"), test_utils=tests
    )


# --- The division of work


@settings(max_examples=300)
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
    plan = module._plan(batch, groups * per_group, pixels, groups, tile)
    for size in (plan.rows, plan.width):
        assert size & (size - 1) == 0
    assert plan.chunk_groups * per_group <= plan.width
    assert (plan.chunks - 1) * plan.chunk_groups < groups <= plan.chunks * plan.chunk_groups
    assert (plan.slabs - 1) * plan.slab_pixels < pixels <= plan.slabs * plan.slab_pixels
    assert plan.slab_pixels % plan.rows == 0
    assert 1 <= plan.slabs <= module.MAX_SLABS
    assert plan.rows == 1 or plan.rows * plan.width <= tile


@pytest.mark.parametrize("groups", [8, 16, 32])
@pytest.mark.parametrize("channels", [64, 96, 128, 192, 224, 256, 320, 384, 448, 512, 640, 960])
def test_chunks_of_usual_widths_begin_at_16_bytes_and_are_full(channels: int, groups: int) -> None:
    plan = module._plan(8, channels, 1024, groups, TILE.elements)
    assert plan.chunks == 1 or plan.chunk_groups * (channels // groups) % 8 == 0
    assert channels >= 0.7 * plan.chunks * plan.width


def test_a_large_batch_is_one_launch_and_a_small_one_spreads() -> None:
    assert module._plan(600, 128, 1024, 32, TILE.elements).slabs == 1
    assert module._plan(1, 128, 65536, 32, TILE.elements).slabs == module.MAX_SLABS


@pytest.mark.parametrize(("pixels", "wide"), [(2**21 - 64, False), (2**21, True)])
def test_offsets_widen_before_they_overflow(pixels: int, wide: bool) -> None:
    x = torch.empty((1, 1024, 1, pixels), device="meta")
    plan = module._plan(1, 1024, pixels, 32, TILE.elements)
    assert module._shape_arguments(x, 32, plan, TILE)["WIDE"] is wide


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = arguments((2, 6, 7, 11), 3)
    narrow, narrow_found = gradients(group_norm_silu, given_, "silu")
    shape_arguments = module._shape_arguments
    monkeypatch.setattr(
        module, "_shape_arguments", lambda *a: {**shape_arguments(*a), "WIDE": True}
    )
    wide, wide_found = gradients(group_norm_silu, given_, "silu")
    assert torch.equal(wide, narrow)
    for name, gradient in narrow_found.items():
        assert torch.equal(wide_found[name], gradient), name
