"""What the sections of a configuration demand of each other.

Where a class of the engine checks its own arguments, the rule constructs it and reports its error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ddpm_engine.autoencoder_rules import autoencoder
from ddpm_engine.config import RunConfig
from ddpm_engine.data.mixture import Mixture
from ddpm_engine.data_rules import embeddings, latents, text
from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_engine.errors import UserError
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.timesteps import check_begins_in_noise

_IDS = 2**56  # that noise can tell apart

Rule = Callable[[RunConfig], Iterator[UserError]]


def validate(config: RunConfig) -> None:
    """Check a configuration, without looking at data or devices.

    Raises:
        UserError: reports every problem at once.
    """
    found = problems(config)
    if found:
        field = found[0].field if len(found) == 1 else None
        raise UserError("\n       ".join(map(str, found)), field)


def problems(config: RunConfig) -> list[UserError]:
    """Report everything wrong with a configuration, each problem once."""
    found = []
    for section in fields(config):
        part: Any = getattr(config, section.name)
        if hasattr(part, "problems"):
            names = {field.name: f"{section.name}.{field.name}" for field in fields(part)}
            found += [_qualified(problem, names) for problem in part.problems()]
    for rule in RULES:
        found += rule(config)
    return list({str(problem): problem for problem in found}.values())


def decay(config: RunConfig) -> Iterator[UserError]:
    """The learning rate falls within the run."""
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.decay in ("linear", "cosine") and optimizer.decay_from >= steps:
        yield UserError(
            f"`optimizer.decay_from` is {optimizer.decay_from}, but the run ends at "
            f"`training.steps` {steps}, before the learning rate falls",
            "optimizer.decay_from",
        )


def output_channels(config: RunConfig) -> Iterator[UserError]:
    """The network has an output for the prediction and, if it is learned, for the variance."""
    channels, learned = config.model.in_channels, config.objective.learned_variance
    outputs = 2 * channels if learned else channels
    if config.model.out_channels != outputs:
        yield UserError(
            f"`model.out_channels` is {config.model.out_channels}; with `model.in_channels` "
            f"{channels} and {'' if learned else 'no '}`objective.learned_variance` it must be "
            f"{outputs}",
            "model.out_channels",
        )
    if config.sampling.variance == "learned_range" and not learned:
        yield UserError(
            "`sampling.variance` is learned_range, but without `objective.learned_variance` "
            f"(and `model.out_channels` {2 * channels}) the network learns none",
            "sampling.variance",
        )


def weighting(config: RunConfig) -> Iterator[UserError]:
    """Weights, learned variance, offset noise and the schedule's end suit each other."""
    objective = config.objective
    learned, vlb = objective.learned_variance, objective.weighting == "vlb"
    if learned and vlb:
        yield UserError(
            "`objective.weighting` vlb is the bound of a fixed variance; with "
            "`objective.learned_variance`, which adds the bound's own term, take another",
            "objective.weighting",
        )
    if objective.offset_noise and (learned or vlb):
        given = "`objective.learned_variance`" if learned else "`objective.weighting` vlb"
        yield UserError(
            f"`objective.offset_noise` is {objective.offset_noise}, but the bound that {given} "
            "asks for is that of independent noise",
            "objective.offset_noise",
        )
    if objective.weighting in ("min-snr", "p2") and (end := _noise_alone(config)):
        yield UserError(
            f"`objective.weighting` is {objective.weighting}, which gives no weight to the "
            f"last timestep with {end}, where sampling begins; take simple or vlb",
            "objective.weighting",
        )


def loss_space(config: RunConfig) -> Iterator[UserError]:
    """The space of the loss weighs every level that is trained, and nothing else weighs it too."""
    objective = config.objective
    for name in ("loss", "loss_limit"):
        value = getattr(objective, name)
        if value is not None and objective.weighting != "simple":
            yield UserError(
                f"`objective.{name}` is {value}, but `objective.weighting` "
                f"{objective.weighting} says what the error of x0 weighs, whatever is predicted; "
                "leave one of them out",
                f"objective.{name}",
            )
    loss, end = objective.loss, _noise_alone(config)
    if end and loss is not None and PARAMETERIZATIONS[loss].needs_signal:
        yield UserError(
            f"`objective.loss` is {loss}, which gives no weight to the last timestep with {end}, "
            "where sampling begins; take v, x0 or flow",
            "objective.loss",
        )


