"""Training steps as CUDA graphs: what a GPU replays is what it runs eagerly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from benchmarks.gpu.timing import captured
from safetensors.torch import load_file
from tests.conftest import MakeShards
from tests.kernels.adamw_inputs import NUMBERS, STATE, mapped, of_adamw_step
from tests.ranks import ChangedLoss, Poisoned
from tests.recorder import AsOnAGpu, Recorded
from tests.tiny import TINY_GREY
from torch import Tensor

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig, dump_config
from ddpm_engine.data.config import DataConfig
from ddpm_engine.objectives.base import Averaged, Network, Objective
from ddpm_engine.runtime import Numerics
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer
from ddpm_kernels import adamw_step, gradient_norm

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
STEPS, BAD = 12, 3
"""Steps of a run, and the one whose gradient is not finite."""
TOLERANCE = {"no": 1e-3, "bf16": 3e-2, "fp16": 3e-2}
"""Of losses, relative, and of weights beside the way that they have come: sums come in any order,
and from step to step their differences grow."""


@pytest.fixture(autouse=True)
def _numerics() -> Iterator[None]:
    """Runs set torch up for the whole process."""
    yield
    Numerics().apply()


@pytest.fixture
def config(make_shards: MakeShards, tmp_path: Path) -> RunConfig:
    """With everything that a step may have in it, checkpoints and grids of samples in between."""
    return RunConfig(
        out=tmp_path / "run",
        data=DataConfig(path=make_shards(100), workers=1, horizontal_flip=True),
        model=replace(TINY_GREY, dropout=0.1, num_class_embeds=11),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        training=TrainingConfig(
            steps=STEPS, batch_size=8, ema_decay=0.9, ema_sigma_rel=(0.1,), precision="no",
            cudnn_benchmark=False,
        ),
        log=LogConfig(
            every=1, checkpoint_every=4, keep_checkpoints=5, sample_every=6, sample_count=4,
            sample_steps=3, snapshot_every=STEPS, tracker="none",
        ),
    )  # fmt: skip


def trained(
    config: RunConfig, out: str, capture: bool, *callbacks: Callback, **training: Any
) -> Path:
    """Train in a folder beside that of the configuration, with one step that is skipped."""
    way: Literal["on", "off"] = "on" if capture else "off"
    others: list[Callback] = []
    if not CUDA:  # a rehearsal
        way, others = "off", [Recorded() if capture else AsOnAGpu()]
    config = replace(
        config,
        out=config.out.with_name(out),
        training=replace(config.training, capture=way, **training),
    )
    bad = Poisoned(BAD * config.training.batch_size - 1, float("nan"))
    Trainer(config, [bad, *others, *callbacks], any_precision=True).fit()
    return config.out


def losses(out: Path) -> list[float | None]:
    """Of every step; None of one that was skipped."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def state(out: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Every tensor of one checkpoint."""
    files = sorted((out / "checkpoints" / f"step-{step:08d}").rglob("*.safetensors"))
    found = {f"{f.parent.name}.{name}": t for f in files for name, t in load_file(f).items()}
    assert found
    return found


def assert_equal_runs(ours: Path, theirs: Path, *steps: int) -> None:
    """Losses and states are the same to the bit."""
    assert losses(ours) == losses(theirs)
    for step in steps or (STEPS,):
        found, expected = state(ours, step), state(theirs, step)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_near_runs(ours: Path, theirs: Path, tolerance: float) -> None:
    """The same steps were skipped; losses and weights differ by what sums in any order explain."""
    ours_losses, theirs_losses = losses(ours), losses(theirs)
    assert [loss is None for loss in ours_losses] == [loss is None for loss in theirs_losses]
    for a, b in zip(ours_losses, theirs_losses, strict=True):
        if a is not None and b is not None:
            assert abs(a - b) <= tolerance * abs(b)
    found, expected = state(ours), state(theirs)
    for part in ("model", "ema"):
        names = [name for name in expected if name.startswith(f"{part}.")]
        apart = sum(float((found[n] - expected[n]).double().square().sum()) for n in names)
        assert names
        first = state(theirs, 4)
        way = sum(float((expected[n] - first[n]).double().square().sum()) for n in names)
        assert apart <= (10 * tolerance) ** 2 * way, part


@on_gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_captured_steps_are_those_that_run_eagerly(
    precision: str, accumulation: int, config: RunConfig
) -> None:
    given: dict[str, Any] = {"precision": precision, "accumulation": accumulation}
    eager, graph = (
        trained(config, f"captured {capture}", capture, **given) for capture in (False, True)
    )
    assert losses(graph)[BAD - 1] is None
    assert_near_runs(graph, eager, TOLERANCE[precision])


