"""`make gpu` without a GPU: what it refuses, what it runs, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.registry import ITEMS
from tests.gpu.bare import only

ROOT = Path(__file__).parents[2]
NOWHERE = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PATHS = os.pathsep.join([str(ROOT), *(str(ROOT / part) for part in ("engine", "kernels"))])

FAKES = """
import sys
sys.path.insert(0, "tests/gpu")
import benchmarks.gpu.items, fakes
sys.modules["benchmarks.gpu.items.fakes"] = fakes
from benchmarks.gpu import __main__ as command
from fakes import item
command.preload = lambda: None
"""


BARE = frozenset({
    "torch", "torchgen", "functorch", "triton", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec", "filelock", "typing_extensions", "setuptools", "pkg_resources",
    "_distutils_hack", "numpy",
})  # fmt: skip
"""Torch with what it requires, Triton and NumPy."""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **NOWHERE, "PYTHONPATH": PATHS},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(code: str, *arguments: str) -> tuple[int, str]:
    process = start(code, *arguments)
    said, _ = process.communicate(timeout=900)
    return process.returncode, said


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_bare_machine_without_a_gpu(tmp_path: Path) -> None:
    """The command asks for a GPU before it wants anything but torch, and leaves nothing behind."""
    code = only(BARE) + 'import runpy; runpy.run_module("benchmarks.gpu", run_name="__main__")'
    status, said = run(code, "--out", str(tmp_path / "out"))
    assert status == 3, said
    assert said.startswith("no GPU: torch sees none here (torch ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_items_have_names_of_their_own_and_fit() -> None:
    assert len({item.name for item in ITEMS}) == len(ITEMS)
    assert all(0 < item.estimate < item.limit <= 120 for item in ITEMS)
    assert len({item.name.lower() for item in ITEMS}) == len(ITEMS)


def test_what_fails_or_is_not_here_is_named_and_the_next_goes_on(tmp_path: Path) -> None:
    code = (
        FAKES
        + """
items = [item("a", "good", value=3), item("b", "bad"), item("c", "absent"),
    item("too large", "good", estimate=1000), item("d", "good")]
sys.exit(command.main(["--dry", "--budget", "60", "--out", sys.argv[1]], items))
"""
    )
    status, said = run(code, str(tmp_path))
    assert status == 1, said
    ends = {line["item"]: line for line in lines(tmp_path) if "status" in line}
    assert {name: end["status"] for name, end in ends.items()} == {
        "a": "done", "b": "failed", "c": "not here", "too large": "skipped", "d": "done",
    }  # fmt: skip
    assert ends["b"]["message"].endswith("FailedError: it does not hold")
    assert all(line["dry"] for line in lines(tmp_path))
    assert "a: what value, is 3\n" in said
    assert "not here  c: no such field" in said
    last = said.splitlines()
    assert "not done: b, failed: " in said
    assert last[-2].startswith("not done: too large, skipped: needs 1000 s")
    assert "noise of a library" not in said
    assert "it does not hold" in (tmp_path / "log.txt").read_text()
    page = (tmp_path / "results.md").read_text()
    assert "**A rehearsal on a CPU" in page
    assert "| b | failed |" in page
    assert "| a | value | 3 |" in page

    # Again: what is done stays, what has failed gets one more try, what is not here is asked again.
    again = code.replace("value=3", "value=4")
    run(again, str(tmp_path))
    attempts = [(line["item"], line["attempt"]) for line in lines(tmp_path) if "begun" in line]
    assert attempts == [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("b", 2), ("c", 2)]
    run(again.replace('"--dry",', '"--dry", "--again",'), str(tmp_path))
    attempts = [(line["item"], line["attempt"]) for line in lines(tmp_path) if "begun" in line]
    assert attempts[6:] == [("b", 3), ("c", 3)]


def test_a_run_that_is_killed_keeps_what_it_has(tmp_path: Path) -> None:
    """Its rows are on the disk, its item does not outlive it, and the next call goes on."""
    marker = tmp_path / "marker"
    code = (
        FAKES
        + f"""
items = [item("a", "good"), item("b", "slow", marker={str(marker)!r}), item("c", "good")]
sys.exit(command.main(["--dry", "--budget", "300", "--out", sys.argv[1]], items))
"""
    )
    out = tmp_path / "out"
    process = start(code, str(out))
    deadline = time.monotonic() + 60
    while not (marker.exists() and marker.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [(line["item"], line["row"]["what"]) for line in lines(out) if "row" in line]
    assert kept == [("a", "value"), ("b", "began")]
    item, child = map(int, marker.read_text().split())
    while is_alive(item):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert "| a | value |" in (out / "results.md").read_text()
    with (out / "results.jsonl").open("a") as file:
        file.write('{"dry": true, "item": "a", "torn')
    status, said = run(code.replace('"slow", marker', '"good", value'), str(out))
    assert status == 0, said
    begun = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()
             if '"begun"' in line]  # fmt: skip
    assert [(line["item"], line["attempt"]) for line in begun] == [
        ("a", 1), ("b", 1), ("b", 2), ("c", 1),
    ]  # fmt: skip


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rehearsal_of_a_few_items(tmp_path: Path) -> None:
    status, said = run(
        "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')",
        "--dry", "--budget", "120", "--out", str(tmp_path), "--only", "sampling",
    )  # fmt: skip
    assert status == 0, said
    names = [item.name for item in ITEMS if "sampling" in item.name]
    assert len(names) >= 5
    done = [line["item"] for line in lines(tmp_path) if line.get("status") == "done"]
    assert done == names


@pytest.mark.slow
def test_a_whole_rehearsal_ends_within_its_budget(tmp_path: Path) -> None:
    began = time.monotonic()
    status, said = run(
        "import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__')",
        "--dry", "--budget", "520", "--out", str(tmp_path),
    )  # fmt: skip
    assert time.monotonic() - began < 540
    assert status == 0, said
    ends = {line["item"]: line["status"] for line in lines(tmp_path) if "status" in line}
    assert set(ends) == {item.name for item in ITEMS}
    assert (tmp_path / "trace.json.gz").stat().st_size <= 16 * 10**6
    # What comes back from a machine is a handful of files; all else lies deeper.
    assert len(list(tmp_path.glob("*"))) <= 6
    assert not [path for path in tmp_path.glob("*/*/*") if path.is_file() and "items" in path.parts]
