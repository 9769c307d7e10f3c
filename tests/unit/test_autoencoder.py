"""Autoencoders in folders: opened safely, in slices and tiles, in half precision where safe."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.autoencoders import kl_folder, tiny_folder

from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder import autoencoder as module
from ddpm_engine.networks.autoencoder.autoencoder import Autoencoder
from ddpm_engine.networks.autoencoder.folders import autoencoder_fingerprint, open_autoencoder
from ddpm_engine.networks.autoencoder.tiling import tiled

pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return kl_folder(tmp_path / "autoencoder")


def change(place: str, **entries: Any) -> None:
    file = Path(place) / "config.json"
    config = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def test_what_the_configuration_says(place: str, tmp_path: Path) -> None:
    opened = open_autoencoder(place)
    assert (opened.channels, opened.factor, opened.image_channels) == (4, 4, 3)
    assert (opened.scale, opened.shift) == (0.18215, 0.0)
    assert opened.place == place
    assert opened.latent_shape(32, 48) == (4, 8, 12)
    tiny = open_autoencoder(tiny_folder(tmp_path / "tiny"))
    assert (tiny.channels, tiny.factor, tiny.scale, tiny.shift) == (4, 2, 1.0, 0.0)


def test_a_pipeline_holds_one(place: str, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    shutil.copytree(place, pipeline / "vae")
    assert open_autoencoder(str(pipeline)).fingerprint == open_autoencoder(place).fingerprint


def test_the_fingerprint_is_that_of_weights_and_scale(place: str, tmp_path: Path) -> None:
    fingerprint = open_autoencoder(place).fingerprint
    assert fingerprint == autoencoder_fingerprint(place)
    assert autoencoder_fingerprint(kl_folder(tmp_path / "other", seed=1)) != fingerprint
    change(place, _diffusers_version="9.9", sample_size=512, force_upcast=False, shift_factor=0.0)
    change(place, mid_block_add_attention="absent")  # it is the default
    assert autoencoder_fingerprint(place) == fingerprint
    change(place, scaling_factor=0.2)
    assert autoencoder_fingerprint(place) != fingerprint


def test_images_are_taken_in_slices(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, batch = open_autoencoder(place), images(5, 16, 16)
    moments = opened.moments(batch)
    decoded = opened.decode(moments[:, :4])
    monkeypatch.setattr(module, "_PIXELS", {"cpu": 2 * 16 * 16})
    sizes = []
    encoder = opened._model.encoder.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        result: torch.Tensor = encoder(x)
        return result

    opened._model.encoder.forward = counted
    torch.testing.assert_close(opened.moments(batch), moments, rtol=0, atol=1e-5)
    torch.testing.assert_close(opened.decode(moments[:, :4]), decoded, rtol=0, atol=2e-3)
    assert sizes == [2, 2, 1]
    assert opened.moments(batch[:0]).shape == (0, 8, 4, 4)
    assert opened.decode(moments[:0, :4]).shape == (0, 3, 16, 16)


def test_fewer_at_a_time_where_memory_is_too_small(place: str) -> None:
    opened, batch = open_autoencoder(place), images(5, 16, 16)
    expected = opened.moments(batch)
    encoder = opened._model.encoder.forward

    def small(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("as on a GPU")
        result: torch.Tensor = encoder(x)
        return result

    opened._model.encoder.forward = small
    torch.testing.assert_close(opened.moments(batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(96, 96), (96, 40), (40, 100)])
def test_large_images_are_taken_in_tiles(size: tuple[int, int], tmp_path: Path) -> None:
    # Without norms over the whole image, tiles differ from it near their edges only.
    opened = open_autoencoder(tiny_folder(tmp_path))
    batch = images(2, *size)
    moments = opened.moments(batch)
    decoded = opened.decode(moments[:, :4])
    opened.largest_side, opened.tile_side = 64, 64
    tiled_moments = opened.moments(batch)
    assert tiled_moments.shape == moments.shape
    spread = moments[:, :4].std()
    assert (tiled_moments - moments).abs().max() < 0.5 * spread
    assert (tiled_moments - moments).square().mean().sqrt() < 0.02 * spread
    difference = opened.decode(moments[:, :4]) - decoded
    assert difference.square().mean().sqrt() < 0.02 * decoded.std()


@pytest.mark.parametrize("side", [8, 9, 20, 33])
def test_tiles_cover_everything_once(side: int) -> None:
    x = torch.rand(1, 2, 3 * side, 3 * 7)
    sizes = set()

    def grown(tile: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(tile.shape[2:]))
        return tile[..., ::3, ::3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    result = tiled(grown, x, tile=8, overlap=2, read=3, written=2)
    torch.testing.assert_close(result, grown(x))
    assert sizes - {(3 * side, 21)} <= {(24, 21)}, "of one size"


def test_a_folder_of_half_precision_only(tmp_path: Path) -> None:
    half = kl_folder(tmp_path / "half", variant="fp16")
    assert not (tmp_path / "half" / WEIGHTS).exists()
    opened, whole = open_autoencoder(half), open_autoencoder(kl_folder(tmp_path / "whole"))
    moments = opened.moments(images(2, 16, 16))
    assert moments.dtype == torch.float32
    expected = whole.moments(images(2, 16, 16))
    torch.testing.assert_close(moments, expected, rtol=0, atol=5e-3)
    assert not torch.equal(moments, expected)


def test_shards(place: str) -> None:
    expected = open_autoencoder(place).moments(images(1, 16, 16))
    folder = Path(place)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    opened = open_autoencoder(place)
    assert torch.equal(opened.moments(images(1, 16, 16)), expected)
    assert opened.fingerprint == autoencoder_fingerprint(place)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors"):
        open_autoencoder(place)


@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_where_it_does_not_overflow(upcast: bool, tmp_path: Path) -> None:
    place = kl_folder(tmp_path, force_upcast=upcast)
    whole, half = open_autoencoder(place), open_autoencoder(place, half=True)
    batch = images(2, 16, 16)
    moments = half.moments(batch)
    assert torch.equal(moments, whole.moments(batch)), "encoded in float32 in any case"
    decoded, expected = half.decode(moments[:, :4]), whole.decode(moments[:, :4])
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, expected) == upcast
    torch.testing.assert_close(decoded, expected, rtol=0, atol=2)


def test_autocast_changes_nothing(place: str) -> None:
    opened, batch = open_autoencoder(place), images(1, 16, 16)
    expected = opened.decode(opened.moments(batch)[:, :4])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(opened.decode(opened.moments(batch)[:, :4]), expected)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, folder / WEIGHTS)


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["decoder.conv_in.bias"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def of_another_class(folder: Path) -> None:
    change(str(folder), _class_name="VQModel")


def by_channel(folder: Path) -> None:
    change(str(folder), latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def unknown_entry(folder: Path) -> None:
    change(str(folder), temperature=2)


def nonsense(folder: Path) -> None:
    change(str(folder), down_block_types=["NoBlock"] * 3)


def no_scale(folder: Path) -> None:
    change(str(folder), scaling_factor=0)


def gigantic(folder: Path) -> None:
    change(str(folder), block_out_channels=[100_000, 100_000, 100_000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, r"no autoencoder in .*holds diffusion_pytorch_model\.safetensors"),
        (remove_weights, r"no weights in .*holds config\.json: it needs"),
        (pickle_weights, "other formats can run code"),
        (cut_weights, "is damaged"),
        (lose_a_tensor, r"decoder\.conv_in\.weight is missing"),
        (not_a_number, r"NaN or infinity, in decoder\.conv_in\.bias"),
        (of_another_class, "_class_name is .VQModel..*AutoencoderKL or AutoencoderTiny"),
        (by_channel, r"latents_mean is \[.*only null"),
        (unknown_entry, "temperature"),
        (nonsense, "NoBlock"),
        (no_scale, "scaling_factor is 0.*must be positive"),
        (gigantic, "not of the network that its configuration describes"),
    ],
)
def test_damaged_folders_are_named(damage: Any, message: str, place: str) -> None:
    damage(Path(place))
    with pytest.raises(UserError, match=message):
        open_autoencoder(place)


def test_places_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .* which is to hold an autoencoder"):
        open_autoencoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no Python package 'no_such_package'"):
        open_autoencoder("package:no_such_package")


def test_a_missing_library_is_named(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'ddpm-engine\[latents\]'"):
        open_autoencoder(place)
    assert len(autoencoder_fingerprint(place)) == 64


def test_images_that_do_not_fit_are_refused(place: str) -> None:
    opened: Autoencoder = open_autoencoder(place)
    with pytest.raises(UserError, match=r"30×32 pixels.*multiples of 4"):
        opened.moments(images(1, 30, 32))
    with pytest.raises(UserError, match=r"1 channels, and the autoencoder .* takes 3"):
        opened.moments(images(1, 32, 32)[:, :1])
