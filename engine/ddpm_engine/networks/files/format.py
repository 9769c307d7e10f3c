"""How diffusers stores the networks of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_engine.networks.files.layout import NETWORK_CONFIG
from ddpm_engine.networks.files.together import Writer, json_writer
from ddpm_engine.networks.files.weights import SAFETENSORS, read_weights, weights_writer


@dataclass(frozen=True)
class Stored:
    """A network as it is stored."""

    config: Any
    """The engine's own configuration of it."""
    tensors: Mapping[str, Tensor]
    """By the engine's parameter names, on the CPU, in any precision."""
    hash: str
    """SHA-256 of the weight file."""
    null_class: int | None
    """Label of the null class, if the file says so; ours do."""


@dataclass(frozen=True)
class Format:
    """A class of diffusers, and the translation of its files."""

    class_names: tuple[str, ...]
    """Names that are read: that which files are written with, former ones, and that of networks
    that `config_entries` says are of another class."""
    part: str
    """Its folder in a pipeline."""
    pipelines: Mapping[str, str]
    """Pipeline that samples from a network of the first class, by the class of its scheduler."""
    read_config: Callable[[Path], Any]
    """Reads a `config.json`; raises a `UserError` that names what cannot be honoured."""
    config_entries: Callable[[Any], dict[str, Any]]
    """Returns the entries of the `config.json` of a network; raises a `UserError` where diffusers
    has no such network."""
    from_stored: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]
    """Returns a network's tensors by the engine's names, given its configuration and the file's."""
    to_stored: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]
    """Inverts `from_stored`."""
    description: Callable[[Any], dict[str, str]]
    """Describes a network for the model card of an export."""
    null_class: Callable[[Any], int | None] = lambda config: None
    """Returns the label of the null class, where the class of diffusers itself has one."""

    def class_name(self, config: Any) -> str:
        """Name of the class that a network's files are written with.

        Raises:
            UserError: diffusers has no such network.
        """
        return str(self.config_entries(config)["_class_name"])

    def pipelines_of(self, config: Any) -> Mapping[str, str]:
        """Pipelines that sample from a network, by the class of its scheduler.

        Raises:
            UserError: diffusers has no such network.
        """
        return self.pipelines if self.class_name(config) == self.class_names[0] else {}

    def read(self, folder: Path, averaged: bool = True) -> Stored:
        """Read the network whose `config.json` and weights are in a folder.

        Args:
            folder: of the network.
            averaged: see `read_weights`.

        Raises:
            UserError: a part is missing or damaged, or the engine has no such network.
        """
        config = self.read_config(folder / NETWORK_CONFIG)
        weights = read_weights(folder, averaged)
        recorded = weights.metadata.get("null_class", "")
        return Stored(
            config,
            self.from_stored(config, weights.tensors),
            weights.hash,
            int(recorded) if recorded.isdecimal() else self.null_class(config),
        )

    def writers(
        self, config: Any, tensors: Mapping[str, Tensor], null_class: int | None
    ) -> dict[str, Writer]:
        """Writers of the network's files, by name.

        Args:
            config: of the network.
            tensors: its state dict.
            null_class: label of the null class, which diffusers' files do not record.

        Raises:
            UserError: diffusers has no such network.
        """
        metadata = {"format": "pt"}  # without it diffusers does not read the file
        if null_class is not None:
            metadata["null_class"] = str(null_class)
        return {
            SAFETENSORS: weights_writer(self.to_stored(config, tensors), metadata),
            NETWORK_CONFIG: json_writer(self.config_entries(config)),
        }
