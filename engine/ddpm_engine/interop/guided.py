"""Networks of openai/guided-diffusion and openai/improved-diffusion: their `.pt` state dicts.

The layers are ours under other names (`input_blocks`, `middle_block`, `output_blocks`), with the
three projections of an attention in one convolution. The file says the shape; what it does not say
are flags of the command that trained it, which are arguments here, under their own names.

Of the models published, those of improved-diffusion for CIFAR-10 and LSUN Bedroom have a shape that
`UNet` can take. Its ImageNet models have heads of several widths, and all of guided-diffusion's
resample inside residual blocks (`resblock_updown`); both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.weights import fill, read_pickle
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.paths import user_path

_GROUPS = 32  # of every norm in these libraries

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_OUTSIDE_BLOCKS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# What a file has if it is of this family at all.
_LANDMARKS = (
    "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.bias",
    "input_blocks.1.0.emb_layers.1.bias", "middle_block.1.qkv.weight",
    "output_blocks.0.0.in_layers.2.bias", "out.2.weight",
)  # fmt: skip

# Kind of a block's part, identified by the name of one of its layers.
_PARTS = {"in_layers": "residual", "qkv": "attention", "op": "down", "conv": "up"}
Block = dict[int, str]
"""The parts of one block, each a value of `_PARTS`, by number."""


def load_guided_unet(
    file: Path,
    *,
    image_size: int,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool = False,
    dropout: float = 0.0,
) -> UNet:
    """Load a network that one of these libraries saved.

    Where `learn_sigma` was set the network has twice as many outputs as inputs: the prediction,
    then the variance. Where `rescale_timesteps` was set, as by default in improved-diffusion, it
    wants t · 1000 / T for a timestep.

    Args:
        file: the `.pt`.
        image_size: side of its images in pixels.
        num_heads: heads of every attention; give this or `num_head_channels`.
        num_head_channels: channels of every head.
        use_new_attention_order: heads within queries, keys and values, instead of around them.
        dropout: of the residual blocks, for training on.

    Returns:
        The network in float32, on the CPU, in eval mode.

    Raises:
        UserError: no such file, a damaged one, or a network that `UNet` cannot be; it says why.
    """
    if (num_heads is None) == (num_head_channels is None):
        raise UserError(
            f"num_heads is {num_heads} and num_head_channels is {num_head_channels}: the file does "
            "not say how attention is split, so give one of them, as in training"
        )
    file = user_path(file)
    tensors = read_pickle(file).tensors
    for name in _LANDMARKS:
        if name not in tensors:
            raise UserError(
                f"{file} is not a network of guided- or improved-diffusion: it has no {name}"
            )
    down, up = _levels(tensors, file)
    shape = _shape(tensors, down, up, file)
    if num_heads is not None:
        num_head_channels = _head_channels(shape, num_heads, file)
    config = UNetConfig(
        **shape, sample_size=image_size, attention_head_dim=num_head_channels, dropout=dropout
    )
    model = UNet(config)
    # Around a single head there is nothing to be ordered.
    head_channels = None if use_new_attention_order else num_head_channels
    fill(model, _translate(tensors, _modules(down, up), head_channels), file)
    return model.eval()


def _levels(tensors: Mapping[str, Tensor], file: Path) -> tuple[list[list[Block]], ...]:
    """The blocks of each level on the way down and on the way up, without the first convolution."""
    descent, ascent = _blocks(tensors, "input_blocks"), _blocks(tensors, "output_blocks")
    if any(list(block.values()).count("residual") > 1 for block in ascent.values()):
        raise UserError(
            f"{file} has resblock_updown: residual blocks that resample, which this U-Net lacks"
        )
    numbers = range(1, max(descent, default=0) + 1)
    if any(number not in descent for number in numbers):
        raise UserError(
            f"{file} has conv_resample off: resampling without convolutions, which this U-Net lacks"
        )
    down: list[list[Block]] = [[]]
    for number in numbers:
        down[-1].append(descent[number])
        if descent[number] == {0: "down"}:
            down.append([])
    up: list[list[Block]] = [[]]
    for _, block in sorted(ascent.items()):
        up[-1].append(block)
        if "up" in block.values():
            up.append([])
    if not all([*down, *up]) or any(level[0] == {0: "down"} for level in down):
        raise UserError(
            f"{file} is damaged: a resolution of its network has no residual blocks; "
            "download it again"
        )
    return down, up


def _blocks(tensors: Mapping[str, Tensor], stem: str) -> dict[int, Block]:
    """Every block of a list, by number, except those without parts that we know."""
    blocks: dict[int, Block] = {}
    for name in tensors:
        found = re.match(rf"{stem}\.(\d+)\.(\d+)\.({'|'.join(_PARTS)})\.", name)
        if found:
            blocks.setdefault(int(found[1]), {})[int(found[2])] = _PARTS[found[3]]
    return {number: dict(sorted(block.items())) for number, block in blocks.items()}


def _shape(
    tensors: Mapping[str, Tensor], down: list[list[Block]], up: list[list[Block]], file: Path
) -> dict[str, Any]:
    """Return the fields of `UNetConfig` that the tensors determine."""
    first, last = tensors["input_blocks.0.0.weight"], tensors["out.2.weight"]
    if first.dim() != 4 or last.dim() != 4:
        raise UserError(f"{file} is damaged: its first or last layer is no convolution of images")
    layers = [sum("residual" in block.values() for block in level) for level in down]
    if len(set(layers)) != 1:
        raise UserError(
            f"{file} has {layers} residual blocks at its levels; this U-Net has as many at each"
        )
    widths, number = [], 1
    for level in down:
        bias = f"input_blocks.{number}.0.in_layers.2.bias"
        if bias not in tensors:
            raise UserError(f"{file} is damaged: it has no {bias}; download it again")
        widths.append(tensors[bias].numel())
        number += len(level)
    conditions = tensors["input_blocks.1.0.emb_layers.1.bias"].numel()
    scale_shift = conditions == 2 * widths[0]
    classes = tensors.get("label_emb.weight")
    return {
        "in_channels": first.shape[1],
        "out_channels": last.shape[0],
        "block_out_channels": tuple(widths),
        "down_block_types": tuple(_kind(level, "DownBlock2D") for level in down),
        "up_block_types": tuple(_kind(level, "UpBlock2D") for level in up),
        "layers_per_block": layers[0],
        "norm_num_groups": _GROUPS,
        # The middle attention always has its norm; ours has it by default without scale_shift.
        "attn_norm_num_groups": _GROUPS if scale_shift else None,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": None if classes is None else len(classes),
    }


def _kind(level: list[Block], plain: str) -> str:
    return f"Attn{plain}" if "attention" in level[0].values() else plain


def _head_channels(shape: Mapping[str, Any], num_heads: int, file: Path) -> int | None:
    """The width of a head, if all attentions agree on it; None: one head, however wide."""
    if num_heads == 1:
        return None
    widths, types = shape["block_out_channels"], shape["down_block_types"]
    attending = {widths[-1]}
    attending |= {w for w, kind in zip(widths, types, strict=True) if kind == "AttnDownBlock2D"}
    if len(attending) > 1 or num_heads < 1 or widths[-1] % num_heads:
        raise UserError(
            f"num_heads is {num_heads} and the levels of {file} that attend have "
            f"{' and '.join(map(str, sorted(attending)))} channels: this U-Net has heads of one "
            "width throughout (num_head_channels), so it cannot be that network"
        )
    return int(widths[-1] // num_heads)


def _modules(down: list[list[Block]], up: list[list[Block]]) -> dict[str, str]:
    """Our name of every module that is a part of a block, by theirs."""
    modules = {}

    def place(stem: str, level: str, index: int, block: Block) -> None:
        for number, part in block.items():
            modules[f"{stem}.{number}" + {"down": ".op", "up": ".conv"}.get(part, "")] = {
                "residual": f"{level}.resnets.{index}",
                "attention": f"{level}.attentions.{index}",
                "down": f"{level}.downsamplers.0.conv",
                "up": f"{level}.upsamplers.0.conv",
            }[part]

    for stem, name, levels, number in [
        ("input_blocks", "down_blocks", down, 1),
        ("output_blocks", "up_blocks", up, 0),
    ]:
        for position, level in enumerate(levels):
            for index, block in enumerate(level):
                place(f"{stem}.{number}", f"{name}.{position}", index, block)
                number += 1
    modules["middle_block.0"] = "mid_block.resnets.0"
    modules["middle_block.1"] = "mid_block.attentions.0"
    modules["middle_block.2"] = "mid_block.resnets.1"
    return modules


def _translate(
    tensors: Mapping[str, Tensor], modules: Mapping[str, str], head_channels: int | None
) -> dict[str, Tensor]:
    """The same tensors under our names; what has none keeps its own, and is reported there."""
    layers = dict(_OUTSIDE_BLOCKS)
    for theirs, ours in modules.items():
        inner = _ATTENTION if ".attentions." in ours else _RESIDUAL
        layers |= {f"{theirs}.{layer}": f"{ours}.{name}" for layer, name in inner.items()}
        layers[theirs] = ours
    translated = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        attention = modules.get(module.removesuffix(".qkv"))
        whole = tensor.dim() > 0 and len(tensor) % (3 * (head_channels or 1)) == 0
        if module.endswith(".qkv") and attention and whole:
            for projection, part in zip("qkv", _split_qkv(tensor, head_channels), strict=True):
                translated[f"{attention}.to_{projection}.{kind}"] = part
            continue
        if module.endswith(".proj_out"):
            tensor = tensor.flatten(1) if tensor.dim() > 1 else tensor
        translated[f"{layers.get(module, module)}.{kind}"] = tensor
    return translated


def _split_qkv(tensor: Tensor, head_channels: int | None) -> list[Tensor]:
    """Queries, keys and values of `[3C, C, 1]` weights or `[3C]` biases: each `[C, C]` or `[C]`.

    The rows are grouped by heads of that width, and within those into queries, keys and values;
    None: they are grouped by queries, keys and values first.
    """
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor
    if head_channels is None:
        return list(rows.chunk(3))
    heads = rows.unflatten(0, (-1, 3, head_channels))
    return [heads[:, part].flatten(0, 1) for part in range(3)]
