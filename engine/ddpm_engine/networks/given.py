"""Checks that a network is given the conditions that it was built for."""

from __future__ import annotations

from torch import Tensor

from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec

_CHECKED = {"labels", "text", "text_mask", "text_projections", "vector"}
_ANYWHERE = {"dropout_key"}  # by which nothing is dropped in a network without dropout


def check_given(conditioning: Conditioning, spec: ConditioningSpec, network: str) -> None:
    """Check that labels, text and vector are given exactly if the network has them.

    Args:
        conditioning: as `Network.forward` takes it.
        spec: the conditions that the network was built for, no low-resolution image among them.
        network: what messages call it, such as "transformer".

    Raises:
        ValueError: conditions are missing, or not ones that the network was built for.
    """
    given = conditioning.present()
    if further := given.keys() - _CHECKED - _ANYWHERE:
        raise ValueError(f"{', '.join(sorted(further))} given, which this {network} lacks")
    if spec.classes is not None and "labels" not in given:
        raise ValueError(
            f"this {network} is class-conditional: give labels, int64 [B]; the null class is "
            f"{spec.null_class}"
        )
    if spec.classes is None and "labels" in given:
        raise ValueError(f"labels given, but this {network} is unconditional (num_class_embeds)")
    text = [name for name in ("text", "text_projections") if name in given]
    if spec.text is not None and len(text) != 1:
        raise ValueError(
            f"this {network} is conditioned on text: give text, [B, L, {spec.text}], or what it "
            "has precomputed of it"
        )
    if spec.text is None and (text or "text_mask" in given):
        raise ValueError(f"text given, but this {network} is not conditioned on text")
    if spec.vector is not None and "vector" not in given:
        raise ValueError(
            f"this {network} is conditioned on a vector: give vector, [B, {spec.vector}]"
        )
    if spec.vector is None and "vector" in given:
        raise ValueError(f"vector given, but this {network} is not conditioned on one")
    _check_channels("text", given.get("text"), spec.text, network)
    _check_channels("vector", given.get("vector"), spec.vector, network)


def _check_channels(name: str, tensor: Tensor | None, wanted: int | None, network: str) -> None:
    if tensor is not None and tensor.shape[-1] != wanted:
        raise ValueError(
            f"{name} has {tensor.shape[-1]} channels; this {network} was built for {wanted}"
        )
