# mypy: ignore-errors
"""The kernels of the training loss, against their reference in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_kernels import Stream, denoising_loss, gaussian_noise, q_sample
from ddpm_kernels.denoising_loss import (
    TARGETS,
    denoising_loss_reference,
    launch_denoising_loss,
    tile_of_loss,
)
from ddpm_kernels.q_sample import clean_images, training_noise
from ddpm_kernels.tiles import Tile, trying

T = 50
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.2, T, dtype=torch.float64), 0)
SIGNAL, SIGMA = ALPHA_BAR.sqrt().float(), (1 - ALPHA_BAR).sqrt().float()
EPS32 = torch.finfo(torch.float32).eps

LayOut = Callable[[Tensor, str], Tensor]
Guarded = Callable[[Tensor], Tensor]
LAYOUTS = ("nchw", "nhwc", "columns", "view")
STORED = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)
PREDICTED = (torch.float32, torch.float16, torch.bfloat16)
# One pixel and one channel, primes, whole tiles, one element more or less than a tile.
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (3, 1, 7, 13),
    (2, 3, 17, 23),
    (1, 4, 16, 16),
    (1, 1, 11, 93),
    (1, 5, 5, 41),
)


def given_prediction(
    shape: tuple[int, ...], predicted: torch.dtype = torch.float32, stored: torch.dtype = STORED[0]
) -> dict[str, Any]:
    batch, generator = shape[0], torch.Generator().manual_seed(shape[0])
    levels = torch.randint(0, 256, shape, generator=generator)
    return {
        "prediction": torch.randn(shape, generator=generator).to(predicted),
        "images": levels.to(torch.uint8)
        if stored == torch.uint8
        else (levels / 127.5 - 1).to(stored),
        "timesteps": (torch.arange(batch) * 17 + 3) % T,
        "sqrt_alpha_bar": SIGNAL,
        "sqrt_one_minus_alpha_bar": SIGMA,
        "seed": torch.tensor(-5),
        "sample_ids": torch.arange(batch) + 2**33 - 1,
        "weights": torch.arange(batch) + 0.5,
        "flip": torch.arange(batch) % 2 == 0,
        "bound_table": None,
        "bound_weights": None,
    }


def given_learned_variance(
    shape: tuple[int, ...], predicted: torch.dtype = torch.float32, stored: torch.dtype = STORED[0]
) -> dict[str, Any]:
    """A prediction of twice the channels; the first sample is at t = 0 and has outermost bins."""
    batch, channels, *pixels = shape
    plain = given_prediction(shape, predicted, stored)
    generator = torch.Generator().manual_seed(batch)
    plain["images"][:, :, ::2] = 0 if stored == torch.uint8 else -1
    plain["images"][:, :, 1::3] = 255 if stored == torch.uint8 else 1
    before = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BAR[:-1]])
    beta = 1 - ALPHA_BAR / before
    variance = (beta * (1 - before) / (1 - ALPHA_BAR))[[1, *range(1, T)]]
    mean_from_error = -beta / (1 - beta).sqrt() / (1 - ALPHA_BAR).sqrt()
    return {
        **plain,
        "prediction": torch.randn((batch, 2 * channels, *pixels), generator=generator).to(
            predicted
        ),
        "timesteps": torch.arange(batch) * 17 % T,
        "bound_table": torch.stack([variance.log(), beta.log(), mean_from_error], 1).float(),
        "bound_weights": torch.arange(batch) + 1.5,
    }


def run_op(arguments: dict[str, Any], target: str) -> tuple[Tensor, Tensor]:
    loss, error = torch.ops.ddpm.denoising_loss(*arguments.values(), target)
    return loss, error


def truth(arguments: dict[str, Any], target: str, dtype: torch.dtype) -> Tensor:
    """The target, in some precision."""
    x_0 = clean_images(arguments["images"], arguments["flip"], dtype)
    if target == "x0":
        return x_0
    noise = training_noise(x_0, arguments["seed"], arguments["sample_ids"], dtype)
    if target == "eps":
        return noise
    signal, sigma = (
        arguments[name].to(dtype)[arguments["timesteps"]][:, None, None, None]
        for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    )
    return signal * noise - sigma * x_0


def check(loss: Tensor, error: Tensor, arguments: dict[str, Any], target: str) -> None:
    """At most twice as far from the formulas as the reference, but for the noise's own 4 ulp."""
    names = ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    prediction = arguments["prediction"][:, : arguments["images"].shape[1]]
    in_float64 = {**arguments, **{name: arguments[name].double() for name in names}}
    exact = prediction.double() - truth(arguments, target, torch.float64)
    single = prediction.float() - truth(arguments, target, torch.float32)
    noise = 0.0 if target == "x0" else 4 * EPS32 * exact.sub(prediction).abs().add(1)

    assert error.dtype == prediction.dtype
    assert error.is_contiguous(memory_format=torch.channels_last)
    assert bool(error.isfinite().all())
    allowed = 2 * (single - exact).abs().max() + noise + EPS32
    if error.dtype != torch.float32:
        # The interpreter truncates to bfloat16, which a GPU rounds.
        ulps = 1.0 if error.dtype == torch.bfloat16 else 0.5
        allowed = allowed + ulps * torch.finfo(error.dtype).eps * exact.abs()
    excess = (error.double() - exact).abs() - allowed
    assert bool((excess <= 0).all()), excess.max()

    exact_loss = denoising_loss_reference(**in_float64, target=target)
    own = (denoising_loss_reference(**arguments, target=target) - exact_loss).abs()
    weights = 1.0 if arguments["weights"] is None else arguments["weights"]
    of_noise = weights * (2 * exact.abs() * noise).mean((1, 2, 3))
    assert loss.dtype == torch.float32
    assert loss.shape == (len(prediction),)
    excess = (loss - exact_loss).abs() - (2 * own + of_noise + EPS32 * (exact_loss + EPS32))
    assert bool((excess <= 0).all()), excess.max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("predicted", "target"),
    [(torch.float32, "v"), (torch.float16, "x0"), (torch.bfloat16, "eps")],
)
def test_every_layout_and_precision(
    lay_out: LayOut, shape: tuple[int, ...], layout: str, predicted: torch.dtype, target: str
) -> None:
    plain = given_prediction(shape, predicted)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    laid_out = {
        **plain,
        "prediction": lay_out(plain["prediction"], layout),
        "images": lay_out(plain["images"], other),
    }
    check(*run_op(laid_out, target), plain, target)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 19)),
    stored=st.sampled_from(STORED),
    predicted=st.sampled_from(PREDICTED),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    target=st.sampled_from(TARGETS),
    data=st.data(),
)
def test_any_arguments(
    lay_out: LayOut,
    shape: tuple[int, int, int, int],
    stored: torch.dtype,
    predicted: torch.dtype,
    layouts: tuple[str, str],
    target: str,
    data: st.DataObject,
) -> None:
    def per_sample(values: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=shape[0], max_size=shape[0])))

    plain = given_prediction(shape, predicted, stored)
    plain["timesteps"] = per_sample(st.integers(0, T - 1))
    plain["sample_ids"] = per_sample(st.integers(0, 2**56 - 1))
    plain["flip"] = data.draw(st.one_of(st.none(), st.just(per_sample(st.booleans()))))
    plain["weights"] = data.draw(
        st.one_of(st.none(), st.just(per_sample(st.floats(0, 100, width=32))))
    )
    plain["seed"] = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1)))
    laid_out = dict(plain)
    for name, layout in zip(("prediction", "images"), layouts, strict=True):
        laid_out[name] = lay_out(plain[name], layout)
    check(*run_op(laid_out, target), plain, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 3, 17, 23), (3, 1, 7, 13), (1, 1, 1, 1)])
