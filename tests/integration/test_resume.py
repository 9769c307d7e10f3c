"""Whatever ends a run, the run that is resumed is the run that was asked for, to the bit."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tests.tiny import of_family
from torch import Tensor

from ddpm_engine.checkpoints.load import config_of, load_model
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.base import Recompute
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run as TrainingRun
from ddpm_engine.training.trainer import Trainer

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Trains the run in the file argv[1], but kills itself as step argv[3] is saved, at the moment when
# the function argv[2] of the checkpoint module is called for the argv[4]-th time in that save.
KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from ddpm_engine.config import load_config
from ddpm_engine.checkpoints import store as checkpoint
from ddpm_engine.training.trainer import Trainer

name, step, count = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
holder = checkpoint
for part in name.split(".")[:-1]:
    holder = getattr(holder, part)
original = getattr(holder, name.split(".")[-1])
saving = calls = 0

def watched_save(self, at, *arguments):
    global saving
    saving = at
    return save(self, at, *arguments)

def killed(*arguments, **named):
    global calls
    if saving == step:
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)

save = checkpoint.CheckpointStore.save
checkpoint.CheckpointStore.save = watched_save
setattr(holder, name.split(".")[-1], killed)
Trainer(load_config(Path(sys.argv[1]))).fit()
"""


