"""The transformer with a text, a vector, or images that are not square."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import TINY_DIT
from tests.unit.test_networks import FakeXformers, install, randomised
from torch import Tensor

from ddpm_engine.cli.train import parse
from ddpm_engine.config import RunConfig, dump_config, from_dict, to_dict
from ddpm_engine.errors import UserError
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.dit.config import DiTConfig
from ddpm_engine.networks.dit.dit import DiT
from ddpm_engine.networks.half_weights import in_half
from ddpm_engine.networks.text_attention import Text
from ddpm_kernels.dispatch import force_ops

PLAIN = DiTConfig(
    sample_size=8, in_channels=3, out_channels=3, num_layers=2, num_attention_heads=2,
    attention_head_dim=8, text_channels=10,
)  # fmt: skip
MODERN = replace(TINY_DIT, text_channels=10, vector_channels=5, num_class_embeds=4)
CONFIGS = {
    "cross": PLAIN,
    "joint": replace(PLAIN, text="joint"),
    "cross and everything": MODERN,
    "joint and everything": replace(MODERN, text="joint", shared_embedding=False),
}
over_texts = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
over_kinds = pytest.mark.parametrize("text", ["cross", "joint"])


def inputs(config: DiTConfig, length: int = 4) -> tuple[Tensor, Tensor, Conditioning]:
    """Return three images, noise levels, and whatever conditions the network has."""
    generator = torch.Generator().manual_seed(1)
    text, vector, classes = config.text_channels, config.vector_channels, config.num_class_embeds
    mask = torch.arange(length) < torch.tensor([[2], [4], [1]])
    given = Conditioning(
        labels=None if classes is None else torch.tensor([0, 3, 1]),
        text=None if text is None else torch.randn(3, length, text, generator=generator),
        text_mask=None if text is None else mask,
        vector=None if vector is None else torch.randn(3, vector, generator=generator),
    )
    shape = (3, *build_network(config).sample_shape)
    return torch.randn(shape, generator=generator), torch.tensor([0, 400, 999]), given


def gradients(network: Network, x: Tensor, t: Tensor, given: Conditioning) -> dict[str, Tensor]:
    network.zero_grad()
    network(x, t, given).square().sum().backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


# --- What a text does


@over_texts
def test_begins_at_zero_and_every_weight_learns(config: DiTConfig) -> None:
    network, (x, t, given) = build_network(config), inputs(config)
    assert torch.equal(network(x, t, given), torch.zeros_like(x))
    network = randomised(config).double()
    found = gradients(network, x.double(), t, given.map(_double))
    assert found.keys() == dict(network.named_parameters()).keys()
    for name, gradient in found.items():
        if not name.endswith("k_proj.bias") and not name.endswith("to_k.bias"):
            assert gradient.abs().max() > 0, name


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@over_texts
def test_each_condition_matters(config: DiTConfig) -> None:
    network, (x, t, given) = randomised(config), inputs(config)
    spec = network.conditioning
    assert spec == ConditioningSpec(
        classes=None if config.num_class_embeds is None else 3,
        text=10,
        vector=config.vector_channels,
    )
    y = network(x, t, given)
    assert given.text is not None
    others = [replace(given, text=given.text + 1), given.null(spec)]
    if given.vector is not None and given.labels is not None:
        others += [replace(given, vector=-given.vector), replace(given, labels=(given.labels + 1))]
    for other in others:
        other = replace(other, labels=None if other.labels is None else other.labels % 4)
        assert ((network(x, t, other) - y).abs().amax((1, 2, 3)) > 1e-5).all()


@over_texts
def test_padding_changes_nothing(config: DiTConfig) -> None:
    network, (x, t, given) = randomised(config), inputs(config)
    y = network(x, t, given)
    assert given.text is not None
    assert given.text_mask is not None
    noise = torch.where(given.text_mask[:, :, None], given.text, torch.full_like(given.text, 7e3))
    assert torch.equal(network(x, t, replace(given, text=noise)), y)
    longer = replace(
        given,
        text=torch.nn.functional.pad(given.text, (0, 0, 0, 5)),
        text_mask=torch.nn.functional.pad(given.text_mask, (0, 5)),
    )
    torch.testing.assert_close(network(x, t, longer), y, atol=1e-5, rtol=1e-5)
    # Nor does a mask that masks nothing, or a batch.
    whole = network(x, t, replace(given, text_mask=torch.ones_like(given.text_mask)))
    torch.testing.assert_close(
        network(x, t, replace(given, text_mask=None)), whole, atol=1e-5, rtol=1e-5
    )
    alone = network(x[2:], t[2:], given.select(slice(2, 3)))
    torch.testing.assert_close(alone, y[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_joint_attention_is_attention_over_both(qk_norm: bool) -> None:
    config = replace(PLAIN, text="joint", qk_norm=qk_norm)
    network, (_, _, given) = randomised(config).double(), inputs(config)
    assert isinstance(network, DiT)
    assert network.caption_projection is not None
    assert given.text is not None
    assert given.text_mask is not None
    layer: Any = network.transformer_blocks[0].attn1
    x = torch.randn(3, 5, config.channels, dtype=torch.float64)
    tokens = network.caption_projection(given.text.double())
    from_text = network.precompute(given.map(_double)).text_projections
    assert from_text is not None
    torch.testing.assert_close(from_text[..., : 2 * config.channels], layer.project_text(tokens))

    def heads(y: Tensor, norm: Any = None) -> Tensor:
        y = y.unflatten(2, (2, 8))
        return y if norm is None else norm(y)

    query, norm = heads(layer.to_q(x), layer.norm_q), layer.norm_k
    key = torch.cat([heads(layer.to_k(x), norm), heads(layer.add_k_proj(tokens), norm)], 1)
    value = torch.cat([heads(layer.to_v(x)), heads(layer.add_v_proj(tokens))], 1)
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) / 8**0.5
    allowed = torch.cat([torch.ones(3, 5, dtype=torch.bool), given.text_mask], 1)
    weights = scores.masked_fill(~allowed[:, None, None], -torch.inf).softmax(-1)
    expected = layer.to_out[0](torch.einsum("bhlm,bmhd->blhd", weights, value).flatten(2))
    actual = layer(x, None, Text(tokens, given.text_mask, projected=False))
    torch.testing.assert_close(actual, expected)


# --- Ways to run


@over_texts
def test_keys_and_values_computed_once(config: DiTConfig) -> None:
    network, (x, t, given) = randomised(config), inputs(config)
    for rows in (given, given.null(network.conditioning)):
        once = network.precompute(rows)
        assert once.text is None
        assert once.text_projections is not None
        assert once.text_projections.shape == (3, 4, 2 * 2 * config.channels)
        assert torch.equal(network(x, t, once), network(x, t, rows))
        assert network.precompute(once).layout() == once.layout()


@over_texts
def test_recomputation_and_registered_operations_leave_the_gradients(config: DiTConfig) -> None:
    network, (x, t, given) = randomised(config), inputs(config)
    expected = gradients(network, x, t, given)
    network.recompute("blocks")
    for name, gradient in gradients(network, x, t, given).items():
        assert torch.equal(gradient, expected[name]), name
    with force_ops():
        for name, gradient in gradients(network, x, t, given).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-3, msg=name)


@over_texts
def test_half_precision(config: DiTConfig) -> None:
    network, (x, t, given) = randomised(config).eval(), inputs(config)
    expected = network(x, t, given).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = network(x, t, given)
        shadow = in_half(network, torch.bfloat16)
        assert torch.equal(shadow(x, t, given), half)
        assert torch.equal(shadow(x, t, shadow.precompute(given)), half)
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()
    weights = network.to(torch.bfloat16)(x, t, given)
    assert (weights - expected).abs().max() < 0.1 * expected.abs().max()


@over_kinds
def test_compiled_blocks(text: Any) -> None:
    config = replace(MODERN, text=text)
    network, (x, t, given) = randomised(config).eval(), inputs(config)
    with torch.no_grad():
        expected, once = network(x, t, given), network.precompute(given)
        network.compile_blocks(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(network(x, t, given), expected)
        torch.testing.assert_close(network(x, t, once), expected)


class MaskedXformers(FakeXformers):
    """Takes a mask, as xformers does: what is added to the products of queries and keys."""

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        scores = torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
        scores = scores if bias is None else scores + bias
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)


@over_kinds
def test_xformers(monkeypatch: pytest.MonkeyPatch, text: Any) -> None:
    config = replace(MODERN, text=text)
    x, t, given = inputs(config)
    expected = randomised(config)(x, t, given)
    install(monkeypatch, MaskedXformers(), cuda=True)
    network = randomised(replace(config, attention="xformers"))
    torch.testing.assert_close(network(x, t, given), expected, atol=1e-5, rtol=1e-5)


# --- Height and width


def test_images_that_are_not_square() -> None:
    config = replace(MODERN, sample_size=(4, 12))
    network, (x, t, given) = randomised(config), inputs(config)
    assert network.sample_shape == (3, 4, 12)
    assert x.shape == network(x, t, given).shape == (3, 3, 4, 12)
    # Positions count from 0 in both directions: a square of the same patches has the same.
    square = randomised(replace(MODERN, sample_size=(4, 4)))
    same = randomised(replace(MODERN, sample_size=4))
    assert torch.equal(square(x[..., :4], t, given), same(x[..., :4], t, given))
    turned = replace(config, sample_size=(12, 4))
    assert not torch.allclose(randomised(turned)(x, t, given), network(x, t, given))


def test_an_option_for_height_and_width(tmp_path: Path) -> None:
    run = RunConfig(model=replace(MODERN, sample_size=(4, 12)))
    assert from_dict(to_dict(run), "it") == run
    (tmp_path / "config.json").write_text(dump_config(run))
    given = ["--config", str(tmp_path / "config.json")]
    assert parse(given).run.model == run.model
    for size, values in (((6, 8), ["6", "8"]), (16, ["16"])):
        changed = parse([*given, "--model.sample-size", *values]).run.model
        assert changed == replace(run.model, sample_size=size)


# --- What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, r"conditioned on text: give text, \[B, L, 10\]"),
        ({"text_projections": torch.zeros(3, 4, 64)}, "conditioned on text: give text"),
        ({"text": torch.zeros(3, 4, 7)}, "text has 7 channels.* built for 10"),
        ({"vector": None}, r"give vector, \[B, 5\]"),
        ({"vector": torch.zeros(3, 6)}, "vector has 6 channels.* built for 5"),
    ],
)
def test_conditions_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    network, (x, t, given) = build_network(MODERN), inputs(MODERN)
    with pytest.raises(ValueError, match=message):
        network(x, t, replace(given, **change))


def test_conditions_of_other_networks() -> None:
    network, (x, t, _) = build_network(TINY_DIT), inputs(TINY_DIT)
    mask = torch.ones(3, 2, dtype=torch.bool)
    for given, message in [
        (Conditioning(text=torch.zeros(3, 2, 10), text_mask=mask), "not conditioned on text"),
        (Conditioning(text_mask=mask), "not conditioned on text"),
        (Conditioning(vector=torch.zeros(3, 5)), "vector given, but .* not conditioned on one"),
    ]:
        with pytest.raises(ValueError, match=message):
            network(x, t, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "mixed"}, "`text` is 'mixed'; it must be 'cross' or 'joint'"),
        ({"text_channels": 0}, "`text_channels` is 0"),
        ({"vector_channels": 0}, "`vector_channels` is 0"),
        ({"sample_size": (4, 9)}, r"patches must divide the `sample_size` 4×9 into whole ones"),
        ({"sample_size": (4, 0)}, r"`sample_size` is \(4, 0\); each must be at least 1"),
    ],
)
def test_impossible_shape(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiT(replace(MODERN, **change))


@over_kinds
def test_diffusers_has_no_such_network(text: Any, tmp_path: Path) -> None:
    config = replace(PLAIN, text=text, vector_channels=5, sample_size=(4, 8))
    with pytest.raises(UserError, match="DiTTransformer2DModel of diffusers") as caught:
        DiT(config).save_pretrained(tmp_path / "out")
    for named in ("`model.text_channels` is 10", "`model.vector_channels` is 5", "is 4×8"):
        assert named in str(caught.value)
