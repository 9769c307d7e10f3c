"""The training loss and its gradient: against the formula in float64, on every backend."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.comparing import EPS32, assert_equal, assert_within, largest, rounding
from tests.kernels.conftest import ON_KERNELS, Backend, Guarded
from tests.kernels.inputs import (
    ALPHA_BAR,
    FLOATS,
    LAYOUTS,
    SHAPES,
    SIGMA,
    SIGNAL,
    STEPS,
    STORED,
    TARGETS,
    Arguments,
    bound_table,
    in_float64,
    lay_out,
    of_denoising_loss,
    per_pixel,
)
from tests.kernels.test_q_sample import clean_and_noise, clean_is_off_by
from torch import Tensor

from ddpm_kernels import denoising_loss, q_sample
from ddpm_kernels.denoising_loss.op import denoising_loss_reference
from ddpm_kernels.latents import channels_of
from ddpm_kernels.tiles import Tile, trying

NOISING = ("images", "timesteps", "seed", "sample_ids", "flip", "latent_scale", "latent_shift")
"""What q_sample takes as well."""
SHARED = (
    "target_x0", "target_noise", "seed", "bound_table", "latent_scale", "latent_shift"
)  # fmt: skip
"""What a batch has one of."""


def differentiate(
    arguments: Arguments, function: Callable[..., Tensor] = denoising_loss
) -> tuple[Tensor, Tensor]:
    """The losses, and the gradient of their sum, weighted so that it is of order one."""
    prediction = arguments["prediction"].detach().requires_grad_()
    loss = function(*{**arguments, "prediction": prediction}.values())
    images = arguments["images"]
    channels = channels_of(images, arguments["latent_scale"])
    upstream = upstream_of(images[:, :channels]).to(loss)
    (gradient,) = torch.autograd.grad(loss, prediction, upstream)
    return loss.detach(), gradient


def upstream_of(images: Tensor) -> Tensor:
    return (torch.arange(len(images)) + 1.0) * images.shape[1:].numel() / 2


def target_of(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The target in float64, and what it may be off by on a kernel: four ulp of its noise."""
    x_0, noise = clean_and_noise(arguments)
    u, w = (
        0.0 if table is None else per_pixel(table.double()[arguments["timesteps"]])
        for table in (arguments["target_x0"], arguments["target_noise"])
    )
    off = EPS32 * ((u * x_0).abs() + 4 * (w * noise).abs() + 1)
    return u * x_0 + w * noise, off + (u * clean_is_off_by(arguments)).abs()


def check(loss: Tensor, gradient: Tensor, arguments: Arguments) -> None:
    """Hold loss and gradient to the formula in float64."""
    target, off = target_of(arguments)
    prediction, weights = arguments["prediction"].double(), arguments["weights"]
    weights = torch.ones(len(prediction)) if weights is None else weights
    error = prediction - target
    off = off + EPS32 * prediction.abs()
    exact = weights * error.square().mean((1, 2, 3))
    allowed = weights * (2 * error.abs() * off).mean((1, 2, 3)) + 4 * EPS32 * exact + EPS32**2
    assert loss.dtype == torch.float32
    assert_within(loss, exact, allowed, "loss")
    factor = per_pixel(2 * upstream_of(error) * weights / error.shape[1:].numel())
    # The difference is rounded to the prediction's precision, and so is the product.
    allowed = factor * off + rounding(gradient, factor * error, times=2.2)
    assert gradient.dtype == arguments["prediction"].dtype
    assert_within(gradient, factor * error, allowed, "gradient")


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 19)),
    stored=st.sampled_from(STORED),
    predicted=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    target=st.sampled_from(TARGETS),
    data=st.data(),
)
def test_formula(
    backend: Backend,
    shape: tuple[int, int, int, int],
    stored: torch.dtype,
    predicted: torch.dtype,
    layouts: tuple[str, str],
    target: str,
    data: st.DataObject,
) -> None:
    def per_sample(values: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=shape[0], max_size=shape[0])))

    plain = of_denoising_loss(shape, target, predicted, stored)
    plain["timesteps"] = per_sample(st.integers(0, STEPS - 1))
    plain["sample_ids"] = per_sample(st.integers(0, 2**56 - 1))
    plain["flip"] = data.draw(st.one_of(st.none(), st.just(per_sample(st.booleans()))))
    weights = per_sample(st.floats(0, 100, width=32))
    plain["weights"] = data.draw(st.one_of(st.none(), st.just(weights)))
    plain["seed"] = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1)))
    laid_out = dict(plain)
    for name, layout in zip(("prediction", "images"), layouts, strict=True):
        laid_out[name] = lay_out(plain[name], layout)
    check(*differentiate(backend.moved(laid_out)), plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_covered_and_nothing_else_is_touched(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], shape: tuple[int, ...]
) -> None:
    """Every pair of layout, precision and target with some shape."""
    at = SHAPES.index(shape)
    for i, target in enumerate(TARGETS):
        plain = of_denoising_loss(shape, target, FLOATS[(at + i) % 3], optional=(at + i) % 2 == 0)
        inside: Arguments = {
            k: guarded(v) if isinstance(v, Tensor) else v for k, v in plain.items()
        }
        inside["prediction"] = guarded(lay_out(plain["prediction"], LAYOUTS[(at + i) % 4]))
        inside["images"] = guarded(lay_out(plain["images"], LAYOUTS[(at + 2 * i + 1) % 4]))
        check(*differentiate(inside), plain)
    assert poisoned or not backend.runs_kernels


