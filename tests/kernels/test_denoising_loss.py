# mypy: ignore-errors
"""The training loss and its gradient: against the formula in float64, on both paths."""

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

from ddpm_kernels import Stream, denoising_loss, gaussian_noise, q_sample
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
TARGETS = ("eps", "x0", "v")
NOISING = (
    "images", "timesteps", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "seed", "sample_ids",
    "flip",
)  # fmt: skip
"""What q_sample takes as well."""


def tables(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(np.sqrt(ALPHA_BAR)).to(dtype),
        torch.tensor(np.sqrt(1 - ALPHA_BAR)).to(dtype),
    )


def arguments(
    shape: tuple[int, ...] = (3, 3, 5, 4),
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.uint8,
    optional: bool = True,
    learned: bool = False,
) -> dict[str, Any]:
    """A prediction of order one for uint8 (or float) images.

    Weights and flips if `optional`; a learned variance, and timestep 0 first, if `learned`.
    """
    batch, generator = shape[0], torch.Generator().manual_seed(len(shape) + shape[-1])
    levels = torch.randint(0, 256, shape, generator=generator)
    signal, sigma = tables(torch.float64 if dtype == torch.float64 else torch.float32)
    levels.flatten()[::3], levels.flatten()[1::3] = 0, 255  # the outermost bins
    images = levels.to(torch.uint8) if stored == torch.uint8 else (levels / 127.5 - 1).to(stored)
    predicted = (batch, 2 * shape[1], *shape[2:]) if learned else shape
    return {
        "prediction": torch.randn(predicted, generator=generator, dtype=torch.float64).to(dtype),
        "images": images,
        "timesteps": (torch.arange(batch) * 17 + (0 if learned else 3)) % T,
        "sqrt_alpha_bar": signal,
        "sqrt_one_minus_alpha_bar": sigma,
        "seed": torch.tensor(-5),
        "sample_ids": torch.arange(batch) + 2**33,
        "weights": (torch.arange(batch) + 0.5).to(signal.dtype) if optional else None,
        "flip": torch.arange(batch) % 2 == 0 if optional else None,
        "bound_table": bound_table("eps").to(signal.dtype) if learned else None,
        "bound_weights": (torch.arange(batch) + 1.5).to(signal.dtype) if learned else None,
    }


def bound_table(target: str) -> Tensor:
    """By `BoundColumn`, from Ho et al. 2020, equations 4, 6 and 7: float64 `[T, 3]`."""
    before = np.append(1.0, ALPHA_BAR[:-1])
    beta = 1 - ALPHA_BAR / before
    variance = beta * (1 - before) / (1 - ALPHA_BAR)
    variance[0] = variance[1]
    mean_from_x_0 = beta * np.sqrt(before) / (1 - ALPHA_BAR)
    x_0_from_error = {
        "eps": -np.sqrt(1 - ALPHA_BAR) / np.sqrt(ALPHA_BAR),
        "x0": 1,
        "v": -np.sqrt(1 - ALPHA_BAR),
    }[target]
    columns = [np.log(variance), np.log(beta), mean_from_x_0 * x_0_from_error]
    return torch.tensor(np.stack(columns, axis=1))


def expected_loss(arguments: dict[str, Any], target: str) -> tuple[np.ndarray, np.ndarray]:
    """The loss and its gradient in float64, sample by sample."""
    prediction, images = arguments["prediction"], arguments["images"]
    losses, gradients = [], []
    for b, t in enumerate(arguments["timesteps"].tolist()):
        x_0 = images[b].double().numpy()
        if images.dtype == torch.uint8:
            x_0 = (2 * x_0 - 255) / 255
        if arguments["flip"] is not None and arguments["flip"][b]:
            x_0 = x_0[:, :, ::-1]
        channels, height, width = x_0.shape
        ids, seed = arguments["sample_ids"][b : b + 1], int(arguments["seed"])
        eps = gaussian_noise(seed, ids, (channels, height, width), 0, Stream.TRAINING_NOISE)
        noise = eps[0].double().numpy()
        velocity = np.sqrt(ALPHA_BAR[t]) * noise - np.sqrt(1 - ALPHA_BAR[t]) * x_0
        truth = {"eps": noise, "x0": x_0, "v": velocity}[target]
        weight = 1.0 if arguments["weights"] is None else float(arguments["weights"][b])
        error = prediction[b].detach().double().numpy() - truth
        losses.append(weight * np.sum(error**2) / error.size)
        gradients.append(2 * weight * error / error.size)
    return np.stack(losses), np.stack(gradients)


