"""The likelihood by the probability-flow ODE, against densities that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.ode_likelihood import BIN, log_likelihood, ode_bits_per_dim
from ddpm_engine.diffusion.parameterization import parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError

MEANS = torch.tensor([[0.5, 0.2], [-0.4, -0.3]], dtype=torch.float64)
DEVIATION = 0.15
FLOW = FlowSchedule.build(1000, 2.0)
CASES: list[tuple[NoiseSchedule, str]] = [
    (NoiseSchedule.linear(), "eps"), (NoiseSchedule.cosine(), "x0"), (NoiseSchedule.linear(), "v"),
    (NoiseSchedule.edm(), "edm"), (NoiseSchedule.edm(), "flow"),
    (FLOW, "flow"), (FLOW, "x0"), (FLOW, "v"),
]  # fmt: skip


def level_of(prediction: str, schedule: NoiseSchedule, level: Tensor) -> tuple[Tensor, Tensor]:
    """a and s of a noise level that a network is given."""
    if prediction == "flow":
        tau = level.double() / schedule.timesteps
    elif prediction == "edm":
        tau = (4 * level.double()).sigmoid()
    else:
        tau = schedule.log_sigma_at(level.double()).sigmoid()
    norm = (tau.square() + (1 - tau).square()).sqrt()
    return (1 - tau) / norm, tau / norm


def best(prediction: str, schedule: NoiseSchedule, x0: Any) -> Any:
    """A network by its estimate of x_0 from x_t, a and s."""
    row = parameterization(prediction, schedule)

    def network(z: Tensor, level: Tensor, conditioning: object) -> Tensor:
        a, s = (factor[0] for factor in level_of(prediction, schedule, level))
        z = z.double()
        return row.from_x0(x0(z / row.state_scale(a, s), a, s), z, a, s)

    return network


def mixture_x0(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | x_t] of points of the plane from an even mixture of two Gaussians."""
    away = x.flatten(1)[:, None] - a * MEANS
    variance = (a * DEVIATION) ** 2 + s**2
    shares = (-away.square().sum(-1) / (2 * variance)).softmax(1)
    means = MEANS + a * DEVIATION**2 / variance * away
    return (shares[..., None] * means).sum(1)[:, :, None, None]


def points(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (MEANS[torch.arange(count) % 2] + DEVIATION * noise)[:, :, None, None]


def exact(schedule: NoiseSchedule, x: Tensor) -> Tensor:
    """log p of points, with the noise of the first timestep."""
    variance = DEVIATION**2 + schedule.log_sigma[0].exp() ** 2
    square = (x.flatten(1)[:, None] - MEANS).square().sum(-1)
    return (-square / (2 * variance)).logsumexp(1) - math.log(2) - (2 * math.pi * variance).log()


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_exact_trace_on_a_mixture(schedule: NoiseSchedule, prediction: str) -> None:
    x = points(20)
    network = best(prediction, schedule, mixture_x0)
    errors = [
        (
            log_likelihood(
                network, schedule, x, torch.arange(20), prediction=prediction, steps=steps,
                exact=True, clip=False,
            )
            - exact(schedule, x)
        ).abs().max().item()
        for steps in (25, 100)
    ]  # fmt: skip
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 6


def test_hutchinsons_estimate_has_the_right_mean() -> None:
    x = points(1).expand(400, -1, -1, -1)
    found = log_likelihood(
        best("flow", FLOW, mixture_x0), FLOW, x, torch.arange(400), seed=5, prediction="flow",
        steps=40, clip=False,
    )  # fmt: skip
    (expected,) = log_likelihood(
        best("flow", FLOW, mixture_x0), FLOW, x[:1], torch.arange(1), prediction="flow", steps=40,
        exact=True, clip=False,
    )  # fmt: skip
    assert found.std() > 0.01
    assert abs(found.mean() - expected) < 4 * found.std() / 20


def test_a_result_depends_on_seed_and_id_and_not_on_the_batch() -> None:
    x, ids = points(4), torch.tensor([3, 2**40, 7, 9])
    network = best("flow", FLOW, mixture_x0)

    def of(part: slice, seed: int = 5) -> Tensor:
        return log_likelihood(
            network, FLOW, x[part], ids[part], seed=seed, prediction="flow", steps=5, clip=False
        )

    together = of(slice(None))
    alone = torch.cat([of(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=0)
    assert not torch.equal(of(slice(None), seed=6), together)


def test_bits_of_bytes_of_independent_pixels() -> None:
    """Their trace is a sum over pixels, which random signs estimate without error."""
    deviation = 0.3
    generator = torch.Generator().manual_seed(1)
    pixels = deviation * torch.randn(8, 1, 16, 16, generator=generator, dtype=torch.float64)
    images = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def x0(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return a * deviation**2 / (a**2 * deviation**2 + s**2) * x

    found = ode_bits_per_dim(
        best("flow", FLOW, x0), FLOW, images, torch.arange(8), prediction="flow", clip=False
    )
    values = (2 * torch.arange(256, dtype=torch.float64) - 255) / 255
    cdf = torch.special.ndtr
    mass = cdf((values + BIN / 2) / deviation) - cdf((values - BIN / 2) / deviation)
    expected = -mass.log2()[images.long()].mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_invalid_inputs_are_refused() -> None:
    network = best("flow", FLOW, mixture_x0)
    with pytest.raises(ValueError, match="float64"):
        ode_bits_per_dim(network, FLOW, points(1), torch.arange(1), prediction="flow")
    with pytest.raises(UserError, match="ends in pure noise"):
        log_likelihood(network, FLOW, points(1), torch.arange(1), prediction="eps")
