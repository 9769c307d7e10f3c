"""Fields of a configuration that another build may lack."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from benchmarks.gpu.item import NotHereError

from ddpm_engine.config import RunConfig, TrainingConfig

_KNOWN = frozenset(field.name for field in fields(TrainingConfig))


def with_training(config: RunConfig, **values: Any) -> RunConfig:
    """Replace fields of `config.training`.

    Raises:
        NotHereError: this build has no such field.
    """
    if unknown := [name for name in values if name not in _KNOWN]:
        raise NotHereError(f"this build has no training.{unknown[0]}")
    return replace(config, training=replace(config.training, **values))


def captures() -> bool:
    """Whether this build can capture a training step."""
    return "capture" in _KNOWN
