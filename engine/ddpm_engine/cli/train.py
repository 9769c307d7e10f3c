"""Train a diffusion model: `accelerate launch launch/train.py [--preset NAME] [--FIELD VALUE ...]`.

Without arguments it trains the digits preset, making its data set first. The same command resumes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_engine.cli.options import exit_on_error, parse_options
from ddpm_engine.config import RunConfig, dump_config, load_config
from ddpm_engine.errors import UserError
from ddpm_engine.paths import user_path
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import validate
from ddpm_engine.runtime import use_local_compile_cache
from ddpm_engine.training.trainer import Trainer


@dataclass(frozen=True)
class Options:
    """Train a diffusion model. Run the same command again to resume.

    Every field below can be set; defaults are those of the preset or configuration chosen.
    """

    preset: Literal[
        "digits", "digits-classes", "digits-upscale", "digits-edm", "photos", "cifar10",
        "cifar10-edm", "celebahq256", "lsun256",
    ] = "digits"  # fmt: skip
    """Preset that the defaults come from."""
    config: Path | None = None
    """Run directory, or its config.json, that the defaults come from instead."""
    print_config: bool = False
    """Output of the resolved configuration as JSON, and nothing else."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()  # noqa: RUF009


def parse(arguments: list[str]) -> Options:
    """Read the command line; what `--preset` or `--config` says becomes the defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="digits")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(arguments)
    if chosen.config is not None:
        try:
            defaults = load_config(user_path(chosen.config))
        except UserError as error:
            raise UserError(f"`config`: {error}", "config") from None
    else:
        # An unknown preset is reported by tyro, with the choices.
        defaults = PRESETS.get(chosen.preset, PRESETS["digits"])()
    flags = {argument.partition("=")[0] for argument in arguments}
    if "--data.path" in flags and "--data.source" not in flags:
        # The preset's source belongs to its own folder: a mistyped path must not be filled with it.
        defaults = replace(defaults, data=replace(defaults.data, source=None))
    return parse_options(Options, arguments, default=Options(run=defaults))


def main() -> None:
    """Parse the command line and train."""
    use_local_compile_cache()
    with exit_on_error(Options):
        options = parse(sys.argv[1:])
        if options.print_config:
            validate(options.run)
            print(dump_config(options.run), end="")
            return
        main_process = os.environ.get("RANK", "0") == "0"
        logging.basicConfig(
            level=logging.INFO if main_process else logging.WARNING,
            format="%(message)s",
            stream=sys.stdout,
        )
        with logging_redirect_tqdm():
            Trainer(options.run).fit()


if __name__ == "__main__":
    main()
