"""Averages of any length after training: kept, continued, combined, sampled from."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.checkpoints.posthoc_average import reconstruct_average
from ddpm_engine.checkpoints.store import SNAPSHOTS, CheckpointStore, verify
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.rules import problems
from ddpm_engine.training.trainer import Trainer

Checkpoints = Callable[..., tuple[int, str]]
SCRIPT = Path(__file__).parents[2] / "launch" / "checkpoints.py"
STEPS, EVERY = 24, 2


def with_profiles(config: RunConfig, out: Path, *lengths: float, steps: int = STEPS) -> RunConfig:
    return replace(
        config,
        out=out,
        training=replace(config.training, steps=steps, ema_sigma_rel=lengths),
        log=replace(config.log, snapshot_every=EVERY),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test that asks for a trained run."""
    return tmp_path_factory.mktemp("made") / "run"


@pytest.fixture
def trained(config: RunConfig, made: Path) -> Path:
    """A run that kept the lengths 0.1 and 0.2."""
    if not made.exists():
        Trainer(with_profiles(config, made, 0.1, 0.2)).fit()
        AcceleratorState._reset_state(reset_partial_state=True)
    return made


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Checkpoints:
    """Run launch/checkpoints.py in this process: its exit status, and what it said."""

    def start(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (SCRIPT, *arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return start


def tensors(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(next((folder / part).glob("*.safetensors")))


def vector(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


def snapshots(run: Path) -> CheckpointStore:
    return CheckpointStore(run / SNAPSHOTS)


def test_snapshots_are_kept_and_agree_with_the_checkpoint(trained: Path) -> None:
    store = snapshots(trained)
    assert store.steps() == list(range(EVERY, STEPS + 1, EVERY))
    assert store.leftovers() == []
    assert sorted(f.name for f in store.path(STEPS).iterdir() if f.is_dir()) == [
        "ema-0.1", "ema-0.2",
    ]  # fmt: skip
    checkpoint = trained / "checkpoints" / f"step-{STEPS:08d}"
    for part in ("ema-0.1", "ema-0.2"):
        ours, theirs = tensors(store.path(STEPS), part), tensors(checkpoint, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert vector(tensors(checkpoint, "ema-0.1")).ne(vector(tensors(checkpoint, "ema-0.2"))).any()


@pytest.mark.parametrize("step", [None, 18])
def test_an_average_made_afterwards_is_the_one_that_a_run_tracks(
    step: int | None, trained: Path, config: RunConfig, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    at = step or STEPS
    Trainer(with_profiles(config, config.out, 0.15, steps=at)).fit()
    direct = vector(tensors(config.out / "checkpoints" / f"step-{at:08d}", "ema-0.15"))
    out = tmp_path / "average"
    arguments = ["ema", trained, "--length", "0.15", "--out", out]
    status, said = checkpoints(*arguments, *([] if step is None else ["--step", step]))
    assert status == 0, said
    assert f"length 0.15 at step {at}, made of {2 * at // EVERY} others" in said
    pretrained = load_model(out)  # as sample.py does
    assert pretrained.step == at
    made = vector(dict(pretrained.network.named_parameters()))
    nearest = min(
        float((vector(tensors(snapshots(trained).path(at), part)) - direct).norm())
        for part in ("ema-0.1", "ema-0.2")
    )
    error = float((made - direct).norm())
    print(f"error {error / nearest:.1e} of the distance to the nearest average kept")
    assert error < 0.05 * nearest
    status, said = checkpoints(*arguments)
    assert (status, "exists" in said) == (2, True)


def test_a_resumed_run_keeps_the_averages_to_the_bit(
    trained: Path, config: RunConfig, tmp_path: Path
) -> None:
    for steps in (11, STEPS):  # between two snapshots
        Trainer(with_profiles(config, config.out, 0.1, 0.2, steps=steps)).fit()
        AcceleratorState._reset_state(reset_partial_state=True)
    last = f"checkpoints/step-{STEPS:08d}"
    folders = [last, *(f"{SNAPSHOTS}/step-{n:08d}" for n in range(EVERY, STEPS + 1, EVERY))]
    for folder in folders:
        for part in ("ema-0.1", "ema-0.2"):
            ours, theirs = tensors(config.out / folder, part), tensors(trained / folder, part)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), folder


def test_other_lengths_are_another_run(trained: Path, config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"`training.ema_sigma_rel` was \(0.1, 0.2\) and is now"):
        Trainer(with_profiles(config, trained, 0.1))


def test_a_damaged_snapshot_is_named_and_done_without(
    trained: Path, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    store = CheckpointStore(shutil.copytree(trained / SNAPSHOTS, tmp_path / "run" / SNAPSHOTS))
    file = next((store.path(10) / "ema-0.1").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    status, said = checkpoints(
        "ema", tmp_path / "run", "--length", "0.12", "--out", tmp_path / "average"
    )
    assert status == 0, said
    assert "cannot be used" in said
    assert "step-00000010: ema-0.1" in said
    assert f"made of {2 * (STEPS // EVERY - 1)} others" in said


def test_what_cannot_be_made(trained: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    usable = [checkpoint for n in (2, 4) if (checkpoint := verify(snapshots(trained).path(n))[0])]
    for length, step, message in [
        (0.5, None, "the length of an average is 0.5"),
        (0.1, 3, "no snapshot of step 3; those that can be used are of 2, 4"),
    ]:
        with pytest.raises(UserError, match=message):
            reconstruct_average(usable, length, tmp_path / "average", step)
    assert not (tmp_path / "average").exists()
    (tmp_path / "none" / "checkpoints").mkdir(parents=True)
    arguments = ["--length", "0.1", "--out", tmp_path / "average"]
    status, said = checkpoints("ema", tmp_path / "none", *arguments)
    assert status == 2
    assert "--training.ema-sigma-rel 0.05" in said


@pytest.mark.parametrize("lengths", [(0.0,), (0.3,), (0.1, 0.1), (0.1, 0.10000001)])
def test_lengths_that_cannot_be_kept(config: RunConfig, lengths: tuple[float, ...]) -> None:
    found = problems(with_profiles(config, config.out, *lengths))
    assert [problem.field for problem in found] == ["training.ema_sigma_rel"]
