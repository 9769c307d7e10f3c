"""Images of two-digit numbers with captions: real handwritten digits side by side.

Every number from 10 to 99 is one of two kinds. Eighteen are held out: models that never trained on
them generate them from words that they know from other numbers, which shows what they have learned
of language. So a held-out number has no word of its own, as "thirteen" is, and its words are in
many other numbers.
"""

from __future__ import annotations

import numpy as np

from ddpm_engine.data.packing.sources.sklearn import digits
from ddpm_engine.data.packing.sources.source import Example, LazyExamples, Source
from ddpm_engine.images.codec import fit

SIDE = 16
"""Height of the images in pixels, and side of either digit."""
IMAGES_EACH = 60
"""Images of each number."""

_UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SEED = 0
_RECIPE = 1
"""Version of what is made of the digits; part of the source's revision."""


def _is_held_out(number: int) -> bool:
    tens, units = divmod(number, 10)
    return tens >= 2 and units >= 1 and (tens + units) % 4 == 0


ALL = tuple(range(10, 100))
"""The numbers of two digits."""
HELD_OUT = tuple(filter(_is_held_out, ALL))
"""Numbers that the source `numbers` leaves out."""
TRAINED = tuple(number for number in ALL if not _is_held_out(number))
"""Numbers of the source `numbers`."""


def in_words(number: int) -> str:
    """Write a number from 10 to 99 in words, such as forty-two."""
    tens, units = divmod(number, 10)
    if tens == 1:
        return _TEENS[units]
    return _TENS[tens - 2] + (f"-{_UNITS[units]}" if units else "")


def captions_of(number: int) -> tuple[str, ...]:
    """Return the captions of images of a number from 10 to 99: in words, in figures, by digits."""
    tens, units = divmod(number, 10)
    words = in_words(number)
    by_digits = f"{_UNITS[tens]}, then {_UNITS[units]}"
    return (words, f"the number {words}", f"the number {number}", by_digits)


def number_of(caption: str) -> int | None:
    """Return the number that one of `captions_of` its captions names; None: no such caption."""
    return _BY_CAPTION.get(caption)


_BY_CAPTION = {caption: number for number in ALL for caption in captions_of(number)}


def numbers(held_out: bool = False) -> Source:
    """Open grey images of 16 × 32 pixels of two-digit numbers, 60 of each, with four captions each.

    Two of scikit-learn's digits, enlarged to 16 × 16, stand side by side. Each digit is in about as
    many images as any other of its class. Labels are the numbers less ten.

    Args:
        held_out: the 18 numbers that are held out, instead of the 72 others.
    """
    of = HELD_OUT if held_out else TRAINED
    single = digits()
    images = np.stack([fit(example.image, SIDE) for example in single.examples])
    labels = np.array([example.label for example in single.examples])
    # A legacy generator, since numpy promises its values for good.
    shuffle = np.random.RandomState(_SEED)
    decks = [
        _deck(np.flatnonzero(labels == digit), 2 * len(ALL) * IMAGES_EACH, shuffle)
        for digit in range(10)
    ]

    def load(place: int) -> Example:
        number, copy = of[place // IMAGES_EACH], place % IMAGES_EACH
        tens, units = divmod(number, 10)
        # A card of its own for each image and side, and never the same pair twice.
        card = 2 * ((number - ALL[0]) * IMAGES_EACH + copy)
        left, right = decks[tens][card], decks[units][card + 1]
        image = np.concatenate([images[left], images[right]], axis=1)
        return Example(f"{number}-{copy:03d}", image, number - ALL[0], captions_of(number))

    name = "numbers:held-out" if held_out else "numbers"
    places = range(len(of) * IMAGES_EACH)
    return Source(
        name,
        LazyExamples(places, load),
        tuple(map(str, ALL)),
        f"{_RECIPE} of {single.revision}",
    )


def _deck(cards: np.ndarray, length: int, shuffle: np.random.RandomState) -> np.ndarray:
    """Deal `cards` again and again, each time in another order: int64 `[length]`."""
    rounds = -(-length // len(cards))
    return np.concatenate([shuffle.permutation(cards) for _ in range(rounds)])[:length]
