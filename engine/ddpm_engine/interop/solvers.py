"""Schedulers of latent models in diffusers that are samplers here: which one, and how it is set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, get_args

from ddpm_engine.networks.files.entries import Entries
from ddpm_engine.samplers.config import SamplingConfig, Spacing

logger = logging.getLogger(__name__)

DPM_CLASS = "DPMSolverMultistepScheduler"
UNIPC_CLASS = "UniPCMultistepScheduler"
EULER_CLASS = "EulerDiscreteScheduler"
ANCESTRAL_CLASS = "EulerAncestralDiscreteScheduler"
PNDM_CLASS = "PNDMScheduler"

_SPACINGS = {PNDM_CLASS: "leading"}
"""Spacing where a configuration names none, if it is not linspace."""
_PLAIN_SIGMAS: dict[str, Any] = {
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "final_sigmas_type": "zero",
}  # fmt: skip
_NO_FLOW: dict[str, Any] = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
_REQUIRED: dict[str, dict[str, Any]] = {
    DPM_CLASS: {
        **_PLAIN_SIGMAS, **_NO_FLOW, "use_karras_sigmas": False, "use_lu_lambdas": False,
        "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False,
        "thresholding": False, "lambda_min_clipped": float("-inf"),
    },
    UNIPC_CLASS: {
        **_PLAIN_SIGMAS, **_NO_FLOW, "use_karras_sigmas": False, "solver_type": "bh2",
        "lower_order_final": True, "predict_x0": True, "disable_corrector": [], "solver_p": None,
        "thresholding": False,
    },
    EULER_CLASS: {
        **_PLAIN_SIGMAS, "interpolation_type": "linear", "timestep_type": "discrete",
        "sigma_min": None, "sigma_max": None,
    },
    ANCESTRAL_CLASS: {},
    PNDM_CLASS: {},
}  # fmt: skip
"""By class, entries with the only value that this engine has, which is the class's default."""
CLASSES = tuple(_REQUIRED)

# Entries without effect: those that only refused ones read, and those that other classes' files
# have left behind, as the published ones do.
_IGNORED = (
    "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type",
    "lambda_min_clipped", "variance_type", "skip_prk_steps", "set_alpha_to_one", "clip_sample",
    "clip_sample_range", "sigma_min", "sigma_max", "shift_terminal", "interpolation_type",
    "use_karras_sigmas", "tensor_format",
)  # fmt: skip

_DPM: dict[tuple[str, int], str] = {
    ("dpmsolver++", 1): "dpm++1",
    ("dpmsolver++", 2): "dpm++2m",
    ("dpmsolver++", 3): "dpm++3m",
    ("sde-dpmsolver++", 2): "dpm++2m_sde",
}
_UNIPC = {2: "unipc", 3: "unipc3"}


def read_solver(entries: Entries, kind: str) -> SamplingConfig:
    """Read what a scheduler says of sampling; its process is to be taken before.

    Euler's method is ddim, of which it is another form. PNDM's is not among this engine's: its
    place is taken by dpm++2m, which a warning says. Of `leading` and `linspace` spacing the
    multistep solvers of diffusers visit all but the last of one timestep more than asked for; ours
    visit as many as asked for.

    Args:
        entries: of the `scheduler_config.json`.
        kind: its class, one of `CLASSES`.

    Raises:
        UserError: naming an entry that is unknown, or that this engine cannot honour.
    """
    for name, value in _REQUIRED[kind].items():
        entries.require(name, (value,), value)
    spacing, offset = take_spacing(entries, _SPACINGS.get(kind, "linspace")), take_offset(entries)
    # Of no other spacing it is read.
    offset *= spacing == "leading"
    sampling: dict[str, Any] = {"spacing": spacing, "steps_offset": offset, "clip_x0": False}
    match kind:
        case "DPMSolverMultistepScheduler":
            chosen = (
                entries.take("algorithm_type", str, "dpmsolver++"),
                entries.take("solver_order", int, 2),
            )
            if chosen not in _DPM:
                known = ", ".join(f"{name} of order {order}" for name, order in _DPM)
                entries.refuse(
                    "algorithm_type and solver_order", chosen, f"this engine has {known}"
                )
            sampling["sampler"] = _DPM[chosen]
        case "UniPCMultistepScheduler":
            order = entries.take("solver_order", int, 2)
            if order not in _UNIPC:
                entries.refuse("solver_order", order, "this engine has 2 and 3")
            sampling["sampler"] = _UNIPC[order]
        case "EulerDiscreteScheduler" if entries.take_any("use_karras_sigmas", False):
            sampling = {"sampler": "euler", "clip_x0": False}
        case "EulerDiscreteScheduler":
            sampling["sampler"] = "ddim"
        case "EulerAncestralDiscreteScheduler":
            sampling |= {"sampler": "ddim", "eta": 1.0}
        case _:
            logger.warning(
                "%s: %s is not among the samplers; dpm++2m stands in", entries.path, kind
            )
            sampling["sampler"] = "dpm++2m"
    entries.finish(_IGNORED)
    return SamplingConfig(**sampling)


def take_spacing(entries: Entries, default: str) -> Any:
    """Take the spacing of timesteps.

    Raises:
        UserError: an unknown one.
    """
    spacing = entries.take("timestep_spacing", str, default)
    if spacing not in get_args(Spacing):
        entries.refuse("timestep_spacing", spacing, f"it must be one of {get_args(Spacing)}")
    return spacing


def take_offset(entries: Entries) -> int:
    """Take the offset of timesteps that are spaced from the first.

    Raises:
        UserError: a negative one.
    """
    offset = entries.take("steps_offset", int, 0)
    if offset < 0:
        entries.refuse("steps_offset", offset, "it cannot be negative")
    return offset


def solver_entries(sampling: SamplingConfig) -> Mapping[str, Any] | None:
    """The class and the entries of the scheduler that is a sampler; None: ancestral sampling.

    Args:
        sampling: of a latent model.
    """
    name = sampling.sampler
    if name.startswith("dpm++"):
        algorithm, order = next(key for key, ours in _DPM.items() if ours == name)
        return {"_class_name": DPM_CLASS, "algorithm_type": algorithm, "solver_order": order}
    if name.startswith("unipc"):
        order = next(order for order, ours in _UNIPC.items() if ours == name)
        return {"_class_name": UNIPC_CLASS, "solver_order": order}
    if name in ("euler", "heun"):
        return {"_class_name": EULER_CLASS, "use_karras_sigmas": True}
    return None
