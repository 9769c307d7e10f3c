"""Dropout whose mask follows from a key of each sample, not from a generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm_kernels.dropout import Dropout, dropout


class KeyedDropout(nn.Module):
    """Drop elements while training: `[B, C, H, W]` → same shape and dtype.

    Args:
        probability: of dropping an element, from 0 to below 1.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def of(self, key: Tensor | None) -> Dropout | None:
        """Return what drops the elements of a batch; None: nothing is dropped.

        Args:
            key: of this layer, int64 `[B]`; see `keys_of_layers`.

        Raises:
            ValueError: elements are to be dropped, and there is no key.
        """
        if not self.training or self.probability == 0:
            return None
        if key is None:
            raise ValueError(
                f"a network with a dropout of {self.probability} is in training mode: give "
                "Conditioning.dropout_key, int64 [B], or call eval() first"
            )
        return Dropout(self.probability, key)

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """Drop elements of `[B, C, H, W]` by the keys `[B]`, where no norm before does so."""
        how = self.of(key)
        return x if how is None else dropout(x, how)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return str(self.probability)


def keys_of_layers(key: Tensor, layers: int) -> tuple[Tensor, ...]:
    """Return the keys by which each layer of a network drops, independently of the others.

    Philox takes keys however close to each other. A number of each layer would do as well, but
    blocks of equal shape would no longer be the same to a compiler.

    Args:
        key: `Conditioning.dropout_key`, int64 `[B]`.
        layers: number of them.

    Returns:
        int64 `[B]` of each layer.
    """
    return (key + torch.arange(layers, device=key.device)[:, None]).unbind()
