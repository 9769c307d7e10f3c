"""A private SLURM: one controller and three nodes, all of them on this machine."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "taskset")
# The first must have a name that resolves: it is where ranks meet. The last is a spare.
NODES = tuple(socket.gethostname() + suffix for suffix in ("", "-b", "-c"))
GPUS = 8
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"

_SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={nodes[0]}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
# Ranks meet at a port made of the job's id: two of these clusters must not have the same ones.
FirstJobId={first_job}
AuthType=auth/munge
# A requeued job waits until its old credentials have expired: two minutes, if this is not said.
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# The nodes claim to have processors and GPUs that this machine may not have.
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=32 Gres=gpu:{gpus}
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]}
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]}
NodeName={nodes[2]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} Weight=2
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
SchedulerParameters=sched_interval=1
ReturnToService=2
# A machine that is busy answers late, and is not dead: a test says when a node is (`miss_node`).
SlurmdTimeout=0
MessageTimeout=30
KillWait=10
"""

_SHOW_JOBS = ("scontrol", "show", "jobs", "--oneliner")
_SHOW_NODES = ("scontrol", "show", "nodes", "--oneliner")
# Fields of jobs and nodes that say why something waits.
_REASONS = "JobId|JobState|Restarts|StartTime|NodeList|NodeName|State|Reason"
_ALWAYS_SAID = re.compile(r"gres\.conf|mpi/|MPI|cgroup\.conf|select/cons_tres|MCSParameters")


class ClusterError(RuntimeError):
    """SLURM did not do what it was expected to do."""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}); see tests/slurm/install.sh"
    if os.geteuid() != 0:
        return "slurmd starts other users' jobs, so it has to be started by root"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the name of this machine, {socket.gethostname()}, does not resolve"
    return None


