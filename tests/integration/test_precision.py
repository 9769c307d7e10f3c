"""What a run computes in: settled once, recorded, and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_engine import runtime
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig, load_config
from ddpm_engine.errors import UserError
from ddpm_engine.runtime import Numerics
from ddpm_engine.training import accelerator, precision
from ddpm_engine.training.precision import settle_precision
from ddpm_engine.training.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = Numerics.in_force()
    with pytest.MonkeyPatch.context() as patched:
        for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
            patched.setenv(name, "")  # so that it is put back as it was
        yield
    before.apply()


def with_training(config: RunConfig, **values: Any) -> RunConfig:
    return replace(config, training=replace(config.training, **values))


def recorded(out: Path) -> set[str]:
    """The precisions in the run's directory and in its checkpoints."""
    newest = CheckpointStore(out / "checkpoints").newest_complete()
    assert newest is not None
    stated = newest.state["config"]["training"]["precision"]
    return {load_config(out).training.precision, newest.config.training.precision, stated}


@pytest.fixture
def short(config: RunConfig) -> RunConfig:
    return with_training(config, steps=2)


def test_auto_is_float32_on_a_cpu_and_recorded_as_what_it_is(short: RunConfig) -> None:
    assert short.training.precision == "auto"
    trainer = Trainer(short)
    assert trainer.run.config.training.precision == "no"
    trainer.fit()
    assert recorded(short.out) == {"no"}


def test_a_run_keeps_the_precision_it_began_with(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(with_training(short, precision="bf16"), any_precision=True).fit()
    assert recorded(short.out) == {"bf16"}
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda *_: True)
    Trainer(with_training(short, steps=3)).fit()
    assert recorded(short.out) == {"bf16"}
    assert "began in" not in caplog.text

    monkeypatch.setattr(runtime, "has_fast_bf16", lambda *_: False)
    assert settle_precision(short, GPU).training.precision == "no"
    insisting = with_training(short, allow_slow_bf16=True)
    assert settle_precision(insisting, CPU).training.precision == "bf16"
    with caplog.at_level(logging.INFO):
        Trainer(with_training(short, steps=4)).fit()
    assert "began in bf16, which cpu does not have; it goes on in float32" in caplog.text
    assert "`training.precision` was bf16 and is now no" in caplog.text
    assert recorded(short.out) == {"no"}
    rows = map(json.loads, (short.out / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == [2, 3, 4]


def test_a_gpu_keeps_float32_of_a_run_that_began_in_it(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda *_: True)
    assert settle_precision(short, GPU).training.precision == "bf16"
    Trainer(short).fit()
    assert settle_precision(short, GPU).training.precision == "no"
    asked = with_training(short, precision="bf16")
    assert settle_precision(asked, GPU).training.precision == "bf16"
    # Whatever configuration.json says, if it is gone the checkpoints say it too.
    (short.out / "config.json").unlink()
    assert settle_precision(short, GPU).training.precision == "no"


def test_a_run_without_a_step_binds_nobody(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(short).fit()
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda *_: True)
    for path in sorted(short.out.rglob("*"), reverse=True):
        if path.name not in ("config.json", "data.json"):
            path.rmdir() if path.is_dir() else path.unlink()
    assert settle_precision(short, GPU).training.precision == "bf16"
    (short.out / "config.json").write_text("{")
    assert settle_precision(short, GPU).training.precision == "bf16"


def test_ranks_on_unlike_devices_are_refused(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "of_main", lambda _: "bf16")
    with pytest.raises(UserError, match=r"`training.precision` auto is no on cpu of rank 0"):
        Trainer(short)
    assert not short.out.exists()


def test_numerics_are_set_before_anything_else_and_recorded(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_training(short, deterministic=True, tf32=True)
    seen: list[Numerics] = []
    begun_with = precision.begun_with

    def note(out: Path) -> RunConfig | None:
        seen.append(Numerics.in_force())
        return begun_with(out)

    monkeypatch.setattr(precision, "begun_with", note)
    Trainer(asked).fit()
    assert seen == [Numerics(tf32=True, deterministic=True)]
    newest = CheckpointStore(short.out / "checkpoints").newest_complete()
    assert newest is not None
    said = {name: newest.state["config"]["training"][name] for name in vars(seen[0])}
    assert said == {"tf32": True, "cudnn_benchmark": True, "deterministic": True}
    Trainer(with_training(short, steps=3)).fit()
    assert Numerics.in_force() == Numerics(cudnn_benchmark=True)
