"""What the network's passes fuse changes a run's losses by rounding only, each fusion by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.integration.test_resume import loss_log
from torch import Tensor

from ddpm_engine.config import RunConfig
from ddpm_engine.networks import linear
from ddpm_engine.networks.unet import blocks, features, norm
from ddpm_engine.training.trainer import Trainer
from ddpm_kernels.dispatch import force_ops
from ddpm_kernels.dropout import dropout as drop
from ddpm_kernels.group_norm_silu import op as norm_op
from ddpm_kernels.residual_sum import op as residual_op

STEPS = 8
_norm, _residual = norm.group_norm_silu_residual, features.residual


def with_vector_added_before(x: Tensor, *arguments: Any, **options: Any) -> Any:
    """Add the vector in a pass of its own."""
    if (before := options.pop("before", None)) is not None:
        x = x + before[:, :, None, None]
    return _norm(x, *arguments, **options)


def with_dropout_after(*arguments: Any, dropout: Any = None, **options: Any) -> Any:
    """Drop in a pass of its own."""
    y, *inputs = _norm(*arguments, **options)
    return (y if dropout is None else drop(y, dropout), *inputs)


def with_gradients_added_by_autograd(*arguments: Any, owed: Any, **options: Any) -> Any:
    """Hand the inputs on outside, and sum the biases' gradients in passes of their own."""
    with patch.object(norm_op, "traces_gradients", lambda _: True):
        return _norm(*arguments, owed=owed, **options)


def with_two_copies(inputs: tuple[features.Features, ...]) -> tuple[features.Features, ...]:
    """Concatenate."""
    inputs = tuple(each.settled() for each in inputs)
    return (features.Features(torch.cat([each.map for each in inputs], dim=1)),)


def without_moments(*arguments: Any, **options: Any) -> features.Features:
    """Let the norm that follows take them."""
    return _residual(*arguments, **options)._replace(moments=None)


def by_each_layer(layers: Any, x: Tensor, added: Any = ()) -> tuple[Tensor, ...]:
    """Apply one layer after another."""
    outputs = tuple(layer(x) for layer in layers)
    return tuple(y + more for y, more in zip(outputs, added, strict=True)) if added else outputs


UNFUSED: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "none": [],
    "vector": [(norm, "group_norm_silu_residual", with_vector_added_before)],
    "dropout": [(norm, "group_norm_silu_residual", with_dropout_after)],
    "gradients": [(norm, "group_norm_silu_residual", with_gradients_added_by_autograd)],
    "concatenation": [(blocks, "joined", with_two_copies)],
    "moments": [(blocks, "residual", without_moments), (features, "residual", without_moments)],
    "products": [(blocks, "apply_together", by_each_layer)],
    "biases": [(linear, "takes_op", lambda _: False)],
}


@contextmanager
def without(fusion: str) -> Iterator[list[int]]:
    """Undo one fusion; the list says how often it would have been taken."""
    calls = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        # So that moments are kept of these small maps, too.
        stack.enter_context(patch.object(residual_op, "fits_on_chip", lambda _: False))
        for module, name, function in UNFUSED[fusion]:
            stack.enter_context(patch.object(module, name, counted(function)))
        yield calls


def losses(config: RunConfig) -> Tensor:
    """The loss of each step."""
    Trainer(config).fit()
    return torch.tensor([row[1] for row in loss_log(config.out)], dtype=torch.float64)


@pytest.mark.parametrize("classes", [None, 11], ids=["unconditional", "by class"])
def test_a_run_is_that_of_plain_operations(config: RunConfig, classes: int | None) -> None:
    """By torch's own operations, by all that is fused, and with each fusion undone."""
    config = replace(
        config,
        model=replace(config.model, num_class_embeds=classes),
        training=replace(config.training, steps=STEPS),
        log=replace(config.log, every=1, checkpoint_every=STEPS),
    )
    plain = losses(replace(config, out=config.out / "plain"))
    assert plain.isfinite().all()
    assert len(plain) == STEPS
    for fusion in UNFUSED:
        with force_ops(), without(fusion) as calls:
            found = losses(replace(config, out=config.out / fusion))
        assert (calls[0] > 0) == (fusion != "none"), fusion
        torch.testing.assert_close(found, plain, rtol=2e-5, atol=0, msg=fusion)
