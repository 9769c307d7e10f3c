"""What the engine asks of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec


class Network(nn.Module, ABC):
    """A network that predicts from a noisy image, its noise level and its conditions.

    A subclass defines the abstract members; `build.NETWORKS` then makes it one that runs train.
    """

    config: Any
    """The dataclass it was built from, which `build_network` takes."""
    caches_features: bool = False
    """Whether `forward` takes `features` and `return_features` (Ma, Fang & Wang, "DeepCache",
    2024): keywords by which samplers reuse the deep levels of an evaluation close by."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the samples."""

    @property
    @abstractmethod
    def conditioning(self) -> ConditioningSpec:
        """The conditions that the network was built for."""

    @abstractmethod
    def forward(
        self, x: Tensor, noise_level: Tensor, conditioning: Conditioning | None = None
    ) -> Any:
        """Predict.

        Args:
            x: `[B, C, H, W]`, float, any memory format.
            noise_level: `[B]` or 0-dim, integer or float, on the device of `x`: the timestep, or
                whatever the parameterization passes in its place.
            conditioning: on the same device, one row for each sample; None: no conditions.

        Returns:
            `[B, C', H, W]`, where C' is C, or 2C with a learned variance.

        Raises:
            ValueError: conditions that the network was not built for, or missing ones.
        """

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The submodules that are compiled and sharded one by one, in the order of their use.

        Blocks of equal shape share one compiled graph, so compiling by block takes a fraction of
        the time that the whole network takes and loses little speed.
        """

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block in place, on its first call; parameter names do not change.

        Args:
            options: for `torch.compile`. Shapes are static unless `dynamic` says otherwise.
        """
        blocks = self.blocks()
        # All blocks of a kind run the same code, and torch gives up on code that it has compiled
        # eight times: fewer than there are distinct blocks here. Twice, for training and sampling.
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, 2 * len(blocks)
        )
        for block in blocks:
            block.compile(**{"dynamic": False, **options})

    def enable_activation_checkpointing(self) -> None:
        """Keep only the inputs of each `Recomputed` part and compute the rest again in backward.

        Gradients stay the same, dropout included; memory falls and a step takes about a third
        longer.

        Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
        """
        # Saving the generator's state waits for the device: only where dropout needs it.
        random = has_dropout(self)
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.checkpoint = recompute


class Recomputed(nn.Module):
    """A part of a network that can drop its inner activations and recompute them in backward."""

    checkpoint: Any = None
    """`torch.utils.checkpoint.checkpoint` with its options; None: activations are kept."""

    def run(self, function: Any, *inputs: Any) -> Tensor:
        """Call `function`, keeping only its inputs for the backward pass if checkpointing.

        Tensors of any shape go in and out.
        """
        if self.checkpoint is None or not torch.is_grad_enabled():
            output: Tensor = function(*inputs)
            return output
        output = self.checkpoint(function, *inputs)
        return output


def has_dropout(network: nn.Module) -> bool:
    """Whether a network drops out activations while it is trained."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