def differentiate(arguments: dict[str, Any], target: str, scale: float) -> tuple[Tensor, Tensor]:
    """The losses, and the gradient of `scale` times their sum."""
    prediction = arguments["prediction"].detach().requires_grad_()
    loss = denoising_loss(**{**arguments, "prediction": prediction}, target=target)
    (gradient,) = torch.autograd.grad(loss.sum() * scale, prediction)
    return loss.detach(), gradient


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.sampled_from([1, 2, 3, 5]), st.integers(1, 13), st.integers(1, 13)
    ),
    stored=st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    target=st.sampled_from(TARGETS),
    optional=st.booleans(),
)
def test_formula(
    lay_out: LayOut,
    path: str,
    shape: tuple[int, int, int, int],
    stored: torch.dtype,
    dtype: torch.dtype,
    layouts: tuple[str, str],
    target: str,
    optional: bool,
) -> None:
    plain = arguments(shape, dtype, stored, optional)
    expected, expected_gradient = expected_loss(plain, target)
    laid_out = dict(plain)
    for name, layout in zip(("prediction", "images"), layouts, strict=True):
        laid_out[name] = lay_out(plain[name], layout)
    with PATHS[path]():
        loss, gradient = differentiate(laid_out, target, scale=3.0)
    assert loss.dtype == torch.float32
    assert loss.shape == (shape[0],)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=5e-6, atol=1e-6)
    assert gradient.dtype == dtype
    # A gradient in half precision is rounded at most twice.
    np.testing.assert_allclose(
        gradient.double().numpy(),
        3 * expected_gradient,
        rtol=1.1 * torch.finfo(dtype).eps,
        atol=6e-6 / expected_gradient[0].size + float(torch.finfo(dtype).smallest_normal),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", PATHS)
def test_float64_tables_make_a_float64_check(path: str, target: str) -> None:
    given_ = arguments(dtype=torch.float64)
    expected, expected_gradient = expected_loss(given_, target)
    with PATHS[path]():
        loss, gradient = differentiate(given_, target, scale=1.0)
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sees_the_noise_that_q_sample_added(lay_out: LayOut, path: str, layout: str) -> None:
    """A network that solves x_t = a x_0 + s ε for its target has no loss."""
    given_ = arguments()
    given_["images"] = lay_out(given_["images"], layout)
    shared = {k: v for k, v in given_.items() if k in NOISING}
    a, s = (
        given_[name][given_["timesteps"]][:, None, None, None]
        for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    )
    x_0 = given_["images"] / 127.5 - 1
    x_0 = torch.where(given_["flip"][:, None, None, None], x_0.flip(3), x_0)
    with PATHS[path]():
        eps = (q_sample(**shared) - a * x_0) / s
        for target, solution in (("eps", eps), ("x0", x_0), ("v", a * eps - s * x_0)):
            loss = denoising_loss(solution, **shared, target=target)
            assert loss.max() < 1e-9, target
            wrong_seed = denoising_loss(solution, **{**shared, "seed": 6}, target=target)
            assert target == "x0" or wrong_seed.min() > 0.01


@pytest.mark.parametrize("path", PATHS)
def test_zero_loss_and_gradient_on_the_exact_noise(path: str) -> None:
    given_ = arguments()
    given_["prediction"] = gaussian_noise(
        -5, given_["sample_ids"], (3, 5, 4), 0, Stream.TRAINING_NOISE
    )
    with PATHS[path]():
        loss, gradient = differentiate(given_, "eps", scale=1.0)
    assert loss.max() < 1e-12
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("path", PATHS)
def test_samples_are_weighted_by_their_own_weight_alone(path: str) -> None:
    given_ = arguments()
    with PATHS[path]():
        plain = denoising_loss(**{**given_, "weights": None})
        weighted = denoising_loss(**given_)
        one = denoising_loss(**{**given_, "weights": torch.tensor([0.0, 1.0, 0.0])})
    torch.testing.assert_close(weighted, plain * given_["weights"])
    torch.testing.assert_close(one, plain * torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**17])
