"""Scripts run in forks of a process that has torch already: a process each, without its imports."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
PATHS = f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"


def run_script(
    *arguments: str | Path,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a script as `python SCRIPT ARGUMENTS` would, in a fork of this process.

    Args:
        arguments: the script, relative to the repository, and what it gets.
        cwd: working directory.
        environment: variables beside those of this process.
        timeout: seconds until it is killed.

    Returns:
        What `subprocess.run(..., capture_output=True, text=True)` returns.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.chdir(cwd)
            os.environ.update({"COLUMNS": "100", "PYTHONPATH": PATHS, **(environment or {})})
            _exec(words, stdout.fileno(), stderr.fileno())
        deadline = time.monotonic() + timeout
        pid = 0
        while pid == 0:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == 0 and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise subprocess.TimeoutExpired(words, timeout)
            time.sleep(0.005)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(status), *said)


def _exec(words: list[str], stdout: int, stderr: int) -> None:
    """Become the script; never returns."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        logging.root.handlers.clear()  # pytest's
        signal.signal(signal.SIGINT, signal.default_int_handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        script = ROOT / words[0]
        sys.argv = [str(script), *words[1:]]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # a save in the background ends first
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
