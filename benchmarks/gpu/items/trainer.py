"""Whether training and sampling work: the Trainer itself, killed and resumed, and the commands."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.item import Context, FailedError
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.networks import with_training
from torch import Tensor

from ddpm_engine.config import RunConfig
from ddpm_engine.presets import PRESETS
from ddpm_engine.training.trainer import Trainer

STEPS, KILLED, KEPT = 30, 20, 10
"""Steps of a run, the step after which it is killed, and the interval of its checkpoints."""
DRY_STEPS, DRY_KILLED, DRY_KEPT = 6, 4, 2
TOLERANCE = {"no": 5e-2, "bf16": 0.1, "fp16": 0.1}
"""Of losses, relative, by precision: convolutions may be TF32, and their sums come in any order.
A wrong step is off by more."""
FIRST = 3
FIRST_LOSSES = tuple(f"loss {step}" for step in range(1, FIRST + 1))
PATHS = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT)]


def digits(context: Context, out: str, steps: int, preset: str = "digits") -> RunConfig:
    """Return a preset of digits that logs every step and keeps what it has done."""
    config = PRESETS[preset]()
    return replace(
        config,
        out=context.scratch / out,
        data=replace(config.data, path=context.scratch / "digits"),
        training=replace(config.training, steps=steps, batch_size=8 if context.dry else 64),
        optimizer=replace(config.optimizer, warmup_steps=10),
        log=replace(
            config.log, every=1, checkpoint_every=DRY_KEPT if context.dry else KEPT,
            sample_every=0, tracker="none",
        ),
    )  # fmt: skip


def losses(run: Path) -> list[float]:
    """Read the losses that a run has logged; NaN of a step that was skipped."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = (json.loads(line)["loss"] for line in lines if line.endswith("}"))
    return [math.nan if loss is None else float(loss) for loss in found]


def largest_difference(found: Sequence[float], standard: Sequence[float]) -> float:
    """Return the largest relative difference; infinite if other steps, or other numbers of them."""
    if [*map(math.isnan, found)] != [*map(math.isnan, standard)]:
        return math.inf
    pairs = ((a, b) for a, b in zip(found, standard, strict=True) if not math.isnan(b))
    return max((abs(a - b) / abs(b) for a, b in pairs), default=math.inf)


def run_command(script: str, *arguments: str) -> None:
    """Run one of the commands; it writes to this item's log.

    Raises:
        FailedError: it did not end well.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, *filter(None, sys.path)])},
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise FailedError(f"launch/{script}.py ended with status {done.returncode}")


def first_losses(context: Context) -> None:
    """Train digits on the CPU for a few steps: what the others' first losses are held to."""
    os.environ.update(dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), ""))
    config = with_training(digits(context, "cpu", FIRST), precision="no")
    trainer = Trainer(config)
    if trainer.run.device.type != "cpu":
        raise FailedError(f"it runs on {trainer.run.device}")
    trainer.fit()
    context.add({"run": "digits, CPU", **dict(zip(FIRST_LOSSES, losses(config.out), strict=True))})


def killed_run(config: RunConfig, after: int) -> int:
    """Train in a fork of this process, which has not used the GPU, and kill it.

    Returns:
        Steps that it has logged.

    Raises:
        FailedError: it ended before.
    """
    victim = os.fork()
    if victim == 0:
        try:
            Trainer(config).fit()
        finally:
            os._exit(1)
    ended = False
    while not ended and len(losses(config.out)) < after:
        time.sleep(0.002)
        ended = os.waitpid(victim, os.WNOHANG) != (0, 0)
    reached = len(losses(config.out))
    if ended:
        raise FailedError(f"the run to be killed ended at step {reached}")
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    return reached


