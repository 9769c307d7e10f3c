"""The measurement of `make gpu` without a GPU: on a CPU and by other clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report, timing
from benchmarks.gpu.timing import Job, Measurement
from torch import Tensor

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# Stands for a bare GPU machine: torch with what it requires, Triton, NumPy, Pillow, safetensors
# and tqdm.
BARE = """
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

THERE = {"torch", "torchgen", "functorch", "triton", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec", "filelock", "typing_extensions", "setuptools", "pkg_resources",
    "_distutils_hack", "numpy", "safetensors", "PIL", "tqdm", "benchmarks", "ddpm_kernels",
    "ddpm_engine"} | set(sys.stdlib_module_names)

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in THERE or top.startswith("_sysconfigdata"):
            return super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
for name in ("tyro", "pytest"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is there")
"""


def recorder(folder: Path) -> report.Recorder:
    return report.Recorder(folder, report.machine_of(CPU, "python -m benchmarks.gpu"))


def test_everything_runs_and_is_written(tmp_path: Path) -> None:
    found = recorder(tmp_path)
    command.measure(CPU, "tiny", found)
    assert found.failures == []
    first, *lines = [json.loads(line) for line in found.lines.read_text().splitlines()]
    assert first["machine"]["device"] == "CPU"
    assert len(lines) == len(found.results)
    ways = {line["way"] for line in lines if line["operation"] == "q_sample"}
    assert ways == {"engine", "textbook", "compiled", "copy"}
    assert all(line["median"] >= line["least"] > 0 for line in lines)
    page = found.page.read_text()
    assert "| group_norm_silu and gradient 2×64×4×4 bfloat16 | compiled |" in page
    assert "| eager, graph |" in page


def test_what_fails_is_recorded_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(device: torch.device, extent: timing.Extent) -> Iterator[Job]:
        for job in timing.q_sample_jobs(device, extent):
            yield replace(job, ways={"engine": lambda: None})
            yield job

    monkeypatch.setattr(timing, "JOBS", (spoilt,))
    monkeypatch.setattr(command.loop, "measure_loop", lambda *_: [])
    found = recorder(tmp_path)
    command.measure(CPU, "tiny", found)
    (failure,) = found.failures
    assert failure.what == "q_sample 2×3×8×8 bfloat16"
    assert failure.message.startswith("TypeError")
    assert len(found.results) == 1 + 4
    assert "FAIL  q_sample 2×3×8×8 bfloat16: TypeError" in capsys.readouterr().out
    assert "Failed:" in found.page.read_text()


def test_a_run_that_is_killed_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> list[Measurement]:
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "JOBS", (timing.q_sample_jobs,))
    monkeypatch.setattr(command.loop, "measure_loop", killed)
    found = recorder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.measure(CPU, "tiny", found)
    assert len(found.lines.read_text().splitlines()) == 1 + 4
    assert "| q_sample 2×3×8×8 bfloat16 | copy |" in found.page.read_text()


def test_ways_take_turns() -> None:
    order: list[str] = []
    ways = {name: partial(order.append, name) for name in "abc"}

    def clock(function: Callable[[], object]) -> float:
        function()
        return float(len(order))

    times = timing.interleaved(ways, clock, repeats=3)
    assert "".join(order) == "bcacababcbcacab"
    assert times == {"a": [7.0, 12.0, 14.0], "b": [8.0, 10.0, 15.0], "c": [9.0, 11.0, 13.0]}


def test_statistics_are_of_one_call_on_memory_beyond_the_caches() -> None:
    ticks: Iterator[float] = iter(range(1, 10_000))
    made: list[dict[str, Tensor]] = []

    def clock(function: Callable[[], object]) -> float:
        function()
        return next(ticks)

    def make() -> dict[str, Tensor]:
        made.append({"x": torch.zeros(4)})
        return made[-1]

    job = Job("double", (4,), torch.float32, 32, make, {"engine": lambda x: 2 * x})
    engine, copy = timing.measure(job, CPU, clock, repeats=5, beyond=300)
    assert len(made) == engine.calls == copy.calls == 10
    # Two rounds of warm-up, ticks 1 … 4; then a round is two ticks, which way first by turns.
    assert [m.way for m in (engine, copy)] == ["engine", "copy"]
    assert engine.median == pytest.approx(9 / 10 * 1e3)
    assert engine.least == pytest.approx(5 / 10 * 1e3)
    assert copy.least == pytest.approx(6 / 10 * 1e3)
    assert engine.bandwidth == pytest.approx(32 / 900e-6 / 1e9)


def test_rates_are_beside_those_of_the_copy_and_samples_per_second() -> None:
    def measured(way: str, median: float, size: int) -> Measurement:
        return Measurement("q_sample", (2, 3), "float32", way, size, median, 1.0, 3.0, 10, 50)

    ways = [measured("engine", 2.0, 4_000_000), measured("copy", 1.0, 4_000_000)]
    assert report.bandwidth_table(ways)[2:] == [
        "| q_sample 2×3 float32 | engine | 2.0 | 1.0 | 3.0 | 2000 | 50% |",
        "| q_sample 2×3 float32 | copy | 1.0 | 1.0 | 3.0 | 4000 | 100% |",
    ]
    loops = report.loop_table([measured("graph", 1000.0, 0)])
    assert loops[2] == "| q_sample, 2×3 float32 | graph | 1000 | 1 | 200.00 |"


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.file_name("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"
    assert report.output_of("no-such-command") is None
    assert report.output_of(sys.executable, "-c", "raise SystemExit(1)") is None

    def commit_of(answers: dict[str, str | None]) -> str:
        monkeypatch.setattr(report, "output_of", lambda *command: answers[command[1]])
        return report.commit()

    assert commit_of({"rev-parse": None}) == "unknown"
    assert commit_of({"rev-parse": "abc", "status": ""}) == "abc"
    assert commit_of({"rev-parse": "abc", "status": " M Makefile"}) == "abc+changes"


def test_a_bare_machine_without_a_gpu() -> None:
    """The network runs without the packages of an installation; the command asks for a GPU."""
    measure_a_loop = """
import torch
from benchmarks.gpu import loop, timing
assert loop.measure_loop(torch.device("cpu"), "tiny", timing.host_timer)
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""
    nowhere = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE + measure_a_loop],
        env={**os.environ, **nowhere, "PYTHONPATH": ".:engine:kernels"},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("no GPU: torch sees none here (torch ")
    assert done.stdout.count("\n") == 1
