"""One step of the reverse process: every term of the documented formula, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.comparing import (
    EPS32,
    assert_equal,
    assert_no_worse,
    assert_within,
    largest,
    reference_noise,
)
from tests.kernels.conftest import ON_COMPILERS, ON_KERNELS, Backend, Guarded
from tests.kernels.inputs import (
    FLOATS,
    LAYOUTS,
    REVERSE,
    ROWS,
    SHAPES,
    Arguments,
    copied,
    in_float64,
    lay_out,
    of_reverse_step,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ddpm_kernels import Column, Stream, reverse_step
from ddpm_kernels.reverse_step.op import reverse_step_reference_

IMAGES = ("x", "output", "unconditional", "history")
EVERYTHING = {k: v for k, v in REVERSE["everything"].items() if k != "output_dtype"}


def noise_of(arguments: Arguments) -> np.ndarray:
    _, channels, height, width = arguments["x"].shape
    noise = reference_noise(
        int(arguments["seed"]), arguments["sample_ids"], (channels, height, width),
        int(arguments["row"]), Stream.SAMPLER_NOISE,
    )  # fmt: skip
    return noise.double().numpy()


def expected_step(arguments: Arguments, clip: bool) -> tuple[Tensor, Tensor]:
    """The new state and the estimate of x_0, written out in numpy's float64."""
    x = arguments["x"].double().numpy()
    numbers = arguments["table"][int(arguments["row"])].double().tolist()
    c = dict(zip(Column, numbers, strict=False))
    states, estimates, noise = np.empty_like(x), np.empty_like(x), noise_of(arguments)
    channels = x.shape[1]
    for b in range(len(x)):
        m = arguments["output"][b].double().numpy()
        if arguments["unconditional"] is not None:
            u = arguments["unconditional"][b].double().numpy()
            m = (1 - c[Column.GUIDANCE]) * u + c[Column.GUIDANCE] * m
        scale: Any = c[Column.NOISE]
        if m.shape[0] == 2 * channels:
            low, high = np.exp(c[Column.LOG_VARIANCE_MIN]), np.exp(c[Column.LOG_VARIANCE_MAX])
            fraction = (m[channels:] + 1) / 2
            scale = scale * np.sqrt(high**fraction * low ** (1 - fraction))
        m = m[:channels]
        if arguments["rescale"] is not None:
            m = m * float(arguments["rescale"][b])
        x0 = c[Column.X0_FROM_X] * x[b] + c[Column.X0_FROM_OUTPUT] * m
        if arguments["threshold"] is not None:
            bound = float(arguments["threshold"][b])
            x0 = np.clip(x0, -bound, bound) / bound
        elif clip:
            x0 = np.clip(x0, -1, 1)
        new = c[Column.X] * x[b] + c[Column.X0] * x0 + scale * noise[b]
        if arguments["history"] is not None:
            for slot, earlier in enumerate(arguments["history"][:, b].double().numpy()):
                new = new + numbers[Column.HISTORY + slot] * earlier
        states[b], estimates[b] = new, x0
    return torch.from_numpy(states), torch.from_numpy(estimates)


def check(given_: Arguments, place: Callable[[Tensor], Tensor], clip: bool = True) -> None:
    """Step in place: at most twice the error of the reference in float32, and a few ulp."""
    exact, estimate = expected_step(given_, clip)
    own = copied(given_)
    own |= {n: own[n].float() for n in ("output", "unconditional") if own[n] is not None}
    reverse_step_reference_(**own, clip=clip)
    silent = {**given_, "table": given_["table"].clone()}
    silent["table"][:, Column.NOISE] = 0
    # The normals themselves are within 4 ulp.
    floor = 4 * EPS32 * largest(exact - expected_step(silent, clip)[0]) + EPS32 * largest(exact)

    inside: Arguments = {n: None if v is None else place(v) for n, v in given_.items()}
    before = copied(inside)
    new = reverse_step(**inside, clip=clip, in_place=True)
    assert new is inside["x"]
    assert_no_worse(new, own["x"], exact, floor, "x")
    ring = inside["history"]
    if ring is not None:
        slot = int(given_["row"]) % len(ring)
        floor = EPS32 * largest(estimate)
        assert_no_worse(ring[slot], own["history"][slot], estimate, floor, "history")
        before["history"][slot] = ring[slot]
    for name in before.keys() - {"x"}:
        assert_equal(inside[name], before[name], name)
    for name in ("x", "history"):  # what lies between the elements of a view
        if inside[name] is not None:
            page = inside[name]._base
            assert int(page.isnan().sum()) == page.numel() - inside[name].numel()


