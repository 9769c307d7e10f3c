"""A run with captions on two processes is the run of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.captioned import CHANNELS, pairs_of_digits, tiny_encoder
from tests.distributed.launching import FSDP, Job, difference, launch, losses
from tests.tiny import TINY_DIT, TINY_GREY

from ddpm_engine.config import RunConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.packing.pack import write_shards

STEPS = 6
TRANSFORMER = replace(
    TINY_DIT, sample_size=(8, 16), in_channels=1, out_channels=1, num_class_embeds=11,
    text_channels=CHANNELS, vector_channels=CHANNELS,
)  # fmt: skip
UNET = replace(
    TINY_GREY, sample_size=(8, 16), dropout=0.1, num_class_embeds=11,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    encoder_hid_dim=CHANNELS, cross_attention_dim=8, vector_channels=CHANNELS,
)  # fmt: skip


@pytest.fixture
def captioned(config: RunConfig, tmp_path: Path) -> RunConfig:
    """A run with labels, text and pooled text, some dropped, encoded in training."""
    encoder = tiny_encoder(tmp_path / "encoder")
    write_shards(pairs_of_digits(60), tmp_path / "shards", size=(8, 16), per_shard=25)
    return replace(
        config,
        data=DataConfig(path=tmp_path / "shards", workers=0, text_encoder=encoder),
        training=replace(config.training, steps=STEPS, batch_size=12),
        log=replace(config.log, sample_every=STEPS, sample_steps=2, sample_count=5),
    )  # fmt: skip


@pytest.mark.parametrize("network", [TRANSFORMER, UNET], ids=["dit", "unet"])
def test_ranks_are_equal_and_go_on_from_one_another(network: Any, captioned: RunConfig) -> None:
    captioned = replace(captioned, model=network)
    one, two, part, sharded = (replace(captioned, out=captioned.out.with_name(n)) for n in "1234")
    half = replace(part, training=replace(part.training, steps=STEPS // 2))
    launch([Job(one, float64=True), Job(half, float64=True)], 1)
    launch([Job(two, float64=True), Job(part, float64=True), Job(sharded, FSDP, True)], 2)
    for other in (two, part, sharded):
        assert difference(losses(other.out), losses(one.out)) <= 1e-9
    listed = [(run.out / "samples" / "prompts.txt").read_text() for run in (one, two)]
    assert listed[0] == listed[1]
    assert len(listed[0].splitlines()) == 5
