"""A SLURM of our own: one controller and two nodes, all of them on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
# The first must have a name that resolves: it is where ranks meet.
NODES = (socket.gethostname(), socket.gethostname() + "-b")
GPUS = 8

_SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={nodes[0]}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
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
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 Gres=gpu:{gpus}
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 Gres=gpu:{gpus}
PartitionName=tests Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
ReturnToService=2
SlurmdTimeout=10
KillWait=10
"""


class ClusterError(RuntimeError):
    """SLURM did not do what it was expected to do."""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if _program(name) is None]
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
    """Two nodes of 32 processors and 8 GPUs, by their own account.

    Args:
        folder: empty; its path is short enough for a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons = ExitStack()
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "slurm.conf").write_text(
            _SLURM_CONF.format(
                folder=folder, ports=_free_ports(3), nodes=NODES,
                gpus=GPUS,
            )
        )  # fmt: skip
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
            wait_for("munged", (self.folder / "munge.socket").exists, seconds=20)
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            wait_for("the nodes", lambda: self.idle() == len(NODES), seconds=60)
        except BaseException:
            self._daemons.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ClusterError):
            self.command("scancel", "--user=root", "--signal=KILL", "--full")
            self.command("scancel", "--user=root")
            with suppress(ClusterError):
                wait_for("the jobs to end", lambda: not self.processes(), seconds=30)
        for pid in self.processes():
            _kill(pid)
        self._daemons.close()

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._nodes[node] = self._start("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Let a node die: its daemon, and all that the daemon has started."""
        processes = self.processes(node)
        self._nodes[node].kill()
        self._nodes[node].wait()
        for pid in processes:
            _kill(pid)

    def idle(self) -> int:
        """How many nodes wait for work."""
        states = re.findall(r" State=(\S+)", self.command("scontrol", "show", "nodes"))
        return states.count("IDLE")

    def command(self, *arguments: str | Path) -> str:
        """What one of SLURM's commands prints.

        Raises:
            ClusterError: it failed.
        """
        done = subprocess.run(
            list(map(str, arguments)), env=self.environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
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

    def wait_until_over(self, job: str, seconds: float) -> None:
        """Wait until a job, or all tasks of an array, have ended one way or another."""
        active = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        wait_for(f"job {job}", lambda: not self.states(job) & active, seconds)

    def processes(self, node: str | None = None) -> list[int]:
        """Processes of this cluster's jobs, slurmstepds included; of one node, or of both."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        if node is not None:
            wanted.add(f"SLURMD_NODENAME={node}".encode())
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if wanted <= set((entry / "environ").read_bytes().split(b"\0")) and (
                    b"SLURM_JOB_ID=" in (entry / "environ").read_bytes()
                ):
                    found.append(int(entry.name))
        return found

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        program = _program(name)
        assert program is not None
        log = self._daemons.enter_context((self.folder / f"{name}.out").open("ab"))
        daemon = subprocess.Popen(
            [program, *arguments], env=self.environment, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._daemons.callback(_end, daemon)
        return daemon


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds.

    Raises:
        ClusterError: it did not in this time.
    """
    deadline = time.monotonic() + seconds
    while True:
        with suppress(ClusterError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds} s for {what}")
        time.sleep(0.2)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


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