@pytest.mark.parametrize("target", TARGETS)
def test_float64_tables_make_a_float64_check(backend: Backend, target: str) -> None:
    given_ = in_float64(of_denoising_loss(target=target, stored=torch.float64))
    loss, gradient = differentiate(backend.moved(given_))
    error = given_["prediction"] - target_of(given_)[0]
    exact = given_["weights"] * error.square().mean((1, 2, 3))
    torch.testing.assert_close(loss.cpu(), exact, rtol=1e-12, atol=0)
    factor = 2 * upstream_of(error) * given_["weights"] / error.shape[1:].numel()
    torch.testing.assert_close(gradient.cpu(), per_pixel(factor) * error, rtol=1e-12, atol=1e-15)


def test_a_target_of_any_two_coefficients_for_a_batch(backend: Backend) -> None:
    """As EDM has them: tables of the batch, indexed by its rows."""
    plain = of_denoising_loss((3, 2, 5, 7))
    plain["timesteps"] = torch.arange(3)
    plain["target_x0"], plain["target_noise"] = torch.tensor([[0.3, 2.0, -1.5], [-0.7, 0.0, 0.1]])
    check(*differentiate(backend.moved(plain)), plain)


@pytest.mark.parametrize("target", TARGETS)
def test_sees_the_noise_that_q_sample_added(backend: Backend, target: str) -> None:
    """q_sample of the right tables is each target; against it the loss is rounding alone."""
    plain = of_denoising_loss((3, 3, 9, 7), target)
    noising = backend.moved({name: plain[name] for name in NOISING})
    u, w = (plain[name] for name in ("target_x0", "target_noise"))
    tables = backend.moved(
        {
            "sqrt_alpha_bar": torch.zeros(STEPS) if u is None else u,
            "sqrt_one_minus_alpha_bar": torch.zeros(STEPS) if w is None else w,
        }
    )
    for dtype in reversed(FLOATS):
        solution = q_sample(**noising, **tables, dtype=dtype)
        given_ = backend.moved({**plain, "prediction": solution})
        # A fused multiply-add may leave an ulp of the noise.
        bound = 4 * EPS32 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert float((denoising_loss(**given_) / given_["weights"]).max()) <= bound**2
    if target != "x0":
        for other in ({"seed": -6}, {"sample_ids": noising["sample_ids"] + 1}):
            assert float(denoising_loss(**{**given_, **other}).min()) > 1e-4


def test_images_are_not_read_when_the_target_is_the_noise(backend: Backend) -> None:
    plain = of_denoising_loss(target="eps", stored=torch.float32)
    unreadable = {**plain, "images": torch.full_like(plain["images"], float("nan"))}
    for ours, expected in zip(
        differentiate(backend.moved(unreadable)), differentiate(backend.moved(plain)), strict=True
    ):
        assert_equal(ours, expected)


