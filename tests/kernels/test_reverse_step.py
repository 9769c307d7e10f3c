# mypy: ignore-errors
"""One step of the reverse process: every term of the documented formula."""

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
from torch._dynamo.testing import CompileCounter

from ddpm_kernels import Column, Stream, gaussian_noise, reverse_step
from ddpm_kernels.dispatch import force_ops

ROWS = 6
PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "reference": nullcontext,
    "op": force_ops,
}
LayOut = Callable[[Tensor, str], Tensor]
LAYOUTS = ("nchw", "nhwc", "columns", "view")


def arguments(
    shape: tuple[int, ...] = (3, 2, 5, 3),
    *,
    slots: int = 0,
    guided: bool = False,
    rescale: bool = False,
    threshold: bool = False,
    learned: bool = False,
    dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    row: int = 4,
) -> dict[str, Any]:
    """Everything `reverse_step` takes, with a table of arbitrary numbers of order one."""
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    batch, channels, *pixels = shape
    output_shape = (batch, channels * (1 + learned), *pixels)
    output_dtype = output_dtype or dtype
    return {
        "x": draw(*shape).to(dtype).contiguous(memory_format=torch.channels_last),
        "output": draw(*output_shape).to(output_dtype),
        "table": draw(ROWS, Column.HISTORY + slots).to(dtype),
        "row": torch.tensor(row),
        "seed": torch.tensor(2**40 + 1),
        "sample_ids": torch.arange(batch) * 2**31,
        "unconditional": draw(*output_shape).to(output_dtype) if guided else None,
        "rescale": (0.5 + torch.rand(batch, generator=generator)).to(dtype) if rescale else None,
        "threshold": (1 + torch.rand(batch, generator=generator)).to(dtype) if threshold else None,
        "history": draw(slots, *shape).to(dtype) if slots else None,
    }


def noise_of(arguments: dict[str, Any]) -> np.ndarray:
    shape = arguments["x"].shape
    noise = gaussian_noise(
        int(arguments["seed"]),
        arguments["sample_ids"],
        (shape[1], shape[2], shape[3]),
        int(arguments["row"]),
        Stream.SAMPLER_NOISE,
    )
    return noise.double().numpy()


