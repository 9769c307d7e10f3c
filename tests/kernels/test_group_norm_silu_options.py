"""What is fused with the norm: two maps, a vector before, dropout, moments, residual gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.comparing import assert_no_worse, assert_within, largest
from tests.kernels.conftest import ON_COMPILERS, ON_KERNELS, ON_OPERATIONS, Backend, Guarded
from tests.kernels.inputs import FLOATS, Arguments, in_float64, lay_out, per_pixel
from tests.kernels.norm_definition import definition, moments_of, with_options
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_kernels import Moments, group_norm_silu, group_norm_silu_residual
from ddpm_kernels.dropout import Dropout
from ddpm_kernels.group_norm_silu.plan import ON_CHIP, fits_on_chip, plan
from ddpm_kernels.group_norm_silu.reference import group_norm_silu_reference

planning = importlib.import_module("ddpm_kernels.group_norm_silu.plan")
Place = Callable[[Any], Any]


@pytest.fixture(params=["slabs", "on chip"])
def division(request: pytest.FixtureRequest, small_tiles: None) -> Iterator[str]:
    """Small tiles, of a part of a sample or of all its pixels."""
    launches = importlib.import_module("ddpm_kernels.group_norm_silu.launch_forward")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "on chip":
            patch.setattr(planning, "ON_CHIP", 2**12)
            patch.setattr(planning, "NARROWEST", 4)
        planning.plan.cache_clear()
        launches._forward_launches.cache_clear()
        yield request.param
    planning.plan.cache_clear()
    launches._forward_launches.cache_clear()


def reference(dropout: Dropout | None = None, **arguments: Any) -> Tensor:
    """The specification, in the precision of the arguments."""
    arguments.pop("moments", None)
    if dropout is not None:
        arguments |= {
            "dropout_key": dropout.key, "dropout_probability": dropout.probability,
        }  # fmt: skip
    return group_norm_silu_reference(**arguments)[0]


def everywhere(arguments: Arguments, place: Place) -> Arguments:
    """The same with `place` of every tensor."""

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return place(value)
        if isinstance(value, Dropout):
            return replace(value, key=place(value.key))
        if isinstance(value, Moments):
            return replace(value, values=place(value.values))
        if isinstance(value, tuple):
            return tuple(placed(one) for one in value)
        return value

    return {k: placed(v) for k, v in arguments.items()}


def check(plain: Arguments, inside: Arguments) -> Tensor:
    """Hold y to twice the error of torch, and two ulp; returns it."""
    exact = definition(**in_float64(plain))
    y = group_norm_silu(**inside)
    assert y.dtype == plain["x"].dtype
    floor = 2 * torch.finfo(y.dtype).eps * max(1.0, largest(exact))
    assert_no_worse(y, reference(**plain), exact, floor)
    return y


# --- The forward pass


@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.integers(1, 6),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(*[st.sampled_from(["nhwc", "nchw"])] * 2),
    skip=st.floats(0, 1, exclude_max=True),
    before=st.sampled_from(["none", "rows", "expanded", "columns"]),
    drop=st.sampled_from([0.0, 0.3]),
    slab=st.sampled_from([0, 3, 50]),
    film=st.booleans(),
    activation=st.sampled_from(["silu", "none"]),
)
def test_definition(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], division: str, batch: int,
    groups: int, per_group: int, height: int, width: int, layouts: tuple[str, str], skip: float,
    **options: Any,
) -> None:  # fmt: skip
    channels = groups * per_group
    plain = with_options(
        (batch, channels, height, width), groups, skip=int(skip * channels), **options
    )
    inside = everywhere(plain, guarded)
    inside["x"] = guarded(lay_out(plain["x"], layouts[0]))
    if "skip" in plain:
        inside["skip"] = guarded(lay_out(plain["skip"], layouts[1]))
    y = check(plain, inside)
    if layouts[0] == "nhwc" and (backend.name != "reference" or "skip" not in plain):
        assert y.is_contiguous(memory_format=torch.channels_last)


# Groups of 12 over the boundary at 20; chunks of one map each; one odd channel of skip; one pixel.
@pytest.mark.parametrize(
    ("shape", "groups", "skip"),
    [((2, 48, 9, 5), 4, 28), ((1, 128, 4, 4), 32, 64), ((2, 7, 3, 5), 1, 1), ((3, 24, 1, 1), 8, 9)],
)
def test_tiles_of_the_table(
    backend: Backend, guarded: Guarded, shape: tuple[int, ...], groups: int, skip: int
) -> None:
    for dtype, film in ((torch.bfloat16, False), (torch.float32, True)):
        plain = with_options(shape, groups, dtype, skip=skip, before="rows", drop=0.1, film=film)
        check(plain, everywhere(plain, lambda tensor: guarded(lay_out_map(tensor))))


def lay_out_map(tensor: Tensor) -> Tensor:
    """Channels-last, if it is a map of numbers and not of moments."""
    return lay_out(tensor, "nhwc") if tensor.ndim == 4 and tensor.shape[2] != 3 else tensor


def test_a_vector_that_takes_a_far_mean_away(backend: Backend, division: str) -> None:
    """x + before is of order one where both are a thousand, or far from zero where x is not."""
    for of_x, of_before in ((-1000.0, 1000.0), (0.0, 1000.0), (1000.0, 0.25)):
        for slab in (0, 5):
            plain = with_options(
                (2, 12, 5, 6), 3, skip=5, before="rows", film=False, eps=1e-5, activation="none"
            )  # fmt: skip
            plain |= {k: plain[k] + of_x for k in ("x", "skip")}
            plain["before"] = plain["before"] + of_before
            if slab:
                plain["moments"] = moments_of(plain["x"], slab), moments_of(plain["skip"], slab)
            y = group_norm_silu(**everywhere(plain, lambda t: t.to(backend.device)))
            exact = definition(**in_float64(plain))
            # x + before is rounded where it is formed, by the reference.
            ulps = 16 if backend.runs_kernels else 2000
            assert_within(y, exact, ulps * torch.finfo(y.dtype).eps * largest(exact))


@ON_KERNELS
def test_kept_moments_are_what_is_normalised_by(backend: Backend, small_tiles: None) -> None:
    """No statistics are taken a second time."""
    plain = with_options((2, 12, 5, 6), 3, skip=5, film=False)
    other = plain["x"] + 1, plain["skip"] + 1
    given_ = {**plain, "moments": (moments_of(other[0], 7), moments_of(other[1], 4))}
    y = group_norm_silu(**everywhere(given_, lambda t: t.to(backend.device)))
    mean_off = {**plain, "before": torch.full((2, 12), 1.0)}
    grouped = torch.cat(other, 1).double().reshape(2, 3, -1)
    rstd = (grouped.var(2, unbiased=False) + plain["eps"]).rsqrt().repeat_interleave(4, 1)
    z = definition(**in_float64({**mean_off, "activation": "none"}))
    z = z - per_pixel(rstd * plain["weight"].double())
    assert_within(y, z * torch.sigmoid(z), 1e-5)
    alone = {**plain, "moments": (moments_of(plain["x"], 7), None)}  # of one map is not enough
    check(plain, everywhere(alone, lambda t: t.to(backend.device)))


@pytest.mark.parametrize(
    ("name", "bad", "slab"),
    [("x", float("nan"), 0), ("skip", float("inf"), 6), ("before", float("inf"), 0)],
)
def test_a_bad_sample_spoils_only_itself(
    backend: Backend, division: str, name: str, bad: float, slab: int
) -> None:
    plain = with_options((3, 12, 4, 5), 3, skip=5, before="rows", drop=0.2)
    expected = definition(**in_float64(plain))
    plain[name][1, 2] = bad
    if slab:
        plain["moments"] = moments_of(plain["x"], slab), moments_of(plain["skip"], 4)
    y = group_norm_silu(**everywhere(plain, lambda t: t.to(backend.device)))
    assert_within(y[::2], expected[::2], 1e-4)
    assert not y[1].isfinite().all()


def test_activation_of_large_numbers_in_half_precision(backend: Backend) -> None:
    """Its sigmoid is approximate; far out it is still zero or one, and nowhere NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        plain = with_options((1, 2, 16, 16), 2, dtype, film=False)
        plain["x"] = torch.linspace(-1, 1, 512).reshape(1, 2, 16, 16).to(dtype)
        for size in (1.0, 20.0, 1000.0):
            plain["weight"] = torch.full((2,), size, dtype=dtype)
            y = check(plain, everywhere(plain, lambda t: t.to(backend.device)))
            assert y.isfinite().all()