def test_stays_inside_its_tensors_and_writes_every_element(
    lay_out: LayOut,
    guarded: Guarded,
    shape: tuple[int, ...],
    layout: str,
    optional: bool,
    target: str,
) -> None:
    plain = given_prediction(shape, stored=torch.float32)
    if not optional:
        plain["weights"] = plain["flip"] = None
    tiles = -(-plain["images"][0].numel() // tile_of_loss(plain["images"]).elements)
    loss = guarded(torch.full((shape[0],), float("nan")))
    error = guarded(lay_out(torch.full(shape, float("nan")), "nhwc"))
    inside: dict[str, Any] = {
        name: guarded(lay_out(value, layout) if value.ndim == 4 else value)
        for name, value in plain.items()
        if value is not None and name != "flip"
    }
    flip = plain["flip"]
    inside["flip"] = None if flip is None else guarded(flip.to(torch.uint8)).view(torch.bool)
    launch_denoising_loss(
        loss,
        error,
        guarded(torch.full((shape[0], tiles), float("nan"))),
        **{"weights": None, "bound_table": None, "bound_weights": None, **inside},
        target=target,
    )
    check(loss, error, plain, target)


def check_learned(loss: Tensor, slope: Tensor, arguments: dict[str, Any]) -> None:
    """Loss and gradient of the variance at most twice as far from float64 as the reference."""
    names = ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    wide = {**arguments, **{name: arguments[name].double() for name in names}}
    channels = arguments["images"].shape[1]

    def run(given_: dict[str, Any]) -> tuple[Tensor, Tensor]:
        prediction = given_["prediction"].detach().to(given_["sqrt_alpha_bar"].dtype)
        prediction.requires_grad_()
        loss = denoising_loss_reference(**{**given_, "prediction": prediction}, target="eps")
        # The gradient of the bound alone, of one element.
        scale = prediction[0].numel() / 2 / given_["bound_weights"]
        (gradient,) = torch.autograd.grad((loss * scale).sum(), prediction)
        return loss.detach(), gradient[:, channels:]

    (exact_loss, exact), (own_loss, own) = run(wide), run(arguments)
    # Rounding of the noise reaches the bound through (k e)² / σ².
    allowed = 2 * (own_loss - exact_loss).abs() + 2e-6 * (exact_loss.abs() + 1)
    assert bool(((loss - exact_loss).abs() <= allowed).all())
    allowed = 2 * (own - exact).abs().max() + 2e-6 * (exact.abs() + 1)
    if slope.dtype != torch.float32:
        allowed = allowed + torch.finfo(slope.dtype).eps * exact.abs()
    assert bool(slope.isfinite().all())
    excess = (slope[:, channels:] - exact).abs() - allowed
    assert bool((excess <= 0).all()), excess.max()
    # What the bound adds must not change e.
    alone = {
        **arguments,
        "prediction": arguments["prediction"][:, :channels],
        "bound_table": None,
        "bound_weights": None,
    }
    assert torch.equal(slope[:, :channels], run_op(alone, "eps")[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("predicted", PREDICTED)
def test_learned_variance(
    lay_out: LayOut,
    guarded: Guarded,
    shape: tuple[int, ...],
    layout: str,
    predicted: torch.dtype,
) -> None:
    plain = given_learned_variance(shape, predicted)
    channels_twice = tuple(plain["prediction"].shape)
    tiles = -(-plain["images"][0].numel() // tile_of_loss(plain["images"]).elements)
    loss = guarded(torch.full((shape[0],), float("nan")))
    slope = guarded(lay_out(torch.full(channels_twice, float("nan"), dtype=predicted), "nhwc"))
    inside = {
        name: guarded(lay_out(value, layout) if value.ndim == 4 else value)
        for name, value in plain.items()
        if name != "flip"
    }
    launch_denoising_loss(
        loss,
        slope,
        guarded(torch.full((shape[0], tiles), float("nan"))),
        **inside,
        flip=plain["flip"],
        target="eps",
    )
    check_learned(loss, slope, plain)


@pytest.mark.parametrize("target", ["x0", "v"])
def test_learned_variance_of_other_targets(target: str) -> None:
    plain = given_learned_variance((3, 3, 5, 4))
    prediction = plain["prediction"].requires_grad_()
    loss = denoising_loss(**plain, target=target)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    expected = denoising_loss_reference(**plain, target=target)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), prediction)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_images_are_not_read_when_the_target_is_the_noise() -> None:
    plain = given_prediction((2, 3, 5, 4), stored=torch.float32)
    unreadable = {**plain, "images": torch.full_like(plain["images"], float("nan"))}
    for ours, expected in zip(run_op(unreadable, "eps"), run_op(plain, "eps"), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", PREDICTED)
@pytest.mark.parametrize("shape", [(3, 3, 17, 23), (2, 1, 7, 13), (2, 1, 1, 1)])
def test_sees_the_noise_that_q_sample_added(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """q_sample of the right tables is each target; against it the loss is rounding alone."""
    plain = given_prediction(shape)
    only_loss = ("prediction", "weights", "bound_table", "bound_weights")
    named = {k: v for k, v in plain.items() if k not in only_loss}
    velocity = {"sqrt_alpha_bar": -SIGMA, "sqrt_one_minus_alpha_bar": SIGNAL}
    zeros, ones = torch.zeros(T), torch.ones(T)
    noise_alone = {"sqrt_alpha_bar": zeros, "sqrt_one_minus_alpha_bar": ones}
    image_alone = {"sqrt_alpha_bar": ones, "sqrt_one_minus_alpha_bar": zeros}
    for target, tables in (("eps", noise_alone), ("x0", image_alone), ("v", velocity)):
        solution = q_sample(**{**named, **tables}, dtype=dtype)
        loss = denoising_loss(solution, **named, target=target)
        if dtype == torch.float32:
            # On a GPU a fused multiply-add may leave an ulp of the noise.
            assert loss.max() <= (4 * EPS32) ** 2, target
        else:
            assert loss.max() <= (2 * torch.finfo(dtype).eps) ** 2, target
        for other in ({"seed": torch.tensor(-6)}, {"sample_ids": named["sample_ids"] + 1}):
            wrong = denoising_loss(solution, **{**named, **other}, target=target)
            assert target == "x0" or wrong.min() > 1e-4, (target, other)


@pytest.mark.parametrize("target", TARGETS)
def test_gradient(target: str) -> None:
    plain = given_prediction((3, 3, 17, 23))
    prediction = plain["prediction"].requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 3.0])
    loss = denoising_loss(**plain, target=target)
    (gradient,) = torch.autograd.grad(loss, prediction, upstream)
    error = prediction.detach().double() - truth(plain, target, torch.float64)
    factor = 2 * upstream * plain["weights"] / error[0].numel()
    expected = factor[:, None, None, None] * error
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-8)


def test_a_sample_does_not_depend_on_its_batch_and_runs_repeat() -> None:
    plain = given_prediction((4, 3, 37, 29))
    loss, error = run_op(plain, "v")
    again, _ = run_op(plain, "v")
    assert torch.equal(loss, again)
    tables = ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "seed")
    one = {k: v if v is None or k in tables else v[2:3] for k, v in plain.items()}
    one_loss, one_error = run_op(one, "v")
    assert torch.equal(one_loss[0], loss[2])
    assert torch.equal(one_error[0], error[2])


