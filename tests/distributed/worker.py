"""One rank of a launch: trains the runs that the JSON in argv[1] lists, one after the other.

Each is `{"config": FILE, "environment": {…}, "float64": bool, "poisoned": POSITION or null}`; the
environment is what a launcher would have left besides the rank, and the loss of the sample at that
position is not a number. All in one process, because starting one takes longer than a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor

from ddpm_engine.config import UNetConfig, load_config
from ddpm_engine.data import Batch
from ddpm_engine.errors import exit_on_user_error
from ddpm_engine.objectives import DenoisingObjective
from ddpm_engine.training import Trainer, trainer
from ddpm_engine.unet import UNet


def float64_network(config: UNetConfig) -> UNet:
    return UNet(config).double()


def poison(objective: DenoisingObjective, position: int) -> None:
    """Let the loss of the sample at one position be no number."""

    class Poisoned(DenoisingObjective):
        def __call__(self, model: Any, batch: Batch) -> Tensor:
            loss = super().__call__(model, batch)
            return loss * (math.nan if position in batch.positions else 1)

    objective.__class__ = Poisoned


def main() -> None:
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    for job in json.loads(sys.argv[1]):
        os.environ.update(job["environment"])
        trainer.UNet = float64_network if job["float64"] else UNet  # type: ignore[misc,assignment]
        with exit_on_user_error():
            run = Trainer(load_config(Path(job["config"])))
            if job["float64"]:
                assert isinstance(run.objective, DenoisingObjective)
                run.objective._signal = run.schedule.sqrt_alpha_bar
                run.objective._sigma = run.schedule.sqrt_one_minus_alpha_bar
            if job["poisoned"] is not None:
                assert isinstance(run.objective, DenoisingObjective)
                poison(run.objective, job["poisoned"])
            run.fit()
        for name in job["environment"]:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main()
