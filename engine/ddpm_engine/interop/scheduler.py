"""Convert diffusers' scheduler configurations to diffusion and sampling configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from ddpm_engine.diffusion.config import DiffusionConfig, Variance
from ddpm_engine.diffusion.parameterization import clips_x0
from ddpm_engine.errors import UserError
from ddpm_engine.interop import solvers
from ddpm_engine.json_files import as_float
from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.samplers.config import SamplingConfig

CLASS = "DDPMScheduler"
DDIM_CLASS = "DDIMScheduler"
EDM_CLASS = "EDMEulerScheduler"
FLOW_CLASSES = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
}
"""By our sampler."""
_PREDICTIONS: dict[str, Any] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# `fixed_small_log` takes the logarithm and back.
_VARIANCES = {"fixed_small_log": "fixed_small"}

_EDM_CHOICES = {
    "sigma_schedule": "karras",
    "rho": 7.0,
    "prediction_type": "epsilon",  # what it calls F; the other choice has −F
    "final_sigmas_type": "zero",
}

_FLOW_CHOICES: dict[str, Any] = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
# Those that only dynamic shifting reads.
_FLOW_IGNORED = (
    "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type",
)  # fmt: skip

# Our own entry. Diffusers ignores names with a leading underscore, and preserves them.
_DISTILLED = "_distilled"

# Entries without effect on samples: those that only dynamic thresholding reads, which is refused,
# and the array library that an early version selected.
# Published files of Stable Diffusion have what another scheduler's left behind.
_IGNORED = (
    "dynamic_thresholding_ratio", "sample_max_value", "tensor_format", "skip_prk_steps",
)  # fmt: skip


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
    """Read a scheduler: of DDPM, DDIM, EDM, flow matching, or a solver that latent models use.

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
    for sampler, name in FLOW_CLASSES.items():
        if kind == name:
            return _read_flow(entries, sampler)
    if kind in solvers.CLASSES:
        process = _read_process(entries)
        return Process(_checked(process, entries), solvers.read_solver(entries, kind))
    if kind not in (CLASS, DDIM_CLASS):
        known = ", ".join((CLASS, DDIM_CLASS, *solvers.CLASSES, EDM_CLASS, *FLOW_CLASSES.values()))
        entries.refuse("_class_name", kind, f"this engine reads {known}")
    entries.require("thresholding", (False,), False)
    entries.require("clip_sample_range", (1,), 1.0)
    clips = entries.take("clip_sample", bool, True)
    diffusion = _read_process(entries)
    # As the parameterization has it: left open, so that an export reads as the run it came from.
    clip_x0 = None if clips == clips_x0(diffusion.prediction, None) else clips
    spacing = solvers.take_spacing(entries, "leading")
    offset = solvers.take_offset(entries)
    # Of no other spacing it is read.
    sampling: dict[str, Any] = {
        "spacing": spacing, "clip_x0": clip_x0, "steps_offset": offset * (spacing == "leading"),
    }  # fmt: skip
    distillation = DistillationConfig()
    if kind == CLASS:
        variance = entries.take("variance_type", str, "fixed_small")
        sampling["variance"] = _VARIANCES.get(variance, variance)
        if sampling["variance"] not in get_args(Variance):
            entries.refuse("variance_type", variance, f"the sampler has {get_args(Variance)}")
    else:
        sampling["sampler"] = "ddim"
        if not entries.take("set_alpha_to_one", bool, True):
            sampling["last_level"] = "first"
        distillation = _read_distilled(entries)
        if distillation.teacher is not None:
            sampling["steps"] = distillation.steps
            if spacing != "trailing":
                entries.refuse(
                    "timestep_spacing", spacing, "this network was distilled to trailing"
                )
    entries.finish(_IGNORED)
    return Process(_checked(diffusion, entries), SamplingConfig(**sampling), distillation)


