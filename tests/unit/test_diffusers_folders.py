"""Folders that diffusers and its training leave: what is in them is read, or else it is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import TINY

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.networks.unet.unet import UNet

MODEL = replace(TINY, block_out_channels=(4, 8), norm_num_groups=2)
STEM = "diffusion_pytorch_model"


def network(value: float) -> UNet:
    made = UNet(MODEL).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.fill_(value)
    return made


def value_of(folder: Path, weights: str = "ema") -> float:
    parameters = load_model(folder, weights=weights).network.parameters()
    (value,) = {float(parameter.flatten()[0]) for parameter in parameters}
    return value


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline whose weights are all 1."""
    model = LoadedModel.from_config(network(1), RunConfig(model=MODEL), "0" * 64)
    export_pipeline(model, tmp_path / "output")
    (tmp_path / "output" / "README.md").unlink()
    return tmp_path / "output"


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# --- Schedulers of former versions


@pytest.mark.parametrize(("predicts", "prediction"), [(True, "eps"), (False, "x0")])
def test_predict_epsilon_says_what_the_network_predicts(
    predicts: bool, prediction: str, pipeline: Path
) -> None:
    file = pipeline / "scheduler" / "scheduler_config.json"
    entries = json.loads(file.read_text())
    del entries["prediction_type"]
    file.write_text(json.dumps({**entries, "predict_epsilon": predicts}))
    assert load_model(pipeline).prediction == prediction


def test_two_words_for_the_prediction_must_agree(pipeline: Path) -> None:
    file = pipeline / "scheduler" / "scheduler_config.json"
    change(file, predict_epsilon=True, prediction_type="epsilon")
    assert load_model(pipeline).prediction == "eps"
    change(file, predict_epsilon=False)
    with pytest.raises(UserError, match=r"predict_epsilon is false .*prediction_type is epsilon"):
        load_model(pipeline)


# --- Variants of weights


def half(unet: Path, ending: str) -> None:
    tensors = load_file(unet / f"{STEM}.safetensors")
    (unet / f"{STEM}.safetensors").unlink()
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    if ending == ".fp16.bin":
        torch.save(tensors, unet / f"{STEM}.fp16.bin")
    elif ending == ".fp16.safetensors":
        save_file(tensors, unet / f"{STEM}.fp16.safetensors", {"format": "pt"})
    else:
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            shard = f"{STEM}.fp16-0000{number}-of-00002{ending}"
            save = torch.save if ending == ".bin" else save_file
            save({name: tensors[name] for name in part}, unet / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = unet / f"{STEM}{ending}.index.fp16.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("ending", [".fp16.safetensors", ".fp16.bin", ".safetensors", ".bin"])
def test_weights_in_half_precision_are_read_where_there_are_no_others(
    ending: str, pipeline: Path
) -> None:
    half(pipeline / "unet", ending)
    loaded = load_model(pipeline)
    assert value_of(pipeline) == 1
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}


def test_weights_without_averaging_are_read_when_asked_for(pipeline: Path) -> None:
    tensors = dict(network(2).state_dict())
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, pipeline / "unet" / f"{STEM}.non_ema.safetensors")
    assert (value_of(pipeline), value_of(pipeline, "model")) == (1, 2)
    (pipeline / "unet" / f"{STEM}.safetensors").unlink()
    with pytest.raises(UserError, match=r"only those without averaging .*`weights` model"):
        load_model(pipeline)


def test_weights_that_are_missing_are_missed_among_what_is_there(pipeline: Path) -> None:
    (pipeline / "unet" / f"{STEM}.safetensors").rename(pipeline / "unet" / "model.ckpt")
    with pytest.raises(UserError, match=r"no weights in .*holds config\.json, model\.ckpt: it"):
        load_model(pipeline)


# --- Checkpoints of a training


@pytest.fixture
def checkpoint(pipeline: Path) -> Path:
    """What diffusers' training saves between pipelines: weights of 2, and their average of 3."""
    folder = pipeline / "checkpoint-500"
    network(2).save_pretrained(folder / "unet")
    network(3).save_pretrained(folder / "unet_ema")
    change(folder / "unet_ema" / "config.json", decay=0.9999, optimization_step=500)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"of accelerate")
    return folder


def test_the_average_of_a_training_checkpoint_is_read_unless_the_other_is_asked_for(
    checkpoint: Path,
) -> None:
    assert (value_of(checkpoint), value_of(checkpoint, "model")) == (3, 2)
    assert value_of(checkpoint.parent) == 1
    shutil.copytree(checkpoint.parent / "scheduler", checkpoint / "scheduler")
    change(checkpoint / "scheduler" / "scheduler_config.json", num_train_timesteps=10)
    assert load_model(checkpoint).config.diffusion.timesteps == 10


def no_scheduler(checkpoint: Path) -> Path:
    shutil.rmtree(checkpoint.parent / "scheduler")
    return checkpoint


def only_the_average(checkpoint: Path) -> Path:
    shutil.rmtree(checkpoint / "unet")
    return checkpoint


def no_pipeline(checkpoint: Path) -> Path:
    for name in ("unet", "scheduler"):
        shutil.rmtree(checkpoint.parent / name)
    (checkpoint.parent / "model_index.json").unlink()
    return checkpoint.parent


@pytest.mark.parametrize(
    ("spoil", "weights", "message"),
    [
        (
            no_scheduler,
            "ema",
            r"scheduler_config\.json is missing.*holds optimizer\.bin, .*unet",
        ),
        (only_the_average, "model", r"holds the averaged network unet_ema .*`weights` ema"),
        (no_pipeline, "ema", r"no usable checkpoint in .*, which holds checkpoint-500"),
    ],
)
def test_what_is_missing_is_named_with_what_is_there(
    spoil: Callable[[Path], Path], weights: str, message: str, checkpoint: Path
) -> None:
    folder = spoil(checkpoint)
    with pytest.raises(UserError, match=message):
        load_model(folder, weights=weights)
