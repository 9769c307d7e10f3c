"""Training and sampling on a real SLURM: whatever ends a job, the run goes on as it would have."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from tests.slurm.cluster import NODES, Cluster, ClusterError
from tests.slurm.conftest import ENVIRONMENT, OPTIONS, ROOT

from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig, dump_config
from ddpm_engine.training.trainer import Trainer

pytestmark = pytest.mark.slow

FOREVER = 1_000_000
START = 150.0  # seconds that two ranks may need to start, on two busy cores
LAUNCHED, DIRECT = "train.sbatch", "train_direct.sbatch"


class Job:
    """A training job over two nodes, one rank each."""

    def __init__(self, cluster: Cluster, config: RunConfig, script: str) -> None:
        self.cluster = cluster
        self.config = config
        self.out = config.out
        self.script = script
        self.file = self.out.with_name("config.json")
        self.log = self.out.with_name("job.out")
        self.id = ""

    def submit(self, steps: int, *options: str) -> None:
        self.plan(steps)
        tasks = () if self.script == LAUNCHED else ("--ntasks-per-node=1",)
        self.id = self.cluster.submit(
            ROOT / "launch" / "slurm" / self.script,
            [*OPTIONS, *tasks, f"--output={self.log}", *options],
            [self.out, "--config", self.file],
            ENVIRONMENT,
            ROOT,
        )

    def plan(self, steps: int) -> None:
        """How far the next start is to train."""
        training = replace(self.config.training, steps=steps)
        self.file.write_text(dump_config(replace(self.config, training=training)))

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = START) -> None:
        """Wait until a condition holds; an error ends with what the job has printed last."""
        try:
            self.cluster.wait_for(what, condition, seconds)
        except ClusterError as error:
            said = "\n".join(self.text().splitlines()[-30:])
            raise ClusterError(f"{error}\njob {self.id}:\n{said}") from None

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: self.rows()[-1:] >= [(step, 0.0)])

    def wait_until_over(self, seconds: float = START) -> None:
        """Wait until it has ended one way or another."""
        self.wait_for("the job's end", lambda: self.cluster.is_over(self.id), seconds)

    def rows(self) -> list[tuple[int, float]]:
        """Steps and losses logged so far."""
        with suppress(FileNotFoundError, ValueError):
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return [(row["step"], row["loss"]) for row in map(json.loads, lines)]
        return []

    def checkpoints(self) -> list[int]:
        return CheckpointStore(self.out / "checkpoints").steps()

    def text(self) -> str:
        """All that the job and its ranks have printed."""
        logs = sorted(self.out.with_name("run-logs").glob("*/rank-*.log"))
        return "".join(file.read_text() for file in [self.log, *logs] if file.exists())

    def ranks(self) -> list[int]:
        """Processes that train."""
        found = []
        for pid in self.cluster.processes():
            with suppress(OSError):
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                # Not the launcher, which has more arguments before the script.
                if b"launch/train.py" in arguments[1:3]:
                    found.append(pid)
        return found

    def finish(self) -> None:
        self.wait_until_over(2 * START)
        assert self.cluster.field(self.id, "JobState") == "COMPLETED", self.text()


@pytest.fixture
def job(cluster: Cluster, config: RunConfig, request: pytest.FixtureRequest) -> Iterator[Job]:
    job = Job(cluster, config, getattr(request, "param", LAUNCHED))
    yield job
    if job.id:
        cluster.command("scancel", job.id)
        cluster.wait_for("the job's processes to end", lambda: not cluster.processes(), 30)


def train_alone(config: RunConfig, steps: int) -> list[tuple[int, float]]:
    """Steps and losses of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(replace(config, training=replace(config.training, steps=steps))).fit()
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def assert_went_on_from(step: int, job: Job, last: int) -> None:
    """From a checkpoint on, the job's losses are those of one process that starts from it."""
    assert f"resuming {job.out} from step {step}\n" in job.text()
    alone = replace(job.config, out=job.out.with_name("alone"))
    shutil.copytree(job.out, alone.out, ignore=lambda _, names: _later(names, step))
    expected = train_alone(alone, last)
    rows = job.rows()
    assert [at for at, _ in rows] == list(range(1, last + 1))
    assert rows[step:] == [(at, pytest.approx(loss, rel=1e-4)) for at, loss in expected[step:]]


def _later(names: list[str], step: int) -> list[str]:
    found = {name: re.fullmatch(r"step-(\d+)", name) for name in names}
    return [name for name, match in found.items() if match and int(match[1]) > step]


@pytest.mark.parametrize("job", [LAUNCHED, DIRECT], indirect=True)
def test_two_nodes_train_as_one_process_does(job: Job) -> None:
    job.submit(20)
    job.finish()
    alone = train_alone(replace(job.config, out=job.out.with_name("alone")), 20)
    assert job.rows() == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in alone]
    assert len(list(job.out.with_name("run-logs").rglob("*.log"))) >= 2


