"""From a request to samples in a folder, by as many processes as share the work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.errors import UserError
from ddpm_engine.generation.batch_size import BatchSize, batch_size_of
from ddpm_engine.generation.input_images import (
    InputImages,
    SamplesAsInput,
    open_low_resolution,
    read_mask,
)
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_formats import MOST_IN_A_FILE, Format
from ddpm_engine.generation.sample_reader import CLASS_NAMES
from ddpm_engine.generation.work_sharing import WorkShare, count_of, fill_missing
from ddpm_engine.memory import check_fits
from ddpm_engine.samplers.identity import distinct, whole
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.sizes import height_and_width, size_of

_BYTES_OF_AN_ID = 64  # in the set of those that are there


def request_from_files(
    model: LoadedModel,
    *,
    images: Path | None = None,
    mask: Path | None = None,
    low_resolution: Path | None = None,
    **options: Any,
) -> SampleRequest:
    """Build a request whose images are in files.

    Args:
        model: that the request is for.
        images: an image, or a folder of images, as `InputImages` takes them.
        mask: an image that is white where to paint, and dark where images are kept.
        low_resolution: a folder of samples, or images as `InputImages` takes them.
        options: as `DiffusionModel.request` takes them.

    Raises:
        UserError: files that cannot be read, or values out of range.
    """
    channels, *size = model.image_shape if images is not None else model.shape
    if mask is not None and images is None:
        raise UserError("`mask` needs `images`; give that too, or leave `mask` out", "mask")
    if images is not None:
        options["images"] = InputImages(images, model.image_shape)
    if mask is not None:
        options["mask"] = read_mask(mask, size_of(*size))
    if low_resolution is not None:
        small = height_and_width(model.spec.low_resolution or size_of(*size))
        images_in = open_low_resolution(low_resolution, (channels, *small))
        if isinstance(images_in, SamplesAsInput) and "classes" not in options:
            images_in.renumber_classes(model.classes, model.spec.null_class)
        options["low_resolution"] = images_in
    return model.request(**options)


def settings_of(model: LoadedModel, sampler: Sampler) -> dict[str, Any]:
    """Return everything that determines samples besides their ids, for a manifest: JSON values."""
    names = {} if model.classes is None else {CLASS_NAMES: model.classes}
    return {
        **sampler.settings(),
        "checkpoint": model.hash,
        "checkpoint_step": model.step,
        "weights": model.weights,
        **names,
    }


def generate(
    model: LoadedModel,
    request: SampleRequest | Sampler,
    ids: Sequence[int],
    out: Path,
    *,
    format: Format = "png",
    batch_size: BatchSize = "auto",
    per_shard: int = 1024,
    compile: bool = False,
    share: WorkShare = WorkShare(),  # noqa: B008
    report: Callable[[str], object] | None = None,
) -> bool:
    """Generate the samples that a folder lacks.

    Several processes may do so at the same time; see `fill_missing`.

    Args:
        model: generates them.
        request: what to sample, or a sampler that is bound to it, such as a cascade's.
        ids: of the samples.
        out: the folder, created if missing. If it holds samples of the same settings, they stay.
        format: of the files; see `SampleDir`.
        batch_size: samples at a time; see `BatchSize`.
        per_shard: samples of a shard.
        compile: whether to compile the network block by block.
        share: this process among those that share the work.
        report: called with lines for the user, who then also gets a progress bar; None: silence.

    Returns:
        Whether all samples are there; False: other processes are still working.

    Raises:
        UserError: a request that the model cannot serve, numbers out of range, samples that are not
            finite, or a folder that holds something else or cannot be written.
    """
    if model.config.data.diffuse != "images":
        raise UserError(
            "`checkpoint` is a prior, which generates image embeddings; give it as `prior`, with "
            "the decoder that makes images of them",
            "checkpoint",
        )
    sampler = request if isinstance(request, Sampler) else Sampler(model, request)
    request = sampler.request
    ids = distinct(ids)
    check_amounts(sampler, ids, batch_size, ("per_shard", 1 if format == "png" else per_shard))
    for given in (request.images, request.low_resolution):
        if isinstance(given, InputImages | SamplesAsInput):
            given.check(ids)  # before the folder is claimed for them
    store = SampleDir(out, settings_of(model, sampler), format, sampler.label_of)
    say = report or (lambda _: None)
    say_first = say if share.rank == 0 else (lambda _: None)
    if count_of(ids, store.ids()) == len(ids) and store.grid.exists():
        say_first(f"all {len(ids)} samples are already in {out}")
        return True
    size = batch_size_of(sampler, batch_size, ids)
    if compile:
        _compile(sampler, ids[:size], say_first)
    active = report is not None and share.rank == 0
    with Progress(
        len(ids), lambda: count_of(ids, store.ids()), sampler.evaluations, active
    ) as progress:
        finished = fill_missing(
            store,
            ids,
            lambda batch: sampler.start_images(batch, on_step=progress.step),
            batch_size=size,
            chunk_size=per_shard,
            share=share,
            progress=progress,
        )
    if finished:
        say(f"{len(ids)} samples in {out}, the first of them in {store.grid}")
    elif share.world_size == 1:
        say(f"another process is still generating samples in {out}")
    return finished


def check_amounts(
    sampler: Sampler, ids: Sequence[int], batch_size: BatchSize, chunk: tuple[str, int]
) -> None:
    """Refuse what would fail at the first batch, before a folder is claimed for it.

    Args:
        sampler: generates the samples.
        ids: of the samples, not empty.
        batch_size: samples at a time.
        chunk: samples that are kept in memory until they are written, behind the name of the field.

    Raises:
        UserError: numbers out of range, or beyond the memory there is; images to begin with, or
            low-resolution images, that cannot be read or have another shape.
    """
    check_fits(_BYTES_OF_AN_ID * len(ids), "count", "ask for fewer samples")
    field, size = chunk
    if whole(size, field) < 1:
        raise UserError(f"`{field}` is {size}; it must be at least 1", field)
    batch = 1 if batch_size == "auto" else batch_size
    sampler.check_fits(min(batch, len(ids)), batch)
    if size > MOST_IN_A_FILE:
        raise UserError(f"`{field}` is {size}; it can be {MOST_IN_A_FILE} at most", field)
    kept = math.prod(sampler.model.image_shape) * min(size, len(ids))
    check_fits(kept, field, "choose a smaller one")
    sampler.check_inputs(ids[0])


def _compile(sampler: Sampler, ids: Sequence[int], say: Callable[[str], object]) -> None:
    """Compile now and say so: nothing else would happen visibly for a while."""
    began = time.monotonic()
    say(f"compiling the network for batches of {len(ids)}, block by block ...")
    sampler.compile()
    sampler.warm_up(ids)
    say(f"compiled in {time.monotonic() - began:.1f} s")
