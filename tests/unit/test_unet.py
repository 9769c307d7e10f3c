"""The U-Net: invalid shapes, initialization, attention kernels and execution modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import TINY
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.base import Recompute
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet import unet as unet_module
from ddpm_engine.networks.unet.blocks import ResidualBlock
from ddpm_engine.networks.unet.config import UNetConfig, check_shape
from ddpm_engine.networks.unet.dropout import KeyedDropout, keys_of_layers
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.sizes import height_and_width
from ddpm_engine.training.step_memory import traced
from ddpm_kernels.dispatch import force_ops
from ddpm_kernels.dropout import Dropout, dropout


def randomised(config: UNetConfig) -> UNet:
    """Build the network, always the same, without any zero among its weights."""
    torch.manual_seed(0)
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return unet


def inputs(config: UNetConfig = TINY, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.in_channels, *height_and_width(config.sample_size))
    return torch.randn(shape, generator=generator), torch.arange(batch) * 400


KEYS = Conditioning(dropout_key=torch.tensor([5, -(2**62), 2**40 + 3]))


def gradients(unet: UNet) -> dict[str, Tensor]:
    unet.zero_grad()
    unet(*inputs(unet.config), KEYS).square().sum().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def test_parameter_count_of_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307


# --- Inputs


def test_memory_format_of_the_input_does_not_matter() -> None:
    unet, (x, t) = randomised(TINY), inputs()
    expected = unet(x, t)
    assert torch.equal(unet(x.contiguous(memory_format=torch.channels_last), t), expected)
    assert torch.equal(unet(x.transpose(2, 3).contiguous().transpose(2, 3), t), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_activations_have_one_memory_format_throughout(
    channels: int, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a CPU, and that of other devices."""
    device = {torch.contiguous_format: "cpu", torch.channels_last: "cuda"}[memory_format]
    assert unet_module._memory_format(torch.device(device)) == memory_format
    monkeypatch.setattr(unet_module, "_memory_format", lambda _: memory_format)
    unet = randomised(replace(TINY, in_channels=channels, out_channels=channels))
    for parameter in unet.parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=memory_format)
    others: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                so_laid_out = output.is_contiguous(memory_format=memory_format)
                others.extend([] if so_laid_out else [name])

        return hook

    for name, module in unet.named_modules():
        module.register_forward_hook(note(name))
    unet(*inputs(unet.config))
    assert not others


def test_other_image_sizes_within_reason() -> None:
    unet = randomised(TINY)
    assert unet(torch.zeros(1, 3, 12, 6), torch.tensor(0)).shape == (1, 3, 12, 6)
    with pytest.raises(ValueError, match=r"9×8 pixels.*multiples of 2"):
        unet(torch.zeros(1, 3, 9, 8), torch.tensor(0))


