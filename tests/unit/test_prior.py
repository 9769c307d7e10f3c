"""The prior: vectors as images of one pixel, from text, classes and vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm_engine
from ddpm_engine.cli.train import parse
from ddpm_engine.config import RunConfig, dump_config, from_dict, to_dict
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.half_weights import in_half
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_kernels.dispatch import force_ops

TINY_PRIOR = PriorConfig(
    in_channels=6, out_channels=6, num_layers=2, num_attention_heads=2, attention_head_dim=8
)
OF_TEXT = replace(TINY_PRIOR, text_channels=10)
EVERYTHING = replace(OF_TEXT, vector_channels=5, num_class_embeds=4)
CONFIGS = {"alone": TINY_PRIOR, "text": OF_TEXT, "everything": EVERYTHING}
over_priors = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def randomised(config: PriorConfig) -> Network:
    torch.manual_seed(0)
    network = build_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def inputs(config: PriorConfig, length: int = 4) -> tuple[Tensor, Tensor, Conditioning]:
    """Return three vectors, noise levels, and whatever conditions the network has."""
    generator = torch.Generator().manual_seed(1)
    text, vector, classes = config.text_channels, config.vector_channels, config.num_class_embeds
    mask = torch.arange(length) < torch.tensor([[2], [4], [1]])
    given = Conditioning(
        labels=None if classes is None else torch.tensor([0, 3, 1]),
        text=None if text is None else torch.randn(3, length, text, generator=generator),
        text_mask=None if text is None else mask,
        vector=None if vector is None else torch.randn(3, vector, generator=generator),
    )
    x = torch.randn(3, config.in_channels, 1, 1, generator=generator)
    return x, torch.tensor([0, 400, 999]), given


@over_priors
def test_begins_at_zero_and_learns(config: PriorConfig) -> None:
    network, (x, t, given) = build_network(config), inputs(config)
    assert torch.equal(network(x, t, given), torch.zeros_like(x))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    # The first step moves the output, the second the modulations, the third what they gate.
    for _ in range(4):
        optimizer.zero_grad()
        (network(x, t, given) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("to_k.bias"):  # to which softmax is blind
            assert parameter.grad.abs().max() > 0, name


def test_each_condition_matters() -> None:
    network, (x, t, given) = randomised(EVERYTHING), inputs(EVERYTHING)
    y = network(x, t, given)
    assert given.text is not None
    assert given.vector is not None
    for other in (
        replace(given, labels=torch.tensor([1, 2, 0])),
        replace(given, text=given.text + 1),
        replace(given, vector=-given.vector),
        given.null(network.conditioning),
    ):
        assert ((network(x, t, other) - y).abs().amax(1) > 1e-4).all()


def test_padding_changes_nothing() -> None:
    network, (x, t, given) = randomised(OF_TEXT), inputs(OF_TEXT)
    y = network(x, t, given)
    assert given.text is not None
    assert given.text_mask is not None
    noise = torch.where(given.text_mask[:, :, None], given.text, torch.full_like(given.text, 7e3))
    assert torch.equal(network(x, t, replace(given, text=noise)), y)
    longer = Conditioning(
        text=torch.nn.functional.pad(given.text, (0, 0, 0, 5)),
        text_mask=torch.nn.functional.pad(given.text_mask, (0, 5)),
    )
    torch.testing.assert_close(network(x, t, longer), y, atol=1e-6, rtol=1e-5)


@over_priors
def test_precomputed_conditions(config: PriorConfig) -> None:
    network, (x, t, given) = randomised(config), inputs(config)
    for rows in (given, given.null(network.conditioning)):
        once = network.precompute(rows)
        assert torch.equal(network(x, t, once), network(x, t, rows))
        assert once.text is None
        assert network.precompute(once).layout() == once.layout()


def test_samples_and_their_vectors_do_not_depend_on_the_batch() -> None:
    network, (x, t, given) = randomised(EVERYTHING), inputs(EVERYTHING)
    y = network(x, t, given)
    alone = network(x[1:2], t[1:2], given.select(slice(1, 2)))
    torch.testing.assert_close(alone, y[1:2], atol=1e-6, rtol=1e-5)


def test_registered_operations_and_recomputation_leave_the_gradients() -> None:
    network, (x, t, given) = randomised(EVERYTHING), inputs(EVERYTHING)

    def gradients() -> dict[str, Tensor]:
        network.zero_grad()
        network(x, t, given).square().sum().backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    expected = gradients()
    network.recompute("blocks")
    for name, gradient in gradients().items():
        assert torch.equal(gradient, expected[name]), name
    with force_ops():
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_compiled_blocks_and_half_precision() -> None:
    network, (x, t, given) = randomised(EVERYTHING).eval(), inputs(EVERYTHING)
    expected = network(x, t, given).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = network(x, t, given)
        shadow = in_half(network, torch.bfloat16)
        assert torch.equal(shadow(x, t, given), half)
        assert torch.equal(shadow(x, t, shadow.precompute(given)), half)
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()
    network.compile_blocks(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, given), expected)
        torch.testing.assert_close(network(x, t, network.precompute(given)), expected)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (OF_TEXT, {"text": None}, r"conditioned on text: give text, \[B, L, 10\]"),
        (OF_TEXT, {"text": torch.zeros(3, 4, 7)}, "text has 7 channels.* built for 10"),
        (TINY_PRIOR, {"text": torch.zeros(3, 4, 10)}, "not conditioned on text"),
        (EVERYTHING, {"vector": None}, r"give vector, \[B, 5\]"),
        (EVERYTHING, {"vector": torch.zeros(3, 6)}, "vector has 6 channels.* built for 5"),
        (OF_TEXT, {"vector": torch.zeros(3, 5)}, "not conditioned on one"),
        (EVERYTHING, {"labels": None}, "give labels.*null class is 3"),
        (OF_TEXT, {"labels": torch.zeros(3, dtype=torch.int64)}, "unconditional"),
        (OF_TEXT, {"low_resolution": torch.zeros(3, 6, 1, 1)}, "low_resolution"),
    ],
)
def test_conditions_that_do_not_fit(
    config: PriorConfig, change: dict[str, Any], message: str
) -> None:
    network, (x, t, given) = build_network(config), inputs(config)
    with pytest.raises(ValueError, match=message):
        network(x, t, replace(given, **change))


def test_images_are_refused() -> None:
    network, (_, t, _) = build_network(TINY_PRIOR), inputs(TINY_PRIOR)
    with pytest.raises(ValueError, match=r"8×8 pixels; a prior takes vectors"):
        network(torch.zeros(3, 6, 8, 8), t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 8}, r"`sample_size` is 8×8; .* it must be 1"),
        ({"sample_size": (1, 2)}, r"`sample_size` is 1×2"),
        ({"num_layers": 0}, "`num_layers` is 0"),
        ({"text_channels": 0}, "`text_channels` is 0"),
        ({"mlp_ratio": 0.01}, r"`mlp_ratio` is 0.01, which of 16 channels leaves none"),
        ({"attention": "flash"}, "`attention` is 'flash'"),
    ],
)
def test_impossible_shape(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_network(replace(TINY_PRIOR, **change))


def test_a_run_of_it_is_recorded_and_has_flags(tmp_path: Path) -> None:
    run = RunConfig(model=OF_TEXT)
    assert from_dict(to_dict(run), "it") == run
    (tmp_path / "config.json").write_text(dump_config(run))
    given = ["--config", str(tmp_path / "config.json"), "--model.num-layers", "3"]
    assert parse(given).run.model == replace(OF_TEXT, num_layers=3)


def test_samples_vectors_and_is_not_exported(tmp_path: Path) -> None:
    run = RunConfig(model=TINY_PRIOR)
    network = randomised(TINY_PRIOR).eval().requires_grad_(False)
    model = ddpm_engine.LoadedModel.from_config(network, run, "0" * 64)
    samples = model.sample(5, sampler="ddim", steps=3, seed=1).tensor
    assert samples.shape == (5, 6, 1, 1)
    assert torch.equal(model.sample(5, sampler="ddim", steps=3, seed=1).tensor, samples)
    with pytest.raises(UserError, match="a Prior, which diffusers does not have"):
        export_pipeline(model, tmp_path / "out")
