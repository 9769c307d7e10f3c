"""Convert diffusers' scheduler configurations to diffusion and sampling configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from ddpm_engine.diffusion.config import DiffusionConfig, Variance
from ddpm_engine.diffusion.parameterization import clips_x0
from ddpm_engine.errors import UserError
from ddpm_engine.json_files import as_float
from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.samplers.config import SamplingConfig, Spacing

CLASS = "DDPMScheduler"
DDIM_CLASS = "DDIMScheduler"
EDM_CLASS = "EDMEulerScheduler"
_PREDICTIONS: dict[str, Any] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# `fixed_small_log` takes the logarithm and back.
_VARIANCES = {"fixed_small_log": "fixed_small"}

_EDM_CHOICES = {
    "sigma_schedule": "karras",
    "rho": 7.0,
    "prediction_type": "epsilon",  # what it calls F; the other choice has −F
    "final_sigmas_type": "zero",
}

# Our own entry. Diffusers ignores names with a leading underscore, and preserves them.
_DISTILLED = "_distilled"

# Entries without effect on samples: those that only dynamic thresholding reads, which is refused,
# and the array library that an early version selected.
_IGNORED = ("dynamic_thresholding_ratio", "sample_max_value", "tensor_format")


@dataclass(frozen=True)
class Process:
    """The contents of a scheduler's configuration."""

    diffusion: DiffusionConfig
    """The schedule and what the network predicts."""
    sampling: SamplingConfig
    """Sampler, spacing, variance and clipping; our defaults where a scheduler leaves them open."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Distillation recorded by our own export; the default for any other network."""


def read_scheduler(file: Path) -> Process:
    """Read the configuration of a `DDPMScheduler`, `DDIMScheduler` or `EDMEulerScheduler`.

    The first two share the process. The second is sampled with deterministic ddim, in the number of
    steps that it was distilled to if our own export says so. Where the last timestep is not 0, as
    with trailing spacing and fewer than all steps, `DDPMScheduler` adds noise to the final sample;
    our sampler does not.

    Raises:
        UserError: the file is missing or damaged, or has an unsupported entry, which is named.
    """
    entries = Entries(file)
    kind = entries.take("_class_name", str, "nothing")
    if kind == EDM_CLASS:
        return _read_edm(entries)
    if kind not in (CLASS, DDIM_CLASS):
        known = f"this engine reads {CLASS}, {DDIM_CLASS} and {EDM_CLASS}"
        entries.refuse("_class_name", kind, known)
    entries.require("thresholding", (False,), False)
    entries.require("rescale_betas_zero_snr", (False,), False)
    entries.require("steps_offset", (0,), 0)
    entries.require("clip_sample_range", (1,), 1.0)
    clips = entries.take("clip_sample", bool, True)
    diffusion = _read_process(entries)
    # As the parameterization has it: left open, so that an export reads as the run it came from.
    clip_x0 = None if clips == clips_x0(diffusion.prediction, None) else clips
    spacing = entries.take("timestep_spacing", str, "leading")
    if spacing not in get_args(Spacing):
        entries.refuse("timestep_spacing", spacing, f"it must be one of {get_args(Spacing)}")
    sampling: dict[str, Any] = {"spacing": spacing, "clip_x0": clip_x0}
    distillation = DistillationConfig()
    if kind == CLASS:
        variance = entries.take("variance_type", str, "fixed_small")
        sampling["variance"] = _VARIANCES.get(variance, variance)
        if sampling["variance"] not in get_args(Variance):
            entries.refuse("variance_type", variance, f"the sampler has {get_args(Variance)}")
    else:
        entries.require("set_alpha_to_one", (True,), True)
        sampling["sampler"] = "ddim"
        distillation = _read_distilled(entries)
        if distillation.teacher is not None:
            sampling["steps"] = distillation.steps
            if spacing != "trailing":
                entries.refuse(
                    "timestep_spacing", spacing, "this network was distilled to trailing"
                )
    entries.finish(_IGNORED)
    try:
        diffusion.build_schedule()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return Process(diffusion, SamplingConfig(**sampling), distillation)


