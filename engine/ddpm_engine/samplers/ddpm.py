"""Ancestral sampling (Ho et al. 2020, algorithm 2), on all timesteps or a subset of them.

On a subset the chain is the one whose marginals are the schedule's at the timesteps kept, so
β′_t = 1 − ᾱ_t / ᾱ_{previous} (Nichol & Dhariwal 2021, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.table import CoefficientTable, empty_rows, table_for
from ddpm_kernels import Column


def ddpm_table(
    schedule: NoiseSchedule,
    timesteps: Tensor,
    prediction: str = "eps",
    variance: Variance = "fixed_large",
) -> CoefficientTable:
    """Build the table of ancestral sampling.

    Args:
        schedule: the noise schedule the network was trained on.
        timesteps: int64 `[S]`, strictly decreasing.
        prediction: what the network predicts.
        variance: `fixed_small` is the posterior's β̃_t, right if the data are a single point;
            `fixed_large` is β_t, right if the data are standard normal (section 3.2).
            `learned_range` interpolates between the two in the logarithm, by the second half of
            the network's 2C output channels (Nichol & Dhariwal 2021, equation 15).

    Raises:
        UserError: a prediction that needs a signal, on a schedule with zero terminal SNR.
    """
    alpha_bar = schedule.alpha_bar[timesteps]
    previous = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
    alpha = alpha_bar / previous
    beta = 1 - alpha
    posterior_variance = (1 - previous) / (1 - alpha_bar) * beta
    rows = empty_rows(len(timesteps))
    rows[:, Column.X0] = previous.sqrt() * beta / (1 - alpha_bar)
    rows[:, Column.X] = alpha.sqrt() * (1 - previous) / (1 - alpha_bar)
    if variance == "learned_range":
        # The last β̃ is zero: the one before stands in for it (the authors' code).
        floor = posterior_variance.clone()
        floor[-1] = posterior_variance[-2] if len(timesteps) > 1 else beta[-1]
        rows[:, Column.LOG_VARIANCE_MIN] = floor.log()
        rows[:, Column.LOG_VARIANCE_MAX] = beta.log()
        rows[:, Column.NOISE] = 1
    else:
        rows[:, Column.NOISE] = (posterior_variance if variance == "fixed_small" else beta).sqrt()
    rows[-1, Column.NOISE] = 0  # the last step returns the mean
    return table_for(schedule, timesteps, rows, prediction)
