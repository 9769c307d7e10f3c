"""The Inception network of 2015 behind every published Fréchet Inception Distance.

Heusel et al. (2017) took the features of a graph that was published for TensorFlow ("inception
2015-12-05"), which differs from the Inception V3 of other libraries: 1008 outputs, averages that
leave padding out, a maximum in the last block where the others have an average, and a bilinear
resize that samples without smoothing. The weights in torch-fidelity's release are that graph's,
converted; this is the network that they belong to, with their names, in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_engine.atomic_io import write_once
from ddpm_engine.data.remote.fetch import FetchError, fetch
from ddpm_engine.errors import UserError
from ddpm_engine.networks.files.weights import fill, read_pickle

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
SIDE = 299
"""Pixels that the network sees."""
FEATURES = 2048
OUTPUTS = 1008
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Convolution:
    """Without bias, followed by BatchNorm and ReLU; padded to keep the size if the stride is 1."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


Stage = tuple[Convolution, ...]
"""One convolution, or two of the same input whose outputs are joined."""
Pool = Literal["average", "largest", "halve"]


class InceptionNetwork(nn.Module):
    """Map images to the features of the last average pooling, and to unbiased class logits.

    Weights are random until `load_inception` fills them in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolved(3, Convolution("", 32, (3, 3), 2))
        self.Conv2d_2a_3x3 = _Convolved(32, Convolution("", 32, (3, 3)), padded=False)
        self.Conv2d_2b_3x3 = _Convolved(32, Convolution("", 64, (3, 3)))
        self.Conv2d_3b_1x1 = _Convolved(64, Convolution("", 80, (1, 1)))
        self.Conv2d_4a_3x3 = _Convolved(80, Convolution("", 192, (3, 3)), padded=False)
        channels = 192
        for name, paths, pool in _blocks():
            block = _Block(channels, paths, pool)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the network.

        Args:
            images: uint8 or float `[N, 3, H, W]` in 0 … 255, of any size.

        Returns:
            Features float32 `[N, 2048]`, and logits without the bias of the classes, which the
            Inception Score is taken of, float32 `[N, 1008]`.
        """
        x = (resize_as_tensorflow(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, stride=2)
        for name, module in self.named_children():
            if name.startswith("Mixed"):
                x = module(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def load_inception(weights: Path | None, cache: Path) -> tuple[InceptionNetwork, str]:
    """The network with its published weights, in eval mode, and the SHA-256 of their file.

    Args:
        weights: the file; None: that of the cache, downloaded if it is not there.
        cache: a folder.

    Raises:
        UserError: the weights are not available, or are those of another network.
    """
    path = cache / FILE_NAME if weights is None else weights
    if weights is not None and not weights.is_file():
        raise UserError(
            f"there is no `inception_weights` {weights}; download {URL}, and give its path",
            field="inception_weights",
        )
    if weights is None and not path.exists():
        _download(path)
    stored = read_pickle(path)
    network = InceptionNetwork()
    # A count that only training would look at.
    tensors = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    fill(network, tensors, path)
    return network.eval().requires_grad_(False), stored.hash


def resize_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear resize as TensorFlow 1 did it, which the weights are used to.

    Output pixel i is at i · (input side / output side), so that the first pixels of both lie on
    each other and the last ones do not; shrinking does not smooth.

    Args:
        images: float `[N, C, H, W]`.
        size: side of the result.

    Returns:
        `[N, C, size, size]`.
    """

    def along(x: Tensor, dim: int) -> Tensor:
        side = x.shape[dim]
        place = torch.arange(size, device=x.device, dtype=torch.float32)
        place = place * torch.tensor(side / size, dtype=torch.float32)
        low = place.long()
        high = (low + 1).clamp_max(side - 1)
        share = (place - low).to(x.dtype).reshape([-1 if d == dim else 1 for d in range(4)])
        left, right = x.index_select(dim, low), x.index_select(dim, high)
        return left + (right - left) * share

    return along(along(images, 3), 2)


def _download(path: Path) -> None:
    try:
        content = fetch(URL, _MOST_BYTES)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_once(path, content)
    except (FetchError, OSError) as error:
        raise UserError(
            f"features inception need the weights of the Inception network, and {error}. On a "
            f"machine with internet access, download {URL} and give its path as "
            "`inception_weights`; or set `features` to digits for images of digits",
            field="inception_weights",
        ) from error


class _Norm(nn.Module):
    """BatchNorm that has learned all it will."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(x, mean, variance, self.weight, self.bias, eps=1e-3)


class _Convolved(nn.Module):
    def __init__(self, channels: int, shape: Convolution, padded: bool = True) -> None:
        super().__init__()
        padding = (0, 0)
        if padded and shape.stride == 1:
            padding = (shape.kernel[0] // 2, shape.kernel[1] // 2)
        self.conv = nn.Conv2d(
            channels, shape.channels, shape.kernel, shape.stride, padding, bias=False
        )
        self.bn = _Norm(shape.channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Paths from one input, whose outputs are joined; the last one begins with a pool."""

    def __init__(self, channels: int, paths: Sequence[Sequence[Stage]], pool: Pool) -> None:
        super().__init__()
        self._paths, self._pool = paths, pool
        self.channels = 0
        for path in paths:
            width = channels
            for stage in path:
                for shape in stage:
                    self.add_module(shape.name, _Convolved(width, shape))
                width = sum(shape.channels for shape in stage)
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        pooled = {
            # Padding is left out of the average.
            "average": lambda: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
            "largest": lambda: functional.max_pool2d(x, 3, 1, 1),
            "halve": lambda: functional.max_pool2d(x, 3, 2),
        }[self._pool]()
        *others, last = self._paths
        joined = [self._follow(path, x) for path in others]
        return torch.cat([*joined, self._follow(last, pooled)], dim=1)

    def _follow(self, path: Sequence[Stage], x: Tensor) -> Tensor:
        for stage in path:
            outputs = [self.get_submodule(shape.name)(x) for shape in stage]
            x = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return x


def _path(name: str, *shapes: tuple[int, int, int], stride: int = 1) -> list[Stage]:
    """Convolutions one after the other, (channels, rows, columns) each; the last has the stride."""
    numbered = [name] if len(shapes) == 1 else [f"{name}_{i + 1}" for i in range(len(shapes))]
    return [
        (Convolution(n, channels, (rows, columns), stride if n == numbered[-1] else 1),)
        for n, (channels, rows, columns) in zip(numbered, shapes, strict=True)
    ]


def _forked(path: list[Stage], name: str) -> list[Stage]:
    """A path that ends in a row and a column of three, side by side."""
    row, column = Convolution(f"{name}a", 384, (1, 3)), Convolution(f"{name}b", 384, (3, 1))
    return [*path, (row, column)]


def _blocks() -> Iterator[tuple[str, list[list[Stage]], Pool]]:
    """Name, paths and pool of each block, in order."""
    for name, pooled in [("5b", 32), ("5c", 64), ("5d", 64)]:
        yield (
            f"Mixed_{name}",
            [
                _path("branch1x1", (64, 1, 1)),
                _path("branch5x5", (48, 1, 1), (64, 5, 5)),
                _path("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
                _path("branch_pool", (pooled, 1, 1)),
            ],
            "average",
        )
    yield (
        "Mixed_6a",
        [
            _path("branch3x3", (384, 3, 3), stride=2),
            _path("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
            [],
        ],
        "halve",
    )
    for name, c in [("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)]:
        yield (
            f"Mixed_{name}",
            [
                _path("branch1x1", (192, 1, 1)),
                _path("branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
                _path("branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
                _path("branch_pool", (192, 1, 1)),
            ],
            "average",
        )
    yield (
        "Mixed_7a",
        [
            _path("branch3x3", (192, 1, 1), (320, 3, 3), stride=2),
            _path("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
            [],
        ],
        "halve",
    )
    last: list[tuple[str, Pool]] = [("7b", "average"), ("7c", "largest")]
    for name, pool in last:
        yield (
            f"Mixed_{name}",
            [
                _path("branch1x1", (320, 1, 1)),
                _forked([(Convolution("branch3x3_1", 384, (1, 1)),)], "branch3x3_2"),
                _forked(_path("branch3x3dbl", (448, 1, 1), (384, 3, 3)), "branch3x3dbl_3"),
                _path("branch_pool", (192, 1, 1)),
            ],
            pool,
        )
