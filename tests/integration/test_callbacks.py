"""At which points of a run callbacks are called, and with what."""

from __future__ import annotations

import gc
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.training import trainer
from ddpm_engine.training.callbacks import preview
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run, Values
from ddpm_engine.training.trainer import Trainer


class Recorder(Callback):
    """Notes every call, and whatever the test does at the beginning of a step."""

    def __init__(self, at: int | None = None, stop: bool = False) -> None:
        self.calls: list[str] = []
        self.at, self.stop = at, stop

    def on_start(self, run: Run) -> None:
        self.calls.append(f"start {run.step}")

    def on_step_begin(self, run: Run) -> None:
        self.calls.append(f"begin {run.step}")
        if run.step == self.at:
            if not self.stop:
                raise UserError("enough")
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_log(self, run: Run, step: int, values: Values) -> None:
        assert values["samples_seen"] == step * run.config.training.batch_size
        self.calls.append(f"log {step}")

    def on_step_end(self, run: Run) -> None:
        ending = " finished" * run.finished + " interrupted" * run.interrupted
        self.calls.append(f"end {run.step}{ending}")

    def on_end(self, run: Run, error: BaseException | None) -> None:
        self.calls.append(f"over {run.step} {error}")


def shortened(config: RunConfig, steps: int) -> RunConfig:
    return replace(
        config,
        training=replace(config.training, steps=steps),
        log=replace(config.log, every=2, checkpoint_every=2),
    )


def test_the_points_of_a_run(config: RunConfig) -> None:
    first, second, third = Recorder(), Recorder(), Recorder()
    Trainer(shortened(config, 3), [first]).fit()
    assert first.calls == [
        "start 0", "begin 0", "end 1", "begin 1", "log 2", "end 2", "begin 2", "log 3",
        "end 3 finished", "over 3 None",
    ]  # fmt: skip
    Trainer(shortened(config, 4), [second]).fit()
    assert second.calls == ["start 3", "begin 3", "log 4", "end 4 finished", "over 4 None"]
    Trainer(shortened(config, 4), [third]).fit()
    assert third.calls == []


def test_the_collector_passes_over_what_lives(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Frozen(Callback):
        def __init__(self) -> None:
            self.found: list[bool] = []

        def on_step_end(self, run: Run) -> None:
            self.found.append(gc.get_freeze_count() > 0)

    monkeypatch.setattr(trainer, "STEPS_UNTIL_FROZEN", 2)
    gc.unfreeze()
    frozen = Frozen()
    Trainer(shortened(config, 3), [frozen]).fit()
    assert frozen.found == [False, True, True]
    assert gc.get_freeze_count() == 0


def test_a_run_that_is_interrupted(config: RunConfig) -> None:
    recorder = Recorder(at=1, stop=True)
    Trainer(shortened(config, 9), [recorder]).fit()
    # Step 2 meets the signal, and step 3 is on its way when that is known.
    assert recorder.calls[-6:] == [
        "begin 1", "log 2", "end 2", "begin 2", "end 3 interrupted", "over 3 None",
    ]  # fmt: skip


def test_an_error_is_handed_over_and_the_checkpoint_in_flight_is_finished(
    config: RunConfig,
) -> None:
    recorder = Recorder(at=2)
    with pytest.raises(UserError, match="enough"):
        Trainer(shortened(config, 9), [recorder]).fit()
    assert recorder.calls[-2:] == ["begin 2", "over 2 enough"]
    assert CheckpointStore(config.out / "checkpoints").steps() == [2]


def test_a_preview_that_is_not_finite_is_reported_and_training_goes_on(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def diverged(run: Run, model: object) -> tuple[torch.Tensor, None]:
        return torch.full((4, 1, 8, 8), torch.nan), None

    monkeypatch.setattr(preview, "_generate", diverged)
    config = shortened(config, 2)
    Trainer(replace(config, log=replace(config.log, sample_every=2, sample_steps=5))).fit()
    (warning,) = [record.message for record in caplog.records if "not finite" in record.message]
    assert str(config.out / "samples" / "step-00000002.png") in warning
    assert CheckpointStore(config.out / "checkpoints").newest(())[0] is not None


class Measuring(Callback):
    """Measures something after each step."""

    def on_step_end(self, run: Run) -> None:
        run.measured({"distance": 10.0 - run.step})


def test_what_a_callback_measures_reaches_the_others(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        Trainer(shortened(config, 3), [Measuring()]).fit()
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").open()]
    measured = {row["step"]: row["distance"] for row in rows if "distance" in row}
    assert measured == {1: 9.0, 2: 8.0, 3: 7.0}
    assert "step 3/3  distance 7" in caplog.text
    assert [row["step"] for row in rows if "loss" in row] == [2, 3]
