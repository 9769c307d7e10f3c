"""The U-Net: invalid shapes, initialization, attention kernels and execution modes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import TINY
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet import unet as unet_module
from ddpm_engine.networks.unet.config import UNetConfig, check_shape
from ddpm_engine.networks.unet.unet import UNet


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
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=generator), torch.arange(batch) * 400


def gradients(unet: UNet) -> dict[str, Tensor]:
    x, t = inputs(unet.config)
    unet.zero_grad()
    torch.manual_seed(2)  # for dropout
    unet(x, t).square().sum().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def test_parameter_count_of_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307


# --- Initialisation and gradients


def test_first_prediction_is_zero() -> None:
    x, t = inputs()
    assert torch.equal(UNet(TINY)(x, t), torch.zeros_like(x))


def test_every_parameter_learns() -> None:
    unet = UNet(TINY)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    x, t = inputs()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    # The first step moves the output convolution, the second what ends the branches.
    for _ in range(3):
        optimizer.zero_grad()
        (unet(x, t) - target).square().mean().backward()
        optimizer.step()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None
        if name.endswith("to_k.bias"):
            continue  # adds the same to every score of a query, which softmax does not see
        assert parameter.grad.abs().max() > 0, name


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


def test_one_timestep_serves_the_whole_batch() -> None:
    unet, (x, _) = randomised(TINY), inputs()
    expected = unet(x, torch.full((len(x),), 7))
    assert torch.equal(unet(x, torch.tensor(7)), expected)
    assert torch.equal(unet(x, torch.tensor(7.0)), expected)


def test_other_image_sizes_within_reason() -> None:
    unet = randomised(TINY)
    assert unet(torch.zeros(1, 3, 12, 6), torch.tensor(0)).shape == (1, 3, 12, 6)
    with pytest.raises(ValueError, match=r"9×8 pixels.*multiples of 2"):
        unet(torch.zeros(1, 3, 9, 8), torch.tensor(0))


def test_labels() -> None:
    unet, (x, t) = randomised(replace(TINY, num_class_embeds=11)), inputs()
    assert unet.conditioning.null_class == 10
    null = torch.full((len(x),), unet.conditioning.null_class)
    assert not torch.allclose(
        unet(x, t, Conditioning(null)), unet(x, t, Conditioning(torch.zeros_like(null)))
    )
    with pytest.raises(ValueError, match=r"give labels.*null class is 10"):
        unet(x, t)


def test_labels_of_an_unconditional_network() -> None:
    unet, (x, t) = UNet(TINY), inputs()
    with pytest.raises(ValueError, match="unconditional"):
        unet(x, t, Conditioning(torch.zeros(len(x), dtype=torch.int64)))
    assert unet.conditioning.null_class is None


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


# --- Attention kernels


@pytest.fixture
def no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)


class FakeXformers:
    """Stands for the module `xformers.ops`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def memory_efficient_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        scores = torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)


def install(monkeypatch: pytest.MonkeyPatch, xformers: FakeXformers, cuda: bool) -> None:
    """Simulate an installed xformers, and CUDA with tensors on the CPU."""
    monkeypatch.setitem(sys.modules, "xformers", nn.Module())
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kw: zeros(*shape, **kw))


@pytest.mark.usefixtures("no_xformers")
def test_xformers_not_installed() -> None:
    with pytest.raises(UserError, match=r"pip install 'ddpm-engine\[xformers\]'"):
        UNet(replace(TINY, attention="xformers"))


@pytest.mark.parametrize(
    ("error", "cuda", "message"),
    [
        (None, False, r"CUDA devices only.*attention='sdpa'"),
        (NotImplementedError("too new"), True, r"float16 and heads of 16 channels \(too new\)"),
    ],
)
def test_xformers_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, cuda: bool, message: str
) -> None:
    install(monkeypatch, FakeXformers(error), cuda)
    with pytest.raises(UserError, match=message):
        UNet(replace(TINY, attention="xformers"))


@pytest.mark.usefixtures("no_xformers")
def test_auto_without_xformers_is_sdpa() -> None:
    x, t = inputs()
    auto, sdpa = randomised(replace(TINY, attention="auto")), randomised(TINY)
    assert torch.equal(auto(x, t), sdpa(x, t))


@pytest.mark.parametrize("attention", ["xformers", "auto"])
def test_xformers_serves_with_its_own_layout(
    monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    config, (x, t) = replace(TINY, attention_head_dim=8), inputs()
    expected = randomised(config)(x, t)
    fake = FakeXformers()
    install(monkeypatch, fake, cuda=True)
    unet = randomised(replace(config, attention=attention))  # type: ignore[arg-type]
    torch.testing.assert_close(unet(x, t), expected, atol=1e-5, rtol=1e-5)
    fake.error = AssertionError("called")
    with pytest.raises(AssertionError, match="called"):
        unet(x, t)


# --- Ways to run


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing_leaves_the_gradients(dropout: float) -> None:
    unet = randomised(replace(TINY, dropout=dropout))
    expected = gradients(unet)

    def kept_for_backward() -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(*inputs())
        return sum(sizes)

    plain = kept_for_backward()
    unet.enable_activation_checkpointing()
    assert kept_for_backward() < plain / 2
    actual = gradients(unet)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


def test_compiled_regions_keep_names_and_numbers() -> None:
    unet, (x, t) = randomised(TINY).eval(), inputs()
    names, expected = list(unet.state_dict()), unet(x, t).detach()
    unet.compile_blocks(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t), expected)
    assert list(unet.state_dict()) == names


def test_blocks_of_equal_shape_share_a_compiled_graph() -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    # More distinct blocks than torch compiles of one function before it gives up.
    config = UNetConfig(block_out_channels=(8, 16, 24, 32), norm_num_groups=4)
    unet = randomised(config).eval()
    unet.compile_blocks(backend=backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        unet(*inputs(config, batch=1))
    assert 8 < graphs < len(unet.blocks())


def test_bfloat16_autocast() -> None:
    unet, (x, t) = randomised(TINY), inputs()
    expected = unet(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        actual = unet(x, t)
    actual.sum().backward()
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in unet.parameters())


def test_bfloat16_weights_take_float32_images() -> None:
    unet, (x, t) = randomised(TINY), inputs()
    expected = unet(x, t)
    actual = unet.to(torch.bfloat16)(x, t)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()
