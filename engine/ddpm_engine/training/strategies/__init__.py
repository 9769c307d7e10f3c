"""How training is spread over processes: one file a strategy, one protocol, one state."""

from ddpm_engine.training.strategies.request import Request, read_request
from ddpm_engine.training.strategies.start import start_strategy
from ddpm_engine.training.strategies.strategy import Strategy

__all__ = ["Request", "Strategy", "read_request", "start_strategy"]
