"""The table of objectives: what is compared, and what is reported of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import objectives
from benchmarks.objectives import Options, bits_fall, compare, configuration, finished, folder
from PIL import Image

from ddpm_engine.errors import UserError
from ddpm_engine.rules import validate


@pytest.fixture
def options(tmp_path: Path) -> Options:
    document = tmp_path / "objectives.md"
    mark = "<!-- begin: benchmarks/objectives.py -->"
    document.write_text(f"before\n{mark}\nold\n<!-- end -->\nafter\n")
    return Options(
        seeds=2, out=tmp_path / "runs", result=tmp_path / "result.json", document=document
    )


def pretend(options: Options, distances: dict[str, float], hybrid: float) -> None:
    """Leave what measuring would have left."""
    for name in objectives.ENTRIES:
        for seed in range(options.seeds):
            bits = {"fixed_small": 3.0, "fixed_large": 2.9, "learned_range": hybrid}
            found = {
                "budget": json.loads(json.dumps(asdict(options.budget))),
                "distance": distances.get(name, 1.0) + 0.01 * seed,
                "by_evaluations": [4.0, 2.0, 1.5, 1.0 + seed],
                "bits_per_dim": {v: bits[v] for v in objectives.BITS.get(name, ())},
                "training_seconds": 1.0,
            }
            folder(options, name, seed).mkdir(parents=True)
            (folder(options, name, seed) / "measured.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", objectives.ENTRIES)
def test_every_objective_is_a_run_that_differs_in_nothing_else(name: str, options: Options) -> None:
    config, plain = (configuration(options, n, 1) for n in (name, objectives.BEFORE))
    validate(config)
    assert config.training == plain.training
    assert config.optimizer == plain.optimizer
    if name == "transformer":
        assert config == replace(plain, model=config.model, out=config.out)
    else:
        assert replace(config.model, out_channels=1) == plain.model
    assert config.out.name.isascii()


@pytest.mark.parametrize(
    ("distances", "hybrid", "status", "message"),
    [
        ({}, 2.5, 0, ""),
        ({"P2": 1.6}, 2.5, 1, "P2 is further than 1.5 times"),
        ({}, 2.95, 1, "does not take fewer bits"),
    ],
)
def test_what_is_finished_is_reported(
    distances: dict[str, float],
    hybrid: float,
    status: int,
    message: str,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(objectives, "prepare_shards", lambda *_: None)
    monkeypatch.setattr(objectives, "digit_classifier", lambda *_: None)
    machine = {"command": "python …", "date": "2020-01-01", "device": "a CPU", "commit": "abc"}
    monkeypatch.setattr(objectives, "facts", lambda _: machine)
    pretend(options, distances, hybrid)
    assert compare(options) == status
    printed = capsys.readouterr().out
    assert "30 of 30 runs are finished" in printed
    assert message in printed
    document = options.document.read_text()
    assert document.startswith("before\n")
    assert document.endswith("after\n")
    assert "old" not in document
    assert "| hybrid | `--objective.learned-variance --model.out-channels 2` |" in document
    found: dict[str, Any] = json.loads(options.result.read_text())["objectives"]
    assert found["min-SNR"]["distances"] == [1.0, 1.01]
    assert found["flow"]["by_evaluations"] == [[4.0, 4.0], [2.0, 2.0], [1.5, 1.5], [1.0, 2.0]]
    assert "| flow | 4.000 ± 0.000 | 2.000 ± 0.000 | 1.500 ± 0.000 | 1.500 ± 0.707 |" in document
    with Image.open(options.document.parent / objectives.PICTURE) as image:
        image.verify()


def test_another_budget_is_another_measurement(options: Options) -> None:
    pretend(options, {}, 2.5)
    assert finished(options, "P2", 0) is not None
    other = replace(options, budget=replace(options.budget, samples=10))
    assert finished(other, "P2", 0) is None


def test_an_unknown_objective_is_named(options: Options) -> None:
    with pytest.raises(UserError, match="`only` names 'p3'"):
        compare(replace(options, only=("p3",)))


@pytest.mark.parametrize("field", ["result", "document"])
def test_a_part_does_not_take_the_place_of_the_whole(field: str, options: Options) -> None:
    given = replace(options, only=("P2",), **{field: getattr(Options(), field)})
    before = getattr(given, field).read_bytes()
    with pytest.raises(UserError, match="give `result` and `document` too"):
        compare(given)
    assert getattr(given, field).read_bytes() == before


def test_bits_must_fall_for_every_seed() -> None:
    found = {
        objectives.BEFORE: {"bits_per_dim": {"fixed_small": [3.0, 3.2], "fixed_large": [2.9, 3.1]}},
        objectives.AFTER: {"bits_per_dim": {"learned_range": [2.8, 3.0]}},
    }
    assert bits_fall(found) is True
    found[objectives.AFTER]["bits_per_dim"]["learned_range"] = [2.8, 3.15]
    assert bits_fall(found) is False
    del found[objectives.AFTER]
    assert bits_fall(found) is None
