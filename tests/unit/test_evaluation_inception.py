"""The Inception network against torch-fidelity's, whose weights it takes.

That library cannot be installed beside a CPU build of torch, since it needs torchvision: the
numbers here are what its version 0.4.0 gives for the weights and images below, and
`tests/peers/test_inception.py` compares the two wherever it is installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_engine.data.remote import fetch
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.feature_networks import feature_network
from ddpm_engine.evaluation.inception import InceptionNetwork, load_inception, resize_as_tensorflow

PARAMETERS = 23_850_960
FIDELITY = [0.186624, 0.259876, 1.55988, 0.406641, -0.0100657, 0.462623, -0.0650953, 1.15203]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that keep signals of one size, in the format of the published ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = InceptionNetwork().state_dict()
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(noise.abs() + 0.5)
        elif tensor.dim() > 1:
            tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
        else:
            tensor.copy_(0.1 * noise + float(name.endswith("bn.weight")))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # The published file has the counts of batches, which training leaves.
    counts = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0)
        for name in tensors
        if name.endswith("running_var")
    }
    torch.save({**tensors, **counts}, path)
    return path


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_it_is_torch_fidelitys(weights: Path, tmp_path: Path) -> None:
    network, _ = load_inception(weights, tmp_path)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS
    features, logits = network(images())
    found = [
        features.mean(), features.std(), features.max(), features[0, 2047],
        logits.mean(), logits.std(), logits[0, 0], logits[0, 1007],
    ]  # fmt: skip
    np.testing.assert_allclose([float(v) for v in found], FIDELITY, rtol=2e-4, atol=1e-5)


def test_features_by_name_take_grey_or_colour_images(weights: Path, tmp_path: Path) -> None:
    network = feature_network("inception", 32, weights=weights, cache=tmp_path)
    grey = images().permute(0, 2, 3, 1)[..., :1].numpy()
    found = network(grey)
    assert found.shape == (1, network.features + network.outputs) == (1, 2048 + 1008)
    np.testing.assert_array_equal(found, network(np.repeat(grey, 3, axis=3)))


def test_resize_as_tensorflow_did_it() -> None:
    # Places 0, 2/3, 4/3, 2 of a row of three, with the last beyond the end: clamped.
    row = torch.tensor([[[[0.0, 3.0, 6.0]]]]).expand(1, 1, 3, 3)
    assert resize_as_tensorflow(row, 2)[0, 0, 0].tolist() == [0, 4.5]
    found = resize_as_tensorflow(row, 6)[0, 0]
    torch.testing.assert_close(found, torch.tensor([0, 1.5, 3, 4.5, 6, 6]).expand(6, 6))
    same = torch.rand(1, 2, 5, 5)
    assert torch.equal(resize_as_tensorflow(same, 5), same)


def test_without_weights_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no `inception_weights` nowhere.*download https://"):
        load_inception(Path("nowhere"), tmp_path)

    def unreachable(url: str, at_most: int) -> bytes:
        raise fetch.FetchError(url, "no route to host")

    monkeypatch.setattr("ddpm_engine.evaluation.inception.fetch", unreachable)
    with pytest.raises(UserError, match=r"no route.*`inception_weights`.*`features` to digits"):
        feature_network("inception", 32, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_weights_are_downloaded_once_and_never_executed(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = [weights.read_bytes()]
    monkeypatch.setattr("ddpm_engine.evaluation.inception.fetch", lambda url, most: served.pop())
    _, first = load_inception(None, tmp_path)
    _, again = load_inception(None, tmp_path)
    assert first == again
    assert len(list(tmp_path.iterdir())) == 1
    torch.save(torch.nn.Linear(2, 2), tmp_path / "program.pth")
    with pytest.raises(UserError, match="would execute code"):
        load_inception(tmp_path / "program.pth", tmp_path)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not of the network"):
        load_inception(tmp_path / "other.pth", tmp_path)
