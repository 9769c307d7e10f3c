"""Train an autoencoder, whose latents a diffusion model can then be of: `accelerate launch
launch/train_autoencoder.py [--preset NAME] [--FIELD VALUE ...]`.

By the trainer of `train.py`. The same command resumes. A finished run holds the autoencoder as
diffusers saves it, in `vae`: for `make_shards.py --autoencoder RUN`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_engine.autoencoder_presets import AUTOENCODERS
from ddpm_engine.cli.options import exit_on_error, parse_options
from ddpm_engine.cli.train import run_defaults
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig, dump_config
from ddpm_engine.data.config import DataConfig
from ddpm_engine.errors import UserError
from ddpm_engine.launched import is_first
from ddpm_engine.locations import user_path
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.objectives.config import AutoencodingConfig
from ddpm_engine.rules import validate
from ddpm_engine.runtime import use_local_compile_cache
from ddpm_engine.training.trainer import Trainer


@dataclass(frozen=True)
class Options:
    """Train an autoencoder. Run the same command again to resume.

    Every field below can be set; defaults are those of the preset or configuration chosen.
    """

    preset: Literal["numbers-autoencoder", "photos-autoencoder"] = "numbers-autoencoder"
    """Preset that the defaults come from."""
    config: Path | None = None
    """Run directory, or its config.json, that the defaults come from instead."""
    print_config: bool = False
    """Output of the resolved configuration as JSON, and nothing else."""
    out: Path = Path("runs/run")
    """Directory of the run: configuration, metrics, checkpoints, reconstructions, and in the end
    the autoencoder. Run again to resume."""
    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderKLConfig = field(default_factory=AutoencoderKLConfig)
    autoencoding: AutoencodingConfig = field(default_factory=AutoencodingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS = ("out", "data", "model", "autoencoding", "optimizer", "training", "log")
"""Fields of a run that can be set."""


def parse(arguments: list[str]) -> tuple[Options, RunConfig]:
    """Read the command line; what `--preset` or `--config` says becomes the defaults.

    Raises:
        UserError: no configuration there, or that of another network.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="numbers-autoencoder")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(arguments)
    flags = {argument.partition("=")[0] for argument in arguments}
    if chosen.config is not None:
        try:
            defaults = run_defaults(user_path(chosen.config), "--out" in flags)
        except UserError as error:
            raise UserError(f"`config`: {error}", "config") from None
        if not isinstance(defaults.model, AutoencoderKLConfig):
            raise UserError("`config` is of no autoencoder; continue it with train.py", "config")
    else:
        # An unknown preset is reported by tyro, with the choices.
        defaults = AUTOENCODERS.get(chosen.preset, AUTOENCODERS["numbers-autoencoder"])()
    if "--data.path" in flags and "--data.source" not in flags:
        # The preset's source belongs to its own folder: a mistyped path must not be filled with it.
        defaults = replace(defaults, data=replace(defaults.data, source=None))
    given = Options(**{name: getattr(defaults, name) for name in SECTIONS})
    options = parse_options(Options, arguments, default=given)
    return options, replace(defaults, **{name: getattr(options, name) for name in SECTIONS})


def main() -> None:
    """Parse the command line and train."""
    use_local_compile_cache()
    with exit_on_error(Options):
        options, run = parse(sys.argv[1:])
        if options.print_config:
            validate(run)
            print(dump_config(run), end="")
            return
        logging.basicConfig(
            level=logging.INFO if is_first() else logging.WARNING,
            format="%(message)s",
            stream=sys.stdout,
        )
        with logging_redirect_tqdm():
            Trainer(run).fit()


if __name__ == "__main__":
    main()
