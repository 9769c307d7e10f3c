"""Training images: packed into shards, read in an order that is a pure function."""

from ddpm_engine.data.cache import ShardCache, default_cache_directory
from ddpm_engine.data.dataset import Batch, Sample, ShardDataset, collate
from ddpm_engine.data.images import DecodeError, decode, encode, fit, with_channels
from ddpm_engine.data.loader import BatchPositions, make_batches, make_loader
from ddpm_engine.data.manifest import Manifest, Shard, ShardSet, open_shards
from ddpm_engine.data.mixture import MixedDataset, Mixture
from ddpm_engine.data.order import Order, rank_positions
from ddpm_engine.data.reader import DamagedSample, Fault, ShardReader
from ddpm_engine.data.shards import index_shards, prepare_shards, write_shards
from ddpm_engine.data.sources import Example, Source, open_source
from ddpm_engine.data.stream import ShardStream, is_stream
from ddpm_engine.data.verify import verify

__all__ = [
    "Batch",
    "BatchPositions",
    "DamagedSample",
    "DecodeError",
    "Example",
    "Fault",
    "Manifest",
    "MixedDataset",
    "Mixture",
    "Order",
    "Sample",
    "Shard",
    "ShardCache",
    "ShardDataset",
    "ShardReader",
    "ShardSet",
    "ShardStream",
    "Source",
    "collate",
    "decode",
    "default_cache_directory",
    "encode",
    "fit",
    "index_shards",
    "is_stream",
    "make_batches",
    "make_loader",
    "open_shards",
    "open_source",
    "prepare_shards",
    "rank_positions",
    "verify",
    "with_channels",
    "write_shards",
]
