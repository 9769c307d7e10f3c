"""Evaluation as people start it: alone, by several processes, killed and gone on with."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_engine.config import (
    DataConfig,
    LogConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    UNetConfig,
)
from ddpm_engine.data import open_shards
from ddpm_engine.drawing.picture_files import TarShards
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.evaluation.frechet import frechet_distance, moments
from ddpm_engine.evaluation.images import RealImages
from ddpm_engine.training import Trainer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "evaluate.py"
Evaluate = Callable[..., dict[str, Any]]

METRICS = "fid,kid,is,precision-recall,accuracy"
ASKED = (
    "--metrics", METRICS, "--features", "digits", "--count", 60, "--piece", 16,
    "--sampler", "ddim", "--steps", 6, "--batch-size", 8,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional network, trained just enough that its output is not zero."""
    config = RunConfig(
        out=tmp_path_factory.mktemp("trained") / "run",
        data=DataConfig(path=shards, workers=0),
        model=UNetConfig(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=11,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        training=TrainingConfig(steps=40, batch_size=16, ema_decay=0.9),
        log=LogConfig(every=50, checkpoint_every=50, sample_every=0, tracker="none"),
    )
    Trainer(config).fit()
    return config.out


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests here, as by all evaluations of a person."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def evaluate(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Run the script in this process: `evaluate("name", *arguments)` → its report."""

    def start(name: str, *arguments: object) -> dict[str, Any]:
        out = tmp_path / name
        line = [SCRIPT, "--out", out, "--cache", cache, *arguments]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [str(word) for word in line])
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return report(out)

    return start


def report(out: Path) -> dict[str, Any]:
    (path,) = out.glob("result-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def processes(trained: Path, out: Path, cache: Path, ranks: int) -> list[Any]:
    """Start the script as the ranks of one run, without a launcher."""
    line = [
        sys.executable, SCRIPT, "--checkpoint", trained, "--out", out, "--cache", cache, *ASKED,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(ranks),
    }
    return [
        subprocess.Popen(
            [str(word) for word in line],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def test_the_figures_are_those_of_the_pictures(
    trained: Path, shards: Path, cache: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    found = evaluate("out", "--checkpoint", trained, *ASKED)
    # The same by hand, from the files that are left.
    files = TarShards(tmp_path / "out" / "pictures" / "shards", "png")
    drawn: dict[int, np.ndarray] = {}
    for path in sorted(files.folder.iterdir()):
        drawn.update(files.read(path))
    assert sorted(drawn) == list(range(60))
    pictures = np.stack([drawn[k] for k in range(60)])
    real = RealImages(open_shards(shards), (8, 8, 1)).read(range(100))
    classifier = digit_classifier(8, cache)
    metrics = found["metrics"]
    assert list(metrics) == METRICS.split(",")
    distance = frechet_distance(
        moments([classifier.features(pictures)]), moments([classifier.features(real)])
    )
    assert metrics["fid"]["distance"] == pytest.approx(distance, rel=1e-6)
    # Classes come in turn, as they do where nothing is said of a class-conditional network.
    right = classifier.classify(pictures) == np.arange(60) % 10
    assert metrics["accuracy"]["share"] == right.mean()
    assert metrics["kid"]["blocks"] == 10
    assert metrics["precision-recall"]["count"] == 60
    # Everything that is needed to measure it again.
    assert found["pictures"]["count"] == 60
    assert found["pictures"]["sampler"] == "ddim"
    assert found["pictures"]["steps"] == 6
    assert found["pictures"]["checkpoint_step"] == 40
    assert found["pictures"]["weights"] == "ema"
    assert found["pictures"]["ema_decay"] == 0.9
    assert found["reference"]["fingerprint"] == open_shards(shards).manifest.fingerprint
    assert found["features"]["hash"] == classifier.hash
    assert "torch" in found["versions"]
    (table,) = (tmp_path / "out").glob("result-*.md")
    heads, _, values = table.read_text().splitlines()
    assert heads.count("|") == values.count("|")
    assert "ddim, 6 steps, seed 0" in values
    assert "EMA 0.9" in values
    assert (tmp_path / "out" / "pictures" / "grid.png").exists()


def test_two_processes_and_killed_ones_report_the_same_bytes(
    trained: Path, cache: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    evaluate("one", "--checkpoint", trained, *ASKED)
    (expected,) = (
        (tmp_path / "one").glob("result-*")
        if False
        else [sorted((tmp_path / "one").glob("result-*.json"))[0]]
    )
    # Two, with a cache of their own.
    said = ""
    for process in (started := processes(trained, tmp_path / "two", tmp_path / "cache", ranks=2)):
        text, _ = process.communicate(timeout=240)
        said += text
    assert [process.returncode for process in started] == [0, 0], said
    assert said.count("| Fréchet distance |") >= 1
    assert (tmp_path / "two" / expected.name).read_bytes() == expected.read_bytes()
    # Two that are killed, followed by one.
    started = processes(trained, tmp_path / "killed", cache, ranks=2)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").rglob("0*.npz")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("0*.*")}
    assert kept
    evaluate("killed", "--checkpoint", trained, *ASKED)
    assert (tmp_path / "killed" / expected.name).read_bytes() == expected.read_bytes()
    for path, before in kept.items():
        assert path.stat().st_mtime_ns == before
