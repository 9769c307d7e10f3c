"""The same run on any number of processes, under any strategy, stopped and continued on others."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.distributed.launching import FSDP, ROOT, Job, difference, launch, losses, start, zero
from tests.tiny import FAMILIES, of_family

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.checkpoints.parts import load_part
from ddpm_engine.checkpoints.store import SNAPSHOTS, CheckpointStore, verify
from ddpm_engine.config import RunConfig, dump_config
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.build import build_network
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.training.trainer import Trainer

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; pip install 'ddpm-engine[deepspeed]'",
)


def at(config: RunConfig, name: str, **training: Any) -> RunConfig:
    """The run in another directory, trained otherwise."""
    return replace(
        config,
        out=config.out.with_name(name),
        training=replace(config.training, **training),
    )


def assert_same_weights(ours: Path, theirs: Path, tolerance: float) -> None:
    """Compare weights and averages of the newest checkpoints; snapshots must agree with them."""
    for weights in ("model", "ema", "ema-0.1"):
        a = load_model(ours, weights=weights).network.state_dict()
        b = load_model(theirs, weights=weights).network.state_dict()
        assert a.keys() == b.keys()
        assert max(float((a[name] - b[name]).abs().max()) for name in a) <= tolerance
    for run in (ours, theirs):
        averaged = load_model(run, weights="ema-0.1")
        kept = build_network(averaged.network.config)
        newest = CheckpointStore(run / SNAPSHOTS).path(averaged.step or 0)
        load_part(newest, "ema-0.1", kept.state_dict())
        for one, other in zip(kept.parameters(), averaged.network.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_two_and_four_processes_train_the_run_of_one(config: RunConfig) -> None:
    """Dropout, too, in pieces and recomputed; and another network."""
    config = at(config, "run", steps=10)
    other = replace(config, model=of_family("dit", config.model))
    other_one, other_two = at(other, "other-one"), at(other, "other-two")
    launch([Job(at(config, "one"), float64=True), Job(other_one, float64=True)], 1)
    pieces = at(config, "pieces", accumulation=2)
    recomputed = at(config, "recomputed", accumulation=3, recompute="blocks")
    two = [at(config, "two"), pieces, other_two]
    launch([Job(run, float64=True) for run in two], 2)
    launch([Job(recomputed, float64=True)], 4)
    for name in ("two", "pieces", "recomputed"):
        assert difference(losses(at(config, name).out), losses(at(config, "one").out)) <= 1e-9
    assert difference(losses(other_two.out), losses(other_one.out)) <= 1e-9


def test_from_two_processes_to_one(config: RunConfig) -> None:
    """With timesteps sampled by importance, which is learnt from the losses of all."""
    config = replace(
        config,
        diffusion=DiffusionConfig(timesteps=5),
        objective=ObjectiveConfig(timestep_sampling="importance"),
        log=replace(config.log, sample_steps=5),
    )
    run, whole = at(config, "run"), at(config, "whole", steps=16)
    half = Job(at(run, "run", steps=8))
    outputs = launch([half, half], 2)
    assert "DDP: 2 process(es)" in outputs[0]
    assert "already trained to step 8" in outputs[0]
    (output,) = launch([Job(whole), Job(at(run, "run", steps=16))], 1)
    assert "resuming" in output
    assert "from step 8" in output
    assert difference(losses(run.out), losses(whole.out)) <= 1e-5
    assert_same_weights(run.out, whole.out, 1e-5)
    ours, theirs = (learnt(config.out) for config in (run, whole))
    assert int(ours["counts"].min()) >= 10
    assert torch.equal(ours["counts"], theirs["counts"])
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-4, atol=0)


def learnt(out: Path) -> dict[str, torch.Tensor]:
    """What the objective has learnt by step 16."""
    (file,) = (out / "checkpoints" / "step-00000016" / "objective").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (FSDP | {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "zero3_offload.yaml"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed_config_file"),
        (zero("missing"), "cannot be read"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "`training.precision` to bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "`training.accumulation` to 4"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "train independently"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "does not do"),
    ],
)
def test_what_cannot_be_had_is_refused(
    config: RunConfig,
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Accelerate's launcher sets it to 1, which a run undoes.
    monkeypatch.delenv("OMP_NUM_THREADS")
    with pytest.raises(UserError, match=re.escape(message)):
        Trainer(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": {"stage": 0}}', "must be 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {}}', "`training.precision` says it"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "is nvme"),
        ("{", "is not JSON"),
    ],
)
def test_deepspeed_files_that_cannot_be_followed(
    config: RunConfig, content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text(content)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match=re.escape(message)):
        Trainer(config)


def test_a_batch_that_does_not_split_is_refused(config: RunConfig) -> None:
    outputs, statuses = start([Job(at(config, "run", batch_size=25))], 2)
    assert 2 in statuses
    assert "global batch 25 is not divisible by 2 processes" in outputs[0]


def trace(path: Path) -> list[str]:
    """What became of each sample of a run, on all ranks, by position; see worker.py."""
    lines = [line for file in path.parent.glob(f"{path.name}.*") for line in file.open()]
    return sorted(lines, key=lambda line: int(line.split()[0]))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_workers_and_accumulation(processes: int, config: RunConfig) -> None:
    """Images, flips, noise, timesteps and labels are the same to the bit, losses but for sums."""
    choices = [("ddp", workers, pieces) for workers in (0, 1, 3) for pieces in (1, 2)]
    # FSDP2 shares all of that with DDP; what is its own is tested below.
    choices += {2: [("fsdp", 1, 2)], 3: [("fsdp", 0, 1)]}.get(processes, [])
    one, ways = at(config, "one"), []
    for name, workers, pieces in choices:
        run = at(config, f"{name}-{workers}-{pieces}", accumulation=pieces)
        run = replace(run, data=replace(run.data, workers=workers))
        ways.append(Job(run, FSDP if name == "fsdp" else {}, True, trace=f"{run.out}-trace"))
    launch([Job(one, float64=True, trace=f"{one.out}-trace")], 1)
    launch(ways, processes, timeout=900)
    expected = trace(Path(f"{one.out}-trace"))
    assert len(expected) == config.training.steps * config.training.batch_size
    for way in ways:
        assert trace(Path(str(way.trace))) == expected, way.config.out.name
        assert difference(losses(way.config.out), losses(one.out)) <= 1e-9, way.config.out.name


@pytest.mark.slow
def test_the_same_launch_gives_the_same_bits(config: RunConfig) -> None:
    first, again = at(config, "first", steps=10), at(config, "again", steps=10)
    launch([Job(first), Job(again)], 2)
    assert losses(again.out) == losses(first.out)
    launch([Job(at(config, "fsdp", steps=10), FSDP)], 2)
    assert_same_weights(again.out, first.out, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fsdp2",
        *(
            pytest.param(name, marks=needs_deepspeed)
            for name in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_strategy_trains_the_run_of_one_process(
    family: str, name: str, config: RunConfig
) -> None:
    log = replace(config.log, sample_every=12, sample_count=5, sample_steps=3)
    config = replace(config, model=of_family(family, config.model), log=log)
    one, run = at(config, "one", steps=12), at(config, name, steps=12, accumulation=2)
    launch([Job(one)], 1)
    environment = FSDP if name == "fsdp2" else zero(name)
    outputs = launch([Job(run, environment)], 2)
    in_force = "FSDP2" if name == "fsdp2" else f"DeepSpeed ZeRO-{name[4]}"
    assert f"{in_force}: 2 process(es)" in outputs[0]
    assert difference(losses(run.out), losses(one.out)) <= 1e-5
    assert_same_weights(run.out, one.out, 1e-5)
    ours, theirs = (png(out / "samples" / "step-00000012.png") for out in (run.out, one.out))
    assert int((ours - theirs).abs().max()) <= 1


def png(path: Path) -> torch.Tensor:
    """Pixels of an image, int16."""
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="ddp"),
        pytest.param(FSDP, id="fsdp2"),
        pytest.param(zero("zero2"), id="zero2", marks=needs_deepspeed),
        pytest.param(zero("zero3"), id="zero3", marks=needs_deepspeed),
    ],
)
def test_a_bad_step_of_one_process_is_skipped_by_all(
    environment: dict[str, str], config: RunConfig
) -> None:
    one, run = at(config, "one", steps=6), at(config, "run", steps=6)
    bad = 3 * run.training.batch_size - 1  # the last of step 3: only the last process meets it
    launch([Job(one, poisoned=bad)], 1)
    outputs = launch([Job(run, environment, poisoned=bad)], 2)
    assert "step 3 is skipped" in outputs[0]
    ours, theirs = losses(run.out), losses(one.out)
    assert ours.pop(2) is theirs.pop(2) is None
    assert difference(ours, theirs) <= 1e-5
    assert_same_weights(run.out, one.out, 1e-5)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="ddp", marks=pytest.mark.slow),
        pytest.param(FSDP, id="fsdp2", marks=pytest.mark.slow),
        *(
            pytest.param(zero(name), id=name, marks=[needs_deepspeed, pytest.mark.slow])
            for name in ("zero2", "zero3")
        ),
    ],
)
def test_float16(environment: dict[str, str], config: RunConfig) -> None:
    """Overflows are skipped by all ranks, and the scale goes on where a stopped run left it."""
    half = at(config, "half", steps=12, precision="fp16", accumulation=2)
    # A scale at which the first steps overflow, and later a step that only the last rank overflows.
    wild = Job(half, environment, first_scale=2.0**23, poisoned=9 * half.training.batch_size - 1)
    straight, run = at(half, "straight"), at(half, "run")
    launch([Job(half, environment)], 2)
    for leg in (straight, at(run, "run", steps=7), run):
        launch([replace(wild, config=leg)], 2)  # apart: DeepSpeed serves one run of a process
    launch([Job(at(half, "single", precision="no"))], 1)

    assert skipped(half.out) == []
    assert difference(losses(half.out), losses(at(half, "single").out)) <= 1e-2

    *first, last = skipped(straight.out)
    assert first == list(range(1, len(first) + 1))
    assert 2 <= len(first) <= 6
    assert last == 9
    stored = [verify(out / "checkpoints" / "step-00000012")[0] for out in (straight.out, run.out)]
    for checkpoint in stored:
        assert checkpoint is not None
        expected = {"value": 2.0 ** (23 - len(first) - 1), "steps": 3}
        assert checkpoint.state["loss_scale"] == expected
    assert losses(run.out) == losses(straight.out)
    assert_same_weights(run.out, straight.out, 0.0)


def skipped(out: Path) -> list[int]:
    """Steps that were not taken."""
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["skipped_steps"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        pytest.param([({}, 2), ({}, 1), ({}, 3), ({}, 2)], id="ddp"),
        pytest.param([(FSDP, 2), (FSDP, 1), (FSDP, 3), (FSDP, 2)], id="fsdp2"),
        pytest.param(
            [(zero("zero1"), 2), (zero("zero2"), 3), (zero("zero1"), 1), ({}, 2)],
            id="zero1 and zero2",
            marks=needs_deepspeed,
        ),
        pytest.param(
            [(zero("zero3"), 2), (FSDP, 3), (zero("zero3"), 1), (zero("zero2"), 2)],
            id="zero3 and fsdp2",
            marks=needs_deepspeed,
        ),
    ],
)
def test_a_run_moves_between_strategies_and_numbers_of_processes(
    chain: list[tuple[dict[str, str], int]], config: RunConfig
) -> None:
    whole = at(config, "whole", steps=5 * len(chain))
    launch([Job(whole)], 1)
    for leg, (environment, processes) in enumerate(chain, start=1):
        outputs = launch([Job(at(config, "run", steps=5 * leg), environment)], processes)
        assert leg == 1 or f"from step {5 * (leg - 1)}" in outputs[0]
    run = at(config, "run")
    assert difference(losses(run.out), losses(whole.out)) <= 1e-5
    assert_same_weights(run.out, whole.out, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "in_force"),
    [
        ("ddp", "DDP"),
        ("fsdp2", "FSDP2"),
        pytest.param("zero2", "DeepSpeed ZeRO-2", marks=needs_deepspeed),
    ],
)
def test_the_launcher_files(file: str, in_force: str, config: RunConfig, tmp_path: Path) -> None:
    config = at(config, "run", steps=2)
    (tmp_path / "run.json").write_text(dump_config(config))
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
            "--config_file", f"launch/accelerate/{file}.yaml", "--num_processes", "2",
            "launch/train.py", "--config", str(tmp_path / "run.json"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{in_force}: 2 process(es)" in done.stdout
    assert len(losses(config.out)) == 2
