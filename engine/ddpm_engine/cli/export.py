"""Export a trained model for diffusers: `python launch/export.py --checkpoint RUN --out DIR`.

`diffusers.DDPMPipeline.from_pretrained(DIR)` loads the folder, which has a model card; that of a
distilled network is for `DDIMPipeline`, and the card has the call that samples in the steps it was
distilled to. Of an EDM network the folder holds the parts, and the card the sampling loop.
Diffusers need not be installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.cli.options import exit_on_error, parse_options
from ddpm_engine.export.pipeline import export_pipeline


@dataclass(frozen=True)
class Options:
    """Export a trained model as a folder that diffusers loads."""

    checkpoint: Path
    """A run directory, or one checkpoints/step-… in it."""
    out: Path
    """Folder to make; the files of an earlier export there are replaced, and no others touched."""
    weights: Literal["ema", "model"] = "ema"
    """EMA weights, or those of the last step."""


def main() -> None:
    """Load, write."""
    with exit_on_error(Options):
        options = parse_options(Options)
        pretrained = load_model(options.checkpoint, weights=options.weights)
        export_pipeline(pretrained, options.out, options.weights)
        print(f"{options.out} is written; README.md in it says how to load it")


if __name__ == "__main__":
    main()
