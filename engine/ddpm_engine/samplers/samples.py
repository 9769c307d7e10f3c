"""Samples of a model, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddpm_engine.errors import UserError
from ddpm_engine.samplers.identity import Ids, check_id
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler

Chosen = int | Ids | str | Sequence[str]
"""Which samples: so many, those of these ids, or one of each prompt."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples and the images they decode to."""

    tensor: Tensor
    """float32 `[N, C, H, W]` around [-1, 1]."""
    model: DiffusionModel

    @property
    def images(self) -> list[Image.Image]:
        """The samples as images of 8 bits per channel."""
        decoded = self.model.codec.decode(self.tensor)
        return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in decoded]

    def __len__(self) -> int:
        return len(self.tensor)


def sample(
    model: DiffusionModel,
    ids: Chosen,
    *,
    batch_size: int = 64,
    progress: bool | None = None,
    **options: Any,
) -> Samples:
    """Sample from a model (Ho et al. 2020, algorithm 2, and the samplers that followed it).

    Args:
        model: the network and its process.
        ids: ids of the samples, `[N]`, or N for 0 … N − 1; or N prompts, one for each of these.
        batch_size: number of samples at a time.
        progress: whether to print a progress bar; None: on a terminal.
        options: fields of `SampleRequest` and of `SamplingConfig`, such as `seed`, `steps`,
            `sampler`, `classes` and `guidance`; the model's own hold otherwise.

    Raises:
        UserError: a request that the model cannot serve, or samples that are not finite.
    """
    chosen, options = chosen_of(ids, options)
    return samples_of(Sampler(model, model.request(**options)), chosen, batch_size, progress)


def samples_of(
    sampler: Sampler, ids: Ids, batch_size: int = 64, progress: bool | None = None
) -> Samples:
    """Sample with a progress bar; arguments as in `sample`, `ids` `[N]`.

    Raises:
        UserError: as `sample`.
    """
    total = len(ids) * sampler.evaluations
    disable = None if progress is None else not progress
    with tqdm(total=total, disable=disable, unit="evaluation", leave=False) as bar:
        tensor = sampler.sample(ids, batch_size=batch_size, on_step=bar.update)
    return Samples(tensor, sampler.model)


def chosen_of(ids: Chosen, options: Mapping[str, Any]) -> tuple[Ids, dict[str, Any]]:
    """Return the ids of samples, and the options with the prompts among them.

    Args:
        ids: as `sample` takes them.
        options: fields of a request.

    Raises:
        UserError: prompts twice, or not a number of samples.
    """
    if isinstance(ids, int):
        check_id(ids, "ids")
        return range(ids), dict(options)
    prompts = (ids,) if isinstance(ids, str) else ids
    # Ids may be a range too long to look through.
    written_out = isinstance(prompts, list | tuple)
    if not written_out or not any(isinstance(prompt, str) for prompt in prompts):
        return cast(Ids, ids), dict(options)
    if options.get("prompts") is not None:
        raise UserError("`ids` has prompts, and `prompts` is given, too; leave one out", "prompts")
    return range(len(prompts)), {**options, "prompts": tuple(cast(Sequence[str], prompts))}
