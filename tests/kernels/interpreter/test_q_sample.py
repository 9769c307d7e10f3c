# mypy: ignore-errors
"""The kernel of the forward process, against its reference in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_kernels import Stream, gaussian_noise, q_sample
from ddpm_kernels.q_sample import launch_q_sample, q_sample_reference, training_noise
from ddpm_kernels.tiles import TILES

T = 50
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.2, T, dtype=torch.float64), 0)
SIGNAL, SIGMA = ALPHA_BAR.sqrt().float(), (1 - ALPHA_BAR).sqrt().float()
EPS32 = torch.finfo(torch.float32).eps

LayOut = Callable[[Tensor, str], Tensor]
Guarded = Callable[[Tensor], Tensor]
LAYOUTS = ("nchw", "nhwc", "columns", "view")
STORED = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)
RESULTS = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = (
    (torch.uint8, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float16),
)
# One pixel and one channel, primes, whole tiles, one element more or less than a tile.
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (3, 1, 7, 13),
    (2, 3, 17, 23),
    (1, 4, 16, 16),
    (1, 1, 11, 93),
    (1, 5, 5, 41),
    (2, 2, 32, 33),
)


def given_images(shape: tuple[int, ...], stored: torch.dtype) -> dict[str, Any]:
    batch = shape[0]
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(batch))
    return {
        "images": levels.to(torch.uint8)
        if stored == torch.uint8
        else (levels / 127.5 - 1).to(stored),
        "timesteps": (torch.arange(batch) * 17 + 3) % T,
        "sqrt_alpha_bar": SIGNAL,
        "sqrt_one_minus_alpha_bar": SIGMA,
        "seed": torch.tensor(-5),
        "sample_ids": torch.arange(batch) + 2**33 - 1,
        "flip": torch.arange(batch) % 2 == 0,
    }


def check(x_t: Tensor, arguments: dict[str, Any]) -> None:
    """At most twice as far from the formula as the reference, but for the noise's own 4 ulp."""
    signal, sigma = (
        arguments[name].double() for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    )
    in_float64 = {**arguments, "sqrt_alpha_bar": signal, "sqrt_one_minus_alpha_bar": sigma}
    exact = q_sample_reference(**in_float64, dtype=torch.float64)
    reference = q_sample_reference(**arguments, dtype=torch.float32)
    noise = training_noise(
        arguments["images"], arguments["seed"], arguments["sample_ids"], torch.float64
    )
    scaled = sigma[arguments["timesteps"]][:, None, None, None] * noise.abs()
    allowed = 2 * (reference.double() - exact).abs().max() + 4 * EPS32 * scaled + EPS32
    if x_t.dtype != torch.float32:
        # The interpreter truncates to bfloat16, which a GPU rounds.
        ulps = 1.0 if x_t.dtype == torch.bfloat16 else 0.5
        allowed = allowed + ulps * torch.finfo(x_t.dtype).eps * exact.abs()
    assert bool(x_t.isfinite().all())
    excess = (x_t.double() - exact).abs() - allowed
    assert bool((excess <= 0).all()), excess.max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stored", "result"), PAIRS)
def test_every_layout_and_precision(
    lay_out: LayOut, shape: tuple[int, ...], layout: str, stored: torch.dtype, result: torch.dtype
) -> None:
    plain = given_images(shape, stored)
    laid_out = {**plain, "images": lay_out(plain["images"], layout)}
    x_t = q_sample(**laid_out, dtype=result)
    assert x_t.dtype == result
    assert x_t.is_contiguous(memory_format=torch.channels_last)
    check(x_t, plain)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 19)),
    stored=st.sampled_from(STORED),
    result=st.sampled_from(RESULTS),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_any_arguments(
    lay_out: LayOut,
    shape: tuple[int, int, int, int],
    stored: torch.dtype,
    result: torch.dtype,
    layout: str,
    data: st.DataObject,
) -> None:
    def per_sample(values: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=shape[0], max_size=shape[0])))

    plain = given_images(shape, stored)
    plain["timesteps"] = per_sample(st.integers(0, T - 1))
    plain["sample_ids"] = per_sample(st.integers(0, 2**56 - 1))
    plain["flip"] = data.draw(st.one_of(st.none(), st.just(per_sample(st.booleans()))))
    plain["seed"] = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1)))
    x_t = q_sample(**{**plain, "images": lay_out(plain["images"], layout)}, dtype=result)
    assert x_t.dtype == result
    check(x_t, plain)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 3, 17, 23), (3, 1, 7, 13), (1, 4, 16, 16), (1, 1, 1, 1)])
def test_stays_inside_its_tensors_and_writes_every_element(
    lay_out: LayOut, guarded: Guarded, shape: tuple[int, ...], layout: str, flip: bool
) -> None:
    plain = given_images(shape, torch.float32)
    if not flip:
        plain["flip"] = None
    out = guarded(lay_out(torch.full(shape, float("nan")), "nhwc"))
    launch_q_sample(
        out,
        guarded(lay_out(plain["images"], layout)),
        guarded(plain["timesteps"]),
        guarded(plain["sqrt_alpha_bar"]),
        guarded(plain["sqrt_one_minus_alpha_bar"]),
        guarded(plain["seed"]),
        guarded(plain["sample_ids"]),
        guarded(plain["flip"].to(torch.uint8)).view(torch.bool) if flip else None,
    )
    check(out, plain)