def test_dropout_that_drops_nothing(backend: Backend) -> None:
    plain = with_options((2, 6, 4, 4), 3, film=False)
    key = torch.tensor([1, 2])
    for probability in (0.0, 1e-9):
        y = group_norm_silu(
            **everywhere(
                {**plain, "dropout": Dropout(probability, key)}, lambda t: t.to(backend.device)
            )
        )
        torch.testing.assert_close(
            y, group_norm_silu(**everywhere(plain, lambda t: t.to(backend.device))), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 4}, r"10 channels cannot be normalised in 4 groups"),
        ({"skip": torch.zeros(3, 4, 5, 4).half()}, r"skip is float16 and x float32"),
        ({"skip": torch.zeros(3, 4, 5, 5)}, r"skip has shape \(3, 4, 5, 5\) and x \(3, 6, 5, 4\)"),
    ],
)
def test_errors(change: Arguments, message: str) -> None:
    plain = with_options((3, 10, 5, 4), 2, skip=4)
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**plain, **change})


# --- What is handed on, and its gradients

LEAVES = ("x", "skip", "before", "weight", "bias", "scale", "shift", "owed", "skip_owed")


def block(arguments: Arguments, function: Callable[..., Any]) -> tuple[Tensor, ...]:
    """The results and gradients of a norm, the two maps it hands on being used once more."""
    leaves = {
        k: v.detach().clone().requires_grad_()
        for k, v in arguments.items()
        if isinstance(v, Tensor) and k in LEAVES
    }
    given_ = {**arguments, **leaves}
    owed = given_.pop("owed"), given_.pop("skip_owed")
    y, x, skip = function(**given_, owed=owed)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    loss = (y * weights).sum() + (x * x).sum()
    loss = loss if skip is None else loss + (skip**3).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return y.detach(), *found


