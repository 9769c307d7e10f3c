"""Models on the Hugging Face hub, by name."""

from __future__ import annotations

import re
from pathlib import Path

from ddpm_engine.errors import UserError
from ddpm_engine.locations import check_local, user_path
from ddpm_engine.waiting import announced

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/.*)?")
_FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"]


def local_folder(path: Path | str) -> Path:
    """Return a folder as it is, or download a model that is named as on the hub.

    A name is `owner/model`, such as `google/ddpm-cifar10-32`, if there is no folder `owner`.

    Args:
        path: of a folder, or a name.

    Raises:
        UserError: no path at all, or the model cannot be downloaded; the message says why.
    """
    name, folder = str(path), user_path(path)
    hub = _HUB.fullmatch(name)
    if hub:
        raise UserError(
            f"{name} is a page of the Hugging Face hub; give the model's name, {hub[1]}"
        )
    check_local(folder)
    if folder.exists() or not _NAME.fullmatch(name) or folder.parent.exists():
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"there is no folder {name}, and to fetch a model of that name from the Hugging Face "
            "hub, the package huggingface_hub is needed: pip install huggingface_hub"
        ) from None
    try:
        with announced(f"waiting for the Hugging Face hub, for {name}"):
            return Path(snapshot_download(name, allow_patterns=_FILES, etag_timeout=10))
    # The hub's client raises what its HTTP library does, which differs between versions.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"there is no folder {name}, and no model of that name could be fetched from the "
            f"Hugging Face hub ({reason}); check the name and the connection, or fetch it "
            f"elsewhere: hf download {name} --local-dir DIR"
        ) from None
