from __future__ import annotations

import gzip
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.packing.sources.source import Example
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import encode

RNG = np.random.default_rng(0)


def random_image(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def read(name: str | Path) -> list[Example]:
    return list(open_source(str(name)).examples)


def refused(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        read(name)
    return str(caught.value)


def test_digits() -> None:
    source = open_source("digits")
    examples = list(source.examples)
    assert len(source.examples) == len(examples) == 1797
    assert source.classes == tuple("0123456789")
    assert examples[0].image.shape == (8, 8, 1)
    assert {v for e in examples for v in np.unique(e.image)} == {
        round(v * 255 / 16) for v in range(17)
    }
    assert [e.label for e in examples[:10]] == list(range(10))


def test_photos() -> None:
    from sklearn.datasets import load_sample_images

    source = open_source("photos")
    assert source.classes == ("china", "flower")
    labels = [source.examples[i].label for i in range(0, len(source.examples), 10)]
    half = len(labels) // 2
    assert labels == [0] * half + [1] * half
    assert open_source("photos").revision == source.revision
    # The first square is a corner of the photograph, four pixels of it averaged to one each way.
    photo = load_sample_images().images[0]
    corner = photo[:128, :128].reshape(32, 4, 32, 4, 3).mean((1, 3))
    first, second = source.examples[0].image, source.examples[1].image
    assert first.dtype == np.uint8
    assert np.abs(first - corner).max() <= 0.5
    # The next one lies two pixels to the right of it.
    assert np.array_equal(first[:, 2:], second[:, :-2])


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    image = random_image(4, 4, 3)
    for name in ("dog/b.png", "cat/x/a.v2.PNG", "dog/.hidden.txt", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, "png"))
    source = open_source(str(tmp_path))
    examples = list(source.examples)
    assert source.classes == ("cat", "dog")
    assert len(source.examples) == 2
    assert [(e.key, e.label) for e in examples] == [("cat/x/a.v2", 0), ("dog/b", 1)]
    assert all(np.array_equal(e.image, image) for e in examples)


def test_images_directly_inside_have_no_labels(tmp_path: Path) -> None:
    for extension in ("png", "jpg", "webp", "npy"):
        (tmp_path / f"{extension}.{extension}").write_bytes(
            encode(random_image(4, 4, 3), extension)
        )
    source = open_source(str(tmp_path))
    assert source.classes is None
    assert [(e.key, e.label) for e in source.examples] == [
        ("jpg", None), ("npy", None), ("png", None), ("webp", None),
    ]  # fmt: skip


def test_what_is_wrong_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(random_image(4, 4, 3), "png"))
    (tmp_path / "old.gif").write_bytes(b"GIF89a")
    assert "old.gif is not an image" in refused(tmp_path)
    (tmp_path / "old.gif").rename(tmp_path / "damaged.png")
    assert "damaged.png" in refused(tmp_path)
    (tmp_path / "damaged.png").unlink()
    (tmp_path / "cats").mkdir()
    assert "cats" in refused(tmp_path)
    (tmp_path / "a.png").unlink()
    assert "cats holds no images" in refused(tmp_path)
    assert "no source" in refused(tmp_path / "nowhere")
    (tmp_path / "movie.mp4").touch()
    assert "movie.mp4" in refused(tmp_path / "movie.mp4")


def test_npz(tmp_path: Path) -> None:
    images, labels = random_image(3, 4, 5), np.array([2, 0, 1], np.int64)
    for names in (("images", "labels"), ("arr_0", "arr_1"), ("x", "y")):
        arrays: dict[str, Any] = dict(zip(names, (images, labels), strict=True))
        np.savez(tmp_path / "set.npz", **arrays)
        examples = read(tmp_path / "set.npz")
        assert np.array_equal(np.stack([e.image for e in examples]), images[..., None])
        assert [e.label for e in examples] == [2, 0, 1]
    (tmp_path / "set.npz").write_bytes(b"PK\x03\x04 nothing")
    assert "set.npz" in refused(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "convert it to uint8"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"\[2, 3, 4, 4\]"),
        ({"pixels": np.zeros((2, 4, 4, 3), np.uint8)}, "holds pixels"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, r"integers \[2\]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, r"float64"),
        ({"images": np.array([{}], dtype=object)}, "pickle"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "set.npz"))


