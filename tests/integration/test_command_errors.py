"""What a command says when it cannot go on: one line and a status, a traceback of defects."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.forked import PATHS, ROOT, run_script

from ddpm_engine.cli import checkpoints, sample, train
from ddpm_engine.cli.errors import exit_in_one_line
from ddpm_engine.errors import UserError

SCRIPTS = sorted((ROOT / "launch").glob("*.py"))


class InvalidCxxCompiler(RuntimeError):
    """As torch names it."""


def wrapped(cause: BaseException, error: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


ERRORS: list[tuple[BaseException, int, str]] = [
    (UserError("`steps` is 0"), 2, "error: `steps` is 0"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (wrapped(KeyboardInterrupt(), ImportError("numpy failed")), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: No space left on"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "error: Disk quota exceeded; make room"),
    (OSError(errno.EROFS, "Read-only file system", "a"), 2, "error: a: Read-only file system; cho"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "error: a: Permission denied"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), 2, "a file is where a folder"),
    (OSError("write failed: No space left on device"), 2, "error: write failed: No space left on"),
    (wrapped(OSError(errno.ENOSPC, "No space left on device", "a"), RuntimeError("file not open")),
     2, "error: a: No space left on device; make room"),
    (MemoryError(), 2, "error: memory has run out; take smaller"),
    (MemoryError("Unable to allocate 5.00 GiB for an array"), 2, "run out: 5.00 GiB could not be"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has\na"), 2,
     "error: memory has run out: 20.00 MiB could not be allocated; take smaller"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
                  ": you tried to allocate 4096 bytes."), 2, "run out: 4096 bytes could not be"),
    (RuntimeError("Failed to find C compiler. Please specify via CC."), 2, "install gcc and g++"),
    (wrapped(InvalidCxxCompiler(), RuntimeError("backend failed")), 2, "install gcc and g++"),
    (ModuleNotFoundError("No module named 'datasets'", name="datasets.load"), 2,
     "error: the package datasets is missing; install it"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "status", "said"), ERRORS, ids=[repr(one[0]) for one in ERRORS])
def test_an_error_that_the_user_can_correct_is_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left, exit_in_one_line():
        raise error
    assert left.value.code == status
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(), RuntimeError("shape mismatch"), KeyError("x"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        ModuleNotFoundError("No module named 'ddpm_engine.gone'", name="ddpm_engine.gone"),
    ],
)  # fmt: skip
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), exit_in_one_line():
        raise error


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("torch", "status", "said"),
    [
        ("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)",
         130, "interrupted\n"),
        ("import a_package_that_torch_needs", 2,
         "error: the package a_package_that_torch_needs is missing; install it into "
         f"{sys.prefix}\n"),
    ],
    ids=["Ctrl-C", "a broken installation"],
)  # fmt: skip
def test_what_goes_wrong_while_torch_is_imported_is_one_line(
    torch: str, status: int, said: str, script: Path, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    # A background job, in which the tests may run, ignores Ctrl-C.
    ended = subprocess.run(
        [sys.executable, script, "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), PATHS])},
        capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", said)


Main = Callable[[], None]


def forked(main: Main, arguments: list[str], stdout: int) -> tuple[int, str]:
    """Run a command in a fork of this process; return its status and what it said of errors."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(stdout, 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["command", *arguments]
            main()
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with open(reading) as errors:
        return os.waitstatus_to_exitcode(status), errors.read()


PRINTING: list[tuple[Main, list[str]]] = [
    (train.main, ["--print-config"]), (train.main, ["--help"]), (sample.main, ["--help"]),
    (checkpoints.main, ["--help"]),
]  # fmt: skip


@pytest.mark.parametrize(("main", "arguments"), PRINTING)
def test_a_reader_that_leaves_ends_a_command_silently(main: Main, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert forked(main, arguments, writing) == (141, "")
    os.close(writing)


@pytest.mark.parametrize(("main", "arguments"), PRINTING)
def test_output_that_does_not_fit_is_said(main: Main, arguments: list[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    status, said = forked(main, arguments, full)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("error: No space left on device; make room")
    os.close(full)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["launch/sample.py", "--checkpoint", "caf\udce9", "--out", "o"],
            r"caf\xe9 is not UTF-8",
        ),
        (["launch/export.py", "--checkpoint", "c", "--out", "o", "--weights", "\udce9"], "'ema'"),
        (["launch/sample.py", "--checkpoint", "c", "--out", "o", "--count", "\udce9"], "--count"),
        (["launch/train.py", "--print-config", "--out", "caf\udce9"], r'"out": "caf\udce9"'),
        (["launch/train.py", "--config", "caf\udce9"], r"configuration at caf\udce9"),
    ],
)
def test_names_that_are_no_text_can_be_given_and_shown(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    ended = run_script(*arguments, cwd=tmp_path)
    assert said in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == (0 if "--print-config" in arguments else 2)
