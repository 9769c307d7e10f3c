"""Runs that an earlier version wrote still load, sample and resume, to the same results.

tests/fixtures/README.md says how the runs and what is expected of them were made.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "fixtures" / "run-before-interfaces"
Script = Callable[..., None]

DISTILLED = (
    "--teacher", "classes/checkpoints/step-00000400", "--out", "distilled", "--steps", 2,
    "--start-steps", 8, "--guidance-scale", 2, "--training.steps", 12, "--log.every", 1,
    "--log.checkpoint-every", 4,
)  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(OLD / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Run a script of launch/ in this process, in a copy of the old runs' folder."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)

    def start(name: str, *arguments: object) -> None:
        path = ROOT / "launch" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(word) for word in (path, *arguments)])
        AcceleratorState._reset_state(reset_partial_state=True)
        runpy.run_path(str(path), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)

    return start


def weights(run: str, step: int, part: str) -> np.ndarray:
    """All tensors of one part of a checkpoint, one after the other in the order of their names."""
    tensors: dict[str, np.ndarray] = {}
    for file in Path(run, "checkpoints", f"step-{step:08d}", part).glob("*.safetensors"):
        tensors |= load_file(file)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


@pytest.mark.parametrize(
    ("name", "run", "arguments"),
    [
        ("classes-ddim", "classes", ("--sampler", "ddim", "--steps", 4, "--guidance-scale", 1.5)),
        ("classes-ddpm", "classes", ("--sampler", "ddpm", "--steps", 6)),
        ("edm-heun", "edm", ("--sampler", "heun", "--steps", 5)),
        ("distilled", "distilled", ()),
    ],
)
def test_an_old_run_gives_the_same_samples(
    name: str,
    run: str,
    arguments: tuple[object, ...],
    script: Script,
    expected: dict[str, np.ndarray],
) -> None:
    script(
        "sample", "--checkpoint", run, "--out", "out", "--count", 4, "--format", "npz", *arguments
    )
    with np.load("out/shards/00000000-00000003.npz") as shard:
        images = shard["images"]
    # Another processor rounds differently, and a value between two levels goes to the other.
    difference = np.abs(images.astype(int) - expected[f"samples/{name}"].astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.05


@pytest.mark.parametrize(
    ("run", "first", "last", "name", "arguments"),
    [
        ("classes", 400, 406, "train", ("--config", "classes", "--log.every", 1)),
        ("edm", 400, 406, "train", ("--config", "edm", "--log.every", 1)),
        ("distilled", 8, 12, "distill", DISTILLED),
    ],
)
def test_an_old_run_resumes(
    run: str,
    first: int,
    last: int,
    name: str,
    arguments: tuple[object, ...],
    script: Script,
    expected: dict[str, np.ndarray],
) -> None:
    script(name, *arguments)
    rows = [json.loads(row) for row in Path(run, "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["step"] > first]
    np.testing.assert_allclose(losses, expected[f"losses/{run}"], rtol=1e-3)
    for part in ("model", "ema"):
        before, after = weights(run, first, part), weights(run, last, part)
        wanted = expected[f"{part}/{run}"]
        # Adam makes whole steps of gradients that are nothing but rounding, in biases that a norm
        # removes: so not each weight, but the step of all of them is compared.
        assert np.linalg.norm(after - wanted) < 0.02 * np.linalg.norm(wanted - before)


def test_an_average_is_made_of_an_old_runs_snapshots(script: Script) -> None:
    script("train", "--config", "edm")  # a second snapshot, by this version
    with pytest.raises(SystemExit, match="0"):
        script("checkpoints", "ema", "edm", "--length", 0.15, "--out", "averaged")
    script(
        "sample", "--checkpoint", "averaged", "--out", "out", "--count", 1, "--steps", 2,
        "--format", "npz",
    )  # fmt: skip
    assert Path("out/grid.png").exists()