def test_more_tiles_than_are_added_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["ddpm_kernels.denoising_loss"]
    monkeypatch.setattr(module, "SUM_TILE", 4)
    plain = given_prediction((2, 1, 1, 8 * 4 * 2 + 5))
    plain["timesteps"] = torch.tensor([3, 20])
    with trying("denoising_loss", Tile(8, 1)):
        check(*run_op(plain, "x0"), plain, "x0")


def test_views(lay_out: LayOut) -> None:
    """The first channels of a network's output, a crop, and one prediction for all."""
    larger = given_prediction((3, 6, 17, 20), torch.bfloat16)
    nhwc = lay_out(larger["prediction"], "nhwc")
    stored = lay_out(larger["images"], "nhwc")
    for view, images in (
        (nhwc[:, :3], stored[:, 3:]),
        (nhwc[:, 1:4, 2:-3, 5:-2], stored[:, ::2, 5:, 7:]),
        (nhwc[1:2, 3:].expand(3, -1, -1, -1), stored[:1, :3].expand(3, -1, -1, -1)),
        (nhwc[:, :3, 3:4, 4:5].expand(-1, -1, 17, 20), stored[:, 1:4]),
    ):
        plain = {**given_prediction(tuple(view.shape)), "prediction": view, "images": images}
        for target in TARGETS:
            check(*run_op(plain, target), plain, target)


