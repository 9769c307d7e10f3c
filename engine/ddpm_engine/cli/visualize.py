"""Plot figures of the diffusion process:

    python launch/visualize.py --checkpoint RUN --out DIR      # of a trained run
    python launch/visualize.py --toy swiss_roll --out DIR      # in two dimensions, trained now

docs/ddpm.md and docs/flow-matching.md explain the figures.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from ddpm_engine.bounds import Ge, Le
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.cli.options import PositiveOrNone, exit_on_error, numbers, parse_options
from ddpm_engine.cli.unused_options import refuse_unused
from ddpm_engine.errors import UserError
from ddpm_engine.figures.run_figures import FIGURES, Exhibit, Inapplicable, check
from ddpm_engine.figures.straight_lines import straight_lines_figure
from ddpm_engine.figures.toy import STEPS, Toy, toy_points, toy_schedule, train_toy
from ddpm_engine.figures.toy_2d import Plane
from ddpm_engine.generation.input_images import InputImages
from ddpm_engine.launched import check_launched_precision
from ddpm_engine.runtime import Numerics, local_device, use_local_compile_cache
from ddpm_engine.samplers.identity import SampleId, Seed


@dataclass(frozen=True)
class Options:
    """Plot figures of the diffusion process, for a trained run or in two dimensions."""

    out: Path
    """Folder for the figures."""
    checkpoint: Path | None = None
    """A run directory."""
    toy: Toy | None = None
    """Two-dimensional data set to learn instead of a run, within a minute."""
    data: Path | str | None = None
    """Shards of real images; default: those of the run."""
    only: Annotated[str | None, tyro.conf.arg(metavar="NAME,...")] = None
    """Figures to plot, of real-and-drawn, forward, reverse, loss, schedules, quality, bound,
    interpolation, denoising; default: all."""
    autoencoder: str | None = None
    """Place of the autoencoder whose latents the model samples, if it is elsewhere now: a folder of
    diffusers; default: where it was in training."""
    samples: Path | None = None
    """Folder of PNGs from sample.py, for real-and-drawn; default: samples generated now."""
    photo: Path | None = None
    """Image for denoising; default: the first of the data."""
    seed: Seed = 0
    """Seed of all noise: another seed, other samples."""
    ids: tuple[SampleId, SampleId] = (4, 2)
    """Ids of samples: of reverse the first, of interpolation both ends."""
    steps: PositiveOrNone = None
    """Steps of a sample, one or two network evaluations each; default: the run's."""
    timesteps: Annotated[str | None, tyro.conf.arg(metavar="T,T,...")] = None
    """Columns of forward, from 1; default: ten, closer together at first."""
    count: Annotated[int, Ge(2), Le(1000)] = 256
    """Samples for each point of quality, 2 to 1000."""


_FIGURES = frozenset(FIGURES)
_OF_DATA = frozenset({"real-and-drawn", "forward", "bound"})
_USED_BY = {
    "data": _OF_DATA | {"data's photo"},
    "only": _FIGURES,
    "autoencoder": _FIGURES,
    "samples": frozenset({"real-and-drawn"}),
    "photo": frozenset({"denoising"}),
    "seed": _FIGURES - {"real-and-drawn", "loss", "schedules"} | {"generated", "toy"},
    "ids": frozenset({"reverse", "interpolation"}),
    "steps": frozenset({"reverse", "generated"}),
    "timesteps": frozenset({"forward"}),
    "count": frozenset({"quality"}),
}
"""Option to what uses it; see `purposes`."""


def purposes(options: Options, names: Collection[str]) -> set[str]:
    """Return the figures, and what some of them need if it is not given: samples, or a photo."""
    found = set(names)
    if "real-and-drawn" in names and options.samples is None:
        found.add("generated")
    if "denoising" in names and options.photo is None:
        found.add("data's photo")
    return found


def chosen_figures(only: str | None) -> list[str]:
    """Return the names of the figures asked for.

    Raises:
        UserError: an unknown name.
    """
    names = list(FIGURES) if only is None else only.split(",")
    for name in names:
        if name not in FIGURES:
            raise UserError(f"--only names {name!r}; there are {', '.join(FIGURES)}")
    return names


