"""Configuration of the training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ddpm_engine.bounds import Ge, Gt, Le, out_of_bounds
from ddpm_engine.errors import UserError
from ddpm_engine.locations import check_local, location

VectorSource = Literal["text", "image"]
Diffused = Literal["images", "embeddings"]


@dataclass(frozen=True)
class DataConfig:
    """Where the training images come from, and how they are read."""

    path: Path | str = Path("data/shards")
    """Folder of indexed WebDataset shards, its URL (https, s3, gs, ...), or a pattern of shards to
    stream."""
    source: str | None = None
    """Source of images to pack into the folder if it is missing: a folder of images, an .npz file,
    CIFAR's binary version, an IDX file, hf:NAME[:SPLIT], digits, numbers, numbers:held-out, or
    photos."""
    mix_with: tuple[str, ...] = ()
    """Further sets, folders or URLs, to mix with the first."""
    weights: tuple[Annotated[int, Ge(1)], ...] = ()
    """Relative numbers of samples from each set, the first set's before those of mix_with; integers
    from 1."""
    cache: Path | None = None
    """Folder on a local disk for shards of a URL; default: one of the user's in the temporary
    directory."""
    cache_gb: Annotated[float, Gt(0), Le(1e9)] = 64.0
    """Limit on the size of that folder in 10⁹ bytes; greater than 0."""
    allow_pipe: bool = False
    """Permission for pipe: patterns to run their command in a shell."""
    text_encoder: str | None = None
    """Text encoder of the captions: a folder of transformers, or package:NAME; None: the shards
    hold the embeddings, or the network takes no text."""
    text_length: Annotated[int, Ge(1), Le(4096)] | None = None
    """Number of tokens that captions are padded or cut to; None: 32 for captions encoded in
    training, else that of the longest one stored, rounded up to a multiple of 8."""
    autoencoder: str | None = None
    """Autoencoder whose latents are diffused: a folder of diffusers, or package:NAME; None: that of
    the shards, or none."""
    vector: VectorSource = "text"
    """Source of a network's vector: the pooled embedding of the caption, or the image's embedding,
    which the shards then hold."""
    diffuse: Diffused = "images"
    """What is diffused: images, or their embeddings (the prior of Ramesh et al. 2022)."""
    horizontal_flip: bool = False
    """Random mirroring of each image, with probability one half."""
    window_shards: Annotated[int, Ge(1), Le(2**31 - 1)] = 16
    """Number of shuffled shards in each window, within which samples are shuffled; from 1."""
    workers: Annotated[int, Ge(0), Le(1024)] = 2
    """Number of decoding processes of each rank, from 0; the order of samples does not depend on
    it."""
    max_bad_samples: Annotated[int, Ge(0)] = 100
    """Number of unreadable samples that a run replaces, over all ranks, before it stops."""

    def __post_init__(self) -> None:
        # A URL is no path: two slashes would become one.
        if isinstance(self.path, str):
            object.__setattr__(self, "path", location(self.path))

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values themselves."""
        yield from out_of_bounds(self)
        for field, places in (("path", (self.path,)), ("mix_with", self.mix_with)):
            for place in places:
                try:
                    check_local(place, field, urls=True)
                except UserError as error:
                    yield error
        if self.autoencoder is not None and self.diffuse == "embeddings":
            yield UserError(
                f"`autoencoder` is {self.autoencoder} while `diffuse` is embeddings, which are not "
                "encoded; leave one of them out",
                "autoencoder",
            )
        sets = 1 + len(self.mix_with)
        if self.mix_with and len(self.weights) != sets:
            yield UserError(
                f"`weights` has {len(self.weights)} entries for {sets} sets (`path` and "
                "`mix_with`); give one for each",
                "weights",
            )
        if self.weights and not self.mix_with:
            yield UserError("`weights` is given without `mix_with`; name the other sets", "weights")
