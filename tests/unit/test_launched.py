"""What the environment says about how this process was started."""

from __future__ import annotations

import pytest

from ddpm_engine.config import TrainingConfig
from ddpm_engine.errors import UserError
from ddpm_engine.generation.work_sharing import WorkShare
from ddpm_engine.launched import check_launched_precision, is_first, launched_as
from ddpm_engine.training.strategies.launcher_env import read_request

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"WORLD_SIZE": "8"}, (0, 1)),
        ({"RANK": "9", "WORLD_SIZE": "4"}, (1, 4)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (1, 2)),
        pytest.param(STEP, (2, 4), id="srun"),
        pytest.param({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, (0, 1), id="srun-accelerate"),
        pytest.param({**STEP, "SLURM_PTY_PORT": "41000"}, (0, 1), id="srun-pty"),
        pytest.param({**STEP, "SLURM_PTY_WIN_COL": "80"}, (0, 1), id="srun-pty-window"),
        pytest.param({**STEP, "PMI_SIZE": "4", "PMI_RANK": "0", "SLURM_PTY_PORT": "4"}, (0, 1)),
        pytest.param({**STEP, "SLURM_STEP_ID": "4294967290"}, (0, 1), id="salloc-step"),
        pytest.param({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, (0, 1), id="salloc"),
        pytest.param(
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1), id="sbatch"
        ),
    ],
)
def test_only_a_launcher_that_was_used_counts(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launched_as(environment) == expected
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert WorkShare.from_environment() == WorkShare(*expected)
    assert read_request(TrainingConfig()).processes == expected[1]


@pytest.mark.parametrize(
    ("rank", "size"), [("-1", "2"), ("0", "0"), ("one", "2"), ("0", ""), ("0", "2.0")]
)
def test_variables_that_no_launcher_sets_are_named(rank: str, size: str) -> None:
    with pytest.raises(UserError, match=f"RANK is '{rank}' and WORLD_SIZE '{size}'"):
        launched_as({"RANK": rank, "WORLD_SIZE": size})


def test_a_launchers_precision_is_not_ignored() -> None:
    for ours, theirs in [("no", "no"), ("bf16", "no"), ("bf16", "bf16")]:
        check_launched_precision(ours, "precision", {"ACCELERATE_MIXED_PRECISION": theirs})
    check_launched_precision("bf16", None, {})
    asks = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    with pytest.raises(UserError, match=r"fp16 but `precision` is bf16; set `precision` to fp16"):
        check_launched_precision("bf16", "precision", asks)
    with pytest.raises(UserError, match="always computed in float32"):
        check_launched_precision("no", None, asks)


def test_messages_are_not_lost_with_a_rank_of_no_launcher() -> None:
    assert is_first({"RANK": "3"})
    assert is_first({"RANK": "3", "WORLD_SIZE": "none"})
    assert not is_first({"RANK": "3", "WORLD_SIZE": "4"})
