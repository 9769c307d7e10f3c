"""A training step from the textbook's to the engine's fastest, one rung at a time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu.item import Context, NotHereError, Row
from benchmarks.gpu.items.ceilings import MATMUL
from benchmarks.gpu.measured_run import Measured, measured_run, measured_steps, random_shards
from benchmarks.gpu.networks import config_of, training_flop, unet, with_training
from benchmarks.reference.plain_network import plain_network

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.conditioning import Conditioning

WARM, STEPS = 10, 30
WORKERS = 8
"""Processes that read data, so that the loader is not what is measured."""


def config_for(
    context: Context, preset: str, batch: int, size: int, precision: str = "bf16", **training: Any
) -> RunConfig:
    """Return a preset over random images, without accumulation."""
    config = config_of(preset, context.dry)
    size = config.model.sample_size if context.dry else size
    shards = random_shards(context.shared, size, 64 if context.dry else 2048 if size < 64 else 256)
    return with_training(
        replace(
            config,
            out=context.scratch / "run",
            data=replace(config.data, path=shards, workers=1 if context.dry else WORKERS),
        ),
        batch_size=2 if context.dry else batch,
        accumulation=1,
        precision="no" if context.dry else precision,
        **training,
    )


def row_of(context: Context, way: str, config: RunConfig, found: Measured) -> Row:
    """Return what was measured as a row."""
    batch, summary = config.training.batch_size, found.summary
    flop = training_flop(config.model, batch)
    ceiling = [row["TFLOP/s"] for row in context.rows("ceilings") if row.get("what") == MATMUL]
    rate = flop / found.milliseconds / 1e9
    return {
        "way": way,
        "batch": batch,
        "images/s": batch / found.milliseconds * 1e3,
        "ms": found.milliseconds,
        "host, ms": found.host,
        "device busy, ms": summary.busy if summary else None,
        "device busy, %": 100 * summary.busy / found.milliseconds if summary else None,
        "kernels": summary.kernels if summary else None,
        "launches": summary.launches if summary else None,
        "waits": found.waits,
        "waits for data, %": found.data_wait,
        "peak GiB": found.peak_gib,
        "reserved GiB": found.reserved_gib,
        "TFLOP/s": rate,
        "MFU, % of matmul": 100 * rate / float(ceiling[0] or "nan") if ceiling else None,
    }


def engine(
    context: Context,
    preset: str = "cifar10",
    batch: int = 128,
    size: int = 32,
    compiled: bool = False,
    captured: bool = False,
    plain: bool = False,
    precision: str = "bf16",
    recompute: str = "none",
    classes: bool = False,
) -> None:
    """Measure the Trainer, and tell where the device's time goes.

    Args:
        context: of the item.
        preset: whose network and settings.
        batch: images.
        size: of the images in pixels.
        compiled: by torch.compile, block by block.
        captured: the whole step as one CUDA graph.
        plain: nothing of the network's fused: norms, sums and concatenations by torch.
        precision: of the network.
        recompute: what the backward pass computes again, "none", "norms" or "blocks".
        classes: add a table by class of kernel, and keep the trace.
    """
    training: dict[str, Any] = {"compile": compiled and not context.dry, "recompute": recompute}
    training["capture"] = "on" if captured and not context.dry else "off"
    config = config_for(context, preset, batch, size, precision, **training)
    warm, steps = (1, 2) if context.dry else (WARM, STEPS) if batch >= 64 else (4, 8)
    trace = context.out / "trace.json.gz" if classes else None
    with plain_network() if plain else nullcontext():
        found = measured_run(config, warm, steps, trace)
    ways = {"compiled": compiled, "captured": captured, "unfused": plain}
    ways[f"{recompute} recomputed"] = recompute != "none"
    way = ", ".join(name for name, on in ways.items() if on) or "eager"
    context.add(row_of(context, f"engine, {way}", config, found))
    for message in sorted(set(found.where))[:5]:
        print("waits:", message)
    if classes and found.summary is not None:
        _add_classes(context, found)


def _add_classes(context: Context, found: Measured) -> None:
    assert found.summary is not None
    for title, (took, count) in found.summary.by_class.items():
        context.add({"way": f"of which {title}", "ms": took, "kernels": count})
    idle = found.milliseconds - found.summary.busy
    context.add({"way": "of which gaps, where nothing runs", "ms": idle})


def textbook_step(context: Context) -> None:
    """Measure a loop as a good tutorial writes it, with the same network of torch's operations."""
    config = config_for(context, "cifar10", 128, 32)
    device, batch = context.device, config.training.batch_size
    model = unet(config.model, device).train().requires_grad_()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    alpha_bar = config.diffusion.build_schedule().alpha_bar.float().to(device)
    side = config.model.sample_size
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    conditions = Conditioning(dropout_key=torch.arange(batch, device=device))

    def step() -> None:
        t = torch.randint(0, len(alpha_bar), (batch,), device=device)
        noise = torch.randn_like(images)
        level = alpha_bar[t][:, None, None, None]
        noisy = level.sqrt() * images + (1 - level).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            output = model(noisy, t, conditions)
        F.mse_loss(output.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)

    warm, steps = (1, 2) if context.dry else (WARM, STEPS)
    with plain_network():
        found = measured_steps(step, device, warm, steps, context.scratch)
    context.add(row_of(context, "textbook", config, found))


def peers(context: Context) -> None:
    """Measure one pass forward and backward of diffusers' network beside the engine's.

    Raises:
        NotHereError: diffusers is not installed.
    """
    try:
        from benchmarks.throughput.subject import preset_subject

        subject = preset_subject("cifar10", context.device)
        if context.dry:
            subject = replace(subject, config=config_of("cifar10", dry=True))
            subject = replace(
                subject, weights=unet(subject.config.model, context.device).state_dict()
            )
        networks = {"diffusers": subject.twin, "engine": subject.copy()}
    except ImportError as error:
        raise NotHereError(f"{error.name} is not installed") from None
    batch = 2 if context.dry else 128
    side = subject.config.model.sample_size
    x = torch.randn(batch, 3, side, side, device=context.device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.zeros(batch, dtype=torch.int64, device=context.device)
    given = {"diffusers": (x, t), "engine": (x, t, Conditioning(dropout_key=t))}
    for name, network in networks.items():
        network.train().requires_grad_()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def step(network: Any = network, arguments: Any = given[name]) -> None:
            with torch.autocast(context.device.type, torch.bfloat16, enabled=not context.dry):
                output = network(*arguments)
            (output if isinstance(output, torch.Tensor) else output.sample).float().sum().backward()

        warm, steps = (1, 2) if context.dry else (5, 15)
        took = measured_steps(step, context.device, warm, steps, context.scratch).milliseconds
        context.add({
            "way": f"{name}, forward and backward, eager", "batch": batch, "ms": took,
            "images/s": batch / took * 1e3,
        })  # fmt: skip