def test_loss_scale_keeps_small_gradients_in_half_precision(backend: Backend) -> None:
    """Unscaled, the gradient of a large image is below what float16 resolves."""
    plain = of_denoising_loss((1, 3, 64, 64), "eps", torch.float16, optional=False)
    given_ = backend.moved(plain)
    prediction = given_["prediction"].requires_grad_()
    for scale in (2.0**10, 2.0**17):
        loss = denoising_loss(**given_)
        (gradient,) = torch.autograd.grad(loss.sum() * scale, prediction)
        exact = 2 * scale * (plain["prediction"].detach().double() - target_of(plain)[0]) / 12288
        assert_within(gradient, exact, rounding(gradient, exact, times=2.2) + scale * 2e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck_of_the_bound(backend: Backend, target: str) -> None:
    """In float64, by the variance alone, for which the error is a constant."""
    given_ = backend.moved(in_float64(of_denoising_loss((2, 1, 2, 2), target, learned=True)))
    output, r = given_["prediction"].split(1, dim=1)

    def loss(r: Tensor) -> Tensor:
        return denoising_loss(**{**given_, "prediction": torch.cat([output, r], dim=1)})

    assert torch.autograd.gradcheck(loss, (r.requires_grad_(),))


# --- A learned variance


@pytest.mark.parametrize("target", TARGETS)
def test_bound_of_a_learned_variance(backend: Backend, target: str) -> None:
    """From the two posteriors themselves: KL for t > 0, and the mass of the pixel's bin at 0."""
    given_ = in_float64(of_denoising_loss((4, 2, 5, 3), target, optional=False, learned=True))
    given_["bound_table"] = bound_table(target)
    if target == "v":
        given_ |= {"target_x0": -SIGMA, "target_noise": SIGNAL}
    given_["weights"] = torch.zeros(4, dtype=torch.float64)  # leaves the bound alone
    loss = denoising_loss(**backend.moved(given_)).cpu()

    x_0s, noise = clean_and_noise(given_)
    for b, t in enumerate(given_["timesteps"].tolist()):
        x_0, a, s = x_0s[b], float(SIGNAL[t]), float(SIGMA[t])
        x_t = a * x_0 + s * noise[b]
        output, r = given_["prediction"][b].split(2)
        x_0_hat = {"eps": (x_t - s * output) / a, "x0": output, "v": a * x_t - s * output}[target]
        before = 1.0 if t == 0 else float(ALPHA_BAR[t - 1])
        beta = 1 - float(ALPHA_BAR[t]) / before
        of_x_t = math.sqrt(1 - beta) * (1 - before) * x_t / (1 - float(ALPHA_BAR[t]))
        of_x_0 = math.sqrt(before) * beta / (1 - float(ALPHA_BAR[t]))

        low, high, _ = bound_table(target)[t]
        deviation = (0.5 * ((r + 1) / 2 * high + (1 - r) / 2 * low)).exp()
        predicted = torch.distributions.Normal(of_x_0 * x_0_hat + of_x_t, deviation)
        if t > 0:
            true = torch.distributions.Normal(of_x_0 * x_0 + of_x_t, (0.5 * low).exp())
            bound = torch.distributions.kl_divergence(true, predicted)
        else:
            # tanh approximates the normal distribution function to 3e-4.
            z = [(x_0 + sign / 255 - predicted.mean) / deviation for sign in (1, -1)]
            upper, lower = (
                (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2 for v in z
            )
            mass = torch.where(x_0 == -1, upper, torch.where(x_0 == 1, 1 - lower, upper - lower))
            bound = -mass.clamp(min=1e-12).log()
        expected = given_["bound_weights"][b] * bound.mean()
        torch.testing.assert_close(loss[b], expected, rtol=3e-9, atol=0)


@ON_KERNELS
@pytest.mark.parametrize("shape", SHAPES[:6])
def test_learned_variance_on_kernels(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], shape: tuple[int, ...]
) -> None:
    """Loss and gradient at most twice as far from float64 as the reference in float32."""
    at = SHAPES.index(shape)
    plain = of_denoising_loss(shape, TARGETS[at % 3], FLOATS[at // 2 % 3], learned=True)
    tables = ("target_x0", "target_noise", "bound_table", "weights", "bound_weights")
    exact_loss, exact = differentiate(
        in_float64(plain, "prediction", *tables), denoising_loss_reference
    )
    own = {**plain, "prediction": plain["prediction"].float()}
    own_loss, own_gradient = differentiate(own, denoising_loss_reference)
    inside: Arguments = {
        name: guarded(lay_out(v, LAYOUTS[at % 4]) if v.ndim == 4 else v)
        if isinstance(v, Tensor)
        else v
        for name, v in plain.items()
    }
    loss, gradient = differentiate(inside)
    # Rounding of the noise reaches the bound through (k e)² / σ².
    assert_within(loss, exact_loss, 2 * (own_loss - exact_loss).abs() + 4e-6 * (exact_loss + 1))
    allowed = 2 * largest(own_gradient - exact) + 4e-6 * (exact.abs() + upstream_of(exact).max())
    assert_within(gradient, exact, allowed + rounding(gradient, exact, times=2.2))
    # What the bound adds must not change e.
    channels = shape[1]
    alone = {**inside, "bound_table": None, "bound_weights": None}
    alone["prediction"] = inside["prediction"][:, :channels]
    assert_equal(gradient[:, :channels], differentiate(alone)[1])


# --- How samples lie


def test_a_sample_does_not_depend_on_its_batch_and_runs_repeat(backend: Backend) -> None:
    given_ = backend.moved(of_denoising_loss((4, 3, 17, 23)))
    loss = denoising_loss(**given_)
    assert_equal(denoising_loss(**given_), loss)
    one = {k: v if v is None or k in SHARED else v[2:3] for k, v in given_.items()}
    if backend.runs_kernels:
        assert_equal(denoising_loss(**one)[0], loss[2])
    torch.testing.assert_close(denoising_loss(**one)[0], loss[2], rtol=1e-6, atol=0)


@ON_KERNELS
def test_more_tiles_than_are_added_at_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ddpm_kernels.denoising_loss.launch"], "SUM_TILE", 4)
    plain = of_denoising_loss((2, 1, 1, 8 * 4 * 2 + 5), "x0")
    with trying("denoising_loss", Tile(8, 1)):
        check(*differentiate(backend.moved(plain)), plain)


def test_views(backend: Backend) -> None:
    """The first channels of a network's output, a crop, and one prediction for all."""
    larger = of_denoising_loss((3, 6, 17, 20), predicted=torch.bfloat16)
    nhwc = lay_out(larger["prediction"], "nhwc").to(backend.device)
    stored = lay_out(larger["images"], "nhwc").to(backend.device)
    for view, images in (
        (nhwc[:, :3], stored[:, 3:]),
        (nhwc[:, 1:4, 2:-3, 5:-2], stored[:, ::2, 5:, 7:]),
        (nhwc[1:2, 3:].expand(3, -1, -1, -1), stored[:1, :3].expand(3, -1, -1, -1)),
    ):
        plain = of_denoising_loss(tuple(view.shape))
        plain |= {"prediction": view.cpu(), "images": images.cpu()}
        check(*differentiate({**backend.moved(plain), "prediction": view, "images": images}), plain)


def test_strides_do_not_change_a_bit(backend: Backend) -> None:
    plain = of_denoising_loss()
    strided = dict(plain)
    for name, value in plain.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            strided[name] = torch.stack([value, value.flip(0)], dim=-1)[:, 0]
    for ours, expected in zip(
        differentiate(backend.moved(strided)), differentiate(backend.moved(plain)), strict=True
    ):
        assert_equal(ours, expected)


@pytest.mark.parametrize(("name", "dimension"), [("prediction", 1), ("images", 0), ("images", 3)])
def test_strides_that_pass_32_bits_together(backend: Backend, name: str, dimension: int) -> None:
    """Each stride fits; twice the stride does not. Memory that is not touched is not committed."""
    far = 3 * 2**29
    shape, strides = [2, 2, 2, 2], [64, 16, 4, 1]
    shape[dimension], strides[dimension] = 3, far
    plain = of_denoising_loss(tuple(shape), predicted=torch.bfloat16)
    storage = torch.empty(2 * far + 128, dtype=plain[name].dtype, device=backend.device)
    spread = storage.as_strided(shape, strides).copy_(plain[name])
    given_ = {**backend.moved(plain), name: spread}
    expected = denoising_loss(**backend.moved(plain))
    torch.testing.assert_close(denoising_loss(**given_), expected, rtol=1e-6, atol=0)


def test_empty_batch(backend: Backend) -> None:
    loss, gradient = differentiate(backend.moved(of_denoising_loss((0, 3, 5, 4))))
    assert loss.shape == (0,)
    assert gradient.shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_x0": None, "target_noise": None}, "target_x0 and target_noise are both None"),
        ({"bound_weights": None}, "bound_table and bound_weights come together"),
        ({"bound_table": torch.zeros(STEPS, 2)}, r"bound_table has shape \(50, 2\); .* \[T, 3\]"),
        ({"prediction": torch.zeros(3, 3, 5, 4)}, r"with a bound table, it must be \(3, 6, 5, 4\)"),
        (
            {"bound_table": None, "bound_weights": None},
            r"without a bound table, it must be \(3, 3, 5, 4\)",
        ),
        ({"images": torch.zeros(3, 1, 5, 4)}, "prediction has shape .*; for images of "),
        *(
            ({name: torch.ones(1)}, rf"{name} has shape \(1,\); it must be \(3,\)")
            for name in ("timesteps", "sample_ids", "weights", "flip", "bound_weights")
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoising_loss(**{**of_denoising_loss(learned=True), **changes})
