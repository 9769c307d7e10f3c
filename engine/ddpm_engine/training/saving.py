"""The state of a run, to a checkpoint and back."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from ddpm_engine.checkpoints.store import Checkpoint, CheckpointStore, load_part
from ddpm_engine.config import RunConfig, to_dict
from ddpm_engine.errors import UserError
from ddpm_engine.training.meters import Meters
from ddpm_engine.training.run import Run
from ddpm_engine.training.strategies.strategy import State

logger = logging.getLogger(__name__)


def checkpoint_store(config: RunConfig, group: dist.ProcessGroup | None = None) -> CheckpointStore:
    """The checkpoints of a run.

    Args:
        config: the run.
        group: process group of all ranks to save over; None: the default group.
    """
    log = config.log
    return CheckpointStore(config.out / "checkpoints", log.keep_checkpoints, log.keep_every, group)


def parts_of(run: Run) -> State:
    """All tensors of a run's state, by part of a checkpoint."""
    learnt = run.objective.state()
    return {**run.strategy.state(), **({"objective": learnt} if learnt else {})}


def state_of(run: Run) -> dict[str, Any]:
    """The rest of a run's state, as JSON values."""
    loss_scale = run.strategy.loss_scale
    return {
        "config": to_dict(run.config),
        "samples_seen": run.step * run.config.training.batch_size,
        "seed": run.config.training.seed,
        "data": run.dataset.fingerprint,
        "classes": run.classes,
        "window": run.meters.state(),
        "bad_steps": run.bad_steps,
        "bad_samples": run.bad_samples,
        "loss_scale": None if loss_scale is None else loss_scale.state(),
    }


def resume(run: Run) -> None:
    """Load the newest sound checkpoint of a run, if there is any; all ranks call this together.

    Raises:
        UserError: there are checkpoints but none can be used, or it is of another architecture.
    """
    store = checkpoint_store(run.config)
    checkpoint, rejected = store.newest()
    for reason in rejected:
        logger.warning("cannot use %s", reason)
    if checkpoint is None:
        if rejected:
            raise UserError(
                f"none of the checkpoints in {store.directory} can be used (reasons "
                "above); restore one, or choose another `out` to start again"
            )
        return
    _load(run, checkpoint)
    logger.info("resuming %s from step %d", run.config.out, run.step)


def _load(run: Run, checkpoint: Checkpoint) -> None:
    parts = parts_of(run)
    for name, part in parts.items():
        load_part(checkpoint.path, name, part)
    run.strategy.load(parts)
    run.objective.load(parts.get("objective", {}))
    state = checkpoint.state
    try:
        if run.strategy.loss_scale is not None and state["loss_scale"] is not None:
            run.strategy.loss_scale.load(state["loss_scale"])
        run.meters = Meters(**state["window"])
        run.bad_steps = int(state["bad_steps"])
        run.bad_samples = int(state["bad_samples"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.path} holds a state that this version did not write "
            f"({type(error).__name__}: {error}); choose another `out` to start again"
        ) from error
    run.step = checkpoint.step