def scheduler_entries(
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig | None = None,
) -> dict[str, Any]:
    """The `scheduler_config.json` of the scheduler that is this process.

    That of EDM is an `EDMEulerScheduler`, that of a distilled network a `DDIMScheduler`, any other
    a `DDPMScheduler`. A schedule whose shape diffusers does not have is written beta by beta.
    """
    if diffusion.prediction == "edm":
        return {
            "_class_name": EDM_CLASS,
            "num_train_timesteps": diffusion.timesteps,
            "sigma_min": diffusion.sigma_min,
            "sigma_max": diffusion.sigma_max,
            "sigma_data": diffusion.sigma_data,
            **_EDM_CHOICES,
        }
    schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}.get(diffusion.schedule)
    as_betas = schedule is None or diffusion.betas is not None or diffusion.zero_terminal_snr
    process = {
        "num_train_timesteps": diffusion.timesteps,
        "beta_schedule": schedule or "linear",
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "trained_betas": diffusion.build_schedule().betas.tolist() if as_betas else None,
        "prediction_type": {ours: name for name, ours in _PREDICTIONS.items()}[
            diffusion.prediction
        ],
        "clip_sample": clips_x0(diffusion.prediction, sampling.clip_x0),
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": sampling.spacing,
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    if distillation is None or distillation.teacher is None:
        return {"_class_name": CLASS, **process, "variance_type": sampling.variance}
    distilled = {
        "teacher": distillation.teacher.resolve().name,
        "method": distillation.method,
        "steps": sampling.steps,
        "guidance_scale": distillation.guidance_scale,
    }
    return {"_class_name": DDIM_CLASS, **process, "set_alpha_to_one": True, _DISTILLED: distilled}


def _read_edm(entries: Entries) -> Process:
    for name, ours in _EDM_CHOICES.items():
        entries.require(name, (ours,), ours)
    diffusion = DiffusionConfig(
        schedule="edm",
        timesteps=entries.take("num_train_timesteps", int, 1000),
        sigma_min=entries.take("sigma_min", float, 0.002),
        sigma_max=entries.take("sigma_max", float, 80.0),
        sigma_data=entries.take("sigma_data", float, 0.5),
        prediction="edm",
    )
    entries.finish(())
    try:
        diffusion.build_schedule()
    except UserError as error:
        raise UserError(f"{entries.path}: {error}") from None
    return Process(diffusion, SamplingConfig(sampler="euler"))


def _read_distilled(entries: Entries) -> DistillationConfig:
    entry = entries.take_any(_DISTILLED, None)
    if isinstance(entry, dict):
        # Exports did not always say by which method.
        entry = {"method": "progressive", **entry}
    match entry:
        case None:
            return DistillationConfig()
        case {
            "teacher": str(teacher),
            "method": "progressive" | "consistency" as method,
            "steps": int(steps),
            "guidance_scale": None | int() | float() as scale,
        }:
            return DistillationConfig(Path(teacher), method, steps, guidance_scale=scale)
        case other:
            entries.refuse(
                _DISTILLED, other, "it must have teacher, method, steps and guidance_scale"
            )


def _read_prediction(entries: Entries) -> str:
    """What the network predicts, also as diffusers wrote it before version 0.6."""
    predicts_noise = entries.take_optional("predict_epsilon", bool, None)
    former = {None: "epsilon", True: "epsilon", False: "sample"}[predicts_noise]
    prediction = entries.take("prediction_type", str, former)
    if predicts_noise is not None and prediction != former:
        entries.refuse(
            "predict_epsilon", predicts_noise,
            f"but prediction_type is {prediction}; remove the one that is not so",
        )  # fmt: skip
    return prediction


def _read_process(entries: Entries) -> DiffusionConfig:
    timesteps = entries.take("num_train_timesteps", int, 1000)
    start = entries.take("beta_start", float, 1e-4)
    end = entries.take("beta_end", float, 0.02)
    shape = entries.take("beta_schedule", str, "linear")
    prediction = _read_prediction(entries)
    if prediction not in _PREDICTIONS:
        entries.refuse("prediction_type", prediction, f"it must be one of {tuple(_PREDICTIONS)}")
    betas = entries.take_optional("trained_betas", list, None)
    if timesteps < 1:
        entries.refuse("num_train_timesteps", timesteps, "it must be at least 1")
    if betas is not None:
        numbers = [number for beta in betas if (number := as_float(beta)) is not None]
        if len(numbers) < len(betas):
            entries.refuse("trained_betas", betas, "it must list numbers")
        betas = numbers
    elif shape == "scaled_linear":
        if min(start, end) < 0:
            entries.refuse("beta_start and beta_end", [start, end], "their roots are taken")
        roots = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64)
        betas = roots.square().tolist()
    elif shape == "sigmoid":
        # Of β itself (GeoDiff), unlike our own sigmoid, which is of ᾱ.
        rise = torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid()
        betas = (rise * (end - start) + start).tolist()
    elif shape not in ("linear", "squaredcos_cap_v2"):
        entries.refuse(
            "beta_schedule", shape,
            "this engine reads linear, scaled_linear, squaredcos_cap_v2 and sigmoid; "
            "write any other's betas into trained_betas",
        )  # fmt: skip
    return DiffusionConfig(
        schedule="cosine" if shape == "squaredcos_cap_v2" else "linear",
        timesteps=timesteps,
        beta_start=start,
        beta_end=end,
        betas=None if betas is None else tuple(betas),
        prediction=_PREDICTIONS[prediction],
    )
