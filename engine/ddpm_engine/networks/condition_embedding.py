"""Noise level, class and vector as one embedding, which modulates the blocks of a network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.embeddings import TimestepMLP, sinusoidal_embedding

_SINUSOIDS = 256  # channels that a noise level is embedded in first, in DiT as in diffusers


class ConditionEmbedding(nn.Module):
    """The sum of the embeddings of noise level, class and vector: `[B]` → `[B, channels]`.

    Args:
        channels: of the result.
        num_class_embeds: rows of the class embedding; None: none.
        vector_channels: channels of the vector; None: none.
    """

    def __init__(
        self, channels: int, num_class_embeds: int | None, vector_channels: int | None
    ) -> None:
        super().__init__()
        self.timestep_embedder = TimestepMLP(_SINUSOIDS, channels)
        self.class_embedder = (
            None
            if num_class_embeds is None
            else nn.ModuleDict({"embedding_table": nn.Embedding(num_class_embeds, channels)})
        )
        self.vector_embedder = (
            None if vector_channels is None else TimestepMLP(vector_channels, channels)
        )

    def forward(self, noise_level: Tensor, conditioning: Conditioning) -> Tensor:
        """Embed noise levels, `[B]`, and the conditions there is an embedding for.

        Returns:
            `[B, channels]`, its SiLU taken, which is what every modulation begins with.
        """
        weight = self.timestep_embedder.linear_1.weight
        sinusoids = sinusoidal_embedding(noise_level, _SINUSOIDS, flip_sin_to_cos=True)
        embedding: Tensor = self.timestep_embedder(sinusoids.to(weight.dtype))
        labels, vector = conditioning.labels, conditioning.vector
        if self.class_embedder is not None and labels is not None:
            embedded = self.class_embedder["embedding_table"](labels)
            embedding = embedding + embedded.to(embedding.dtype)
        if self.vector_embedder is not None and vector is not None:
            embedding = embedding + self.vector_embedder(vector.to(weight.dtype))
        return F.silu(embedding)
