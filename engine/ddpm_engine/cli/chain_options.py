"""Options of a chain of models: a cascade, or a prior with what it conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.cli.options import numbers
from ddpm_engine.cli.request_options import Numbers, fields_of, request_of
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.errors import UserError
from ddpm_engine.generation.chain import Cascade
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler


@dataclass(frozen=True)
class ChainOptions:
    """Several models, each of which takes what the one before generates."""

    cascade: tuple[Path, ...] = ()
    """Base model and the super-resolution models that follow it, in place of --checkpoint; default:
    none."""
    prior: Path | None = None
    """Model that generates image embeddings from prompts, for the first of the others, its decoder,
    to be conditioned on."""
    stage_steps: Numbers = None
    """Steps of the first model, the second, ..., in place of --steps for all."""
    stage_guidance_scales: Annotated[str | None, tyro.conf.arg(metavar="G,G,...")] = None
    """Guidance scales of the first model, the second, ..., in place of --guidance-scale for all."""


def models_of(options: ChainOptions, checkpoint: Path | None) -> list[Path]:
    """Return where the models are, in the order in which they sample.

    Args:
        options: of the chain.
        checkpoint: of the command.

    Raises:
        UserError: no model, or options that contradict each other or mean nothing alone.
    """
    if (checkpoint is None) == (not options.cascade):
        what = "is missing" if checkpoint is None else "and `cascade` do not go together"
        raise UserError(
            f"`checkpoint` {what}; give one of `checkpoint` and `cascade`", "checkpoint"
        )
    if len(options.cascade) == 1 and options.prior is None:
        raise UserError(
            "`cascade` names one model; give those that follow it, too, or name it by `checkpoint`",
            "cascade",
        )
    last = list(options.cascade) if checkpoint is None else [checkpoint]
    models = last if options.prior is None else [options.prior, *last]
    for name in ("stage_steps", "stage_guidance_scales"):
        if len(models) == 1 and getattr(options, name) is not None:
            raise UserError(f"`{name}` needs `cascade` or `prior`; give one, or leave it out", name)
    return models


def bind(
    models: list[LoadedModel], chain: ChainOptions, options: Mapping[str, Any]
) -> SampleRequest | Sampler:
    """Bind what the options ask for to one model, or to a chain of them.

    Args:
        models: in their order.
        chain: what holds for one stage alone.
        options: as `request_of` takes them.

    Raises:
        UserError: a request that they cannot serve.
    """
    if len(models) == 1:
        return request_of(models[0], options)
    shared = fields_of(options)
    steps: Sequence[int] = ()
    if chain.stage_steps is not None:
        steps = numbers("stage-steps", chain.stage_steps)
    scales = _scales(chain.stage_guidance_scales)
    stages: list[dict[str, Any]] = [{} for _ in range(max(len(steps), len(scales)))]
    for stage, count in zip(stages, steps, strict=False):
        stage["steps"] = count
    known = shared.get("guidance") or Guidance(1.0)
    for stage, scale in zip(stages, scales, strict=False):
        stage["guidance"] = replace(known, scale=scale)
    return Cascade(models).sampler(stages, **shared)


def _scales(text: str | None) -> list[float]:
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"`stage_guidance_scales` is {text!r}; it takes numbers, as 3,1.5",
            "stage_guidance_scales",
        ) from None