@pytest.mark.parametrize("job", [LAUNCHED, DIRECT], indirect=True)
def test_the_signal_before_the_time_limit(job: Job) -> None:
    """The run saves, the job starts again by itself, and the run goes on to its end."""
    job.submit(FOREVER, "--time=60")
    job.wait_for_step(30)
    # Within the scripts' five minutes of the end.
    job.cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=5")
    job.wait_for("the requeue", lambda: job.cluster.field(job.id, "Restarts") == "1")
    job.cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    stopped = job.checkpoints()[-1]
    job.plan(stopped + 10)
    job.finish()
    assert f"stopped at step {stopped}: requeueing job {job.id}\n" in job.text()
    assert_went_on_from(stopped, job, stopped + 10)
    assert not (job.out / "requeue").exists()


@pytest.mark.parametrize("job", [DIRECT], indirect=True)
def test_requeued_by_an_operator(job: Job) -> None:
    job.submit(FOREVER)
    job.wait_for_step(30)
    job.cluster.command("scontrol", "requeue", job.id)
    job.wait_for("its end", lambda: not job.ranks())
    # SLURM says SIGTERM first, upon which the run saves.
    stopped = job.checkpoints()[-1]
    assert f"stopped at step {stopped}; " in job.text()
    job.plan(stopped + 10)
    job.finish()
    assert_went_on_from(stopped, job, stopped + 10)


@pytest.mark.parametrize("job", [LAUNCHED], indirect=True)
def test_a_node_dies(job: Job) -> None:
    """SLURM requeues the job; it continues from the last checkpoint on the nodes that are left."""
    job.submit(FOREVER)
    job.wait_for_step(30)
    job.cluster.lose_node(NODES[1])
    job.cluster.miss_node(NODES[1])
    job.wait_for("the requeue", lambda: job.cluster.field(job.id, "Restarts") == "1")
    job.cluster.command("scontrol", "hold", job.id)
    job.wait_for("the end of its processes", lambda: not job.cluster.processes())
    stopped = job.checkpoints()[-1]
    job.plan(stopped + 10)
    job.cluster.command("scontrol", "release", job.id)
    job.finish()
    assert_went_on_from(stopped, job, stopped + 10)


@pytest.mark.parametrize("job", [DIRECT], indirect=True)
def test_a_rank_is_killed(job: Job) -> None:
    """The job fails at once and says why; submitted again, it continues."""
    job.submit(FOREVER)
    job.wait_for_step(30)
    os.kill(job.ranks()[-1], signal.SIGKILL)
    job.wait_until_over()
    assert job.cluster.field(job.id, "JobState") == "FAILED"
    said = re.search(
        r"training failed with status \d+: see .* Submit again to continue (.*)\n", job.text()
    )
    assert said is not None
    assert said[1] == str(job.out)
    assert re.search("SIGKILL|Killed", job.text())
    assert job.ranks() == []
    stopped = job.checkpoints()[-1]
    job.submit(stopped + 10)
    job.finish()
    assert_went_on_from(stopped, job, stopped + 10)


# Python runs a module of this name when it starts: it notes the samples that each task generates.
NOTING = """
import os
if "NOTES" in os.environ:
    from ddpm_engine.generation.sample_dir import SampleDir
    write = SampleDir.write
    def noted(self, ids, *rest):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write("".join(f"{k}\\n" for k in ids))
        write(self, ids, *rest)
    SampleDir.write = noted
"""


def test_the_tasks_of_an_array_generate_each_sample_once(
    cluster: Cluster, config: RunConfig, tmp_path: Path
) -> None:
    train_alone(config, 1)
    (tmp_path / "sitecustomize.py").write_text(NOTING)
    notes, out = tmp_path / "notes", tmp_path / "samples"
    array = cluster.submit(
        ROOT / "launch" / "slurm" / "sample.sbatch",
        [*OPTIONS, "--array=0-1", f"--output={tmp_path}/task-%a.out"],
        [
            "--checkpoint", config.out, "--out", out, "--count", "24", "--batch-size", "2",
            "--sampler", "ddim", "--steps", "100",
        ],
        {
            **ENVIRONMENT,
            "NOTES": str(notes),
            "PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}",
        },
        ROOT,
    )  # fmt: skip
    cluster.wait_for("the end of the array", lambda: cluster.is_over(array), START)
    said = "".join((tmp_path / f"task-{task}.out").read_text() for task in (0, 1))
    assert cluster.states(array) == {"COMPLETED"}, said
    assert sorted(map(int, notes.read_text().split())) == list(range(24))
    assert len(list(out.glob("*.png"))) == 24 + 1  # and the grid
