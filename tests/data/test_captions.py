"""Captions and embeddings in shards: what is packed is read, whichever position asks for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data import captioned
from tests.data.captioned import CAPTIONS, MeanEmbedder, WordEncoder, captions_of, source
from tests.data.sets import PIXELS, contents, flip, write_tar
from tests.data.sets import pack as pack_images

from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.dataset import ShardDataset, collate
from ddpm_engine.data.members import (
    EncodedCaption,
    StoredText,
    encode_captions,
    encode_text,
    parse_captions,
)
from ddpm_engine.data.open import open_dataset
from ddpm_engine.data.packing import shard_writer
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import Example
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.data.stream import ShardStream
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import encode
from ddpm_kernels.philox import Stream, random_integers

PNG = encode(PIXELS[0], "png")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return captioned.pack(tmp_path / "set", WordEncoder(), embedder=True)


def number_of(sample: Any) -> int:
    return next(i for i in range(12) if np.array_equal(sample.image, PIXELS[i]))


def test_what_is_packed_is_read(packed: Path) -> None:
    dataset, encoder = ShardDataset(packed, seed=3), WordEncoder()
    manifest = open_shards(packed).manifest
    assert manifest.captions
    assert manifest.text is not None
    assert (manifest.text.channels, manifest.text.pooled_channels) == (6, 3)
    assert (manifest.text.encoder, manifest.text.longest) == (encoder.place, 9)
    assert manifest.embeddings is not None
    assert (manifest.embeddings.name, manifest.embeddings.channels) == ("means", 4)
    assert verify(packed) == []
    for position in range(40):
        sample = dataset[position]
        known = captions_of(number_of(sample))
        place = torch.tensor([position])
        drawn = int(random_integers(3, place, len(known), 0, Stream.CAPTION))
        assert sample.caption == known[drawn]
        assert sample.text is not None
        encoded = encoder.encode([sample.caption])
        assert np.array_equal(sample.text.tokens, encoded.tokens[0].half().numpy())
        assert np.array_equal(sample.text.pooled, encoded.pooled[0].half().numpy())
        assert sample.embedding is not None
        assert np.array_equal(sample.embedding, MeanEmbedder().embed(sample.image[None])[0])


def test_every_caption_of_an_image_comes_up(packed: Path) -> None:
    dataset = ShardDataset(packed, seed=0)
    seen = {dataset[position].caption for position in range(300)}
    assert seen == {caption for number in range(12) for caption in captions_of(number)}


def test_batches_are_padded_to_one_length(packed: Path) -> None:
    dataset = ShardDataset(packed, seed=0)
    assert dataset.text_length == 16
    batch = collate(dataset.__getitems__(range(9)))
    assert batch.text is not None
    assert batch.text_mask is not None
    assert batch.captions is not None
    assert batch.text.shape == (9, 16, 6)
    assert (batch.text.dtype, batch.text_mask.dtype) == (torch.float16, torch.bool)
    assert batch.text_mask.sum(1).tolist() == [len(caption.split()) for caption in batch.captions]
    assert bool((batch.text[~batch.text_mask] == 0).all())
    assert batch.pooled_text is not None
    assert batch.pooled_text.shape == (9, 3)
    assert batch.embeddings is not None
    assert batch.embeddings.dtype == torch.float32
    cut = collate(ShardDataset(packed, seed=0, text_length=2).__getitems__(range(9)))
    assert cut.text is not None
    assert torch.equal(cut.text, batch.text[:, :2])
    padded = collate(ShardDataset(packed, seed=0, text_length=20).__getitems__(range(9)))
    assert padded.text is not None
    assert torch.equal(padded.text[:, :16], batch.text)
    assert not padded.text[:, 16:].any()


def test_only_what_is_asked_for_is_read(packed: Path) -> None:
    plain = ShardDataset(packed, seed=0, captions=False, embeddings=False)
    batch = collate(plain.__getitems__(range(4)))
    assert set(batch.tensors()) == {"images", "labels", "positions"}
    assert batch.captions is None


def test_bytes_depend_neither_on_processes_nor_on_what_was_encoded_before(
    packed: Path, tmp_path: Path
) -> None:
    encoder = WordEncoder()
    for name, processes in (("one", 1), ("two", 2)):
        write_shards(
            source(), tmp_path / name, per_shard=5, processes=processes,
            text_encoder=encoder, image_embedder=MeanEmbedder(),
        )  # fmt: skip
        assert contents(tmp_path / name) == contents(packed)


def test_each_distinct_caption_is_encoded_once(tmp_path: Path) -> None:
    captioned.pack(tmp_path / "set", encoder := WordEncoder())
    assert len(encoder.encoded) == len(set(encoder.encoded))


def test_packing_resumes_with_its_embeddings(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def index_one(path: Path) -> Any:
        made.append(path.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(path)

    whole = shard_writer.index_shard
    monkeypatch.setattr(shard_writer, "index_shard", index_one)
    with pytest.raises(KeyboardInterrupt):
        captioned.pack(tmp_path / "again", WordEncoder(), embedder=True)
    captioned.pack(tmp_path / "again", WordEncoder(), embedder=True)
    assert made == [f"shard-00000{number}.tar" for number in (0, 1, 2, 2)]
    assert contents(tmp_path / "again") == contents(packed)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        captioned.pack(tmp_path / "other", WordEncoder(), embedder=True)
    made.clear()
    monkeypatch.undo()
    # Of another encoder, nothing is kept.
    captioned.pack(tmp_path / "other", WordEncoder(channels=5), embedder=True)
    text = open_shards(tmp_path / "other").manifest.text
    assert text is not None
    assert text.channels == 5
    assert verify(tmp_path / "other") == []


def test_sets_of_images_alone_are_written_as_before(tmp_path: Path) -> None:
    folder = pack_images(tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert not {"captions", "text", "embeddings"} & set(manifest)
    assert open_shards(folder).indexes[0].dtype.names == (
        "key", "offset", "size", "crc32", "extension", "label",
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"text": {"encoder": "x"}},
        {"text": 3},
        {"captions": "yes"},
        {"embeddings": {"name": "x", "fingerprint": "y", "channels": 0}},
        {"embeddings": {"name": 1, "fingerprint": "y", "channels": 4}},
    ],
)
def test_a_manifest_that_describes_no_embeddings_is_refused(packed: Path, change: Any) -> None:
    path = packed / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_shards(packed)


@pytest.mark.parametrize("member", ["captions", "text", "embedding"])
def test_a_flipped_bit_is_noticed_replaced_and_named(packed: Path, member: str) -> None:
    entry = open_shards(packed).indexes[0][2][member]
    flip(packed / "shard-000000.tar", int(entry["offset"] + entry["size"] - 1))
    dataset = ShardDataset(packed, seed=0)
    samples = [dataset[position] for position in range(12)]
    (fault,) = [fault for sample in samples for fault in sample.faults]
    assert fault.key == "00000002-k2"
    assert member in fault.reason
    assert any(f.key == "00000002-k2" and member in f.reason for f in verify(packed))
    # By its position, whatever else is read.
    again = ShardDataset(packed, seed=0)
    position = next(p for p, sample in enumerate(samples) if sample.faults)
    assert again[position].caption == samples[position].caption
    # Those who need none of it read the image.
    plain = ShardDataset(packed, seed=0, captions=False, embeddings=False)
    assert not any(plain[position].faults for position in range(12))


HOSTILE = {
    "big": (b"a" * (10 << 20), "10485760 bytes"),
    "empty": (b"", "no caption"),
    "blank": (b" \n\n", "no caption"),
    "latin": (b"caf\xe9", "not UTF-8"),
    "nul": (b"a\0b", "NUL"),
}
FINE = {
    "emoji": ("👩‍👩‍👧 \u2028 family".encode(), ("👩‍👩‍👧 \u2028 family",)),
    "windows": (b"\xef\xbb\xbfone\r\ntwo\r\n", ("one", "two")),
    "old": (b"one\rtwo", ("one", "two")),
    "long": (b"a " * 5000, ("a " * 4999 + "a",)),
}


def test_hostile_captions_are_right_or_replaced_and_named(tmp_path: Path) -> None:
    members = {name: payload for name, (payload, _) in (HOSTILE | FINE).items()}
    write_tar(
        tmp_path / "a.tar",
        *((f"{name}.{kind}", png) for name, text in members.items()
          for kind, png in (("png", PNG), ("txt", text))),
    )  # fmt: skip
    write_tar(tmp_path / "b.tar", ("bad/0.png", PNG), ("bad/0.txt", b"x"), ("README.txt", b"?"))
    assert index_shards(tmp_path).captions
    dataset = ShardDataset(tmp_path, seed=0)
    samples = [dataset[position] for position in range(200)]
    faults = {fault.key: fault.reason for sample in samples for fault in sample.faults}
    assert set(faults) == set(HOSTILE)
    assert all(reason in faults[name] for name, (_, reason) in HOSTILE.items())
    assert {f.key for f in verify(tmp_path)} == set(faults)
    expected = {"x"} | {caption for _, captions in FINE.values() for caption in captions}
    assert {sample.caption for sample in samples} == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_captions_are_refused_when_they_are_packed(name: str, tmp_path: Path) -> None:
    payload, _ = HOSTILE[name]
    with pytest.raises(ValueError, match="caption"):
        parse_captions(payload)
    captions = (payload.decode("latin-1"),)
    if name == "latin":  # which is no fault once it is decoded
        return
    bad = replace(source(), examples=[Example("k", PIXELS[0], 1, captions)])
    with pytest.raises(UserError, match=r"captions of 'k' in memory cannot be used"):
        write_shards(bad, tmp_path / "set")


def test_shards_of_which_some_samples_have_no_captions_are_indexed_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", ("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG))
    write_tar(tmp_path / "b.tar", ("2.png", PNG), ("2.txt", b"x"))
    assert not index_shards(tmp_path).captions
    assert "without captions, which not all samples have: sample '1' in a.tar" in caplog.text
    assert ShardDataset(tmp_path, seed=0)[0].caption is None


def test_captions_are_for_all_images_or_for_none(tmp_path: Path) -> None:
    some = [*source(3).examples, *source(4, captions=False).examples[3:]]
    with pytest.raises(UserError, match=r"only one of 'k0' and 'k3' has captions"):
        write_shards(replace(source(), examples=some), tmp_path / "set")
    with pytest.raises(UserError, match="no captions for the text encoder"):
        write_shards(source(captions=False), tmp_path / "set", text_encoder=WordEncoder())


def test_embeddings_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="range of half precision"):
        captioned.pack(tmp_path / "set", WordEncoder(scale=1e6))


def test_embeddings_are_parsed_without_trust() -> None:
    encoded = WordEncoder().encode(["a b"])
    caption = EncodedCaption(encoded.tokens[0].half().numpy(), encoded.pooled[0].half().numpy())
    payload = encode_text([caption, caption], "f")
    assert len(StoredText(payload)) == 2
    for cut in range(len(payload)):
        with pytest.raises(ValueError, match="embeddings of captions"):
            StoredText(payload[:cut])
    nan = caption._replace(pooled=np.full(3, np.nan, np.float16))
    with pytest.raises(ValueError, match=r"pooled\.0 is not finite"):
        StoredText(encode_text([nan], "f"))[0]


def test_indexing_gives_the_rows_that_packing_gave(packed: Path) -> None:
    before = contents(packed)
    for name in before:
        if not name.endswith(".tar"):
            (packed / name).unlink()
    manifest = index_shards(packed)
    after = contents(packed)
    del before["manifest.json"], after["manifest.json"]
    assert after == before
    assert manifest.captions


CONFIG = DataConfig(workers=0)


def opened(folder: Path, **asked: Any) -> Any:
    config = replace(CONFIG, **{"path": folder} | asked.pop("config", {}))
    size, channels = asked.pop("size", 8), asked.pop("channels", 3)
    return open_dataset(config, size, channels, None, 0, **asked)


def test_a_run_opens_what_its_network_needs(packed: Path) -> None:
    text = collate(opened(packed, text=6).__getitems__(range(3)))
    assert text.text is not None
    assert text.captions is not None
    assert text.embeddings is None
    none = collate(opened(packed).__getitems__(range(3)))
    assert none.text is none.captions is None
    image = opened(packed, vector=4, config={"vector": "image"})
    assert collate(image.__getitems__(range(3))).embeddings is not None
    diffused = {"diffuse": "embeddings"}
    prior = opened(packed, text=6, vector=3, size=1, channels=4, config=diffused)
    assert prior[0].embedding is not None
    assert prior[0].text is not None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": 7}, "embeddings of tokens of 7 channels.*words of 6 channels, have 6"),
        ({"vector": 6}, "embeddings of captions of 6 channels.*have 3"),
        ({"vector": 3, "config": {"vector": "image"}}, "by means, have 4 channels.*takes 3"),
        ({"size": 1, "config": {"diffuse": "embeddings"}}, "have 4 channels.*takes 3"),
        (
            {"size": 1, "vector": 4, "config": {"diffuse": "embeddings", "vector": "image"}},
            "conditioned on what it diffuses",
        ),
    ],
)
def test_what_does_not_fit_the_network_is_refused(
    packed: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(packed, **asked)


def test_sets_without_what_the_network_needs_are_refused(tmp_path: Path) -> None:
    plain = pack_images(tmp_path / "plain")
    with pytest.raises(UserError, match="have no captions: pack"):
        opened(plain, text=6)
    with pytest.raises(UserError, match="holds no embeddings of its images"):
        opened(plain, vector=4, config={"vector": "image"})
    captions = captioned.pack(tmp_path / "captions")
    with pytest.raises(UserError, match=r"captions without embeddings: set `data.text_encoder`"):
        opened(captions, text=6)
    on_the_fly = opened(captions, text=6, config={"text_encoder": "anywhere"})
    assert on_the_fly[0].caption is not None
    assert on_the_fly.text is None
    assert on_the_fly.text_length is None


def test_another_encoder_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ddpm_engine.data.conditions.open_text_encoder",
        lambda place: WordEncoder(channels=int(place)),
    )
    assert opened(packed, text=6, config={"text_encoder": "6"}).text is not None
    with pytest.raises(UserError, match=r"`data.text_encoder` 5 is another.*words of 6"):
        opened(packed, text=6, config={"text_encoder": "5"})


def test_mixtures_have_one_encoder_and_one_length(packed: Path, tmp_path: Path) -> None:
    other = captioned.pack(tmp_path / "other", WordEncoder(channels=6))
    mix = {"mix_with": (str(other),), "weights": (2, 1)}
    mixed = opened(packed, text=6, vector=3, config=mix)
    batch = collate(mixed.__getitems__(range(6)))
    assert batch.text is not None
    assert batch.text.shape[1] == mixed.text_length == 16
    with pytest.raises(UserError, match="holds no embeddings of its images"):
        opened(packed, vector=4, config=mix | {"vector": "image"})
    third = captioned.pack(tmp_path / "third", WordEncoder(channels=6, pooled_channels=4))
    manifest = json.loads((third / "manifest.json").read_text())
    manifest["text"]["fingerprint"] = "1" * 64
    (third / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="different text encoder"):
        opened(packed, text=6, config={"mix_with": (str(third),), "weights": (1, 1)})


def test_streams_give_captions(packed: Path, tmp_path: Path) -> None:
    shards = f"{packed}/shard-{{000000..000002}}.tar"
    known = {caption for number in range(12) for caption in captions_of(number)}
    stream = iter(ShardStream(shards, 8, 3, captions=True))
    assert {next(stream).caption for _ in range(400)} == known
    write_tar(
        tmp_path / "a.tar",
        ("README.txt", b"x"), ("0.png", PNG), ("0.txt", b"y"), ("1.png", PNG), ("1.txt", b"\xff"),
    )  # fmt: skip
    foreign = iter(ShardStream(str(tmp_path / "a.tar"), 8, 3, captions=True))
    samples = [next(foreign) for _ in range(150)]
    assert {sample.caption for sample in samples} == {"y"}
    assert {fault.key for sample in samples for fault in sample.faults} == {"1"}
    plain = pack_images(tmp_path / "plain")
    with pytest.raises(UserError, match="no captions"):
        next(iter(ShardStream(f"{plain}/shard-000000.tar", 8, 3, captions=True)))
    with pytest.raises(UserError, match="captions without embeddings"):
        opened(Path(shards), text=6, config={"path": shards})
    asked = {"path": shards, "text_encoder": "anywhere"}
    assert opened(packed, text=6, config=asked).captions


def test_lines_and_captions_are_each_other() -> None:
    assert parse_captions(encode_captions(CAPTIONS)) == CAPTIONS
    with pytest.raises(ValueError, match="more than one line"):
        encode_captions(["a\nb"])
    with pytest.raises(ValueError, match="surrogate"):
        encode_captions(["a \ud800"])
