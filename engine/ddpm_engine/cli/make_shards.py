"""Pack images into WebDataset shards, index shards made elsewhere, or verify a set.

    make_shards.py SOURCE --out DIR [--size N | --size H W] [--channels 1|3] [--per-shard K]
                   [--format png] [--captions] [--text-encoder PLACE]
                   [--image-features inception] [--autoencoder PLACE [--flips]
                   [--device cuda]] [--processes N]
    make_shards.py index DIR [--processes N]
    make_shards.py verify DIR

Exit status: 0 done, 1 `verify` found damage, 2 the input is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from ddpm_engine.bounds import Ge, Le
from ddpm_engine.cli.options import Device, Positive, exit_on_error, parse_options
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.shards.manifest import Manifest, Shard
from ddpm_engine.data.shards.verify import verify as find_damage
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.image_embeddings import image_embedder
from ddpm_engine.images.folder import in_words
from ddpm_engine.networks.autoencoder.autoencoder import Autoencoder
from ddpm_engine.networks.autoencoder.folders import open_autoencoder
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.printable import printable
from ddpm_engine.threads import usable_cores

Processes = Annotated[int, Ge(1), Le(1024)] | None


def pack(
    source: tyro.conf.Positional[str],
    out: Path,
    size: Positive | tuple[Positive, Positive] | None = None,
    channels: Literal[1, 3] | None = None,
    per_shard: Positive = 10_000,
    image_format: Annotated[
        Literal["png", "jpg", "webp", "npy"], tyro.conf.arg(name="format")
    ] = "png",
    captions: bool = False,
    text_encoder: str | None = None,
    image_features: Literal["digits", "inception", "numbers"] | None = None,
    autoencoder: str | None = None,
    flips: bool = False,
    device: Device = "cpu",
    processes: Processes = None,
) -> int:
    """Pack a source into shards (also: make_shards.py index DIR, make_shards.py verify DIR).

    Args:
        source: a folder of images (class folders become labels), an .npz file, CIFAR's binary
            version, an IDX file, hf:NAME[:SPLIT], digits, or photos.
        out: folder to make.
        size: side in pixels that the central square is resized to, or height and width that the
            central part of their proportions is resized to; default: as they are.
        channels: channels to convert to, 1 (grey) or 3 (RGB); default: as they are.
        per_shard: images per shard.
        image_format: format of each image; png, webp and npy are lossless.
        captions: pack captions: of a folder, a .txt beside each image, or a captions.jsonl or
            metadata.jsonl; of hf:NAME, its column of captions.
        text_encoder: folder of a text encoder of transformers (T5, CLIP, BERT), or package:NAME,
            whose embeddings of the captions are packed too; default: captions alone.
        image_features: features whose values are packed as the images' embeddings: of the digits
            classifier, Inception, or the reader of numbers; default: none.
        autoencoder: folder of an autoencoder of diffusers (AutoencoderKL, AutoencoderTiny), or
            package:NAME, whose latents are packed in place of the images; default: images.
        flips: pack the latents of the mirrored images, too, for training that mirrors images.
        device: device that the autoencoder computes on; with a GPU, one process packs.
        processes: processes that pack, to the same bytes in any number; default: one per core.
    """
    encoder = None if text_encoder is None else open_text_encoder(text_encoder)
    codec = None if autoencoder is None else _autoencoder(autoencoder, device)
    if processes is None and codec is not None and codec.device.type != "cpu":
        processes = 1
    opened = open_source(source, out, captions=captions or encoder is not None)
    embedder = None
    if image_features is not None:
        stored = size or opened.examples[0].image.shape[:2]
        embedder = image_embedder(image_features, stored)
    # disable=None: a bar on a terminal, nothing in a log.
    with tqdm(total=len(opened.examples), unit=" images", disable=None) as bar:
        manifest = write_shards(
            opened, out, size, channels, per_shard, image_format, _count(processes), bar.update,
            encoder, embedder, codec, flips,
        )  # fmt: skip
    _report(manifest, out)
    return 0


def index(directory: tyro.conf.Positional[Path], processes: Processes = None) -> int:
    """Index WebDataset shards made elsewhere.

    Args:
        directory: folder of .tar files.
        processes: processes that scan; default: one per core.
    """
    with tqdm(unit=" images", disable=None) as bar:
        manifest = index_shards(directory, _count(processes), bar.update)
    _report(manifest, directory)
    return 0


def verify(directory: tyro.conf.Positional[Path]) -> int:
    """Read every byte of a set and name every damaged sample.

    Args:
        directory: folder of a finished set.
    """

    def progress(shards: Iterable[Shard]) -> Iterable[Shard]:
        return tqdm(shards, unit=" shards", disable=None)

    faults = find_damage(directory, progress)
    for fault in faults:
        print(fault)
    print(f"{directory}: {f'{len(faults)} faults' if faults else 'sound'}")
    return 1 if faults else 0


def _count(processes: int | None) -> int:
    return usable_cores() if processes is None else processes


def _autoencoder(place: str, device: str) -> Autoencoder:
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"`device` is {device}, but no GPU is found; leave it out", field="device")
    return open_autoencoder(place, device)


def _report(manifest: Manifest, directory: Path) -> None:
    numbered = list(enumerate(manifest.classes or ()))
    if any(name != str(number) for number, name in numbered):
        print("classes:", in_words(f"{number} {printable(name)}" for number, name in numbered))
    if manifest.text is not None:
        print(
            f"captions embedded by {manifest.text.encoder}: {manifest.text.channels} channels, the "
            f"longest of {manifest.text.longest} tokens"
        )
    elif manifest.captions:
        print("captions without embeddings")
    if manifest.embeddings is not None:
        print(
            f"images embedded by {manifest.embeddings.name}: {manifest.embeddings.channels} "
            "channels"
        )
    if manifest.latents is not None:
        latents = manifest.latents
        channels, height, width = latents.shape
        print(
            f"latents by {latents.place}: {channels} channels of {height}×{width}, of images of "
            f"{latents.height}×{latents.width}{' and mirrored ones' if latents.flipped else ''}"
        )
    print(
        f"{manifest.samples} samples in {len(manifest.shards)} shards, {manifest.bytes} bytes, "
        f"fingerprint {manifest.fingerprint}, in {directory}"
    )


def main() -> None:
    """Run the command named by the first argument; anything else is a source to pack."""
    arguments = sys.argv[1:]
    commands = {"index": index, "verify": verify}
    first = arguments[0] if arguments else ""
    command = commands.get(first)
    with exit_on_error(pack, index, verify):
        meant = get_close_matches(first, commands, n=1)
        if command is None and meant and not Path(first).exists():
            raise UserError(
                f"there is no {first!r} to pack, and no such command; did you mean {meant[0]}?"
            )
        if command is None:
            sys.exit(parse_options(pack, arguments))
        sys.exit(parse_options(command, arguments[1:], prog=f"{Path(sys.argv[0]).name} {first}"))


if __name__ == "__main__":
    main()
