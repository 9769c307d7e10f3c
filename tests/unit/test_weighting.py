"""Weights of timesteps against the formulas that the papers print, for every prediction."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.parameterization import Prediction
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.weighting import min_snr_weights, p2_weights, vlb_weights
from ddpm_engine.rules import validate
from ddpm_engine.training.build_objective import build_objective

STEPS = 1000
SCHEDULE = NoiseSchedule.linear(STEPS)
BETAS = [1e-4 + (0.02 - 1e-4) * t / (STEPS - 1) for t in range(STEPS)]


def alpha_bar(t: int) -> float:
    return math.prod(1 - beta for beta in BETAS[: t + 1])


def snr(t: int) -> float:
    return alpha_bar(t) / (1 - alpha_bar(t))


def check(table: Tensor, expected: dict[int, float]) -> None:
    assert table.dtype == torch.float64
    assert table.shape == (STEPS,)
    for t, weight in expected.items():
        assert table[t].item() == pytest.approx(weight, rel=1e-9), t


AT = (0, 500, STEPS - 1)
OBJECTIVE = ObjectiveConfig(min_snr_gamma=3.0, p2_gamma=0.5, p2_k=2.0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr(prediction: Prediction) -> None:
    """Hang et al. 2023: table of section 3.4."""
    formula = {
        "eps": lambda t: min(1, 5 / snr(t)),
        "x0": lambda t: min(snr(t), 5),
        "v": lambda t: min(snr(t), 5) / (snr(t) + 1),
    }[prediction]
    assert snr(0) > 5 > snr(500)
    check(min_snr_weights(SCHEDULE, prediction), {t: formula(t) for t in AT})


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_p2(prediction: Prediction, gamma: float, k: float) -> None:
    """Choi et al. 2022, equation 8, on ε; the other errors are ε's times 1 / SNR and 1 / ᾱ."""
    of_eps = {"eps": lambda t: 1.0, "x0": snr, "v": alpha_bar}[prediction]
    expected = {t: of_eps(t) / (k + snr(t)) ** gamma for t in AT}
    check(p2_weights(SCHEDULE, prediction, gamma, k), expected)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_vlb(prediction: Prediction) -> None:
    """Ho et al. 2020, equation 12; for x_0 half a difference of SNRs (Kingma et al. 2021)."""

    def variance(t: int) -> float:
        return BETAS[t] * (1 - alpha_bar(t - 1)) / (1 - alpha_bar(t))

    def of_eps(t: int) -> float:
        sigma2 = variance(max(t, 1))
        return BETAS[t] ** 2 / (2 * sigma2 * (1 - BETAS[t]) * (1 - alpha_bar(t)))

    def of_x0(t: int) -> float:
        return 1 / (2 * variance(1)) if t == 0 else (snr(t - 1) - snr(t)) / 2

    formula = {"eps": of_eps, "x0": of_x0, "v": lambda t: of_x0(t) / (1 + snr(t))}[prediction]
    check(vlb_weights(SCHEDULE, prediction), {t: STEPS * formula(t) for t in (*AT, 1)})


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_configuration_names_the_weights(prediction: Prediction) -> None:
    expected = {
        "simple": None,
        "min-snr": min_snr_weights(SCHEDULE, prediction, 3.0),
        "p2": p2_weights(SCHEDULE, prediction, 0.5, 2.0),
        "vlb": vlb_weights(SCHEDULE, prediction),
    }
    for weighting, table in expected.items():
        config = RunConfig(
            diffusion=DiffusionConfig(prediction=prediction),
            objective=replace(OBJECTIVE, weighting=weighting),  # type: ignore[arg-type]
        )
        validate(config)
        built = build_objective(config, SCHEDULE)
        assert isinstance(built, DenoisingObjective)
        assert built._chain is not None
        if table is None:
            assert built._chain.weights is None
        else:
            assert built._chain.weights is not None
            torch.testing.assert_close(built._chain.weights, table.float(), rtol=0, atol=0)