@given(
    shape=st.tuples(
        st.integers(1, 3), st.sampled_from([1, 2, 3, 5]), st.integers(1, 13), st.integers(1, 13)
    ),
    slots=st.integers(0, 3),
    guided=st.booleans(),
    rescale=st.booleans(),
    threshold=st.booleans(),
    learned=st.booleans(),
    clip=st.booleans(),
    row=st.integers(0, ROWS - 1),
    output_dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * len(IMAGES)),
)
def test_formula(
    backend: Backend,
    guarded: Guarded,
    shape: tuple[int, ...],
    clip: bool,
    layouts: tuple[str, ...],
    **options: Any,
) -> None:
    given_ = of_reverse_step(shape, **options)
    for name, layout in zip(IMAGES, layouts, strict=True):
        if given_[name] is not None:
            given_[name] = lay_out(given_[name], layout)
    check(given_, guarded, clip)


@pytest.mark.parametrize("options", [{}, REVERSE["everything"]])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(
    backend: Backend, guarded: Guarded, shape: tuple[int, ...], options: Arguments
) -> None:
    given_ = of_reverse_step(shape, **options)
    check({**given_, "output": lay_out(given_["output"], "nhwc")}, guarded)


@pytest.mark.parametrize("variant", REVERSE)
def test_float64_makes_a_float64_check(backend: Backend, variant: str) -> None:
    options = {k: v for k, v in REVERSE[variant].items() if k != "output_dtype"}
    for clip in (True, False):
        given_ = in_float64(of_reverse_step(**options))
        expected, _ = expected_step(given_, clip)
        new = reverse_step(**backend.moved(given_), clip=clip)
        torch.testing.assert_close(new.cpu(), expected, rtol=1e-11, atol=1e-11)


# --- Each argument by itself


@pytest.mark.parametrize("learned", [True, False])
def test_zero_noise_column_adds_none(backend: Backend, learned: bool) -> None:
    given_ = backend.moved(of_reverse_step(learned=learned))
    given_["table"][:, Column.NOISE] = 0
    assert_equal(reverse_step(**given_), reverse_step(**{**given_, "seed": 1}))


@pytest.mark.parametrize("slots", [1, 3])
def test_history_is_a_ring(backend: Backend, slots: int) -> None:
    """Step i leaves its x̂_0 in slot i mod K, and sees what the K steps before it left."""
    given_ = backend.moved(of_reverse_step(slots=slots))
    given_["history"].zero_()
    given_["table"][:, : Column.HISTORY] = 0
    given_["table"][:, Column.X0_FROM_OUTPUT] = 1
    estimates = [0.125 * i for i in range(1, ROWS + 1)]
    row = torch.zeros_like(given_["row"])  # advanced in place: what a captured graph does
    for i in range(ROWS):
        output = torch.full_like(given_["output"], estimates[i])
        new = reverse_step(**{**given_, "output": output, "row": row})
        left = {j % slots: estimates[j] for j in range(i)}  # the last to write to each slot
        weights = given_["table"][i, Column.HISTORY :].tolist()
        expected = sum(weights[k] * value for k, value in left.items())
        torch.testing.assert_close(new, torch.full_like(new, expected))
        assert given_["history"][i % slots].unique().tolist() == [estimates[i]]
        row += 1


def test_spare_history_columns_are_ignored(backend: Backend) -> None:
    given_ = backend.moved(of_reverse_step(slots=3))
    fewer = {**given_, "history": given_["history"][:1].clone(), "table": given_["table"].clone()}
    expected = {**copied(fewer), "table": given_["table"][:, : Column.HISTORY + 1]}
    assert_equal(reverse_step(**fewer), reverse_step(**expected))


def test_in_place_or_not(backend: Backend) -> None:
    given_ = backend.moved(of_reverse_step(slots=1))
    x, before = given_["x"], given_["x"].clone()
    new = reverse_step(**{**given_, "history": given_["history"].clone()})
    assert_equal(x, before)
    assert new.is_contiguous(memory_format=torch.channels_last)
    assert reverse_step(**given_, in_place=True) is x
    assert_equal(x, new)


