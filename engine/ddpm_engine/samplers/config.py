"""Configuration of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ddpm_engine.bounds import Ge, Le, out_of_bounds
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.errors import UserError

SamplerName = Literal[
    "ddpm",
    "ddim",
    "dpm++1",
    "dpm++2m",
    "dpm++3m",
    "dpm++2m_sde",
    "unipc",
    "unipc3",
    "euler",
    "heun",
]

Spacing = Literal["leading", "trailing", "linspace"]
LastLevel = Literal["clean", "first"]

_ONLY_OF: dict[str, tuple[str, ...]] = {
    "variance": ("ddpm",), "eta": ("ddim",), "last_level": ("ddim",),
}  # fmt: skip
_NOT_OF: dict[str, tuple[str, ...]] = {
    "spacing": ("euler", "heun"), "steps_offset": ("euler", "heun"),
}  # fmt: skip
"""Fields that only some samplers have a use for, and that some have none for."""


def refuse_unused(given: Mapping[str, Any], sampler: str) -> None:
    """Refuse fields that do nothing with a sampler, unless they have their default value.

    Args:
        given: fields of `SamplingConfig`, as somebody has chosen them for this sampler.
        sampler: that they are for.

    Raises:
        UserError: the first of them.
    """
    for name, value in given.items():
        used = sampler in _ONLY_OF.get(name, (sampler,)) and sampler not in _NOT_OF.get(name, ())
        if not used and value != getattr(SamplingConfig, name):
            raise UserError(f"`{name}` does nothing with the sampler {sampler}; leave it out", name)


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are generated, during training and by default afterwards."""

    sampler: SamplerName = "ddpm"
    """Sampler: which coefficient table."""
    steps: Annotated[int, Ge(1)] | None = None
    """Steps of a sample, each one network evaluation, or two with heun; None: all T."""
    spacing: Spacing = "trailing"
    """Spacing of the timesteps when fewer than T are visited (not euler and heun)."""
    variance: Variance = "fixed_large"
    """Variance of ancestral sampling (ddpm); learned_range: by the network's other half."""
    eta: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of fresh noise in ddim, 0 to 1: 0 adds none, 1 is ddpm with fixed_small variance."""
    steps_offset: Annotated[int, Ge(0)] = 0
    """Last timestep that leading spacing visits, which moves all of them; 1 with Stable
    Diffusion."""
    last_level: LastLevel = "clean"
    """Level that ddim ends at: the clean image, or that of timestep 0 as Stable Diffusion does."""
    clip_x0: bool | None = None
    """Clipping of every estimate of x_0 to [-1, 1]; None: unless the prediction is EDM's."""

    def table_options(self) -> dict[str, Any]:
        """Return the fields that `build_table` takes, by name."""
        # Entries that most samples lack are left out where they do.
        rare = {"steps_offset": self.steps_offset, "last_level": self.last_level}
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "spacing": self.spacing,
            "variance": self.variance,
            "eta": self.eta,
            **{name: v for name, v in rare.items() if v != getattr(SamplingConfig, name)},
        }

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values themselves."""
        return out_of_bounds(self)
