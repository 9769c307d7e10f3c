"""The API of `import ddpm_engine`: loading, sampling, saving, and names on the hub."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.tiny import TINY_GREY

import ddpm_engine
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.config import SamplingConfig


def loaded(classes: int | None = None, **diffusion: Any) -> LoadedModel:
    """An untrained network, as if a run had made it."""
    torch.manual_seed(0)
    embeddings = None if classes is None else classes + 1
    network = UNet(replace(TINY_GREY, num_class_embeds=embeddings)).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    config = RunConfig(
        model=network.config,
        diffusion=DiffusionConfig(**diffusion),
        sampling=SamplingConfig(sampler="ddim", steps=5),
    )
    return LoadedModel.from_config(network, config, "0" * 64)


def test_every_name_is_there() -> None:
    for name in ddpm_engine.__all__:
        assert getattr(ddpm_engine, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ddpm_engine.nothing


def test_samples_are_images_and_a_tensor() -> None:
    samples = loaded().sample(3, seed=1, progress=False)
    assert samples.tensor.shape == (3, 1, 8, 8)
    assert [image.size for image in samples.images] == [(8, 8)] * 3
    assert isinstance(samples.images[0], Image.Image)
    some = loaded().sample([2, 0], seed=1, progress=False)
    torch.testing.assert_close(some.tensor, samples.tensor[[2, 0]], rtol=0, atol=1e-4)


def test_the_prediction_is_the_models() -> None:
    velocity = loaded(prediction="v")
    as_if_noise = replace(velocity, prediction="eps")
    ours, wrong = (model.sample(2, progress=False).tensor for model in (velocity, as_if_noise))
    assert (ours - wrong).abs().max() > 0.1
    by_request = ddpm_engine.Sampler(velocity, ddpm_engine.SampleRequest()).sample(range(2))
    assert torch.equal(ours, by_request)


def test_options_replace_the_models_one_by_one() -> None:
    model = loaded()
    assert model.request(steps=3).sampling == replace(model.sampling, steps=3)
    listed = ddpm_engine.Sampler(model, model.request(timesteps=(900, 500, 100)))
    assert listed.evaluations == 3
    with pytest.raises(TypeError, match="stepz"):
        model.sample(1, stepz=3)


def test_a_batch_without_labels_forgets_those_of_the_batch_before() -> None:
    model = loaded(classes=3)
    labels = ddpm_engine.Conditioning(torch.tensor([2, 2]))
    null = ddpm_engine.Conditioning(torch.tensor([3, 3]))
    sampler = ddpm_engine.Sampler(model, model.request(classes="none"))
    expected = sampler.sample([0, 1])
    assert not torch.equal(sampler.sample([0, 1], conditioning=labels), expected)
    assert torch.equal(sampler.sample([0, 1]), expected)
    assert torch.equal(sampler.sample([0, 1], conditioning=null), expected)


def test_batches_with_and_without_labels_share_no_buffers() -> None:

    def network(x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        shift = 0.0 if conditioning.labels is None else conditioning.labels[:, None, None, None]
        return 0.1 * x + shift

    model = ddpm_engine.DiffusionModel(
        network, ddpm_engine.NoiseSchedule.linear(100), "eps", sample_shape=(1, 4, 4)
    )
    sampler = ddpm_engine.Sampler(model, model.request(steps=4))
    plain = sampler.sample([0, 1])
    sampler.sample([0, 1], conditioning=ddpm_engine.Conditioning(torch.ones(2)))
    assert torch.equal(sampler.sample([0, 1]), plain)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model = loaded(classes=3, prediction="v")
    model.save_pretrained(tmp_path / "pipeline")
    again = ddpm_engine.load(tmp_path / "pipeline", device="cpu")
    assert again.prediction == "v"
    options: dict[str, Any] = {"sampler": "ddim", "steps": 4, "progress": False}
    assert torch.equal(again.sample(2, **options).tensor, model.sample(2, **options).tensor)
    model.network.save_pretrained(tmp_path / "unet")
    network = UNet.from_pretrained(tmp_path / "unet")
    assert network.config == model.network.config
    theirs = model.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in network.state_dict().items())


def test_a_name_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    loaded().save_pretrained(tmp_path / "fetched")
    names: list[str] = []

    def snapshot_download(name: str, **_: Any) -> str:
        names.append(name)
        return str(tmp_path / "fetched")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert load_model(Path("someone/some-model")).config.model == TINY_GREY
    assert UNet.from_pretrained("someone/some-model").config == TINY_GREY
    assert names == ["someone/some-model"] * 2


def test_an_unreachable_or_uninstalled_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(name: str, **_: Any) -> str:
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"there is no folder someone/m, .*service not known\)"):
        load_model("someone/m")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        load_model("someone/m")


def test_a_misspelt_folder_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="there is no usable checkpoint in runs/digitz"):
        load_model("runs/digitz")