def _noise_alone(config: RunConfig) -> str | None:
    """Return what makes the schedule end in pure noise, or None."""
    diffusion = config.diffusion
    if diffusion.zero_terminal_snr:
        return "`diffusion.zero_terminal_snr`"
    if diffusion.schedule == "flow" and diffusion.betas is None:
        return "`diffusion.schedule` flow"
    return None


_OWN_LEVELS = {"edm": ("p_mean", "p_std"), "flow": ("timestep_sampling", "logit_mean", "logit_std")}
"""Fields of the objective for the levels that a prediction with its own schedule is trained at."""
_ANYWHERE = {"edm": ("loss", "loss_limit"), "flow": ("loss", "loss_limit", "offset_noise")}
"""Further fields of the objective that mean something with such a prediction."""


def own_levels(config: RunConfig) -> Iterator[UserError]:
    """A prediction that is trained at any noise level comes with its own schedule and levels."""
    diffusion, objective, plain = config.diffusion, config.objective, ObjectiveConfig()
    prediction = diffusion.prediction
    own = PARAMETERIZATIONS[prediction].own_schedule
    if own != "edm":
        for name in _OWN_LEVELS["edm"]:
            if getattr(objective, name) != getattr(plain, name):
                yield UserError(
                    f"`objective.{name}` does nothing unless `diffusion.prediction` is edm",
                    f"objective.{name}",
                )
    if own is None:
        return
    if diffusion.schedule != own or diffusion.betas is not None:
        yield UserError(
            f"`diffusion.prediction` is {prediction}, which is trained at any noise level and "
            f"sampled at those of `diffusion.schedule` {own}, without `diffusion.betas`",
            "diffusion.schedule",
        )
    if diffusion.zero_terminal_snr:
        yield UserError(
            f"`diffusion.prediction` is {prediction}, whose own schedule is not rescaled: leave "
            "out `diffusion.zero_terminal_snr`"
            + (", since the log of sigma, which it is given, cannot be infinite"
               if PARAMETERIZATIONS[prediction].needs_signal else ""),
            "diffusion.zero_terminal_snr",
        )  # fmt: skip
    if config.sampling.variance == "learned_range":
        yield UserError(
            f"`sampling.variance` is learned_range, but `diffusion.prediction` {prediction} "
            "predicts no variance",
            "sampling.variance",
        )
    fields_of_levels = " and ".join(f"`objective.{name}`" for name in _OWN_LEVELS[own])
    for name, value in asdict(objective).items():
        if name == "timestep_sampling" and value == "importance":
            used = False  # levels of a continuum have no histories
        else:
            used = name in (*_OWN_LEVELS[own], *_ANYWHERE[own], *_OWN_LEVELS["edm"])
        if not used and value != getattr(plain, name):
            yield UserError(
                f"`objective.{name}` is {value}, but `diffusion.prediction` {prediction} has its "
                f"own weighting and noise levels ({fields_of_levels}); leave it out",
                f"objective.{name}",
            )


def coefficient_tables(config: RunConfig) -> Iterator[UserError]:
    """The sampler has a table for the schedule, in the steps of sampling and of previews."""
    diffusion, sampling = config.diffusion, config.sampling
    reported = [*diffusion.problems(), *sampling.problems(), *config.log.problems()]
    reported += own_levels(config)
    if reported:
        return
    schedule = diffusion.build_schedule()
    for field, steps in [
        ("sampling.steps", sampling.steps),
        ("log.sample_steps", config.log.sample_steps),
    ]:
        options = sampling.table_options() | {"steps": steps}
        try:
            table = build_table(schedule, prediction=diffusion.prediction, **options)
            check_begins_in_noise(schedule, table.timesteps, listed=False)
        except UserError as error:
            names = {name: f"sampling.{name}" for name in options}
            diffusions = {name: f"diffusion.{name}" for name in ("prediction", "timesteps")}
            yield _qualified(error, names | diffusions | {"steps": field})


def sample_ids(config: RunConfig) -> Iterator[UserError]:
    """Noise tells every sample of the run from every other."""
    training = config.training
    if training.steps * training.batch_size > _IDS:
        yield UserError(
            f"`training.steps` is {training.steps}: of {training.batch_size} images "
            f"(`training.batch_size`) there can be at most {_IDS // max(training.batch_size, 1)}",
            "training.steps",
        )


def mixture(config: RunConfig) -> Iterator[UserError]:
    """The weights of a mixture make blocks of a reasonable length."""
    if config.data.mix_with and not list(config.data.problems()):
        try:
            Mixture(config.data.weights)
        except UserError as error:
            yield _qualified(error, {"weights": "data.weights"})


