"""What was measured and everything needed to measure it again, for programs and for people."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.errors import UserError

_LIBRARIES = ("torch", "numpy", "pillow", "scikit-learn")


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _LIBRARIES
    }


def write_report(
    out: Path,
    asked: Mapping[str, Any],
    measured: Mapping[str, Any],
    locations: Mapping[str, str | None],
) -> Path:
    """Write `result-HASH.json`, and beside it a Markdown table of one line.

    The hash is of what was asked, so that another question does not replace the answer to this
    one, and further measures of the same join it.

    Args:
        out: an existing folder.
        asked: JSON values: of what the figures are a function.
        measured: JSON values by metric.
        locations: where things were found, which changes nothing; None: nowhere.

    Returns:
        The JSON's path.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    asked = json.loads(json.dumps(asked))
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    path = out / f"result-{digest[:8]}.json"
    metrics = {**_earlier(path, asked), **measured}
    found = {name: location for name, location in locations.items() if location is not None}
    report = {"metrics": metrics, **asked, "found_at": found, "versions": versions()}
    try:
        for file, text in [
            (path, json.dumps(report, indent=2, ensure_ascii=False) + "\n"),
            (path.with_suffix(".md"), markdown(report)),
        ]:
            with atomic_write(file) as opened:
                opened.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; make room and run it again") from error
    return path


def _earlier(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    try:
        before = json.loads(path.read_bytes())
        same = all(before[name] == value for name, value in asked.items())
        return dict(before["metrics"]) if same and before["versions"] == versions() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def markdown(report: Mapping[str, Any]) -> str:
    """A table of one line: the figures, and what they were measured on."""
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
    return cells


def _circumstances(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    cells: list[tuple[str, str]] = []
    pictures = report.get("pictures") or {}
    features, reference = report.get("features"), report.get("reference")
    bound = report.get("model")
    model = bound or pictures
    if pictures:
        cells.append(("pictures", f"{pictures['count']:,}"))
    if reference is not None:
        real = f"{reference['count']:,} of {reference['fingerprint'][:12]}"
        cells.append(("real images", real))
    if features is not None:
        cells.append(("features", f"{features['name']} {features['hash'][:8]}"))
    if pictures.get("sampler") is not None:
        guidance = pictures.get("guidance_scale")
        sampler = f"{pictures['sampler']}, {pictures['steps']} steps, seed {pictures['seed']}"
        cells.append(("sampler", sampler + (f", guidance {guidance:g}" if guidance else "")))
    if "samples" in report["found_at"]:
        cells.append(("folder", report["found_at"]["samples"]))
    if bound is not None:
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
