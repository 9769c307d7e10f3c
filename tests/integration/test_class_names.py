"""A class is known by its name wherever data meet a model that numbers its classes otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import TINY_GREY

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import LogConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import Example, Source
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation import nll
from ddpm_engine.evaluation.feature_networks import feature_network
from ddpm_engine.evaluation.run import evaluate
from ddpm_engine.evaluation.sources import folder_source, open_real_images
from ddpm_engine.export.card import model_card
from ddpm_engine.generation.generate import generate, request_from_files
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.training.teacher import student_config
from ddpm_engine.training.trainer import Trainer

ANIMALS = ("ant", "bee", "cat")


def pack_named(folder: Path, names: tuple[str, ...] | None, count: int = 6) -> Path:
    """Pack images whose labels 0, 1, ... have names; None: as shards that others have made."""
    classes = len(names) if names else 3
    examples = [
        Example(f"{k}", np.full((8, 8, 1), 20 * k, np.uint8), k % classes)
        for k in range(max(count, classes))
    ]
    write_shards(Source("memory", examples, names), folder)
    return folder


def configuration(folder: Path, data: Path, classes: int = 3, **model: Any) -> RunConfig:
    return RunConfig(
        out=folder / "run",
        data=DataConfig(path=data, workers=0),
        model=replace(TINY_GREY, num_class_embeds=classes + 1, **model),
        training=TrainingConfig(steps=1, batch_size=2),
        log=LogConfig(sample_every=0, sample_steps=2, tracker="none"),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on named classes."""
    folder = tmp_path_factory.mktemp("named")
    config = configuration(folder, pack_named(folder / "shards", ANIMALS))
    Trainer(config).fit()
    return config.out


def without_names(run: Path) -> Any:
    """The model as an earlier version recorded it."""
    model = load_model(run)
    assert model.checkpoint is not None
    state = {name: value for name, value in model.checkpoint.state.items() if name != "classes"}
    return replace(model, checkpoint=replace(model.checkpoint, state=state))


def conditions_of_nll(
    model: Any, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """The classes that a likelihood is computed with, image by image."""
    found: list[int] = []

    def spy(network: Any, schedule: Any, images: Any, ids: Any, **options: Any) -> torch.Tensor:
        found.extend(options["conditioning"].labels.tolist())
        return torch.zeros(len(images), 3)

    monkeypatch.setattr(nll, "bits_per_dim", spy)
    nll.bound_of_real_images(model, open_real_images(str(data), (8, 8, 1)), out)
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (ANIMALS, [0, 1, 2, 0, 1, 2]),
        (("bee", "cat"), [1, 2] * 3),
        (("cat", "ant"), [2, 0] * 3),
        (None, [0, 1, 2, 0, 1, 2]),  # labels that are only numbers
    ],
)
def test_likelihood_conditions_on_the_class_of_that_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...] | None, expected: list[int],
) -> None:  # fmt: skip
    data = pack_named(tmp_path / "data", names)
    assert conditions_of_nll(load_model(run), data, tmp_path, monkeypatch) == expected


def test_a_run_without_names_goes_by_number(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pack_named(tmp_path / "data", ("bee", "cat"))
    model = without_names(run)
    assert conditions_of_nll(model, data, tmp_path, monkeypatch) == [0, 1] * 3
    many = pack_named(tmp_path / "many", tuple("abcd"))
    with pytest.raises(UserError, match="3 without names"):
        conditions_of_nll(model, many, tmp_path / "many", monkeypatch)


@pytest.mark.parametrize("names", [("bee", "dog"), tuple(map(str, range(12)))])
def test_likelihood_refuses_classes_that_the_model_does_not_have(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    data = pack_named(tmp_path / "data", names)
    with pytest.raises(UserError, match="0 ant, 1 bee, 2 cat") as refused:
        conditions_of_nll(load_model(run), data, tmp_path / "out", monkeypatch)
    assert f"1 {names[1]}" in str(refused.value)
    assert not (tmp_path / "out").exists()


def rename_classes(folder: Path, names: tuple[str, ...]) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"classes": names}))


def test_a_run_is_not_resumed_with_other_classes(tmp_path: Path) -> None:
    config = configuration(tmp_path, pack_named(tmp_path / "shards", ANIMALS))
    Trainer(config).fit()
    rename_classes(tmp_path / "shards", ("ant", "cat", "bee"))
    with pytest.raises(UserError, match=r"class 1 is 'bee' in the run in .* and 'cat' in its data"):
        Trainer(config)
    # A run of a version that recorded no names goes on.
    record = tmp_path / "run" / "data.json"
    record.write_text(json.dumps({"fingerprint": json.loads(record.read_text())["fingerprint"]}))
    assert Trainer(config).run.classes == ("ant", "cat", "bee")


def test_a_teacher_and_the_data_agree(run: Path, tmp_path: Path) -> None:
    teacher = load_model(run)
    plan = DistillationConfig(run, "consistency", 1, 2)
    config = student_config(teacher.config, plan, tmp_path / "student")
    other = pack_named(tmp_path / "data", ("bee", "cat"))
    with pytest.raises(UserError, match=r"class 0 is 'ant' in `distillation\.teacher` and 'bee'"):
        Trainer(replace(config, data=replace(config.data, path=other)))
    assert not config.out.exists()
    assert Trainer(config).run.classes == ANIMALS


def test_low_resolution_samples_keep_their_class(run: Path, tmp_path: Path) -> None:
    model = load_model(run)
    low = tmp_path / "low"
    generate(model, model.request(classes=(2, 0, 3), steps=2), range(3), low)
    folder = tmp_path / "large"
    names = ("cat", "ant", "bee", "dog")
    data = pack_named(folder / "shards", names)
    config = configuration(folder, data, classes=4, low_resolution=4)
    Trainer(config).fit()
    upscaling = load_model(config.out)
    request = request_from_files(upscaling, low_resolution=low)
    assert request.classes_for(upscaling.spec) == (0, 1, 4)


def test_accuracy_knows_digits_by_their_names(tmp_path: Path, shards: Path) -> None:
    digits = open_real_images(str(shards), (8, 8, 1))
    chosen = [k for k in range(len(digits)) if digits.label_of(k) in (3, 7)]
    examples = [
        Example(str(k), digits.read([k])[0], (3, 7).index(digits.label_of(k) or 0)) for k in chosen
    ]
    write_shards(Source("memory", examples, ("3", "7")), tmp_path / "some")
    network = feature_network("digits", 8, cache=tmp_path / "cache")
    source = folder_source(tmp_path / "some")
    report = evaluate(source, digits, network, ["accuracy"], tmp_path / "out", tmp_path / "cache")
    assert report is not None
    assert json.loads(report.read_text())["metrics"]["accuracy"]["share"] > 0.9


def test_names_travel_with_the_model_and_its_samples(run: Path, tmp_path: Path) -> None:
    model = load_model(run)
    assert model.classes == open_shards(model.config.data.path).manifest.classes == ANIMALS
    assert "0 ant, 1 bee, 2 cat" in model_card(model, "ema")
    generate(model, model.request(steps=2), [0], tmp_path / "samples")
    assert folder_source(tmp_path / "samples").classes == ANIMALS
    old = without_names(run)
    generate(old, old.request(steps=2), [0], tmp_path / "old")
    assert folder_source(tmp_path / "old").classes is None
