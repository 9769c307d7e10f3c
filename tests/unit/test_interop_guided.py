"""Networks of guided- and improved-diffusion, against a plain network of that layout."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.interop.guided import load_guided_unet
from ddpm_engine.networks.conditioning import Conditioning

IMAGE_SIZE = 16


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x)
        condition = self.emb_layers(embedding)[..., None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + condition)
        y: Tensor = self.skip_connection(x) + h
        return y


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.new_order:
            split = qkv.reshape(batch, 3, self.heads, -1, height * width)
            query, key, value = split.unbind(1)
        else:
            split = qkv.reshape(batch, self.heads, 3, -1, height * width)
            query, key, value = split.unbind(2)
        scores = torch.einsum("bhct,bhcs->bhts", query, key) / math.sqrt(channels // self.heads)
        h = torch.einsum("bhts,bhcs->bhct", scores.softmax(-1), value).flatten(1, 2)
        return x + self.proj_out(h).reshape(x.shape)


def down(channels: int) -> nn.Module:
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def up(channels: int) -> nn.Module:
    double = nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Sequential(OrderedDict(up=double, conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Oracle(nn.Module):
    """The network, written from its layout."""

    def __init__(
        self,
        multipliers: tuple[int, ...] = (1, 2),
        attends: tuple[bool, ...] = (False, True),
        layers: int = 1,
        outputs: int = 3,
        heads: int = 1,
        new_order: bool = False,
        scale_shift: bool = False,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.base = base = 32
        embedding = 4 * base
        self.time_embed = nn.Sequential(
            nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label_emb = None if classes is None else nn.Embedding(classes, embedding)
        blocks: list[nn.ModuleList] = [nn.ModuleList([nn.Conv2d(3, base, 3, padding=1)])]
        width, skips = base, [base]
        for level, multiplier in enumerate(multipliers):
            for _ in range(layers):
                parts: list[nn.Module] = [
                    Residual(width, base * multiplier, embedding, scale_shift)
                ]
                width = base * multiplier
                if attends[level]:
                    parts.append(Attention(width, heads, new_order))
                blocks.append(nn.ModuleList(parts))
                skips.append(width)
            if level < len(multipliers) - 1:
                blocks.append(nn.ModuleList([down(width)]))
                skips.append(width)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(
            [
                Residual(width, width, embedding, scale_shift),
                Attention(width, heads, new_order),
                Residual(width, width, embedding, scale_shift),
            ]
        )
        blocks = []
        for level in reversed(range(len(multipliers))):
            for index in range(layers + 1):
                out = base * multipliers[level]
                parts = [Residual(width + skips.pop(), out, embedding, scale_shift)]
                width = out
                if attends[level]:
                    parts.append(Attention(width, heads, new_order))
                if level and index == layers:
                    parts.append(up(width))
                blocks.append(nn.ModuleList(parts))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        half = self.base // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = timesteps[:, None].float() * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(labels)

        def through(block: Any, h: Tensor) -> Tensor:
            for part in block:
                h = part(h, embedding) if isinstance(part, Residual) else part(h)
            return h

        skips = []
        for block in self.input_blocks:
            x = through(block, x)
            skips.append(x)
        x = through(self.middle_block, x)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, skips.pop()], dim=1))
        y: Tensor = self.out(x)
        return y


def saved(path: Path, **options: Any) -> tuple[Oracle, Path]:
    oracle = Oracle(**options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and "label" not in name:
                noise /= parameter[0].numel() ** 0.5
            elif parameter.dim() == 1:
                noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(noise)
    torch.save(oracle.state_dict(), path / "ema_0.9999_000010.pt")
    return oracle, path / "ema_0.9999_000010.pt"


NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one_head": ({}, {"num_heads": 1}),
    "heads": ({"heads": 4}, {"num_heads": 4}),
    "head_channels": ({"heads": 4}, {"num_head_channels": 16}),
    "new_order": ({"heads": 4, "new_order": True},
                  {"num_heads": 4, "use_new_attention_order": True}),
    "scale_shift": ({"scale_shift": True, "heads": 2}, {"num_heads": 2}),
    "one_head_of_two_widths": ({"attends": (True, True)}, {"num_heads": 1}),
    "one_level": ({"multipliers": (1,), "attends": (False,)}, {"num_heads": 1}),
    "classes": ({"classes": 4, "layers": 2}, {"num_heads": 1}),
    # A quarter as wide: the models published by improved-diffusion.
    "cifar10": ({"multipliers": (1, 2, 2, 2), "attends": (False, True, True, False), "layers": 3,
                 "heads": 4, "scale_shift": True, "outputs": 6}, {"num_heads": 4}),
    "lsun_bedroom": ({"multipliers": (1, 1, 2, 2), "attends": (False, False, False, True),
                      "layers": 2, "outputs": 6}, {"num_heads": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_predictions(name: str, tmp_path: Path) -> None:
    options, flags = NETWORKS[name]
    oracle, file = saved(tmp_path, **options)
    model = load_guided_unet(file, image_size=IMAGE_SIZE, **flags)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    timesteps = torch.tensor([0.0, 0.25, 500, 999])
    labels = torch.arange(4) if "classes" in options else None
    # In float64 only a different formula would differ.
    for dtype, bound in [(torch.float32, 1e-5), (torch.float64, 1e-11)]:
        with torch.no_grad():
            expected = oracle.to(dtype)(x.to(dtype), timesteps, labels)
            actual = model.to(dtype)(x.to(dtype), timesteps, Conditioning(labels))
        difference = (actual - expected).abs().max().item()
        assert 0.2 < expected.std() < 5
        assert difference <= bound


def test_the_order_of_attention_matters(tmp_path: Path) -> None:
    _, file = saved(tmp_path, heads=4)
    first, second = (
        load_guided_unet(file, image_size=IMAGE_SIZE, num_heads=4, use_new_attention_order=new)
        for new in (False, True)
    )
    name = "mid_block.attentions.0.to_q.weight"
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])


def refusal(file: Path, **flags: Any) -> str:
    with pytest.raises(UserError) as refused:
        load_guided_unet(file, image_size=IMAGE_SIZE, **(flags or {"num_heads": 1}))
    return str(refused.value)


def test_refusals(tmp_path: Path) -> None:
    oracle, file = saved(tmp_path, attends=(True, True), layers=2)
    assert "give one of them" in refusal(file, num_heads=1, num_head_channels=32)
    assert "32 and 64 channels: this U-Net has heads of one width" in refusal(file, num_heads=2)
    assert "`attention_head_dim` is 24" in refusal(file, num_head_channels=24)

    def altered(remove: str = "", rename: tuple[str, str] = ("", "")) -> Path:
        torch.save(
            {
                name.replace(*rename) if rename[0] else name: tensor
                for name, tensor in oracle.state_dict().items()
                if not (remove and name.startswith(remove))
            },
            tmp_path / "altered.pt",
        )
        return tmp_path / "altered.pt"

    assert "conv_resample" in refusal(altered(remove="input_blocks.3."))
    updown = ("output_blocks.2.2.conv.", "output_blocks.2.2.in_layers.2.")
    assert "resblock_updown" in refusal(altered(rename=updown))
    assert "it has no out.2.weight" in refusal(altered(remove="out."))
    assert "is missing" in refusal(altered(remove="middle_block.0.in_layers"))
    assert "is not wanted" in refusal(altered(rename=("time_embed.0", "time_embed.7")))
    uneven = altered(remove="input_blocks.5.")
    assert "has [2, 1] residual blocks" in refusal(uneven)
    assert "there is no file" in refusal(tmp_path / "gone.pt")
