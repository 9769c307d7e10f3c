"""Configurations: bounds, rules, and those of earlier versions."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from ddpm_engine.config import RunConfig, TrainingConfig, flatten, from_dict, to_dict
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import problems, validate
from ddpm_engine.samplers.config import SamplingConfig


def version_0(config: RunConfig) -> dict[str, Any]:
    """What `to_dict` returned before there were versions."""
    values = deepcopy(to_dict(config))
    del values["version"], values["sampling"]["clip_x0"], values["training"]["precision"]
    values["log"]["checkpoint_overlap"] = 1
    values["training"]["ema_profiles"] = values["training"].pop("ema_sigma_rel")
    return values


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_configurations_without_a_version_are_read(preset: Any) -> None:
    """Former names stand for the new ones."""
    config = preset()
    training = replace(config.training, ema_sigma_rel=(0.05, 0.1), precision="no")
    config = replace(config, training=training, sampling=replace(config.sampling, clip_x0=None))
    old = version_0(config)
    assert from_dict(old, "old") == config
    assert old == version_0(config)  # it is left as it was


def test_parts_of_configurations_without_a_version() -> None:
    assert from_dict({}, "none") == RunConfig(training=TrainingConfig(precision="no"))
    assert from_dict({}, "none").clips_x0
    assert not from_dict({"diffusion": {"prediction": "edm"}}, "edm").clips_x0


def test_earlier_versions_keep_the_precision_that_was_their_default() -> None:
    values = to_dict(RunConfig()) | {"version": 1}
    values["log"]["checkpoint_overlap"] = 7
    values["training"]["precision"] = "bf16"
    assert from_dict(values, "old") == RunConfig(training=TrainingConfig(precision="bf16"))
    del values["training"]["precision"]
    assert from_dict(values, "old").training.precision == "no"
    del values["log"]["checkpoint_overlap"]
    assert from_dict(values | {"version": 2}, "new").training.precision == "auto"


def test_earlier_versions_recomputed_all_or_nothing() -> None:
    values = to_dict(RunConfig()) | {"version": 2}
    del values["training"]["recompute"]
    assert from_dict(values, "old").training.recompute == "none"
    values["training"]["activation_checkpointing"] = True
    assert from_dict(values, "old").training.recompute == "blocks"


@pytest.mark.parametrize(
    ("version", "section", "field"),
    [
        (0, "training", "stepz"),
        (0, "log", "clip_x0"),
        (1, "training", "ema_profiles"),
        (2, "log", "checkpoint_overlap"),
    ],
)
def test_unknown_fields_are_reported(version: int, section: str, field: str) -> None:
    values = version_0(RunConfig()) if version == 0 else to_dict(RunConfig())
    values[section][field] = 3
    with pytest.raises(UserError, match=f"mine.json is not a run configuration.*(\n.*)*{field}"):
        from_dict(values, "mine.json")


@pytest.mark.parametrize("version", [5, -1, "one", None])
def test_unknown_versions_are_refused(version: Any) -> None:
    with pytest.raises(UserError, match=f"is of version {json.dumps(version)}; .* 0 to 4"):
        from_dict(to_dict(RunConfig()) | {"version": version}, "mine.json")


@pytest.mark.parametrize("values", [3, [], {"training": 3}, {"sampling": "heun"}])
def test_malformed_configurations_are_refused(values: Any) -> None:
    with pytest.raises(UserError, match=r"mine\.json is not a run configuration"):
        from_dict(values, "mine.json")


def test_flattened_fields_are_named_as_in_messages() -> None:
    flat = flatten(RunConfig())
    assert (flat["training.batch_size"], flat["sampling.clip_x0"]) == (128, None)


@pytest.mark.parametrize(
    ("config", "message", "field"),
    [
        (RunConfig(training=TrainingConfig(batch_size=0)),
         "`training.batch_size` is 0; it must be at least 1", "training.batch_size"),
        (RunConfig(training=TrainingConfig(ema_sigma_rel=(0.1, 0.3))),
         "`training.ema_sigma_rel` is (0.1, 0.3); each must lie in (0, 0.288675]",
         "training.ema_sigma_rel"),
        (RunConfig(diffusion=DiffusionConfig(beta_end=1.5)),
         "`diffusion.beta_end` is 1.5; it must lie in (0, 1)", "diffusion.beta_end"),
        (RunConfig(diffusion=DiffusionConfig(timesteps=2, betas=(0.5, 1.5))),
         "beta at timestep 1 is 1.5; it must lie in (0, 1), or be 1", None),
        (RunConfig(training=TrainingConfig(steps=2**50)),
         f"`training.steps` is {2**50}: of 128 images (`training.batch_size`) there can be at "
         f"most {2**49}", "training.steps"),
        (RunConfig(model=UNetConfig(block_out_channels=(128, 250, 256, 256))),
         "entry 1 of `model.block_out_channels` is 250; it must be a multiple of "
         "`model.norm_num_groups` 32; use 224 or 256, or other groups",
         "model.block_out_channels"),
        (RunConfig(sampling=SamplingConfig(steps=2000)),
         "`sampling.steps` is 2000; a schedule of 1000 timesteps takes 1 to 1000 steps",
         "sampling.steps"),
        (RunConfig(data=DataConfig(mix_with=("b",), weights=(1,))),
         "`data.weights` has 1 entries for 2 sets (`data.path` and `data.mix_with`); give one "
         "for each", "data.weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_problem_names_its_field(config: RunConfig, message: str, field: str | None) -> None:
    found = problems(config)
    assert [(str(problem), problem.field) for problem in found] == [(message, field)]
    with pytest.raises(UserError) as refused:
        validate(config)
    assert refused.value.field == field


def test_weights_of_a_mixture() -> None:
    for weights, message in [((0, 1), "must be at least 1"), ((65536, 1), "at most 65536")]:
        found = problems(RunConfig(data=DataConfig(mix_with=("b",), weights=weights)))
        assert [message in str(problem) for problem in found] == [True]
        assert "`data.weights`" in str(found[0]) or "--data.weights" in str(found[0])
