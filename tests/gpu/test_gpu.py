# mypy: ignore-errors
"""`make gpu` without a GPU: its checks in Triton's interpreter, its figures by other clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import checks, compare, loop, report, sections, timing
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.sections import Finding, Plan, in_process, isolated
from benchmarks.gpu.timing import Job, Measurement
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.step_runner import StepRunner
from ddpm_kernels.dispatch import force_ops

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Plan("cpu", "tiny")
CHECKS_ONLY = Plan("cpu", "tiny", measure=False)

RUN_SECTION = """
import sys
from benchmarks.gpu.report import line_of
from benchmarks.gpu.sections import Plan, in_process
found = list(in_process(sys.argv[1], Plan("cpu", "tiny", measure=False)))
sys.exit("\\n".join(line_of(f) for f in found if not f.passed) or (0 if found else "no checks"))
"""

# Stands for a machine with torch and Triton alone: nothing but what torch itself requires.
BARE = """
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

THERE = {"torch", "torchgen", "functorch", "triton", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec", "filelock", "typing_extensions", "setuptools", "pkg_resources",
    "_distutils_hack", "benchmarks", "ddpm_kernels", "ddpm_engine"} | set(sys.stdlib_module_names)

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in THERE or top.startswith("_sysconfigdata"):
            return super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