def test_arguments_of_any_strides() -> None:
    plain = given_prediction((3, 3, 5, 4))
    strided = dict(plain)
    for name in ("timesteps", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "sample_ids",
                 "weights", "flip"):  # fmt: skip
        strided[name] = torch.stack([plain[name], plain[name].flip(0)], dim=-1)[:, 0]
    for ours, expected in zip(run_op(strided, "v"), run_op(plain, "v"), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_64_bit_indices_make_the_same_result(
    lay_out: LayOut, monkeypatch: pytest.MonkeyPatch, layout: str, target: str
) -> None:
    plain = given_prediction((2, 3, 17, 23))
    plain["images"] = lay_out(plain["images"], layout)
    expected = run_op(plain, target)
    monkeypatch.setattr(sys.modules["ddpm_kernels.q_sample"], "INDEX_LIMIT", 0)
    for ours, theirs in zip(run_op(plain, target), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["prediction", "images"])
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_strides_that_pass_32_bits_together(name: str, dimension: int) -> None:
    """Each stride fits; twice the stride does not. Memory that is not touched is not committed."""
    far = 3 * 2**29
    shape, strides = [2, 2, 2, 2], [64, 16, 4, 1]
    shape[dimension], strides[dimension] = 3, far
    plain = given_prediction(tuple(shape), torch.bfloat16)
    storage = torch.empty(2 * far + 128, dtype=plain[name].dtype)
    spread = storage.as_strided(shape, strides)
    spread.copy_(plain[name])
    check(*run_op({**plain, name: spread}, "v"), plain, "v")


def test_empty_batch() -> None:
    loss, error = run_op(given_prediction((0, 3, 5, 4)), "v")
    assert loss.shape == (0,)
    assert error.shape == (0, 3, 5, 4)


@pytest.mark.parametrize("name", ["timesteps", "sample_ids", "weights", "flip"])
def test_one_value_for_all_samples_is_refused(name: str) -> None:
    plain = given_prediction((3, 3, 5, 4))
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\); it must be \(3,\)"):
        denoising_loss(**{**plain, name: plain[name][:1]})


def test_other_images_are_refused() -> None:
    plain = given_prediction((3, 3, 5, 4))
    with pytest.raises(ValueError, match=r"prediction has shape \(3, 3, 5, 4\); for images of "):
        denoising_loss(**{**plain, "images": plain["images"][:, :1]})


def test_float64_tables_keep_float64() -> None:
    plain = given_prediction((2, 3, 5, 4), torch.float64)
    plain["sqrt_alpha_bar"], plain["sqrt_one_minus_alpha_bar"] = SIGNAL.double(), SIGMA.double()
    noise = gaussian_noise(plain["seed"], plain["sample_ids"], (3, 5, 4), 0, Stream.TRAINING_NOISE)
    _, error = run_op(plain, "eps")
    assert torch.equal(error, plain["prediction"] - noise)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("target", TARGETS)
def test_opcheck(lay_out: LayOut, layout: str, target: str) -> None:
    plain = given_prediction((2, 3, 5, 4))
    plain["prediction"] = lay_out(plain["prediction"], layout).requires_grad_()
    torch.library.opcheck(torch.ops.ddpm.denoising_loss.default, (*plain.values(), target))
