"""What a run leaves when its files cannot be written, or when it diverges."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_engine import atomic_io
from ddpm_engine.checkpoints import store
from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.checkpoints.store import CheckpointStore, verify
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import NotFiniteError, UserError
from ddpm_engine.training.callbacks import metrics_file, preview
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer


@pytest.fixture
def short(config: RunConfig) -> RunConfig:
    """Twelve steps with a checkpoint every third, snapshots, and a grid of samples at the end."""
    return replace(
        config,
        training=replace(config.training, steps=12, ema_sigma_rel=(0.1,), max_bad_steps=4),
        log=replace(
            config.log, every=1, checkpoint_every=3, snapshot_every=6,
            sample_every=12, sample_count=1, sample_steps=1,
        ),
    )  # fmt: skip


class At(Callback):
    """Act once before the step that follows `step` others."""

    def __init__(self, step: int, action: Callable[[Run], object]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, run: Run) -> None:
        if run.step == self.step:
            self.action(run)


def stop(_run: Run) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill(value: float) -> Callable[[Run], None]:
    """Let all weights have a value."""

    def act(run: Run) -> None:
        with torch.no_grad():
            for weight in run.strategy.model.parameters():  # type: ignore[attr-defined]
                weight.fill_(value)

    return act


def no_space(*_arguments: Any, **_named: Any) -> Any:
    raise OSError(28, "No space left on device")


def no_saves(monkeypatch: pytest.MonkeyPatch, folder: str, step: int, times: int = 99) -> None:
    """Let the saves of one step into one folder fail."""
    save, left = CheckpointStore.save, [times]

    def failing(self: CheckpointStore, at: int, *arguments: Any) -> None:
        if self.directory.name == folder and at == step and left[0]:
            left[0] -= 1
            no_space()
        save(self, at, *arguments)

    monkeypatch.setattr(CheckpointStore, "save", failing)


@pytest.mark.parametrize("stopped", [None, 7], ids=["finished", "stopped"])
def test_a_last_checkpoint_that_cannot_be_written_ends_the_run(
    stopped: int | None, short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 12 if stopped is None else stopped + 2
    no_saves(monkeypatch, "checkpoints", last)
    with pytest.raises(UserError) as raised:
        Trainer(short, [] if stopped is None else [At(stopped, stop)]).fit()
    newest = short.out / "checkpoints" / f"step-{9 if stopped is None else 6:08d}"
    assert f"checkpoint of step {last}" in str(raised.value)
    assert "No space left" in str(raised.value)
    assert str(raised.value).endswith(f"the newest checkpoint is {newest}")
    assert "\n" not in str(raised.value)
    assert not (short.out / "requeue").exists()
    assert verify(newest)[1] == []


def test_the_last_checkpoint_is_tried_again(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_saves(monkeypatch, "checkpoints", 12, times=1)
    Trainer(short).fit()
    assert verify(short.out / "checkpoints" / "step-00000012")[1] == []


def test_a_last_snapshot_that_cannot_be_written_is_made_up_for(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        no_saves(patched, "snapshots", 12)
        with pytest.raises(UserError, match=r"snapshot of step 12.*No space.*step-00000012$"):
            Trainer(short).fit()
    Trainer(short).fit()
    assert verify(short.out / "snapshots" / "step-00000012")[1] == []


def _no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "save_png", no_space)


def _no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file.JsonLines, "flush", no_space)


@pytest.mark.parametrize(
    ("fail", "lost"), [(_no_grid, "step-00000012.png"), (_no_rows, "metrics.jsonl")]
)
def test_whatever_is_lost_at_the_end_is_named(
    fail: Callable[[pytest.MonkeyPatch], None],
    lost: str,
    short: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail(monkeypatch)
    with pytest.raises(UserError, match=lost):
        Trainer(short).fit()
    assert verify(short.out / "checkpoints" / "step-00000012")[1] == []


def test_a_marker_that_cannot_be_written_is_named(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == "requeue":
            no_space()
        replaced(source, target)

    monkeypatch.setattr(atomic_io.os, "replace", refuse)
    with pytest.raises(UserError, match=r"saved at step 9.*requeue"):
        Trainer(short, [At(7, stop)]).fit()


@pytest.mark.parametrize("value", [1e30, float("nan")], ids=["finite", "nan"])
def test_a_run_that_diverges_keeps_what_it_can_go_on_from(value: float, short: RunConfig) -> None:
    short = replace(short, log=replace(short.log, checkpoint_every=2))
    with pytest.raises(NotFiniteError) as raised:
        Trainer(short, [At(7, fill(value))]).fit()
    sound = CheckpointStore(short.out / "checkpoints")
    assert sound.steps() == [4, 6]
    assert f"the newest checkpoint is {sound.path(6)}" in str(raised.value)
    aside = [path.name for path in sound.directory.glob("*.aside")]
    assert all(name in str(raised.value) for name in aside)
    assert bool(aside) == math.isfinite(value)
    rows = [
        json.loads(row, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for row in (short.out / "metrics.jsonl").read_text().splitlines()
    ]
    assert {row["loss"] for row in rows if row["skipped_steps"]} == {None}
    assert None not in {row["loss"] for row in rows if not row["skipped_steps"]}

    lower = replace(short, optimizer=replace(short.optimizer, learning_rate=1e-5))
    Trainer(lower).fit()
    assert CheckpointStore(short.out / "checkpoints").steps()[-1] == 12


def test_skipped_steps_are_counted_anew_and_prune_nothing(short: RunConfig) -> None:
    short = replace(
        short,
        training=replace(short.training, steps=16),
        log=replace(short.log, checkpoint_every=1),
    )
    Trainer(short, [At(6, fill(1e30)), At(7, stop)]).fit()
    checkpoints = CheckpointStore(short.out / "checkpoints")
    # Those of steps 5 and 6 led to finite gradients or to none yet; step 9 is the newest.
    assert checkpoints.steps() == [5, 6, 9]
    with pytest.raises(NotFiniteError, match=r"4 steps in a row.*move step-0+6 and step-0+9 to"):
        Trainer(short).fit()
    for dead in (6, 9):
        checkpoints.path(dead).rename(short.out / f"dead-{dead}")
    Trainer(short).fit()
    assert checkpoints.steps()[-1] == 16


def test_what_a_start_began_from_is_kept(short: RunConfig) -> None:
    Trainer(replace(short, training=replace(short.training, steps=3))).fit()
    Trainer(short).fit()
    assert CheckpointStore(short.out / "checkpoints").steps() == [3, 9, 12]


@pytest.fixture
def infinite(short: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run whose newest checkpoint has infinite weights, as former versions saved them."""
    with monkeypatch.context() as patched:
        patched.setattr(store, "check_finite", lambda *_: None)
        Trainer(short, [At(11, fill(float("inf")))]).fit()
    return short


def test_weights_that_are_not_finite_are_refused_wherever_they_are_used(
    infinite: RunConfig, run: Callable[..., Any], tmp_path: Path
) -> None:
    newest, out = infinite.out / "checkpoints" / "step-00000012", tmp_path / "out"
    of = ("--checkpoint", infinite.out, "--weights", "model")
    for words in [
        ("launch/sample.py", *of, "--out", out, "--count", "1"),
        ("launch/evaluate.py", *of, "--out", out, "--metrics", "nll"),
        ("launch/export.py", *of, "--out", out),
        ("launch/checkpoints.py", "average", infinite.out, "--weights", "model", "--out", out),
    ]:
        ended = run(*words)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith(f"error: {newest / 'model'} is not finite"), ended.stderr
        assert ended.stderr.count("\n") == 1
        assert not out.exists()
    with pytest.raises(NotFiniteError, match="step-00000012/model is not finite"):
        load_model(newest, weights="model")


def test_a_run_goes_on_from_before_weights_that_are_not_finite(
    infinite: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(infinite).fit()
    assert "step-00000012/model is not finite" in caplog.text
    assert load_model(infinite.out, weights="model").step == 12
