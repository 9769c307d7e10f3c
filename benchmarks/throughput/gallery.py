"""Pictures of trained networks, drawn when they are first asked for and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from benchmarks.throughput.subject import Subject, subject_of

from ddpm_engine.errors import UserError
from ddpm_engine.images.grid import to_uint8
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler


@dataclass(frozen=True)
class Method:
    """One way of drawing."""

    sampler: str
    steps: int
    cache_interval: int = 1
    """As in `sample`."""
    student: str | None = None
    """Which distilled network draws: a key of the gallery's students; None: its subject."""
    clip: bool = True
    """Whether estimates of x_0 are clipped."""
    guidance: float | None = None
    """Scale; the classes are then 0, 1, 2, … in turn. None: as the network draws without."""

    @property
    def name(self) -> str:
        """In tables and plots, apart from the steps."""
        if self.student is not None:
            return "distilled, " + self.student.partition(" ")[0]
        cached = "" if self.cache_interval == 1 else f", cached ×{self.cache_interval}"
        return self.sampler + cached

    @property
    def file_name(self) -> str:
        """Beginning of the names of its pictures' files."""
        cached = "" if self.cache_interval == 1 else f"-cached{self.cache_interval}"
        unclipped = "" if self.clip else "-unclipped"
        guided = "" if self.guidance is None else f"-guided{self.guidance:g}"
        return f"{self.sampler}-{self.steps}{cached}{unclipped}{guided}"


def students_of(checkpoints: Sequence[Path], device: torch.device) -> dict[str, Subject]:
    """Distilled networks, as a gallery's students.

    Raises:
        UserError: one of the checkpoints cannot be read, or was not distilled.
    """
    found = {}
    for checkpoint in checkpoints:
        student = subject_of(checkpoint, device)
        plan = student.config.distillation
        if plan.teacher is None:
            raise UserError(f"--distilled {checkpoint} was not distilled; see launch/distill.py")
        found[f"{plan.method} {student.config.sampling.steps}"] = student
    return found


def student_method(name: str, student: Subject) -> Method:
    """How a distilled network draws."""
    sampling = student.config.sampling
    return Method(sampling.sampler, sampling.steps or student.schedule.timesteps, student=name)


@dataclass(frozen=True)
class Gallery:
    """Pictures by method, seed and number.

    Those of a network that knows classes show 0, 1, 2, … in turn.
    """

    subject: Subject
    """Its fastest network draws."""
    folder: Path
    """Where a folder is made for each network, by its weights."""
    batch: int = 250
    """Pictures at a time; also what is lost when drawing is stopped."""
    students: Mapping[str, Subject] = field(default_factory=dict)
    """Distilled networks, by method and steps: `progressive 4`."""

    def network(self, method: Method) -> Subject:
        """Who draws."""
        return self.subject if method.student is None else self.students[method.student]

    def draw(self, method: Method, seed: int, first: int, count: int) -> torch.Tensor:
        """Samples first … first + count − 1 of a seed, float32 `[count, C, H, W]`."""
        drawing = self.network(method)
        config = drawing.config
        model = DiffusionModel(
            drawing.fastest,
            drawing.schedule,
            config.diffusion.prediction,
            SamplingConfig(variance=config.sampling.variance, clip_x0=method.clip),
            sample_shape=drawing.unet.sample_shape,
        )
        request = model.request(
            seed=seed, sampler=method.sampler, steps=method.steps, guidance=method.guidance,
            cache_interval=method.cache_interval,
        )  # fmt: skip
        ids = range(first, first + count)
        return Sampler(model, request).sample(ids, batch_size=count)

    def pictures(self, method: Method, seed: int, count: int) -> np.ndarray:
        """The first pictures of a seed, uint8 `[count, H, W, C]`."""
        parts, folder = [], self._folder(method)
        for first in range(0, count, self.batch):
            part = min(self.batch, count - first)
            path = folder / f"{method.file_name}-{seed}-{first}-{part}.npy"
            if not path.exists():
                # Two commands may draw the same at the same time.
                unfinished = path.with_suffix(f".{os.getpid()}.part")
                with unfinished.open("wb") as file:
                    np.save(file, to_uint8(self.draw(method, seed, first, part)))
                unfinished.rename(path)
            parts.append(np.load(path))
        return np.concatenate(parts)

    def _folder(self, method: Method) -> Path:
        digest = hashlib.sha256()
        for name, weights in self.network(method).weights.items():
            digest.update(name.encode() + weights.cpu().numpy().tobytes())
        folder = self.folder / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder
