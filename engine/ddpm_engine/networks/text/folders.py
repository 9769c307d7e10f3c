"""Text encoders in folders as transformers saves them. Nothing in a folder is executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_engine.errors import UserError
from ddpm_engine.json_files import described, read_object
from ddpm_engine.networks.files.entries import listing
from ddpm_engine.networks.files.layout import INDEX
from ddpm_engine.networks.files.places import fingerprint_of, folder_at
from ddpm_engine.networks.text.encoder import TextEncoder

PADDING_PIPELINE = "StableDiffusion"
"""Begins the names of pipelines whose prompts are padded to the encoder's longest, unmasked."""
_CONFIG = "config.json"
_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "spm.model",
)  # fmt: skip
_FURTHER = (
    "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Entries of a configuration that change nothing of the embeddings."""
_LONGEST = 512
"""Tokens, where a model has no limit of its own."""
_OFFSET = re.compile(r"roberta|camembert|mpnet|longformer|data2vec|ibert|xmod")
"""Types of models whose positions are counted from the one after the padding token's number."""
_UNUSED = re.compile(r"pooler\.|position_ids|lm_head\.|cls\.")
"""Weights that a folder may lack, since no embedding depends on them."""
_LARGEST_CONFIG = 16 << 20


def open_text_encoder(place: str, device: torch.device | str = "cpu") -> TextEncoder:
    """Open a text encoder, frozen, in float32.

    The embedding of a caption is CLIP's own where the model is CLIP's, else the mean over tokens.
    That of a pipeline of Stable Diffusion pads texts to its longest, and attends to the padding, as
    the pipeline does.

    Args:
        place: a folder as transformers saves T5, CLIP or the family of BERT, or a pipeline of
            diffusers that holds one, or `package:NAME` for a folder in an installed Python package.
        device: where it computes.

    Raises:
        UserError: transformers is not installed, nothing is there, it is no text encoder, its
            weights are not safetensors, or it would need code of its own.
    """
    folders = text_encoder_files(place)
    transformers = _transformers(place)
    fingerprint = folders.fingerprint()
    # Damaged files fail in more ways than the library has error classes.
    try:
        with _quiet(transformers):
            model, tokenizer, missing = _load(transformers, folders)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the text encoder {place} cannot be opened: {reason}") from error
    if missing:
        raise UserError(
            f"the weights of the text encoder {place} lack {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}; save the whole model again"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(
            f"the tokenizer of {place} has {len(tokenizer)} tokens, and its model {embeddings}: "
            "they are of different models; save both again"
        )
    return TextEncoder(
        model.to(device),
        tokenizer,
        _max_length(model.config, tokenizer),
        place,
        fingerprint,
        _pooling(type(model).__name__),
        folders.padded,
    )


def text_encoder_fingerprint(place: str) -> str:
    """Identify a text encoder without loading it: the `fingerprint` that `open_text_encoder` finds.

    Args:
        place: as `open_text_encoder` takes it.

    Raises:
        UserError: nothing is there, its weights are not safetensors, or it has no tokenizer.
    """
    return text_encoder_files(place).fingerprint()


def is_padded(place: str) -> bool:
    """Return whether a text encoder pads texts, and attends to the padding, without loading it.

    Args:
        place: as `open_text_encoder` takes it.

    Raises:
        UserError: as `text_encoder_fingerprint`.
    """
    return text_encoder_files(place).padded


@dataclass(frozen=True)
class TextEncoderFiles:
    """Where the parts of an encoder are."""

    model: Path
    """The folder of its configuration."""
    tokenizer: Path
    """That of its tokenizer."""
    config: dict[str, Any]
    """The configuration."""
    weights: tuple[Path, ...]
    """Safetensors files."""
    variant: str | None = None
    """Of the weights' files, such as fp16."""
    padded: bool = False
    """Whether texts are padded as in Stable Diffusion."""

    def fingerprint(self) -> str:
        """Hash what embeddings depend on, whichever version has saved it."""
        config = {name: v for name, v in self.config.items() if name not in _IRRELEVANT}
        # Embeddings of a padded text are others.
        config |= {"padded": True} if self.padded else {}
        return fingerprint_of(config, [*self.weights, *self.vocabulary])

    @property
    def vocabulary(self) -> list[Path]:
        """Files of the tokenizer."""
        files = (self.tokenizer / name for name in (*_VOCABULARIES, *_FURTHER))
        return [file for file in files if file.is_file()]

    @property
    def classes(self) -> tuple[str, str]:
        """Names of the classes of model and tokenizer."""
        named = self.config.get("architectures")
        file = self.tokenizer / "tokenizer_config.json"
        tokenizer = read_object(file, _LARGEST_CONFIG) if file.is_file() else {}
        return (
            str(named[0]) if isinstance(named, list) and named else "AutoModel",
            str(tokenizer.get("tokenizer_class", "AutoTokenizer")),
        )


def text_encoder_files(place: str) -> TextEncoderFiles:
    """Find the parts of an encoder, and refuse what cannot be opened safely.

    Args:
        place: as `open_text_encoder` takes it.

    Raises:
        UserError: as `text_encoder_fingerprint`.
    """
    folder = folder_at(place, "text encoder", "transformers", _CONFIG)
    inside, padded = folder / "text_encoder", False
    if not (folder / _CONFIG).is_file() and (inside / _CONFIG).is_file():
        padded = _is_stable_diffusion(folder)
        folder = inside
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"there is no text encoder in {place}, which holds {listing(folder)}; give the folder "
            f"with its {_CONFIG}, as transformers saves it"
        )
    config = read_object(folder / _CONFIG, _LARGEST_CONFIG)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{place} holds an adapter besides a text encoder; merge them, and save the result"
        )
    variant, weights = _weights(folder)
    if not weights:
        raise UserError(
            f"the text encoder {place} has no model.safetensors, only {listing(folder)}; other "
            "formats of weights can run code: save it with save_pretrained(…, "
            "safe_serialization=True)"
        )
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for tokenizer in (folder, beside):
        if any((tokenizer / name).is_file() for name in _VOCABULARIES):
            return TextEncoderFiles(folder, tokenizer, config, weights, variant, padded)
    raise UserError(
        f"the text encoder {place} has no tokenizer, only {listing(folder)}; save the tokenizer "
        "in the same folder, with its save_pretrained"
    )


