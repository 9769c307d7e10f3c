"""The model of a training step's memory: against tensors that are there, and for the presets."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import TINY, TINY_DIT
from torch import Tensor, nn

from ddpm_engine.config import RunConfig, TrainingConfig
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet import unet as unet_module
from ddpm_engine.presets import PRESETS
from ddpm_engine.training import memory_advice
from ddpm_engine.training.memory_advice import advise_on_memory
from ddpm_engine.training.step_memory import (
    RESERVED,
    LiveMemory,
    StepMemory,
    step_memory,
    traced,
)
from ddpm_engine.training.strategies.launcher_env import Request
from ddpm_kernels.dispatch import force_ops

GPU = torch.device("cuda", 0)
CARD = 85_000_000_000
"""What torch reports of a GPU with "80 GB", in bytes, rounded down."""


def tiny(**training: Any) -> RunConfig:
    return RunConfig(model=TINY, training=TrainingConfig(batch_size=64, **training))


def on_meta(config: RunConfig) -> Network:
    with torch.device("meta"):
        return build_network(config.model).train()


def saved_bytes(network: Network, batch: int) -> int:
    """Bytes that torch keeps for the backward pass of a network that is really computed."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, index = torch.randn(batch, *network.sample_shape), torch.zeros(batch, dtype=torch.int64)
    with force_ops(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = network(x, index, Conditioning())
        # The graph holds what was packed: no address is used twice.
        total = sum(kept.values()) - kept.get(x.untyped_storage().data_ptr(), 0)
        del prediction
    return total


def test_what_is_kept_is_what_torch_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet_module, "_memory_format", lambda _: torch.channels_last)
    network = build_network(TINY).train()
    batch = 64
    modelled, peak = traced(on_meta(tiny()), batch)
    # The kernel of attention keeps a little more on GPUs: sums for 32 pixels at least.
    assert traced(network, batch) == pytest.approx((modelled, peak), rel=0.015)
    output = 4 * batch * 3 * 8 * 8
    assert modelled - output == pytest.approx(saved_bytes(network, batch), rel=0.02)
    gradients = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert peak > modelled + output  # the gradient of the prediction, at least
    assert peak < 2 * modelled + gradients


def test_a_text_is_counted_with_its_length() -> None:
    with_text = replace(TINY_DIT, text_channels=6, vector_channels=5)
    kept = [
        traced(on_meta(replace(tiny(), model=model)), 4, text_length=length)[0]
        for model, length in ((TINY_DIT, 8), (with_text, 8), (with_text, 16))
    ]
    assert kept[0] < kept[1] < kept[2]
    # Keys and values of each block grow with the text, and no matrix of all pairs is held.
    width = TINY_DIT.num_attention_heads * TINY_DIT.attention_head_dim
    per_token = 4 * 4 * width * TINY_DIT.num_layers
    assert 8 * per_token <= kept[2] - kept[1] <= 8 * 8 * per_token


def test_storages_are_counted_until_nothing_refers_to_them() -> None:
    given = torch.zeros(100)
    with LiveMemory([given]) as live:
        assert torch.relu(given[:50]).numel() == 50
        assert (live.now, live.peak) == (0, 200)
        a = given + 1
        view = a.view(10, 10).t()
        a.mul_(2)
        assert live.now == 400
        del a
        assert live.now == 400
        del view
        assert (live.now, live.peak) == (0, 400)
        b = torch.empty(50, dtype=torch.bfloat16)
        assert live.now == 100
    del b
    assert live.now == 0


def test_a_network_of_one_layer_by_hand() -> None:
    layer = nn.Linear(10, 20, bias=False, device="meta")
    x = torch.empty(8, 10, device="meta", requires_grad=True)
    with LiveMemory([x, *layer.parameters()]) as live:
        y = layer(x).relu()
        # The product and its positive part, of which the former is freed.
        assert (live.now, live.peak) == (4 * 160, 4 * 320)
        y.backward(torch.ones_like(y))
    # y, its gradient, that of the product; then x's and the weight's.
    assert live.peak == 4 * (160 + 160 + 160 + 80 + 200)


