"""Reports: the metrics and everything needed to measure them again, as JSON and as a table."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.errors import UserError
from ddpm_engine.json_files import to_json
from ddpm_engine.runtime import Numerics

ARITHMETIC = {"convolutions": "float32", "matrix products": "float32", "distances": "float64"}
"""Of feature networks, of the likelihood and of what is computed of features; for reports."""
_LIBRARIES = ("torch", "numpy", "pillow", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the metrics depend on."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _LIBRARIES
    }


def write_report(
    out: Path,
    inputs: Mapping[str, Any],
    measured: Mapping[str, Any],
    locations: Mapping[str, str | None],
) -> Path:
    """Write `result-HASH.json`, and beside it a Markdown table of one row.

    The hash is that of the inputs, so that an evaluation of other inputs does not replace this one,
    and further metrics of the same inputs join it.

    Args:
        out: an existing folder.
        inputs: JSON values: everything that the metrics are a function of.
        measured: JSON values by metric.
        locations: where the inputs were found, which changes nothing; None: nowhere.

    Returns:
        The JSON's path.

    Raises:
        UserError: the disk is full, the folder cannot be written, or a metric is not finite.
    """
    if wrong := [name for name, value in measured.items() if not _finite(value)]:
        raise UserError(
            f"{wrong[0]} is not a finite number; look at the images and at the weights", "metrics"
        )
    inputs = json.loads(to_json(inputs))
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    path = out / f"result-{digest[:8]}.json"
    metrics = {**_earlier(path, inputs), **measured}
    found = {name: location for name, location in locations.items() if location is not None}
    report = {
        "metrics": metrics,
        **inputs,
        "found_at": found,
        "arithmetic": ARITHMETIC,
        "versions": versions(),
        "numerics": asdict(Numerics.in_force()),
    }
    try:
        for file, text in [
            (path, to_json(report, indent=2, ensure_ascii=False) + "\n"),
            (path.with_suffix(".md"), markdown(report)),
        ]:
            with atomic_write(file) as opened:
                # A location need not be UTF-8; such bytes become escapes, JSON's own.
                opened.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; make room and run it again") from error
    return path


def _finite(value: Any) -> bool:
    """Whether every number in a JSON value is finite."""
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def _earlier(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        before = json.loads(path.read_bytes())
        same = all(before[name] == value for name, value in inputs.items())
        return dict(before["metrics"]) if same and before["versions"] == versions() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def markdown(report: Mapping[str, Any]) -> str:
    """Return a table of one row: the metrics, and what they were measured on."""
    cells = [*_figures(report["metrics"]), *_circumstances(report)]
    heads, values = zip(*cells, strict=True)
    lines = [heads, ["---"] * len(heads), values]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    cells = []
    if "fid" in metrics:
        cells.append(("Fréchet distance", f"{metrics['fid']['distance']:.4g}"))
    if (kid := metrics.get("kid")) is not None:
        cells.append(("KID × 10³", f"{1e3 * kid['mean']:.3f} ± {1e3 * kid['error']:.3f}"))
    if (score := metrics.get("is")) is not None:
        cells.append(("IS", f"{score['mean']:.3f} ± {score['deviation']:.3f}"))
    if (shares := metrics.get("precision-recall")) is not None:
        cells.append(("precision", f"{shares['precision']:.3f}"))
        cells.append(("recall", f"{shares['recall']:.3f}"))
    if (accuracy := metrics.get("accuracy")) is not None:
        cells.append(("class accuracy", f"{accuracy['share']:.2%}"))
    if (bound := metrics.get("nll")) is not None:
        error = "" if bound["error"] is None else f" ± {bound['error']:.4f}"
        cells.append(("NLL, bits/dim", f"≤ {bound['bits_per_dim']:.4f}{error}"))
    if (ode := metrics.get("nll-ode")) is not None:
        error = "" if ode["error"] is None else f" ± {ode['error']:.4f}"
        cells.append(("NLL by ODE, bits/dim", f"{ode['bits_per_dim']:.4f}{error}"))
    return cells


def _circumstances(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    cells: list[tuple[str, str]] = []
    samples = report.get("pictures") or {}
    features, reference = report.get("features"), report.get("reference")
    bound = report.get("model")
    model = bound or samples
    if samples:
        cells.append(("samples", f"{samples['count']:,}"))
    if reference is not None:
        real = f"{reference['count']:,} of {reference['fingerprint'][:12]}"
        cells.append(("real images", real))
    if features is not None:
        cells.append(("features", f"{features['name']} {features['hash'][:8]}"))
    if samples.get("sampler") is not None:
        guidance = samples.get("guidance_scale")
        sampler = f"{samples['sampler']}, {samples['steps']} steps, seed {samples['seed']}"
        cells.append(("sampler", sampler + (f", guidance {guidance:g}" if guidance else "")))
    if "samples" in report["found_at"]:
        cells.append(("folder", report["found_at"]["samples"]))
    if bound is not None:
        if "ode_steps" in bound:
            cells.append(("steps of the ODE", f"{bound['ode_steps']}, T = {bound['timesteps']}"))
        else:
            cells.append(("variance", f"{bound['variance']}, T = {bound['timesteps']}"))
    if model.get("checkpoint") is not None:
        weights = model.get("weights") or "as published"
        if model.get("ema_decay") is not None and weights == "ema":
            weights = f"EMA {model['ema_decay']:g}"
        step = (
            "" if model.get("checkpoint_step") is None else f", step {model['checkpoint_step']:,}"
        )
        cells.append(("network", f"{model['checkpoint'][:12]}{step}, {weights}"))
    return cells
