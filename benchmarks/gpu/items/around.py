"""What surrounds the networks: host time of operations, reading of data, features of images."""

from __future__ import annotations

import time
from itertools import islice

import numpy as np
from benchmarks import host_overhead
from benchmarks.gpu.item import Context
from benchmarks.gpu.items.ladder import config_for
from benchmarks.gpu.machine import ROOT

from ddpm_engine.data.loader import BatchPositions, make_batches
from ddpm_engine.data.open import open_dataset
from ddpm_engine.evaluation.feature_networks import InceptionFeatures
from ddpm_engine.evaluation.inception import InceptionNetwork


def host(context: Context) -> None:
    """Time the host's part of each operation and of a step, with launches left out."""
    calls, steps = (20, 0) if context.dry else (500, 60)
    for name, took in host_overhead.in_tree(ROOT, calls, steps).items():
        context.add({"what": name, "µs": took})


def loader(context: Context) -> None:
    """Read batches as fast as they come."""
    config = config_for(context, "cifar10", 128, 32)
    batch, count = config.training.batch_size, 8 if context.dry else 100
    dataset = open_dataset(
        config.data, size=config.model.sample_size, channels=3, classes=None, seed=0
    )
    for workers in (1,) if context.dry else (2, 4, 8):
        positions = BatchPositions(batch, 0, 1, 1, start_step=0, end_step=10 * count)
        batches = make_batches(
            dataset, positions, workers, pin_memory=context.device.type == "cuda"
        )
        for _ in islice(batches, 4):
            pass
        begun = time.perf_counter()
        for _ in islice(batches, count):
            pass
        took = time.perf_counter() - begun
        context.add({"what": f"loader, {workers} workers", "images/s": batch * count / took})


def features(context: Context) -> None:
    """Run Inception, with random weights, over images of two sizes."""
    network = InceptionFeatures(InceptionNetwork().to(context.device), "random")
    for batch in (2,) if context.dry else (64, 256):
        images = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
        network(images)
        turns = 1 if context.dry else 1024 // batch
        begun = time.perf_counter()
        for _ in range(turns):
            network(images)
        took = time.perf_counter() - begun
        context.add({"what": f"Inception, batch {batch}", "images/s": batch * turns / took})