def distillation(config: RunConfig) -> Iterator[UserError]:
    """Students take the steps that they learn, of a teacher that can teach them."""
    plan, sampling = config.distillation, config.sampling
    if plan.teacher is None or list(plan.problems()):
        return
    if config.training.init is not None:
        yield UserError(
            f"`training.init` is {config.training.init}, but a student starts from the weights of "
            "`distillation.teacher`; leave it out",
            "training.init",
        )
    if plan.start_steps > config.diffusion.timesteps:
        yield UserError(
            f"`distillation.start_steps` is {plan.start_steps}; there are only "
            f"`diffusion.timesteps` {config.diffusion.timesteps} to visit",
            "distillation.start_steps",
        )
    if config.training.steps < plan.stages:
        yield UserError(
            f"`training.steps` is {config.training.steps}; from {plan.start_steps} steps to "
            f"{plan.steps} there are {plan.stages} stages, and each needs one at least",
            "training.steps",
        )
    conditions = ("num_class_embeds", "text_channels", "vector_channels")
    if plan.guidance_scale is not None and not any(
        getattr(config.model, name, None) is not None for name in conditions
    ):
        yield UserError(
            f"`distillation.guidance_scale` is {plan.guidance_scale}, but the teacher was "
            "trained without classes, text or vectors; leave it out",
            "distillation.guidance_scale",
        )
    made_for = replace(plan.sampling, clip_x0=sampling.clip_x0)
    if made_for.sampler == "ddim":
        made_for = replace(made_for, variance=sampling.variance)  # ddim has none
    if sampling != made_for:
        yield UserError(
            f"the sampling fields are {sampling.sampler}, {sampling.steps} steps, "
            f"{sampling.spacing}, {sampling.variance}, eta {sampling.eta}; this distillation makes "
            f"a network for {made_for.sampler}, {plan.steps} steps, trailing, "
            f"{made_for.variance}, eta 0"
        )
    learned = config.objective.learned_variance
    if config.objective != ObjectiveConfig(learned_variance=learned):
        yield UserError(
            "the objective fields say what ordinary training minimises; with "
            "`distillation.teacher`, leave them out"
        )


def moment_matching(config: RunConfig) -> Iterator[UserError]:
    """Moment matching needs ancestral steps with the posterior's variance, and their precision."""
    if config.distillation.teacher is None or config.distillation.method != "moments":
        return
    if config.diffusion.prediction == "edm":
        yield UserError(
            "`distillation.method` is moments and the teacher predicts edm; its samplers have "
            "no ancestral steps, so choose progressive or consistency",
            "distillation.method",
        )
    if config.training.precision == "fp16":
        yield UserError(
            "`distillation.method` is moments and `training.precision` fp16, in which the "
            "critic's gradients would vanish; use bf16 or no",
            "training.precision",
        )
    if config.objective.learned_variance:
        yield UserError(
            "`distillation.method` is moments, whose steps have the posterior's variance, and "
            "the teacher has learned its own; choose progressive or consistency",
            "distillation.method",
        )


def capture(config: RunConfig) -> Iterator[UserError]:
    """Steps that are to be captured leave the host nothing to do between them."""
    reason = not_capturable(config)
    if config.training.capture == "on" and reason is not None:
        yield UserError(
            f"`training.capture` is on, but {reason}; use auto or off", "training.capture"
        )


def not_capturable(config: RunConfig) -> str | None:
    """Return why no device can capture a run's steps as a graph; None: some can."""
    if config.objective.timestep_sampling == "importance":
        return "`objective.timestep_sampling` is importance, which the host learns from every step"
    if config.distillation.teacher is not None and config.distillation.method == "moments":
        return "`distillation.method` is moments, which trains a critic after every step"
    return None


RULES: tuple[Rule, ...] = (
    decay,
    output_channels,
    weighting,
    loss_space,
    own_levels,
    coefficient_tables,
    text,
    embeddings,
    latents,
    sample_ids,
    mixture,
    distillation,
    moment_matching,
    capture,
    autoencoder,
)


def _qualified(error: UserError, names: Mapping[str, str]) -> UserError:
    """An error whose fields, in backticks, have their sections before their names."""
    message = re.sub(r"`(\w+)`", lambda match: f"`{names.get(match[1], match[1])}`", str(error))
    return UserError(message, names.get(error.field or "", error.field))
