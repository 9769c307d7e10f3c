"""The U-Net that attends to text: masks, conditions, precomputed projections, ways to run."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import TINY, TINY_TEXT
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.networks.base import Recompute
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.half_weights import half_names, in_half, to_half
from ddpm_engine.networks.unet.config import UNetConfig, check_shape
from ddpm_engine.networks.unet.unet import UNet
from ddpm_kernels.dispatch import force_ops

VARIANTS = {
    "convolutions": TINY_TEXT,
    "linear, deep, projected": replace(
        TINY_TEXT, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        encoder_hid_dim=10, attention_head_dim=(8, 4),
    ),
    "everything": replace(
        TINY_TEXT, vector_channels=6, num_class_embeds=4, dropout=0.3, low_resolution=4,
        resnet_time_scale_shift="scale_shift", mid_block_scale_factor=2**0.5,
        down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
}  # fmt: skip
over_variants = pytest.mark.parametrize("name", VARIANTS)


def randomised(config: UNetConfig) -> UNet:
    """Build the network, always the same, without any zero among its weights."""
    torch.manual_seed(0)
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return unet


def inputs(config: UNetConfig = TINY_TEXT) -> tuple[Tensor, Tensor, Conditioning]:
    """Three samples with texts of 1, 5 and 3 tokens of 5, with all that the network is told."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, 8, 8, generator=generator)
    channels = config.encoder_hid_dim or config.cross_attention_dim or 0
    t = torch.tensor([0, 400, 800])
    small = config.low_resolution is not None
    conditioning = Conditioning(
        text=torch.randn(3, 5, channels, generator=generator),
        text_mask=torch.arange(5) < torch.tensor([1, 5, 3])[:, None],
        vector=torch.randn(3, 6, generator=generator) if config.vector_channels else None,
        labels=torch.tensor([0, 3, 1]) if config.num_class_embeds else None,
        low_resolution=x.flip(0) if small else None,
        augmentation_level=t if small else None,
        dropout_key=torch.tensor([5, -(2**62), 2**40 + 3]),
    )
    return x, t, conditioning


def gradients(unet: UNet) -> dict[str, Tensor]:
    unet.zero_grad()
    unet(*inputs(unet.config)).square().sum().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


# --- What the text changes


@over_variants
def test_padding_changes_nothing(name: str) -> None:
    unet = randomised(VARIANTS[name]).eval()
    x, t, given = inputs(unet.config)
    expected = unet(x, t, given)
    assert given.text is not None
    assert given.text_mask is not None
    noise = 100 * torch.randn(given.text.shape)
    other = torch.where(given.text_mask[:, :, None], given.text, noise)
    assert torch.equal(unet(x, t, replace(given, text=other)), expected)
    longer = replace(
        given,
        text=torch.nn.functional.pad(given.text, (0, 0, 0, 11), value=3.0),
        text_mask=torch.nn.functional.pad(given.text_mask, (0, 11)),
    )
    torch.testing.assert_close(unet(x, t, longer), expected)
    alone = given.select(slice(2, 3))
    assert alone.text is not None
    alone = replace(alone, text=alone.text[:, :3], text_mask=None)
    torch.testing.assert_close(unet(x[2:], t[2:], alone), expected[2:])


def test_every_token_and_the_vector_matter_and_so_does_having_none() -> None:
    unet = randomised(replace(TINY_TEXT, vector_channels=6)).eval()
    x, t, given = inputs(unet.config)
    expected = unet(x, t, given)
    assert given.text is not None
    assert given.vector is not None
    text = given.text.clone()
    text[2, 2] += 1
    changed = unet(x, t, replace(given, text=text))
    assert torch.equal(changed[:2], expected[:2])
    assert not torch.allclose(changed[2], expected[2])
    without = unet(x, t, given.null(unet.conditioning))
    assert without.isfinite().all()
    only_vector = replace(given, vector=torch.zeros_like(given.vector))
    only_text = replace(given.null(unet.conditioning), vector=given.vector)
    for other in (without, unet(x, t, only_vector), unet(x, t, only_text)):
        assert all(not torch.allclose(a, b) for a, b in zip(other, expected, strict=True))