def exhibit_of(options: Options, checkpoint: Path, trained: LoadedModel) -> Exhibit:
    """Return the run and the settings of its figures.

    Raises:
        UserError: the model was saved by another library, is a super-resolution model or one
            conditioned on text, or an option is out of range.
    """
    if trained.checkpoint is None:
        raise UserError(
            f"--checkpoint {checkpoint} is a model of diffusers; the figures show a run's data and "
            "losses, so give a run directory"
        )
    if trained.network.conditioning.low_resolution is not None:
        raise UserError(
            f"--checkpoint {checkpoint} is a super-resolution model; the figures are of other "
            "networks. Use sample.py"
        )
    if trained.spec.text is not None or trained.spec.vector is not None:
        raise UserError(
            f"--checkpoint {checkpoint} is conditioned on text or a vector; the figures are of "
            "other networks. Use sample.py"
        )
    if options.data is not None:
        data = replace(trained.config.data, path=options.data, mix_with=(), weights=())
        trained = replace(trained, config=replace(trained.config, data=data))
    timesteps = options.timesteps
    photo = options.photo
    return Exhibit(
        trained,
        checkpoint,
        options.out,
        seed=options.seed,
        ids=options.ids,
        steps=options.steps,
        timesteps=None
        if timesteps is None
        else tuple(t - 1 for t in numbers("timesteps", timesteps)),
        samples=options.samples,
        photo=None
        if photo is None
        else InputImages(photo, trained.image_shape, "photo").of([0])[0],
        count=options.count,
    )


def show_run(options: Options, checkpoint: Path) -> None:
    """Plot a run's figures; report those that do not apply.

    Raises:
        UserError: after all others are plotted, for figures that failed, or that were requested and
            do not apply.
    """
    names = chosen_figures(options.only)
    described = "these figures" if options.only is None else f"`only` {options.only}"
    if options.samples is not None:
        described += " and `samples`"
    refuse_unused(options, _USED_BY, purposes(options, names), described)
    trained = load_model(checkpoint, local_device(), autoencoder=options.autoencoder)
    exhibit = exhibit_of(options, checkpoint, trained)
    check(exhibit, names)
    made = make_folder(options.out)
    failed = []
    for name in names:
        try:
            for path in FIGURES[name](exhibit):
                print(path, flush=True)
        except UserError as error:  # the others may succeed
            if isinstance(error, Inapplicable) and options.only is None:
                print(f"no {name}: {error}", flush=True)
            else:
                failed.append(error)
    if failed:
        if made:
            with suppress(OSError):
                options.out.rmdir()  # if there is nothing in it
        raise UserError("; ".join(map(str, failed)), failed[0].field)


def make_folder(out: Path) -> bool:
    """Make the folder of the figures, and return whether there was none.

    Raises:
        UserError: it cannot be made.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"`out` {out} cannot be made a folder ({error.strerror}); choose another", "out"
        ) from None
    return made


def show_toy(options: Options, toy: Toy) -> None:
    """Train on a two-dimensional data set and plot the reverse process, and flow matching's."""
    refuse_unused(options, _USED_BY, {"toy"}, f"`toy` {toy}")
    local_device()  # all cores
    make_folder(options.out)
    points, place = toy_points(toy)
    schedule = toy_schedule()
    with tqdm(total=STEPS, unit=" steps", disable=None) as bar:
        model = train_toy(points, schedule, STEPS, options.seed, bar.update)
    still, moving = (options.out / f"{toy}.{kind}" for kind in ("png", "gif"))
    plane = Plane(model, schedule, points, place, options.seed)
    plane.save_figure(still)
    print(still, flush=True)
    plane.save_animation(moving)
    print(moving, flush=True)
    straight = options.out / f"{toy}-straight-lines.png"
    straight_lines_figure(points, options.seed, straight)
    print(straight, flush=True)


def main() -> None:
    """Parse the command line and plot."""
    use_local_compile_cache()
    with exit_on_error(Options):
        options = parse_options(Options)
        check_launched_precision("no", None)
        Numerics().apply()
        if options.toy is not None and options.checkpoint is None:
            show_toy(options, options.toy)
        elif options.checkpoint is not None and options.toy is None:
            show_run(options, options.checkpoint)
        else:
            raise UserError("give either --checkpoint RUN or --toy NAME")


if __name__ == "__main__":
    main()
