"""A network with half-precision weights under autocast is the network under autocast."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.tiny import TINY

from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.half_weights import half_names, to_half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_those_of_autocast_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build_network(replace(TINY, num_class_embeds=3)).eval()
    x = torch.randn(2, 3, 8, 8)
    arguments = x, torch.tensor([3, 700]), Conditioning(labels=torch.tensor([0, 2]))
    halved = copy.deepcopy(model)
    to_half(halved, dtype)
    assert 0 < len(half_names(model)) < len(list(model.parameters()))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert torch.equal(halved(*arguments), model(*arguments))


def test_norms_and_embeddings_keep_their_precision() -> None:
    model = build_network(replace(TINY, num_class_embeds=3))
    to_half(model, torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert "class_embedding.weight" in kept
    assert all("norm" in name for name in kept - {"class_embedding.weight"})
