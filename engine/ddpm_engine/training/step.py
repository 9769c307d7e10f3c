"""One optimizer step (Ho et al. 2020, algorithm 1)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import rank, world_size
from ddpm_engine.errors import NotFiniteError, UserError
from ddpm_engine.locations import redacted
from ddpm_engine.training.ema import decays
from ddpm_engine.training.lr_schedule import learning_rate
from ddpm_engine.training.run import Run
from ddpm_engine.training.signals import StopRequest
from ddpm_kernels import Stream
from ddpm_kernels.philox import random_words

logger = logging.getLogger(__name__)


def train_step(run: Run, batches: Iterator[Batch], stop: StopRequest, limited: bool) -> None:
    """Take one optimizer step and count it; all ranks call this together.

    A step whose gradient is not finite changes nothing but the counters.

    Args:
        run: the run; `stop_requested` is set if any rank was asked to stop.
        batches: micro-batches of this rank.
        stop: signals that this process has received.
        limited: whether the watchdog's time-out applies.

    Raises:
        Stopped: a signal has asked to stop while the data were waited for; the step is not taken.
        NotFiniteError: gradients stay non-finite.
        UserError: too many samples are unreadable.
    """
    started = time.perf_counter()
    training = run.config.training
    # Dropout is the network's only randomness; seeding it here leaves no state to save.
    torch.manual_seed(_dropout_seed(run))
    run.objective.begin_step(run.step, lambda: _averaged_weights(run))

    losses, replaced = [], 0
    for piece in range(1, training.accumulation + 1):
        batch = _next_batch(run, batches, stop, limited)
        replaced += len(batch.faults)
        with run.strategy.accumulate(last=piece == training.accumulation):
            loss = run.objective(run.strategy.network, batch).mean()
            run.strategy.backward(loss)
        losses.append(loss.detach())
    norm = float(run.strategy.step(*_numbers(run)))

    loss = torch.stack(losses).mean()
    own = torch.tensor([float(bool(stop)), replaced], device=loss.device)
    loss_sum, stops, replaced = run.ranks.sum(torch.cat([loss[None], own])).tolist()
    run.stop_requested = stops > 0
    _count_bad_samples(run, int(replaced))
    # Gradients are the same on every rank by now, so all of them decide alike.
    finite = math.isfinite(norm)
    run.objective.end_step(run.ranks if finite else None)
    if finite:
        run.meters.add(loss_sum / world_size(), norm)
        run.bad_steps, run.changed = 0, run.step + 1
    else:
        _count_bad_step(run, loss_sum / world_size(), norm)
    run.meters.seconds += time.perf_counter() - started
    run.step += 1


def _numbers(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Learning rate, 1 − decay of each average, and zero: nothing is skipped."""
    rate = learning_rate(run.config, run.step)
    weights = [1 - decay(run.step) for decay in decays(run.config.training).values()]
    return (
        torch.tensor(rate, dtype=torch.float64, device=run.device),
        torch.tensor(weights, dtype=torch.float64, device=run.device),
        torch.zeros((), device=run.device),
    )


def _next_batch(run: Run, batches: Iterator[Batch], stop: StopRequest, limited: bool) -> Batch:
    """Read a micro-batch, measuring how long that takes."""
    started = time.perf_counter()
    run.watchdog.doing(f"reading data for step {run.step + 1}", limited)
    # One rank alone cannot give up: the others would wait for it in the middle of the step.
    with stop.waiting(f"the data of step {run.step + 1}", gives_up=world_size() == 1):
        batch = next(batches)
    run.watchdog.doing(f"computing step {run.step + 1}", limited)
    run.meters.waiting += time.perf_counter() - started
    for fault in batch.faults:
        logger.warning("replaced an unreadable sample: %s", fault)
    return batch


def _count_bad_step(run: Run, loss: float, norm: float) -> None:
    """Report a step that was skipped; too many in a row end the run."""
    run.bad_steps += 1
    run.meters.skipped += 1
    training = run.config.training
    first = run.step * training.batch_size
    last = first + training.batch_size - 1
    logger.warning(
        "step %d is skipped: loss %s, gradient norm %s; samples at positions %d to %d",
        run.step + 1, loss, norm, first, last,
    )  # fmt: skip
    if run.bad_steps >= training.max_bad_steps:
        raise NotFiniteError(
            f"the gradient was not finite for {run.bad_steps} steps in a row, lastly at step "
            f"{run.step + 1} (loss {loss}, positions {first} to {last}). Lower "
            f"`optimizer.learning_rate` ({run.config.optimizer.learning_rate}) or let "
            f"`training.precision` be no ({training.precision})"
        )


def _count_bad_samples(run: Run, replaced: int) -> None:
    """Count the samples that all ranks replaced in a step; too many end the run."""
    run.bad_samples += replaced
    data = run.config.data
    if run.bad_samples > data.max_bad_samples:
        raise UserError(
            f"{run.bad_samples} samples of {redacted(str(data.path))} were unreadable (each is "
            f"named above), more than `data.max_bad_samples` {data.max_bad_samples}. Verify the "
            "shards, and pack them again",
            "data.max_bad_samples",
        )


def _averaged_weights(run: Run) -> dict[str, torch.Tensor]:
    """The EMA weights, whole on every rank; all of them call this together."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in run.strategy.averages()["ema"].items()
    }


def _dropout_seed(run: Run) -> int:
    """A function of the seed, the rank and the step."""
    own = torch.tensor([rank()])
    low, high = random_words(run.config.training.seed, own, 2, run.step, Stream.DROPOUT)[0]
    return int(low) | int(high) << 32
