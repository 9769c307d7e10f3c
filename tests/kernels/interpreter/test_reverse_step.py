# mypy: ignore-errors
"""The Triton kernel of `reverse_step`, run by Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_kernels import Column, Stream, gaussian_noise, reverse_step

# The package exports the function under its module's name.
module: Any = sys.modules["ddpm_kernels.reverse_step"]

ROWS = 5
ULP = 2.0**-23
TENSORS = ("x", "output", "unconditional", "history")
LAYOUTS = ("nchw", "nhwc", "columns", "view")
Guarded = Callable[[Tensor], Tensor]
LayOut = Callable[[Tensor, str], Tensor]

EVERYTHING: dict[str, Any] = {
    "slots": 3, "guided": True, "rescale": True, "threshold": True, "learned": True,
}  # fmt: skip


def arguments(
    shape: tuple[int, ...],
    *,
    slots: int = 0,
    guided: bool = False,
    rescale: bool = False,
    threshold: bool = False,
    learned: bool = False,
    output_dtype: torch.dtype = torch.float32,
    row: int = 3,
) -> dict[str, Any]:
    """What `reverse_step` takes, without `clip`, with a table of numbers of order one."""
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    batch, channels, *pixels = shape
    output = (batch, channels * (1 + learned), *pixels)
    return {
        "x": draw(*shape).contiguous(memory_format=torch.channels_last),
        "output": draw(*output).to(output_dtype),
        "table": draw(ROWS, Column.HISTORY + slots),
        "row": torch.tensor(row),
        "seed": torch.tensor(-(2**40) - 5),
        "sample_ids": torch.arange(batch) * (2**33 + 1) + 3,
        "unconditional": draw(*output).to(output_dtype) if guided else None,
        "rescale": 0.5 + torch.rand(batch, generator=generator) if rescale else None,
        "threshold": 1 + torch.rand(batch, generator=generator) if threshold else None,
        "history": draw(slots, *shape) if slots else None,
    }


def by_reference(
    given_: dict[str, Any], dtype: torch.dtype, clip: bool
) -> tuple[Tensor, Tensor | None]:
    """The new state and ring of the reference in a precision; `given_` stays as it is."""
    own = {
        name: value.to(dtype, copy=True)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in given_.items()
    }
    module.reverse_step_reference_(**own, clip=clip)
    return own["x"], own["history"]


def assert_as_exact(actual: Tensor, reference: Tensor, exact: Tensor, floor: float) -> None:
    """At most twice the error of the reference in float32, and an ulp; everywhere written."""
    own = (actual.double() - exact).abs().max()
    allowed = 2 * (reference.double() - exact).abs().max() + ULP * exact.abs().max() + floor
    assert own <= allowed, f"error {own:.3g}, allowed {allowed:.3g}"


def check(given_: dict[str, Any], clip: bool = True) -> None:
    """Run the kernel in place and compare with the reference in float32 and float64."""
    exact, exact_ring = by_reference(given_, torch.float64, clip)
    reference, reference_ring = by_reference(given_, torch.float32, clip)
    silent = {**given_, "table": given_["table"].clone()}
    silent["table"][:, Column.NOISE] = 0
    # The normals themselves are within 4 ulp.
    floor = 4 * ULP * float((exact - by_reference(silent, torch.float64, clip)[0]).abs().max())
    before = {name: None if t is None else t.clone() for name, t in given_.items()}

    new = reverse_step(**given_, clip=clip, in_place=True)

    assert new is given_["x"]
    assert_as_exact(new, reference, exact, floor)
    for name, value in before.items():
        if name not in ("x", "history") and value is not None:
            assert torch.equal(given_[name], value), f"{name} changed"
    ring = given_["history"]
    if ring is not None:
        assert before["history"] is not None
        assert exact_ring is not None
        assert reference_ring is not None
        written = int(given_["row"]) % len(ring)
        assert_as_exact(ring[written], reference_ring[written], exact_ring[written], 0.0)
        kept = [slot for slot in range(len(ring)) if slot != written]
        assert torch.equal(ring[kept], before["history"][kept])


def place(given_: dict[str, Any], guarded: Guarded) -> dict[str, Any]:
    """Every tensor between guard pages."""
    return {name: None if t is None else guarded(t) for name, t in given_.items()}


def assert_gaps_untouched(tensor: Tensor) -> None:
    """All of a guarded tensor's memory that is not the tensor is still NaN."""
    assert tensor._base is not None
    assert int(tensor._base.isnan().sum()) == tensor._base.numel() - tensor.numel()


def ring_of(ring: Tensor, layout: str) -> Tensor:
    """The same ring, each slot in a layout."""
    if layout == "nhwc":
        return ring.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "columns":
        return ring.transpose(3, 4).contiguous().transpose(3, 4)
    if layout == "view":
        larger = ring.new_zeros(*ring.shape[:-1], 2 * ring.shape[-1])
        larger[..., ::2] = ring
        return larger[..., ::2]
    return ring