@over_variants
def test_projections_computed_once_serve_all_noise_levels(name: str) -> None:
    unet = randomised(VARIANTS[name]).eval()
    x, t, given = inputs(unet.config)
    known = unet.precompute(given)
    assert known.text is None
    assert known.text_projections is not None
    assert known.text_projections.shape[:2] == (3, 5)
    assert unet.precompute(known) is known
    for levels in (t, t + 7):
        torch.testing.assert_close(unet(x, levels, known), unet(x, levels, given))
    rows = known.select(torch.tensor([2, 0]))
    torch.testing.assert_close(unet(x[[2, 0]], t[[2, 0]], rows), unet(x, t, given)[[2, 0]])
    _, features = unet(x, t, given, return_features=True)
    torch.testing.assert_close(
        unet(x, t, known, features=features), unet(x, t, given, features=features)
    )


def test_nothing_is_precomputed_without_a_text_or_of_weights_that_are_apart() -> None:
    nothing = Conditioning(dropout_key=torch.zeros(3, dtype=torch.int64))
    assert UNet(TINY).precompute(nothing) is nothing
    unet = UNet(VARIANTS["linear, deep, projected"])
    unet.separate_blocks()
    del unet.encoder_hid_proj  # neither is this one at hand
    _, _, given = inputs(unet.config)
    assert unet.precompute(given) is given


# --- Conditions and shapes


def test_conditions_that_it_was_built_for() -> None:
    config = VARIANTS["everything"]
    assert UNet(config).conditioning == ConditioningSpec(
        classes=3, low_resolution=4, text=12, vector=6
    )
    projected = VARIANTS["linear, deep, projected"]
    assert UNet(projected).conditioning == ConditioningSpec(text=10)


def test_missing_and_unwanted_conditions() -> None:
    unet, plain = UNet(replace(TINY_TEXT, vector_channels=6)), UNet(TINY)
    x, t, given = inputs(unet.config)
    assert given.text is not None
    refused: list[tuple[dict[str, Any], str]] = [
        ({"text": None}, r"conditioned on text: give text, \[B, L, 12\]"),
        ({"text": given.text[..., :5]}, r"text has 5 channels; .* built for 12"),
        ({"text_projections": given.text}, r"give text, .* or what it has precomputed"),
        ({"vector": None}, r"give vector, \[B, 6\]"),
    ]
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            unet(x, t, replace(given, **change))
    with pytest.raises(ValueError, match="text given, but this U-Net is not"):
        plain(x, t, replace(given, vector=None))
    with pytest.raises(ValueError, match="vector given, but this U-Net is not"):
        plain(x, t, Conditioning(vector=given.vector))


def test_images_higher_than_wide() -> None:
    config = replace(TINY_TEXT, sample_size=(4, 8), low_resolution=(2, 4))
    unet = randomised(config)
    assert unet.sample_shape == (3, 4, 8)
    x, t, given = inputs()
    x = x[:, :, :4]
    given = replace(given, low_resolution=x, augmentation_level=t)
    assert unet(x, t, given).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dim": None}, r"`down_block_types` has CrossAttnDownBlock2D.*AttnDown"),
        ({"cross_attention_dim": None}, r"`up_block_types` has CrossAttnUpBlock2D"),
        ({"attn_norm_num_groups": 4}, r"`attn_norm_num_groups` is 4.*use None"),
        ({"attention_head_dim": (8, 5)}, r"`attention_head_dim` is 5; .* divide the 16 channels"),
        ({"attention_head_dim": (8,)}, r"`attention_head_dim` has 1 entries .* 2"),
        ({"transformer_layers_per_block": (1, 1, 1)}, r"`transformer_layers_per_block` has 3"),
        ({"transformer_layers_per_block": 0}, r"`transformer_layers_per_block` is 0; .* least 1"),
        ({"cross_attention_dim": 0}, r"`cross_attention_dim` is 0; .* at least 1"),
        ({"sample_size": (8, 9)}, r"`sample_size` is 8×9; .* multiple of 2; use 8 or 10"),
        ({"low_resolution": (4, 2)}, r"`low_resolution` is 4×2; it must divide `sample_size` 8"),
        ({"low_resolution": (8, 8)}, r"`low_resolution` is 8×8; it must .* be less"),
    ],
)
def test_shapes_that_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shape(replace(TINY_TEXT, **change))


