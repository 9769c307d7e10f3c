"""The forward process: against equation 4 in float64, in every precision and memory layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.comparing import (
    EPS32,
    assert_equal,
    assert_within,
    reference_noise,
    rounding,
)
from tests.kernels.conftest import Backend, Guarded
from tests.kernels.inputs import (
    FLOATS,
    LAYOUTS,
    SHAPES,
    STEPS,
    STORED,
    Arguments,
    in_float64,
    lay_out,
    of_q_sample,
    per_pixel,
)
from torch import Tensor

from ddpm_kernels import Stream, q_sample
from ddpm_kernels.tiles import TILES

PER_SAMPLE = ("images", "timesteps", "sample_ids", "flip")


def clean_and_noise(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """x_0 and ε in float64."""
    images = arguments["images"].double()
    if arguments["latent_scale"] is not None:
        mean, spread = mean_and_spread(arguments)
        noise = noise_of(arguments, mean, Stream.TRAINING_NOISE)
        x_0 = (mean + spread - arguments["latent_shift"]) * arguments["latent_scale"]
        return x_0, noise
    x_0 = (2 * images - 255) / 255 if arguments["images"].dtype == torch.uint8 else images
    if arguments["flip"] is not None:
        x_0 = torch.where(per_pixel(arguments["flip"]), x_0.flip(-1), x_0)
    return x_0, noise_of(arguments, images, Stream.TRAINING_NOISE)


def noise_of(arguments: Arguments, x_0: Tensor, stream: Stream) -> Tensor:
    """The noise of a stream for clean samples of a shape, in float64."""
    shape = (x_0.shape[1], x_0.shape[2], x_0.shape[3])
    seed = int(arguments["seed"])
    return reference_noise(seed, arguments["sample_ids"], shape, 0, stream).double()


def mean_and_spread(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Mean of a latent before scaling, and what is added to it, in float64."""
    mean, log_variance = arguments["images"].double().chunk(2, dim=1)
    noise = noise_of(arguments, mean, Stream.LATENT)
    return mean, (0.5 * log_variance).exp() * noise


def clean_is_off_by(arguments: Arguments) -> Tensor:
    """What x_0 may be off by on a kernel: an image by nothing that counts.

    A latent by four ulp of its noise, and those of its deviation: six when its exponent is rounded.
    """
    if arguments["latent_scale"] is None:
        return torch.zeros(())
    mean, spread = mean_and_spread(arguments)
    return 20 * EPS32 * (mean.abs() + spread.abs() + 1) * arguments["latent_scale"]