# --- The formula, at every shape, dtype, layout and choice of arguments


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
    output_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * len(TENSORS)),
)
def test_formula(
    guarded: Guarded,
    lay_out: LayOut,
    shape: tuple[int, ...],
    row: int,
    clip: bool,
    layouts: tuple[str, ...],
    **options: Any,
) -> None:
    given_ = arguments(shape, row=row, **options)
    for name, layout in zip(TENSORS, layouts, strict=True):
        if name == "history" and given_[name] is not None:
            given_[name] = ring_of(given_[name], layout)
        elif given_[name] is not None:
            given_[name] = lay_out(given_[name], layout)
    given_ = place(given_, guarded)
    check(given_, clip)
    assert_gaps_untouched(given_["x"])
    if given_["history"] is not None:
        assert_gaps_untouched(given_["history"])


@pytest.mark.parametrize("options", [{}, {"output_dtype": torch.bfloat16, **EVERYTHING}])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 3, 1, 1),
        (1, 1, 1, 127),
        (1, 2, 8, 8),  # exactly the small tile
        (2, 1, 1, 129),  # the large tile from here on
        (2, 1, 32, 32),  # exactly the large tile
        (1, 1, 25, 41),  # one more
        (3, 3, 19, 37),  # three tiles of each sample, the last in part
    ],
)
def test_tiles(
    guarded: Guarded, lay_out: LayOut, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    given_ = arguments(shape, **options)
    given_["output"] = lay_out(given_["output"], "nhwc")
    check(place(given_, guarded))


@pytest.mark.parametrize("learned", [True, False])
def test_expanded_and_sliced_batches(learned: bool) -> None:
    given_ = arguments((6, 3, 5, 4), guided=True, rescale=True, threshold=True, learned=learned)
    for name in ("x", "sample_ids", "rescale", "threshold"):
        given_[name] = given_[name][::2]
    given_["output"] = given_["output"][1::2]
    given_["unconditional"] = given_["unconditional"][:1].expand(3, -1, -1, -1)
    wide = torch.full((ROWS, 2 * Column.HISTORY), float("nan"))
    wide[:, ::2] = given_["table"]
    given_["table"] = wide[:, ::2]
    check(given_)


def test_the_output_may_be_a_part_of_a_larger_one() -> None:
    """Conditional and unconditional halves of one doubled batch."""
    given_ = arguments((2, 2, 3, 5), guided=True)
    both = torch.cat([given_["output"], given_["unconditional"]])
    given_["output"], given_["unconditional"] = both.chunk(2)
    check(given_)


def test_state_may_be_left_as_it_is() -> None:
    given_ = arguments((2, 3, 4, 5))
    before = given_["x"].clone()
    new = reverse_step(**given_)
    assert torch.equal(given_["x"], before)
    assert torch.equal(new, reverse_step(**given_, in_place=True))


def test_empty_batch() -> None:
    given_ = arguments((0, 3, 4, 5), **EVERYTHING)
    assert reverse_step(**given_).shape == (0, 3, 4, 5)


# --- Noise


@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize("layout", ["nhwc", "view"])
def test_noise_is_that_of_the_row_and_the_sample(lay_out: LayOut, layout: str, row: int) -> None:
    given_ = arguments((2, 3, 17, 23), row=row)
    given_["x"] = lay_out(given_["x"], layout)
    given_["table"].zero_()
    given_["table"][row, Column.NOISE] = 1
    noise = gaussian_noise(
        given_["seed"], given_["sample_ids"], (3, 17, 23), row, Stream.SAMPLER_NOISE
    ).numpy()
    new = reverse_step(**given_, in_place=True).numpy()
    assert (np.abs(new - noise) <= 4 * np.spacing(np.abs(noise))).all()


@pytest.mark.parametrize("learned", [True, False])
def test_zero_noise_column_adds_none(learned: bool) -> None:
    given_ = arguments((2, 3, 4, 5), learned=learned)
    noisy = reverse_step(**given_)
    given_["table"][:, Column.NOISE] = 0
    other_seed = {**given_, "seed": torch.tensor(1)}
    silent = reverse_step(**given_)
    assert torch.equal(silent, reverse_step(**other_seed))
    assert not torch.equal(silent, noisy)
    check(given_)


def test_row_is_read_when_the_kernel_runs() -> None:
    """One row tensor, advanced in place, walks through the table: what a captured graph does."""
    given_ = arguments((2, 2, 3, 3), slots=2)
    row = torch.tensor(0)
    for i in range(ROWS):
        expected, _ = by_reference({**given_, "row": torch.tensor(i)}, torch.float32, True)
        ring = given_["history"].clone()
        new = reverse_step(**{**given_, "row": row, "history": ring})
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)
        changed = (ring != given_["history"]).flatten(1).any(1).tolist()
        assert changed == [slot == i % 2 for slot in range(2)]
        row += 1


# --- Values that are not numbers