def test_state_and_precision() -> None:
    count = sum(p.numel() for p in on_meta(tiny()).parameters())
    plain = step_memory(tiny(precision="no"))
    assert (plain.weights, plain.moments, plain.averages) == (4 * count, 8 * count, 4 * count)
    assert plain.gradients == 0
    assert plain.total == 16 * count + plain.kept + plain.backward

    half = step_memory(tiny(precision="bf16", ema_sigma_rel=(0.1, 0.2)))
    assert 5.5 * count < half.weights < 6 * count
    assert half.averages == 12 * count
    assert 0.5 * plain.kept < half.kept < 0.55 * plain.kept

    pieces = step_memory(tiny(precision="no", accumulation=4))
    assert pieces.gradients == 4 * count
    assert plain.divided(4).gradients == pieces.gradients
    assert plain.divided(4).kept == pytest.approx(pieces.kept, rel=0.02)
    assert step_memory(tiny(precision="no"), ranks=4) == pieces
    sharded = step_memory(tiny(precision="no"), ranks=4, shards=4)
    assert (sharded.state, sharded.kept) == (pieces.state // 4, pieces.kept)


def test_recomputation_keeps_less() -> None:
    plain, norms, blocks = (
        step_memory(tiny(precision="bf16", recompute=recompute))
        for recompute in ("none", "norms", "blocks")
    )
    assert norms.kept < 0.75 * plain.kept
    assert blocks.kept < 0.6 * plain.kept
    assert norms.total < plain.total
    assert blocks.total < plain.total


def test_the_256_pixel_presets_fit_a_card_of_80_gb() -> None:
    """In the precision that auto gives it; in float32 with the accumulation that is advised."""
    celeba, lsun = PRESETS["celebahq256"](), PRESETS["lsun256"]()
    assert (celeba.model, celeba.training.batch_size) == (lsun.model, lsun.training.batch_size)
    assert lsun.training.precision == "auto"
    half, plain = (
        step_memory(replace(lsun, training=replace(lsun.training, precision=precision)))
        for precision in ("bf16", "no")
    )
    assert half.kept == pytest.approx(41.7e9, rel=0.01)  # the figure of docs/training-at-scale.md
    assert half.total + RESERVED < CARD
    assert plain.total > CARD
    assert plain.divided(2).total + RESERVED < CARD


GB = 10**9
MODEL = StepMemory(weights=GB, moments=2 * GB, averages=GB, gradients=0, kept=60 * GB, backward=GB)


@pytest.mark.parametrize(
    ("training", "room", "advice"),
    [
        ({}, 65, None),
        ({}, 64, "let `training.accumulation` be 2 (35.5 GB)"),
        ({}, 35, "let `training.accumulation` be 4 (20.2 GB)"),
        ({"accumulation": 2}, 64, "let `training.accumulation` be 4 (35.5 GB)"),
        ({"batch_size": 6}, 35, "let `training.accumulation` be 3 (25.3 GB)"),
        ({}, 5, "let `training.recompute` be blocks"),
        ({"recompute": "blocks"}, 5, "processes, with launch/accelerate/fsdp2.yaml"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would(
    training: dict[str, Any],
    room: int,
    advice: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(memory_advice, "device_memory", lambda _: RESERVED + room * GB)
    monkeypatch.setattr(memory_advice, "step_memory", lambda *_: MODEL)
    config = tiny(precision="no")
    config = replace(config, training=replace(config.training, **training))
    advise_on_memory(config, Request(1), GPU)
    if advice is None:
        assert caplog.text == ""
    else:
        assert "a step is modelled to take 65.0 GB: 4.0 of state, 60.0 that the" in caplog.text
        assert f"cuda:0 has {room + 3.2:.1f}" in caplog.text
        assert caplog.text.endswith(f"{advice}\n")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(1), (1, 1)),
        (Request(4), (4, 1)),
        (Request(4, fsdp=True), (4, 4)),
        (Request(4, deepspeed={}), (4, 4)),
    ],
)
def test_what_processes_share(
    request_: Request, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def note(config: RunConfig, ranks: int, shards: int) -> StepMemory:
        asked.append((ranks, shards))
        return MODEL

    monkeypatch.setattr(memory_advice, "device_memory", lambda _: 2**40)
    monkeypatch.setattr(memory_advice, "step_memory", note)
    advise_on_memory(tiny(), request_, GPU)
    assert asked == [expected]


def test_a_network_that_cannot_be_traced_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def untraceable(*_: Any) -> Any:
        raise NotImplementedError("Cannot copy out of meta tensor")

    monkeypatch.setattr(memory_advice, "device_memory", lambda _: 1)
    monkeypatch.setattr(memory_advice, "step_memory", untraceable)
    with caplog.at_level(logging.DEBUG):
        advise_on_memory(tiny(precision="no"), Request(1), GPU)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_nothing_is_traced_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_advice, "step_memory", lambda *_: pytest.fail("traced"))
    advise_on_memory(tiny(precision="no"), Request(1), torch.device("cpu"))