def test_images_of_one_storage(lay_out: LayOut) -> None:
    """Views that a loader makes: slices, an offset that is not aligned, one image for all."""
    wide = given_images((3, 6, 17, 40), torch.uint8)
    stored = lay_out(wide["images"], "nhwc")
    views = {
        "channels": stored[:, 1:4],
        "crop": stored[:, :, 2:-3, 5:-2],
        "columns": stored[..., ::3],
        "rows": stored[:, :, ::2],
        "batch": stored[::2],
        "one for all": stored[1:2].expand(3, -1, -1, -1),
        "one pixel for all": stored[:, :, 3:4, 4:5].expand(-1, -1, 17, 40),
    }
    for name, view in views.items():
        plain = {**given_images(tuple(view.shape), torch.uint8), "images": view.contiguous()}
        try:
            check(q_sample(**{**plain, "images": view}), plain)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flip", [True, False])
def test_layout_does_not_change_a_bit(lay_out: LayOut, layout: str, flip: bool) -> None:
    plain = given_images((2, 3, 17, 23), torch.uint8)
    if not flip:
        plain["flip"] = None
    laid_out = lay_out(plain["images"], layout)
    assert torch.equal(q_sample(**{**plain, "images": laid_out}), q_sample(**plain))


TILE = TILES["default"]["q_sample"].elements


@pytest.mark.parametrize("stream", [Stream.TRAINING_NOISE, Stream.AUGMENTATION_NOISE])
@pytest.mark.parametrize("count", [1, 3, 4, TILE - 1, TILE, TILE + 1, 2 * TILE + 6])
def test_noise_is_that_of_the_counter_map(count: int, stream: Stream) -> None:
    ids, seed = torch.tensor([0, 2**32 - 1, 2**56 - 1]), 2**63 - 1
    noise = q_sample(
        torch.full((3, 1, 1, count), 7.0), torch.tensor([0, 1, 2]),
        torch.zeros(3), torch.ones(3), seed, ids, stream=stream,
    )  # fmt: skip
    expected = gaussian_noise(seed, ids, (1, 1, count), 0, stream)
    assert bool(((noise - expected).abs() <= 4 * EPS32 * expected.abs()).all())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_level_of_uint8(lay_out: LayOut, layout: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x_0 = q_sample(
        lay_out(images, layout), torch.tensor([0, 0]), torch.ones(1), torch.zeros(1), 0,
        torch.tensor([0, 1]), torch.tensor([True, False]),
    )  # fmt: skip
    exact = (2 * images.double() - 255) / 255
    assert x_0.min() == -1
    assert x_0.max() == 1
    error = (x_0.double() - torch.stack([exact[0].flip(-1), exact[1]])).abs()
    assert error.max() < EPS32


def test_a_sample_does_not_depend_on_its_batch() -> None:
    plain = given_images((4, 3, 17, 23), torch.uint8)
    x_t = q_sample(**plain)
    per_sample = ("images", "timesteps", "sample_ids", "flip")
    one = q_sample(**{k: v[2:3] if k in per_sample else v for k, v in plain.items()})
    assert torch.equal(one[0], x_t[2])


def test_arguments_of_any_strides() -> None:
    plain = given_images((3, 3, 5, 4), torch.uint8)
    strided = dict(plain)
    for name in ("timesteps", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "sample_ids", "flip"):
        strided[name] = torch.stack([plain[name], plain[name].flip(0)], dim=-1)[:, 0]
    strided["seed"] = torch.tensor([9, -5, 9])[1]
    assert torch.equal(q_sample(**strided), q_sample(**plain))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_64_bit_indices_make_the_same_result(
    lay_out: LayOut, monkeypatch: pytest.MonkeyPatch, layout: str, flip: bool
) -> None:
    plain = given_images((2, 3, 17, 23), torch.uint8)
    plain["images"] = lay_out(plain["images"], layout)
    if not flip:
        plain["flip"] = None
    expected = q_sample(**plain)
    monkeypatch.setattr(sys.modules["ddpm_kernels.q_sample"], "INDEX_LIMIT", 0)
    assert torch.equal(q_sample(**plain), expected)


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_strides_that_pass_32_bits_together(dimension: int) -> None:
    """Each stride fits; twice the stride does not. Memory that is not touched is not committed."""
    far = 3 * 2**29
    shape, strides = [2, 2, 2, 2], [64, 16, 4, 1]
    shape[dimension], strides[dimension] = 3, far
    storage = torch.empty(2 * far + 128, dtype=torch.uint8)
    plain = given_images(tuple(shape), torch.uint8)
    images = storage.as_strided(shape, strides)
    images.copy_(plain["images"])
    check(q_sample(**{**plain, "images": images}), plain)


def test_empty_batch() -> None:
    assert q_sample(**given_images((0, 3, 5, 4), torch.uint8)).shape == (0, 3, 5, 4)


@pytest.mark.parametrize("name", ["timesteps", "sample_ids", "flip"])
def test_one_value_for_all_samples_is_refused(name: str) -> None:
    plain = given_images((3, 3, 5, 4), torch.uint8)
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\); it must be \(3,\)"):
        q_sample(**{**plain, name: plain[name][:1]})


def test_float64_tables_keep_float64() -> None:
    plain = given_images((2, 3, 5, 4), torch.uint8)
    plain["sqrt_alpha_bar"], plain["sqrt_one_minus_alpha_bar"] = SIGNAL.double(), SIGMA.double()
    expected = q_sample_reference(**plain, dtype=torch.float64)
    assert torch.equal(q_sample(**plain, dtype=torch.float64), expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_opcheck(lay_out: LayOut, layout: str) -> None:
    plain = given_images((2, 3, 5, 4), torch.uint8)
    plain["images"] = lay_out(plain["images"], layout)
    torch.library.opcheck(torch.ops.ddpm.q_sample.default, (*plain.values(), torch.bfloat16))
