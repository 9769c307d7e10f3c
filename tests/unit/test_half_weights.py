"""A network with half-precision weights under autocast is the network under autocast."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tests.tiny import FAMILIES, TINY
from torch import nn

from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.half_weights import half_names, to_half
from ddpm_engine.networks.registry import NetworkConfig
from ddpm_kernels.dispatch import force_ops


@pytest.mark.parametrize("forced", [False, True], ids=["by torch", "by operations"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, resnet_time_scale_shift="scale_shift"), FAMILIES["dit"]],
    ids=["unet", "unet, scale and shift", "dit"],
)
def test_outputs_are_those_of_autocast_to_the_bit(
    config: NetworkConfig, dtype: torch.dtype, forced: bool
) -> None:
    torch.manual_seed(0)
    model = build_network(replace(config, num_class_embeds=3)).eval()
    with torch.no_grad():  # those that begin at zero would hide all others
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    x = torch.randn(2, 3, 8, 8)
    arguments = x, torch.tensor([3, 700]), Conditioning(labels=torch.tensor([0, 2]))
    halved = copy.deepcopy(model)
    to_half(halved, dtype)
    assert 0 < len(half_names(model)) < len(list(model.parameters()))
    ops = force_ops() if forced else nullcontext()
    with ops, torch.no_grad(), torch.autocast("cpu", dtype):
        assert torch.equal(halved(*arguments), model(*arguments))


@pytest.mark.parametrize(
    ("family", "table"),
    [
        ("unet", "class_embedding.weight"),
        ("dit", "embeddings.0.class_embedder.embedding_table.weight"),
    ],
)
def test_norms_embeddings_and_biases_of_convolutions_keep_their_precision(
    family: str, table: str
) -> None:
    model = build_network(replace(FAMILIES[family], num_class_embeds=3))
    to_half(model, torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert table in kept
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    biases = {f"{name}.bias" for name, module in convolutions.items() if module.bias is not None}
    assert biases <= kept
    assert all("norm" in name for name in kept - biases - {table})
