"""The U-Net that attends to text against diffusers' `UNet2DConditionModel`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peers.test_unet import randomise
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.files import config_entries, read_config
from ddpm_engine.networks.unet.unet import UNet

UNet2DConditionModel = pytest.importorskip("diffusers").UNet2DConditionModel

# Stable Diffusion 1 and 2 as published, a tenth as wide.
STABLE_1: dict[str, Any] = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [32, 64, 128, 128],
    "center_input_sample": False, "cross_attention_dim": 76,
    "down_block_types": 3 * ["CrossAttnDownBlock2D"] + ["DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "sample_size": 8,
    "up_block_types": ["UpBlock2D"] + 3 * ["CrossAttnUpBlock2D"],
}  # fmt: skip
STABLE_2: dict[str, Any] = {
    **STABLE_1, "attention_head_dim": [2, 4, 8, 8], "cross_attention_dim": 102,
    "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False,
    "resnet_time_scale_shift": "default", "upcast_attention": True, "use_linear_projection": True,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **STABLE_1, "block_out_channels": [16, 32], "norm_num_groups": 8, "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 24,
}  # fmt: skip

PUBLISHED = {"stable diffusion 1": STABLE_1, "stable diffusion 2": STABLE_2}
VARIANTS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "depths": {**SMALL, "transformer_layers_per_block": [1, 3], "use_linear_projection": True},
    "encoder projection": {**SMALL, "encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
    "heads by level": {**SMALL, "attention_head_dim": [2, 4], "mid_block_scale_factor": 2**0.5},
    "vector": {
        **SMALL, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 12,
    },
    "classes": {**SMALL, "num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift"},
    "height and width": {**SMALL, "sample_size": [4, 8], "in_channels": 1, "out_channels": 2},
}  # fmt: skip


def peer_of(entries: dict[str, Any]) -> nn.Module:
    peer: nn.Module = UNet2DConditionModel(**entries).eval()
    randomise(peer, seed=1)
    return peer


def batch_for(config: UNetConfig) -> tuple[Tensor, Tensor, Conditioning]:
    """Four samples with texts of 1, 5, 7 and 3 tokens, padded with what must not count."""
    generator = torch.Generator().manual_seed(2)
    size = (
        config.sample_size if isinstance(config.sample_size, tuple) else 2 * (config.sample_size,)
    )
    channels = config.encoder_hid_dim or config.cross_attention_dim or 0
    text = torch.randn(4, 7, channels, generator=generator)
    vector = torch.randn(4, config.vector_channels or 1, generator=generator)
    conditioning = Conditioning(
        text=text,
        text_mask=torch.arange(7) < torch.tensor([1, 5, 7, 3])[:, None],
        vector=vector if config.vector_channels else None,
        labels=torch.tensor([0, 1, 4, 3]) if config.num_class_embeds else None,
    )
    x = torch.randn(4, config.in_channels, *size, generator=generator)
    return x, torch.tensor([0, 1, 500, 999]), conditioning


def to_precision(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def predictions(peer: nn.Module, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    output: Tensor = peer(
        x,
        t,
        encoder_hidden_states=given.text,
        class_labels=given.labels if given.vector is None else given.vector,
        encoder_attention_mask=given.text_mask,
    ).sample
    return output


@pytest.mark.parametrize("name", [*PUBLISHED, *VARIANTS])
def test_folders_of_theirs_are_read_and_predict_the_same(name: str, tmp_path: Path) -> None:
    peer = peer_of((PUBLISHED | VARIANTS)[name])
    peer.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = UNet.from_pretrained(tmp_path)
    x, t, given = batch_for(ours.config)
    for dtype, bound in {torch.float32: 1e-5, torch.float64: 1e-11}.items():
        conditioning = given.map(partial(to_precision, dtype))
        arguments = x.to(dtype), t, conditioning
        with torch.no_grad():
            expected = predictions(peer.to(dtype), *arguments)
            actual = ours.to(dtype)(*arguments)
            known = ours(x.to(dtype), t, ours.precompute(conditioning))
        assert 0.2 < expected.std() < 5, "the bounds are meant for outputs of order one"
        assert (actual - expected).abs().max().item() <= bound
        assert (known - expected).abs().max().item() <= bound


@pytest.mark.parametrize("name", [*PUBLISHED, *VARIANTS])
def test_folders_of_ours_are_theirs_to_the_bit(name: str, tmp_path: Path) -> None:
    peer = peer_of((PUBLISHED | VARIANTS)[name])
    peer.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    ours = UNet.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    expected, actual = peer.state_dict(), again.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    for key, value in peer.config.items():  # type: ignore[operator, union-attr]
        # Notes, and how softmax is computed in half precision.
        if not key.startswith("_") and key != "upcast_attention":
            assert as_lists(again.config[key]) == as_lists(value), key


def as_lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_gradients() -> None:
    entries = {**SMALL, "encoder_hid_dim": 20, "transformer_layers_per_block": [1, 2]}
    peer = peer_of(entries)
    config = UNetConfig(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
        attention_head_dim=(2, 4), norm_num_groups=8, norm_eps=1e-5, downsample_padding=1,
        flip_sin_to_cos=True, freq_shift=0, cross_attention_dim=24, encoder_hid_dim=20,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    ours = UNet(config)
    ours.load_state_dict(peer.state_dict(), strict=True)
    x, t, given = batch_for(config)
    for module, output in [(ours, ours(x, t, given)), (peer, predictions(peer, x, t, given))]:
        module.zero_grad()
        (output - x).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_heads_are_read_by_number_and_kept_by_width(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    UNet2DConditionModel(**STABLE_1).save_config(tmp_path)
    assert read_config(file).attention_head_dim == (4, 8, 16, 16)
    UNet2DConditionModel(**STABLE_2).save_config(tmp_path)
    config = read_config(file)
    assert config.attention_head_dim == 16
    assert config_entries(config)["attention_head_dim"] == (2, 4, 8, 8)
    UNet2DConditionModel(**{**SMALL, "attention_head_dim": 4, "sample_size": 8}).save_config(
        tmp_path
    )
    file.write_text(file.read_text().replace('"attention_head_dim": 4', '"attention_head_dim": 5'))
    with pytest.raises(UserError, match=r"attention_head_dim is 5 .*number of heads.*32 channels"):
        read_config(file)


@pytest.mark.parametrize(
    "change",
    [
        {"addition_embed_type": "text"}, {"class_embed_type": "timestep"},
        {"conv_in_kernel": 5}, {"dual_cross_attention": True}, {"cross_attention_dim": [24, 32]},
        {"encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj"}, {"layers_per_block": [1, 2]},
        {"only_cross_attention": True}, {"mid_block_type": "UNetMidBlock2D"},
        {"resnet_out_scale_factor": 1.5}, {"timestep_post_act": "silu"},
        {"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_networks_of_another_kind_are_refused_by_name(
    change: dict[str, Any], tmp_path: Path
) -> None:
    UNet2DConditionModel(**{**SMALL, **change}).save_config(tmp_path)
    with pytest.raises(UserError, match=f"{list(change)[-1]} is .*config.json"):
        read_config(tmp_path / "config.json")


def test_networks_that_they_do_not_have_are_not_written() -> None:
    text = UNetConfig(
        cross_attention_dim=8,
        down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
    )
    assert config_entries(text)["_class_name"] == "UNet2DConditionModel"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"low_resolution": 16}, "low_resolution.*UNet2DConditionModel"),
        ({"vector_channels": 8, "num_class_embeds": 11}, "vector_channels"),
        ({"up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * 3}, "up_block_types"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            config_entries(replace(text, **change))
    with pytest.raises(UserError, match=r"vector_channels.*UNet2DModel"):
        config_entries(replace(UNetConfig(), vector_channels=8))
