"""Scripts that make a folder, killed before each rename of a file or folder.

Running the same command again leaves what an uninterrupted one leaves. train.py, distill.py,
sample.py, evaluate.py and make_shards.py have such tests of their own.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.files.layout import is_export
from ddpm_engine.training.trainer import Trainer

LAUNCH = Path(__file__).parents[2] / "launch"
Names = dict[str, bytes]


def run(script: str, *arguments: str | Path, killed_at: int = 0) -> int:
    """Run a script in a fork of this process; it dies instead of the `killed_at`-th rename.

    Returns:
        Its exit status, or minus the signal that ended it.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    status, renames, replace_file = 1, 0, os.replace

    def rename(source: str | Path, target: str | Path) -> None:
        nonlocal renames
        renames += 1
        if renames == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)

    try:
        os.replace = rename  # type: ignore[assignment]
        sys.argv = [script, *map(str, arguments)]
        runpy.run_path(str(LAUNCH / script), run_name="__main__")
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        os._exit(status)


def contents(folder: Path) -> Names:
    """Every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rerun_after_every_kill(script: str, *arguments: str | Path, check: Callable[[], Names]) -> int:
    """Kill a script at its first rename, run it again, kill it at its second, and so on.

    Returns:
        How often it was killed: the number of its renames.
    """
    assert run(script, *arguments) == 0
    whole = check()
    for kills in range(100):
        status = run(script, *arguments, killed_at=kills + 1)
        if status == 0:
            return kills
        assert status == -signal.SIGKILL
        assert run(script, *arguments) == 0
        assert check() == whole
    raise AssertionError("it renames for ever")


@pytest.fixture
def trained(config: RunConfig) -> Path:
    diffusion = replace(config.diffusion, timesteps=20, beta_end=0.5)
    training = replace(config.training, steps=4)
    log = replace(config.log, checkpoint_every=2, sample_steps=20)
    Trainer(replace(config, diffusion=diffusion, training=training, log=log)).fit()
    return config.out


def test_an_export(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "export"

    def check() -> Names:
        assert is_export(out)
        assert [path.name for path in out.parent.iterdir()] == ["export"]
        return contents(out)

    # The weights, two configurations, the card and the index.
    kills = rerun_after_every_kill("export.py", "--checkpoint", trained, "--out", out, check=check)
    assert kills == 5


def test_figures(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    names = ["forward.png", "schedules.png"]

    def check() -> Names:
        found = contents(out)
        assert sorted(found) == names
        for name in names:
            Image.open(out / name).load()
        return found

    kills = rerun_after_every_kill(
        "visualize.py", "--checkpoint", trained, "--out", out, "--only", "forward,schedules",
        "--timesteps", "1,9", check=check,
    )  # fmt: skip
    assert kills == len(names)


def test_an_average_of_checkpoints(trained: Path, tmp_path: Path) -> None:
    """It refuses a folder that holds anything but what an interrupted run left."""
    arguments: list[str | Path] = ["average", trained, "--out"]
    assert run("checkpoints.py", *arguments, tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    for kills in range(100):
        out = tmp_path / f"average-{kills}"
        status = run("checkpoints.py", *arguments, out, killed_at=kills + 1)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert run("checkpoints.py", *arguments, out) == 0
        assert sorted(contents(out)) == sorted(whole)
        tensors = [name for name in whole if name.endswith(".safetensors")]
        assert tensors
        for name in tensors:
            assert contents(out)[name] == whole[name]
        assert run("checkpoints.py", *arguments, out) == 2
    assert kills >= 2
