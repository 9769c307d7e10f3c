"""Networks that diffusers has, too: they are read from its folders and written to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from ddpm_engine.networks.base import Network
from ddpm_engine.networks.files.format import Format, Stored
from ddpm_engine.networks.files.hub import local_folder
from ddpm_engine.networks.files.layout import NETWORK_CONFIG, find_layout
from ddpm_engine.networks.files.together import write_together
from ddpm_engine.networks.files.weights import check_no_other_weights, check_tensors

N = TypeVar("N", bound="StoredNetwork")


class StoredNetwork(Network):
    """A network with a counterpart in diffusers.

    A subclass is constructed from its configuration alone and keeps no buffers.
    """

    format: ClassVar[Format]
    """How diffusers stores it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls: type[N], path: Path | str) -> N:
        """Load a network as diffusers saves it: its folder, or that of its pipeline.

        Args:
            path: of the folder, or a name on the Hugging Face hub.

        Returns:
            The network in float32, on the CPU, in eval mode.

        Raises:
            UserError: nothing there, damaged, or a network that this one cannot be; it says why.
        """
        folder = find_layout(local_folder(path)).network
        return cls.from_stored(cls.format.read(folder), folder)

    @classmethod
    def from_stored(cls: type[N], stored: Stored, origin: Path) -> N:
        """Build a network with stored weights: float32, on the CPU, in eval mode.

        Args:
            stored: as `Format.read` returns it.
            origin: for messages.

        Raises:
            UserError: weights of another network.
        """
        with torch.device("meta"):  # no initial weights, which take seconds
            network = cls(stored.config)
        # Before memory is taken for a shape that the weights do not have.
        check_tensors(network, stored.tensors, origin)
        network.to_empty(device="cpu").load_state_dict(dict(stored.tensors))
        return network.eval()

    def save_pretrained(self, path: Path | str) -> None:
        """Save the network as diffusers saves its own.

        Args:
            path: of the folder, created if missing; other files in it stay.

        Raises:
            UserError: diffusers has no such network, or the folder holds weights of another kind.
            OSError: the folder cannot be written.
        """
        folder = Path(path)
        check_no_other_weights(folder)
        null_class = self.conditioning.null_class
        writers = self.format.writers(self.config, self.state_dict(), null_class)
        write_together(folder, writers, [NETWORK_CONFIG])