def tensors(out: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of one checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted((out / "checkpoints" / f"step-{step:08d}").rglob("*.safetensors")):
        found |= {f"{file.parent.name}.{name}": t for name, t in load_file(file).items()}
    return found


def loss_log(out: Path) -> list[tuple[int, float, float, float]]:
    """The parts of the log that do not tell the time."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


def assert_same_run(out: Path, reference: Path, step: int = 40) -> None:
    ours, theirs = tensors(out, step), tensors(reference, step)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []
    assert loss_log(out) == loss_log(reference)


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where 40 steps were trained without a stop. Filled by the first test that asks for it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def reference(config: RunConfig, straight: Path) -> Path:
    if not straight.exists():
        Trainer(replace(config, out=straight)).fit()
    return straight


def test_the_checkpoint_has_weights_average_and_moments(reference: Path) -> None:
    names = tensors(reference, 40)
    assert {"model.conv_in.weight", "ema.conv_in.weight"} <= names.keys()
    assert "optimizer.state.conv_in.weight.exp_avg_sq" in names
    assert not torch.equal(names["model.conv_out.weight"], names["ema.conv_out.weight"])
    assert [row[0] for row in loss_log(reference)] == [*range(3, 40, 3), 40]


def test_training_goes_on_while_a_checkpoint_is_written_until_the_next_is_due(
    config: RunConfig, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config)
    save, ahead, every = CheckpointStore.save, [], config.log.checkpoint_every

    def slow_save(self: CheckpointStore, step: int, *arguments: Any) -> None:
        deadline = time.monotonic() + 30
        while trainer.run.step < min(step + every, 40) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.2)  # enough for more steps
        ahead.append(trainer.run.step - step)
        save(self, step, *arguments)

    monkeypatch.setattr(CheckpointStore, "save", slow_save)
    trainer.fit()
    assert ahead == [every, every, every, 0]
    assert_same_run(config.out, reference)
    rows = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    assert sum(row["checkpoint_stall_seconds"] for row in rows) > 3 * 0.2


@pytest.mark.parametrize(
    ("function", "count"),
    [
        pytest.param("write_part", 2, id="between parts", marks=pytest.mark.slow),
        pytest.param("_write_manifest", 1, id="before the manifest"),
        pytest.param("os.replace", 2, id="before the rename"),
        pytest.param("discard", 1, id="while pruning", marks=pytest.mark.slow),
    ],
)
def test_killed_while_saving(
    function: str, count: int, config: RunConfig, config_file: Path, reference: Path, run: Run
) -> None:
    # At step 30 two older checkpoints exist, so that there is one to prune.
    killed = run(config_file, function, "30", str(count), code=KILLED_WHILE_SAVING)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert CheckpointStore(config.out / "checkpoints").steps()[-1] in (20, 30)
    Trainer(config).fit()
    assert_same_run(config.out, reference)
    assert [
        entry.name for entry in (config.out / "checkpoints").iterdir() if "tmp" in entry.name
    ] == []


def _truncate(checkpoint: Path) -> None:
    file = next((checkpoint / "model").glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def _flip_a_bit(checkpoint: Path) -> None:
    file = next((checkpoint / "optimizer").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _flip_a_bit_of_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace('"step": 20', '"step": 21'))


def _lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def _lose_a_file(checkpoint: Path) -> None:
    next((checkpoint / "ema").glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, r"model/.* has \d+ bytes, not \d+"),
        (_flip_a_bit, r"optimizer/.* does not match its hash"),
        (_flip_a_bit_of_the_manifest, "manifest does not match its own hash"),
        (_lose_the_manifest, "never finished"),
        (_lose_a_file, r"ema/.* is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None],
    reason: str,
    config: RunConfig,
    reference: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Trainer(replace(config, training=replace(config.training, steps=20))).fit()
    damage(config.out / "checkpoints" / "step-00000020")
    with caplog.at_level(logging.INFO):
        Trainer(config).fit()
    assert "from step 10" in caplog.text
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "step-00000020" in warning
    assert re.search(reason, warning)
    assert_same_run(config.out, reference)


def test_sampling_needs_only_the_weights_that_it_uses(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(reference, run)
    newest = run / "checkpoints" / "step-00000040"
    _flip_a_bit(newest)
    _truncate(newest)
    assert load_model(run).step == 40
    assert load_model(newest).step == 40
    assert load_model(run, weights="model").step == 30
    _lose_a_file(newest)
    assert load_model(run).step == 30
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_model(newest)


def test_the_configuration_needs_no_weights(
    config: RunConfig, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(reference, run)
    for part in ("model", "ema", "optimizer"):
        for folder in (run / "checkpoints").glob(f"*/{part}"):
            shutil.rmtree(folder)
    settled = replace(config, training=replace(config.training, precision="no"))
    for path in (run, run / "checkpoints" / "step-00000030"):
        assert replace(config_of(path), out=config.out) == settled
    with pytest.raises(UserError, match="no usable checkpoint"):
        config_of(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("number", "family"),
    [(signal.SIGTERM, "unet"), (signal.SIGUSR1, "unet"), (signal.SIGTERM, "dit")],
)
def test_a_signal_stops_the_run_between_steps(
    number: signal.Signals, family: str, config: RunConfig, reference: Path, tmp_path: Path
) -> None:
    if family != "unet":
        config, reference = replace(config, model=of_family(family, config.model)), tmp_path / "one"
        Trainer(replace(config, out=reference)).fit()

    class Signal(Callback):
        def on_step_begin(self, run: TrainingRun) -> None:
            # Step 16 meets the signal, and step 17 is on its way when that is known.
            if run.step == 15:
                os.kill(os.getpid(), number)

    Trainer(config, [Signal()]).fit()
    assert (config.out / "requeue").read_text() == "stopped at step 17\n"
    assert CheckpointStore(config.out / "checkpoints").steps() == [10, 17]
    assert signal.getsignal(number) == signal.SIG_DFL
    Trainer(config).fit()
    assert not (config.out / "requeue").exists()
    assert_same_run(config.out, reference)


def test_workers_do_not_change_the_run(config: RunConfig, reference: Path) -> None:
    Trainer(replace(config, data=replace(config.data, workers=2))).fit()
    assert_same_run(config.out, reference)


def test_accumulation_changes_only_the_rounding(config: RunConfig) -> None:
    config = replace(
        config,
        training=replace(config.training, steps=6),
        log=replace(config.log, every=1),
    )
    Trainer(config).fit()
    pieces = replace(
        config,
        out=config.out.with_name("pieces"),
        training=replace(config.training, accumulation=4),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(pieces).fit()
    for ours, theirs in zip(loss_log(pieces.out), loss_log(config.out), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("what", ["norms", "blocks"])
def test_recomputation_changes_nothing(what: Recompute, config: RunConfig, reference: Path) -> None:
    """Of a network with dropout, whose elements are dropped once more alike."""
    Trainer(replace(config, training=replace(config.training, recompute=what))).fit()
    assert_same_run(config.out, reference)


def test_a_failed_checkpoint_does_not_end_training_unless_it_is_the_last(
    config: RunConfig, config_file: Path, reference: Path, run: Run
) -> None:
    # No file may grow beyond 16 KiB: what a full disk looks like to whoever writes tensors.
    limited = run(
        config_file,
        code="""
import resource, sys
from pathlib import Path
import logging
from ddpm_engine.config import load_config
from ddpm_engine.training.trainer import Trainer
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
Trainer(load_config(Path(sys.argv[1]))).fit()
""",
    )
    assert limited.returncode == 1
    assert "checkpoint of step 40, the last of this run so far, could not be" in limited.stderr
    assert limited.stderr.endswith("File too large; there is no checkpoint\n")
    for failure, step in enumerate((10, 20, 30), start=1):
        assert f"checkpoint of step {step} failed (failure {failure} of this run)" in limited.stdout
    assert list((config.out / "checkpoints").iterdir()) == []
    assert loss_log(config.out) == loss_log(reference)
    last = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["failed_checkpoints"] == 3


def test_a_finished_run_is_left_alone(
    config: RunConfig, reference: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO):
        Trainer(replace(config, out=reference)).fit()
    assert "already trained to step 40" in caplog.text
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_pruning_keeps_the_newest_and_the_milestones(config: RunConfig) -> None:
    log = replace(config.log, checkpoint_every=5, keep_every=15)
    Trainer(replace(config, log=log)).fit()
    assert CheckpointStore(config.out / "checkpoints").steps() == [15, 30, 35, 40]


def test_no_pickle_is_read_or_written(config: RunConfig) -> None:
    Trainer(replace(config, training=replace(config.training, steps=10))).fit()
    files = [f for f in (config.out / "checkpoints").rglob("*") if f.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