def follow(context: Context, precision: str, **training: Any) -> None:
    """Kill a run on digits and resume it; compare it with a whole one, and that with a CPU's.

    Args:
        context: of the item.
        precision: of the network; a rehearsal runs in float32.
        training: other fields of `TrainingConfig`.
    """
    steps, killed = (DRY_STEPS, DRY_KILLED) if context.dry else (STEPS, KILLED)
    chosen: dict[str, Any] = {"precision": precision, "capture": "off", **training}
    if context.dry:
        chosen |= {"precision": "no", "compile": False, "capture": "off"}
    whole, broken = (
        with_training(digits(context, out, steps), **chosen) for out in ("whole", "broken")
    )
    reached = killed_run(broken, killed)
    Trainer(whole).fit()
    Trainer(broken).fit()
    standard, resumed = losses(whole.out), losses(broken.out)
    tolerance = TOLERANCE[chosen["precision"]]
    after = largest_difference(resumed, standard)
    on_cpu = context.rows("first losses on a CPU")
    beside = None
    skipped = any(map(math.isnan, standard[:FIRST]))  # by fp16; a CPU takes every step
    if on_cpu and not skipped:
        beside = largest_difference(
            standard[:FIRST], [float(on_cpu[0][name] or 0) for name in FIRST_LOSSES]
        )
    context.add({
        "run": "digits, " + ", ".join(f"{name} {value}" for name, value in chosen.items()),
        "first loss": standard[0], "last loss": standard[-1],
        "killed at": reached, "resumed, difference": after, "to the bit": after == 0,
        "CPU's first losses, difference": beside,
    })  # fmt: skip
    taken = [loss for loss in standard if not math.isnan(loss)]
    if len(taken) < len(standard) // 2 or not all(0 < loss < 10 for loss in taken):
        raise FailedError(f"losses are {standard}")
    if not context.dry and sum(taken[-5:]) >= sum(taken[:5]):
        raise FailedError("the loss does not fall")
    if after > tolerance:
        raise FailedError(f"the resumed run's losses differ by {after:.2g}, relative")
    if beside is not None and beside > tolerance:
        raise FailedError(f"the first losses differ from a CPU's by {beside:.2g}, relative")


def presets(context: Context, names: Sequence[str]) -> None:
    """Take a few steps of other presets."""
    for name in names:
        config = digits(context, name, 2 if context.dry else 5, name)
        config = replace(config, data=replace(config.data, path=context.scratch / f"{name}-data"))
        Trainer(config).fit()
        found = losses(config.out)
        context.add({"run": name, "first loss": found[0], "last loss": found[-1]})
        if not all(loss == loss and abs(loss) < float("inf") for loss in found):
            raise FailedError(f"{name}: losses are {found}")


def determinism(context: Context, deterministic: bool, precision: str = "bf16") -> None:
    """Train the same twice and compare the bits of the weights.

    Raises:
        FailedError: they differ though `training.deterministic` is on.
    """
    found: list[dict[str, Tensor]] = []
    for out in ("once", "again"):
        config = digits(context, out, 3 if context.dry else 20)
        chosen = "no" if context.dry else precision
        trainer = Trainer(with_training(config, precision=chosen, deterministic=deterministic))
        trainer.fit()
        weights = trainer.run.strategy.state()["model"]
        found.append({name: value.detach().cpu().clone() for name, value in weights.items()})
    same = sum(torch.equal(value, found[1][name]) for name, value in found[0].items())
    context.add({
        "run": f"digits twice, {chosen}", "deterministic": deterministic,
        "tensors equal to the bit": f"{same} of {len(found[0])}",
        "to the bit": same == len(found[0]),
    })  # fmt: skip
    if deterministic and same < len(found[0]):
        raise FailedError(f"only {same} of {len(found[0])} tensors are equal")


def end_to_end(context: Context) -> None:
    """Train digits, draw samples with `sample.py`, measure them with `evaluate.py`."""
    config = digits(context, "run", 2 if context.dry else 20)
    Trainer(config).fit()
    count = 4 if context.dry else 64
    samples, report = context.scratch / "samples", context.scratch / "evaluation"
    begun = time.monotonic()
    run_command(
        "sample", "--checkpoint", str(config.out), "--out", str(samples),
        "--count", str(count), "--steps", "4",
    )  # fmt: skip
    written = len(list(samples.glob("0*.png")))
    context.add({"run": "sample.py, 4 steps", "images": written, "s": time.monotonic() - begun})
    if written != count:
        raise FailedError(f"{written} of {count} images were written")
    begun = time.monotonic()
    run_command(
        "evaluate", "--checkpoint", str(config.out), "--out", str(report), "--features", "digits",
        "--metrics", "fid", "--count", str(16 if context.dry else 256), "--steps", "4",
        "--cache", str(context.shared / "evaluation"),
    )  # fmt: skip
    context.add({"run": "evaluate.py, digits", "s": time.monotonic() - begun})
