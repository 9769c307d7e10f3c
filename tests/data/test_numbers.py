"""The source of two-digit numbers: what is held out, what captions say, what images show."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ddpm_engine.data.packing.sources.numbers import (
    HELD_OUT,
    IMAGES_EACH,
    TRAINED,
    captions_of,
    in_words,
    number_of,
)
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.images.codec import fit


@pytest.mark.parametrize(
    ("number", "words"),
    [(10, "ten"), (13, "thirteen"), (20, "twenty"), (42, "forty-two"), (99, "ninety-nine")],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_captions_are_in_words_in_figures_and_by_digits() -> None:
    assert captions_of(42) == (
        "forty-two", "the number forty-two", "the number 42", "four, then two",
    )  # fmt: skip
    assert captions_of(70)[-1] == "seven, then zero"
    for number in range(10, 100):
        assert {number_of(caption) for caption in captions_of(number)} == {number}
    assert number_of("a hundred") is None


def test_a_fifth_is_held_out_and_all_its_words_are_trained() -> None:
    assert len(HELD_OUT) == 18
    assert sorted(HELD_OUT + TRAINED) == list(range(10, 100))
    trained = Counter(word for number in TRAINED for word in in_words(number).split("-"))
    for number in HELD_OUT:
        for word in in_words(number).split("-"):
            assert trained[word] >= 5


@pytest.mark.parametrize(("name", "of"), [("numbers", TRAINED), ("numbers:held-out", HELD_OUT)])
def test_each_image_shows_the_digits_of_its_number(name: str, of: tuple[int, ...]) -> None:
    digits = open_source("digits").examples
    class_of = {fit(example.image, 16).tobytes(): example.label for example in digits}
    source = open_source(name)
    assert source.name == name
    assert len(source.examples) == len(of) * IMAGES_EACH
    assert source.classes is not None
    shown = Counter[int]()
    for example in source.examples:
        assert example.image.shape == (16, 32, 1)
        assert example.image.dtype == np.uint8
        left, right = (class_of[half.tobytes()] for half in np.split(example.image, 2, axis=1))
        assert left is not None
        assert right is not None
        number = 10 * left + right
        shown[number] += 1
        assert example.captions == captions_of(number)
        assert example.label is not None
        assert source.classes[example.label] == str(number)
    assert shown == dict.fromkeys(of, IMAGES_EACH)


def test_images_of_a_number_differ_and_each_time_they_are_the_same() -> None:
    first, again = (list(open_source("numbers").examples) for _ in range(2))
    assert len({example.image.tobytes() for example in first}) == len(first)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [a.key for a in first] == [b.key for b in again]
    assert len({example.key for example in first}) == len(first)
    assert open_source("numbers").revision == open_source("numbers").revision
