"""What a network is conditioned on besides labels, and whether shards hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.members import padded_length
from ddpm_engine.data.shards.manifest import ImageEmbeddings, TextEmbeddings
from ddpm_engine.data.shards.shard_set import ShardSet
from ddpm_engine.errors import UserError
from ddpm_engine.locations import redacted
from ddpm_engine.networks.text.folders import open_text_encoder


@dataclass(frozen=True)
class Needs:
    """What a network needs of a sample besides its image and label."""

    text: int | None = None
    """Width of the embeddings of tokens; None: it takes no text."""
    pooled: int | None = None
    """Width of the embedding of a caption; None: it takes none."""
    embeddings: int | None = None
    """Width of the embedding of an image; None: it takes none."""
    diffused: bool = False
    """Whether embeddings of images are what is diffused."""
    encoder: str | None = None
    """Place of the text encoder that the configuration names."""

    @staticmethod
    def of(config: DataConfig, channels: int, text: int | None, vector: int | None) -> Needs:
        """Return the needs of a network.

        Args:
            config: where its conditions come from.
            channels: of what it diffuses.
            text: width of the embeddings of tokens that it attends to.
            vector: width of the vector that it is conditioned on.

        Raises:
            UserError: it would diffuse images' embeddings conditioned on themselves.
        """
        diffused = config.diffuse == "embeddings"
        image_vector = vector if config.vector == "image" else None
        if diffused and image_vector is not None:
            raise UserError(
                "`data.vector` is image while `data.diffuse` is embeddings: a network cannot be "
                "conditioned on what it diffuses; set `data.vector` to text",
                field="data.vector",
            )
        return Needs(
            text=text,
            pooled=vector if config.vector == "text" else None,
            embeddings=channels if diffused else image_vector,
            diffused=diffused,
            encoder=config.text_encoder,
        )

    @property
    def captions(self) -> bool:
        """Whether it needs captions or their embeddings."""
        return self.text is not None or self.pooled is not None


def check_stream(needs: Needs, location: str, autoencoder: str | None = None) -> None:
    """Check that a stream, which has no manifest, can give what a network needs.

    Args:
        needs: of the network.
        location: of the stream.
        autoencoder: place of the one that the configuration names.

    Raises:
        UserError: it cannot.
    """
    where = redacted(location)
    if needs.embeddings is not None:
        raise UserError(
            f"{where} is streamed, which gives no embeddings of images: use indexed shards",
            field="data.path",
        )
    if autoencoder is not None:
        raise UserError(
            f"`data.autoencoder` is {autoencoder}, but {where} is streamed, which gives no "
            "latents: use indexed shards",
            field="data.autoencoder",
        )
    if needs.captions and needs.encoder is None:
        raise UserError(
            f"the network takes text, and {where} is streamed, which gives captions without "
            "embeddings: set `data.text_encoder`",
            field="data.text_encoder",
        )


def check_conditions(needs: Needs, sets: Sequence[ShardSet], check_encoder: bool = True) -> None:
    """Check that sets hold what a network needs, from the same encoders.

    Args:
        needs: of the network.
        sets: of shards.
        check_encoder: open the text encoder that the configuration names, and compare it with that
            of the sets. One process of a run suffices.

    Raises:
        UserError: one of them does not.
    """
    if needs.captions:
        for shards in sets:
            _check_text(needs, shards)
        _check_same(sets, [shards.manifest.text for shards in sets], "text encoder")
        if check_encoder and sets[0].manifest.text is not None:
            _check_encoder(needs.encoder, sets[0], sets[0].manifest.text)
    if needs.embeddings is not None:
        for shards in sets:
            _check_embeddings(needs, needs.embeddings, shards)
        _check_same(sets, [shards.manifest.embeddings for shards in sets], "image embeddings")


def longest_caption(sets: Sequence[ShardSet]) -> int | None:
    """Return the number of tokens of the longest embedded caption of sets, rounded up.

    Returns:
        As `padded_length`; None: no set holds embeddings of captions.
    """
    longest = max((s.manifest.text.longest for s in sets if s.manifest.text is not None), default=0)
    return padded_length(longest) or None


def _check_text(needs: Needs, shards: ShardSet) -> None:
    place, stored = shards.storage, shards.manifest.text
    if stored is None:
        if not shards.manifest.captions:
            raise UserError(
                f"the network takes text, but samples in {place} have no captions: pack shards "
                "with captions",
                field="data.path",
            )
        if needs.encoder is None:
            raise UserError(
                f"the network takes text, and {place} holds captions without embeddings: set "
                "`data.text_encoder` to encode them in training, or pack the shards with one",
                field="data.text_encoder",
            )
        return
    for asked, held, what in (
        (needs.text, stored.channels, "tokens"),
        (needs.pooled, stored.pooled_channels, "captions"),
    ):
        if asked is not None and asked != held:
            raise UserError(
                f"the network takes embeddings of {what} of {asked} channels, those in {place}, "
                f"by the text encoder {stored.encoder}, have {held}: change the network to {held}, "
                "or pack the shards with another encoder",
                field="data.path",
            )


def _check_encoder(named: str | None, shards: ShardSet, stored: TextEmbeddings) -> None:
    if named is None:
        return
    fingerprint = open_text_encoder(named).fingerprint
    if fingerprint != stored.fingerprint:
        raise UserError(
            f"`data.text_encoder` {named} is another than the one that {shards.storage} was packed "
            f"with, {stored.encoder} (fingerprints {fingerprint[:12]} and "
            f"{stored.fingerprint[:12]}): name that one, or pack the shards again",
            field="data.text_encoder",
        )


def _check_embeddings(needs: Needs, asked: int, shards: ShardSet) -> None:
    stored = shards.manifest.embeddings
    field = "data.diffuse" if needs.diffused else "data.vector"
    value = "embeddings" if needs.diffused else "image"
    if stored is None:
        raise UserError(
            f"`{field}` is {value}, but {shards.storage} holds no embeddings of its images: pack "
            "the shards with image features",
            field=field,
        )
    if stored.channels != asked:
        change = "`model.in_channels` and `model.out_channels`" if needs.diffused else "the network"
        raise UserError(
            f"`{field}` is {value}: embeddings in {shards.storage}, by {stored.name}, have "
            f"{stored.channels} channels, but the network takes {asked}; set {change} to "
            f"{stored.channels}",
            field=field,
        )


def _check_same(
    sets: Sequence[ShardSet],
    stored: Sequence[TextEmbeddings | ImageEmbeddings | None],
    what: str,
) -> None:
    """Check that all sets were embedded alike."""
    fingerprints = [None if one is None else one.fingerprint for one in stored]
    for shards, fingerprint in zip(sets, fingerprints, strict=True):
        if fingerprint != fingerprints[0]:
            raise UserError(
                f"{shards.storage} and {sets[0].storage} were packed with different {what}, or one "
                "of them with none: pack them alike to mix them",
                field="data.mix_with",
            )