# --- Shapes that cannot be built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 9}, r"`sample_size` is 9; .* multiple of 2; use 8 or 10"),
        ({"sample_size": 1}, r"`sample_size` is 1; .* use 2"),
        ({"sample_size": 0}, r"`sample_size` is 0; .* at least 1"),
        ({"layers_per_block": 0}, r"`layers_per_block` is 0"),
        ({"block_out_channels": (8, 15)}, r"entry 1 .* is 15; .* `norm_num_groups` 4; use 12 or"),
        ({"block_out_channels": ()}, r"`block_out_channels` is \(\); give at least one level"),
        ({"norm_num_groups": 0}, r"`norm_num_groups` is 0"),
        ({"attention_head_dim": 5}, r"`attention_head_dim` is 5; .* divide the 16 channels"),
        ({"attention_head_dim": 0}, r"`attention_head_dim` is 0"),
        ({"down_block_types": ("DownBlock2D",)}, r"`down_block_types` has 1 entries and .* 2"),
        ({"up_block_types": ("UpBlock2D", "Skip")}, r"entry 1 .*'Skip'; it must be 'UpBlock2D' or"),
        ({"downsample_padding": 2}, r"`downsample_padding` is 2; it must be 0 or 1"),
        ({"resnet_time_scale_shift": "spatial"}, r"`resnet_time_scale_shift` is 'spatial'"),
        ({"mid_block_scale_factor": 0}, r"`mid_block_scale_factor` is 0"),
        ({"dropout": 1.0}, r"`dropout` is 1.0"),
        ({"num_class_embeds": 0}, r"`num_class_embeds` is 0"),
        ({"attention": "flash"}, r"`attention` is 'flash'"),
        ({"block_out_channels": (2, 4), "norm_num_groups": 1}, r"`freq_shift` 1; use at least 4"),
    ],
)
def test_impossible_shape(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNet(replace(TINY, **change))


def test_all_problems_are_reported_at_once() -> None:
    check_shape(replace(TINY, attention_head_dim=16))  # no attention at the 8 channels
    config = replace(TINY, sample_size=9, attention_head_dim=5, norm_num_groups=3, dropout=-1.0)
    with pytest.raises(UserError) as caught:
        UNet(config)
    assert str(caught.value).count("\n  - ") == 5  # neither width is a multiple of 3


# --- Ways to run


@pytest.mark.parametrize("forced", [False, True], ids=["by torch", "by operations"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("what", ["norms", "blocks"])
def test_recomputation_leaves_the_gradients(what: Recompute, dropout: float, forced: bool) -> None:
    unet = randomised(replace(TINY, dropout=dropout))
    with force_ops() if forced else nullcontext():
        expected = gradients(unet)
        kept, _ = traced(unet, batch=2, on_gpu=forced)
        unet.recompute(what)
        actual = gradients(unet)
        kept_then, _ = traced(unet, batch=2, on_gpu=forced)
    assert kept_then < (0.9 if what == "norms" else 0.6) * kept
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


def test_dropout_follows_from_the_keys_of_the_samples() -> None:
    unet, (x, t) = randomised(replace(TINY, dropout=0.5)), inputs()
    whole, key = unet(x, t, KEYS), KEYS.dropout_key
    assert key is not None
    assert torch.equal(unet(x, t, KEYS), whole)
    other = unet(x, t, Conditioning(dropout_key=key.roll(1)))
    assert all(not torch.equal(a, b) for a, b in zip(other, whole, strict=True))
    alone = unet(x[1:2], t[1:2], KEYS.select(slice(1, 2)))
    torch.testing.assert_close(alone, whole[1:2])
    given: list[Tensor] = []
    blocks = [block for block in unet.modules() if isinstance(block, ResidualBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1].dropout_key))
    unet(x, t, KEYS)
    assert len(torch.cat(given).unique()) == len(x) * len(blocks)


def test_dropout_as_a_layer_of_its_own() -> None:
    x, key = torch.ones(3, 8, 4, 4), KEYS.dropout_key
    assert key is not None
    layer = KeyedDropout(0.25)
    first, second = (layer(x, own) for own in keys_of_layers(key, 2))
    assert torch.equal(first, dropout(x, Dropout(0.25, key)))
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert not torch.equal(first, second)
    assert layer.eval()(x, None) is x


def test_dropout_needs_keys_in_training_and_drops_nothing_otherwise() -> None:
    unet, (x, t) = randomised(replace(TINY, dropout=0.5)), inputs()
    with pytest.raises(ValueError, match=r"dropout of 0\.5 .* give Conditioning\.dropout_key"):
        unet(x, t)
    plain = randomised(TINY)
    torch.testing.assert_close(unet.eval()(x, t, KEYS), plain(x, t))
    assert torch.equal(plain(x, t, KEYS), plain(x, t))


@pytest.mark.slow
def test_blocks_of_equal_shape_share_a_compiled_graph() -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    # More distinct blocks than torch compiles of one function before it gives up.
    config = UNetConfig(block_out_channels=(8, 16, 24, 32), norm_num_groups=4, dropout=0.1)
    unet = randomised(config)  # in training, where each block drops by keys of its own
    unet.compile_blocks(backend=backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        unet(*inputs(config, batch=1), KEYS.select(slice(1)))
    assert 8 < graphs < len(unet.blocks())
