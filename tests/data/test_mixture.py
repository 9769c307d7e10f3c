from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.sets import PIXELS, pack

from ddpm_engine.config import RunConfig, load_config
from ddpm_engine.data.dataset import ShardDataset
from ddpm_engine.data.mixture import MixedDataset, Mixture
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import Example, Source
from ddpm_engine.errors import UserError
from ddpm_engine.training.trainer import Trainer


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 10**9))
def test_every_block_holds_its_share_and_every_set_is_read_in_order(
    weights: list[int], block: int
) -> None:
    mixture = Mixture(weights)
    length = sum(mixture.weights)
    sets, _ = mixture.at(np.arange(length) + block * length)
    assert np.bincount(sets, minlength=len(weights)).tolist() == mixture.weights
    sets, inner = mixture.at(np.arange(5 * length))
    for number in range(len(weights)):
        own = inner[sets == number]
        assert own.tolist() == list(range(len(own)))


def test_shares_are_spread_and_weights_are_positive_and_not_too_fine() -> None:
    sets, _ = Mixture([30, 10]).at(range(8))
    assert sets.tolist() == [0, 0, 1, 0] * 2 or sets.tolist() == [0, 1, 0, 0] * 2
    with pytest.raises(UserError, match=r"are \[1, 0\]"):
        Mixture([1, 0])
    with pytest.raises(UserError, match="rounder"):
        Mixture([65536, 1])


def test_a_mix_gives_each_sets_own_samples_at_the_mixes_positions(tmp_path: Path) -> None:
    one, two = pack(tmp_path / "one"), pack(tmp_path / "two", first=40, count=5)
    sets = [ShardDataset(folder, seed=5) for folder in (one, two)]
    mixed = MixedDataset(sets, [3, 1])
    samples = mixed.__getitems__(range(32))
    assert [s.position for s in samples] == list(range(32))
    for start in range(0, 32, 4):
        assert sum(s.label >= 40 for s in samples[start : start + 4]) == 1
    first = [s.label for s in samples if s.label < 40]
    assert first == [sets[0][p].label for p in range(24)]
    assert [s.label for s in samples if s.label >= 40] == [sets[1][p].label for p in range(8)]
    assert all(np.array_equal(s.image, PIXELS[s.label]) for s in samples)
    assert mixed[17].label == samples[17].label


def test_the_fingerprint_names_sets_order_and_weights(tmp_path: Path) -> None:
    one, two = (ShardDataset(pack(tmp_path / n, 20 * i), 0) for i, n in enumerate(("one", "two")))
    mixes = [([one, two], [3, 1]), ([one, two], [1, 3]), ([two, one], [3, 1]), ([one], [1])]
    assert len({MixedDataset(sets, weights).fingerprint for sets, weights in mixes}) == 4
    same = MixedDataset([one, two], [6, 2]).fingerprint
    assert same == MixedDataset([one, two], [3, 1]).fingerprint


def test_sets_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    grey = [Example(str(i), PIXELS[i, ..., :1], i) for i in range(3)]
    write_shards(Source("memory", grey), tmp_path / "grey")
    sets = [ShardDataset(pack(tmp_path / "rgb"), 0), ShardDataset(tmp_path / "grey", 0)]
    with pytest.raises(UserError, match=r"grey are \[1, 8, 8\].*rgb \[3, 8, 8\]"):
        MixedDataset(sets, [1, 1])
    with pytest.raises(UserError, match="1 weights for 2 sets"):
        MixedDataset(sets, [1])


def mix(config: RunConfig, folder: Path, weights: tuple[int, ...] = (3, 1)) -> RunConfig:
    data = replace(
        config.data, path=folder / "one", mix_with=(str(folder / "two"),), weights=weights
    )
    return replace(config, data=data)


def losses(out: Path) -> list[tuple[float, float]]:
    entries = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(entry["loss"], entry["grad_norm"]) for entry in entries]


def test_training_on_a_mix_resumes_to_the_bit(config: RunConfig, tmp_path: Path) -> None:
    pack(tmp_path / "one")
    pack(tmp_path / "two", first=40)
    config = mix(config, tmp_path)
    Trainer(config).fit()
    pieces = replace(config, out=tmp_path / "pieces")
    for steps in (2, 4):
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(replace(pieces, training=replace(config.training, steps=steps))).fit()
    assert losses(pieces.out) == losses(config.out)
    settled = replace(config.training, precision="no")
    assert load_config(config.out) == replace(config, training=settled)
    with pytest.raises(UserError, match="fingerprint"):
        Trainer(mix(config, tmp_path, weights=(1, 1)))


def test_a_class_must_be_the_same_everywhere(config: RunConfig, tmp_path: Path) -> None:
    pack(tmp_path / "one", classes=("cat", "dog"))
    pack(tmp_path / "two", classes=("cat", "cow"))
    conditional = replace(config, model=replace(config.model, num_class_embeds=3))
    with pytest.raises(UserError, match=r"class 1 is 'dog' in .*one and 'cow' in .*two"):
        Trainer(mix(conditional, tmp_path))
    # An unconditional model does not look at labels.
    assert isinstance(Trainer(mix(config, tmp_path)).run.dataset, MixedDataset)


def test_weights_are_one_for_each_set(config: RunConfig, tmp_path: Path) -> None:
    for weights, pattern in [((1,), "1 entries for 2 sets"), ((1, 0), "at least 1")]:
        with pytest.raises(UserError, match=pattern):
            Trainer(mix(config, tmp_path, weights))
    with pytest.raises(UserError, match=r"without .*mix.with"):
        Trainer(replace(config, data=replace(config.data, weights=(1,))))
