"""Configuration of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """Where the training images come from and how they are read."""

    path: Path | str = Path("data/shards")
    """Folder of indexed WebDataset shards, its http(s) URL, or a pattern of shards to stream."""
    source: str | None = None
    """What to make the shards from if the folder is missing, as `make_shards.py` takes it."""
    mix_with: tuple[str, ...] = ()
    """Further sets, folders or URLs, that are mixed with the first."""
    weights: tuple[int, ...] = ()
    """Samples of each set, the first one's before those of mix-with, in every sum of weights."""
    cache: Path | None = None
    """Folder on a local disk for shards of a URL; default: one of yours under the temporary one."""
    cache_gb: float = 64.0
    """Bound on that folder, in 10⁹ bytes."""
    allow_pipe: bool = False
    """Let pipe: patterns run their command in a shell."""
    horizontal_flip: bool = False
    """Mirror each image with probability one half."""
    window_shards: int = 16
    """Samples are shuffled within windows of this many shuffled shards."""
    workers: int = 2
    """Decoding processes of each rank; the order of samples does not depend on it."""
    max_bad_samples: int = 100
    """Stop once a run, over all ranks, has replaced more unreadable samples than this."""

    def __post_init__(self) -> None:
        # A URL is no path: two slashes would become one.
        if isinstance(self.path, str) and not is_location(self.path):
            object.__setattr__(self, "path", Path(self.path))


def is_location(path: str) -> bool:
    """Whether a string is a URL, or a command for a pipe, rather than a path."""
    return "://" in path or path.startswith("pipe:")
