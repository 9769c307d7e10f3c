"""Compiling ahead must leave a run as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.precompile import precompile
from ddpm_kernels.dispatch import force_ops


@pytest.mark.parametrize("classes", [None, 11])
def test_precompile_runs_both_passes_and_leaves_weights_and_gradients(
    config: RunConfig, classes: int | None
) -> None:
    config = replace(config, model=replace(config.model, num_class_embeds=classes))
    model = UNet(config.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = build_objective(config, config.diffusion.build_schedule(), spec=model.conditioning)
    backward_passes: list[torch.Tensor] = []
    model.conv_in.weight.register_hook(backward_passes.append)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))

    model.eval()
    with force_ops():
        precompile(model, objective, config, torch.device("cpu"))

    assert shapes == [(config.training.batch_size, 1, 8, 8)]
    assert len(backward_passes) == 1
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