class Cluster:
    """Two nodes of 32 processors and 8 GPUs, by their own account, and a spare for one that dies.

    Args:
        folder: empty; its path is short enough for a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons = ExitStack()
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        ports = _free_ports(1 + len(NODES))
        # Never written again: a daemon that starts may read it at any moment.
        (folder / "slurm.conf").write_text(
            _SLURM_CONF.format(
                folder=folder, ports=ports, first_job=20 * ports[0], nodes=NODES, gpus=GPUS
            )
        )
        for gpu in range(GPUS):
            (folder / f"gpu{gpu}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        (folder / "cgroup.conf").write_text("")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def __enter__(self) -> Cluster:
        try:
            self._start(
                "munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
                f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
                f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munged.log",
            )  # fmt: skip
            self.wait_for("munged", (self.folder / "munge.socket").exists, seconds=20)
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
        except ClusterError as error:
            self._daemons.close()
            logs = sorted(self.folder.glob("*.out"))
            tails = "".join(f"\n{log.name}: {log.read_text()[-2000:]}" for log in logs)
            raise ClusterError(f"{error}{tails}") from None
        except BaseException:
            self._daemons.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ClusterError):
            self.command("scancel", "--user=root", "--signal=KILL", "--full")
            self.command("scancel", "--user=root")
            with suppress(ClusterError):
                self.wait_for("the jobs to end", lambda: not self.processes(), seconds=30)
        for pid in self.processes():
            _kill(pid)
        self._daemons.close()

    def restore(self) -> None:
        """Make all nodes wait for work, whatever the last test has left of them."""
        self.command("scancel", "--user=root")
        for node, daemon in self._nodes.items():
            if daemon.poll() is not None:
                self.start_node(node)
            elif re.search("DOWN|DRAIN|FAIL", self.node_states()[node]):
                self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_for("idle nodes", lambda: set(self.node_states().values()) == {"IDLE"}, 120)

    def start_node(self, node: str) -> None:
        """Start a node's daemon; returns when it has registered, and the node gets work.

        Raises:
            ClusterError: the daemon has ended at once, or is not heard of in two minutes.
        """
        if node in self._nodes:
            self.miss_node(node)  # so that only a new registration makes it serve
        # A core each, so that two ranks do not fight for all of them; the spare has the second's.
        cores = sorted(os.sched_getaffinity(0))
        core = cores[min(NODES.index(node), 1) % len(cores)]
        daemon = self._start("taskset", "--cpu-list", str(core), "slurmd", "-D", "-N", node)
        self._nodes[node] = daemon

        def serves() -> bool:
            return self.node_states()[node] in ("IDLE", "MIXED", "ALLOCATED")

        self.wait_for(f"node {node}", lambda: daemon.poll() is not None or serves(), 120)
        if daemon.poll() is not None:
            said = _last_lines(self.folder / "taskset.out", 15)
            raise ClusterError(f"the daemon of {node} ended with {daemon.returncode}:\n{said}")

    def kill_node(self, node: str) -> None:
        """Let a node's daemon die; jobs' processes stay, until whoever they talk to has gone."""
        self._nodes[node].kill()
        self._nodes[node].wait()

    def lose_node(self, node: str) -> None:
        """Let a node die with all that runs on it."""
        lost = [pid for pid in self.processes() if on_node(pid, node)]
        keepers = {int(_status(pid)["PPid"]) for pid in lost}
        self.kill_node(node)
        for pid in [k for k in keepers if _status(k).get("Name") == "slurmstepd"] + lost:
            _kill(pid)

    def miss_node(self, node: str) -> None:
        """Let SLURM take a node for dead, as it does by itself after its SlurmdTimeout."""
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=missed")

    def node_states(self) -> dict[str, str]:
        """What SLURM says of each node, such as `IDLE` or `DOWN+NOT_RESPONDING`."""
        return dict(re.findall(r"NodeName=(\S+) .* State=(\S+)", self.command(*_SHOW_NODES)))

    def command(self, *arguments: str | Path) -> str:
        """What one of SLURM's commands prints.

        Raises:
            ClusterError: it failed, or did not end in a minute.
        """
        try:
            done = subprocess.run(
                list(map(str, arguments)), env=self.environment, capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ClusterError(str(error)) from None
        if done.returncode:
            raise ClusterError(f"{arguments}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(
        self, script: Path, options: Sequence[str], arguments: Sequence[str | Path],
        environment: dict[str, str], directory: Path,
    ) -> str:  # fmt: skip
        """Submit a script from a directory; returns the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script), *map(str, arguments)],
            env={**self.environment, **environment}, cwd=directory, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ClusterError(done.stderr)
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One field of what SLURM says of a job, such as `JobState`."""
        found = re.search(rf"\b{name}=(\S+)", self.command("scontrol", "show", "job", job))
        if found is None:
            raise ClusterError(f"job {job} has no {name}")
        return found[1]

    def states(self, job: str) -> set[str]:
        """States of a job, or of all tasks of an array."""
        return set(re.findall(r"\bJobState=(\S+)", self.command("scontrol", "show", "job", job)))

    def is_over(self, job: str) -> bool:
        """Whether a job, or all tasks of an array, have ended one way or another."""
        active = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        return not self.states(job) & active

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition holds.

        Raises:
            ClusterError: it did not in this time; with what the cluster says of itself.
        """
        deadline = time.monotonic() + seconds
        while True:
            with suppress(ClusterError):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {seconds:.0f} s for {what}\n{self.account()}")
            time.sleep(0.2)

    def account(self) -> str:
        """State of every job and node, with its reason, and the last that was logged."""
        lines = []
        for arguments in (_SHOW_JOBS, _SHOW_NODES):
            try:
                shown = self.command(*arguments)
            except ClusterError as error:
                shown = str(error)
            for line in shown.splitlines():
                fields = re.findall(rf"\b(?:{_REASONS})=.*?(?= \w+=|$)", line)
                lines.append(" ".join(fields) or line)
        for daemon, count in (("slurmctld", 15), *((f"slurmd-{node}", 5) for node in NODES)):
            log = self.folder / f"{daemon}.log"
            lines += [f"{log.name}:", _last_lines(log, count)]
        return "\n".join(lines)

    def processes(self) -> list[int]:
        """Processes of this cluster's jobs."""
        ours = f"SLURM_CONF={self.folder}/slurm.conf"
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                variables = _environment(int(entry.name))
                if ours in variables and any(v.startswith("SLURM_JOB_ID=") for v in variables):
                    found.append(int(entry.name))
        return found

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = self._daemons.enter_context((self.folder / f"{name}.out").open("ab"))
        daemon = subprocess.Popen(
            [name, *arguments], env=self.environment, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._daemons.callback(_end, daemon)
        return daemon


def on_node(pid: int, node: str) -> bool:
    """Whether a job's process runs on a node."""
    return f"SLURMD_NODENAME={node}" in _environment(pid)


def _environment(pid: int) -> list[str]:
    """Variables of a process; none if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return []


def _status(pid: int) -> dict[str, str]:
    """What the system says of a process; nothing if it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def _last_lines(log: Path, count: int) -> str:
    """Without what every daemon says when it starts."""
    lines = log.read_text().splitlines() if log.exists() else []
    return "\n".join([line for line in lines if not _ALWAYS_SAID.search(line)][-count:])


def _free_ports(count: int) -> list[int]:
    """Above those where ranks meet, below those that a system hands out by itself.

    So nobody takes the port of a daemon that is dead for a while.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(30_000, 32_768), 2768):
        with socket.socket() as attempt, suppress(OSError):
            attempt.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
