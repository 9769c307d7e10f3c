"""Do samples show the numbers of their prompts? `python benchmarks/read_numbers.py --samples DIR`.

Of a folder of samples with prompts (`metadata.jsonl`, as launch/sample.py writes it beside PNGs), a
classifier of real digits reads both digits of each, and the share that is right is reported. With
`--picture` the samples are shown below their prompts, the wrong ones marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_engine.cli.options import Positive, exit_on_error, parse_options
from ddpm_engine.data.packing.sources.numbers import number_of
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.numbers import number_reader, unseen_pairs
from ddpm_engine.json_files import parse_json
from ddpm_engine.plots.captioned import captioned_grid

_UNSEEN = 1000


@dataclass(frozen=True)
class Options:
    """Share of samples that show the numbers of their prompts."""

    samples: Path = Path("samples")
    """Folder of samples with prompts, as launch/sample.py writes it."""
    picture: Path | None = None
    """File for a grid of samples below their prompts."""
    shown: Positive = 36
    """Number of samples in the grid."""
    columns: Positive = 6
    """Number of samples in a row of it."""


class Prompted(NamedTuple):
    """Samples and what they were asked to show."""

    images: NDArray[np.uint8]
    """`[N, H, W, 1]`."""
    prompts: list[str]
    numbers: NDArray[np.int64]
    """`[N]`, the numbers of the prompts."""


def read_prompted(folder: Path) -> Prompted:
    """Read the samples of a folder and their prompts, in the order of `metadata.jsonl`.

    Raises:
        UserError: no such file, a row of it that names no image or no number, or images that differ
            in size.
    """
    listed = folder / "metadata.jsonl"
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"`samples` {folder} has no {listed.name} that can be read ({error.strerror}); "
            "generate samples from prompts, in PNG files",
            "samples",
        ) from None
    images, prompts, numbers = [], [], []
    for number, line in enumerate(lines, 1):
        row = parse_json(line.encode(), f"line {number} of {listed}")
        shown = number_of(row["text"])
        if shown is None:
            raise UserError(
                f"line {number} of {listed} has the prompt {row['text']!r}, which is no caption of "
                "a number from 10 to 99",
                "samples",
            )
        with Image.open(folder / row["file_name"]) as image:
            images.append(np.asarray(image.convert("L"))[..., None])
        prompts.append(row["text"])
        numbers.append(shown)
    if len({image.shape for image in images}) != 1:
        raise UserError(f"`samples` {folder} holds no samples, or some of another size", "samples")
    return Prompted(np.stack(images), prompts, np.array(numbers))


def main() -> None:
    """Read, report, show."""
    with exit_on_error(Options):
        options = parse_options(Options)
        samples = read_prompted(options.samples)
        size = samples.images.shape[1]
        reader, unseen = number_reader(size), unseen_pairs(size, _UNSEEN)
        right = reader.right(samples.images, samples.numbers)
        of_real = reader.right(unseen.images, unseen.numbers).mean()
        print(
            f"both digits right in {right.mean():.1%} of {len(right)} samples ({of_real:.1%} of "
            "pairs of real digits that the reader never saw)"
        )
        for prompt in dict.fromkeys(samples.prompts):
            asked = np.array([prompt == other for other in samples.prompts])
            if not right[asked].all():
                print(f"    {prompt}: {right[asked].sum()} of {asked.sum()}")
        if options.picture is not None:
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            captioned_grid(
                samples.images[: options.shown], samples.prompts[: options.shown], options.picture,
                options.columns, ~right[: options.shown],
            )  # fmt: skip
            print(options.picture)


if __name__ == "__main__":
    main()
