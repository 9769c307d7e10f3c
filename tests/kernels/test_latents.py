"""Latents drawn from moments: their distribution, and what noising and the loss make of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels import test_denoising_loss as of_the_loss
from tests.kernels import test_q_sample as of_noising
from tests.kernels.comparing import EPS32, assert_equal, assert_within
from tests.kernels.conftest import Backend, Guarded
from tests.kernels.inputs import (
    FLOATS,
    LATENT,
    LAYOUTS,
    SHAPES,
    STEPS,
    TARGETS,
    Arguments,
    in_float64,
    lay_out,
    of_denoising_loss,
    of_q_sample,
    stored_moments,
)
from torch import Tensor

from ddpm_kernels import Stream, denoising_loss, gaussian_noise, q_sample

ONE_AND_ZERO = {
    "sqrt_alpha_bar": torch.ones(STEPS), "sqrt_one_minus_alpha_bar": torch.zeros(STEPS)
}  # fmt: skip
"""Tables by which `q_sample` returns x_0."""


def drawn(backend: Backend, arguments: Arguments) -> Tensor:
    """x_0 in float32, from what `q_sample` takes."""
    return q_sample(**backend.moved({**arguments, **ONE_AND_ZERO}))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 19)),
    stored=st.sampled_from(FLOATS),
    result=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    target=st.sampled_from(TARGETS),
    scale=st.floats(0.01, 10),
    shift=st.floats(-2, 2),
    ids=st.lists(st.integers(0, 2**56 - 1), min_size=4, max_size=4),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_formula(
    backend: Backend,
    shape: tuple[int, int, int, int],
    stored: torch.dtype,
    result: torch.dtype,
    layouts: tuple[str, str],
    target: str,
    scale: float,
    shift: float,
    ids: list[int],
    seed: int,
) -> None:
    """x_t, and the loss with its gradient, in every precision and memory layout."""
    same = {
        "latent_scale": scale,
        "latent_shift": shift,
        "sample_ids": torch.tensor(ids[: shape[0]]),
        "seed": torch.tensor(seed),
    }
    plain = {**of_q_sample(shape, stored, latent=True), **same}
    laid_out = {**plain, "images": lay_out(plain["images"], layouts[0])}
    of_noising.check(q_sample(**backend.moved(laid_out), dtype=result), plain)

    plain = {**of_denoising_loss(shape, target, result, stored, latent=True), **same}
    laid_out = {**plain, "images": lay_out(plain["images"], layouts[0])}
    laid_out["prediction"] = lay_out(plain["prediction"], layouts[1])
    of_the_loss.check(*of_the_loss.differentiate(backend.moved(laid_out)), plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_covered_and_nothing_else_is_touched(
    backend: Backend, guarded: Guarded, poisoned: list[Tensor], shape: tuple[int, ...]
) -> None:
    at = SHAPES.index(shape)

    def inside(arguments: Arguments, layout: str) -> Arguments:
        return {
            name: guarded(lay_out(v, layout) if v.ndim == 4 else v) if isinstance(v, Tensor) else v
            for name, v in arguments.items()
        }

    for i, target in enumerate(TARGETS):
        layout = LAYOUTS[(at + i) % 4]
        plain = of_q_sample(shape, FLOATS[(at + i) % 3], latent=True)
        of_noising.check(q_sample(**inside(plain, layout), dtype=FLOATS[i]), plain)
        plain = of_denoising_loss(shape, target, FLOATS[(at + i) % 3], latent=True)
        of_the_loss.check(*of_the_loss.differentiate(inside(plain, layout)), plain)
    assert poisoned or not backend.runs_kernels


@pytest.mark.parametrize("target", TARGETS)
def test_float64_tables_make_a_float64_check(backend: Backend, target: str) -> None:
    plain = in_float64(of_q_sample(stored=torch.float64, latent=True))
    x_t = q_sample(**backend.moved(plain), dtype=torch.float64).cpu()
    x_0, noise = of_noising.clean_and_noise(plain)
    tables = (plain["sqrt_alpha_bar"], plain["sqrt_one_minus_alpha_bar"])
    a, s = (table[plain["timesteps"]].view(-1, 1, 1, 1) for table in tables)
    torch.testing.assert_close(x_t, a * x_0 + s * noise, rtol=1e-12, atol=1e-12)

    given_ = in_float64(of_denoising_loss(target=target, stored=torch.float64, latent=True))
    loss, gradient = of_the_loss.differentiate(backend.moved(given_))
    error = given_["prediction"] - of_the_loss.target_of(given_)[0]
    exact = given_["weights"] * error.square().mean((1, 2, 3))
    torch.testing.assert_close(loss.cpu(), exact, rtol=1e-12, atol=0)
    factor = 2 * of_the_loss.upstream_of(error) * given_["weights"] / error.shape[1:].numel()
    torch.testing.assert_close(
        gradient.cpu(), factor.view(-1, 1, 1, 1) * error, rtol=1e-12, atol=1e-12
    )


def test_draws_have_the_moments_of_the_distribution(backend: Backend) -> None:
    """Means and variances over many ids, in float64, within five of their standard errors."""
    ids, side = (16, 16) if backend.runs_kernels else (4096, 3)
    mean = torch.tensor([-3.0, 0.5, 7.0, 0.0])
    log_variance = torch.tensor([-8.0, 0.0, 2.0, -20.0])
    moments = torch.cat([mean, log_variance]).half().view(1, 8, 1, 1).expand(ids, -1, side, side)
    x_0 = drawn(backend, {
        **of_q_sample((ids, 4, 1, 1), latent=True), "images": moments,
    }).double().cpu()  # fmt: skip
    shift, scale = LATENT["latent_shift"], LATENT["latent_scale"]
    standard = (x_0 / scale + shift - mean.view(1, 4, 1, 1)) / (0.5 * log_variance).exp().view(
        1, 4, 1, 1
    )
    # What is left of rounding of x_0 where its deviation is 5e-5 and its mean zero.
    off = 1e-2
    count = ids * side * side
    assert_within(standard.mean((0, 2, 3)), torch.zeros(4).double(), 5 * count**-0.5 + off)
    assert_within(standard.var((0, 2, 3)), torch.ones(4).double(), 5 * (2 / count) ** 0.5 + off)
    if not backend.runs_kernels:
        # Of each element over the ids alone; of several hundred, one passes four.
        error = standard.mean(0).abs() * ids**0.5
        assert float(error.max()) < 5
    correlation = torch.corrcoef(standard.transpose(0, 1).flatten(1))
    assert_within(correlation, torch.eye(4).double(), 5 * count**-0.5 + off)


def test_draws_are_of_a_stream_of_their_own(backend: Backend) -> None:
    """And at any resolution of the moments those of `gaussian_noise`."""
    plain = of_q_sample((3, 4, 5, 7), latent=True)
    plain["images"] = torch.zeros(3, 8, 5, 7)
    plain |= {"latent_scale": 1.0, "latent_shift": 0.0}
    given_ = backend.moved(plain)
    ids = given_["sample_ids"]
    x_0 = drawn(backend, plain)
    expected = gaussian_noise(given_["seed"], ids, (4, 5, 7), 0, Stream.LATENT)
    assert_equal(x_0, expected)
    other = gaussian_noise(given_["seed"], ids, (4, 5, 7), 0, Stream.TRAINING_NOISE)
    assert float((x_0 - other).abs().min()) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_sees_the_latent_that_was_noised_to_the_bit(backend: Backend, layout: str) -> None:
    plain = of_denoising_loss((3, 4, 9, 7), "x0", latent=True)
    plain["images"] = lay_out(plain["images"], layout)
    noising = {name: plain[name] for name in of_the_loss.NOISING}
    x_0 = drawn(backend, noising)
    loss, gradient = of_the_loss.differentiate({**backend.moved(plain), "prediction": x_0})
    assert not loss.any()
    assert not gradient.any()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_that_of_the_latents_as_images(
    backend: Backend, target: str, learned: bool
) -> None:
    """Of those within the range of images; to the bit where nothing is fused or reordered."""
    plain = of_denoising_loss((3, 2, 9, 7), target, learned=learned, latent=True)
    plain["images"] = plain["images"].clamp(-2, 2)
    plain["latent_scale"] = 0.05
    given_ = backend.moved(plain)
    x_0 = drawn(backend, {name: plain[name] for name in of_the_loss.NOISING})
    assert float(x_0.abs().max()) < 0.999
    as_images = {**given_, "images": x_0, "latent_scale": None, "latent_shift": 0.0}
    loss, gradient = of_the_loss.differentiate(given_)
    expected, expected_gradient = of_the_loss.differentiate(as_images)
    if backend.name == "interpreter":
        assert_equal(loss, expected)
    if backend.device.type == "cpu":
        assert_equal(gradient, expected_gradient)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_moments_are_not_read_when_the_target_is_the_noise(backend: Backend) -> None:
    """Nor for a learned variance, as a latent has no outermost bins."""
    plain = of_denoising_loss(target="eps", learned=True, latent=True)
    unreadable = {**plain, "images": torch.full_like(plain["images"], float("nan"))}
    for ours, expected in zip(
        of_the_loss.differentiate(backend.moved(unreadable)),
        of_the_loss.differentiate(backend.moved(plain)),
        strict=True,
    ):
        assert_equal(ours, expected)


def test_a_latent_depends_on_its_position_alone(backend: Backend) -> None:
    """Not on its batch, its place in it, or the layout and precision of the moments."""
    plain = of_q_sample((5, 4, 5, 7), latent=True)
    x_0 = drawn(backend, plain)
    for chosen in (slice(2, 3), slice(1, None, 2), [4, 0, 2, 1, 3]):
        part = {k: v[chosen] if k in of_noising.PER_SAMPLE and v is not None else v
                for k, v in plain.items()}  # fmt: skip
        assert_equal(drawn(backend, part), x_0[chosen])
    for layout in LAYOUTS:
        laid_out = {**plain, "images": lay_out(plain["images"], layout)}
        assert_equal(drawn(backend, laid_out), x_0, layout)
    assert_equal(drawn(backend, {**plain, "images": plain["images"].float()}), x_0)
    later = {**plain, "sample_ids": plain["sample_ids"] + 5}
    random = stored_moments((5, 4, 5, 7))[:, 4:] > -20
    assert bool((drawn(backend, later) != x_0).cpu()[random].all())


def test_ends_of_the_range_of_log_variances(backend: Backend) -> None:
    plain = of_q_sample((2, 3, 5, 4), latent=True)
    plain["images"][:1, 3:], plain["images"][1:, 3:] = 20, -30
    exact, _ = of_noising.clean_and_noise(plain)
    assert float(exact[0].abs().max()) > 1e4
    assert_within(drawn(backend, plain), exact, of_noising.clean_is_off_by(plain))


def test_without_a_distribution_the_mean_is_taken(backend: Backend) -> None:
    plain = of_q_sample((2, 3, 5, 4), latent=True)
    plain["images"][:, 3:] = -torch.inf
    exact = (plain["images"][:, :3].double() - LATENT["latent_shift"]) * LATENT["latent_scale"]
    assert_within(drawn(backend, plain), exact, 2 * EPS32 * (exact.abs() + 1))


def test_log_variances_past_32_bits(backend: Backend) -> None:
    """A channel's stride fits; that of all means does not. Memory not touched is not committed."""
    far = 2**30
    plain = of_q_sample((2, 2, 2, 2), latent=True)
    storage = torch.empty(3 * far + 64, dtype=torch.float16, device=backend.device)
    moments = storage.as_strided((2, 4, 2, 2), (16, far, 2, 1)).copy_(plain["images"])
    of_noising.check(q_sample(**{**backend.moved(plain), "images": moments}), plain)


def test_empty_batch(backend: Backend) -> None:
    x_t = q_sample(**backend.moved(of_q_sample((0, 3, 5, 4), latent=True)))
    assert x_t.shape == (0, 3, 5, 4)
    loss, gradient = of_the_loss.differentiate(
        backend.moved(of_denoising_loss((0, 3, 5, 4), latent=True))
    )
    assert loss.shape == (0,)
    assert gradient.shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": torch.tensor([True] * 3)}, "moments of the mirrored image"),
        ({"images": torch.zeros(3, 6, 5, 4, dtype=torch.uint8)}, "uint8.*must be moments"),
        ({"images": torch.zeros(3, 5, 5, 4)}, r"\(3, 5, 5, 4\).*must be moments, \[B, 2C"),
        ({"latent_scale": None}, r"latent_shift is 0\.1159, but latent_scale is None"),
    ],
)
def test_what_are_no_moments_is_refused(changes: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        q_sample(**{**of_q_sample(latent=True), **changes})
    with pytest.raises(ValueError, match=message):
        denoising_loss(**{**of_denoising_loss(latent=True), **changes})
