"""The forward process: against its formula in float64, in every precision and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_kernels import Stream, gaussian_noise, q_sample
from ddpm_kernels.dispatch import force_ops

T = 50
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.2, T))
LayOut = Callable[[Tensor, str], Tensor]
LAYOUTS = ("nchw", "nhwc", "columns", "view")
SHAPES = (
    ((3, 3, 5, 4), "nchw"),
    ((3, 3, 5, 4), "nhwc"),
    ((2, 1, 7, 3), "view"),
    ((1, 1, 1, 1), "columns"),
)
PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "reference": nullcontext,
    "op": force_ops,
}


def tables(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(np.sqrt(ALPHA_BAR)).to(dtype),
        torch.tensor(np.sqrt(1 - ALPHA_BAR)).to(dtype),
    )


def stored_images(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return levels.to(torch.uint8) if dtype == torch.uint8 else (levels / 127.5 - 1).to(dtype)


def expected_x_t(
    images: Tensor, timesteps: list[int], seed: int, ids: list[int], flip: list[bool] | None
) -> np.ndarray:
    """Equation 4 in float64, with the noise of the counter map."""
    x_t = np.empty(tuple(images.shape))
    for b, t in enumerate(timesteps):
        x_0 = images[b].double().numpy()
        if images.dtype == torch.uint8:
            x_0 = (2 * x_0 - 255) / 255
        if flip is not None and flip[b]:
            x_0 = x_0[:, :, ::-1]
        channels, height, width = x_0.shape
        noise = gaussian_noise(
            seed, torch.tensor(ids[b : b + 1]), (channels, height, width), 0, Stream.TRAINING_NOISE
        )
        x_t[b] = np.sqrt(ALPHA_BAR[t]) * x_0 + np.sqrt(1 - ALPHA_BAR[t]) * noise[0].double().numpy()
    return x_t


def arguments(
    shape: tuple[int, ...] = (3, 3, 5, 4), dtype: torch.dtype = torch.uint8, flip: bool = True
) -> dict[str, Any]:
    batch = shape[0]
    signal, sigma = tables()
    return {
        "images": stored_images(shape, dtype),
        "timesteps": torch.arange(batch) * 17 % T,
        "sqrt_alpha_bar": signal,
        "sqrt_one_minus_alpha_bar": sigma,
        "seed": 12,
        "sample_ids": torch.arange(batch) + 2**32,
        "flip": torch.arange(batch) % 2 == 0 if flip else None,
    }


def check(actual: Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    error = np.abs(actual.double().numpy() - expected)
    # The rounding of the result, and a few roundings of float32 on the way.
    allowed = torch.finfo(dtype).eps * np.abs(expected) / 2 + 6e-7 * (1 + np.abs(expected))
    assert bool((error <= allowed).all()), (error - allowed).max()


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.sampled_from([1, 2, 3, 5]), st.integers(1, 13), st.integers(1, 13)
    ),
    stored=st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.bfloat16]),
    result=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_formula(
    lay_out: LayOut,
    path: str,
    shape: tuple[int, int, int, int],
    stored: torch.dtype,
    result: torch.dtype,
    layout: str,
    data: st.DataObject,
) -> None:
    def per_sample(values: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(values, min_size=shape[0], max_size=shape[0]))

    timesteps = per_sample(st.integers(0, T - 1))
    ids = per_sample(st.integers(0, 2**56 - 1))
    flip = data.draw(st.one_of(st.none(), st.just(per_sample(st.booleans()))))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    images = stored_images(shape, stored)
    with PATHS[path]():
        actual = q_sample(
            lay_out(images, layout),
            torch.tensor(timesteps),
            *tables(),
            seed,
            torch.tensor(ids),
            None if flip is None else torch.tensor(flip),
            result,
        )
    assert actual.dtype == result
    assert actual.shape == shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    check(actual, expected_x_t(images, timesteps, seed, ids, flip), result)


@pytest.mark.parametrize("path", PATHS)
def test_float64_tables_make_a_float64_check(path: str) -> None:
    given_ = arguments(dtype=torch.float64, flip=False)
    given_["sqrt_alpha_bar"], given_["sqrt_one_minus_alpha_bar"] = tables(torch.float64)
    with PATHS[path]():
        actual = q_sample(**given_, dtype=torch.float64)
    timesteps, ids = given_["timesteps"].tolist(), given_["sample_ids"].tolist()
    expected = expected_x_t(given_["images"], timesteps, 12, ids, None)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("level", [0, 255])
def test_uint8_extremes_are_minus_one_and_one(level: int) -> None:
    images = torch.full((1, 1, 2, 2), level, dtype=torch.uint8)
    clean, no_noise = torch.ones(1), torch.zeros(1)
    x_0 = q_sample(images, torch.tensor([0]), clean, no_noise, 0, torch.tensor([0]))
    assert torch.equal(x_0, torch.full((1, 1, 2, 2), level / 127.5 - 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_a_bit(lay_out: LayOut, layout: str) -> None:
    given_ = arguments()
    expected = q_sample(**given_)
    given_["images"] = lay_out(given_["images"], layout)
    assert torch.equal(q_sample(**given_), expected)


def test_only_the_image_is_mirrored_and_not_its_noise() -> None:
    given_ = arguments()
    mirrored = torch.where(
        given_["flip"][:, None, None, None], given_["images"].flip(3), given_["images"]
    )
    expected = q_sample(**{**given_, "images": mirrored, "flip": None})
    assert torch.equal(q_sample(**given_), expected)


def test_first_timestep_in_bfloat16_carries_noise() -> None:
    """A table rounded to bfloat16 would add none, for sqrt(ᾱ) and one are then the same."""
    given_ = arguments((1, 1, 32, 32), dtype=torch.float32, flip=False)
    given_["images"] = torch.zeros(1, 1, 32, 32)
    x_t = q_sample(**given_, dtype=torch.bfloat16)
    assert abs(x_t.double().std().item() / np.sqrt(1 - ALPHA_BAR[0]) - 1) < 0.1


@pytest.mark.parametrize("flip", [True, False])
def test_op_and_reference_agree(flip: bool) -> None:
    given_ = arguments(flip=flip)
    expected = q_sample(**given_)
    with force_ops():
        actual = q_sample(**given_)
        seed_on_device = q_sample(**{**given_, "seed": torch.tensor(12)})
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert torch.equal(seed_on_device, actual)


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    ("stored", "result"), [(torch.uint8, torch.bfloat16), (torch.float32, torch.float32)]
)
def test_opcheck(
    lay_out: LayOut,
    shape: tuple[int, ...],
    layout: str,
    flip: bool,
    stored: torch.dtype,
    result: torch.dtype,
) -> None:
    given_ = arguments(shape, stored, flip)
    given_["images"] = lay_out(given_["images"], layout)
    given_["seed"] = torch.tensor(12)
    torch.library.opcheck(torch.ops.ddpm.q_sample.default, (*given_.values(), result))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("flip", [True, False])
def test_compiles_as_one_graph(path: str, flip: bool) -> None:
    given_ = arguments(flip=flip)
    compiled = torch.compile(q_sample, fullgraph=True, backend="aot_eager")
    with PATHS[path]():
        torch.testing.assert_close(compiled(**given_), q_sample(**given_), atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_another_stream_is_other_noise(path: str) -> None:
    images = torch.zeros(2, 3, 4, 4)
    ids = torch.tensor([7, 2**40])
    only_noise = torch.zeros(1), torch.ones(1)
    stream = Stream.AUGMENTATION_NOISE
    with PATHS[path]():
        noise = q_sample(images, torch.zeros_like(ids), *only_noise, 5, ids, stream=stream)
    assert torch.equal(noise, gaussian_noise(5, ids, (3, 4, 4), 0, stream))
    assert not torch.equal(noise, gaussian_noise(5, ids, (3, 4, 4), 0, Stream.TRAINING_NOISE))