# --- Noise and rows


@pytest.mark.parametrize("layout", ["nhwc", "view"])
def test_noise_is_that_of_the_row_and_the_sample(backend: Backend, layout: str) -> None:
    plain = of_reverse_step((2, 3, 17, 23))
    plain["x"] = lay_out(plain["x"], layout)
    plain["table"].zero_()[:, Column.NOISE] = 1
    for row in (0, 4):
        plain["row"] = torch.tensor(row)
        given_ = backend.moved(plain)
        new = reverse_step(**given_)
        expected = torch.from_numpy(noise_of(plain))
        assert_within(new, expected, 4 * EPS32 * expected.abs())
        alone = {**given_, **{name: given_[name][1:] for name in ("x", "output", "sample_ids")}}
        assert_equal(reverse_step(**alone)[0], new[1])


@ON_COMPILERS
def test_one_compiled_graph_serves_every_row(backend: Backend) -> None:
    torch._dynamo.reset()
    given_ = backend.moved(of_reverse_step())
    counter = CompileCounter()
    compiled = torch.compile(reverse_step, fullgraph=True, backend=counter)
    for i in range(ROWS):
        step = {**given_, "row": torch.full_like(given_["row"], i)}
        torch.testing.assert_close(compiled(**step), reverse_step(**step))
    assert counter.frame_count == 1


@pytest.mark.parametrize("threshold", [True, False])
def test_a_nan_stays_visible_and_in_its_place(backend: Backend, threshold: bool) -> None:
    given_ = backend.moved(of_reverse_step((2, 3, 5, 7), slots=1, threshold=threshold))
    given_["table"][:, Column.X] = 0  # so that it comes through the clipped x̂_0
    clean = reverse_step(**{**given_, "history": given_["history"].clone()})
    given_["output"][1, 2, 3, 4] = float("nan")
    spoilt = reverse_step(**given_)
    assert spoilt[1, 2, 3, 4].isnan()
    assert given_["history"][0, 1, 2, 3, 4].isnan()
    clean[1, 2, 3, 4] = spoilt[1, 2, 3, 4] = 0
    assert_equal(spoilt, clean)


# --- How tensors lie


@pytest.mark.parametrize("learned", [True, False])
def test_expanded_and_sliced_batches(backend: Backend, learned: bool) -> None:
    six = of_reverse_step((6, 3, 5, 4), guided=True, rescale=True, threshold=True, learned=learned)
    plain = dict(six)
    for name in ("x", "sample_ids", "rescale", "threshold"):
        plain[name] = six[name][::2]
    # Conditional and unconditional outputs of one doubled batch, and one for all.
    plain["output"] = six["output"][1::2]
    plain["unconditional"] = six["unconditional"][:1].expand(3, -1, -1, -1)
    wide = torch.full((ROWS, 2 * Column.HISTORY), float("nan"))
    wide[:, ::2] = six["table"]
    plain["table"] = wide[:, ::2]
    dense = {name: None if v is None else v.contiguous() for name, v in plain.items()}
    new = reverse_step(**backend.moved(plain))
    assert_equal(new, reverse_step(**backend.moved(dense)))


def test_empty_batch(backend: Backend) -> None:
    given_ = backend.moved(of_reverse_step((0, 3, 4, 5), **EVERYTHING))
    assert reverse_step(**given_).shape == (0, 3, 4, 5)


@ON_KERNELS
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("output", torch.zeros(2, 4, 4, 5)),
        ("output", torch.zeros(1, 3, 4, 5)),
        ("unconditional", torch.zeros(2, 3, 4, 4)),
        ("sample_ids", torch.arange(1)),
        ("rescale", torch.ones(1)),
        ("threshold", torch.ones(2, 1)),
        ("history", torch.zeros(3, 2, 3, 4, 4)),
        ("history", torch.zeros(0, 2, 3, 4, 5)),
        ("history", torch.zeros(3, 2, 3, 4, 5, dtype=torch.float64)),
        ("table", torch.zeros(ROWS, Column.HISTORY + 2)),
    ],
)
def test_shapes_that_would_be_read_past_their_end(
    backend: Backend, name: str, wrong: Tensor
) -> None:
    given_ = {**of_reverse_step((2, 3, 4, 5), slots=3), name: wrong}
    with pytest.raises(ValueError, match=name):
        reverse_step(**backend.moved(given_))
