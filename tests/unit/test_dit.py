"""The transformer: shapes, positions, options, bad input, and its kernel's place in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import TINY_DIT
from tests.unit.test_networks import inputs, randomised
from torch import Tensor

import ddpm_engine
from ddpm_engine.cli.options import option_names
from ddpm_engine.cli.train import Options, parse
from ddpm_engine.config import RunConfig, from_dict, to_dict
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.dit.config import DiTConfig, check_shape
from ddpm_engine.networks.dit.dit import DiT
from ddpm_engine.networks.dit.embeddings import unpatched
from ddpm_engine.networks.dit.positions import rotate, rotation, sinusoids
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import problems
from ddpm_engine.training.step_memory import step_memory
from ddpm_kernels.dispatch import force_ops

CPU = torch.device("cpu")
PLAIN = DiTConfig(
    sample_size=8, in_channels=3, out_channels=3, num_layers=2, num_attention_heads=2,
    attention_head_dim=8,
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "rms": {"norm": "rms"},
    "qk_norm": {"qk_norm": True},
    "rotary": {"rotary": True},
    "swiglu": {"feed_forward": "swiglu"},
    "bottleneck": {"patch_bottleneck": 6},
    "each its embedding": {"shared_embedding": False},
}


def parameters(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(config).parameters())


def test_parameter_count_of_the_paper() -> None:
    """Table 4 says 675M for DiT-XL/2 and 130M for DiT-B/2; positions are fixed and not counted."""
    published = replace(DiTConfig(), out_channels=8, num_class_embeds=1001)
    assert parameters(published) == 674_834_720
    assert round(parameters(PRESETS["dit-b-256"]().model) / 1e6) == 130


# --- Options


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_changes_the_network_and_learns(option: str) -> None:
    changed = randomised(replace(PLAIN, num_class_embeds=3, **OPTIONS[option])).double()
    x, t = inputs(PLAIN)
    labels = Conditioning(torch.tensor([0, 2, 1]))
    y = changed(x.double(), t, labels)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in changed.parameters())
    if option == "rotary":  # which has no weights
        plain = randomised(replace(PLAIN, num_class_embeds=3)).double()
        assert not torch.allclose(plain(x.double(), t, labels), y)


def test_swiglu_takes_two_thirds_of_the_width() -> None:
    plain, gated = parameters(PLAIN), parameters(replace(PLAIN, feed_forward="swiglu"))
    assert abs(gated - plain) < 0.02 * plain


def test_the_bottleneck_is_a_product_of_two() -> None:
    network = randomised(replace(PLAIN, patch_bottleneck=6)).double()
    joined = randomised(PLAIN).double()
    weights = {
        name: tensor for name, tensor in network.state_dict().items() if "bottleneck" not in name
    }
    narrow = network.state_dict()["pos_embed.bottleneck.weight"]
    both = torch.einsum("oi,ichw->ochw", weights["pos_embed.proj.weight"], narrow)
    joined.load_state_dict(weights | {"pos_embed.proj.weight": both})
    x, t = inputs(PLAIN)
    torch.testing.assert_close(joined(x.double(), t), network(x.double(), t))


# --- Positions


def test_a_product_of_queries_and_keys_depends_on_the_way_between_them() -> None:
    by = rotation(6, 5, 6, 16, CPU)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(16, generator=generator).double() for _ in range(2))

    def turned(x: Tensor) -> Tensor:
        return rotate(x.expand(1, 30, 1, 16), by)[0, :, 0].unflatten(0, (6, 5))

    products = torch.einsum("hwd,yxd->hwyx", turned(query), turned(key))
    for rows in range(3):
        for columns in range(3):
            there = torch.stack(
                [products[y, x, y + rows, x + columns] for y in range(3) for x in range(2)]
            )
            torch.testing.assert_close(there, there[:1].expand_as(there), atol=1e-5, rtol=0)
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3
    torch.testing.assert_close(turned(query).norm(dim=-1), query.norm().expand(6, 5))


def test_positions_run_over_the_same_range_at_every_size() -> None:
    small, large = sinusoids(4, 4, 4, 16, CPU), sinusoids(8, 12, 4, 16, CPU).unflatten(0, (8, 12))
    torch.testing.assert_close(large[::2, ::3].flatten(0, 1), small)
    assert not torch.allclose(large[1], large[0])


@pytest.mark.parametrize("config", [PLAIN, TINY_DIT], ids=["plain", "everything"])
def test_any_height_and_width_that_patches_divide(config: DiTConfig) -> None:
    network = randomised(config)
    for height, width in ((8, 8), (12, 6), (2, 16)):
        assert network(torch.randn(1, 3, height, width), torch.tensor(0)).shape[2:] == (
            height, width,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"9×8 pixels.*patches of 2×2 need multiples of 2"):
        network(torch.zeros(1, 3, 9, 8), torch.tensor(0))


def test_patches_are_laid_back_where_they_came_from() -> None:
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1)
    assert torch.equal(unpatched(patches.flatten(3).flatten(1, 2), 2, 3, 2), x)


# --- Ways to run


def gradients(network: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x, t = inputs(network.config)
    network.zero_grad()
    network(x.to(dtype), t).square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def test_recomputation_leaves_the_gradients() -> None:
    network = randomised(TINY_DIT)
    expected = gradients(network)
    network.recompute("blocks")
    actual = gradients(network)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_registered_operations_compute_the_same(norm: Any) -> None:
    network = randomised(replace(TINY_DIT, norm=norm)).double()
    expected = gradients(network, torch.float64)
    with force_ops():
        actual = gradients(network, torch.float64)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


def test_features_are_not_cached() -> None:
    model = ddpm_engine.LoadedModel.from_config(
        randomised(TINY_DIT).eval().requires_grad_(False), RunConfig(model=TINY_DIT), "0" * 64
    )
    with pytest.raises(UserError, match=r"`cache_interval` is 2.*no deep levels.*DeepCache"):
        model.sample(1, steps=2, cache_interval=2)


def test_recomputation_saves_the_memory_of_blocks() -> None:
    config = PRESETS["dit-b-256"]()
    training = replace(config.training, batch_size=2, precision="bf16", recompute="blocks")
    kept, rebuilt = (
        step_memory(replace(config, training=each)).kept
        for each in (replace(training, recompute="none"), training)
    )
    assert rebuilt < kept / 5


def test_flags_are_those_of_the_presets_network(capsys: pytest.CaptureFixture[str]) -> None:
    run = parse(["--preset", "digits-dit", "--model.num-layers", "2", "--model.no-rotary"]).run
    assert run.model == replace(PRESETS["digits-dit"]().model, num_layers=2, rotary=False)
    assert from_dict(to_dict(run), "it") == run
    with pytest.raises(SystemExit):
        parse(["--preset", "digits-dit", "--model.block-out-channels", "8"])
    assert "--model.block-out-channels" in capsys.readouterr().err
    assert {"model.patch_size", "model.block_out_channels"} <= set(option_names(Options))


# --- Shapes that cannot be built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, r"`patch_size` is 3; patches must divide the `sample_size` 8"),
        ({"patch_size": 0}, r"`patch_size` is 0; .* at least 1"),
        ({"num_layers": 0}, r"`num_layers` is 0"),
        ({"attention_head_dim": 6}, r"`attention_head_dim` is 6; with `rotary`.*multiple of 4"),
        (
            {"rotary": False, "attention_head_dim": 3},
            r"`num_attention_heads` is 2; times `attention_head_dim` 3 .* multiple of 4",
        ),
        ({"norm": "group"}, r"`norm` is 'group'; it must be 'layer' or 'rms'"),
        ({"feed_forward": "relu"}, r"`feed_forward` is 'relu'; it must be 'gelu' or 'swiglu'"),
        ({"attention": "flash"}, r"`attention` is 'flash'"),
        ({"mlp_ratio": 0.0}, r"`mlp_ratio` is 0.0"),
        ({"mlp_ratio": 0.01}, r"`mlp_ratio` is 0.01, which of 16 channels leaves none"),
        ({"num_class_embeds": 1}, r"`num_class_embeds` is 1"),
        ({"patch_bottleneck": 0}, r"`patch_bottleneck` is 0"),
    ],
)
def test_impossible_shape(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiT(replace(TINY_DIT, **change))


def test_all_problems_are_reported_at_once() -> None:
    check_shape(TINY_DIT)
    config = replace(TINY_DIT, patch_size=3, attention_head_dim=5, norm_eps=0.0, out_channels=0)
    with pytest.raises(UserError) as caught:
        DiT(config)
    assert str(caught.value).count("\n  - ") == 5  # nor do the sinusoids divide 10 channels
    run = replace(PRESETS["digits-dit"](), model=config)
    assert {"model.patch_size", "model.attention_head_dim", "model.norm_eps"} <= {
        str(problem.field) for problem in problems(run)
    }