def check(x_t: Tensor, arguments: Arguments) -> None:
    """Hold x_t to the formula, to four ulp of its noise and one of its image."""
    x_0, noise = clean_and_noise(arguments)
    tables = (arguments["sqrt_alpha_bar"], arguments["sqrt_one_minus_alpha_bar"])
    a, s = (per_pixel(table.double()[arguments["timesteps"]]) for table in tables)
    exact = a * x_0 + s * noise
    floor = EPS32 * (4 * (s * noise).abs() + (a * x_0).abs() + 1) + a * clean_is_off_by(arguments)
    assert x_t.is_contiguous(memory_format=torch.channels_last)
    assert_within(x_t, exact, rounding(x_t, exact) + floor)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 19)),
    stored=st.sampled_from(STORED),
    result=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_formula(
    backend: Backend,
    shape: tuple[int, int, int, int],
    stored: torch.dtype,
    result: torch.dtype,
    layout: str,
    data: st.DataObject,
) -> None:
    def per_sample(values: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=shape[0], max_size=shape[0])))

    plain = of_q_sample(shape, stored)
    plain["timesteps"] = per_sample(st.integers(0, STEPS - 1))
    plain["sample_ids"] = per_sample(st.integers(0, 2**56 - 1))
    plain["flip"] = data.draw(st.one_of(st.none(), st.just(per_sample(st.booleans()))))
    plain["seed"] = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1)))
    laid_out = {**plain, "images": lay_out(plain["images"], layout)}
    x_t = q_sample(**backend.moved(laid_out), dtype=result)
    assert x_t.dtype == result
    check(x_t, plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_covered_and_nothing_else_is_touched(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], shape: tuple[int, ...]
) -> None:
    """Every pair of layout and precision with some shape."""
    at = SHAPES.index(shape)
    for i, layout in enumerate(LAYOUTS):
        plain = of_q_sample(shape, STORED[(at + i) % 4], flip=i % 2 == 0)
        inside: Arguments = {
            k: guarded(v) if isinstance(v, Tensor) else v for k, v in plain.items()
        }
        inside["images"] = guarded(lay_out(plain["images"], layout))
        check(q_sample(**inside, dtype=FLOATS[(at + i // 2) % 3]), plain)
    assert poisoned or not backend.runs_kernels


def test_float64_tables_make_a_float64_check(backend: Backend) -> None:
    plain = in_float64(of_q_sample(stored=torch.float64))
    x_t = q_sample(**backend.moved(plain), dtype=torch.float64).cpu()
    x_0, noise = clean_and_noise(plain)
    tables = (plain["sqrt_alpha_bar"], plain["sqrt_one_minus_alpha_bar"])
    a, s = (per_pixel(table[plain["timesteps"]]) for table in tables)
    torch.testing.assert_close(x_t, a * x_0 + s * noise, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_level_of_uint8(backend: Backend, layout: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    plain = {
        **of_q_sample((2, 3, 16, 16)),
        "images": lay_out(images, layout),
        "sqrt_alpha_bar": torch.ones(STEPS),
        "sqrt_one_minus_alpha_bar": torch.zeros(STEPS),
    }
    x_0 = q_sample(**backend.moved(plain))
    assert (float(x_0.min()), float(x_0.max())) == (-1, 1)
    exact = (2 * images.double() - 255) / 255
    assert_within(x_0, torch.stack([exact[0].flip(-1), exact[1]]), EPS32)


def test_layout_and_strides_do_not_change_a_bit(backend: Backend) -> None:
    for flip in (True, False):
        plain = of_q_sample((2, 3, 9, 13), flip=flip)
        expected = q_sample(**backend.moved(plain))
        for layout in LAYOUTS:
            laid_out = {**plain, "images": lay_out(plain["images"], layout)}
            assert_equal(q_sample(**backend.moved(laid_out)), expected, layout)
    strided = of_q_sample()
    for name, value in strided.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            strided[name] = torch.stack([value, value.flip(0)], dim=-1)[:, 0]
    strided["seed"] = torch.tensor([9, -5, 9])[1]
    expected = q_sample(**backend.moved(of_q_sample()))
    assert_equal(q_sample(**backend.moved(strided)), expected)


def test_images_of_one_storage(backend: Backend) -> None:
    """Views that a loader makes: slices, an offset that is not aligned, one image for all."""
    stored = lay_out(of_q_sample((3, 6, 9, 16))["images"], "nhwc").to(backend.device)
    for view in (
        stored[:, 1:4],
        stored[:, :, 2:-3, 5:-2],
        stored[..., ::3],
        stored[:, :, ::2],
        stored[::2],
        stored[1:2].expand(3, -1, -1, -1),
        stored[:, :, 3:4, 4:5].expand(-1, -1, 9, 16),
    ):
        plain = {**of_q_sample(tuple(view.shape)), "images": view.cpu().contiguous()}
        check(q_sample(**{**backend.moved(plain), "images": view}), plain)


TILE = TILES["default"]["q_sample"].elements


@pytest.mark.parametrize("count", [1, 3, TILE - 1, 2 * TILE + 6])
def test_noise_is_that_of_the_counter_map_and_stream(backend: Backend, count: int) -> None:
    ids, seed = torch.tensor([0, 2**32 - 1, 2**56 - 1]), 2**63 - 1
    for stream in (Stream.TRAINING_NOISE, Stream.AUGMENTATION_NOISE):
        given_ = {
            "images": torch.full((3, 1, 1, count), 0.7),
            "timesteps": torch.tensor([0, 1, 2]),
            "sqrt_alpha_bar": torch.zeros(3),
            "sqrt_one_minus_alpha_bar": torch.ones(3),
            "sample_ids": ids,
        }
        noise = q_sample(**backend.moved(given_), seed=seed, stream=stream)
        expected = reference_noise(seed, ids, (1, 1, count), 0, stream).double()
        assert_within(noise, expected, 4 * EPS32 * expected.abs())


def test_a_sample_does_not_depend_on_its_batch(backend: Backend) -> None:
    given_ = backend.moved(of_q_sample((4, 3, 17, 23)))
    one = {k: v[2:3] if k in PER_SAMPLE else v for k, v in given_.items()}
    assert_equal(q_sample(**one)[0], q_sample(**given_)[2])


def test_first_timestep_in_bfloat16_carries_noise(backend: Backend) -> None:
    """A table rounded to bfloat16 would add none, for sqrt(ᾱ) and one are then the same."""
    plain = of_q_sample((1, 1, 32, 32), flip=False)
    plain |= {"images": torch.zeros(1, 1, 32, 32), "timesteps": torch.tensor([0])}
    x_t = q_sample(**backend.moved(plain), dtype=torch.bfloat16)
    assert abs(float(x_t.double().std()) / 1e-2 - 1) < 0.1


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_strides_that_pass_32_bits_together(backend: Backend, dimension: int) -> None:
    """Each stride fits; twice the stride does not. Memory that is not touched is not committed."""
    far = 3 * 2**29
    shape, strides = [2, 2, 2, 2], [64, 16, 4, 1]
    shape[dimension], strides[dimension] = 3, far
    plain = of_q_sample(tuple(shape))
    storage = torch.empty(2 * far + 128, dtype=torch.uint8, device=backend.device)
    images = storage.as_strided(shape, strides).copy_(plain["images"])
    check(q_sample(**{**backend.moved(plain), "images": images}), plain)


def test_empty_batch(backend: Backend) -> None:
    assert q_sample(**backend.moved(of_q_sample((0, 3, 5, 4)))).shape == (0, 3, 5, 4)


@pytest.mark.parametrize("name", ["timesteps", "sample_ids", "flip"])
def test_one_value_for_all_samples_is_refused(name: str) -> None:
    plain = of_q_sample()
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\); it must be \(3,\)"):
        q_sample(**{**plain, name: plain[name][:1]})
