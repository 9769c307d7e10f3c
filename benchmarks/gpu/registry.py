"""The items, most valuable first: is it right, does it train, how fast, and what it might be.

Estimates and limits are seconds on a machine with a current card and sixteen cores; none has been
measured on one yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.item import Item

COMPILERS = 10
"""Processes that compile kernels at the start."""

_CHECKS = "The kernels' tests"
_TRAINING = "Training and sampling, from end to end"
_LADDER = "A training step, CIFAR-10, bfloat16"
_LARGE = "256 pixels, bfloat16"
_SAMPLING = "Sampling, bfloat16"
_OPERATIONS = "Operations"
_AROUND = "Around the networks"


def _compiling() -> list[Item]:
    return [
        Item(
            f"compile {share + 1}", "Ceilings", "compiling.ahead", 30, 70,
            {"share": share, "of": COMPILERS}, together="start",
        )
        for share in range(COMPILERS)
    ]  # fmt: skip


def _check(name: str, function: str, estimate: float, **options: Any) -> Item:
    return Item(name, _CHECKS, f"checks.{function}", estimate, 75, options, together="checks")


def _train(name: str, function: str, estimate: float, **options: Any) -> Item:
    return Item(name, _TRAINING, f"trainer.{function}", estimate, 75, options, together="training")


def _rung(name: str, estimate: float, limit: float, **options: Any) -> Item:
    return Item(name, _LADDER, "ladder.engine", estimate, limit, options)


def _large(name: str, estimate: float, limit: float, options: Mapping[str, Any]) -> Item:
    chosen = {"preset": "celebahq256", "size": 256, **options}
    return Item(name, _LARGE, "ladder.engine", estimate, limit, chosen)


def _sampling(name: str, estimate: float, limit: float, batch: int, **options: Any) -> Item:
    return Item(
        name, _SAMPLING, "sampling.steps_of", estimate, limit,
        {"preset": "cifar10", "batch": batch, **options},
    )  # fmt: skip


_UNCOMPILED = ("eager", "graph", "graph, half weights")

ITEMS: tuple[Item, ...] = (
    Item("ceilings", "Ceilings", "ceilings.ceilings", 20, 40, together="start"),
    *_compiling(),
    Item("first losses on a CPU", _TRAINING, "trainer.first_losses", 15, 60, together="start"),
    _check("kernels: q_sample", "kernels", 30, file="test_q_sample.py"),
    _check("kernels: denoising_loss", "kernels", 40, file="test_denoising_loss.py"),
    _check("kernels: latents", "kernels", 40, file="test_latents.py"),
    _check("kernels: reverse_step", "kernels", 40, file="test_reverse_step.py"),
    _check("kernels: group_norm_silu", "kernels", 40, file="test_group_norm_silu.py"),
    _check("kernels: norm, options", "kernels", 40, file="test_group_norm_silu_options.py"),
    _check("kernels: norm, backward", "kernels", 40, file="test_group_norm_silu_backward.py"),
    _check("kernels: transformations", "kernels", 50, file="test_transformations.py"),
    _check("kernels: the others", "kernels", 40),
    _check("kernels: modulate", "kernels", 30, file="test_modulate.py"),
    _check("graphs", "graphs", 30),
    _check("captured training", "captured_training", 60, keyword="eagerly"),
    _check("captured training, bits", "captured_training", 60, keyword="not eagerly"),
    _check("poisoned memory", "poisoned", 50),
    _check("memcheck", "sanitized", 50, tool="memcheck"),
    _check("racecheck", "sanitized", 50, tool="racecheck"),
    _train("train float32", "follow", 40, precision="no"),
    _train("train bf16", "follow", 40, precision="bf16"),
    _train("train fp16", "follow", 40, precision="fp16"),
    _train("train captured", "follow", 40, precision="bf16", capture="on"),
    _train("train compiled", "follow", 60, precision="bf16", compile=True),
    _train("the same twice", "determinism", 25, deterministic=False),
    _train("the same twice, deterministic", "determinism", 25, deterministic=True),
    _train("presets", "presets", 25, names=("digits-edm", "digits-classes")),
    _train("sample and evaluate", "end_to_end", 40),
    Item("textbook", _LADDER, "ladder.textbook_step", 15, 30),
    _rung("eager", 20, 40, classes=True),
    _rung("captured", 20, 40, captured=True),
    _rung("compiled", 50, 80, compiled=True),
    _rung("compiled, captured", 50, 80, compiled=True, captured=True),
    Item("norms", _OPERATIONS, "norms.norms", 55, 90),
    _sampling("sampling 256", 15, 30, 256, ways=_UNCOMPILED),
    _large("256 px, batch 16", 25, 45, {"batch": 16}),
    _rung("unfused", 20, 40, plain=True),
    _rung("unfused, compiled", 50, 80, compiled=True, plain=True),
    Item("pixels", _OPERATIONS, "operations.pixels", 20, 40),
    Item("latents", _OPERATIONS, "operations.latents", 15, 30),
    Item("tokens", _OPERATIONS, "tokens.tokens", 20, 40),
    Item("optimizer", _OPERATIONS, "operations.optimizer", 10, 25),
    _sampling("sampling 64", 12, 25, 64, ways=_UNCOMPILED),
    _sampling("sampling 512", 15, 30, 512, ways=_UNCOMPILED),
    _sampling("sampling compiled", 40, 70, 256, ways=("compiled graph, half weights",)),
    _sampling("sampling guided", 15, 30, 64, ways=("graph, half weights",), guided=True),
    _large("256 px, batch 32", 25, 45, {"batch": 32}),
    _large("256 px, batch 64", 30, 50, {"batch": 64}),
    _large("256 px, batch 64, norms recomputed", 30, 50, {"batch": 64, "recompute": "norms"}),
    _large("256 px, batch 64, blocks recomputed", 40, 60, {"batch": 64, "recompute": "blocks"}),
    Item(
        "256 px, sampling", _LARGE, "sampling.steps_of", 20, 40,
        {"preset": "celebahq256", "batch": 16, "ways": _UNCOMPILED},
    ),
    Item("loader", _AROUND, "around.loader", 12, 25),
    Item("host", _AROUND, "around.host", 20, 40),
    Item("features", _AROUND, "around.features", 15, 30),
    _large("256 px, compiled", 80, 120, {"batch": 16, "compiled": True}),
    Item("diffusers", _LADDER, "ladder.peers", 15, 30),
)  # fmt: skip
