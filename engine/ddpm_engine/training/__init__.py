"""Training: the loop, its checkpoints, and the weight average that is sampled from."""

from ddpm_engine.training.checkpoint import Checkpoint, CheckpointStore, load_part, verify
from ddpm_engine.training.ema import EMA
from ddpm_engine.training.trainer import Trainer

__all__ = ["EMA", "Checkpoint", "CheckpointStore", "Trainer", "load_part", "verify"]