def test_an_encoder_projection_without_text() -> None:
    with pytest.raises(UserError, match=r"`encoder_hid_dim` is 10, .* give `cross_attention_dim`"):
        check_shape(replace(TINY, encoder_hid_dim=10))


# --- Initialisation and ways to run


@over_variants
def test_first_prediction_is_zero_and_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    unet = UNet(replace(VARIANTS[name], dropout=0.0))
    x, t, given = inputs(unet.config)
    assert torch.equal(unet(x, t, given), torch.zeros_like(x))
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        optimizer.zero_grad()
        (unet(x, t, given) - target).square().mean().backward()
        optimizer.step()
    for key, parameter in unet.named_parameters():
        assert parameter.grad is not None
        if not key.endswith("to_k.bias"):  # which softmax does not see
            assert parameter.grad.abs().max() > 0, key


@over_variants
def test_by_operations_as_by_torch(name: str) -> None:
    unet = randomised(VARIANTS[name]).double()
    x, t, given = inputs(unet.config)
    given = given.map(lambda one: one.double() if one.is_floating_point() else one)

    def run() -> dict[str, Tensor]:
        unet.zero_grad()
        output = unet(x.double(), t, given)
        output.square().sum().backward()
        return {"": output, **{n: p.grad for n, p in unet.named_parameters() if p.grad is not None}}

    expected = run()
    with force_ops():
        actual = run()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-10 * scale, msg=key)


@pytest.mark.parametrize("forced", [False, True], ids=["by torch", "by operations"])
@pytest.mark.parametrize("what", ["norms", "blocks"])
def test_recomputation_leaves_the_gradients(what: Recompute, forced: bool) -> None:
    unet = randomised(replace(VARIANTS["everything"], low_resolution=None))
    with force_ops() if forced else nullcontext():
        expected = gradients(unet)
        unet.recompute(what)
        actual = gradients(unet)
    assert actual.keys() == expected.keys()
    for key, gradient in actual.items():
        assert torch.equal(gradient, expected[key]), key


@pytest.mark.parametrize(
    "known",
    [pytest.param(False, id="text", marks=pytest.mark.slow), pytest.param(True, id="known")],
)
def test_compiled_blocks_keep_names_and_numbers(known: bool) -> None:
    torch._dynamo.reset()  # what other tests have compiled counts towards its limit
    unet = randomised(VARIANTS["linear, deep, projected"]).eval()
    x, t, given = inputs(unet.config)
    names, expected = list(unet.state_dict()), unet(x, t, given).detach()
    unet.compile_blocks(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        given = unet.precompute(given) if known else given
        torch.testing.assert_close(unet(x, t, given), expected)
    assert list(unet.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@over_variants
def test_half_weights_give_the_outputs_of_autocast_to_the_bit(
    name: str, dtype: torch.dtype
) -> None:
    unet = randomised(VARIANTS[name]).eval()
    arguments = inputs(unet.config)
    halved, beside = copy.deepcopy(unet), in_half(unet, dtype)
    to_half(halved, dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = unet(*arguments)
        assert torch.equal(halved(*arguments), expected)
        assert torch.equal(beside(*arguments), expected)
        x, t, given = arguments
        known, known_then = unet.precompute(given), beside.precompute(given)
        assert torch.equal(unet(x, t, known), expected)
        assert torch.equal(beside(x, t, known_then), expected)
    wide = {key for key, value in halved.named_parameters() if value.dtype == torch.float32}
    assert not wide & set(half_names(unet))


def test_a_folder_holds_the_whole_network(tmp_path: Path) -> None:
    config = replace(TINY_TEXT, sample_size=(8, 16), vector_channels=6, attention_head_dim=(4, 8))
    unet = randomised(config)
    unet.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == config
    for key, value in unet.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    arguments = inputs(config)
    assert torch.equal(again(*arguments), unet.eval()(*arguments))
