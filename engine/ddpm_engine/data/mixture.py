"""Mix several sets in fixed proportions: a pure function of the position."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from ddpm_engine.data.classes import ClassNames
from ddpm_engine.data.dataset import Sample, ShardDataset
from ddpm_engine.data.shuffle import Indices
from ddpm_engine.errors import UserError

MAX_BLOCK = 1 << 16


class Mixture:
    """Map from a position to a set and a position in it.

    Positions form blocks as long as the sum of the weights in lowest terms. Every block holds
    exactly `weight` positions of each set, evenly spread: the i-th of w is as near as it can be to
    (i + ½)/w of the block. Each set's own positions follow each other without gaps, so every set is
    read in its own order, epoch after epoch.

    Args:
        weights: at least 1 each.

    Raises:
        UserError: no weights, a weight below 1, or blocks longer than `MAX_BLOCK`.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        if not weights or min(weights) < 1:
            raise UserError(
                f"`weights` are {list(weights)}; each must be at least 1", field="weights"
            )
        shared = math.gcd(*weights)
        self._weights = np.array([weight // shared for weight in weights], dtype=np.int64)
        if self._weights.sum() > MAX_BLOCK:
            raise UserError(
                f"`weights` {list(weights)} make blocks of {self._weights.sum()} samples; "
                f"choose rounder ones, whose sum is at most {MAX_BLOCK}",
                field="weights",
            )
        places = sorted(
            (Fraction(2 * i + 1, 2 * int(weight)), number, i)
            for number, weight in enumerate(self._weights)
            for i in range(weight)
        )
        self._sets = np.array([number for _, number, _ in places], dtype=np.int64)
        self._ranks = np.array([i for _, _, i in places], dtype=np.int64)

    def at(self, positions: ArrayLike) -> tuple[Indices, Indices]:
        """Return sets, and positions in them, for positions: int64 `[N]` to two int64 `[N]`."""
        blocks, offsets = np.divmod(np.asarray(positions, dtype=np.int64), len(self._sets))
        sets = self._sets[offsets]
        return sets, blocks * self._weights[sets] + self._ranks[offsets]

    @property
    def weights(self) -> list[int]:
        """Weights in lowest terms."""
        return [int(weight) for weight in self._weights]


class MixedDataset(Dataset[Sample]):
    """Samples of several sets by position in the order of training (see `Mixture`).

    A damaged sample is replaced by another of its set.

    Args:
        sets: of images of one shape.
        weights: of each set.

    Raises:
        UserError: as `Mixture`, or the sets' images differ in shape, or their embeddings or
            latents in what computed them or in length.
    """

    def __init__(self, sets: Sequence[ShardDataset], weights: Sequence[int]) -> None:
        if len(sets) != len(weights):
            raise UserError(f"{len(weights)} weights for {len(sets)} sets: give one for each")
        for other in sets[1:]:
            if other.shape != sets[0].shape:
                raise UserError(
                    f"images in {other.shards.storage} are {list(other.shape)} (channels, height, "
                    f"width), those in {sets[0].shards.storage} {list(sets[0].shape)}: choose one "
                    "size and number of channels"
                )
            if _embedded(other) != _embedded(sets[0]):
                raise UserError(
                    f"captions or images in {other.shards.storage} and in {sets[0].shards.storage} "
                    "were not embedded or encoded alike: pack both with the same encoders"
                )
        self.sets = list(sets)
        self.shape = sets[0].shape
        self.captions = all(one.captions for one in sets)
        """Whether samples have captions."""
        self.text = sets[0].text
        """What the embeddings of captions are; None: samples have none."""
        self.text_length = sets[0].text_length
        """Number of tokens of the embeddings of every caption in a batch; None: there are none."""
        self.embeddings = sets[0].embeddings
        """What the embeddings of images are; None: samples have none."""
        self.latents = sets[0].latents
        """What the latents are; None: samples are images."""
        self.flips = sets[0].flips
        """Whether samples are latents, and hold those of mirrored images."""
        self._mixture = Mixture(weights)

    @property
    def fingerprint(self) -> str:
        """Hash of the sets' fingerprints and weights, in order, which names the data."""
        parts = [one.fingerprint for one in self.sets], self._mixture.weights
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def classes(self) -> ClassNames | None:
        """Names of the labels 0, 1, ...: those of the set that has most."""
        known = [one.classes for one in self.sets if one.classes is not None]
        return max(known, key=len, default=None)

    def __len__(self) -> int:
        """Return the number of samples in all sets; positions continue beyond it."""
        return sum(map(len, self.sets))

    def __getitem__(self, position: int) -> Sample:
        """As `ShardDataset`."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """As `ShardDataset`."""
        numbers, inner = self._mixture.at(positions)
        samples: dict[int, Sample] = {}
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            for place, sample in zip(
                places.tolist(), self.sets[number].__getitems__(inner[places].tolist()), strict=True
            ):
                storage = self.sets[number].shards.storage
                # Shards of different sets may have the same name.
                faults = tuple(replace(f, shard=f"{storage}/{f.shard}") for f in sample.faults)
                samples[place] = replace(sample, position=int(positions[place]), faults=faults)
        return [samples[place] for place in range(len(positions))]


def _embedded(one: ShardDataset) -> tuple[object, ...]:
    """What samples must agree in to be in one batch."""
    return (
        one.text and (one.text.fingerprint, one.text.channels, one.text.pooled_channels),
        one.text_length,
        one.embeddings and (one.embeddings.fingerprint, one.embeddings.channels),
        one.latents and one.latents.fingerprint,
        one.flips,
    )
