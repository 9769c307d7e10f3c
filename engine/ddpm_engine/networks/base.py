"""What the engine asks of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec

Recompute = Literal["none", "norms", "blocks"]
T = TypeVar("T")


class Network(nn.Module, ABC):
    """A network that predicts from a noisy image, its noise level and its conditions.

    A subclass defines the abstract members; `build.NETWORKS` then makes it one that runs train.
    """

    config: Any
    """The dataclass it was built from, which `build_network` takes."""
    caches_features: bool = False
    """Whether `forward` takes `features` and `return_features` (Ma, Fang & Wang, "DeepCache",
    2024): keywords by which samplers reuse the deep levels of an evaluation close by."""

    separated: bool = False
    """Whether `separate_blocks` was called: then nothing may use a block's weights outside it."""

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

    def precompute(self, conditioning: Conditioning) -> Conditioning:
        """Compute what depends on the conditions alone, once for all noise levels.

        Samplers call it once for each batch, after whatever replaces conditions by null ones. Its
        result has one row for each sample, too, and `forward` takes either.

        Args:
            conditioning: as `forward` takes it.
        """
        return conditioning

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

    def separate_blocks(self) -> None:
        """Let each block use no weights but its own, and owe those nothing after its output.

        For strategies that gather a block's weights while it computes and free them afterwards.
        """
        self.separated = True
        for block in self.blocks():
            block.separate = True  # type: ignore[assignment]

    def recompute(self, what: Recompute) -> None:
        """Let the backward pass compute part of what the forward pass made again, and not keep it.

        Gradients stay the same to the bit.

        Args:
            what: "norms": outputs of norms, each in one pass over it; not in compiled blocks.
                "blocks": all inside each `Recomputed` part, of which the inputs are kept; a step
                takes about a third longer.

        Raises:
            UserError: the network has no parts of that kind.

        Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
        """
        # Nothing in a network uses a generator, whose state would have to be read from the device.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        parts = [module for module in self.modules() if isinstance(module, Recomputed)]
        norms = [module for module in self.modules() if isinstance(module, RecomputedNorm)]
        if what != "none" and not (parts if what == "blocks" else norms):
            raise UserError(
                f"`training.recompute` is {what}, but {type(self).__name__} has none that can be "
                "computed again; use none",
                "training.recompute",
            )
        for part in parts:
            part.checkpoint = again if what == "blocks" else None
        for norm in norms:
            norm.recomputed = what == "norms"


class Recomputed(nn.Module):
    """A part of a network that can drop its inner activations and recompute them in backward."""

    checkpoint: Any = None
    """`torch.utils.checkpoint.checkpoint` with its options; None: activations are kept."""

    def run(self, function: Callable[..., T], *inputs: Any) -> T:
        """Call `function`, keeping only its inputs for the backward pass if checkpointing.

        Tensors of any shape go in and out, or tuples of them.
        """
        if self.checkpoint is None or not torch.is_grad_enabled():
            return function(*inputs)
        output: T = self.checkpoint(function, *inputs)
        return output


class RecomputedNorm(nn.Module):
    """A norm whose output need not be kept for the layer that follows; see `recipes`."""

    recomputed: bool = False
    """Whether that layer keeps how its input is made, and not the input."""
