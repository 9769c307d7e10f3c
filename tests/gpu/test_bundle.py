"""The bundle for a machine without a network: what is in it, and that it is enough there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from benchmarks.gpu import bundle
from tests.gpu.bare import only

ROOT = Path(__file__).parents[2]


def pretend(folder: Path) -> None:
    """Empty wheels of the right names."""
    for name in bundle.LACKING:
        (folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").touch()


def required(package: str) -> set[str]:
    """What a package requires here, without extras."""
    found = requires(package) or []
    plain = (line for line in found if "extra ==" not in line and "python_version <" not in line)
    return {re.split(r"[ <>=!~;\[(]", line)[0].lower().replace("_", "-") for line in plain}


def closure(packages: tuple[str, ...]) -> set[str]:
    """Packages and all that they require, of those that are installed here."""
    found: set[str] = set()
    left = list(packages)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            try:
                left += required(name)
            except PackageNotFoundError:
                continue
    return found


def test_what_is_lacking_is_complete() -> None:
    """Everything that the distribution requires, and what that requires, is there or carried."""
    setup = (ROOT / "setup.py").read_text()
    listed = setup.partition("install_requires=[")[2].partition("]")[0]
    wanted = closure(tuple(re.findall(r'"([a-z-]+)[>;]', listed)))
    assert {"tyro", "torch", "webdataset"} <= wanted
    assert wanted - closure(bundle.THERE) - set(bundle.LACKING) == set()
    assert set(bundle.LACKING) <= wanted


def test_the_archive(tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar.gz"
    bundle.pack(archive, pretend)
    assert archive.stat().st_size < bundle.LARGEST
    with tarfile.open(archive) as file:
        names = {name.removeprefix(f"{bundle.NAME}/") for name in file.getnames()}
    for needed in (
        "gpu.sh", "COMMIT", "pyproject.toml", "launch/sample.py", "tests/kernels/conftest.py",
        "engine/ddpm_engine/training/trainer.py", "kernels/ddpm_kernels/philox.py",
        "benchmarks/gpu/__main__.py", "wheels/tyro-1.0-py3-none-any.whl",
    ):  # fmt: skip
        assert needed in names
    assert not any(name.startswith(("docs/pictures", ".venv", ".git/")) for name in names)


def test_other_wheels_are_refused(tmp_path: Path) -> None:
    def one_missing(folder: Path) -> None:
        pretend(folder)
        next(folder.glob("tyro*")).unlink()

    with pytest.raises(RuntimeError, match="tyro"):
        bundle.gather(tmp_path / "a", one_missing)

    def for_one_machine(folder: Path) -> None:
        pretend(folder)
        next(folder.glob("tyro*")).rename(folder / "tyro-1.0-cp312-cp312-linux_x86_64.whl")

    with pytest.raises(RuntimeError, match="pure-Python"):
        bundle.gather(tmp_path / "b", for_one_machine)


TRAIN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from ddpm_engine.presets import PRESETS
from ddpm_engine.training.trainer import Trainer
from benchmarks.gpu.items import checks, ladder, operations, sampling, trainer

config = PRESETS["digits"]()
out = Path(sys.argv[1])
Trainer(replace(
    config, out=out / "run", data=replace(config.data, path=out / "digits", workers=0),
    training=replace(config.training, steps=2, batch_size=4),
    log=replace(config.log, every=1, sample_every=0, tracker="none"),
)).fit()
from ddpm_engine.cli import train, sample, evaluate
print("trained", len((out / "run" / "metrics.jsonl").read_text().splitlines()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("carried", [True, False])
def test_the_trainer_runs_with_what_is_there_and_what_is_carried(
    tmp_path: Path, carried: bool
) -> None:
    """Every other package is hidden; without what is carried it cannot be imported."""
    distributions = closure(bundle.THERE)
    if carried:
        distributions |= set(bundle.LACKING)
    else:
        distributions -= set(bundle.LACKING)
    modules = [
        module for module, of in packages_distributions().items()
        if {name.lower().replace("_", "-") for name in of} & distributions
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), *(str(ROOT / part) for part in ("engine", "kernels"))])
    done = subprocess.run(
        [sys.executable, "-c", only(modules) + TRAIN, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if carried:
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("trained 2\n")
    else:
        assert "ModuleNotFoundError" in done.stderr
        assert any(re.search(f"No module named '{name}", done.stderr)
                   for name in ("tyro", "webdataset", "braceexpand"))  # fmt: skip