for name in ("numpy", "cattrs", "tyro", "pytest"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is there")
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process at the root of the repository, which sees no GPU."""
    nowhere = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    path = {"PYTHONPATH": ".:engine:kernels"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **nowhere, **path, **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


# --- The checks themselves


@pytest.mark.parametrize("section", list(checks.CHECKS))
def test_kernels_pass_in_the_interpreter(section: str) -> None:
    done = python("-c", RUN_SECTION, section, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def off_by(error: float, operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: operation(*args, **kwargs) + error


@pytest.mark.parametrize(
    "operation", ["q_sample", "denoising_loss", "reverse_step", "group_norm_silu"]
)
def test_a_planted_error_is_found_and_the_rest_still_runs(
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checks, operation, off_by(1e-2, getattr(checks, operation)))
    monkeypatch.setattr("benchmarks.gpu.__main__.SECTIONS", (operation, "philox"))
    assert main(["--out", str(tmp_path)], CHECKS_ONLY, in_process) == 1
    found = json.loads((tmp_path / "cpu-interpreter.json").read_text())
    failed = [check for check in found["checks"] if not check["passed"]]
    affected = {operation, "philox"} if operation in ("q_sample", "reverse_step") else {operation}
    assert {check["section"] for check in failed} == affected
    assert {check["section"] for check in found["checks"]} == {operation, "philox"}
    assert found["failures"] == len(failed)
    worst = max(c["error"] for check in failed for c in check["comparisons"])
    assert worst > 9e-3
    assert (
        f"- {failed[0]['section']}, {failed[0]['name']}: "
        in (tmp_path / "cpu-interpreter.md").read_text()
    )
    assert f"{len(failed)} failed" in capsys.readouterr().out


def test_another_seed_is_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_seed(**given: Any) -> Tensor:
        return honest(**{**given, "seed": given["seed"] + 1})

    honest = checks.reverse_step
    monkeypatch.setattr(checks, "reverse_step", other_seed)
    given = checks.inputs.of_reverse_step((2, 3, 5, 7), torch.float32)
    assert not all(c.passed for c in checks.check_reverse_step(given, "nhwc", True, False))


def test_a_graph_that_keeps_what_it_was_recorded_with_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if a kernel had taken the seed from the host."""

    def frozen(function: Callable[[], Any], _: torch.device) -> Callable[[], Any]:
        outputs = function()
        return lambda: outputs

    def graph_of(section: str) -> Finding:
        found = dict(checks.CHECKS[section](CPU, "tiny"))
        return sections.run_check(section, ("graph", found["graph"]))

    operations = [section for section in checks.CHECKS if section != "philox"]
    assert all(graph_of(section).passed for section in operations)
    monkeypatch.setattr(checks, "captured", frozen)
    assert not any(graph_of(section).passed for section in operations)


def test_what_raises_is_a_finding() -> None:
    def fails() -> list[compare.Comparison]:
        raise RuntimeError("no such kernel\nat line 3")

    finding = sections.run_check("q_sample", ("opcheck", fails))
    assert not finding.passed
    assert report.line_of(finding) == "FAIL  q_sample, opcheck: RuntimeError: no such kernel"


def test_a_measurement_that_raises_is_a_finding_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoilt(device: torch.device, extent: checks.Extent) -> Iterator[Job]:
        for job in timing.q_sample_jobs(device, extent):
            yield replace(job, ways={"engine": lambda: None})
            yield job

    monkeypatch.setitem(timing.JOBS, "q_sample", spoilt)
    found: list[sections.Result] = []
    sections.measure_section("q_sample", TINY, found.append)
    failure, *measured = found
    assert isinstance(failure, Finding)
    assert failure.name == "time of q_sample 2×3×8×8 bfloat16"
    assert failure.message.startswith("TypeError")
    assert len(measured) == 4


class OnTheHost(TorchDispatchMode):
    """Collects the operations that read or make a CPU tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.found.append(str(func))
        return out


def test_what_is_captured_takes_nothing_from_the_host() -> None:
    """A copy from the host ends a capture; meta tensors stand for those of a GPU."""
    meta, inputs = torch.device("meta"), checks.inputs
    images = inputs.moved(inputs.of_q_sample((2, 3, 5, 7), torch.uint8), meta)
    batch = inputs.of_denoising_loss((2, 3, 5, 7), torch.float32, torch.uint8)
    batch = inputs.moved(batch, meta)
    state = inputs.of_reverse_step((2, 3, 5, 7), torch.float32, **checks.REVERSE["everything"])
    state = inputs.moved(state, meta)
    norm = inputs.moved(inputs.of_group_norm_silu((2, 12, 5, 7), 2, torch.float32, True), meta)
    of_loss, of_norm = checks.loss_upstream(batch["prediction"]), checks.norm_upstream(norm["x"])
    table = build_table(NoiseSchedule.linear(1000), "dpm++3m", 6)
    chain = StepRunner(
        loop.small_unet(CPU, classes=5).to(meta), table, (3, 3, 16, 16), meta, labelled=True,
        guidance=Guidance(2.0, rescale=0.7), alpha_bar=torch.full((6,), 0.5), threshold=0.9,
        capture=lambda step: step,
    )  # fmt: skip
    with force_ops(), OnTheHost() as host:
        checks.q_sample(**images)
        checks.loss_and_gradient(checks.denoising_loss, of_loss, **batch, target="v")
        checks.stepped(checks.reverse_step, state)
        checks.norm_and_gradients(checks.group_norm_silu, of_norm, **norm)
        for i in range(6):
            chain.step(i)
    assert host.found == []


# --- The rule


def test_rule() -> None:
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    own = exact + torch.tensor([0.0, 1e-3, 0.0])
    assert compare.compare("y", exact.float() + 1.9e-3, own, exact).passed
    beyond = compare.compare("y", exact.float() + torch.tensor([0, 0, 2.1e-3]), own, exact)
    assert not beyond.passed
    assert beyond.error == pytest.approx(2.1e-3, rel=1e-3)
    assert beyond.allowed == pytest.approx(2e-3, rel=1e-3)
    assert compare.compare("y", exact.float() + 2.1e-3, own, exact, floor=2e-4).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_never_passes(value: float) -> None:
    exact = torch.zeros(3, dtype=torch.float64)
    spoilt = torch.tensor([0.0, value, 0.0])
    assert not compare.compare("y", spoilt, exact, exact, floor=1.0).passed
    assert not compare.equal("y", spoilt, torch.zeros(3)).passed
    assert not compare.in_ulps("y", spoilt, torch.ones(3), 4).passed


def test_ulps() -> None:
    expected = torch.tensor([1.0, -1e-3, 2.0**20])
    away = expected
    for _ in range(4):
        away = torch.nextafter(away, 2 * away)
    assert compare.in_ulps("normals", away, expected, 4).passed
    away = torch.nextafter(away, 2 * away)
    assert compare.in_ulps("normals", away, expected, 4).error == 5


# --- Measuring


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


def test_everything_runs_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference's path: all sections, in this process, with the host's clock."""
    assert main(["--out", str(tmp_path)], TINY, in_process) == 0
    values = json.loads((tmp_path / "cpu-interpreter.json").read_text())
    assert values["machine"]["device"] == "CPU (interpreter)"
    assert values["machine"]["command"] == f"python -m benchmarks.gpu --out {tmp_path}"
    assert {check["section"] for check in values["checks"]} == set(sections.SECTIONS)
    ways = {m["way"] for m in values["measurements"] if m["operation"] == "q_sample"}
    assert ways == {"engine", "textbook", "compiled", "copy"}
    assert all(m["median"] >= m["least"] > 0 for m in values["measurements"])
    markdown = (tmp_path / "cpu-interpreter.md").read_text()
    assert "All passed." in markdown
    assert "| group_norm_silu and gradient 2×64×4×4 bfloat16 | compiled |" in markdown
    assert "| eager, graph |" in markdown
    printed = capsys.readouterr().out
    assert printed.count("\nok ") + printed.count("\ntime ") >= len(values["checks"])


# --- The report


def measurement(way: str, median: float, size: int = 4_000_000) -> Measurement:
    return Measurement("q_sample", (2, 3), "float32", way, size, median, 1.0, 3.0, 10, 50)


def test_bandwidth_is_beside_that_of_the_copy() -> None:
    ways = [measurement("engine", 2.0), measurement("copy", 1.0)]
    lines = report.bandwidth_table(report.Report({}, [], ways))
    assert lines[2:] == [
        "| q_sample 2×3 float32 | engine | 2.0 | 1.0 | 3.0 | 2000 | 50% |",
        "| q_sample 2×3 float32 | copy | 1.0 | 1.0 | 3.0 | 4000 | 100% |",
    ]


def test_pictures_a_second() -> None:
    lines = report.loop_table(report.Report({}, [], [measurement("graph", 1000.0, size=0)]))
    assert lines[2] == "| q_sample, 2×3 float32 | graph | 1000 | 1 | 200.00 |"


def test_a_figure_that_is_no_number_is_valid_json() -> None:
    spoilt = compare.Comparison("x_t", float("nan"), 1.0)
    written = report.to_json(report.Report({}, [Finding("q_sample", "a", False, (spoilt,))], []))
    assert json.loads(written)["checks"][0]["comparisons"][0]["error"] is None


def test_file_names() -> None:
    assert report.file_name("NVIDIA H200") == "nvidia-h200"
    assert report.file_name("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


def test_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_of(answers: dict[str, str | None]) -> str:
        monkeypatch.setattr(report, "output_of", lambda *command: answers[command[1]])
        return report.commit()

    assert commit_of({"rev-parse": None}) == "unknown"
    assert commit_of({"rev-parse": "abc", "status": ""}) == "abc"
    assert commit_of({"rev-parse": "abc", "status": " M Makefile"}) == "abc+changes"


def test_a_command_that_is_not_there() -> None:
    assert report.output_of("no-such-command") is None
    assert report.output_of(sys.executable, "-c", "raise SystemExit(1)") is None


# --- Processes


def test_a_section_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ".:engine:kernels")
    monkeypatch.chdir(ROOT)
    found = list(isolated("philox", CHECKS_ONLY))
    assert len(found) == len(list(checks.philox_checks(CPU, "tiny")))
    assert all(isinstance(f, Finding) and f.passed for f in found)


def test_a_process_that_dies_is_a_finding() -> None:
    (finding,) = isolated("no such section", CHECKS_ONLY)
    assert isinstance(finding, Finding)
    assert not finding.passed
    assert finding.message == "its process ended with status 1"


def test_a_section_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "LIMIT", 0.0)
    (finding,) = isolated("philox", CHECKS_ONLY)
    assert isinstance(finding, Finding)
    assert finding.message == "given up after 0 s"


# --- A bare machine


def test_without_a_gpu_it_says_so() -> None:
    done = python("-c", BARE + "runpy.run_module('benchmarks.gpu', run_name='__main__')")
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("no GPU: torch sees none here (torch ")
    assert done.stdout.count("\n") == 1


def test_the_network_runs_with_torch_and_triton_alone() -> None:
    done = python("-c", BARE + RUN_SECTION, "loop")
    assert done.returncode == 0, done.stderr
