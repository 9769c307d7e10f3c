"""Text encoders: transformers' own embeddings, whatever a caption is encoded with, from files."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.text_encoders import MINILM, bert_folder, clip_folder, needs_minilm, t5_folder

from ddpm_engine.errors import UserError
from ddpm_engine.networks.text import encoder as encoder_module
from ddpm_engine.networks.text.encoder import TextEncoder
from ddpm_engine.networks.text.folders import open_text_encoder

transformers: Any = pytest.importorskip("transformers")

CAPTIONS = ["forty-two", "four, then two", "", "seventeen"]


def clip_projected(folder: Path) -> str:
    return clip_folder(folder, projection=True)


KINDS: dict[str, tuple[Callable[[Path], str], str, str | None]] = {
    "bert": (bert_folder, "BertModel", None),
    "t5": (t5_folder, "T5EncoderModel", None),
    "clip": (clip_folder, "CLIPTextModel", "pooler_output"),
    "clip-projected": (clip_projected, "CLIPTextModelWithProjection", "text_embeds"),
}


@pytest.fixture
def place(tmp_path: Path) -> str:
    return bert_folder(tmp_path / "encoder")


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    save, name, pooling = KINDS[kind]
    place = save(tmp_path / "encoder")
    check_against_transformers(place, Path(place), name, pooling)


@needs_minilm
def test_a_real_encoder_is_that_of_transformers() -> None:
    folder = importlib.import_module(MINILM.removeprefix("package:")).MODEL_DIR
    check_against_transformers(MINILM, folder, "BertModel", None)


def check_against_transformers(place: str, folder: Path, name: str, pooling: str | None) -> None:
    encoder = open_text_encoder(place)
    ours = encoder.encode(CAPTIONS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = getattr(transformers, name).from_pretrained(folder).eval()
    batch = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        output = theirs(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        single = tokenizer("seventeen", return_tensors="pt")["input_ids"]
        alone = theirs(single, attention_mask=torch.ones_like(single)).last_hidden_state
    width = mask.shape[1]
    assert torch.equal(ours.mask[:, :width], mask)
    assert not ours.mask[:, width:].any()
    tokens = output.last_hidden_state * mask[..., None]
    torch.testing.assert_close(ours.tokens[:, :width], tokens, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.tokens[3, : alone.shape[1]], alone[0])
    pooled = tokens.sum(1) / mask.sum(1, keepdim=True) if pooling is None else output[pooling]
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-4, atol=1e-5)
    assert (encoder.channels, encoder.pooled_channels) == (tokens.shape[-1], pooled.shape[-1])
    assert ours.tokens.dtype == ours.pooled.dtype == torch.float32
    assert not ours.tokens.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_has_the_same_embeddings_in_any_company(kind: str, tmp_path: Path) -> None:
    place = KINDS[kind][0](tmp_path / "encoder")
    together = open_text_encoder(place).encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        other = open_text_encoder(place).encode(["a very different one", caption, caption], 24)
        count = int(together.mask[row].sum())
        for again in (1, 2):
            assert int(other.mask[again].sum()) == count
            assert torch.equal(other.tokens[again, :count], together.tokens[row, :count])
            assert torch.equal(other.pooled[again], together.pooled[row])


def test_the_length_is_what_is_asked_for(place: str) -> None:
    encoder = open_text_encoder(place)
    text = "forty two"  # 8 letters between the tokens that begin and end a text
    free, short, long = (encoder.encode([text, "a"], length) for length in (None, 5, 30))
    assert [e.tokens.shape[1] for e in (free, short, long)] == [16, 5, 30]
    assert free.mask.sum(1).tolist() == [10, 3]
    assert torch.equal(short.tokens, free.tokens[:, :5])
    assert torch.equal(long.tokens[:, :16], free.tokens)
    assert not long.tokens[~long.mask].any()
    assert torch.equal(short.pooled, long.pooled), "of the whole text"
    assert encoder.encode([]).tokens.shape == (0, 8, 16)


@pytest.mark.parametrize("text", ["fox " * 2_500_000, "x" * 100, "a\0b", "🦊", "\n\t ", "é"])
def test_any_unicode_text_is_encoded(place: str, text: str) -> None:
    encoder = open_text_encoder(place)
    encoded = encoder.encode([text])
    assert encoded.tokens.shape[1] <= encoder.max_length == 32
    assert encoded.tokens.isfinite().all()
    assert encoded.mask[:, 0].all()


def test_a_text_that_is_not_unicode_is_refused(place: str) -> None:
    with pytest.raises(UserError, match="not Unicode"):
        open_text_encoder(place).encode(["caf\udce9"])


def test_a_text_without_tokens_is_the_null_text(place: str) -> None:
    file = Path(place) / "tokenizer.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "post_processor": None}))
    encoded = open_text_encoder(place).encode(["", "a"])
    assert encoded.mask.sum(1).tolist() == [1, 1]
    assert not encoded.tokens[0].any()
    assert encoded.tokens[1].any()


def test_no_caption_is_encoded_twice(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_text_encoder(place)
    calls = []

    def count(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(caption)
        return compute(caption)

    compute = encoder._compute
    monkeypatch.setattr(encoder, "_compute", count)
    first = encoder.encode(["b", "a", "b"])
    again = encoder.encode(["a", "b", "a"])
    assert calls == ["b", "a"]
    assert torch.equal(first.tokens, again.tokens[[1, 0, 1]])
    monkeypatch.setattr(encoder_module, "KEPT_BYTES", 600)
    encoder.encode(["c", "d", "b"])
    assert len(encoder._kept) == 2, "what is kept is bounded"
    assert encoder._kept_bytes == sum(encoder_module._size(c, e) for c, e in encoder._kept.items())


def test_autocast_and_gradients_change_nothing(place: str) -> None:
    plain = open_text_encoder(place).encode(CAPTIONS)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        other = open_text_encoder(place).encode(CAPTIONS)
    assert torch.equal(plain.tokens, other.tokens)


def edit(place: str, file: str, **entries: Any) -> None:
    path = Path(place) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_fingerprint_is_of_what_embeddings_depend_on(place: str, tmp_path: Path) -> None:
    fingerprint = open_text_encoder(place).fingerprint
    assert len(fingerprint) == 64
    moved = shutil.copytree(place, tmp_path / "moved")
    edit(str(moved), "config.json", transformers_version="4.0.0")
    (moved / "README.md").write_text("a card")
    assert open_text_encoder(str(moved)).fingerprint == fingerprint
    edit(str(moved), "config.json", layer_norm_eps=1e-6)
    assert open_text_encoder(str(moved)).fingerprint != fingerprint
    others = {bert_folder(tmp_path / f"other-{seed}", seed) for seed in (1, 2)}
    assert len({fingerprint, *(open_text_encoder(other).fingerprint for other in others)}) == 3


def test_a_pipeline_of_diffusers_holds_one(tmp_path: Path) -> None:
    alone = Path(clip_folder(tmp_path / "alone"))
    for folder, files in [("text_encoder", "[cm]o*"), ("tokenizer", "*token*")]:
        (tmp_path / "pipeline" / folder).mkdir(parents=True)
        for file in alone.glob(files):
            shutil.copy(file, tmp_path / "pipeline" / folder)
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "text_encoder"):
        opened = open_text_encoder(str(place))
        assert opened.fingerprint == open_text_encoder(str(alone)).fingerprint
        assert opened.max_length == 16


def without_weights(place: Path) -> None:
    (place / "model.safetensors").rename(place / "pytorch_model.bin")


def without_tokenizer(place: Path) -> None:
    (place / "tokenizer.json").unlink()


def with_code(place: Path) -> None:
    config = place / "config.json"
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config.write_text(json.dumps({"auto_map": auto_map, "model_type": "evil"}))
    (place / "evil.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        stored = load_file(place / "model.safetensors")
        change(stored)
        save_file(stored, place / "model.safetensors", {"format": "pt"})

    return spoil


def without_a_layer(stored: dict[str, torch.Tensor]) -> None:
    del stored["encoder.layer.1.output.dense.weight"]


def not_finite(stored: dict[str, torch.Tensor]) -> None:
    stored["embeddings.word_embeddings.weight"][:, 0] = torch.nan


def of_fewer_words(stored: dict[str, torch.Tensor]) -> None:
    name = "embeddings.word_embeddings.weight"
    stored[name] = stored[name][:50].clone()


def config(**entries: Any) -> Callable[[Path], None]:
    return lambda place: edit(str(place), "config.json", **entries)


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], object]:
    return lambda place: [spoil(place) for spoil in spoils]


def cut(place: Path) -> None:
    content = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(content[: len(content) // 2])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (without_weights, "no model.safetensors, only .*pytorch_model.bin"),
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
    "code of its own": (with_code, "evil.*code in a folder is never run"),
    "a lost layer": (weights(without_a_layer), "lack encoder.layer.1.output.dense.weight"),
    "NaN": (weights(not_finite), "NaN"),
    "another tokenizer": (
        both(weights(of_fewer_words), config(vocab_size=50)),
        "has 78 tokens, and its model 50",
    ),
    "half of a file": (cut, "cannot be opened"),
    "an image model": (config(model_type="vit"), "vit.* is no text encoder"),
    "no model at all": (config(model_type=["bert"]), "none that transformers knows"),
    "an encoder-decoder": (config(model_type="bart"), "bart.* is no text encoder"),
    "an adapter": (lambda place: (place / "adapter_config.json").touch(), "adapter"),
    "no JSON": (lambda place: (place / "config.json").write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_folder_that_is_none_is_refused(place: str, spoiled: str) -> None:
    spoil, message = SPOILED[spoiled]
    spoil(Path(place))
    with pytest.raises(UserError, match=message):
        open_text_encoder(place)
    assert not list(Path(place).glob("*.ran")), "nothing in a folder is executed"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing", "no folder missing.*hf download"),
        (".", "no text encoder in"),
        ("package:no_such_package", "no Python package 'no_such_package'.*pip install"),
        ("package:../evil", "no Python package"),
        ("package:", "no Python package"),
        ("package:json", "holds no text encoder"),
        ("https://example.org/model", "is a URL"),
    ],
)
def test_a_place_that_holds_none_is_named(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_text_encoder(place)


def test_finding_a_package_does_not_import_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "words_in_a_package"
    shutil.copytree(place, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    opened = open_text_encoder("package:words_in_a_package")
    assert opened.fingerprint == open_text_encoder(place).fingerprint
    assert opened.place == "package:words_in_a_package"


def test_without_transformers(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'ddpm-engine\[text\]'"):
        open_text_encoder(place)


def test_a_model_that_fails_is_named() -> None:
    class Failing:
        device = torch.device("cpu")

        def __call__(self, **inputs: Any) -> Any:
            raise RuntimeError("of no use")

    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    with pytest.raises(UserError, match="here does not encode 'a': of no use"):
        TextEncoder(Failing(), tokenizer, 8, "here", "0" * 64)
