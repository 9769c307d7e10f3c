"""Published pipelines of diffusers: what they have besides a network and its scheduler."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ddpm_engine.data.classes import ClassNames
from ddpm_engine.errors import UserError
from ddpm_engine.json_files import described
from ddpm_engine.networks.files.entries import read_part
from ddpm_engine.networks.files.layout import LEFT_OUT, Layout
from ddpm_engine.networks.text.folders import PADDING_PIPELINE

logger = logging.getLogger(__name__)

STEPS = 50
"""Steps of a sample, unless a request says otherwise, as the pipelines have it."""
_LABELS = "id2label"
_OTHER_INPUTS = ("Inpaint", "Upscale", "InstructPix2Pix", "Depth2Img", "ImageVariation")
"""Parts of the names of pipelines whose networks take more than a text."""
_ADAPTERS = ("pytorch_lora_weights.*", "learned_embeds.*", "*/adapter_config.json")
"""Files beside a pipeline's parts that diffusers opens on request only."""


@dataclass(frozen=True)
class Published:
    """What a pipeline has besides a network and its scheduler."""

    null_prompt: str | None = None
    """Text whose embeddings stand for no text; None: zeros do."""
    classes: ClassNames | None = None
    """Names of the classes 0, 1, ..., if it lists them."""


def read_published(layout: Layout) -> Published:
    """Read the index of a pipeline, and say what of it is left out.

    Args:
        layout: of the folder.

    Raises:
        UserError: a pipeline that needs other inputs than this engine gives, or damaged labels.
    """
    if layout.index is None:
        return Published()
    index = read_part(layout.index)
    kind = str(index.get("_class_name"))
    for name in _OTHER_INPUTS:
        if name in kind:
            raise UserError(
                f"{layout.index} is that of a {kind}, whose network takes further images; this "
                "engine opens StableDiffusionPipeline and DiTPipeline, and those with a network "
                "and a scheduler alone"
            )
    _report(layout.index, index)
    padded = kind.startswith(PADDING_PIPELINE) and layout.text_encoder is not None
    return Published(
        null_prompt="" if padded else None,
        classes=_labels(layout.index, index.get(_LABELS)),
    )


def label_entries(classes: ClassNames | None) -> dict[str, dict[str, str]]:
    """The entry of an index that names classes, if they have names."""
    if classes is None:
        return {}
    return {_LABELS: {str(number): name for number, name in enumerate(classes)}}


def _report(path: Path, index: dict[str, object]) -> None:
    for name, consequence in LEFT_OUT.items():
        value = index.get(name)
        if isinstance(value, list) and any(part is not None for part in value):
            logger.warning("%s: its %s is left out: %s", path.parent, name, consequence)
    found = [one for pattern in _ADAPTERS for one in sorted(path.parent.glob(pattern))]
    for file in found:
        logger.warning(
            "%s is left out: this engine has no adapters; fuse it into the pipeline, and save that",
            file,
        )


def _labels(path: Path, entry: object) -> ClassNames | None:
    if entry is None or entry == [None, None]:  # a part that is none
        return None
    names = entry if isinstance(entry, dict) else {}
    listed = [names.get(str(number)) for number in range(len(names))]
    texts = [name for name in listed if isinstance(name, str)]
    if not texts or len(texts) < len(listed):
        raise UserError(
            f"{_LABELS} is {described(entry)} in {path}; it must name the classes 0, 1, ..."
        )
    return tuple(texts)