def in_parts(owed: tuple[Tensor | None, Tensor | None], **arguments: Any) -> tuple[Any, ...]:
    """`group_norm_silu_residual` in float64 by autograd: a bias that is owed is added as zero."""

    def containing(bias: Tensor | None, whole: Tensor) -> Tensor:
        return whole if bias is None else whole + (bias - bias.detach())[:, None, None]

    x, skip = containing(owed[0], arguments.pop("x")), arguments.pop("skip", None)
    skip = None if skip is None else containing(owed[1], skip)
    return definition(x, **arguments, skip=skip), x, skip


RESIDUAL: dict[str, dict[str, Any]] = {
    "two maps": {"skip": 4, "film": True},
    "one map, a vector and dropout": {"before": "rows", "drop": 0.25, "film": False},
    "everything": {"skip": 4, "before": "expanded", "drop": 0.25, "film": True},
}


def of_block(case: str, dtype: torch.dtype) -> Arguments:
    plain = with_options((2, 10, 4, 5), 2, dtype, **RESIDUAL[case])
    return {
        **{k: v for k, v in plain.items() if v is not None or k not in LEAVES},
        "scale": plain["scale"], "shift": plain["shift"],
        "owed": torch.ones(plain["x"].shape[1], dtype=dtype),
        "skip_owed": torch.ones(4, dtype=dtype) if "skip" in plain else None,
    }  # fmt: skip


@pytest.mark.parametrize("case", RESIDUAL)
def test_gradients_of_a_block(backend: Backend, case: str) -> None:
    plain = of_block(case, torch.float32)
    exact = block(in_float64(plain), in_parts)
    found = block(everywhere(plain, lambda t: t.to(backend.device)), group_norm_silu_residual)
    for got, right in zip(found, exact, strict=True):
        assert_within(got, right, 2e-5 * max(1.0, largest(right)))


