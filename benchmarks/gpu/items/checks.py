"""Whether the kernels are right: the tests on the device, by pieces that run at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.item import Context, FailedError, NotHereError
from benchmarks.gpu.machine import ROOT

FEW = 3
"""Tests of a file that a rehearsal runs."""
LARGE = (
    "test_modulate.py",
    "test_q_sample.py",
    "test_denoising_loss.py",
    "test_latents.py",
    "test_reverse_step.py",
    "test_group_norm_silu.py",
    "test_group_norm_silu_options.py",
    "test_group_norm_silu_backward.py",
    "test_transformations.py",
)
"""Files of `tests/kernels` that take long on a device; the others are run together."""
FOR_CPUS = frozenset({"test_aot.py"})
"""Those that need no GPU."""


class _Counting:
    """Counts outcomes; in a rehearsal, keeps the first tests of each file only."""

    def __init__(self, few: bool) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self._few = few

    @pytest.hookimpl(trylast=True)  # of those that the keyword leaves
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._few:
            counted: Counter[Path] = Counter()
            kept = []
            for item in items:
                counted[item.path] += 1
                if counted[item.path] <= FEW:
                    kept.append(item)
            items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)


def _run_tests(context: Context, files: Sequence[Path], keyword: str = "") -> None:
    os.chdir(ROOT)
    counting = _Counting(context.dry)
    arguments = [*map(str, files), "-p", "no:cacheprovider"]
    status = pytest.main([*arguments, *(["-k", keyword] if keyword else [])], plugins=[counting])
    shown = "; ".join(counting.failures[:5])
    context.add({
        "tests": ", ".join(file.name for file in files), **{
            outcome: counting.outcomes[outcome] for outcome in ("passed", "failed", "skipped")
        },
        "failures": shown or None,
    })  # fmt: skip
    if status != pytest.ExitCode.OK:
        raise FailedError(shown or f"pytest ended with status {int(status)}")


def kernels(context: Context, file: str | None = None) -> None:
    """Run one file of the kernels' tests, or all that are not in `LARGE`."""
    folder = ROOT / "tests" / "kernels"
    if file is not None:
        _run_tests(context, [folder / file])
        return
    others = {path.name for path in folder.glob("test_*.py")} - set(LARGE) - FOR_CPUS
    _run_tests(context, [folder / name for name in sorted(others)])


def graphs(context: Context) -> None:
    """Run the tests of CUDA graphs: what a GPU replays is what it runs eagerly."""
    _run_tests(context, [ROOT / "tests" / "gpu" / "test_capture.py"])


def captured_training(context: Context, keyword: str) -> None:
    """Run some of the tests of captured training steps."""
    _run_tests(context, [ROOT / "tests" / "gpu" / "test_captured_training.py"], keyword)


def poisoned(context: Context) -> None:
    """Run the kernels' tests with NaN in all memory that nothing has written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    if not torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        raise FailedError("torch does not fill memory that nothing has written")
    files = [ROOT / "tests" / "kernels" / name for name in LARGE if "transform" not in name]
    _run_tests(context, files, "not compiled")


def sanitized(context: Context, tool: str) -> None:
    """Call every operation once under NVIDIA's compute-sanitizer, in a process of its own.

    A rehearsal makes the same calls without it.
    """
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None and not context.dry:
        raise NotHereError("there is no compute-sanitizer here")
    calls = [sys.executable, "-m", "benchmarks.gpu.items.each_operation", context.device.type]
    under = [] if context.dry else [str(sanitizer), "--tool", tool, "--error-exitcode", "9"]
    environment: dict[str, Any] = {
        **os.environ,
        # One allocation each, so that what lies beyond a tensor belongs to nobody.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    done = subprocess.run(
        [*under, *calls], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout[-8000:], done.stderr[-8000:])
    context.add({"tests": f"every operation under {tool}", "failed": done.returncode != 0})
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise FailedError(f"status {done.returncode}: {lines[-1] if lines else ''}")