def cifar_record(head: list[int], image: np.ndarray) -> bytes:
    return bytes(head) + image.transpose(2, 0, 1).tobytes()


def test_cifar10_folder_archive_and_file(tmp_path: Path) -> None:
    images = random_image(4, 32, 32, 3)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        record = cifar_record([9 - number], images[number])
        (folder / f"{name}.bin").write_bytes(record)
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for place in (folder, archive):
        source = open_source(str(place))
        examples = list(source.examples)
        assert source.classes == tuple(names)
        assert [e.label for e in examples] == [9, 8]
        assert np.array_equal(np.stack([e.image for e in examples]), images[:2])
    (test,) = read(folder / "test_batch.bin")
    assert np.array_equal(test.image, images[2])
    archive.write_bytes(archive.read_bytes()[:-200])
    assert "cifar-10-binary.tar.gz" in refused(archive)
    (folder / "data_batch_2.bin").write_bytes(bytes(100))
    assert "data_batch_2.bin" in refused(folder)


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    image = random_image(32, 32, 3)
    (tmp_path / "train.bin").write_bytes(cifar_record([3, 42], image))
    (example,) = read(tmp_path)
    assert example.label == 42
    assert np.array_equal(example.image, image)


def test_pickled_cifar_is_refused_unread(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({}))
    (folder / "data_batch_1").write_bytes(pickle.dumps({}))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    assert "cifar-10-binary.tar.gz" in refused(folder)
    assert "cifar-10-binary.tar.gz" in refused(tmp_path / "cifar-10-python.tar.gz")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str) -> None:
    images = random_image(3, 5, 4)
    pack = gzip.compress if suffix else bytes
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    head = b"".join(n.to_bytes(4, "big") for n in (0x803, *images.shape))
    path.write_bytes(pack(head + images.tobytes()))
    assert [e.label for e in read(path)] == [None] * 3
    labels = b"".join(n.to_bytes(4, "big") for n in (0x801, 3)) + bytes([7, 0, 9])
    labels_path = tmp_path / "train-labels-idx1-ubyte"
    labels_path.write_bytes(labels)
    examples = read(path)
    assert [e.label for e in examples] == [7, 0, 9]
    assert np.array_equal(np.stack([e.image for e in examples]), images[..., None])
    labels_path.write_bytes(b"".join(n.to_bytes(4, "big") for n in (0x801, 1)) + b"\0")
    assert "1 labels for the 3 images" in refused(path)
    path.write_bytes(pack(head + images.tobytes()[:-1]))
    assert "claims [3, 5, 4]" in refused(path)
    path.write_bytes(b"\x1f\x8b nonsense")
    assert str(path) in refused(path)


def test_hugging_face_data_set_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = random_image(3, 6, 6, 3)
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows: dict[str, list[Any]] = {
        "caption": ["a", "b", "c"],
        "photo": [{"bytes": encode(i, "png"), "path": None} for i in images],
        "kind": [1, 0, 1],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "splits")
    for name in (f"hf:{tmp_path}/plain", f"hf:{tmp_path}/splits:test"):
        source = open_source(name)
        examples = list(source.examples)
        assert len(source.examples) == 3
        assert source.classes == ("cat", "dog")
        assert [e.label for e in examples] == [1, 0, 1]
        assert np.array_equal(np.stack([e.image for e in examples]), images)
    assert "'train'" in refused(f"hf:{tmp_path}/splits")
    table.remove_columns("photo").save_to_disk(tmp_path / "blind")
    assert "no image column" in refused(f"hf:{tmp_path}/blind")
    assert "hf:NAME" in refused("hf:")
    rows["photo"][1] = {"bytes": b"GIF89a" + bytes(30), "path": None}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "gif")
    assert "image 1" in refused(f"hf:{tmp_path}/gif")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'ddpm-engine[huggingface]'" in refused("hf:mnist")
