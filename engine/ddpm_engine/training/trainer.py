"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.checkpoints.store import SNAPSHOTS, Checkpoint, CheckpointStore, load_part
from ddpm_engine.config import RunConfig, to_dict
from ddpm_engine.data.dataset import Batch
from ddpm_engine.data.loader import BatchPositions, make_batches
from ddpm_engine.data.open import make_missing_shards, open_dataset
from ddpm_engine.distributed import raise_together
from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.objectives.distillation.trajectory import Teacher
from ddpm_engine.objectives.objective import Objective
from ddpm_engine.runtime import autocast_forward
from ddpm_engine.training.accelerator import start_accelerator
from ddpm_engine.training.async_save import BackgroundSaver
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.meters import MetricsLog
from ddpm_engine.training.precompile import warm_up
from ddpm_engine.training.preview import draw_preview
from ddpm_engine.training.run_directory import claim_run_directory
from ddpm_engine.training.signals import StopRequest, stop_on_signals
from ddpm_engine.training.strategies.build import start_strategy
from ddpm_engine.training.strategies.launcher_env import read_request
from ddpm_engine.training.strategies.strategy import State
from ddpm_engine.training.watchdog import Watchdog
from ddpm_kernels import Stream
from ddpm_kernels.philox import random_words

logger = logging.getLogger(__name__)

REQUEUE_MARKER = "requeue"
"""A file of this name in the run directory: the run was told to stop and wants to go on."""


