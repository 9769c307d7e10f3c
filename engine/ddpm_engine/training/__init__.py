"""Training: the loop, its checkpoints, and the averages of the weights that are sampled from."""

from ddpm_engine.training.checkpoint import Checkpoint, CheckpointStore, load_part, verify
from ddpm_engine.training.ema import EMA
from ddpm_engine.training.trainer import Trainer

__all__ = ["EMA", "Checkpoint", "CheckpointStore", "Trainer", "load_part", "verify"]
