"""Moments and images of autoencoders against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.autoencoders import kl_folder, tiny_folder

from ddpm_engine.images.latent_codec import LatentCodec
from ddpm_engine.networks.autoencoder.folders import open_autoencoder

diffusers: Any = pytest.importorskip("diffusers")

IMAGES = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
KINDS: dict[str, tuple[Callable[..., str], dict[str, Any]]] = {
    "kl": (kl_folder, {}),
    "kl without attention": (
        kl_folder,
        {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "kl with a shift": (
        kl_folder, {"latent_channels": 16, "shift_factor": 0.1159, "scaling_factor": 0.3611}
    ),
    "tiny": (tiny_folder, {}),
}  # fmt: skip


def peer_of(place: str) -> Any:
    kind = "AutoencoderKL" if "down_block_types" in (Path(place) / "config.json").read_text() else (
        "AutoencoderTiny"
    )  # fmt: skip
    return getattr(diffusers, kind).from_pretrained(place).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_moments_and_images_are_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    save, config = KINDS[kind]
    place = save(tmp_path, **config)
    ours, theirs = open_autoencoder(place), peer_of(place)
    encoded = theirs.encode(IMAGES / 127.5 - 1)
    moments = ours.moments(IMAGES)
    if kind == "tiny":
        means, certain = moments.chunk(2, dim=1)
        torch.testing.assert_close(means, encoded.latents, rtol=0, atol=1e-5)
        assert (certain == -30).all()
    else:
        means, logvars = moments.chunk(2, dim=1)
        torch.testing.assert_close(means, encoded.latent_dist.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(logvars, encoded.latent_dist.logvar, rtol=0, atol=1e-5)
    assert ours.latent_shape(32, 48) == means.shape[1:]
    images = (ours.decode(means) / 127.5) - 1
    # Random weights make values beyond [-1, 1].
    torch.testing.assert_close(images, theirs.decode(means).sample, rtol=1e-5, atol=1e-5)
    assert images.std() > 0.01, "not all the same"


@torch.no_grad()
def test_samples_are_scaled_as_pipelines_do(tmp_path: Path) -> None:
    place = kl_folder(tmp_path, shift_factor=0.1159, scaling_factor=0.3611)
    codec, theirs = LatentCodec(open_autoencoder(place)), peer_of(place)
    x = codec.encode(IMAGES)
    expected = (theirs.encode(IMAGES / 127.5 - 1).latent_dist.mode() - 0.1159) * 0.3611
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    images = theirs.decode(x / 0.3611 + 0.1159).sample
    processor = diffusers.image_processor.VaeImageProcessor()
    levels = processor.postprocess(images, output_type="np")
    assert abs(codec.decode(x) / 255 - levels).max() <= 0.5 / 255 + 1e-5
    assert torch.equal(codec.levels(x), torch.from_numpy(codec.decode(x)))


@torch.no_grad()
def test_extreme_log_variances_are_clamped_as_in_diffusers(tmp_path: Path) -> None:
    place = kl_folder(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"] += torch.tensor([0, 0, 0, 0, 100, -100, 0, 0])
    save_file(tensors, file, {"format": "pt"})
    moments = open_autoencoder(place).moments(IMAGES)
    theirs = peer_of(place).encode(IMAGES / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments[:, 4:], theirs.logvar, rtol=0, atol=1e-5)
    assert moments[:, 4:].min() == -30
    assert moments[:, 4:].max() == 20


@torch.no_grad()
def test_attention_under_its_former_names(tmp_path: Path) -> None:
    place = kl_folder(tmp_path)
    expected = open_autoencoder(place).moments(IMAGES)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in former.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(open_autoencoder(place).moments(IMAGES), expected)
    torch.testing.assert_close(
        peer_of(place).encode(IMAGES / 127.5 - 1).latent_dist.mean, expected[:, :4], rtol=0,
        atol=1e-5,
    )  # fmt: skip
