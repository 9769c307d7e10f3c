"""Files of a transformer: those of diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.networks.dit.config import DiTConfig, check_shape
from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.networks.files.format import Format
from ddpm_engine.sizes import as_text, height_and_width

CLASS = "DiTTransformer2DModel"
FORMER_CLASS = "Transformer2DModel"
"""What it was called when facebook/DiT-XL-2-256 was published."""

_FEED_FORWARDS: dict[str, tuple[Literal["gelu", "swiglu"], float]] = {
    "gelu-approximate": ("gelu", 4.0),
    "swiglu": ("swiglu", 6.0),
}
"""Activation and ratio, such that the hidden layer is four times as wide as the network."""

_SHARED = "_shared_embedding"
"""Our own entry. Diffusers ignores names with a leading underscore, and preserves them."""

# Entries without effect on what the network computes: groups of a norm that it does not have.
_IGNORED = ("norm_num_groups",)

_EMBEDDING = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.*)")
_TABLE = "class_embedder.embedding_table.weight"


def read_config(file: Path) -> DiTConfig:
    """Read a `DiTTransformer2DModel`'s configuration; absent entries have that class's defaults.

    Raises:
        UserError: naming an entry that is unknown, or whose value `DiT` cannot honour.
    """
    entries = Entries(file)
    entries.require("_class_name", (CLASS, FORMER_CLASS), None)
    for name, supported, default in [
        ("attention_bias", (True,), True),
        ("cross_attention_dim", (None,), None),
        ("double_self_attention", (False,), False),
        ("dropout", (0, 0.0), 0.0),
        ("norm_elementwise_affine", (False,), False),
        ("norm_type", ("ada_norm_zero",), "ada_norm_zero"),
        ("num_vector_embeds", (None,), None),
        ("only_cross_attention", (False,), False),
        ("upcast_attention", (False,), False),
        ("use_linear_projection", (False,), False),
    ]:
        entries.require(name, supported, default)
    activation = entries.take("activation_fn", str, "gelu-approximate")
    if activation not in _FEED_FORWARDS:
        known = " and ".join(_FEED_FORWARDS)
        entries.refuse("activation_fn", activation, f"this engine has {known}")
    feed_forward, ratio = _FEED_FORWARDS[activation]
    classes = entries.take("num_embeds_ada_norm", int, 1000)
    in_channels = entries.take("in_channels", int, 4)
    config = DiTConfig(
        sample_size=entries.take("sample_size", int, 32),
        in_channels=in_channels,
        out_channels=entries.take_optional("out_channels", int, None) or in_channels,
        patch_size=entries.take("patch_size", int, 2),
        num_layers=entries.take("num_layers", int, 28),
        num_attention_heads=entries.take("num_attention_heads", int, 16),
        attention_head_dim=entries.take("attention_head_dim", int, 72),
        num_class_embeds=classes + 1 if classes else None,
        norm_eps=entries.take("norm_eps", float, 1e-5),
        feed_forward=feed_forward,
        mlp_ratio=ratio,
        shared_embedding=entries.take_any(_SHARED, False) is True,
    )
    entries.finish(_IGNORED)
    try:
        check_shape(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def config_entries(config: DiTConfig) -> dict[str, Any]:
    """The `config.json` of the `DiTTransformer2DModel` that is this network.

    Raises:
        UserError: the network does what that one cannot do.
    """
    activations = {kind: activation for activation, kind in _FEED_FORWARDS.items()}
    activation = activations.get((config.feed_forward, config.mlp_ratio))
    plain = DiTConfig()
    own = [
        f"`model.{name}` is {getattr(config, name)}"
        for name in (
            "text_channels",
            "vector_channels",
            "norm",
            "qk_norm",
            "rotary",
            "patch_bottleneck",
        )
        if getattr(config, name) != getattr(plain, name)
    ]
    if activation is None:
        own.append(f"`model.mlp_ratio` is {config.mlp_ratio:g} with {config.feed_forward}")
    height, width = height_and_width(config.sample_size)
    if height != width:
        own.append(f"`model.sample_size` is {as_text(config.sample_size)}")
    if own:
        raise UserError(
            f"{', '.join(own)}, but the {CLASS} of diffusers has no such networks; sample this one "
            "with this engine"
        )
    return {
        "_class_name": CLASS,
        "activation_fn": activation,
        "attention_bias": True,
        "attention_head_dim": config.attention_head_dim,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_attention_heads,
        # Without classes it has the null class alone, and that is zero.
        "num_embeds_ada_norm": (config.num_class_embeds or 1) - 1,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": height,
        "upcast_attention": False,
        _SHARED: config.shared_embedding,
    }


def from_stored(config: DiTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the embeddings out of the blocks; of a shared one, each block has a copy.

    Args:
        config: of the network.
        tensors: by diffusers' names.

    Raises:
        UserError: copies of a shared embedding that are not, or a null class alone that is not
            zero.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _EMBEDDING.fullmatch(name)
        if found is None:
            renamed[name] = tensor
            continue
        index = 0 if config.shared_embedding else int(found[1])
        ours = f"embeddings.{index}.{found[2]}"
        if ours in renamed and not renamed[ours].equal(tensor):
            raise UserError(
                f"{name} is not what the other blocks have, but the configuration says "
                f"{_SHARED}; remove that entry from it"
            )
        if found[2] == _TABLE and config.num_class_embeds is None:
            if tensor.any():
                raise UserError(
                    f"{name} is not zero, but num_embeds_ada_norm is 0: of such networks this "
                    "engine has only unconditional ones"
                )
            continue
        renamed[ours] = tensor
    return renamed


def to_stored(config: DiTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every block its embedding.

    Args:
        config: of the network.
        tensors: its state dict.
    """
    stored = {n: tensor for n, tensor in tensors.items() if not n.startswith("embeddings.")}
    bias = tensors["embeddings.0.timestep_embedder.linear_2.bias"]
    for block in range(config.num_layers):
        source = f"embeddings.{0 if config.shared_embedding else block}."
        target = f"transformer_blocks.{block}.norm1.emb."
        for name, tensor in tensors.items():
            if name.startswith(source):
                # safetensors refuses tensors that share memory.
                shared = block and config.shared_embedding
                stored[target + name.removeprefix(source)] = tensor.clone() if shared else tensor
        if config.num_class_embeds is None:
            stored[target + _TABLE] = bias.new_zeros(1, config.channels)
    return stored


def _null_class(config: DiTConfig) -> int | None:
    return None if config.num_class_embeds is None else config.num_class_embeds - 1


def _description(config: DiTConfig) -> dict[str, str]:
    return {
        "network": f"diffusion transformer (`{CLASS}`)",
        "layers": str(config.num_layers),
        "heads": f"{config.num_attention_heads} of {config.attention_head_dim} channels",
        "patches": f"{config.patch_size}×{config.patch_size}",
    }


FORMAT = Format(
    class_names=(CLASS, FORMER_CLASS),
    part="transformer",
    pipelines={},  # DiTPipeline needs an autoencoder
    read_config=read_config,
    config_entries=config_entries,
    from_stored=from_stored,
    to_stored=to_stored,
    description=_description,
    null_class=_null_class,
)
"""How diffusers stores a transformer."""
