"""launch/checkpoints.py, and directories that two processes want."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.checkpoints.posthoc_average import average_checkpoints
from ddpm_engine.checkpoints.store import CheckpointStore, verify
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.training.run_directory import lock_run_directory
from ddpm_engine.training.trainer import Trainer

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test that asks for a trained run."""
    return tmp_path_factory.mktemp("made") / "run"


@pytest.fixture
def trained(config: RunConfig, made: Path) -> Path:
    """A run with checkpoints of the steps 2, 4, 6, 8, 10."""
    if not made.exists():
        log = replace(config.log, checkpoint_every=2, keep_checkpoints=9)
        training = replace(config.training, steps=10)
        Trainer(replace(config, out=made, training=training, log=log)).fit()
    shutil.copytree(made, config.out)
    return config.out


def flip_a_bit(run: Path, step: int) -> None:
    file = next((CheckpointStore(run / "checkpoints").path(step) / "ema").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def test_list_and_verify(trained: Path, run: Run) -> None:
    flip_a_bit(trained, 6)
    (trained / "checkpoints/step-00000008/manifest.json").unlink()
    (trained / "checkpoints/step-00000012.tmp").mkdir()
    listed = run("launch/checkpoints.py", "list", trained).stdout.splitlines()
    rows = [line.split() for line in listed[1:6]]
    assert [row[0] for row in rows] == ["2", "4", "6", "8", "10"]
    assert [row[2] for row in rows] == ["16", "32", "48", "?", "80"]
    assert float(rows[0][1]) > 0.1
    assert [row[3] == "complete" for row in rows] == [True, True, True, False, True]
    assert "step-00000012.tmp" in listed[6]
    verified = run("launch/checkpoints.py", "verify", trained)
    assert verified.returncode == 1
    lines = verified.stdout.splitlines()
    assert [line.endswith("sound") for line in lines] == [True, True, False, False, True]
    assert "does not match its hash" in lines[2]
    assert "never finished" in lines[3]


def test_prune_shows_and_then_deletes_but_never_the_newest_sound_one(
    trained: Path, run: Run
) -> None:
    store = CheckpointStore(trained / "checkpoints")
    flip_a_bit(trained, 10)
    arguments = ["launch/checkpoints.py", "prune", trained, "--keep", "2", "--keep-every", "4"]
    shown = run(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert f"would delete {store.path(2)}" in shown.stdout
    assert store.steps() == [2, 4, 6, 8, 10]
    deleted = run(*arguments, "--delete")
    assert deleted.returncode == 0, deleted.stderr
    # 8 is the newest sound one, 6 the one before it, 4 a milestone; 10 is damaged, and shown.
    assert store.steps() == [4, 6, 8, 10]
    assert "step-00000010: ema" in deleted.stdout
    for step in (4, 6, 8):
        flip_a_bit(trained, step)
    refused = run(*arguments, "--delete")
    assert refused.returncode == 2
    assert "none is deleted" in refused.stderr
    assert store.steps() == [4, 6, 8, 10]


def test_a_directory_in_use(trained: Path, run: Run, config_file: Path) -> None:
    with lock_run_directory(trained):
        for refused in (
            run("launch/checkpoints.py", "prune", trained, "--delete"),
            run("launch/train.py", "--config", config_file),
        ):
            assert refused.returncode == 2
            assert f"{trained} is in use by process {os.getpid()} on " in refused.stderr
    assert run("launch/checkpoints.py", "prune", trained, "--delete").returncode == 0


def test_average(trained: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "average"
    arguments = ["--out", out, "--steps", "4", "10", "--shares", "1", "3"]
    done = run("launch/checkpoints.py", "average", trained, *arguments)
    assert done.returncode == 0, done.stderr
    four, ten = (
        load_file(next((trained / f"checkpoints/step-{step:08d}/ema").glob("*.safetensors")))
        for step in (4, 10)
    )
    mean = load_model(out).network.state_dict()
    assert mean.keys() == four.keys()
    for name in mean:
        expected = (0.25 * four[name].double() + 0.75 * ten[name].double()).float()
        torch.testing.assert_close(mean[name], expected, rtol=1e-6, atol=1e-9)
    sampled = run(
        "launch/sample.py", "--checkpoint", out, "--steps", "2", "--count", "1", "--out", "samples"
    )
    assert sampled.returncode == 0, sampled.stderr
    again = run("launch/checkpoints.py", "average", trained, *arguments)
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    with pytest.raises(UserError, match="holds no part 'model'"):
        load_model(out, weights="model")


def test_shares_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    checkpoint, _ = verify(trained / "checkpoints/step-00000004")
    assert checkpoint is not None
    for shares in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(UserError, match="a positive share for each"):
            average_checkpoints([checkpoint, checkpoint], tmp_path / "out", shares)
    assert not (tmp_path / "out").exists()