@ON_OPERATIONS
def test_nothing_is_added_outside_of_the_kernels(backend: Backend) -> None:
    """A mode sees one operation each way; the gradients of what was handed on are in it."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    plain = everywhere(of_block("everything", torch.float32), lambda t: t.to(backend.device))
    expected = block(plain, group_norm_silu_residual)
    with Watched():
        found = block(plain, group_norm_silu_residual)
    assert [name for name in names if name.startswith("ddpm.")] == [
        "ddpm.group_norm_silu.default", "ddpm.group_norm_silu_backward.default",
    ]  # fmt: skip
    backward = names[names.index("ddpm.group_norm_silu_backward.default") :]
    assert not any(name.startswith("aten.add") for name in backward)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0)


@ON_OPERATIONS
def test_opcheck(backend: Backend) -> None:
    """Schemas, fakes and autograd of both operations with every option."""
    plain = everywhere(of_block("everything", torch.float32), lambda t: t.to(backend.device))
    x, skip, before = (plain[k].requires_grad_() for k in ("x", "skip", "before"))
    how = plain["dropout"]
    affine = x, 2, plain["weight"], plain["bias"], plain["scale"], plain["shift"]
    kept = moments_of(x.detach(), 7), moments_of(skip.detach(), 4)
    options = skip, before, how.key, how.probability
    known = kept[0].values.to(x), 7, kept[1].values.to(x), 4
    forward, backward = torch.ops.ddpm.group_norm_silu, torch.ops.ddpm.group_norm_silu_backward
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(
        forward.default, (*affine, 1e-5, "silu", *options, *known), test_utils=tests
    )
    y, statistics = forward(*affine, 1e-5, "silu", *options)
    same = [one.detach() for one in (y, *affine[:1], statistics, skip, before)]
    torch.library.opcheck(
        backward.default,
        (
            same[0], same[1], *affine[1:], same[2], "silu", True, same[3], same[4], *options[2:],
            same[1], same[3], True,
        ),
        test_utils=tests,
    )  # fmt: skip


@ON_COMPILERS
def test_a_block_compiles_as_one_graph(backend: Backend) -> None:
    torch._dynamo.reset()
    plain = everywhere(of_block("everything", torch.float32), lambda t: t.to(backend.device))
    compiled = torch.compile(group_norm_silu_residual, fullgraph=True, backend="aot_eager")
    for got, right in zip(
        block(plain, compiled), block(plain, group_norm_silu_residual), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_what_is_handed_on_alone(backend: Backend) -> None:
    """Where nothing is computed from y, the gradients are those of the maps."""
    plain = everywhere(of_block("two maps", torch.float32), lambda t: t.to(backend.device))
    x, owed = plain["x"].requires_grad_(), plain["owed"].requires_grad_()
    plain.pop("owed"), plain.pop("skip_owed")
    _, same, _ = group_norm_silu_residual(**plain, owed=(owed, None))
    d_x, d_owed = torch.autograd.grad(same.sum(), [x, owed])
    torch.testing.assert_close(d_x, torch.ones_like(x))
    torch.testing.assert_close(d_owed, torch.full_like(owed, 2 * 4 * 5))


@ON_OPERATIONS
@pytest.mark.parametrize("needs", ["weight", "before", "skip"])
def test_some_need_no_gradient(backend: Backend, needs: str) -> None:
    plain = with_options((2, 10, 4, 5), 2, skip=4, before="rows", drop=0.25)

    def gradient(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        leaf = arguments[needs].detach().clone().requires_grad_()
        y = function(**{**arguments, needs: leaf})
        weights = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape)
        return torch.autograd.grad((y * weights).sum(), leaf)[0]

    exact = gradient(definition, in_float64(plain))
    found = gradient(group_norm_silu, everywhere(plain, lambda t: t.to(backend.device)))
    assert_within(found, exact, 2e-5 * max(1.0, largest(exact)))


# --- The division of work


@given(
    groups=st.integers(1, 64),
    per_group=st.integers(1, 64),
    pixels=st.integers(1, 4096),
    pixel_bytes=st.sampled_from([2, 4, 8]),
)
def test_a_chunk_on_chip_holds_whole_groups_and_all_pixels(
    groups: int, per_group: int, pixels: int, pixel_bytes: int
) -> None:
    division = plan(4, groups * per_group, pixels, groups, 2048, 512, pixel_bytes)
    if not division.on_chip:
        odd = groups * per_group % 8 != 0 or per_group % 4 != 0
        assert odd or per_group > 16 or not fits_on_chip(pixels) or pixel_bytes > 4
        return
    assert division.rows * division.width * pixel_bytes <= ON_CHIP
    assert division.slabs == 1
    assert pixels <= division.rows
    assert division.chunk_groups * per_group <= division.width
    assert (division.chunks - 1) * division.chunk_groups < groups
    assert groups <= division.chunks * division.chunk_groups


def test_maps_of_the_usual_networks_fit_on_chip() -> None:
    for side in (4, 8, 16, 32):
        assert fits_on_chip(side * side)
        for channels in (128, 256, 384, 512, 768, 1024):
            division = plan(128, channels, side * side, 32, 2048, 512, 2)
            assert division.on_chip
            assert division.chunk_groups * (channels // 32) % 8 == 0  # 16 bytes
    assert not fits_on_chip(64 * 64)
