"""The Inception network against torch-fidelity's, if it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm_engine.evaluation.inception import InceptionNetwork, load_inception

peer = pytest.importorskip(
    "torch_fidelity.feature_extractor_inceptionv3",
    reason="pip install torch-fidelity, which needs torchvision",
    exc_type=ImportError,
)


@pytest.mark.parametrize("side", [32, 299])
def test_same_weights_give_the_same_features(side: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(side)
    tensors = InceptionNetwork().state_dict()
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.03 * noise)
    torch.save(tensors, tmp_path / "weights.pth")
    theirs = peer.FeatureExtractorInceptionV3(
        "peer", ["2048", "logits_unbiased"], str(tmp_path / "weights.pth")
    )
    ours, _ = load_inception(tmp_path / "weights.pth", tmp_path)
    images = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    for found, expected in zip(ours(images), theirs(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
