"""What the benchmarks of text to image report, on real images of numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import read_numbers, text_cascade, text_to_image
from benchmarks.number_samples.metrics import CAPTIONS, OTHER_WORDS, NumberMetrics, of_two_words
from PIL import Image

from ddpm_engine.data.packing.sources.numbers import HELD_OUT, in_words, number_of
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.errors import UserError
from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.samplers.samples import Samples

PROMPTS = Path(read_numbers.__file__).parent / "prompts"


def folder_of(folder: Path, prompts: Sequence[str] | None = None) -> Path:
    """Real images of held-out numbers as launch/sample.py writes samples."""
    folder.mkdir()
    rows = []
    for place, example in enumerate(open_source("numbers:held-out").examples[::40]):
        name = f"{place:08d}.png"
        Image.fromarray(example.image[..., 0]).save(folder / name)
        prompt = example.captions[0] if prompts is None else prompts[place % len(prompts)]
        rows.append(json.dumps({"file_name": name, "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_the_prompts_of_the_demo_are_the_held_out_numbers() -> None:
    lines = (PROMPTS / "held-out-numbers.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [in_words(number) for number in HELD_OUT]


def test_samples_are_read_and_shown_below_their_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, picture = folder_of(tmp_path / "samples"), tmp_path / "out" / "shown.png"
    arguments = ["--samples", str(samples), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["read_numbers.py", *arguments])
    read_numbers.main()
    assert "both digits right in 100.0% of 27 samples" in capsys.readouterr().out
    assert np.asarray(Image.open(picture)).std() > 20


def test_wrong_samples_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = folder_of(tmp_path / "samples", ["seventeen"])
    monkeypatch.setattr(sys, "argv", ["read_numbers.py", "--samples", str(samples)])
    read_numbers.main()
    printed = capsys.readouterr().out
    assert "0.0% of 27" in printed
    assert "seventeen: 0 of 27" in printed


def test_prompts_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1 of .* 'a cat', which is no caption"):
        read_numbers.read_prompted(folder_of(tmp_path / "samples", ["a cat"]))
    with pytest.raises(UserError, match=r"has no metadata.jsonl"):
        read_numbers.read_prompted(tmp_path)


class Copyist:
    """Stands for a model: shows real images of what it is asked for, or of one number always."""

    def __init__(self, always: int | None = None) -> None:
        self.always = always
        self.asked: list[str] = []
        self.options: list[dict[str, Any]] = []
        examples = [
            e for name in ("numbers", "numbers:held-out") for e in open_source(name).examples
        ]
        self.images = {
            caption: example.image for example in examples for caption in example.captions
        }

    def sample(
        self,
        ids: Sequence[str],
        *,
        batch_size: int = 64,
        progress: bool | None = None,
        **options: Any,
    ) -> Samples:
        self.asked += ids
        self.options.append(options)
        fixed = None if self.always is None else in_words(self.always)
        shown = np.stack([self.images.get(fixed or prompt, self.images["ten"]) for prompt in ids])
        tensor = torch.from_numpy(shown).permute(0, 3, 1, 2) / 127.5 - 1
        return Samples(tensor, SimpleNamespace(codec=PixelCodec()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def metrics() -> NumberMetrics:
    return NumberMetrics(16)


def test_prompts_are_said_in_these_ways() -> None:
    assert [phrase(42) for phrase in CAPTIONS.values()] == list(CAPTIONS)
    assert [phrase(42) for phrase in OTHER_WORDS.values()] == list(OTHER_WORDS)
    for number in of_two_words(range(10, 100)):
        for phrase in OTHER_WORDS.values():
            assert number_of(phrase(number)) is None


def test_accuracy_by_kind_phrase_and_seed(metrics: NumberMetrics) -> None:
    copyist = Copyist()
    found = text_to_image.by_phrase(copyist, metrics, 36, (3, 4), guidance=2.0, steps=None)
    for kind in ("held out", "trained"):
        for phrase in CAPTIONS:
            assert min(found[kind][phrase]) > 0.95
        for phrase in OTHER_WORDS:
            assert found[kind][phrase] == [0, 0]
    assert {frozenset(options.items()) for options in copyist.options} == {
        frozenset({"seed": seed, "guidance": 2.0}.items()) for seed in (3, 4)
    }
    held_out = {number_of(prompt) for prompt in copyist.asked[:36]}
    assert held_out == set(HELD_OUT)
    assert metrics.accuracy(real_of(copyist, 22), [26]) == 0


def real_of(copyist: Copyist, number: int) -> np.ndarray:
    return copyist.images[in_words(number)][None]


def test_scales_are_compared_with_and_without_dynamic_thresholds(
    metrics: NumberMetrics, tmp_path: Path
) -> None:
    copyist, monotone = Copyist(), Copyist(always=17)
    points = text_to_image.by_scale(copyist, metrics, (1.0, 3.0), 0.9, 90, 5, steps=4)
    assert [(p["scale"], p["threshold"]) for p in points] == [
        (1.0, None), (3.0, None), (1.0, 0.9), (3.0, 0.9),
    ]  # fmt: skip
    assert copyist.options[0] == {"seed": 5, "guidance": 1.0, "steps": 4}
    assert copyist.options[3] == {"seed": 5, "guidance": 3.0, "steps": 4, "threshold": 0.9}
    (alike,) = text_to_image.by_scale(monotone, metrics, (1.0,), 0.9, 90, 5)[:1]
    assert alike["distance"] > 2 * points[0]["distance"]
    assert alike["accuracy"] == pytest.approx(1 / 90)
    text_to_image.plot_scales(points, 0.99, tmp_path / "scales.png")
    assert Image.open(tmp_path / "scales.png").size > (400, 400)


def test_the_curve_of_training(tmp_path: Path) -> None:
    rows = [{"step": 10, "time": 5.0}, {"step": 20, "time": 8.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert text_to_image.seconds_of(tmp_path) == {10: 0.0, 20: 3.5}
    assert text_to_image.seconds_of(tmp_path / "nothing") == {}
    points = [
        {"step": step, "seconds": None, "held out": [0.1, 0.2], "trained": [0.3, 0.5]}
        for step in (10, 20)
    ]
    text_to_image.plot_curve(points, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size > (400, 400)


def test_a_way_of_generating_is_measured(
    metrics: NumberMetrics, capsys: pytest.CaptureFixture[str]
) -> None:
    copyist = Copyist()
    stages = [{}, {"guidance": 1.0}]
    found = text_cascade.measured("chain", copyist, metrics, 18, (0, 1), 20, stages=stages)
    assert min(found["held out"] + found["trained"]) > 0.9
    assert len(found["held out"]) == 2
    assert found["distance"] > 0
    assert all(options["stages"] == stages for options in copyist.options)
    assert capsys.readouterr().out.startswith("chain ")