class Trainer:
    """One training run on this process's share of the hardware (Ho et al. 2020, algorithm 1).

    The state is the weights, their averages, the optimizer, the loss scale, what the objective has
    learnt and the number of steps done; data order and all noise follow from the seed and the step.

    Args:
        config: the run. Its directory is made, or continued if it holds the same run.

    Raises:
        UserError: whatever is wrong with the configuration, the data, the directory or the launch.
    """

    def __init__(self, config: RunConfig) -> None:
        config.validate()
        self.config = config
        request = read_request(config.training)
        self.accelerator = start_accelerator(config, request)
        device = self.accelerator.device

        torch.manual_seed(config.training.seed)
        model = UNet(config.model)
        teacher = self._load_teacher(model)
        with raise_together(UserError):
            if self.accelerator.is_main_process:
                make_missing_shards(config.data, config.model.sample_size)
        embeds = config.model.num_class_embeds
        with raise_together(UserError):
            self.dataset = open_dataset(
                config.data,
                size=config.model.sample_size,
                channels=config.model.in_channels,
                classes=None if embeds is None else embeds - 1,
                seed=config.training.seed,
                check=self.accelerator.is_main_process,
            )
        with raise_together(UserError):
            # By one process: two that write one file at a time take it from each other.
            if self.accelerator.is_main_process:
                self._lock = claim_run_directory(config, self.dataset.fingerprint)

        model.to(device)
        if config.training.activation_checkpointing:
            model.enable_activation_checkpointing()
        if config.training.compile:
            model.compile_blocks()
        self.schedule = config.diffusion.build_schedule()
        self.objective: Objective = build_objective(
            config, self.schedule, device, model.conditioning.null_class, teacher
        )
        if device.type != "cpu" and self.accelerator.num_processes > 1:
            # What the first process of a node compiles, the others find in the cache.
            with self.accelerator.local_main_process_first():
                warm_up(model, self.objective, self.accelerator, config)
        self.strategy = start_strategy(model.train(), request, config, self.accelerator)
        logger.info(
            "%s: %d process(es), first on %s, precision %s",
            self.strategy.name, self.accelerator.num_processes, device, config.training.precision,
        )  # fmt: skip
        self.checkpoints = CheckpointStore(
            config.out / "checkpoints",
            config.log.keep_checkpoints,
            config.log.keep_every,
            _group_for_saving(),
        )
        self._savers = {"checkpoint": BackgroundSaver(self.checkpoints)}
        if config.training.ema_profiles:
            snapshots = CheckpointStore(
                config.out / SNAPSHOTS, keep_every=1, group=_group_for_saving()
            )
            self._savers["snapshot"] = BackgroundSaver(snapshots)
        self._watch = Watchdog(config.training.timeout_seconds)
        self.step = 0
        self._window = _Window()
        self._bad_steps = 0
        self._failed_checkpoints = 0
        self._bad_samples = 0

    def _load_teacher(self, student: UNet) -> Teacher | None:
        """The network to distil, if any, and what else that takes; the student gets its weights."""
        config, device = self.config, self.accelerator.device
        if config.distillation.teacher is None:
            return None
        # That module reads checkpoints, and so imports this package.
        from ddpm_engine.training.teacher import load_teacher

        with raise_together(UserError):
            teacher = load_teacher(config, device)
        student.load_state_dict((teacher.student or teacher.network).state_dict())
        for network in filter(None, (teacher.network, teacher.critic)):
            autocast_forward(network, config.training.precision, device)
            if config.training.compile:
                network.compile_blocks()
        # Its weights are taken; it would stay in memory as long as the run.
        return replace(teacher, student=None)

    def fit(self) -> None:
        """Train to the last step, or until a signal asks to stop; resume if there is a checkpoint.

        Raises:
            UserError: gradients stay non-finite, or too many samples are unreadable.
        """
        training = self.config.training
        self._resume()
        marker = self.config.out / REQUEUE_MARKER
        if self.accelerator.is_main_process:
            marker.unlink(missing_ok=True)
        if self.step >= training.steps:
            logger.info("%s is already trained to step %d", self.config.out, self.step)
            self._leave()
            return
        metrics = MetricsLog(
            self.config.out / "metrics.jsonl",
            self.step,
            training.steps,
            active=self.accelerator.is_main_process,
        )
        self._start_tracker()
        try:
            with stop_on_signals() as stop, self._watch:
                stopped = self._loop(metrics, stop)
        finally:
            metrics.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self._leave()
        if stopped:
            if self.accelerator.is_main_process:
                with atomic_write(marker) as file:
                    file.write(f"stopped at step {self.step}\n".encode())
            logger.info("stopped at step %d; run the same command to go on", self.step)

    def _leave(self) -> None:
        """Leave the other ranks; not after an error, when those that had left would be awaited."""
        self.strategy.close()
        self.accelerator.state.destroy_process_group()

    def _loop(self, metrics: MetricsLog, stop: StopRequest) -> bool:
        """Train on; returns whether it was asked to stop before the last step."""
        config = self.config
        training, log = config.training, config.log
        batches = self._batches()
        first = self.step
        while self.step < training.steps:
            self._wait_for_saves(ahead=log.checkpoint_overlap)
            started = time.perf_counter()
            # The first step compiles, and reads data that may have to be fetched from afar.
            try:
                stopping = self._train_step(batches, stop, limited=self.step > first)
            except UserError:
                self._wait_for_saves()  # the run ends, but not half-way through one
                raise
            self._window.seconds += time.perf_counter() - started
            self.step += 1
            metrics.advance()
            last = self.step == training.steps
            stopping = stopping and not last
            if self.step % log.every == 0 or last:
                self._report(metrics)
            if self.step % log.checkpoint_every == 0 or last or stopping:
                self._save(wait=last or stopping)
            if training.ema_profiles and (self.step % log.snapshot_every == 0 or last):
                self._save_snapshot()
            if log.sample_every and (self.step % log.sample_every == 0) and not stopping:
                self._watch.doing("drawing pictures", limited=False)
                with self.strategy.averaged() as model:
                    draw_preview(
                        model, self.schedule, config, self.step, self.accelerator, self.dataset
                    )
            if stopping or last:
                self._wait_for_saves()
            if stopping:
                return True
        return False

    def _train_step(self, batches: Iterator[Batch], stop: StopRequest, limited: bool) -> bool:
        """Take one optimizer step; returns whether any rank was asked to stop."""
        training = self.config.training
        # Dropout is the network's only randomness of its own; seeding it leaves no state to save.
        torch.manual_seed(self._dropout_seed())
        self.objective.begin_step(self.step, self._averaged_weights)

        losses = []
        replaced = 0
        for piece in range(1, training.accumulation + 1):
            waited = time.perf_counter()
            self._watch.doing(f"reading data for step {self.step + 1}", limited)
            batch = next(batches)
            self._watch.doing(f"computing step {self.step + 1}", limited)
            self._window.waiting += time.perf_counter() - waited
            for fault in batch.faults:
                logger.warning("replaced an unreadable sample: %s", fault)
            replaced += len(batch.faults)
            losses.append(
                self.strategy.accumulate(
                    lambda network, batch=batch: self.objective(network, batch).mean(),  # type: ignore[misc]
                    last=piece == training.accumulation,
                )
            )
        norm_value = self.strategy.step(self.config.learning_rate(self.step))
        loss = torch.stack(losses).mean()
        own = torch.tensor([float(bool(stop)), replaced], device=loss.device)
        loss_sum, asked, replaced = self.accelerator.reduce(
            torch.cat([loss[None], own]), reduction="sum"
        ).tolist()
        self._note_faults(int(replaced))
        mean_loss = loss_sum / self.accelerator.num_processes
        # Gradients are the same on every rank by now, so all of them decide alike.
        finite = math.isfinite(norm_value)
        self.objective.end_step(self.accelerator.gather if finite else None)
        if finite:
            self.strategy.update_ema(self.step)
            self._window.add(mean_loss, norm_value)
            self._bad_steps = 0
        else:
            self._note_bad_step(mean_loss, norm_value)
        return asked > 0

    def _note_bad_step(self, loss: float, norm: float) -> None:
        self._bad_steps += 1
        self._window.skipped += 1
        first = self.step * self.config.training.batch_size
        last = first + self.config.training.batch_size - 1
        logger.warning(
            "step %d is skipped: loss %s, gradient norm %s; samples at positions %d to %d",
            self.step + 1, loss, norm, first, last,
        )  # fmt: skip
        if self._bad_steps >= self.config.training.max_bad_steps:
            raise UserError(
                f"the gradient was not finite for {self._bad_steps} steps in a row, lastly at step "
                f"{self.step + 1} (loss {loss}, positions {first} to {last}); the last checkpoint "
                f"is sound. Lower --optimizer.learning-rate "
                f"({self.config.optimizer.learning_rate}) or use --training.precision no "
                f"({self.config.training.precision})"
            )

    def _note_faults(self, replaced: int) -> None:
        """Count the samples that all ranks replaced in a step."""
        self._bad_samples += replaced
        allowed = self.config.data.max_bad_samples
        if self._bad_samples > allowed:
            raise UserError(
                f"{self._bad_samples} samples of {self.config.data.path} were unreadable (each is "
                f"named above), more than --data.max-bad-samples {allowed}. Check them with "
                f"'launch/make_shards.py verify {self.config.data.path}'"
            )

    def _averaged_weights(self) -> dict[str, torch.Tensor]:
        """The average that is sampled from, whole on every rank; all of them call this together."""
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self.strategy.averages()["ema"].items()
        }

    def _dropout_seed(self) -> int:
        rank = torch.tensor([self.accelerator.process_index])
        low, high = random_words(self.config.training.seed, rank, 2, self.step, Stream.DROPOUT)[0]
        return int(low) | int(high) << 32

    def _batches(self) -> Iterator[Batch]:
        positions = BatchPositions(
            self.config.training.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.config.training.accumulation,
            start_step=self.step,
            end_step=self.config.training.steps,
        )
        return make_batches(
            self.dataset,
            positions,
            self.config.data.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _parts(self) -> State:
        """All tensors of the run's state, by part of a checkpoint."""
        learnt = self.objective.state()
        return {**self.strategy.state(), **({"objective": learnt} if learnt else {})}

    def _save(self, wait: bool) -> None:
        """Begin to save; `wait` until it is done."""
        loss_scale = self.strategy.loss_scale
        state = {
            "config": to_dict(self.config),
            "samples_seen": self.step * self.config.training.batch_size,
            "seed": self.config.training.seed,
            "data": self.dataset.fingerprint,
            "window": self._window.state(),
            "bad_steps": self._bad_steps,
            "bad_samples": self._bad_samples,
            "loss_scale": None if loss_scale is None else loss_scale.state(),
        }
        self._wait_for_save("checkpoint")
        started = time.perf_counter()
        self._watch.doing(f"copying the state of step {self.step}", limited=False)
        self._savers["checkpoint"].start(self.step, self._parts(), state)
        self._window.checkpoint_stall_seconds += time.perf_counter() - started
        if wait:
            self._wait_for_save("checkpoint")

    def _save_snapshot(self) -> None:
        """Begin to save the power-function averages."""
        self._wait_for_save("snapshot")
        started = time.perf_counter()
        self._watch.doing(f"copying the averages of step {self.step}", limited=False)
        averages = {n: part for n, part in self.strategy.averages().items() if n != "ema"}
        self._savers["snapshot"].start(self.step, averages, {"config": to_dict(self.config)})
        self._window.checkpoint_stall_seconds += time.perf_counter() - started

    def _wait_for_saves(self, ahead: int = 0) -> None:
        for kind in self._savers:
            self._wait_for_save(kind, ahead)

    def _wait_for_save(self, kind: str, ahead: int = 0) -> None:
        """Report the checkpoint or snapshot in flight if it is done.

        Args:
            kind: of the two.
            ahead: wait for it if training is so many steps ahead of it.
        """
        saver = self._savers[kind]
        step = saver.step
        if step is None:
            return
        wait = self.step - step >= ahead
        if wait:
            self._watch.doing(f"saving the {kind} of step {step}", limited=False)
        started = time.perf_counter()
        saved = saver.finished(wait)
        self._window.checkpoint_stall_seconds += time.perf_counter() - started
        if saved is None:
            return
        self._window.checkpoint_write_seconds += saved.seconds
        if saved.error is not None:
            self._failed_checkpoints += 1
            logger.error(
                "%s of step %d failed (failure %d of this run): %s. Training goes on; "
                "older %ss are untouched",
                kind, saved.step, self._failed_checkpoints, saved.error, kind,
            )  # fmt: skip

    def _resume(self) -> None:
        checkpoint, rejected = self.checkpoints.newest()
        for reason in rejected:
            logger.warning("cannot use %s", reason)
        if checkpoint is None:
            if rejected:
                raise UserError(
                    f"none of the checkpoints in {self.checkpoints.directory} can be used (reasons "
                    "above); restore one, or choose another --out to start again"
                )
            return
        self._load(checkpoint)
        logger.info("resuming %s from step %d", self.config.out, self.step)

    def _load(self, checkpoint: Checkpoint) -> None:
        parts = self._parts()
        for name, part in parts.items():
            load_part(checkpoint.path, name, part)
        self.strategy.load(parts)
        self.objective.load(parts.get("objective", {}))
        state = checkpoint.state
        try:
            if self.strategy.loss_scale is not None and state["loss_scale"] is not None:
                self.strategy.loss_scale.load(state["loss_scale"])
            self._window = _Window(**state["window"])
            self._bad_steps = int(state["bad_steps"])
            self._bad_samples = int(state["bad_samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{checkpoint.path} holds a state that this version did not write "
                f"({type(error).__name__}: {error}); choose another --out to start again"
            ) from error
        self.step = checkpoint.step

    def _start_tracker(self) -> None:
        if self.config.log.tracker == "none":
            return
        # Entries beyond the checkpoint resumed from are hidden: they are about to be made again.
        self.accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}}
        )

    def _report(self, metrics: MetricsLog) -> None:
        window, batch_size = self._window, self.config.training.batch_size
        steps = max(window.steps + window.skipped, 1)
        values = {
            "loss": window.loss / max(window.steps, 1),
            "grad_norm": window.grad_norm / max(window.steps, 1),
            "learning_rate": self.config.learning_rate(self.step - 1),
            "samples_seen": self.step * batch_size,
            "skipped_steps": window.skipped,
            "bad_samples": self._bad_samples,
            "failed_checkpoints": self._failed_checkpoints,
            "images_per_second": steps * batch_size / max(window.seconds, 1e-9),
            "data_wait_percent": 100 * window.waiting / max(window.seconds, 1e-9),
            "checkpoint_stall_seconds": window.checkpoint_stall_seconds,
            "checkpoint_write_seconds": window.checkpoint_write_seconds,
        }
        metrics.record(self.step, values, window.seconds / steps)
        try:
            self.accelerator.log(values, step=self.step)
        except OSError as error:
            logger.error("the tracker cannot write: %s. Training goes on", error)
        self._window = _Window()


def _group_for_saving() -> dist.ProcessGroup | None:
    """A process group that nothing else uses: saves talk over it while training goes on."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


class _Window:
    """What has happened since the last log line; saved, so that a resumed run logs the same."""

    def __init__(
        self,
        steps: int = 0,
        skipped: int = 0,
        loss: float = 0.0,
        grad_norm: float = 0.0,
        seconds: float = 0.0,
        waiting: float = 0.0,
        checkpoint_stall_seconds: float = 0.0,
        checkpoint_write_seconds: float = 0.0,
    ) -> None:
        self.steps = steps
        self.skipped = skipped
        self.loss = loss
        self.grad_norm = grad_norm
        self.seconds = seconds
        self.waiting = waiting
        self.checkpoint_stall_seconds = checkpoint_stall_seconds
        self.checkpoint_write_seconds = checkpoint_write_seconds

    def add(self, loss: float, grad_norm: float) -> None:
        self.steps += 1
        self.loss += loss
        self.grad_norm += grad_norm

    def state(self) -> dict[str, float]:
        return dict(vars(self))