def scheduler_entries(
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    distillation: DistillationConfig | None = None,
    latent: bool = False,
) -> dict[str, Any]:
    """The `scheduler_config.json` of the scheduler that is this process.

    That of EDM is an `EDMEulerScheduler`, that of flow matching a `FlowMatchEulerDiscreteScheduler`
    or its Heun sibling, that of a distilled network a `DDIMScheduler`, any other a `DDPMScheduler`.
    Pipelines of latent models take the sampler's own, and of a learned variance know nothing: such
    a network's is that of DDIM.
    A schedule whose shape diffusers does not have is written beta by beta.
    """
    if diffusion.prediction in _OWN_ENTRIES:
        return _OWN_ENTRIES[diffusion.prediction](diffusion, sampling)
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
        "steps_offset": sampling.steps_offset,
        "rescale_betas_zero_snr": False,
    }
    if latent and (solver := solvers.solver_entries(sampling)) is not None:
        del process["clip_sample"], process["clip_sample_range"]
        if solver["_class_name"] == solvers.EULER_CLASS:
            del process["thresholding"]
        return {**process, **solver}
    learned = sampling.variance.startswith("learned")
    if latent and (sampling.sampler == "ddim" or learned):
        clean = sampling.last_level == "clean"
        return {"_class_name": DDIM_CLASS, **process, "set_alpha_to_one": clean}
    if distillation is None or distillation.teacher is None:
        return {"_class_name": CLASS, **process, "variance_type": sampling.variance}
    distilled = {
        "teacher": distillation.teacher.resolve().name,
        "method": distillation.method,
        "steps": sampling.steps,
        "guidance_scale": distillation.guidance_scale,
    }
    return {"_class_name": DDIM_CLASS, **process, "set_alpha_to_one": True, _DISTILLED: distilled}


def _edm_entries(diffusion: DiffusionConfig, sampling: SamplingConfig) -> dict[str, Any]:
    return {
        "_class_name": EDM_CLASS,
        "num_train_timesteps": diffusion.timesteps,
        "sigma_min": diffusion.sigma_min,
        "sigma_max": diffusion.sigma_max,
        "sigma_data": diffusion.sigma_data,
        **_EDM_CHOICES,
    }


def _flow_entries(diffusion: DiffusionConfig, sampling: SamplingConfig) -> dict[str, Any]:
    sampler = "heun" if sampling.sampler == "heun" else "euler"
    return {
        "_class_name": FLOW_CLASSES[sampler],
        "num_train_timesteps": diffusion.timesteps,
        "shift": diffusion.shift,
        **(_FLOW_CHOICES if sampler == "euler" else {}),
    }


_OWN_ENTRIES = {"edm": _edm_entries, "flow": _flow_entries}
"""By prediction, for those with a schedule of their own, which no pipeline of diffusers samples."""


def _read_flow(entries: Entries, sampler: Any) -> Process:
    for name, ours in _FLOW_CHOICES.items():
        entries.require(name, (ours,), ours)
    diffusion = DiffusionConfig(
        schedule="flow",
        timesteps=entries.take("num_train_timesteps", int, 1000),
        shift=entries.take("shift", float, 1.0),
        prediction="flow",
    )
    entries.finish(_FLOW_IGNORED)
    return Process(_checked(diffusion, entries), SamplingConfig(sampler=sampler))


def _checked(diffusion: DiffusionConfig, entries: Entries) -> DiffusionConfig:
    try:
        diffusion.build_schedule()
    except UserError as error:
        raise UserError(f"{entries.path}: {error}") from None
    return diffusion


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
    return Process(_checked(diffusion, entries), SamplingConfig(sampler="euler"))


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
    rescaled = entries.take("rescale_betas_zero_snr", bool, False)
    start = entries.take("beta_start", float, 1e-4)
    end = entries.take("beta_end", float, 0.02)
    shape = entries.take("beta_schedule", str, "linear")
    prediction = _read_prediction(entries)
    if prediction not in _PREDICTIONS:
        entries.refuse("prediction_type", prediction, f"it must be one of {tuple(_PREDICTIONS)}")
    if rescaled and prediction == "epsilon":
        entries.refuse(
            "rescale_betas_zero_snr", rescaled, "with prediction_type epsilon the last timestep "
            "says nothing of the image",
        )  # fmt: skip
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
        zero_terminal_snr=rescaled,
    )
