"""A step that is recorded once and replayed trains the same run, to the bit, as one run anew."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.forked import PATHS, ROOT
from tests.integration.test_resume import assert_same_run, loss_log
from tests.ranks import Poisoned
from tests.recorder import AsOnAGpu, Recorded, Recording
from tests.tiny import of_family

from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig, load_config
from ddpm_engine.errors import UserError
from ddpm_engine.graphs import Work
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_engine.training.trainer import Trainer

STEPS = 10
BAD = 3
"""The step that is skipped."""


@pytest.fixture
def config(config: RunConfig) -> RunConfig:
    """With classes, dropout, a step that is skipped, and log lines and checkpoints in between."""
    return replace(
        config,
        model=replace(config.model, num_class_embeds=11),
        training=replace(config.training, steps=STEPS, ema_sigma_rel=(0.1,)),
        log=replace(config.log, every=1, checkpoint_every=4, snapshot_every=STEPS),
    )


class Signal(Callback):
    """Send this process a signal before one step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def on_step_begin(self, run: Run) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), self.number)


def fit(config: RunConfig, *callbacks: Callback) -> None:
    """Train, with one sample of step `BAD` that is not a number."""
    bad = Poisoned(BAD * config.training.batch_size - 1, float("nan"))
    Trainer(config, [bad, *callbacks], any_precision=True).fit()


@pytest.mark.parametrize(
    ("family", "training"),
    [
        pytest.param("unet", {}, id="plain"),
        pytest.param("unet", {"accumulation": 2}, id="accumulation"),
        pytest.param("unet", {"recompute": "norms"}, id="norms recomputed"),
        pytest.param("unet", {"recompute": "blocks"}, id="blocks recomputed"),
        pytest.param("unet", {"precision": "bf16"}, id="bf16"),
        pytest.param("dit", {"accumulation": 2}, id="transformer, accumulation"),
        pytest.param("dit", {"recompute": "blocks"}, id="transformer, blocks recomputed"),
        pytest.param("dit", {"precision": "bf16"}, id="transformer, bf16"),
    ],
)
def test_replayed_steps_are_the_same(
    family: str, training: dict[str, Any], config: RunConfig, tmp_path: Path
) -> None:
    config = replace(
        config,
        model=of_family(family, config.model),
        training=replace(config.training, **training),
    )
    eager, recorded = replace(config, out=tmp_path / "eager"), Recorded()
    fit(eager, AsOnAGpu())
    fit(config, recorded)
    assert (len(recorded.recorder.recordings), recorded.recorder.replays) == (1, STEPS)
    assert_same_run(config.out, eager.out, STEPS)
    assert [row[0] for row in loss_log(config.out) if row[1] is None] == [BAD]


def test_a_signal_a_kill_and_a_resumption_change_nothing(config: RunConfig, tmp_path: Path) -> None:
    eager = replace(config, out=tmp_path / "eager")
    fit(eager, AsOnAGpu())
    fit(config, Recorded(), Signal(signal.SIGTERM, 1))
    assert (config.out / "requeue").read_text() == "stopped at step 3\n"
    # Not in a fork of this process, which has computed by several threads.
    path = os.pathsep.join([PATHS, str(ROOT)])
    killed = subprocess.run(
        [sys.executable, __file__, str(config.out)],
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert CheckpointStore(config.out / "checkpoints").steps() in ([3], [3, 4])
    recorded = Recorded()
    fit(config, recorded)
    assert recorded.recorder.replays in (STEPS - 3, STEPS - 4)
    assert_same_run(config.out, eager.out, STEPS)


class Graph:
    """Stands in for a graph, and can be seen to go."""

    def __init__(self, work: Work) -> None:
        with Recording() as self.recording:
            work()

    def replay(self) -> None:
        self.recording.replay()


class Captured(AsOnAGpu):
    """Let a run capture `Graph`s."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[weakref.ref[Graph]] = []

    def on_start(self, run: Run) -> None:
        super().on_start(run)
        run.capture = self.capture

    def capture(self, work: Work) -> Work:
        graph = Graph(work)
        self.graphs.append(weakref.ref(graph))
        return graph.replay


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("stopped", [False, True])
def test_no_graph_is_left_when_ranks_part(
    stopped: bool, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would wait for the end of every graph that it has a part in."""
    captured, left = Captured(), []
    leave = Trainer._leave

    def watched(trainer: Trainer) -> None:
        left.append([graph() is None for graph in captured.graphs])
        leave(trainer)

    monkeypatch.setattr(Trainer, "_leave", watched)
    fit(config, captured, *([Signal(signal.SIGTERM, 1)] if stopped else []))
    assert left == [[True]]


class NotCaptured(AsOnAGpu):
    """Let a capture fail."""

    def on_start(self, run: Run) -> None:
        super().on_start(run)

        def capture(work: Work) -> Work:
            raise RuntimeError("operation not permitted when stream is capturing")

        run.capture = capture


def test_what_cannot_be_captured_says_what_to_do(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"not permitted .*let `training.capture` be off") as failed:
        fit(config, NotCaptured())
    assert failed.value.field == "training.capture"


if __name__ == "__main__":
    fit(load_config(Path(sys.argv[1])), Recorded(), Signal(signal.SIGKILL, 6))
