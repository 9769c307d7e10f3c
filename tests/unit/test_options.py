"""How a command names a field that an error is about."""

from __future__ import annotations

import pytest

from ddpm_engine.cli import checkpoints, distill, evaluate, sample, train
from ddpm_engine.cli.options import exit_on_error, option_names, with_flags
from ddpm_engine.errors import UserError


def test_options_of_the_commands() -> None:
    names = set(option_names(train.Options))
    assert {"preset", "out", "training.batch_size", "model.block_out_channels"} <= names
    assert "run.out" not in names
    assert {"checkpoint", "steps", "guidance_scale"} <= set(option_names(sample.Options, True))
    assert {"metrics", "reference_count"} <= set(option_names(evaluate.Options, True))
    assert set(option_names(checkpoints.prune)) == {"keep", "keep_every", "delete"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`training.batch_size` is 0", "--training.batch-size is 0"),
        ("`distillation.steps` is 3", "--steps is 3"),
        ("`distillation.guidance_scale` is 3", "--guidance-scale is 3"),
        ("`diffusion.prediction` is eps", "--prediction is eps"),
        ("`diffusion.timesteps` is 3", "`diffusion.timesteps` is 3"),
        ("`layers` of `UNet`", "`layers` of `UNet`"),
    ],
)
def test_fields_become_the_flags_of_the_command(message: str, expected: str) -> None:
    assert with_flags(message, set(option_names(distill.Options)), distill.RENAMED) == expected


def test_a_user_error_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, exit_on_error(train.Options):
        raise UserError("`training.steps` is 0; it must be at least 1", "training.steps")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --training.steps is 0; it must be at least 1\n"


@pytest.mark.parametrize("flag", ["--training.ema-profiles", "--training.ema_profiles"])
def test_former_flags_are_understood(flag: str) -> None:
    run = train.parse([flag, "0.05", "0.1"]).run
    assert run.training.ema_sigma_rel == (0.05, 0.1)


def test_edm_is_not_clipped_by_default() -> None:
    edm = ["--diffusion.schedule", "edm", "--diffusion.prediction", "edm"]
    assert train.parse([]).run.clips_x0
    assert not train.parse(edm).run.clips_x0
    assert train.parse([*edm, "--sampling.clip-x0", "True"]).run.clips_x0
    assert not train.parse(["--preset", "digits-edm"]).run.clips_x0
