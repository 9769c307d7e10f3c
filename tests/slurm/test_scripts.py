"""What the training scripts decide when training has ended; files play the commands of SLURM."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "launch" / "slurm"

# The step that asks the nodes ends as the next line of `answers` says; the one that trains, as
# `training` says.
SRUN = """\
case " $* " in
    *" --overlap "*)
        read -r answer <"$PLAY/answers"
        sed -i 1d "$PLAY/answers"
        exit "$answer" ;;
    *) . "$PLAY/training" ;;
esac
"""
SCONTROL = """\
case $1 in
    show) echo first-node ;;
    requeue) echo "$2" >>"$PLAY/requeued" ;;
esac
"""
ANSWERS, SILENT = 0, 1


@dataclass
class Play:
    """One job, number 77, of a script."""

    script: str
    folder: Path

    def __post_init__(self) -> None:
        commands = self.folder / "commands"
        commands.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (commands / name).chmod(0o755)
        self.run = self.folder / "run"
        self.run.mkdir()
        self.noted = self.folder / "run-logs" / "77-node-failures"

    def start(
        self, *, asked: tuple[int, ...], training: str, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Start it; the nodes answer as `asked`, in turn."""
        (self.folder / "answers").write_text("".join(f"{answer}\n" for answer in asked))
        (self.folder / "training").write_text(training)
        environment = {
            "PATH": f"{self.folder / 'commands'}:{os.environ['PATH']}",
            "PLAY": str(self.folder), "SLURM_JOB_ID": "77", "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "first-node,second-node", **(variables or {}),
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(SCRIPTS / self.script), str(self.run)],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def requeued(self) -> list[str]:
        """Jobs that SLURM was asked to start again."""
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []


@pytest.fixture(params=["train.sbatch", "train_direct.sbatch"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    return Play(request.param, tmp_path)


def test_a_run_that_ends_is_not_started_again_but_one_that_was_stopped_is(play: Play) -> None:
    done = play.start(asked=(ANSWERS,), training="exit 0")
    assert (done.returncode, done.stderr, play.requeued()) == (0, "", [])
    stop = f"echo stopped at step 30 >{play.run}/requeue; exit 3"
    done = play.start(asked=(ANSWERS,), training=stop)
    assert "stopped at step 30: requeueing job 77\n" in done.stdout
    assert play.requeued() == ["77"]
    assert not (play.run / "requeue").exists()


@pytest.mark.parametrize("answer", [ANSWERS, SILENT])
def test_a_failure_on_nodes_that_answer_as_before_is_the_runs_own(play: Play, answer: int) -> None:
    (play.run / "requeue").touch()  # the mark of an earlier start does not count
    done = play.start(asked=(answer, answer), training="exit 3")
    assert (done.returncode, play.requeued()) == (3, [])
    assert "training failed with status 3" in done.stderr
    assert not play.noted.exists()


def test_a_node_that_no_longer_answers_is_at_fault(play: Play) -> None:
    done = play.start(asked=(ANSWERS, SILENT), training="exit 3")
    assert "does not answer: requeueing job 77\n" in done.stdout
    assert play.requeued() == ["77"]
    (line,) = play.noted.read_text().splitlines()
    assert line.endswith("77-0 first-node,second-node")


def test_nodes_are_not_at_fault_for_ever(play: Play) -> None:
    for restart in range(3):
        variables = {"MAX_NODE_FAILURES": "2", "SLURM_RESTART_COUNT": str(restart)}
        done = play.start(asked=(ANSWERS, SILENT), training="exit 3", variables=variables)
    assert play.requeued() == ["77", "77"]
    assert "training failed with status 3" in done.stderr


@pytest.mark.parametrize(("gpus", "bound"), [("8", False), ("0", True), (None, True)])
def test_slurm_deals_out_cores_only_where_there_are_no_gpus(
    gpus: str | None, bound: bool, tmp_path: Path
) -> None:
    play = Play("train_direct.sbatch", tmp_path)
    variables = {} if gpus is None else {"SLURM_GPUS_ON_NODE": gpus}
    training = f'echo "$@" >{tmp_path}/words'
    done = play.start(asked=(ANSWERS,), training=training, variables=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("--cpu-bind=none" not in (tmp_path / "words").read_text().split()) == bound
