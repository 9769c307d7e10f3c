"""What the data, and what is diffused of them, demand of the other sections of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.sizes import height_and_width


def text(config: RunConfig) -> Iterator[UserError]:
    """What is said of texts and vectors is of use to the network."""
    data, model = config.data, config.model
    takes_vector = getattr(model, "vector_channels", None) is not None
    takes_text = getattr(model, "text_channels", None) is not None or (
        takes_vector and data.vector == "text"
    )
    if not takes_text:
        given = {
            "data.text_encoder": data.text_encoder, "data.text_length": data.text_length,
            "log.prompts": config.log.prompts or None,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None:
                yield UserError(
                    f"`{name}` is {value}, but the network is not conditioned on text; leave it "
                    "out, or give the network text",
                    name,
                )
    if data.vector == "image" and not takes_vector:
        yield UserError(
            "`data.vector` is image, but the network is not conditioned on a vector; leave it out, "
            "or give `model.vector_channels`",
            "data.vector",
        )


def embeddings(config: RunConfig) -> Iterator[UserError]:
    """Embeddings are diffused as what they are: unbounded, and without sides."""
    data, model = config.data, config.model
    if data.diffuse == "images":
        return
    because = "but `data.diffuse` is embeddings"
    if height_and_width(model.sample_size) != (1, 1):
        yield UserError(
            f"`model.sample_size` is {model.sample_size}, {because}, which are images of one "
            "pixel; it must be 1",
            "model.sample_size",
        )
    if config.clips_x0:
        yield UserError(
            f"`sampling.clip_x0` is {config.sampling.clip_x0}, {because}, which no bounds hold; "
            "it must be False",
            "sampling.clip_x0",
        )
    if getattr(model, "low_resolution", None) is not None:
        yield UserError(
            f"`model.low_resolution` is {model.low_resolution}, {because}, which have no "
            "resolution; leave it out",
            "model.low_resolution",
        )
    if data.horizontal_flip:
        yield UserError(
            f"`data.horizontal_flip` is set, {because}, which cannot be mirrored; leave it out",
            "data.horizontal_flip",
        )
    if data.vector == "image":
        yield UserError(
            f"`data.vector` is image, {because}: the network would be given what it is to "
            "generate; let it be text",
            "data.vector",
        )
    if data.source is not None:
        yield UserError(
            f"`data.source` is {data.source}, {because}, and a run packs no image features; pack "
            "the shards with them first, and leave it out",
            "data.source",
        )


def latents(config: RunConfig) -> Iterator[UserError]:
    """Latents are diffused as what they are, where the configuration says that data are latents."""
    if config.data.autoencoder is not None:
        yield from problems_of_latents(config)


def problems_of_latents(config: RunConfig) -> Iterator[UserError]:
    """Report what a run on latents cannot have: bounds, and what is made of pixels.

    Args:
        config: of a run whose data are latents, whether it says so or not.
    """
    model = config.model
    if config.sampling.clip_x0:
        yield UserError(
            "`sampling.clip_x0` is True, but the data are latents, which no bounds hold; leave it "
            "out",
            "sampling.clip_x0",
        )
    if getattr(model, "low_resolution", None) is not None:
        yield UserError(
            f"`model.low_resolution` is {model.low_resolution}, but the data are latents, and "
            "latents of low-resolution images are other latents; leave it out, or train "
            "super-resolution on images",
            "model.low_resolution",
        )
