"""Pack images into WebDataset shards, index shards made elsewhere, or verify a set.

    make_shards.py SOURCE --out DIR [--size N] [--channels 1|3] [--per-shard K] [--format png]
                   [--processes N]
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

import tyro
from tqdm import tqdm

from ddpm_engine.bounds import Ge, Le
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.shards.manifest import Manifest, Shard
from ddpm_engine.data.shards.verify import verify as find_damage
from ddpm_engine.errors import UserError
from ddpm_engine.images.folder import in_words
from ddpm_engine.printable import printable
from ddpm_engine.threads import usable_cores

Processes = Annotated[int, Ge(1), Le(1024)] | None


def pack(
    source: tyro.conf.Positional[str],
    out: Path,
    size: PositiveOrNone = None,
    channels: Literal[1, 3] | None = None,
    per_shard: Positive = 10_000,
    image_format: Annotated[
        Literal["png", "jpg", "webp", "npy"], tyro.conf.arg(name="format")
    ] = "png",
    processes: Processes = None,
) -> int:
    """Pack a source into shards (also: make_shards.py index DIR, make_shards.py verify DIR).

    Args:
        source: a folder of images (class folders become labels), an .npz file, CIFAR's binary
            version, an IDX file, hf:NAME[:SPLIT], digits, or photos.
        out: folder to make.
        size: side in pixels that the central square is resized to; default: as they are.
        channels: channels to convert to, 1 (grey) or 3 (RGB); default: as they are.
        per_shard: images per shard.
        image_format: format of each image; png, webp and npy are lossless.
        processes: processes that pack, to the same bytes in any number; default: one per core.
    """
    opened = open_source(source, out)
    # disable=None: a bar on a terminal, nothing in a log.
    with tqdm(total=len(opened.examples), unit=" images", disable=None) as bar:
        manifest = write_shards(
            opened, out, size, channels, per_shard, image_format, _count(processes), bar.update
        )
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


def _report(manifest: Manifest, directory: Path) -> None:
    numbered = list(enumerate(manifest.classes or ()))
    if any(name != str(number) for number, name in numbered):
        print("classes:", in_words(f"{number} {printable(name)}" for number, name in numbered))
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
