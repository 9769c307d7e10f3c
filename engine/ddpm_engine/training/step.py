"""One optimizer step (Ho et al. 2020, algorithm 1), in two halves that do not wait for each other.

The host reads the step's micro-batches, brings them to the device with the step's numbers, and
starts the device's half, which reads and writes nothing but tensors that are there already. What
became of it is a row of numbers that the host reads exactly one step later, when the device has
the next step to work on; what follows from it is in `Run.settle`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.distributed import Ranks, world_size
from ddpm_engine.errors import UserError
from ddpm_engine.graphs import Work
from ddpm_engine.objectives.base import Objective
from ddpm_engine.training.capture import warm_up
from ddpm_engine.training.ema import decays
from ddpm_engine.training.inputs import Inputs, Numbers, make_inputs
from ddpm_engine.training.lr_schedule import learning_rate
from ddpm_engine.training.reports import Column
from ddpm_engine.training.run import Run
from ddpm_engine.training.signals import StopRequest
from ddpm_engine.training.strategies.strategy import Strategy

logger = logging.getLogger(__name__)


def device_step(
    objective: Objective, strategy: Strategy, inputs: Inputs, row: Tensor, ranks: Ranks
) -> None:
    """Do the device's half of a step; the host reads no tensor in it.

    A step whose gradient is not finite changes nothing, and none does if `skip` is set.

    Args:
        objective: loss of the run.
        strategy: holds the weights.
        inputs: the micro-batches and numbers of the step.
        row: `[len(Column)]`, is given what the step has to report.
        ranks: collectives over all ranks.
    """
    losses = []
    for piece, batch in enumerate(inputs.batches, start=1):
        with strategy.accumulate(last=piece == len(inputs.batches)):
            loss = objective(strategy.network, batch).mean()
            strategy.backward(loss)
        losses.append(loss.detach())
    numbers = inputs.numbers
    norm = strategy.step(numbers.learning_rate, numbers.ema_weights, numbers.skip)
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
    row[: Column.GRAD_NORM].copy_(ranks.sum(torch.cat([loss[None], numbers.counts])))
    # Gradients are the same on every rank by now.
    row[Column.GRAD_NORM].copy_(norm)


class TrainingStep:
    """The host's half of every step of a run; all ranks call it together.

    Args:
        run: the run.
        batches: micro-batches of this rank, from its next step on.
        stop: signals that this process receives.
    """

    def __init__(self, run: Run, batches: Iterator[Batch], stop: StopRequest) -> None:
        self._run = run
        self._batches = batches
        self._stop = stop
        self._decays = list(decays(run.config.training).values())
        self._inputs = make_inputs(run.device, len(self._decays), static=run.capture is not None)
        self._replay: Work | None = None

    def take(self, limited: bool) -> None:
        """Start one optimizer step, count it, and read what the step before has reported.

        Args:
            limited: whether the watchdog's time-out applies.

        Raises:
            Stopped: a signal has asked to stop while the data were waited for; the step is not
                taken.
            NotFiniteError, UserError: what the step before reports ends the run; see `Run.settle`.
            UserError: the step cannot be captured.
        """
        run, started = self._run, time.perf_counter()
        run.watchdog.doing(f"reading data for step {run.step + 1}", limited)
        batches = [self._next_batch() for _ in range(run.config.training.accumulation)]
        waited = time.perf_counter() - started
        run.watchdog.doing(f"computing step {run.step + 1}", limited)
        changed = run.objective.begin_step(run.step, self._averaged_weights)
        self._inputs.load(batches, self._numbers(batches))
        if run.capture is not None and (self._replay is None or changed):
            self._replay = self._captured()
        (self._replay or self._on_device)()
        run.step += 1
        run.reports.send(run.step)
        taken = time.perf_counter() - started
        run.settle(but=1)
        run.meters.add_time(taken, waited)  # not to the log line of the step before
        if run.objective.learns_on_host:
            run.settle()
            run.objective.end_step(run.ranks if run.changed == run.step else None)

    def _on_device(self) -> None:
        run = self._run
        device_step(run.objective, run.strategy, self._inputs, run.reports.row, run.ranks)

    def _captured(self) -> Work:
        """Capture the device's half, after steps that change nothing.

        Raises:
            UserError: something in it cannot be captured.
        """
        assert self._run.capture is not None
        self._replay = None  # its memory is needed
        self._inputs.numbers.skip.fill_(1)
        warm_up(self._on_device, self._run.device)
        try:
            replay = self._run.capture(self._on_device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"a training step ran, but could not be captured as a CUDA graph ({reason}); let "
                "`training.capture` be off",
                "training.capture",
            ) from error
        self._inputs.numbers.skip.fill_(0)
        return replay

    def _next_batch(self) -> Batch:
        """Read a micro-batch."""
        step = self._run.step + 1
        # One rank alone cannot give up: the others would wait for it in the middle of the step.
        with self._stop.waiting(f"the data of step {step}", gives_up=world_size() == 1):
            batch = next(self._batches)
        for fault in batch.faults:
            logger.warning("replaced an unreadable sample: %s", fault)
        text = self._run.text
        return batch if text is None else text.encoded(batch)

    def _numbers(self, batches: list[Batch]) -> Numbers:
        step = self._run.step
        return Numbers(
            learning_rate(self._run.config, step),
            [1 - decay(step) for decay in self._decays],
            stop=bool(self._stop),
            replaced=sum(len(batch.faults) for batch in batches),
        )

    def _averaged_weights(self) -> dict[str, Tensor]:
        """The EMA weights, whole on every rank; all of them call this together."""
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self._run.strategy.averages()["ema"].items()
        }