def expected_step(arguments: dict[str, Any], clip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The new state and the estimate of x_0, written out in numpy's float64."""
    x = arguments["x"].double().numpy()
    numbers = arguments["table"][int(arguments["row"])].double().tolist()
    c = dict(zip(Column, numbers, strict=False))
    states, estimates = [], []
    noise = noise_of(arguments)
    for b in range(len(x)):
        m = arguments["output"][b].double().numpy()
        if arguments["unconditional"] is not None:
            u = arguments["unconditional"][b].double().numpy()
            m = (1 - c[Column.GUIDANCE]) * u + c[Column.GUIDANCE] * m
        channels = x.shape[1]
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
        new = c[Column.X] * x[b] + c[Column.OUTPUT] * m + c[Column.X0] * x0 + scale * noise[b]
        if arguments["history"] is not None:
            for slot, earlier in enumerate(arguments["history"][:, b].double().numpy()):
                new = new + numbers[Column.HISTORY + slot] * earlier
        states.append(new)
        estimates.append(x0)
    return np.stack(states), np.stack(estimates)


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with a ring of their own to be written to."""
    ring = arguments["history"]
    return {**arguments, "history": None if ring is None else ring.clone()}


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.sampled_from([1, 2, 3, 5]), st.integers(1, 11), st.integers(1, 11)
    ),
    slots=st.integers(0, 3),
    guided=st.booleans(),
    rescale=st.booleans(),
    threshold=st.booleans(),
    learned=st.booleans(),
    clip=st.booleans(),
    in_place=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    row=st.integers(0, ROWS - 1),
)
def test_formula(
    lay_out: LayOut,
    path: str,
    shape: tuple[int, int, int, int],
    slots: int,
    guided: bool,
    rescale: bool,
    threshold: bool,
    learned: bool,
    clip: bool,
    in_place: bool,
    layout: str,
    row: int,
) -> None:
    given_ = arguments(
        shape, slots=slots, guided=guided, rescale=rescale, threshold=threshold, learned=learned,
        dtype=torch.float64, row=row,
    )  # fmt: skip
    expected, estimate = expected_step(given_, clip)
    before = None if given_["history"] is None else given_["history"].clone()
    for name in ("x", "output", "unconditional"):
        if given_[name] is not None:
            given_[name] = lay_out(given_[name], layout)
    with PATHS[path]():
        new = reverse_step(**given_, clip=clip, in_place=in_place)
    assert new.dtype == torch.float64
    np.testing.assert_allclose(new.numpy(), expected, rtol=1e-11, atol=1e-11)
    if before is not None:
        before[row % slots] = torch.from_numpy(estimate)
        torch.testing.assert_close(given_["history"], before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("every", [True, False])
def test_state_is_float32_whatever_the_network_runs_in(
    path: str, output_dtype: torch.dtype, every: bool
) -> None:
    given_ = arguments(
        slots=2 * every, guided=every, rescale=every, learned=every, output_dtype=output_dtype
    )
    expected, _ = expected_step(given_, clip=True)
    with PATHS[path]():
        new = reverse_step(**given_)
    assert new.dtype == torch.float32
    assert new.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(new.double().numpy(), expected, rtol=1e-5, atol=1e-5)


# --- Each argument by itself


@pytest.mark.parametrize("path", PATHS)
def test_guidance(path: str) -> None:
    given_ = arguments(guided=True)
    conditional = {**given_, "unconditional": None}
    unconditional = {**conditional, "output": given_["unconditional"]}
    with PATHS[path]():
        for scale, same_as in ((0.0, unconditional), (1.0, conditional)):
            given_["table"][:, Column.GUIDANCE] = scale
            torch.testing.assert_close(reverse_step(**given_), reverse_step(**same_as))


def test_guidance_reaches_the_predicted_variance_but_rescaling_does_not() -> None:
    given_ = arguments(guided=True, learned=True, rescale=True, dtype=torch.float64)
    given_["table"][:, [Column.X, Column.OUTPUT, Column.X0]] = 0
    given_["table"][:, Column.NOISE] = 1
    scale = reverse_step(**given_).numpy() / noise_of(given_)
    row = given_["table"][4].tolist()
    v, u = given_["output"][:, 2:], given_["unconditional"][:, 2:]
    fraction = (1 + u + row[Column.GUIDANCE] * (v - u)) / 2
    low, high = row[Column.LOG_VARIANCE_MIN], row[Column.LOG_VARIANCE_MAX]
    np.testing.assert_allclose(2 * np.log(scale), low + fraction.numpy() * (high - low), rtol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_predicted_variance_spans_its_two_bounds(path: str) -> None:
    given_ = arguments(learned=True)
    given_["table"][:, Column.NOISE] = 1
    for v, column in ((-1.0, Column.LOG_VARIANCE_MIN), (1.0, Column.LOG_VARIANCE_MAX)):
        given_["output"][:, 2:] = v
        fixed = {**given_, "output": given_["output"][:, :2], "table": given_["table"].clone()}
        fixed["table"][:, Column.NOISE] = (given_["table"][:, column] / 2).exp()
        with PATHS[path]():
            torch.testing.assert_close(reverse_step(**given_), reverse_step(**fixed))


@pytest.mark.parametrize("learned", [True, False])
def test_zero_noise_column_adds_none(learned: bool) -> None:
    given_ = arguments(learned=learned)
    given_["table"][:, Column.NOISE] = 0
    other_seed = {**given_, "seed": torch.tensor(1)}
    assert torch.equal(reverse_step(**given_), reverse_step(**other_seed))


def estimate_of(given_: dict[str, Any], clip: bool = True) -> Tensor:
    """x̂_0, read from a ring of one slot."""
    given_ = {**given_, "history": torch.zeros(1, *given_["x"].shape)}
    given_["table"] = torch.cat([given_["table"], torch.zeros(ROWS, 1)], dim=1)
    reverse_step(**given_, clip=clip)
    ring: Tensor = given_["history"]
    return ring[0]


def test_clipping() -> None:
    given_ = arguments()
    free, clipped = estimate_of(given_, clip=False), estimate_of(given_)
    assert free.abs().max() > 1
    assert torch.equal(clipped, free.clamp(-1, 1))


def test_threshold_scales_and_takes_precedence() -> None:
    given_ = arguments()
    free = estimate_of(given_, clip=False)
    largest = free.abs().amax((1, 2, 3))
    given_["threshold"] = largest
    for clip in (True, False):
        torch.testing.assert_close(
            estimate_of(given_, clip=clip), free / largest[:, None, None, None]
        )
    given_["threshold"] = torch.ones(3)
    torch.testing.assert_close(estimate_of(given_, clip=False), free.clamp(-1, 1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_history_is_a_ring(path: str, slots: int) -> None:
    """Step i leaves its x̂_0 in slot i mod K, and sees what the K steps before it left."""
    given_ = arguments(slots=slots)
    given_["history"].zero_()
    given_["table"][:, : Column.HISTORY] = 0
    given_["table"][:, Column.X0_FROM_OUTPUT] = 1
    estimates = 0.1 * torch.arange(1.0, ROWS + 1)
    with PATHS[path]():
        for i in range(ROWS):
            output = torch.full_like(given_["output"], float(estimates[i]))
            step = {**given_, "output": output, "row": torch.tensor(i)}
            new = reverse_step(**step)
            left = {j % slots: estimates[j] for j in range(i)}  # the last to write to each slot
            weights = given_["table"][i, Column.HISTORY :]
            expected = sum((float(weights[k] * value) for k, value in left.items()), 0.0)
            torch.testing.assert_close(new, torch.full_like(new, expected))
            assert given_["history"][i % slots].unique().tolist() == [float(estimates[i])]


def test_spare_history_columns_are_ignored() -> None:
    given_ = arguments(slots=3)
    fewer = {**given_, "history": given_["history"][:1].clone(), "table": given_["table"].clone()}
    expected = {**copied(fewer), "table": given_["table"][:, : Column.HISTORY + 1]}
    assert torch.equal(reverse_step(**fewer), reverse_step(**expected))


@pytest.mark.parametrize("path", PATHS)
def test_in_place_or_not(path: str) -> None:
    given_ = arguments(slots=1)
    x, before = given_["x"], given_["x"].clone()
    with PATHS[path]():
        new = reverse_step(**copied(given_))
        assert torch.equal(x, before)
        assert new.data_ptr() != x.data_ptr()
        overwritten = reverse_step(**copied(given_), in_place=True)
    assert overwritten is x
    assert torch.equal(x, new)


# --- Noise and rows


@pytest.mark.parametrize("path", PATHS)
def test_noise_is_that_of_the_row_and_the_sample(path: str) -> None:
    given_ = arguments(dtype=torch.float64)
    given_["table"].zero_()
    given_["table"][:, Column.NOISE] = 1
    with PATHS[path]():
        for row in range(ROWS):
            given_["row"] = torch.tensor(row)
            np.testing.assert_array_equal(reverse_step(**given_).numpy(), noise_of(given_))
            alone = {**given_, "sample_ids": given_["sample_ids"][2:], "x": given_["x"][2:]}
            alone["output"] = given_["output"][2:]
            assert torch.equal(reverse_step(**alone)[0], reverse_step(**given_)[2])


def test_row_is_read_when_the_step_runs() -> None:
    """One row tensor, advanced in place, walks through the table: what a captured graph does."""
    given_ = arguments(slots=2)
    row = torch.tensor(0)
    for i in range(ROWS):
        expected = reverse_step(**copied({**given_, "row": torch.tensor(i)}))
        assert torch.equal(reverse_step(**copied({**given_, "row": row})), expected)
        row += 1


@pytest.mark.parametrize("path", PATHS)
def test_one_compiled_graph_serves_every_row(path: str) -> None:
    given_ = arguments()
    counter = CompileCounter()
    compiled = torch.compile(reverse_step, fullgraph=True, backend=counter)
    with PATHS[path]():
        for i in range(ROWS):
            step = {**given_, "row": torch.tensor(i)}
            torch.testing.assert_close(compiled(**step), reverse_step(**step))
    assert counter.frame_count == 1


# --- The registered operation

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guided": True, "rescale": True},
    "threshold": {"threshold": True},
    "history": {"slots": 2},
    "learned": {"learned": True},
    "everything": {
        "guided": True, "rescale": True, "threshold": True, "slots": 3, "learned": True,
        "output_dtype": torch.bfloat16,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_op_and_reference_agree(variant: str) -> None:
    given_ = arguments(**VARIANTS[variant])
    expected, actual = copied(given_), copied(given_)
    state = reverse_step(**expected)
    with force_ops():
        torch.testing.assert_close(reverse_step(**actual), state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["history"], expected["history"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 2, 5, 3), (2, 1, 3, 7), (1, 1, 1, 1)])
def test_opcheck(variant: str, shape: tuple[int, ...]) -> None:
    given_ = arguments(shape, **VARIANTS[variant])
    torch.library.opcheck(
        torch.ops.ddpm.reverse_step_.default, (*given_.values(), variant == "plain")
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_compiles_as_one_graph(path: str, in_place: bool, variant: str) -> None:
    given_ = arguments(**VARIANTS[variant])
    expected = copied({**given_, "x": given_["x"].clone()})
    compiled = torch.compile(reverse_step, fullgraph=True, backend="aot_eager")
    with PATHS[path]():
        state = reverse_step(**expected, in_place=in_place)
        new = compiled(**given_, in_place=in_place)
    torch.testing.assert_close(new, state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given_["x"], expected["x"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given_["history"], expected["history"], rtol=1e-5, atol=1e-6)