def _weights(folder: Path) -> tuple[str | None, tuple[Path, ...]]:
    """Find the variant and the files of weights, those of full precision first."""
    for variant in (None, "fp16", "bf16"):
        stem = "model" if variant is None else f"model.{variant}"
        whole = folder / f"{stem}.safetensors"
        files = (whole,) if whole.is_file() else tuple(sorted(folder.glob(f"{stem}-*.safetensors")))
        if files:
            return variant, files
    return None, ()


def _is_stable_diffusion(folder: Path) -> bool:
    """Whether a folder is a pipeline whose prompts are padded, without a mask."""
    index = folder / INDEX
    if not index.is_file():
        return False
    return str(read_object(index, _LARGEST_CONFIG).get("_class_name")).startswith(PADDING_PIPELINE)


def _transformers(place: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"the text encoder {place} needs transformers: pip install 'ddpm-engine[text]'"
        ) from error
    return transformers


def _load(transformers: Any, folders: TextEncoderFiles) -> tuple[Any, Any, list[str]]:
    """Load model and tokenizer, and name the weights that are missing."""
    kind_of_model = folders.config.get("model_type")
    known = isinstance(kind_of_model, str) and kind_of_model in transformers.CONFIG_MAPPING
    if not known:
        raise UserError(
            f"{described(kind_of_model)}, the model_type in {folders.model / _CONFIG}, is none "
            "that transformers knows, and code in a folder is never run; update transformers, or "
            "take another text encoder"
        )
    safely = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folders.model, **safely)
    kind = _class_of(transformers, config, folders.config)
    # Chosen here, since a configuration may name one of the hub, which would be code.
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    model, report = kind.from_pretrained(
        folders.model,
        local_files_only=True,
        use_safetensors=True,
        variant=folders.variant,
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders.tokenizer, **safely)
    missing = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    missing = sorted(name for name in missing if not _UNUSED.search(name))
    return model.eval().requires_grad_(False), tokenizer, missing


def _class_of(transformers: Any, config: Any, stored: dict[str, Any]) -> Any:
    """The class that encodes text among those of a type of models."""
    if config.model_type in ("clip", "clip_text_model"):
        projected = stored.get("architectures") == ["CLIPTextModelWithProjection"]
        name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        return getattr(transformers, name)
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    found = transformers.MODEL_MAPPING.get(type(config), None)
    if (
        config.is_encoder_decoder
        or not isinstance(found, type)
        or getattr(found, "main_input_name", None) != "input_ids"
    ):
        raise UserError(
            f"{config.model_type}, the model_type in {_CONFIG}, is no text encoder that can be "
            "used; T5, CLIP and the family of BERT are"
        )
    return found


def _pooling(kind: str) -> str | None:
    """The output of a class of models that is the embedding of a whole text."""
    if not kind.startswith("CLIP"):
        return None
    return "text_embeds" if kind.endswith("WithProjection") else "pooler_output"


def _max_length(config: Any, tokenizer: Any) -> int:
    """Tokens of the longest text that both can take."""
    limits = [int(min(tokenizer.model_max_length, _LONGEST))]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        offset = (config.pad_token_id or 0) + 1 if _OFFSET.search(config.model_type) else 0
        limits.append(positions - offset)
    return max(1, min(limits))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's progress bars and its lists of weights that are not used."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
