"""The state of a run, to a checkpoint and back."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from ddpm_engine.checkpoints.parts import check_finite, load_part
from ddpm_engine.checkpoints.recorded_config import record
from ddpm_engine.checkpoints.store import Checkpoint, CheckpointStore
from ddpm_engine.config import RunConfig
from ddpm_engine.distributed import is_main, raise_together
from ddpm_engine.errors import NotFiniteError, UserError
from ddpm_engine.training.latents import check_same_latents
from ddpm_engine.training.meters import Meters
from ddpm_engine.training.run import Run
from ddpm_engine.training.strategies.strategy import State
from ddpm_engine.training.text import check_same_text

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
    """All tensors of a run's state, by part of a checkpoint; see `Run.settle` for errors."""
    run.settle()
    learnt = run.objective.state()
    return {**run.strategy.state(), **({"objective": learnt} if learnt else {})}


def state_of(run: Run) -> dict[str, Any]:
    """The rest of a run's state, as JSON values; see `Run.settle` for errors."""
    run.settle()
    loss_scale = run.strategy.loss_scale
    return {
        "config": record(run.config),
        "samples_seen": run.step * run.config.training.batch_size,
        "seed": run.config.training.seed,
        "data": run.dataset.fingerprint,
        "classes": run.classes,
        "window": run.meters.state(),
        "bad_steps": run.step - run.changed,
        "bad_samples": run.bad_samples,
        "loss_scale": None if loss_scale is None else loss_scale.state(),
        **embedders_of(run),
    }


def embedders_of(run: Run) -> dict[str, Any]:
    """What a run's network was trained with besides the images, as JSON values; {} if nothing.

    `text_encoder`: place and fingerprint of the encoder of its captions, and the length in tokens
    that they are padded or cut to. `image_embeddings`: name, fingerprint and channels of those that
    it is conditioned on or generates. `autoencoder`: place, fingerprint, scale and shift of the one
    whose latents it generates.
    """
    found = {}
    if run.text is not None:
        found["text_encoder"] = run.text.record()
    if run.latents is not None:
        found["autoencoder"] = run.latents.record()
    if run.dataset.embeddings is not None:
        found["image_embeddings"] = asdict(run.dataset.embeddings)
    return found


def resume(run: Run) -> None:
    """Load the newest sound checkpoint of a run, if there is any; all ranks call this together.

    Raises:
        UserError: there are checkpoints but none can be used, or it is of another architecture.
    """
    store = checkpoint_store(run.config)
    below, some = None, False
    while True:
        checkpoint, rejected = store.newest(below=below)
        for reason in rejected:
            logger.warning("cannot use %s", reason)
        some = some or bool(rejected)
        if checkpoint is None:
            break
        try:
            _load(run, checkpoint)
        except NotFiniteError as error:
            logger.warning("cannot use %s", error)
            below, some = checkpoint.step, True
            continue
        logger.info("resuming %s from step %d", run.config.out, run.step)
        return
    if some:
        raise UserError(
            f"none of the checkpoints in {store.directory} can be used (reasons "
            "above); restore one, or choose another `out` to start again"
        )


def explain_end(run: Run, error: UserError) -> UserError:
    """Add to an error that ends a run which checkpoint there is to go on from.

    What this start saved of a state whose gradients are not finite is renamed first, so that the
    next start goes on from the newest checkpoint before it. One rank does that. What was there
    before this start keeps its name, since the cause may be what has changed since.
    """
    store = checkpoint_store(run.config)
    more = ""
    if isinstance(error, NotFiniteError) and is_main():
        try:
            renamed = [path.name for path in store.set_aside(max(run.changed, run.start + 1))]
        except OSError as failure:
            logger.error("a checkpoint of the failed state keeps its name: %s", failure)
        else:
            more = f" (set aside what came after it: {', '.join(renamed)})" if renamed else ""
        same = [store.path(step).name for step in store.steps() if step >= run.changed]
        if same:
            more += (
                f". No step since this start was finite: if that does not change, move "
                f"{' and '.join(same)} to another folder, and the run goes on from the checkpoint "
                "before"
            )
    newest = store.newest_complete()
    found = "there is no checkpoint"
    if newest is not None:
        found = f"the newest checkpoint is {newest.path}"
        if newest.step > run.start > 0:
            found += f", and this start began from {store.path(run.start).name}"
    return type(error)(f"{error}; {found}{more}", error.field)


def _load(run: Run, checkpoint: Checkpoint) -> None:
    parts = parts_of(run)
    for name, part in parts.items():
        load_part(checkpoint.path, name, part)
    with raise_together(NotFiniteError):
        for name, part in parts.items():
            check_finite(str(checkpoint.path / name), part)
    run.strategy.load(parts)
    run.objective.load(parts.get("objective", {}))
    state = checkpoint.state
    check_same_text(state.get("text_encoder"), run.text, str(checkpoint.path))
    check_same_latents(state.get("autoencoder"), run.latents, str(checkpoint.path))
    try:
        if run.strategy.loss_scale is not None and state["loss_scale"] is not None:
            run.strategy.loss_scale.load(state["loss_scale"])
        run.meters = Meters.of_state(state["window"])
        run.changed = checkpoint.step - int(state["bad_steps"])
        run.bad_samples = int(state["bad_samples"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.path} holds a state that this version did not write "
            f"({type(error).__name__}: {error}); choose another `out` to start again"
        ) from error
    run.step = run.start = checkpoint.step
