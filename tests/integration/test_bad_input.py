"""What a person can get wrong: each is named, with its value and a remedy, and nothing is left."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_engine import runtime as cpu
from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import RunConfig, dump_config, from_dict, load_config, to_dict
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import validate
from ddpm_engine.training import accelerator
from ddpm_engine.training.trainer import Trainer

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def refuse(config: RunConfig, *patterns: str) -> None:
    """The trainer refuses with a message that has every pattern, before it makes anything."""
    with pytest.raises(UserError) as refused:
        Trainer(config)
    for pattern in patterns:
        assert pattern in str(refused.value)
    assert not config.out.exists()


def test_all_problems_are_reported_at_once(config: RunConfig) -> None:
    config = changed(config, "training", steps=0, ema_decay=1.0)
    config = changed(config, "log", keep_checkpoints=1)
    config = changed(config, "model", low_resolution=5)
    refuse(
        config,
        "`training.steps` is 0; it must be at least 1",
        "`training.ema_decay` is 1.0; it must lie in [0, 1)",
        "`log.keep_checkpoints` is 1; it must be at least 2",
        "`model.low_resolution` is 5; it must divide `model.sample_size` 8",
    )


def test_steps_that_the_schedule_does_not_have(config: RunConfig) -> None:
    refuse(
        changed(config, "log", sample_steps=2000),
        "`log.sample_steps` is 2000; a schedule of 1000 timesteps takes 1 to 1000 steps",
    )


def test_shape_that_cannot_be_built(config: RunConfig) -> None:
    refuse(changed(config, "model", sample_size=9), "sample_size", "9")
    refuse(changed(config, "model", norm_num_groups=3), "norm_num_groups", "3", "8")


def test_missing_shards(config: RunConfig, tmp_path: Path) -> None:
    refuse(changed(config, "data", path=tmp_path / "nowhere"), "nowhere")


def test_shards_of_another_size_or_kind(config: RunConfig) -> None:
    refuse(changed(config, "model", sample_size=16), "8×8", "16×16", "give `model.sample_size` 8,")
    other = changed(config, "model", sample_size=16, in_channels=3, out_channels=3)
    refuse(
        other,
        "8×8 with 1 channels",
        "give `model.sample_size` 8, `model.in_channels` 1 and `model.out_channels` to match, or",
        "again with size 16, 3 channels",
    )


def test_shards_that_disagree_with_their_manifest(config: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(config.data.path, copy)
    config = changed(config, "data", path=copy)
    shard = copy / open_shards(copy).manifest.shards[1].name
    with shard.open("ab") as file:
        file.write(bytes(512))
    refuse(config, shard.name, "manifest")
    shard.unlink()
    refuse(config, shard.name)


def test_batch_that_does_not_divide(config: RunConfig) -> None:
    config = changed(config, "training", accumulation=3)
    with pytest.raises(UserError, match=r"8.*3 accumulation.*divisible"):
        Trainer(config).fit()


def test_classes(config: RunConfig) -> None:
    refuse(
        changed(config, "model", num_class_embeds=10),
        "`model.num_class_embeds` is 10",
        "at least 11",
    )


def test_classes_without_labels(config: RunConfig, tmp_path: Path, run: Run) -> None:
    np.savez(tmp_path / "plain.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    made = run("launch/make_shards.py", tmp_path / "plain.npz", "--out", tmp_path / "plain")
    assert made.returncode == 0, made.stderr
    config = changed(config, "data", path=tmp_path / "plain")
    refuse(changed(config, "model", num_class_embeds=11), "no labels")


def test_precision_that_this_machine_lacks(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "has_fast_bf16", lambda: False)
    refuse(changed(config, "training", precision="fp16"), "fp16", "needs a GPU")
    slow = changed(config, "training", precision="bf16", steps=2)
    refuse(slow, "bf16", "`training.allow_slow_bf16`")
    Trainer(changed(slow, "training", allow_slow_bf16=True)).fit()
    assert (config.out / "checkpoints" / "step-00000002").is_dir()


def test_processes_that_do_not_see_each_other(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(accelerator, "Accelerator", lambda **_: _Alone())
    refuse(config, "started 2 processes", "train independently")


class _Alone:
    num_processes = 1


def test_directory_of_another_run(config: RunConfig) -> None:
    Trainer(changed(config, "training", steps=1)).fit()
    before = (config.out / "config.json").read_bytes()
    other = changed(config, "training", seed=1)
    with pytest.raises(UserError, match=r"holds another run.*\n.*`training.seed` was 0 and is"):
        Trainer(changed(other, "model", dropout=0.5))
    assert (config.out / "config.json").read_bytes() == before


def test_directory_trained_on_other_data(config: RunConfig, tmp_path: Path, run: Run) -> None:
    Trainer(changed(config, "training", steps=1)).fit()
    np.savez(tmp_path / "other.npz", images=np.ones((4, 8, 8, 1), np.uint8))
    run("launch/make_shards.py", tmp_path / "other.npz", "--out", tmp_path / "other")
    with pytest.raises(UserError, match="fingerprint"):
        Trainer(changed(config, "data", path=tmp_path / "other"))


def test_directory_of_something_else(config: RunConfig) -> None:
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a run directory"):
        Trainer(config)
    assert [entry.name for entry in config.out.iterdir()] == ["thesis.txt"]


def test_non_finite_loss_stops_with_the_samples_named(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(config, "optimizer", learning_rate=1e6, warmup_steps=0)
    config = changed(config, "training", max_bad_steps=3)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            UserError, match=r"3 steps in a row.*`optimizer.learning_rate` \(1000000\.0\)"
        ),
    ):
        Trainer(config).fit()
    skipped = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert len(skipped) == 3
    assert "samples at positions" in skipped[0]


def test_a_bad_step_is_skipped_and_training_goes_on(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, "training", steps=6)
    trainer = Trainer(config)
    original = type(trainer.run.objective).__call__

    def poisoned(self: Any, model: Any, batch: Any) -> torch.Tensor:
        loss = original(self, model, batch)
        return loss * float("nan") if 2 * 8 in batch.positions else loss

    monkeypatch.setattr(type(trainer.run.objective), "__call__", poisoned)
    trainer.fit()
    for part in trainer.run.strategy.state().values():
        assert all(bool(tensor.isfinite().all()) for tensor in part.values())
    assert '"skipped_steps": 1' in (config.out / "metrics.jsonl").read_text()


def test_too_many_unreadable_samples(config: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(config.data.path, copy)
    shards = open_shards(copy)
    shard = copy / shards.manifest.shards[0].name
    content = bytearray(shard.read_bytes())
    for row in shards.indexes[0][:20]:
        content[int(row["offset"]) + 10] ^= 0xFF
    shard.write_bytes(content)
    config = changed(config, "data", path=copy, max_bad_samples=5)
    with pytest.raises(UserError, match=r"[6-9] samples of .* were unreadable.*Verify"):
        Trainer(config).fit()


def test_a_checkpoint_of_another_architecture(config: RunConfig, tmp_path: Path) -> None:
    Trainer(changed(config, "training", steps=1)).fit()
    wider = changed(config, "model", block_out_channels=(8, 24))
    wider = replace(wider, out=tmp_path / "wider")
    Trainer(changed(wider, "training", steps=2)).fit()
    shutil.rmtree(wider.out / "checkpoints")
    shutil.copytree(config.out / "checkpoints", wider.out / "checkpoints")
    with pytest.raises(UserError, match="another architecture") as refused:
        Trainer(changed(wider, "training", steps=2)).fit()
    assert "has shape" in str(refused.value)


def test_no_checkpoint_to_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no usable checkpoint in .*nothing"):
        load_model(tmp_path / "nothing")


def test_every_checkpoint_is_damaged(config: RunConfig) -> None:
    Trainer(changed(config, "training", steps=1)).fit()
    (config.out / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of the checkpoints"):
        Trainer(config).fit()
    with pytest.raises(UserError, match="never finished"):
        load_model(config.out)


# --- Configurations


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_the_disk(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]()
    validate(preset)
    (tmp_path / "config.json").write_text(dump_config(preset))
    assert load_config(tmp_path) == preset


def test_a_configuration_with_mistakes_names_each(config: RunConfig) -> None:
    values = to_dict(config)
    values["training"]["stepz"] = 3
    values["training"]["precision"] = "fp8"
    values["optimizer"]["learning_rate"] = "fast"
    with pytest.raises(UserError) as refused:
        from_dict(values, "mine.json")
    for part in ("mine.json", "stepz", "fp8", "optimizer.learning_rate"):
        assert part in str(refused.value)


def test_configuration_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration at"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_config(tmp_path)


# --- Scripts: the message without a traceback, and a status that says failure


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.stepz", "3"], "--training.steps"),
        (["--preset", "digitz"], "digits"),
        (["--training.steps", "many"], "many"),
        (["--config", "nowhere.json"], "there is no configuration at nowhere.json"),
        (["--training.batch-size", "0"], "--training.batch-size is 0; it must be at least 1"),
        # The preset's own images are not what anybody wants in another folder.
        (["--data.path", "data/mien"], "no folder of shards at data/mien"),
    ],
)
def test_train_refuses_without_a_traceback(
    arguments: list[str], expected: str, run: Run, tmp_path: Path
) -> None:
    refused = run("launch/train.py", *arguments)
    assert refused.returncode != 0
    assert expected in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []
