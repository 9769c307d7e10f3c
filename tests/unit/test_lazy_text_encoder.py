"""Loaded models: the text encoder of their training, opened when it is first used, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.text_encoders import bert_folder, clip_folder
from tests.tiny import TINY

from ddpm_engine.checkpoints import lazy_text_encoder
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.checkpoints.recorded_config import record
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.networks.text.folders import open_text_encoder, text_encoder_fingerprint

pytest.importorskip("transformers")


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks take text of 16 channels."""
    monkeypatch.setattr(LoadedModel, "spec", ConditioningSpec(text=16))


def save(out: Path, text_encoder: Any = None) -> Path:
    """Save a checkpoint of a run with a text encoder."""
    config = RunConfig(model=TINY, out=out)
    weights = build_network(TINY).state_dict()
    state = {"config": record(config), "text_encoder": text_encoder}
    CheckpointStore(out / "checkpoints").save(1, {"ema": weights}, state)
    return out


def recorded(place: str, length: int | None = 12) -> dict[str, Any]:
    return {"place": place, "fingerprint": text_encoder_fingerprint(place), "length": length}


def test_the_encoder_is_opened_when_it_is_used(
    text: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bert_folder(tmp_path / "encoder")
    run = save(tmp_path / "run", recorded(place))
    opened = []

    def count(place: str, device: Any) -> Any:
        opened.append(place)
        return open_text_encoder(place, device)

    monkeypatch.setattr(lazy_text_encoder, "open_text_encoder", count)
    encoder = load_model(run).text_encoder
    assert encoder is not None
    assert opened == []
    assert encoder.encode(["a", "forty-two"]).tokens.shape == (2, 12, 16)
    encoder.encode(["a"])
    assert opened == [place]


def test_an_encoder_that_has_moved_is_named(text: None, tmp_path: Path) -> None:
    place = bert_folder(tmp_path / "encoder")
    run = save(tmp_path / "run", recorded(place))
    moved = shutil.move(place, tmp_path / "moved")
    gone = load_model(run).text_encoder
    assert gone is not None
    with pytest.raises(UserError, match="If it has moved, give its place as `text_encoder`"):
        gone.encode(["a"])
    found = load_model(run, text_encoder=str(moved)).text_encoder
    assert found is not None
    assert found.encode(["a"]).mask.sum() == 3


def test_a_relative_place_counts_from_where_the_run_was_started(
    text: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bert_folder(tmp_path / "encoder")
    save(Path("run"), recorded("encoder"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    encoder = load_model("../run").text_encoder
    assert encoder is not None
    assert encoder.encode(["a"]).tokens.shape == (1, 12, 16)


def test_another_encoder_is_refused(text: None, tmp_path: Path) -> None:
    run = save(tmp_path / "run", recorded(bert_folder(tmp_path / "encoder")))
    other = bert_folder(tmp_path / "other", seed=1)
    encoder = load_model(run, text_encoder=other).text_encoder
    assert encoder is not None
    with pytest.raises(UserError, match="trained with another, of fingerprint") as caught:
        encoder.encode(["a"])
    assert caught.value.field == "text_encoder"


def test_an_encoder_of_other_channels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "spec", ConditioningSpec(text=24))
    run = save(tmp_path / "run")
    assert load_model(run).text_encoder is None, "nothing says which"
    encoder = load_model(run, text_encoder=clip_folder(tmp_path / "encoder")).text_encoder
    assert encoder is not None
    with pytest.raises(UserError, match="gives 16 channels a token, and the network takes 24"):
        encoder.encode(["a"])


@pytest.mark.parametrize(
    "damaged",
    [{"place": "a"}, ["a"], {"place": "a", "fingerprint": "b", "length": "long"}, "a"],
)
def test_a_damaged_record_is_named(text: None, tmp_path: Path, damaged: Any) -> None:
    run = save(tmp_path / "run", damaged)
    with pytest.raises(UserError, match="as its text encoder"):
        load_model(run)


def test_a_network_without_text_takes_no_encoder(tmp_path: Path) -> None:
    run = save(tmp_path / "run")
    assert load_model(run).text_encoder is None
    with pytest.raises(UserError, match="not conditioned on text; leave it out") as caught:
        load_model(run, text_encoder="somewhere")
    assert caught.value.field == "text_encoder"
