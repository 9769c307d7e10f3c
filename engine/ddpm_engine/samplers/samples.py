"""Samples of a model, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddpm_engine.samplers.identity import Ids, check_id
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler


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
    ids: int | Ids,
    *,
    batch_size: int = 64,
    progress: bool | None = None,
    **options: Any,
) -> Samples:
    """Sample from a model (Ho et al. 2020, algorithm 2, and the samplers that followed it).

    Args:
        model: the network and its process.
        ids: ids of the samples, `[N]`, or N for 0 … N − 1.
        batch_size: number of samples at a time.
        progress: whether to print a progress bar; None: on a terminal.
        options: fields of `SampleRequest` and of `SamplingConfig`, such as `seed`, `steps`,
            `sampler`, `classes` and `guidance`; the model's own hold otherwise.

    Raises:
        UserError: a request that the model cannot serve, or samples that are not finite.
    """
    if isinstance(ids, int):
        check_id(ids, "ids")
    chosen = range(ids) if isinstance(ids, int) else ids
    sampler = Sampler(model, model.request(**options))
    total = len(chosen) * sampler.evaluations
    disable = None if progress is None else not progress
    with tqdm(total=total, disable=disable, unit="evaluation", leave=False) as bar:
        tensor = sampler.sample(chosen, batch_size=batch_size, on_step=bar.update)
    return Samples(tensor, model)
