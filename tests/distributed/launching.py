"""Launching runs on several processes, and reading what they did."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.ranks import environment_of

from ddpm_engine.config import RunConfig, dump_config

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def zero(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file launch/accelerate/zeroN.yaml` leaves."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "launch" / "deepspeed" / f"{name}.json"),
    }


@dataclass(frozen=True)
class Job:
    """A run, and how it is to be trained: see worker.py."""

    config: RunConfig
    environment: dict[str, str] = field(default_factory=dict)
    float64: bool = False
    poisoned: int | None = None
    first_scale: float | None = None
    trace: str | None = None


def launch(jobs: list[Job], processes: int, timeout: float = 180) -> list[str]:
    """Train runs on several processes; returns each rank's output. All must succeed."""
    outputs, statuses = start(jobs, processes, timeout)
    assert statuses == [0] * processes, "\n".join(outputs)
    return outputs


def start(jobs: list[Job], processes: int, timeout: float = 180) -> tuple[list[str], list[int]]:
    """Start the ranks as torchrun does, without its own process; outputs and exit statuses."""
    with tempfile.TemporaryDirectory() as folder:
        listed = []
        for index, job in enumerate(jobs):
            file = Path(folder) / f"{index}.json"
            file.write_text(dump_config(job.config))
            # A port for each, since every run ends with its process group.
            environment = job.environment | {"MASTER_PORT": str(_free_port())}
            listed.append({**vars(job), "config": str(file), "environment": environment})
        order = {
            "jobs": listed,
            "environments": [_environment(rank, processes) for rank in range(processes)],
            "folder": folder,
            "timeout": timeout,
        }
        host = _host()
        assert host.stdin is not None
        assert host.stdout is not None
        host.stdin.write(json.dumps(order) + "\n")
        host.stdin.flush()
        statuses = json.loads(host.stdout.readline())
        return [(Path(folder) / f"rank{rank}").read_text() for rank in range(processes)], statuses


@cache
def _host() -> subprocess.Popen[str]:
    """Of all launches; it ends with this process, when its standard input does."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py"))],
        env=_environment(0, 1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment(rank: int, processes: int) -> dict[str, str]:
    path = os.pathsep.join(map(str, (ROOT / "engine", ROOT / "kernels", ROOT)))
    own = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return own | environment_of(rank, processes)


def losses(out: Path) -> list[float]:
    """The loss of each step."""
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    assert len(ours) == len(theirs)
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(ours, theirs, strict=True))
