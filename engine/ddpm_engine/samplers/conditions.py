"""What a request conditions its samples on, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_engine.diffusion.super_resolution import NoiseConditioningAugmentation
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.samplers.identity import tensor_of
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.prompts import EncodedPrompts
from ddpm_engine.samplers.request import SampleRequest, as_source, rows_of
from ddpm_engine.sizes import height_and_width, size_of


class RequestConditions:
    """The conditions of samples by their ids: the same for an id in every batch.

    Args:
        model: the network and its process.
        request: resolved for the model.
    """

    def __init__(self, model: DiffusionModel, request: SampleRequest) -> None:
        self._model, self._request, self._device = model, request, model.device
        self._spec = model.spec
        classes = request.classes
        self.classes: tuple[int, ...] | None = classes if isinstance(classes, tuple) else None
        """Class of samples 0, 1, 2, … and again from the first; None: the null class."""
        self._text: EncodedPrompts | None = None
        given = request.conditions is not None and request.conditions.text is not None
        prompts, negative, null = request.prompts, request.negative_prompt, model.null_prompt
        if null is not None:
            # Without prompts, that of no text; with a text of tokens, to lead away from.
            prompts = (null,) if prompts is None else prompts
            negative = null if negative is None else negative
        if prompts is not None and model.text_encoder is not None:
            self._text = EncodedPrompts(model.text_encoder, self._spec, prompts, negative)
        self._encodes = self._text is not None and not (given and request.prompts is None)

    def label_of(self, sample_id: int) -> int | None:
        """Return the class of a sample, or None."""
        if self.classes is None:
            return None
        label = self.classes[sample_id % len(self.classes)]
        return None if label == self._spec.null_class else label

    def of(self, ids: Sequence[int]) -> Conditioning:
        """Return the conditions of a batch of samples.

        Args:
            ids: `[B]`.

        Raises:
            UserError: a low-resolution image or an embedding that cannot be read or has another
                shape, or a text encoder of another width.
        """
        request = self._request
        conditions = Conditioning()
        if request.conditions is not None:
            count = len(next(iter(request.conditions.present().values())))
            conditions = request.conditions.select(rows_of(ids, count)).to(self._device)
        return self._with_low_resolution(
            self._with_vector(self._with_text(self._with_labels(conditions, ids), ids), ids), ids
        )

    def null(self, conditions: Conditioning) -> Conditioning:
        """Return what guidance leads a batch away from: no conditions, or the negative prompt.

        Args:
            conditions: of the batch, on the model's device.

        Raises:
            UserError: a text encoder of another width.
        """
        null = conditions.null(self._spec)
        length = 1 if null.text is None else null.text.shape[1]
        negative = None if self._text is None else self._text.negative(self._device, length)
        if negative is None:
            return null
        if null.text is not None and null.text_mask is not None:
            batch = len(null.text)
            null = replace(
                null,
                text=negative.tokens.expand(batch, -1, -1),
                text_mask=negative.mask.expand(batch, -1),
            )
        if null.vector is not None and self._pools:
            null = replace(null, vector=negative.pooled.expand(len(null.vector), -1))
        return null

    def check_guided(self) -> None:
        """Refuse guidance where it would lead nowhere.

        Raises:
            UserError: the samples have no condition that it could lead towards.
        """
        request, spec = self._request, self._spec
        given = request.conditions
        if self.classes or request.prompts or request.embeddings is not None:
            return
        if given is not None and given.droppable():
            return
        towards, why = "a class", "the samples are of no class; give `classes`"
        if spec.text is not None:
            towards, why = "a text", "the samples have none; give `prompts`"
        elif spec.vector is not None:
            towards, why = "an embedding", "the samples have none; give `embeddings`"
        elif spec.null_class is None:
            why = "this network was trained without classes; leave it out"
        raise UserError(f"`guidance.scale` leads towards {towards}, but {why}")

    @property
    def _pools(self) -> bool:
        """Whether the network's vector is the pooled embedding of the prompt."""
        return self._spec.vector is not None and self._model.vector == "text"

    def _with_labels(self, conditions: Conditioning, ids: Sequence[int]) -> Conditioning:
        null = self._spec.null_class
        if null is None or not (self.classes or conditions.labels is None):
            return conditions
        labels = [self.label_of(k) for k in ids]
        numbers = [null if label is None else label for label in labels]
        return replace(conditions, labels=tensor_of(numbers, self._device))

    def _with_text(self, conditions: Conditioning, ids: Sequence[int]) -> Conditioning:
        spec = self._spec
        if spec.text is not None and conditions.text is None:
            # What `Conditioning.null` makes of any text, in as few tokens as it takes.
            conditions = replace(
                conditions,
                text=torch.zeros(len(ids), 1, spec.text, device=self._device),
                text_mask=torch.ones(len(ids), 1, dtype=torch.bool, device=self._device),
            )
        if spec.vector is not None and conditions.vector is None:
            zeros = torch.zeros(len(ids), spec.vector, device=self._device)
            conditions = replace(conditions, vector=zeros)
        if self._text is None or not self._encodes:
            return conditions
        text = self._text.of(ids, self._device)
        if spec.text is not None:
            conditions = replace(conditions, text=text.tokens, text_mask=text.mask)
        return replace(conditions, vector=text.pooled) if self._pools else conditions

    def _with_vector(self, conditions: Conditioning, ids: Sequence[int]) -> Conditioning:
        if self._request.embeddings is None or self._spec.vector is None:
            return conditions
        embeddings = as_source(self._request.embeddings).of(ids).flatten(1)
        if embeddings.shape[1] != self._spec.vector:
            raise UserError(
                f"`embeddings` has {embeddings.shape[1]} channels; this network was built for "
                f"{self._spec.vector}"
            )
        return replace(conditions, vector=embeddings.to(self._device, torch.float32))

    def _with_low_resolution(self, conditions: Conditioning, ids: Sequence[int]) -> Conditioning:
        request, size = self._request, self._spec.low_resolution
        if request.low_resolution is None or size is None or not len(ids):
            return conditions
        channels, *to = self._model.shape
        images = as_source(request.low_resolution).of(ids)
        check_shape("low_resolution", images, (channels, *height_and_width(size)))
        sample_ids = tensor_of(ids, self._device)
        levels = torch.full_like(sample_ids, request.augmentation_level)
        augmented = NoiseConditioningAugmentation(self._device)(
            images.to(self._device, torch.float32), size_of(*to), levels, request.seed, sample_ids
        )
        return replace(conditions, low_resolution=augmented, augmentation_level=levels)


def check_shape(name: str, images: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse images of another shape.

    Args:
        name: field that they are from.
        images: `[N, C, H, W]`.
        shape: `(C, H, W)` that they must have.

    Raises:
        UserError: they do not have it.
    """
    if images.shape[1:] != shape:
        raise UserError(f"`{name}` has shape {tuple(images.shape)}; it must be {('N', *shape)}")
