"""What the launcher asked for, read from the environment variables it sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_engine.config import TrainingConfig
from ddpm_engine.errors import UserError
from ddpm_engine.json_files import as_int, described, read_object
from ddpm_engine.launched import check_launched_precision, launched_as

_PLUG_INS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
_FILES = "launch/accelerate/"
# DeepSpeed's file must not set what the run's configuration sets, or the engine decides.
_OURS = {
    "train_batch_size": "`training.batch_size`",
    "train_micro_batch_size_per_gpu": "`training.batch_size` and `training.accumulation`",
    "gradient_accumulation_steps": "`training.accumulation`",
    "gradient_clipping": "`optimizer.clip_norm`",
    "optimizer": "the optimizer fields",
    "scheduler": "`optimizer.warmup_steps`",
    "fp16": "`training.precision`",
    "bf16": "`training.precision`",
    "torch_autocast": "`training.precision`",
}
_OFFLOADS = ("offload_optimizer", "offload_param")


@dataclass(frozen=True)
class Request:
    """A strategy that a launcher's file or environment asks for."""

    processes: int
    """Number of processes started."""
    fsdp: bool = False
    """FSDP2."""
    reshard_after_forward: bool = True
    """Option of FSDP2; see `shard_network`."""
    deepspeed: dict[str, Any] | None = None
    """Content of DeepSpeed's configuration file; None: no DeepSpeed."""


def read_request(training: TrainingConfig) -> Request:
    """Read what `accelerate launch`, torchrun or srun left in the environment.

    Raises:
        UserError: it asks for something that this engine does not support, or that contradicts the
            run's configuration, where Accelerate would silently do something else.
    """
    environment = os.environ
    _, processes = launched_as(environment)
    _check_agreement(environment, training)
    for flag in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if _is_set(environment, flag):
            raise UserError(
                f"the launcher sets {flag}, which this engine does not do; use a file of {_FILES}"
            )
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        return Request(processes, deepspeed=_read_deepspeed_config(environment))
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        return Request(processes)
    if environment.get("FSDP_VERSION", "2") != "2":
        raise UserError(
            f"the launcher asks for FSDP version {environment['FSDP_VERSION']}; this engine does "
            f"version 2: set fsdp_version: 2, or use {_FILES}fsdp2.yaml"
        )
    for flag, instead in [
        ("FSDP_OFFLOAD_PARAMS", f"use {_FILES}zero3_offload.yaml"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "let `training.recompute` be blocks"),
    ]:
        if _is_set(environment, flag):
            raise UserError(f"the launcher sets {flag}, which this engine does not do; {instead}")
    # Version 1 had words for it; what is not "false" frees weights after the forward pass.
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    return Request(processes, fsdp=True, reshard_after_forward=reshard)


@contextmanager
def without_plug_ins() -> Iterator[None]:
    """Hide the request from Accelerate, whose plug-ins silently do DDP, or nothing, on CPUs."""
    hidden = {name: os.environ.pop(name) for name in _PLUG_INS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _check_agreement(environment: Mapping[str, str], training: TrainingConfig) -> None:
    """Check that the launcher's file does not contradict the run's configuration."""
    check_launched_precision(training.precision, "training.precision", environment)
    name, ours = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", training.accumulation
    theirs = environment.get(name, "1")
    if theirs not in ("1", str(ours)):
        raise UserError(
            f"the launcher asks for {name}={theirs} but `training.accumulation` is {ours}; set "
            f"`training.accumulation` to {theirs}, or leave it out of the launcher's file"
        )


def _read_deepspeed_config(environment: Mapping[str, str]) -> dict[str, Any]:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None:
        raise UserError(
            "the launcher asks for DeepSpeed without a file that says how: set "
            f"deepspeed_config_file, as {_FILES}zero2.yaml does"
        )
    try:
        config = read_object(Path(path))
    except FileNotFoundError as error:
        raise UserError(
            f"DeepSpeed's configuration cannot be read: {error}; paths in a launcher's file count "
            "from the folder that the launcher is started in"
        ) from None
    zero = config.get("zero_optimization", {})
    offloads = {} if not isinstance(zero, dict) else {key: zero.get(key, {}) for key in _OFFLOADS}
    for name, value in [
        ("zero_optimization", zero),
        *((f"zero_optimization.{key}", offload) for key, offload in offloads.items()),
    ]:
        if not isinstance(value, dict):
            raise UserError(f"{name} is {described(value)} in {path}; it must be a JSON object")
    stage = zero.get("stage", 0)
    if as_int(stage) not in (1, 2, 3):
        raise UserError(
            f"zero_optimization.stage is {described(stage)} in {path}; it must be 1, 2 or 3"
        )
    for key in sorted(_OURS.keys() & config.keys()):
        raise UserError(f"{path} sets {key}; leave it out, {_OURS[key]} says it")
    for key, offload in offloads.items():
        where = offload.get("device", "none")
        if where not in ("none", "cpu"):
            raise UserError(f"zero_optimization.{key}.device is {where} in {path}; use cpu or none")
    return config


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
