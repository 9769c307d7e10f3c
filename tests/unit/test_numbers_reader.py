"""The reader of two-digit numbers, its features, and image embeddings made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_engine.data.packing.embeddings import ImageEmbedder, embed_images
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.evaluation.feature_networks import NumberFeatures, feature_network
from ddpm_engine.evaluation.image_embeddings import image_embedder
from ddpm_engine.evaluation.numbers import (
    NumberReader,
    halves_of,
    number_reader,
    seen_pairs,
    unseen_pairs,
)
from ddpm_engine.evaluation.sources import open_real_images


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reader() -> NumberReader:
    return number_reader(8)


def test_digits_that_it_never_saw_are_read(reader: NumberReader) -> None:
    unseen = unseen_pairs(8, 1000)
    assert reader.right(unseen.images, unseen.numbers).mean() > 0.99
    assert len(np.unique(unseen.numbers)) > 90


def test_both_digits_must_be_right(reader: NumberReader) -> None:
    pairs = seen_pairs(8, 50)
    numbers = reader.read(pairs.images)
    assert numbers.dtype == np.int64
    tens, units = np.divmod(numbers, 10)
    assert not reader.right(pairs.images, 10 * tens + (units + 1) % 10).any()
    assert not reader.right(pairs.images, 10 * ((tens + 1) % 10) + units).any()
    swapped = np.concatenate(np.split(pairs.images, 2, axis=2)[::-1], axis=2)
    assert np.array_equal(reader.read(swapped), 10 * units + tens)


def test_seen_and_unseen_pairs_share_no_digit() -> None:
    seen, unseen = (
        {half.tobytes() for half in halves_of(pairs.images)}
        for pairs in (seen_pairs(8, 2000), unseen_pairs(8, 2000))
    )
    assert not seen & unseen


def test_the_source_of_numbers_is_read_as_captioned() -> None:
    examples = open_source("numbers:held-out").examples[::7]
    right = number_reader(16).right(
        np.stack([example.image for example in examples]),
        [int(example.captions[2].split()[-1]) for example in examples],
    )
    assert right.mean() > 0.99


def test_images_of_another_shape_are_refused(reader: NumberReader) -> None:
    with pytest.raises(UserError, match="images are 16×32; this reader takes 8×16"):
        reader.read(np.zeros((1, 16, 32, 1), np.uint8))
    for shape in ((1, 8, 8, 1), (1, 8, 16, 3)):
        with pytest.raises(UserError, match="twice as wide as high"):
            reader.read(np.zeros(shape, np.uint8))
    assert reader.read(np.zeros((0, 8, 16, 1), np.uint8)).shape == (0,)


def test_features_of_a_number_are_those_of_its_digits(cache: Path) -> None:
    network = feature_network("numbers", 8, cache=cache)
    assert isinstance(network, NumberFeatures)
    pairs = seen_pairs(8, 300)
    rows = network(pairs.images)
    assert rows.shape == (300, network.features + network.outputs)
    single = digit_classifier(8, cache)
    left, right = np.split(pairs.images, 2, axis=2)
    np.testing.assert_allclose(rows[:, :128], single.features(left))
    np.testing.assert_allclose(rows[:, 128:256], single.features(right))
    shown = pairs.numbers >= 10
    found = rows[:, network.features :].argmax(1) + 10
    assert (found == pairs.numbers)[shown].mean() > 0.97
    with pytest.raises(UserError, match="not 8×16"):
        network(np.zeros((1, 8, 8, 1), np.uint8))


def test_embeddings_have_about_unit_variance(cache: Path) -> None:
    embedder: ImageEmbedder = image_embedder("numbers", (8, 16), cache=cache)
    embeddings = embed_images(embedder, unseen_pairs(8, 1000).images)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (1000, embedder.channels)
    assert abs(embeddings.mean()) < 0.1
    assert 0.5 < embeddings.std() < 1.2
    assert np.abs(embeddings).max() < 30


def test_an_embedding_does_not_depend_on_its_batch(cache: Path) -> None:
    embedder = image_embedder("digits", 8, cache=cache)
    images = np.stack([example.image for example in open_source("digits").examples[:9]])
    together = embedder.embed(images)
    alone = np.concatenate([embedder.embed(images[k : k + 1]) for k in range(9)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_fingerprints_name_the_space(cache: Path) -> None:
    made = [image_embedder("numbers", (8, 16), cache=cache) for _ in range(2)]
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].fingerprint != image_embedder("digits", 8, cache=cache).fingerprint


def test_unknown_embeddings_and_other_sizes_are_refused(cache: Path) -> None:
    with pytest.raises(UserError, match="`image_features` is 'clip'; there are digits") as caught:
        image_embedder("clip", 8, cache=cache)
    assert caught.value.field == "image_features"
    with pytest.raises(UserError, match="images of 8×16 pixels; these have 8×8"):
        image_embedder("numbers", 8, cache=cache)


def test_real_images_need_not_be_square(tmp_path: Path) -> None:
    source = open_source("numbers:held-out")
    write_shards(replace(source, examples=source.examples[:6]), tmp_path / "shards")
    stored = np.stack([example.image for example in source.examples[:6]])
    whole = open_real_images(str(tmp_path / "shards"), (16, 32, 1))
    assert np.array_equal(whole.read(range(6)), stored)
    assert "part of these proportions" in whole.rule
    half = open_real_images(str(tmp_path / "shards"), (8, 16, 1))
    assert half.read([0]).shape == (1, 8, 16, 1)
    square = open_real_images(str(tmp_path / "shards"), (16, 16, 1))
    assert np.array_equal(square.read(range(6)), stored[:, :, 8:24])
    assert "central square" in square.rule
