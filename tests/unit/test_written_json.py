"""JSON that other readers than Python's take: no NaN and no Infinity in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_engine.checkpoints.store import CheckpointStore, verify
from ddpm_engine.evaluation.features_store import FeatureStore
from ddpm_engine.evaluation.report import write_report
from ddpm_engine.json_files import to_json
from ddpm_engine.networks.files.together import json_writer, write_together
from ddpm_engine.training.callbacks.metrics_file import JsonLines
from ddpm_engine.training.meters import Meters

INF, NAN = float("inf"), float("nan")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_not_finite_is_null() -> None:
    values = {"a": [1.5, NAN, (-INF, "NaN")], "b": {"c": INF, "d": None}, "e": True}
    assert strict(to_json(values)) == {
        "a": [1.5, None, [None, "NaN"]], "b": {"c": None, "d": None}, "e": True,
    }  # fmt: skip
    assert to_json({"b": 1, "a": "é"}, sort_keys=True, ensure_ascii=False) == '{"a": "é", "b": 1}'


def _checkpoint(folder: Path) -> None:
    store = CheckpointStore(folder)
    store.save(1, {"model": {"w": torch.ones(1)}}, {"loss": NAN})
    assert verify(store.path(1))[1] == []


def _metrics(folder: Path) -> None:
    rows = JsonLines(folder / "metrics.jsonl", 0)
    rows.append(1, {"loss": INF})
    rows.close()


def _samples(folder: Path) -> None:
    for _ in range(2):  # the same settings, as read and as given
        FeatureStore(folder, {"scale": NAN})


def _report(folder: Path) -> None:
    write_report(folder, {"scale": INF}, {"fid": {"distance": 1.0}}, {})


def _network(folder: Path) -> None:
    write_together(folder, {"config.json": json_writer({"scale": INF})}, [])


@pytest.mark.parametrize("write", [_checkpoint, _metrics, _samples, _report, _network])
def test_every_file_of_json_is(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".jsonl")]
    assert files
    for file in files:
        assert None in strict_leaves(strict(file.read_text()))


def strict_leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in strict_leaves(entry)]
    return [value]


def test_meters_survive_a_checkpoint_whatever_they_hold() -> None:
    meters = Meters()
    assert (meters.mean_loss, meters.mean_grad_norm) == (None, None)
    meters.add(2.0, 4.0)
    meters.add(4.0, 4.0)
    assert (meters.mean_loss, meters.mean_grad_norm) == (3.0, 4.0)
    assert Meters.of_state(strict(to_json(meters.state()))) == meters
    meters.add(INF, 1.0)
    resumed = Meters.of_state(strict(to_json(meters.state())))
    assert (meters.mean_loss, resumed.mean_loss) == (None, None)
    assert resumed.mean_grad_norm == meters.mean_grad_norm == 3.0
