"""AdamW with averages and half-precision weights, and the gradient norm, on every backend."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.adamw_inputs import (
    BUFFERS,
    NUMBERS,
    REFERENCE_NUMBERS,
    SIZES,
    STATE,
    mapped,
    of_adamw_step,
)
from tests.kernels.comparing import EPS32, assert_equal, assert_no_worse, assert_within, largest
from tests.kernels.conftest import INTERPRETED, ON_KERNELS, Backend, Guarded
from tests.kernels.inputs import FLOATS, Arguments
from torch import Tensor, nn

from ddpm_kernels import adamw_step, gradient_norm
from ddpm_kernels.adamw_step.op import adamw_step_reference_, gradient_norm_reference

launch = importlib.import_module("ddpm_kernels.adamw_step.launch")
pytestmark = pytest.mark.usefixtures("small_step_tiles")


def in_float64(arguments: Arguments) -> Arguments:
    """Copies in float64; the half-precision weights keep nothing of their precision."""
    return mapped(lambda t: t.to(torch.float64, copy=True), arguments)


def check(given_: Arguments, inside: Arguments) -> None:
    """Step `inside`, a copy of `given_`: at most twice the error of the reference in float32."""
    exact, own = in_float64(given_), mapped(Tensor.clone, given_)
    for arguments in (exact, own):
        adamw_step_reference_(**arguments, **REFERENCE_NUMBERS)
    before = mapped(Tensor.clone, inside)
    adamw_step(**inside, **NUMBERS)
    for name in STATE:
        got = inside[name]
        if got is not None:
            floor = 2 * EPS32 * largest(exact[name])
            assert_no_worse(got, own[name].float(), exact[name], floor, name)
    for name in inside.keys() - set(STATE):
        for got, kept in zip(_as_list(inside[name]), _as_list(before[name]), strict=True):
            assert_equal(got, kept, name)
    touched = torch.zeros(len(given_["weights"]), dtype=torch.bool)
    for offset, gradient in zip(given_["offsets"], given_["gradients"], strict=True):
        touched[offset : offset + gradient.numel()] = True
    for name in BUFFERS:
        if inside[name] is not None:
            gaps = ~touched[: inside[name].shape[-1]].to(inside[name].device)
            assert_equal(inside[name][..., gaps], before[name][..., gaps], f"gaps of {name}")


def _as_list(value: Any) -> list[Tensor]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Tensor)]


@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 8, 127, 128, 129, 257]), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=3),
    alignment=st.sampled_from([1, 2, 4, 8]),
    averages=st.integers(0, 3),
    shadow=st.sampled_from([None, torch.float16, torch.bfloat16]),
    late=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_formula(backend: Backend, guarded: Guarded, late: list[int], **options: Any) -> None:
    given_ = of_adamw_step(**options)
    inside = mapped(guarded, given_)
    inside["gradients"] = [
        beginning_late(gradient, first, guarded)
        for gradient, first in zip(given_["gradients"], late, strict=False)
    ]
    check(given_, inside)


def beginning_late(gradient: Tensor, first: int, guarded: Guarded) -> Tensor:
    """A copy that begins `first` elements into its memory, so at any alignment."""
    if gradient.numel() == 0:
        return guarded(gradient)
    return guarded(torch.cat([gradient.new_full((first,), torch.nan), gradient]))[first:]


def test_one_gradient_of_all_weights(backend: Backend, guarded: Guarded) -> None:
    """As accumulation makes it; the half-precision weights end within it."""
    given_ = of_adamw_step([1000], [torch.float32])
    given_["shadow"] = given_["weights"][:600].bfloat16()
    check(given_, mapped(guarded, given_))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_any_layout(backend: Backend, dtype: torch.dtype) -> None:
    """A segment has the order of its gradient in memory: channels-last, transposed, a view."""
    given_ = of_adamw_step([240, 240, 240], [dtype])
    inside = mapped(lambda t: t.to(backend.device, copy=True), given_)
    first, second, third = inside["gradients"]
    within = torch.full((500,), torch.nan, dtype=dtype, device=backend.device)
    within[4:244] = third
    inside["gradients"] = [
        first.view(4, 3, 5, 4).permute(0, 3, 1, 2),
        second.view(12, 20).t(),
        within[4:244].view(2, 1, 120),
    ]
    assert inside["gradients"][0].is_contiguous(memory_format=torch.channels_last)
    check(given_, inside)
    norm = gradient_norm(inside["gradients"])
    assert_within(norm, gradient_norm_reference([g.double() for g in given_["gradients"]]), 1e-4)


class Oracle:
    """Torch's AdamW on parameters of their own, with averages, in some precision."""

    def __init__(self, given_: Arguments, dtype: torch.dtype) -> None:
        self.offsets = given_["offsets"]
        self.sizes = [g.numel() for g in given_["gradients"]]
        self.parameters = [
            nn.Parameter(part.to(dtype, copy=True)) for part in self.segments(given_["weights"])
        ]
        self.averages = [
            [p.detach().clone() for p in self.parameters] for _ in given_["ema_weights"]
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, **NUMBERS)

    def segments(self, flat: Tensor) -> list[Tensor]:
        return [flat[..., o : o + n] for o, n in zip(self.offsets, self.sizes, strict=True)]

    def step(self, gradients: Sequence[Tensor], rate: float, ema_weights: Tensor) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        for average, weight in zip(self.averages, ema_weights.tolist(), strict=True):
            for ours, theirs in zip(average, self.parameters, strict=True):
                ours.lerp_(theirs.detach(), weight)

    def state(self) -> Arguments:
        moments = [self.optimizer.state[p] for p in self.parameters]
        return {
            "weights": torch.cat([p.detach() for p in self.parameters]),
            "exp_avg": torch.cat([m["exp_avg"] for m in moments]),
            "exp_avg_sq": torch.cat([m["exp_avg_sq"] for m in moments]),
            "averages": torch.stack([torch.cat(average) for average in self.averages]),
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_hundred_steps_of_adamw(backend: Backend, dtype: torch.dtype) -> None:
    """From nothing, with a rate and averages that move, loss scales, and steps that are skipped."""
    sizes, steps = [40, 77], 50 if INTERPRETED else 200
    given_ = of_adamw_step(sizes, [torch.float32], averages=2, shadow=None)
    given_ |= {n: torch.zeros_like(given_[n]) for n in ("exp_avg", "exp_avg_sq", "step")}
    given_["averages"] = given_["weights"].expand(2, -1).clone()
    exact, own = Oracle(given_, torch.float64), Oracle(given_, torch.float32)
    inside = mapped(lambda t: t.to(backend.device, dtype, copy=True), given_)
    generator, done = torch.Generator().manual_seed(1), 0
    for step in range(steps):
        gradients = [torch.randn(size, generator=generator) for size in sizes]
        skipped, scale = step % 7 == 3, 2.0 ** (step % 5)
        inside["skip"].fill_(skipped)
        inside["gradient_scale"].fill_(scale)
        inside["learning_rate"].fill_(rate := 1e-3 * (1 + step % 3))
        inside["ema_weights"].copy_(torch.tensor([1e-3, 9 / (10 + done)]))
        scaled = [g * (torch.inf if skipped else scale) for g in gradients]
        inside["gradients"] = [g.to(backend.device, dtype) for g in scaled]
        adamw_step(**inside, **NUMBERS)
        if not skipped:
            done += 1
            for oracle in (exact, own):
                oracle.step(gradients, rate, inside["ema_weights"].cpu())
    assert float(inside["step"]) == done == (43 if INTERPRETED else 171)
    own_state = own.state()
    for name, right in exact.state().items():
        got = torch.cat(exact.segments(inside[name]), dim=-1)
        if dtype == torch.float64:
            # The rates and weights are the float32 ones for torch as well.
            assert_within(got, right, 1e-6 * EPS32 * largest(right), name)
        else:
            assert_no_worse(got, own_state[name], right, EPS32 * largest(right), name)


@pytest.mark.parametrize("skip", [1.0, -1.0, float("nan"), float("inf")])
def test_a_skipped_step_leaves_every_bit(backend: Backend, skip: float) -> None:
    given_ = of_adamw_step(averages=2, skip=skip)
    given_["gradients"][0][5], given_["gradients"][1][0] = torch.inf, torch.nan
    given_["gradient_scale"].fill_(torch.nan)
    for name in BUFFERS:  # bits that arithmetic would not keep
        given_[name].flatten()[:2] = torch.tensor([-0.0, torch.nan])
    inside = mapped(lambda t: t.to(backend.device, copy=True), given_)
    adamw_step(**inside, **NUMBERS)
    for name in STATE:
        bits = torch.int16 if inside[name].itemsize == 2 else torch.int32
        assert_equal(inside[name].view(bits), given_[name].view(bits), name)


def test_loss_scale_of_fp16(backend: Backend) -> None:
    """Gradients near the end of float16's range, whose squares are beyond it, as if unscaled."""
    given_ = of_adamw_step(SIZES, [torch.float16], scale=2**13)
    assert max(largest(g) for g in given_["gradients"]) > 2e4
    inside = mapped(lambda t: t.to(backend.device, copy=True), given_)
    check(given_, inside)
    exact = gradient_norm_reference([g.double() for g in given_["gradients"]])
    assert_within(gradient_norm(inside["gradients"]), exact, 4 * EPS32 * float(exact))


def test_an_average_of_weight_one_is_the_weights(backend: Backend) -> None:
    given_ = of_adamw_step(averages=3)
    inside = mapped(lambda t: t.to(backend.device, copy=True), given_)
    adamw_step(**inside, **NUMBERS)
    for offset, size in zip(given_["offsets"], SIZES, strict=True):
        segment = slice(offset, offset + size)
        assert_equal(inside["averages"][2, segment], inside["weights"][segment])


def test_the_first_update_is_the_rate_with_the_sign_of_the_gradient(backend: Backend) -> None:
    """Bias corrections to the last digits, where they are small and 1 − βᵗ loses most."""
    given_ = of_adamw_step(SIZES, [torch.float32])
    for name in ("weights", "exp_avg", "exp_avg_sq", "step"):
        given_[name].zero_()
    inside = mapped(lambda t: t.to(backend.device, copy=True), given_)
    adamw_step(**inside, **{**NUMBERS, "eps": 1e-30})
    for offset, gradient in zip(given_["offsets"], given_["gradients"], strict=True):
        got = inside["weights"][offset : offset + gradient.numel()]
        rate = given_["learning_rate"].double()
        assert_within(got, -rate * gradient.sign(), 4 * EPS32 * float(rate))


def test_without_momentum(backend: Backend) -> None:
    given_ = of_adamw_step()
    inside = mapped(lambda t: t.to(backend.device, copy=True), given_)
    adamw_step(**inside, **{**NUMBERS, "betas": (0.0, 0.0)})
    for offset, gradient in zip(given_["offsets"], given_["gradients"], strict=True):
        got = inside["exp_avg"][offset : offset + gradient.numel()]
        assert_within(got, gradient.double() / 2, 4 * EPS32 * largest(gradient))


# --- The norm


@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 127, 128, 129, 900]), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=3),
    programs=st.sampled_from([1, 3, 2048]),
    late=st.integers(0, 9),
)
def test_norm(
    backend: Backend,
    guarded: Guarded,
    poisoned: list[Tensor],
    sizes: list[int],
    dtypes: list[torch.dtype],
    programs: int,
    late: int,
) -> None:
    gradients = of_adamw_step(sizes, dtypes)["gradients"]
    inside = [beginning_late(gradient, late, guarded) for gradient in gradients]
    exact = gradient_norm_reference([g.double() for g in gradients])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "PROGRAMS", programs)
        got = gradient_norm(inside)
        again = gradient_norm([g.clone() for g in inside])
    assert got.shape == ()
    assert got.dtype == torch.float32
    assert_within(got, exact, 8 * EPS32 * float(exact))
    assert_equal(got, again)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_norm_of_what_is_not_finite(backend: Backend, value: float, index: int) -> None:
    gradients = [g.to(backend.device) for g in of_adamw_step()["gradients"]]
    gradients[index][-1] = value
    got = float(gradient_norm(gradients))
    assert got != got if value != value else got == torch.inf