def test_loss_scale_keeps_small_gradients_in_half_precision(path: str, scale: float) -> None:
    """Unscaled, the gradient of a large image is below what float16 resolves."""
    given_ = arguments((1, 3, 128, 128), dtype=torch.float16, optional=False)
    _, expected = expected_loss(given_, "eps")
    with PATHS[path]():
        _, gradient = differentiate(given_, "eps", scale)
    assert bool(gradient.isfinite().all())
    np.testing.assert_allclose(
        gradient.double().numpy(), scale * expected, rtol=2.0**-9, atol=scale * 2e-9
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optional", [True, False])
def test_gradcheck(path: str, target: str, optional: bool) -> None:
    given_ = arguments((2, 3, 3, 2), dtype=torch.float64, optional=optional)
    prediction = given_.pop("prediction").requires_grad_()
    with PATHS[path]():
        assert torch.autograd.gradcheck(
            lambda p: denoising_loss(p, **given_, target=target), (prediction,)
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_bound_of_a_learned_variance(path: str, target: str) -> None:
    """From the two posteriors themselves: KL for t > 0, and the mass of the pixel's bin at 0."""
    given_ = arguments((4, 2, 5, 3), dtype=torch.float64, optional=False, learned=True)
    given_["bound_table"] = bound_table(target)
    given_["weights"] = torch.zeros(4, dtype=torch.float64)  # leaves the bound alone
    with PATHS[path]():
        loss = denoising_loss(**given_, target=target)

    noise = gaussian_noise(-5, given_["sample_ids"], (2, 5, 3), 0, Stream.TRAINING_NOISE)
    for b, t in enumerate(given_["timesteps"].tolist()):
        x_0 = (2 * given_["images"][b].double() - 255) / 255
        a, s = np.sqrt(ALPHA_BAR[t]), np.sqrt(1 - ALPHA_BAR[t])
        x_t = a * x_0 + s * noise[b].double()
        output, r = given_["prediction"][b, :2], given_["prediction"][b, 2:]
        x_0_hat = {"eps": (x_t - s * output) / a, "x0": output, "v": a * x_t - s * output}[target]
        before = 1.0 if t == 0 else ALPHA_BAR[t - 1]
        beta = 1 - ALPHA_BAR[t] / before

        def posterior_mean(
            x_0: Tensor, x_t: Tensor = x_t, t: int = t, before: float = before, beta: float = beta
        ) -> Tensor:
            of_x_t = np.sqrt(1 - beta) * (1 - before) * x_t
            return (np.sqrt(before) * beta * x_0 + of_x_t) / (1 - ALPHA_BAR[t])

        low, high, _ = bound_table(target)[t]
        deviation = (0.5 * ((r + 1) / 2 * high + (1 - r) / 2 * low)).exp()
        predicted = torch.distributions.Normal(posterior_mean(x_0_hat), deviation)
        if t > 0:
            true = torch.distributions.Normal(posterior_mean(x_0), (0.5 * low).exp())
            bound = torch.distributions.kl_divergence(true, predicted)
        else:
            # tanh approximates the normal distribution function to 3e-4.
            ends = (x_0 + sign / 255 for sign in (1, -1))
            z = [(end - predicted.mean) / deviation for end in ends]
            upper, lower = (
                (1 + torch.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))) / 2 for v in z
            )
            inner = (upper - lower).clamp(min=1e-12).log()
            bound = -torch.where(
                x_0 == -1, upper.clamp(min=1e-12).log(),
                torch.where(x_0 == 1, (1 - lower).clamp(min=1e-12).log(), inner),
            )  # fmt: skip
        expected = given_["bound_weights"][b] * bound.mean()
        torch.testing.assert_close(loss[b], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_bound_trains_the_variance_alone(path: str, target: str) -> None:
    given_ = arguments((2, 3, 3, 2), dtype=torch.float64, learned=True)
    given_["bound_table"] = bound_table(target)
    prediction = given_.pop("prediction")
    output, r = prediction[:, :3], prediction[:, 3:].requires_grad_()
    with PATHS[path]():
        assert torch.autograd.gradcheck(
            lambda r: denoising_loss(torch.cat([output, r], 1), **given_, target=target), (r,)
        )
        _, gradient = differentiate({**given_, "prediction": prediction.detach()}, target, 1.0)
        alone = {**given_, "prediction": output, "bound_table": None, "bound_weights": None}
        _, expected = differentiate(alone, target, 1.0)
    torch.testing.assert_close(gradient[:, :3], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("optional", [True, False])
def test_op_and_reference_agree_on_a_learned_variance(optional: bool) -> None:
    given_ = arguments((3, 3, 5, 4), optional=optional, learned=True)
    loss, gradient = differentiate(given_, "eps", scale=0.25)
    with force_ops():
        op_loss, op_gradient = differentiate(given_, "eps", scale=0.25)
    torch.testing.assert_close(op_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(op_gradient, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("optional", [True, False])
def test_op_and_reference_agree(target: str, optional: bool) -> None:
    given_ = arguments(optional=optional)
    loss, gradient = differentiate(given_, target, scale=0.25)
    with force_ops():
        op_loss, op_gradient = differentiate(given_, target, scale=0.25)
    torch.testing.assert_close(op_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(op_gradient, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("optional", "learned"), [(True, True), (True, False), (False, False)])
def test_opcheck(
    lay_out: LayOut,
    shape: tuple[int, ...],
    layout: str,
    target: str,
    optional: bool,
    learned: bool,
) -> None:
    given_ = arguments(shape, optional=optional, learned=learned)
    given_["prediction"] = lay_out(given_["prediction"], layout).detach().requires_grad_()
    torch.library.opcheck(torch.ops.ddpm.denoising_loss.default, (*given_.values(), target))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("optional", "learned"), [(True, True), (True, False), (False, False)])
def test_compiles_as_one_graph(path: str, optional: bool, learned: bool) -> None:
    given_ = arguments(optional=optional, learned=learned)
    prediction = given_.pop("prediction").requires_grad_()
    compiled = torch.compile(denoising_loss, fullgraph=True, backend="aot_eager")
    with PATHS[path]():
        expected = denoising_loss(prediction, **given_, target="v")
        actual = compiled(prediction, **given_, target="v")
        (expected_gradient,) = torch.autograd.grad(expected.sum(), prediction)
        (gradient,) = torch.autograd.grad(actual.sum(), prediction)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bound_weights": None}, "bound_table and bound_weights come together"),
        ({"bound_table": torch.zeros(T, 2)}, r"bound_table has shape \(50, 2\); .* \[T, 3\]"),
        ({"prediction": torch.zeros(3, 3, 5, 4)}, r"with a bound table, it must be \(3, 6, 5, 4\)"),
        (
            {"bound_table": None, "bound_weights": None},
            r"without a bound table, it must be \(3, 3, 5, 4\)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoising_loss(**{**arguments(learned=True), **changes})


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match=r"target is 'score'; it must be one of eps, x0, v"):
        denoising_loss(**arguments(), target="score")
