"""Which folder a run is trained in, what claims it, and where recorded paths lead."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm_engine.checkpoints.load import config_of
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.cli import distill, train
from ddpm_engine.config import RunConfig, dump_config
from ddpm_engine.errors import UserError
from ddpm_engine.training import build
from ddpm_engine.training.trainer import Trainer


@pytest.fixture
def project(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data in it, which `relative` trains a run in."""
    project = tmp_path / "project"
    shutil.copytree(Path(config.data.path), project / "data")
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def relative(config: RunConfig, project: Path) -> RunConfig:
    """Two steps, with paths relative to the project."""
    return replace(
        config,
        out=Path("runs/a"),
        data=replace(config.data, path=Path("data")),
        training=replace(config.training, steps=2),
    )


@pytest.fixture
def trained(relative: RunConfig) -> Path:
    Trainer(relative).fit()
    return relative.out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_config(run: Path) -> Path:
    (run / "config.json").unlink()
    return run


@pytest.mark.parametrize(
    "named", [Path, lambda run: run / "config.json", without_config], ids=["run", "file", "gone"]
)
def test_the_configuration_of_a_run_means_the_run_that_it_lies_in(
    named: Callable[[Path], Path], trained: Path
) -> None:
    copy = Path("runs/b")
    shutil.copytree(trained, copy)
    before = contents(trained)
    options = train.parse(["--config", str(named(copy)), "--training.steps", "3"])
    assert options.run.out == copy
    Trainer(options.run).fit()
    assert CheckpointStore(copy / "checkpoints").steps() == [2, 3]
    assert contents(trained) == before
    options = train.parse(["--config", str(copy), "--out", "runs/c"])
    assert options.run.out == Path("runs/c")


def test_a_copy_of_a_recorded_configuration_may_mean_two_runs(trained: Path) -> None:
    shutil.copy(trained / "config.json", "mine.json")
    with pytest.raises(UserError, match=r"mine\.json is a copy .* runs/a to go on .* new one"):
        train.parse(["--config", "mine.json"])
    assert train.parse(["--config", "mine.json", "--out", "runs/b"]).run.out == Path("runs/b")


def test_a_configuration_that_a_person_wrote_says_where_its_run_goes(relative: RunConfig) -> None:
    Path("mine").mkdir()
    for file in (Path("mine/config.json"), Path("mine/other.json")):
        file.write_text(dump_config(relative))
        assert train.parse(["--config", str(file)]).run.out == Path("runs/a")


@pytest.mark.parametrize("moved", ["nothing", "run", "project"])
@pytest.mark.parametrize("read", ["train", "checkpoint", "distill"])
def test_recorded_paths_count_from_where_they_were_recorded(
    read: str, moved: str, trained: Path, project: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = project / trained
    if moved == "run":
        run = tmp_path / "elsewhere"
        shutil.move(project / trained, run)
    if moved == "project":
        shutil.move(project, tmp_path / "moved")
        project = tmp_path / "moved"
        run = project / trained
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if read == "train":
        found = train.parse(["--config", str(run)]).run
    elif read == "checkpoint":
        found = config_of(run / "checkpoints" / "step-00000002")
    else:
        found = distill.parse(["--teacher", str(run), "--out", "d", "--steps", "1"])
    assert found.data.path == project / "data"


def test_recorded_paths_stay_as_they_are_in_their_own_folder(
    trained: Path, relative: RunConfig
) -> None:
    settled = replace(relative, training=replace(relative.training, precision="no"))
    assert train.parse(["--config", str(trained)]).run == settled


def test_what_a_run_was_distilled_from_may_be_written_otherwise_or_moved(
    trained: Path, relative: RunConfig
) -> None:
    words = ["--out", "d", "--steps", "1", "--start-steps", "2", "--training.steps"]
    Trainer(distill.parse(["--teacher", str(trained), *words, "2"])).fit()
    again = distill.parse(["--teacher", str(trained.absolute()), *words, "2"])
    Trainer(again).fit()
    shutil.move(trained, "moved")
    Trainer(distill.parse(["--teacher", "moved", *words, "2"])).fit()
    shutil.copytree("moved", trained)
    with pytest.raises(UserError, match="another run"):
        Trainer(distill.parse(["--teacher", "runs/a", *words, "2"])).fit()


def test_a_lost_configuration_is_written_again(
    trained: Path, relative: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (trained / "config.json").unlink()
    (trained / "data.json").unlink()
    other = replace(relative, training=replace(relative.training, batch_size=4))
    with pytest.raises(UserError, match="another run"):
        Trainer(other)
    Trainer(replace(relative, training=replace(relative.training, steps=3))).fit()
    assert "config.json is gone" in caplog.text
    assert json.loads((trained / "config.json").read_text())["training"]["steps"] == 3
    assert CheckpointStore(trained / "checkpoints").steps() == [2, 3]


def _no_such_shards(config: RunConfig, _: pytest.MonkeyPatch) -> RunConfig:
    return replace(config, data=replace(config.data, path=Path("dta/shard-{000000..000002}.tar")))


def _no_hardware(config: RunConfig, patched: pytest.MonkeyPatch) -> RunConfig:
    def fail(*_: Any) -> Any:
        raise UserError("no such strategy here")

    patched.setattr(build, "start_strategy", fail)
    return config


def _no_data(config: RunConfig, _: pytest.MonkeyPatch) -> RunConfig:
    return replace(config, data=replace(config.data, path=Path("nothing")))


@pytest.mark.parametrize("wrong", [_no_such_shards, _no_hardware, _no_data])
def test_a_first_start_that_fails_claims_nothing(
    wrong: Callable[[RunConfig, pytest.MonkeyPatch], RunConfig],
    relative: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched, pytest.raises(UserError):
        Trainer(wrong(relative, patched))
    assert not relative.out.exists()


def test_a_run_without_a_step_may_become_another(relative: RunConfig, project: Path) -> None:
    for name in ("a", "b"):  # no image can be read of either
        Path(f"{name}.tar").write_bytes(b"\0" * 1024)
    stream = replace(relative, data=replace(relative.data, path=Path("{a,b}.tar")))
    with pytest.raises(UserError, match="cannot be read"):
        Trainer(stream).fit()
    right = replace(relative, training=replace(relative.training, batch_size=4))
    Trainer(right).fit()
    assert CheckpointStore(right.out / "checkpoints").steps() == [2]
    with pytest.raises(UserError, match="another run"):
        Trainer(relative)


def _configuration_of_another_tool(out: Path) -> None:
    (out / "config.json").write_text('{"architectures": ["Llama"]}')


def _a_persons_configuration(out: Path) -> None:
    (out / "config.json").write_text(dump_config(RunConfig()))


def _notes(out: Path) -> None:
    (out / "notes.txt").write_text("precious")


@pytest.mark.parametrize("fill", [_configuration_of_another_tool, _a_persons_configuration, _notes])
def test_a_folder_of_something_else_is_refused_and_stays(
    fill: Callable[[Path], None], relative: RunConfig
) -> None:
    relative.out.mkdir(parents=True)
    fill(relative.out)
    before = contents(relative.out)
    with pytest.raises(UserError) as raised:
        Trainer(relative)
    assert contents(relative.out) == before
    assert "empty" not in str(raised.value)
    assert os.listdir(relative.out) == [Path(name).name for name in before]