# --- What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0, 299, 304, 436, 564]}, "the segment at 299 begins before the end"),
        ({"offsets": [0, 300, 304, 436, 570]}, "a segment ends at 577, the weights at 576"),
        ({"offsets": [0]}, "5 gradients and 1 offsets"),
        ({"exp_avg": torch.zeros(575)}, r"exp_avg is .*\[575\]"),
        ({"exp_avg_sq": torch.zeros(1152)[::2]}, "exp_avg_sq is .* strides"),
        ({"averages": torch.zeros(2, 576)}, "ema_weights is"),
        ({"averages": torch.zeros(1, 576, dtype=torch.float64)}, "averages is torch.float64"),
        ({"shadow": torch.zeros(577, dtype=torch.bfloat16)}, "M at most 576"),
        ({"shadow": torch.zeros(100, dtype=torch.bfloat16)[::2]}, "shadow has strides"),
    ],
)
def test_what_does_not_fit_is_refused(backend: Backend, change: Arguments, message: str) -> None:
    given_ = mapped(lambda t: t.to(backend.device, copy=True), of_adamw_step())
    with pytest.raises(ValueError, match=message):
        adamw_step(**given_ | backend.moved(change), **NUMBERS)


def test_gradients_with_gaps_are_refused(backend: Backend) -> None:
    given_ = mapped(lambda t: t.to(backend.device, copy=True), of_adamw_step())
    strided = torch.zeros(600, device=backend.device)[::2]
    expanded = torch.zeros(1, device=backend.device).expand(300)
    for gradient in (strided, expanded):
        given_["gradients"][0] = gradient
        for call in (
            lambda: adamw_step(**given_, **NUMBERS),
            lambda: gradient_norm(given_["gradients"]),
        ):
            with pytest.raises(ValueError, match="must follow each other in memory"):
                call()
    with pytest.raises(ValueError, match="at least one gradient"):
        gradient_norm([])


@ON_KERNELS
def test_gradients_of_other_dtypes_are_refused(backend: Backend) -> None:
    given_ = mapped(lambda t: t.to(backend.device, copy=True), of_adamw_step())
    given_["gradients"][1] = given_["gradients"][1].double()
    for call in (
        lambda: adamw_step(**given_, **NUMBERS),
        lambda: gradient_norm(given_["gradients"]),
    ):
        with pytest.raises(ValueError, match=r"a gradient is torch.float64; choose from"):
            call()