@pytest.mark.parametrize("threshold", [True, False])
def test_a_nan_stays_visible_and_in_its_place(threshold: bool) -> None:
    given_ = arguments((2, 3, 5, 7), slots=1, threshold=threshold)
    given_["table"][:, [Column.X, Column.OUTPUT]] = 0  # so that it comes through the clipped x̂_0
    clean = reverse_step(**{**given_, "history": given_["history"].clone()})
    given_["output"][1, 2, 3, 4] = float("nan")
    spoilt = reverse_step(**given_)
    assert spoilt[1, 2, 3, 4].isnan()
    assert given_["history"][0, 1, 2, 3, 4].isnan()
    clean[1, 2, 3, 4] = spoilt[1, 2, 3, 4] = 0
    assert torch.equal(clean, spoilt)


# --- What the launcher decides


def test_float64_takes_the_reference() -> None:
    given_ = arguments((2, 3, 4, 5), slots=2)
    given_ = {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in given_.items()
    }
    expected, _ = by_reference(given_, torch.float64, True)
    assert torch.equal(reverse_step(**given_), expected)


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *_: Any, **constants: Any) -> None:
        self.constants = constants


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(module, "_reverse_step_kernel", recorder)
    return recorder


def launch_on_meta(x: Tensor, output: Tensor) -> None:
    """Launch at sizes no test could allocate."""
    ids, scalar = (torch.empty(n, dtype=torch.int64, device="meta") for n in (len(x), ()))
    table = torch.empty(ROWS, Column.HISTORY, device="meta")
    module._launch(x, output, table, scalar, scalar, ids, None, None, None, None, True)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "output", "wide"),
    [
        (meta(70000, 3, 128, 128), meta(70000, 3, 128, 128), False),  # only the batch is large
        (meta(1, 1, 2**15, 2**16), meta(1, 1, 2**15, 2**16), True),
        (meta(1, 1, 1, 2**31 - 1100), meta(1, 1, 1, 2**31 - 1100), False),
        (meta(1, 1, 1, 2**31 - 1000), meta(1, 1, 1, 2**31 - 1000), True),  # the tile passes 2³¹
        (meta(1, 2, 2**14, 2**15), meta(1, 4, 2**14, 2**15), True),
        (meta(1, 2, 3, 3), meta(1, 2, 3, 2**30)[..., :3], True),
    ],
)
def test_offsets_are_wide_where_they_must_be(
    recorder: Recorder, x: Tensor, output: Tensor, wide: bool
) -> None:
    launch_on_meta(x, output)
    assert recorder.constants["WIDE"] == wide
    tiles = -(-x[0].numel() // recorder.constants["TILE"])
    assert recorder.grid == (tiles * len(x),)


def test_nothing_is_launched_for_an_empty_batch(recorder: Recorder) -> None:
    launch_on_meta(meta(0, 3, 4, 4), meta(0, 3, 4, 4))
    assert not hasattr(recorder, "grid")


def test_wide_offsets(monkeypatch: pytest.MonkeyPatch, lay_out: LayOut) -> None:
    monkeypatch.setattr(module, "_span", lambda _: 2**31)
    for layout in LAYOUTS:
        given_ = arguments((2, 3, 11, 13), **EVERYTHING)
        for name in ("x", "output", "unconditional"):
            given_[name] = lay_out(given_[name], layout)
        check(given_)


@pytest.mark.parametrize(
    ("tensor", "channels", "expected"),
    [
        (meta(2, 3, 4, 5), 3, "dense"),
        (meta(2, 6, 4, 5), 3, "pixels"),
        (meta(2, 6, 4, 5)[:, 3:], 3, "pixels"),
        (meta(2, 6, 4, 5)[:, ::2], 3, "pixels"),
        (torch.empty(2, 3, 4, 5, device="meta"), 3, "pixels"),
        (torch.empty(2, 1, 4, 5, device="meta"), 1, "dense"),
        (meta(2, 3, 4, 5).transpose(2, 3), 3, "strided"),
        (meta(2, 3, 4, 5)[..., :4], 3, "strided"),
        (meta(2, 3, 4, 5)[..., ::2, :], 3, "strided"),
        (meta(4, 3, 4, 5)[::2], 3, "dense"),
        (meta(2, 6, 1, 1), 3, "dense"),
        (meta(2, 3, 1, 5)[..., ::2], 3, "pixels"),
    ],
)
def test_layout(tensor: Tensor, channels: int, expected: str) -> None:
    assert module._layout(tensor, channels) == expected


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
def test_shapes_that_would_be_read_beyond_their_end(name: str, wrong: Tensor) -> None:
    given_ = {**arguments((2, 3, 4, 5), slots=3), name: wrong}
    with pytest.raises(ValueError, match=name):
        reverse_step(**given_)


def test_opcheck() -> None:
    given_ = arguments((2, 3, 5, 3), output_dtype=torch.float16, **EVERYTHING)
    torch.library.opcheck(torch.ops.ddpm.reverse_step_.default, (*given_.values(), True))
