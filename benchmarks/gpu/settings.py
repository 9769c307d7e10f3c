"""Configurations of the runs that items train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ddpm_engine.config import RunConfig


def with_training(config: RunConfig, **values: Any) -> RunConfig:
    """Replace fields of `config.training`."""
    return replace(config, training=replace(config.training, **values))
