"""Text, vectors and embeddings of a batch on their way to the network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.super_resolution import downsample, upsample
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_kernels import Stream, bernoulli

COUNT = 200
POSITIONS = torch.arange(COUNT) + 2**33
SPEC = ConditioningSpec(classes=10, text=6, vector=3)
BOTH_SIDES = (4, 8)


def batch(positions: Tensor = POSITIONS) -> Batch:
    """A batch in which every position has its own label, text, pooled text and embedding."""

    def rows(*shape: int) -> Tensor:
        rows = []
        for position in positions.tolist():
            rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(position)))
        return torch.stack(rows)

    lengths = positions % 4 + 1
    return Batch(
        images=(rows(1, *BOTH_SIDES).sigmoid() * 255).to(torch.uint8),
        labels=positions % 10,
        positions=positions,
        text=rows(4, 6).half(),
        text_mask=torch.arange(4) < lengths[:, None],
        pooled_text=rows(3).half(),
        embeddings=rows(3),
    )


def test_a_sample_keeps_or_loses_all_its_conditions_together() -> None:
    inputs = TrainingInputs(3, SPEC, condition_dropout=0.3)
    given = inputs.prepare(batch()).conditioning
    dropped = bernoulli(3, POSITIONS, 0.3, 0, Stream.LABEL_DROPOUT)
    assert 0.2 < dropped.float().mean() < 0.4
    stored = batch()
    null = Conditioning(
        stored.labels, text=stored.text, text_mask=stored.text_mask, vector=stored.pooled_text
    ).null(SPEC)
    for name, kept in (
        ("labels", stored.labels), ("text", stored.text), ("text_mask", stored.text_mask),
        ("vector", stored.pooled_text),
    ):  # fmt: skip
        assert kept is not None
        got, none = getattr(given, name), getattr(null, name)
        assert torch.equal(got[~dropped], kept[~dropped].to(got.dtype)), name
        assert torch.equal(got[dropped], none[dropped].to(got.dtype)), name
    assert given.text is not None
    assert given.text.dtype == torch.float32


def test_conditions_depend_on_the_position_alone() -> None:
    inputs = TrainingInputs(-1, SPEC, condition_dropout=0.4)
    whole = inputs.prepare(batch()).conditioning
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:31]
    part = inputs.prepare(batch(POSITIONS[order])).conditioning
    assert set(part.present()) == {"labels", "text", "text_mask", "vector", "dropout_key"}
    for name, tensor in part.present().items():
        assert torch.equal(tensor, whole.present()[name][order]), name


def test_labels_are_those_of_a_network_that_has_no_text() -> None:
    with_text = TrainingInputs(3, SPEC, condition_dropout=0.3).prepare(batch()).conditioning
    plain = TrainingInputs(3, ConditioningSpec(classes=10), condition_dropout=0.3)
    without = plain.prepare(batch()).conditioning
    assert without.text is None
    assert without.labels is not None
    assert with_text.labels is not None
    assert torch.equal(with_text.labels, without.labels)


def test_the_vector_may_be_the_embedding_of_the_image() -> None:
    spec = ConditioningSpec(vector=3)
    prepared = TrainingInputs(3, spec, vector="image").prepare(batch())
    stored = batch().embeddings
    assert prepared.conditioning.vector is not None
    assert stored is not None
    assert torch.equal(prepared.conditioning.vector, stored * 1.0)
    assert torch.equal(prepared.images, batch().images)


def test_embeddings_are_images_of_one_pixel() -> None:
    prepared = TrainingInputs(3, ConditioningSpec(text=6), diffuse="embeddings").prepare(batch())
    stored = batch().embeddings
    assert stored is not None
    assert torch.equal(prepared.images, stored[:, :, None, None])
    assert prepared.conditioning.text is not None


@pytest.mark.parametrize(
    ("missing", "spec", "message"),
    [
        ("text", ConditioningSpec(text=6), "conditioned on text needs embeddings of captions"),
        ("pooled_text", ConditioningSpec(vector=3), "a vector needs embeddings of captions"),
        ("embeddings", ConditioningSpec(vector=3), "a vector needs embeddings of images"),
    ],
)
def test_missing_conditions_are_refused(missing: str, spec: ConditioningSpec, message: str) -> None:
    inputs = TrainingInputs(0, spec, vector="image" if missing == "embeddings" else "text")
    without: dict[str, Any] = {missing: None}
    with pytest.raises(ValueError, match=message):
        inputs.prepare(replace(batch(), **without))
    with pytest.raises(ValueError, match="embeddings are diffused"):
        TrainingInputs(0, diffuse="embeddings").prepare(replace(batch(), embeddings=None))


def test_low_resolution_images_need_not_be_square() -> None:
    spec = ConditioningSpec(text=6, low_resolution=(2, 4))
    given = TrainingInputs(3, spec, horizontal_flip=False).prepare(batch()).conditioning
    images = batch().images
    low = downsample(images, (2, 4))
    blocks = (2 * images.double() / 255 - 1).reshape(COUNT, 1, 2, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(low.double(), blocks, rtol=0, atol=1e-6)
    assert given.low_resolution is not None
    assert torch.equal(given.low_resolution, upsample(low, BOTH_SIDES))
    assert given.text is not None
