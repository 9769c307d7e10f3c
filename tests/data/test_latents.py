"""Sets of latents: packed, read, damaged, and refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.autoencoders import kl_folder
from tests.data import captioned
from tests.data.captioned import MeanEmbedder, WordEncoder
from tests.data.sets import PIXELS, contents, flip
from tests.data.sets import pack as pack_images
from torch import Tensor

from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.dataset import Batch, ShardDataset, collate
from ddpm_engine.data.loader import BatchPositions, make_batches
from ddpm_engine.data.members import encode_moments, parse_moments
from ddpm_engine.data.open import make_missing_shards, open_dataset
from ddpm_engine.data.packing import shard_writer
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.latents import LatentEncoder
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.shards.manifest import LatentSpace
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.sources import RealImages
from ddpm_engine.networks.autoencoder.folders import open_autoencoder


class Means:
    """Means of squares of two pixels, and their first channel: enough of an autoencoder to pack."""

    factor, channels, image_channels, scale, shift = 2, 1, 3, 0.5, 0.25
    device = torch.device("cpu")

    def __init__(self, place: str = "means", size: float = 1.0) -> None:
        self.place, self.fingerprint, self._size = place, f"{place:0>64}", size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        if height % 2 or width % 2:
            raise UserError("sides must be multiples of 2")
        return 1, height // 2, width // 2

    def moments(self, images: Tensor) -> Tensor:
        x = images.float() / 255 * self._size
        means = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2)
        return torch.cat((means, x[:, :1, ::2, ::2]), 1)


def pack(folder: Path, autoencoder: LatentEncoder | None = None, **options: Any) -> Path:
    write_shards(
        captioned.source(), folder, per_shard=5, autoencoder=autoencoder or Means(), **options
    )
    return folder


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(tmp_path / "set", flips=True, text_encoder=WordEncoder())


def expected(number: int, mirrored: bool = False) -> Tensor:
    image = torch.tensor(PIXELS[number]).permute(2, 0, 1)[None]
    return Means().moments(image.flip(3) if mirrored else image)[0].half()


def numbers(dataset: ShardDataset, count: int) -> list[int]:
    return dataset.order.samples_at(range(count)).tolist()


def test_batches_hold_the_moments_and_what_belongs_to_them(packed: Path) -> None:
    for flips in (False, True):
        dataset = ShardDataset(packed, seed=0, flips=flips)
        assert dataset.shape == (1, 4, 4)
        assert dataset.latents == LatentSpace(
            "means", f"{'means':0>64}", 1, 2, 0.5, 0.25, 8, 8, 3, flipped=True
        )
        batch = collate(dataset.__getitems__(range(5)))
        order = numbers(dataset, 5)
        views = (False, True) if flips else (False,)
        moments = torch.stack(
            [torch.stack([expected(k, view) for view in views]) for k in order]
        )  # fmt: skip
        assert batch.images.dtype == torch.float16
        assert torch.equal(batch.images, moments if flips else moments[:, 0])
        assert batch.labels is not None
        assert batch.labels.tolist() == [k % 3 for k in order]
        assert batch.text is not None
        for caption, k in zip(batch.captions or (), order, strict=True):
            assert caption in captioned.captions_of(k)
    # The latent of the mirrored image is not the mirrored latent.
    assert not torch.equal(batch.images[:, 1], batch.images[:, 0].flip(-1))


def test_bytes_do_not_depend_on_processes_and_packing_resumes(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path / "two", flips=True, text_encoder=WordEncoder(), processes=2)
    assert contents(tmp_path / "two") == contents(packed)
    made: list[str] = []

    def index_one(path: Path) -> Any:
        made.append(path.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(path)

    whole = shard_writer.index_shard
    monkeypatch.setattr(shard_writer, "index_shard", index_one)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "again", flips=True, text_encoder=WordEncoder())
    pack(tmp_path / "again", flips=True, text_encoder=WordEncoder())
    assert made == [f"shard-00000{number}.tar" for number in (0, 1, 2, 2)]
    assert contents(tmp_path / "again") == contents(packed)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "other")
    made.clear()
    # Of another autoencoder, or without flips, nothing is kept.
    monkeypatch.undo()
    pack(tmp_path / "other", Means("others"), image_embedder=MeanEmbedder())
    manifest = open_shards(tmp_path / "other").manifest
    assert manifest.latents is not None
    assert (manifest.latents.place, manifest.latents.flipped) == ("others", False)
    assert manifest.embeddings is not None
    assert verify(tmp_path / "other") == []


def test_a_flipped_bit_is_noticed_replaced_and_named(packed: Path) -> None:
    entry = open_shards(packed).indexes[0][2]
    assert not entry["offset"]
    place = entry["moments"]
    flip(packed / "shard-000000.tar", int(place["offset"] + place["size"] - 1))
    dataset = ShardDataset(packed, seed=0)
    samples = [dataset[position] for position in range(12)]
    (fault,) = [fault for sample in samples for fault in sample.faults]
    assert fault.key == "00000002-k2"
    assert "moments" in fault.reason
    assert any(f.key == "00000002-k2" and "moments" in f.reason for f in verify(packed))


@pytest.mark.parametrize(
    "moments",
    [
        np.zeros((1, 2, 4, 4), np.float16), np.zeros((2, 2, 4, 4), np.float32),
        np.full((2, 2, 4, 4), np.nan, np.float16), np.zeros((2, 2, 64), np.float16),
        np.asfortranarray(np.zeros((2, 2, 4, 4), np.float16)),
    ],
)  # fmt: skip
def test_moments_that_are_not_the_sets_are_refused(moments: Any) -> None:
    shape = (2, 2, 4, 4)
    good = encode_moments(np.ones(shape, np.float16))
    assert parse_moments(good, shape).shape == shape
    stream = io.BytesIO()
    np.save(stream, moments)
    for damaged in (stream.getvalue(), b"", good[:-1], good + b"\0", good[20:]):
        with pytest.raises(ValueError, match="latents' moments"):
            parse_moments(damaged, shape)


@pytest.mark.parametrize(
    "change",
    [{"factor": 3}, {"scale": 0}, {"scale": 1e999}, {"flipped": 1}, {"height": 16}, {"place": 3}],
)
def test_a_manifest_that_describes_no_latents_is_refused(packed: Path, change: Any) -> None:
    path = packed / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format"] == 3
    manifest["latents"] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_shards(packed)


def test_what_would_need_images_is_refused(packed: Path) -> None:
    with pytest.raises(UserError, match="holds latents, which cannot be resized"):
        ShardDataset(packed, seed=0, size=8)
    with pytest.raises(UserError, match="holds latents, which are no images"):
        RealImages(open_shards(packed), (8, 8, 3))
    for path in [*packed.glob("*.npy"), packed / "manifest.json"]:
        path.unlink()
    with pytest.raises(UserError, match="is a latent, of an autoencoder that only"):
        index_shards(packed)
    stream = f"{packed}/shard-{{000000..000002}}.tar"
    with pytest.raises(UserError, match="streamed, which gives no latents"):
        open_dataset(DataConfig(path=stream, autoencoder="x", workers=0), 4, 1, None, 0)
    with pytest.raises(UserError, match="it is a latent: use indexed shards"):
        next(iter(open_dataset(DataConfig(path=stream, workers=0), 4, 1, None, 0)))


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    source = captioned.source()
    with pytest.raises(UserError, match="`flips` is given without an autoencoder"):
        write_shards(source, tmp_path / "set", flips=True)
    with pytest.raises(UserError, match="multiples of 2"):
        write_shards(source, tmp_path / "set", size=7, autoencoder=Means())
    with pytest.raises(UserError, match="`channels` is 1, but the autoencoder means takes"):
        write_shards(source, tmp_path / "set", channels=1, autoencoder=Means())
    with pytest.raises(UserError, match="exceed the range of half precision"):
        write_shards(source, tmp_path / "set", autoencoder=Means(size=1e6))


def opened(folder: Path, size: int = 4, channels: int = 1, **config: Any) -> Any:
    return open_dataset(DataConfig(path=folder, workers=0, **config), size, channels, 3, 0)


def test_what_does_not_fit_the_run_is_refused(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ddpm_engine.data.latents.autoencoder_fingerprint", lambda place: f"{place:0>64}"
    )
    assert not opened(packed, autoencoder="means").flips
    assert opened(packed, horizontal_flip=True)[0].image.shape == (2, 2, 4, 4)
    with pytest.raises(UserError, match=r"are 4×4 with 1 channels.*`model.sample_size` 4 and"):
        opened(packed, size=8)
    with pytest.raises(UserError, match="but the network's are 4×4 with 3"):
        opened(packed, channels=3)
    with pytest.raises(UserError, match=r"`data.autoencoder` others is another than"):
        opened(packed, autoencoder="others")
    plain = pack(tmp_path / "plain")
    with pytest.raises(UserError, match="holds no latents of mirrored images"):
        opened(plain, horizontal_flip=True)
    mix: dict[str, Any] = {"weights": (1, 1), "mix_with": (str(plain),)}
    assert opened(packed, **mix).latents is not None
    for other in (pack(tmp_path / "others", Means("others")), pack_images(tmp_path / "images")):
        with pytest.raises(UserError, match="hold latents of different autoencoders, or one"):
            opened(packed, **mix | {"mix_with": (str(other),)})
    with pytest.raises(UserError, match=r"but .*images holds images"):
        opened(tmp_path / "images", size=8, channels=3, autoencoder="means")


def test_a_run_packs_its_source_as_an_autoencoders_latents(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    place = kl_folder(tmp_path / "vae", latent_channels=3)
    (tmp_path / "images").mkdir()
    for k in range(6):
        Image.fromarray(PIXELS[k]).save(tmp_path / "images" / f"{k}.png")
    source = str(tmp_path / "images")
    config = DataConfig(
        path=tmp_path / "set", source=source, autoencoder=place, horizontal_flip=True, workers=0
    )
    make_missing_shards(config, (2, 2))
    dataset = open_dataset(config, (2, 2), 3, None, 0)
    autoencoder = open_autoencoder(place)
    assert isinstance(dataset, ShardDataset)
    images = torch.tensor(PIXELS[numbers(dataset, 6)]).permute(0, 3, 1, 2)
    read: list[Batch] = list(make_batches(dataset, BatchPositions(3, end_step=2), workers=1))
    moments = torch.cat([batch.images for batch in read]).float()
    assert moments.shape == (6, 2, 6, 2, 2)
    for view, seen in enumerate((images, images.flip(3))):
        torch.testing.assert_close(
            moments[:, view], autoencoder.moments(seen), atol=2e-3, rtol=2e-3
        )
    threads = torch.get_num_threads()
    for processes in (2, 1):
        torch.set_num_threads(processes)
        try:
            pack(tmp_path / str(processes), autoencoder, flips=True, processes=processes)
        finally:
            torch.set_num_threads(threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    other = kl_folder(tmp_path / "other", seed=1, latent_channels=3)
    with pytest.raises(UserError, match="is another than the one that"):
        open_dataset(replace(config, autoencoder=other), (2, 2), 3, None, 0)
