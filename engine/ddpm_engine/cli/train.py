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

from ddpm_engine.checkpoints.load import config_of
from ddpm_engine.checkpoints.recorded_config import CONFIG, load_record
from ddpm_engine.cli.options import exit_on_error, parse_options
from ddpm_engine.config import OptimizerConfig, RunConfig, dump_config
from ddpm_engine.errors import UserError
from ddpm_engine.launched import is_first
from ddpm_engine.locations import user_path
from ddpm_engine.networks.autoencoder.kl_config import AutoencoderKLConfig
from ddpm_engine.networks.files.hub import local_folder
from ddpm_engine.networks.files.layout import find_layout
from ddpm_engine.presets import PRESETS
from ddpm_engine.rules import validate
from ddpm_engine.runtime import use_local_compile_cache
from ddpm_engine.training.run_directory import is_run
from ddpm_engine.training.trainer import Trainer

FINE_TUNING = OptimizerConfig(learning_rate=1e-5)
"""That of a run which starts from another model, unless a preset is named."""


@dataclass(frozen=True)
class Options:
    """Train a diffusion model. Run the same command again to resume.

    Every field below can be set; defaults are those of the preset or configuration chosen.
    """

    preset: Literal[
        "digits", "digits-classes", "digits-upscale", "digits-edm", "digits-flow", "digits-dit",
        "numbers-text", "numbers-base", "numbers-upscale", "numbers-prior", "numbers-decoder",
        "numbers-latents", "photos", "photos-text", "cifar10", "cifar10-edm", "cifar10-flow",
        "celebahq256", "lsun256", "dit-b-256", "ldm-256", "jit-b-64",
    ] = "digits"  # fmt: skip
    """Preset that the defaults come from."""
    config: Path | None = None
    """Run directory, or its config.json, that the defaults come from instead."""
    init: Path | None = None
    """Model that the run starts from, of which it has network, process and sampler: a run
    directory, or the folder of a pipeline of diffusers; default: none."""
    print_config: bool = False
    """Output of the resolved configuration as JSON, and nothing else."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()  # noqa: RUF009


def parse(arguments: list[str]) -> Options:
    """Read the command line; what `--preset` or `--config` says becomes the defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="digits")
    first.add_argument("--config")
    first.add_argument("--init")
    chosen, _ = first.parse_known_args(arguments)
    flags = {argument.partition("=")[0] for argument in arguments}
    if chosen.config is not None:
        try:
            defaults = run_defaults(user_path(chosen.config), "--out" in flags)
        except UserError as error:
            raise UserError(f"`config`: {error}", "config") from None
    else:
        # An unknown preset is reported by tyro, with the choices.
        defaults = PRESETS.get(chosen.preset, PRESETS["digits"])()
    if chosen.init is not None:
        if chosen.config is None and "--preset" not in flags:
            defaults = RunConfig(optimizer=FINE_TUNING)
        defaults = started_from(user_path(chosen.init), defaults)
    if isinstance(defaults.model, AutoencoderKLConfig):
        raise UserError(
            "`config` is of an autoencoder; continue it with train_autoencoder.py", "config"
        )
    if "--data.path" in flags and "--data.source" not in flags:
        # The preset's source belongs to its own folder: a mistyped path must not be filled with it.
        defaults = replace(defaults, data=replace(defaults.data, source=None))
    return parse_options(Options, arguments, default=Options(run=defaults))


def started_from(path: Path, defaults: RunConfig) -> RunConfig:
    """Return defaults for a run that starts from a model.

    Args:
        path: of the model.
        defaults: of what does not follow from it.

    Raises:
        UserError: there is no model, or it is one that this engine does not have.
    """
    try:
        model = config_of(path)
    except UserError as error:
        raise UserError(f"`init`: {error}", "init") from None
    data = defaults.data
    if not is_run(path):
        layout = find_layout(local_folder(path))
        encoder, autoencoder = layout.text_encoder, layout.autoencoder
        if encoder is not None:
            data = replace(data, text_encoder=str(encoder))
        if autoencoder is not None:
            data = replace(data, autoencoder=str(autoencoder))
    else:
        before = model.data
        data = replace(data, text_encoder=before.text_encoder, autoencoder=before.autoencoder)
    return replace(
        defaults,
        data=data,
        model=model.model,
        diffusion=model.diffusion,
        objective=model.objective,
        sampling=model.sampling,
        training=replace(defaults.training, init=path),
    )


def run_defaults(path: Path, out_given: bool) -> RunConfig:
    """Read the configuration that `--config` names; that of a run means the run there.

    Wherever a copied or moved run was trained before, it is trained where it is named.

    Args:
        path: a run directory, its config.json, or any other file of a configuration.
        out_given: whether the command line says where the run goes.

    Raises:
        UserError: there is none, or it is a copy of a run's, which may mean that run or a new one.
    """
    directory = path if path.is_dir() else path.parent
    file = directory / CONFIG if path.is_dir() else path
    of_run = file.name == CONFIG and is_run(directory)
    if of_run and not file.exists():
        return replace(config_of(directory), out=directory)
    config, recorded = load_record(file)
    if of_run:
        return replace(config, out=directory)
    if recorded and not out_given and not _same(config.out, directory):
        raise UserError(
            f"{file} is a copy of the configuration of the run in {config.out}: give `out`, "
            f"{config.out} to go on with that run, or another folder to begin a new one",
            "out",
        )
    return config


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def main() -> None:
    """Parse the command line and train."""
    use_local_compile_cache()
    with exit_on_error(Options):
        options = parse(sys.argv[1:])
        if options.print_config:
            validate(options.run)
            print(dump_config(options.run), end="")
            return
        logging.basicConfig(
            level=logging.INFO if is_first() else logging.WARNING,
            format="%(message)s",
            stream=sys.stdout,
        )
        with logging_redirect_tqdm():
            Trainer(options.run).fit()


if __name__ == "__main__":
    main()