@on_gpu
@pytest.mark.parametrize("accumulation", [1, 2])
def test_to_the_bit_if_deterministic(accumulation: int, config: RunConfig) -> None:
    """Checkpoints that are taken between replays, too; samples drawn between them change none."""
    given: dict[str, Any] = {
        "precision": "bf16" if CUDA else "no", "accumulation": accumulation, "deterministic": True
    }  # fmt: skip
    eager, graph = (
        trained(config, f"captured {capture}", capture, **given) for capture in (False, True)
    )
    assert_equal_runs(graph, eager, 4, 8, STEPS)
    quiet = replace(config, log=replace(config.log, sample_every=0))
    assert_equal_runs(trained(quiet, "without samples", True, **given), eager)


@on_gpu
def test_checkpointing_and_compilation(config: RunConfig) -> None:
    for given in ({"recompute": "blocks"}, {"compile": CUDA}):
        name = next(iter(given))
        eager, graph = (
            trained(config, f"{name} {capture}", capture, **given) for capture in (False, True)
        )
        assert_near_runs(graph, eager, TOLERANCE["no"])


class Stopped(Callback):
    """Sends this process a signal before one step."""

    def on_step_begin(self, run: Run) -> None:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


@on_gpu
def test_a_resumed_run_is_captured_again(config: RunConfig) -> None:
    given: dict[str, Any] = {"deterministic": True}
    whole = trained(config, "whole", True, **given)
    trained(config, "broken", True, Stopped(), **given)
    broken = config.out.with_name("broken")
    assert len(losses(broken)) < STEPS
    trained(config, "broken", True, **given)
    assert_equal_runs(broken, whole)


class Staged(ChangedLoss):
    """Doubles the loss from some step on, by what Python knows alone."""

    def __init__(self) -> None:
        self.factor = 1.0

    def on_start(self, run: Run) -> None:
        super().on_start(run)
        begin = run.objective.begin_step

        def begin_step(step: int, averaged: Averaged) -> bool:
            self.factor = 2.0 if step >= 6 else 1.0
            return begin(step, averaged) or step == 6

        run.objective.begin_step = begin_step  # type: ignore[method-assign]

    def loss(self, objective: Objective, network: Network, batch: Any) -> Tensor:
        return objective(network, batch) * self.factor


@on_gpu
def test_another_stage_is_captured_anew(config: RunConfig) -> None:
    given: dict[str, Any] = {"deterministic": True}
    eager, graph = (
        trained(config, f"captured {capture}", capture, Staged(), **given)
        for capture in (False, True)
    )
    assert_equal_runs(graph, eager)
    before, after = losses(graph)[5], losses(graph)[6]
    assert before is not None
    assert after is not None
    assert after > 1.3 * before


@on_gpu
def test_one_graph_may_step_several_sets_of_weights() -> None:
    device = torch.device("cuda" if CUDA else "cpu")
    sets = [
        mapped(lambda t: t.to(device, copy=True), of_adamw_step(seed=seed)) for seed in range(3)
    ]
    others = [mapped(Tensor.clone, given) for given in sets]

    def step(every: list[dict[str, Any]]) -> None:
        for given in every:
            scale = gradient_norm(given["gradients"])
            adamw_step(**{**given, "gradient_scale": scale}, **NUMBERS)

    replay: Callable[[], object] = captured(partial(step, sets), device)
    for _ in range(3 if CUDA else 0):  # the steps before a capture are real
        step(others)
    replay()
    step(others)
    for given, expected in zip(sets, others, strict=True):
        for name in STATE:
            assert torch.equal(given[name], expected[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_captured_steps_of_two_ranks(config: RunConfig) -> None:
    """Ranks exchange gradients within the graph, and part when they are done."""
    found = []
    ways: tuple[Literal["off", "on"], ...] = ("off", "on")
    for way in ways:
        out = config.out.with_name(f"ranks {way}")
        chosen = replace(
            config, out=out, training=replace(config.training, capture=way, accumulation=2)
        )
        file = config.out.with_name(f"{way}.json")
        file.write_text(dump_config(chosen))
        paths = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels"), *sys.path])
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             str(ROOT / "launch" / "train.py"), "--config", str(file)],
            env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300,
        )  # fmt: skip
        found.append(out)
    assert_near_runs(found[1], found[0], TOLERANCE["no"])
