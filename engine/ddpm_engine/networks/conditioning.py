"""Conditioning: everything a network gets besides the noisy image and its noise level.

One more kind of condition is one more field of `Conditioning`, the network's use of it, and what
feeds it. Everything between (guidance, batching, static buffers) goes over the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from ddpm_engine.sizes import Size

C = TypeVar("C", bound="Conditioning")


@dataclass(frozen=True)
class ConditioningSpec:
    """The conditions a network was built for."""

    classes: int | None = None
    """Number of classes; None: not class-conditional."""
    low_resolution: Size | None = None
    """Size of the low-resolution image in pixels; None: not a super-resolution network."""
    text: int | None = None
    """Channels of a token's embedding, as the text encoder gives it; None: not conditioned on
    text."""
    vector: int | None = None
    """Channels of the vector, such as a pooled text or an image embedding; None: none."""

    @property
    def null_class(self) -> int | None:
        """Label of the null class, which follows the last class; None: not class-conditional."""
        return self.classes


def _null_labels(labels: Tensor, spec: ConditioningSpec) -> Tensor:
    if spec.null_class is None:
        raise ValueError("labels are given, but the network is not class-conditional")
    return torch.full_like(labels, spec.null_class)


def _null_text(text: Tensor, spec: ConditioningSpec) -> Tensor:
    if spec.text is None:
        raise ValueError("text is given, but the network is not conditioned on text")
    return torch.zeros_like(text)


def _null_text_mask(mask: Tensor, spec: ConditioningSpec) -> Tensor:
    # One token of zeros: a softmax over none would be undefined.
    return (torch.arange(mask.shape[1], device=mask.device) == 0).expand_as(mask)


def _null_vector(vector: Tensor, spec: ConditioningSpec) -> Tensor:
    if spec.vector is None:
        raise ValueError("a vector is given, but the network is not conditioned on one")
    return torch.zeros_like(vector)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Optional tensors, each with one row for each sample of a batch.

    A field's metadata may hold `"null"`, a function of (tensor, spec) that gives the tensor of "no
    condition" for guidance and dropout. Fields without one stay as they are.
    """

    labels: Tensor | None = field(default=None, metadata={"null": _null_labels})
    """int64 `[B]`, the class of each sample."""
    low_resolution: Tensor | None = None
    """float `[B, C, H, W]`, the low-resolution image after upsampling and augmentation."""
    augmentation_level: Tensor | None = None
    """int64 `[B]`, the level of the noise in `low_resolution`."""
    dropout_key: Tensor | None = None
    """int64 `[B]`, what the dropout of a network in training follows from."""
    text: Tensor | None = field(default=None, metadata={"null": _null_text})
    """float `[B, L, D]`, embeddings of a text's tokens; the null text is one token of zeros."""
    text_mask: Tensor | None = field(default=None, metadata={"null": _null_text_mask})
    """bool `[B, L]`, False for padding; without it all tokens count."""
    vector: Tensor | None = field(default=None, metadata={"null": _null_vector})
    """float `[B, D]`, such as a pooled text or an image embedding; zeros for none."""
    text_projections: Tensor | None = None
    """`[B, L, K]`, in place of `text`: what a network has computed of it once for all steps of a
    sampler; see `Network.precompute`."""

    def present(self) -> dict[str, Tensor]:
        """The tensors that are given, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def layout(self) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
        """Name, shape and dtype of each tensor given: what buffers and captured steps depend on."""
        return tuple((name, t.shape, t.dtype) for name, t in self.present().items())

    def map(self: C, function: Callable[[Tensor], Tensor]) -> C:
        """Apply a function to every tensor given."""
        return replace(self, **{name: function(t) for name, t in self.present().items()})

    def to(self: C, device: torch.device | str) -> C:
        """Move to a device; from pinned memory without waiting."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def select(self: C, index: slice | Tensor) -> C:
        """Rows of every tensor: those of a slice, or of an int64 `[N]` index."""
        return self.map(lambda tensor: tensor[index])

    def split(self: C, size: int) -> list[C]:
        """Consecutive parts of `size` rows each; the last may be smaller."""
        rows = max((len(tensor) for tensor in self.present().values()), default=0)
        return [self.select(slice(start, start + size)) for start in range(0, rows, size)]

    def null(self: C, spec: ConditioningSpec) -> C:
        """The same batch without its conditions, as classifier-free guidance needs it.

        Raises:
            ValueError: a condition that the network was not built for.
        """
        make = {f.name: f.metadata["null"] for f in fields(self) if "null" in f.metadata}
        given = self.present()
        return replace(self, **{name: make[name](given[name], spec) for name in self.droppable()})

    def drop(self: C, rows: Tensor, spec: ConditioningSpec) -> C:
        """Replace all conditions of some samples by null ones, on the device.

        Args:
            rows: bool `[B]`, True for those that lose their conditions.
            spec: of the network.

        Raises:
            ValueError: a condition that the network was not built for.
        """
        given, null = self.present(), self.null(spec).present()
        return replace(
            self,
            **{
                name: torch.where(rows.view(-1, *[1] * (given[name].dim() - 1)), null[name],
                                  given[name])
                for name in self.droppable()
            },
        )  # fmt: skip

    def droppable(self) -> list[str]:
        """Return the fields given that have a null condition, which guidance leads away from."""
        given = self.present()
        return [f.name for f in fields(self) if "null" in f.metadata and f.name in given]

    def copy_(self, other: Conditioning) -> None:
        """Overwrite these tensors with another batch's of the same layout.

        Raises:
            ValueError: a different layout.
        """
        if self.layout() != other.layout():
            raise ValueError(f"conditions are {other.layout()}; the buffers are {self.layout()}")
        theirs = other.present()
        for name, tensor in self.present().items():
            tensor.copy_(theirs[name])


UNCONDITIONAL = Conditioning()
"""No conditions."""


def cat(parts: Sequence[C]) -> C:
    """Join batches that have the same conditions, row after row."""
    first = parts[0]
    rows = [part.present() for part in parts]
    return replace(first, **{name: torch.cat([row[name] for row in rows]) for name in rows[0]})
