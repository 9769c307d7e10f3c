"""The transformer against diffusers' `DiTTransformer2DModel`: numbers, gradients, folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.autoencoders import kl_folder
from tests.peers.test_unet import randomise
from torch import Tensor, nn

import ddpm_engine
from ddpm_engine.checkpoints.load import config_of
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.dit import files
from ddpm_engine.networks.dit.config import DiTConfig
from ddpm_engine.networks.dit.dit import DiT

diffusers = pytest.importorskip("diffusers")

# DiT-XL/2 on latents of 256×256 images, as facebook/DiT-XL-2-256, but narrow and shallow.
PUBLISHED = DiTConfig(
    sample_size=8, out_channels=8, num_layers=3, num_attention_heads=2, attention_head_dim=12,
    num_class_embeds=11, norm_eps=1e-5, shared_embedding=False,
)  # fmt: skip
VARIANTS = {
    "published": PUBLISHED,
    "swiglu": replace(PUBLISHED, feed_forward="swiglu", mlp_ratio=6.0),
    "patches of 4": replace(PUBLISHED, patch_size=4, in_channels=3, out_channels=3),
    "unconditional": replace(PUBLISHED, num_class_embeds=None),
}
LABELS = torch.tensor([0, 5, 10])
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-11}


def peer_of(config: DiTConfig, seed: int = 1) -> Any:
    fields = {k: v for k, v in files.config_entries(config).items() if not k.startswith("_")}
    peer = diffusers.DiTTransformer2DModel(**fields).eval()
    randomise(peer, seed)
    for name, parameter in peer.named_parameters():
        if config.num_class_embeds is None and "embedding_table" in name:
            nn.init.zeros_(parameter)
    return peer


def inputs(config: DiTConfig, side: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = LABELS if config.num_class_embeds else torch.zeros(3, dtype=torch.int64)
    x = torch.randn(3, config.in_channels, side, side, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 500, 999]), labels


def ours_of(config: DiTConfig, peer: Any) -> DiT:
    network = DiT(config).eval()
    network.load_state_dict(files.from_stored(config, peer.state_dict()), strict=True)
    return network


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize("name", VARIANTS)
def test_predictions(name: str, side: int) -> None:
    config, (x, t, labels) = VARIANTS[name], inputs(VARIANTS[name], side)
    theirs = peer_of(config)
    ours = ours_of(config, theirs)
    given = Conditioning(labels if config.num_class_embeds else None)
    for dtype, bound in BOUNDS.items():
        with torch.no_grad():
            actual = ours.to(dtype)(x.to(dtype), t, given)
            expected = theirs.to(dtype)(x.to(dtype), t, labels).sample
        assert 0.2 < expected.std() < 5, "the bounds are meant for outputs of order one"
        assert (actual - expected).abs().max() <= bound


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients(name: str) -> None:
    config, (x, t, labels) = VARIANTS[name], inputs(VARIANTS[name], 8)
    theirs = peer_of(config).double()
    ours = ours_of(config, theirs).double()
    given = Conditioning(labels if config.num_class_embeds else None)
    ours(x.double(), t, given).square().mean().backward()
    theirs(x.double(), t, labels).sample.square().mean().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    if config.num_class_embeds is None:
        gradients = {n: g for n, g in gradients.items() if "embedding_table" not in n}
    expected = files.from_stored(config, gradients)
    found = {n: p.grad for n, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-11, rtol=1e-9, msg=name)


# --- Folders


def published(folder: Path, config: DiTConfig, former: bool = False) -> Any:
    """Save a model as `DiTPipeline` does."""
    peer = peer_of(config)
    peer.save_pretrained(folder / "transformer")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    kind = files.FORMER_CLASS if former else files.CLASS
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {"0": "tench", "1": "goldfish"},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", kind],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    kl_folder(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(index))
    if former:
        file = folder / "transformer" / "config.json"
        entries = json.loads(file.read_text()) | {
            "_class_name": kind,
            "only_cross_attention": False,
        }
        del entries["norm_eps"]
        file.write_text(json.dumps(entries))
    return peer


@pytest.mark.parametrize("former", [False, True])
def test_a_published_folder(former: bool, tmp_path: Path) -> None:
    peer = published(tmp_path / "DiT", PUBLISHED, former)
    model = ddpm_engine.load(tmp_path / "DiT", "cpu")
    assert model.codec.clip_range is None
    assert model.config.model == config_of(tmp_path / "DiT").model == PUBLISHED
    assert model.spec.null_class == 10
    assert (model.sampling.sampler, model.sampling.variance) == ("ddim", "learned_range")
    assert not model.config.clips_x0
    x, t, labels = inputs(PUBLISHED, 8)
    with torch.no_grad():
        expected = peer(x, t, labels).sample
        assert (model.network(x, t, Conditioning(labels)) - expected).abs().max() <= 1e-5
    for sampler in ("ddim", "ddpm"):
        samples = model.sample(2, sampler=sampler, steps=3, classes=(3,))
        assert samples.tensor.shape == (2, 4, 8, 8)

    export_pipeline(model, tmp_path / "out")
    stored = "transformer/diffusion_pytorch_model.safetensors"
    theirs, ours = load_file(tmp_path / "DiT" / stored), load_file(tmp_path / "out" / stored)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer"
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(x, t, labels).sample, expected)
    assert ddpm_engine.load(tmp_path / "out", "cpu").config.model == PUBLISHED


def own(config: DiTConfig) -> Any:
    network = DiT(config).eval().requires_grad_(False)
    randomise(network, 3)
    run = RunConfig(model=config)
    if config.out_channels > config.in_channels:
        run = replace(run, sampling=replace(run.sampling, variance="learned_range"))
    return ddpm_engine.LoadedModel.from_config(network, run, "0" * 64)


@pytest.mark.parametrize("name", ["published", "unconditional"])
def test_an_export_with_one_embedding(name: str, tmp_path: Path) -> None:
    config = replace(VARIANTS[name], shared_embedding=True)
    model = own(config)
    export_pipeline(model, tmp_path / "out")
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer"
    )
    x, t, labels = inputs(config, 8)
    given = Conditioning(labels if config.num_class_embeds else None)
    with torch.no_grad():
        difference = theirs.eval()(x, t, labels).sample - model.network(x, t, given)
    assert difference.abs().max() <= 1e-5
    again = ddpm_engine.load(tmp_path / "out", "cpu")
    assert again.config.model == config
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name


def test_the_card_says_how_to_sample_with_diffusers(tmp_path: Path) -> None:
    export_pipeline(own(replace(PUBLISHED, out_channels=4)), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "diffusion transformer (`DiTTransformer2DModel`)" in card
    code = (
        card.split("```python\n")[1].split("```")[0].replace('"DIR"', f"{str(tmp_path / 'out')!r}")
    )
    scope: dict[str, Any] = {"labels": torch.zeros(4, dtype=torch.int64)}
    exec(code.replace("set_timesteps(1000)", "set_timesteps(3)"), scope)
    assert scope["x"].shape == (4, 4, 8, 8)


# --- What cannot be read or written


def edit(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(norm_type="ada_norm"), "norm_type"),
        (edit(attention_bias=False), "attention_bias"),
        (edit(activation_fn="geglu"), "activation_fn is .*gelu-approximate and swiglu"),
        (edit(patch_size=3), "`patch_size` is 3; patches must divide the `sample_size` 8"),
        (edit(new_entry=7), "new_entry"),
        (edit(_class_name="PixArtTransformer2DModel"), "UNet2DModel.* DiTTransformer2DModel"),
        (edit(_shared_embedding=True), "is not what the other blocks have"),
        (edit(num_layers=2), r"not of the network.*[\s\S]*embeddings.2.* is not wanted"),
        (edit(num_embeds_ada_norm=0), "is not zero, but num_embeds_ada_norm is 0"),
    ],
)
def test_folders_that_cannot_be_read(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    published(tmp_path, PUBLISHED)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        ddpm_engine.load(tmp_path, "cpu")


def test_what_diffusers_does_not_have_is_not_exported(tmp_path: Path) -> None:
    config = replace(PUBLISHED, out_channels=4, norm="rms", rotary=True, feed_forward="swiglu")
    with pytest.raises(UserError, match="DiTTransformer2DModel of diffusers") as caught:
        export_pipeline(own(config), tmp_path / "out")
    for named in ("`model.norm` is rms", "`model.rotary` is True", "`model.mlp_ratio` is 4"):
        assert named in str(caught.value)
    assert not (tmp_path / "out").exists()
