"""The weights that a run starts from, where these are another model's."""

from __future__ import annotations

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.base import Network
from ddpm_engine.networks.registry import same_network
from ddpm_engine.training.run_directory import begun_with


def start_from_model(network: Network, config: RunConfig) -> None:
    """Copy the weights of the model that a run starts from, unless it goes on from its own.

    Args:
        network: changed in place.
        config: of the run.

    Raises:
        UserError: the model cannot be loaded, or is of another network or process.
    """
    place = config.training.init
    if place is None or begun_with(config.out) is not None:
        return
    try:
        found = load_model(place)
    except UserError as error:
        raise UserError(f"`training.init`: {error}", "training.init") from None
    if not same_network(found.config.model, config.model):
        raise UserError(
            f"`training.init` is {place}, whose network is {found.config.model}, and the run's is "
            f"{config.model}; leave the `model` fields to the model that the run starts from",
            "training.init",
        )
    if found.config.diffusion.prediction != config.diffusion.prediction:
        raise UserError(
            f"`diffusion.prediction` is {config.diffusion.prediction}, and the network of "
            f"`training.init` {place} predicts {found.config.diffusion.prediction}; leave it out",
            "diffusion.prediction",
        )
    network.load_state_dict(found.network.state_dict())
