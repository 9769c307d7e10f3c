"""What holds of every network: first prediction, labels, attention kernels and ways to run."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.attention import attend_sdpa, choose_attention
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning

CONFIGS = list(FAMILIES.values())
over_networks = pytest.mark.parametrize("config", CONFIGS, ids=list(FAMILIES))


def randomised(config: Any) -> Network:
    """Build the network, always the same, without any zero among its weights."""
    torch.manual_seed(0)
    network = build_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def inputs(config: Any, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=generator), torch.arange(batch) * 400


# --- Initialisation and gradients


@over_networks
def test_first_prediction_is_zero(config: Any) -> None:
    x, t = inputs(config)
    assert torch.equal(build_network(config)(x, t), torch.zeros_like(x))


@over_networks
def test_every_parameter_learns(config: Any) -> None:
    network = build_network(config)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, t = inputs(config)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    # The first step moves the output convolution, the second what ends the branches.
    for _ in range(3):
        optimizer.zero_grad()
        (network(x, t) - target).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        if name.endswith("to_k.bias"):
            continue  # adds the same to every score of a query, which softmax does not see
        assert parameter.grad.abs().max() > 0, name


# --- Inputs


@over_networks
def test_one_timestep_serves_the_whole_batch(config: Any) -> None:
    network, (x, _) = randomised(config), inputs(config)
    expected = network(x, torch.full((len(x),), 7))
    assert torch.equal(network(x, torch.tensor(7)), expected)
    assert torch.equal(network(x, torch.tensor(7.0)), expected)


@over_networks
def test_labels(config: Any) -> None:
    network, (x, t) = randomised(replace(config, num_class_embeds=11)), inputs(config)
    assert network.conditioning.null_class == 10
    null = torch.full((len(x),), network.conditioning.null_class)
    assert not torch.allclose(
        network(x, t, Conditioning(null)), network(x, t, Conditioning(torch.zeros_like(null)))
    )
    with pytest.raises(ValueError, match=r"give labels.*null class is 10"):
        network(x, t)


@over_networks
def test_labels_of_an_unconditional_network(config: Any) -> None:
    network, (x, t) = build_network(config), inputs(config)
    with pytest.raises(ValueError, match="unconditional"):
        network(x, t, Conditioning(torch.zeros(len(x), dtype=torch.int64)))
    assert network.conditioning.null_class is None


@over_networks
def test_conditions_of_other_networks(config: Any) -> None:
    network, (x, t) = build_network(config), inputs(config)
    with pytest.raises(ValueError, match="low_resolution"):
        network(x, t, Conditioning(low_resolution=x, augmentation_level=t))
    network(x, t, Conditioning(dropout_key=t))  # by which nothing is dropped here


# --- Attention kernels


@pytest.fixture
def no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)


class FakeXformers:
    """Stands for the module `xformers.ops`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None
    ) -> Tensor:
        if self.error is not None:
            raise self.error
        scores = torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
        if attn_bias is not None:
            assert attn_bias.dtype == query.dtype
            assert attn_bias.shape == scores.shape
            assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
            scores = scores + attn_bias
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)


def install(monkeypatch: pytest.MonkeyPatch, xformers: FakeXformers, cuda: bool) -> None:
    """Simulate an installed xformers, and CUDA with tensors on the CPU."""
    monkeypatch.setitem(sys.modules, "xformers", nn.Module())
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kw: zeros(*shape, **kw))


@over_networks
@pytest.mark.usefixtures("no_xformers")
def test_xformers_not_installed(config: Any) -> None:
    with pytest.raises(UserError, match=r"pip install 'ddpm-engine\[xformers\]'"):
        build_network(replace(config, attention="xformers"))


@over_networks
@pytest.mark.parametrize(
    ("error", "cuda", "message"),
    [
        (None, False, r"CUDA devices only.*attention='sdpa'"),
        (NotImplementedError("too new"), True, r"float16 and heads of (16|8) channels \(too new\)"),
    ],
)
def test_xformers_that_cannot_be_used(
    config: Any, monkeypatch: pytest.MonkeyPatch, error: Exception | None, cuda: bool, message: str
) -> None:
    install(monkeypatch, FakeXformers(error), cuda)
    with pytest.raises(UserError, match=message):
        build_network(replace(config, attention="xformers"))


@over_networks
@pytest.mark.usefixtures("no_xformers")
def test_auto_without_xformers_is_sdpa(config: Any) -> None:
    x, t = inputs(config)
    auto, sdpa = randomised(replace(config, attention="auto")), randomised(config)
    assert torch.equal(auto(x, t), sdpa(x, t))


@over_networks
@pytest.mark.parametrize("attention", ["xformers", "auto"])
def test_xformers_serves_with_its_own_layout(
    config: Any, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    config, (x, t) = replace(config, attention_head_dim=8), inputs(config)
    expected = randomised(config)(x, t)
    fake = FakeXformers()
    install(monkeypatch, fake, cuda=True)
    network = randomised(replace(config, attention=attention))
    torch.testing.assert_close(network(x, t), expected, atol=1e-5, rtol=1e-5)
    fake.error = AssertionError("called")
    with pytest.raises(AssertionError, match="called"):
        network(x, t)


def masked_attention(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query, key, value and mask, the key of 5 tokens of which 3 and 5 count."""
    tensors = (torch.randn(2, length, 4, 8, dtype=dtype) for length in (7, 5, 5))
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    return query, key, value, torch.arange(5) < torch.tensor([[3], [5]])


def test_keys_that_a_mask_excludes_change_nothing() -> None:
    torch.manual_seed(0)
    query, key, value, mask = masked_attention(torch.float32)
    attended = attend_sdpa(query, key, value, mask)
    alone = attend_sdpa(query[:1], key[:1, :3], value[:1, :3])
    torch.testing.assert_close(attended[:1], alone)
    torch.testing.assert_close(attended[1:], attend_sdpa(query[1:], key[1:], value[1:]))
    attended.square().sum().backward()
    for tensor in (key, value):
        assert tensor.grad is not None
        assert not tensor.grad[0, 3:].any()
        assert tensor.grad[0, :3].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_xformers_masks_as_sdpa(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    install(monkeypatch, FakeXformers(), cuda=True)
    attend = choose_attention("xformers", [8], masked=True)
    inputs = masked_attention(dtype)
    torch.testing.assert_close(attend(*inputs), attend_sdpa(*inputs), atol=2e-3, rtol=2e-3)


# --- Ways to run


@over_networks
def test_compiled_regions_keep_names_and_numbers(config: Any) -> None:
    network, (x, t) = randomised(config).eval(), inputs(config)
    names, expected = list(network.state_dict()), network(x, t).detach()
    network.compile_blocks(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), expected)
    assert list(network.state_dict()) == names


@over_networks
def test_bfloat16_autocast(config: Any) -> None:
    network, (x, t) = randomised(config), inputs(config)
    expected = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        actual = network(x, t)
    actual.sum().backward()
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@over_networks
def test_bfloat16_weights_take_float32_images(config: Any) -> None:
    network, (x, t) = randomised(config), inputs(config)
    expected = network(x, t)
    actual = network.to(torch.bfloat16)(x, t)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()
