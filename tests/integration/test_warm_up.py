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


@pytest.mark.parametrize(("classes", "half"), [(None, False), (11, False), (None, True)])
def test_precompile_runs_both_passes_and_leaves_weights_and_gradients(
    config: RunConfig, classes: int | None, half: bool
) -> None:
    config = replace(config, model=replace(config.model, num_class_embeds=classes))
    config = replace(config, training=replace(config.training, precision="bf16"))
    model = UNet(config.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = build_objective(config, config.diffusion.build_schedule(), spec=model.conditioning)
    backward_passes: list[torch.Tensor] = []
    model.conv_in.weight.register_post_accumulate_grad_hook(backward_passes.append)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    dtypes: set[torch.dtype] = set()
    model.register_forward_pre_hook(lambda network, _: dtypes.add(network.conv_in.weight.dtype))

    model.eval()
    with force_ops():
        precompile(model, objective, config, torch.device("cpu"), half_weights=half)

    assert shapes == [(config.training.batch_size, 1, 8, 8)]
    assert dtypes == {torch.bfloat16 if half else torch.float32}
    assert len(backward_passes) == 1
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.conv_in.weight.dtype == torch.float32
