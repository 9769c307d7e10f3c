"""What `training.precision` auto stands for in a run."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.runtime import choose_precision, has_precision
from ddpm_engine.training.run_directory import begun_with

logger = logging.getLogger(__name__)


def settle_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Replace `training.precision` auto by what it stands for; the run records the result.

    A run keeps the precision that it began with, wherever it is resumed, so that losses before and
    after compare. Only a device that has none such computes in its own, and says so: weights,
    moments and averages are float32 in any precision, so the run goes on all the same.

    Args:
        config: the run.
        device: of this rank.
    """
    training = config.training
    if training.precision != "auto":
        return config
    chosen = choose_precision("auto", device)
    before = begun_with(config.out)
    recorded = "auto" if before is None else before.training.precision
    insists = recorded == "bf16" and training.allow_slow_bf16
    if recorded != "auto" and (insists or has_precision(recorded, device)):
        chosen = recorded
    elif recorded not in ("auto", chosen):
        logger.warning(
            "the run in %s began in %s, which %s does not have; it goes on in %s, whose losses "
            "differ by rounding",
            config.out, recorded, device, "float32" if chosen == "no" else chosen,
        )  # fmt: skip
    return replace(config, training=replace(training, precision=chosen))
