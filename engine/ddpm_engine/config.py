"""Everything that a run can set, as a tree of frozen dataclasses, and its form on disk.

The docstring of a field is its help text on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ddpm_engine.bounds import Ge, Gt, Le, Lt, out_of_bounds
from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import MAX_LEVEL, DiffusionConfig
from ddpm_engine.diffusion.parameterization import clips_x0
from ddpm_engine.errors import UserError
from ddpm_engine.json_files import described, read_json
from ddpm_engine.locations import is_location, redacted, user_path
from ddpm_engine.networks.registry import CONFIGURATIONS, NETWORKS, NetworkConfig
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.objectives.config import (
    AutoencodingConfig,
    DistillationConfig,
    ObjectiveConfig,
)
from ddpm_engine.runtime import Precision
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.typed_json import Mismatch, plain, structure

MAX_SIGMA_REL = 12**-0.5
"""Largest sigma_rel of a power-function EMA: that of the plain mean of all steps."""


Decay = Literal["none", "linear", "cosine", "inverse-sqrt"]
"""How the learning rate falls."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and the learning rate as a function of the step."""

    learning_rate: Annotated[float, Gt(0), Le(1e6)] = 2e-4
    """Learning rate after the warm-up, positive."""
    warmup_steps: Annotated[int, Ge(0)] = 5000
    """Optimizer steps over which the learning rate rises from zero; 0: no warm-up."""
    decay: Decay = "none"
    """How the learning rate falls: linear or cosine, to zero after the last step; inverse-sqrt of
    the step, from `decay_from` on, which needs no last step (Karras et al. 2024)."""
    decay_from: Annotated[int, Ge(0)] = 0
    """Step up to which the learning rate stays what it is after the warm-up."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    """Decay per step of the first and second moments, each from 0 to below 1."""
    eps: Annotated[float, Gt(0), Le(1)] = 1e-8
    """Term added to the root of the second moment, positive, since that may be 0."""
    weight_decay: Annotated[float, Ge(0), Le(1e6)] = 0.0
    """Decoupled weight decay, 0 or more; 0 makes it Adam."""
    clip_norm: Annotated[float, Gt(0)] = 1.0
    """Global norm, positive, that larger gradients are scaled down to."""

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values themselves."""
        yield from out_of_bounds(self)
        if self.decay == "inverse-sqrt" and self.decay_from < 1:
            yield UserError(
                f"`decay_from` is {self.decay_from}; with `decay` inverse-sqrt it is the step that "
                "others are compared with, 1 at least",
                "decay_from",
            )
        if self.decay == "none" and self.decay_from:
            yield UserError(
                f"`decay_from` is {self.decay_from}, but `decay` is none; take linear, cosine or "
                "inverse-sqrt",
                "decay_from",
            )


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: Annotated[int, Ge(1)] = 800_000
    """Optimizer steps of the whole run."""
    batch_size: Annotated[int, Ge(1), Le(2**24)] = 128
    """Global batch: images per optimizer step, over all ranks and accumulation."""
    accumulation: Annotated[int, Ge(1), Le(2**24)] = 1
    """Micro-batches that each rank divides its share of the batch into."""
    init: Path | None = None
    """Run, or folder of a diffusers pipeline, whose weights this run starts from; None: none."""
    seed: int = 0
    """Seed of weights, data order and all noise."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.9999
    """Decay per step of the EMA of the weights, 0 to below 1, after a warm-up."""
    ema_sigma_rel: tuple[Annotated[float, Gt(0), Le(MAX_SIGMA_REL)], ...] = ()
    """Relative lengths (sigma_rel, above 0, at most 0.2886) of power-function EMAs, as 0.05 0.1,
    whose snapshots make an EMA of any length afterwards."""
    condition_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Probability, from 0 to below 1, of training a sample without its class, text and vector, as
    classifier-free guidance needs."""
    augmentation_levels: Annotated[int, Ge(1), Le(MAX_LEVEL + 1)] = 250
    """Levels of noise augmentation, 1 (none) to 1001 (super-resolution)."""
    precision: Precision = "auto"
    """Mixed precision of the network; no: float32; auto: what the run began with, at first bf16 on
    GPUs that are made for it, else no."""
    allow_slow_bf16: bool = False
    """Use of bf16 on a CPU that only emulates it (a hundred times slower)."""
    tf32: bool = False
    """Rounding to TF32 in a GPU's float32 products (10 bits of mantissa)."""
    cudnn_benchmark: bool = True
    """Choice of cuDNN's algorithms by timing, but not if deterministic."""
    deterministic: bool = False
    """Algorithms that give the same bits each time, also on GPUs (slower)."""
    compile: bool = False
    """Compilation of the network, block by block, with torch.compile."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Training steps as one CUDA graph, which the GPU runs without the host; auto: where possible.
    """
    recompute: Literal["none", "norms", "blocks"] = "none"
    """What the backward pass computes again, to save memory: outputs of norms (about two fifths,
    a few per cent slower), or all inside blocks (most, a third slower)."""
    max_bad_steps: Annotated[int, Ge(1)] = 10
    """Non-finite gradients in a row, all of them skipped, that end the run."""
    timeout_seconds: Annotated[int, Ge(1), Le(10**9)] = 300
    """Seconds without progress, after the first step, that end the run."""

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values themselves."""
        yield from out_of_bounds(self)
        if self.compile and self.recompute == "norms":
            yield UserError(
                "`recompute` is norms, but with `compile` the compiler decides what a block keeps; "
                "use none or blocks",
                "recompute",
            )
        lengths = self.ema_sigma_rel
        # Checkpoints name their parts like this.
        if len({f"{length:g}" for length in lengths}) < len(lengths):
            yield UserError(
                f"`ema_sigma_rel` is {lengths}; give different lengths, as 0.05 0.1",
                "ema_sigma_rel",
            )


@dataclass(frozen=True)
class LogConfig:
    """What a run reports, and how often."""

    every: Annotated[int, Ge(1)] = 100
    """Steps between log lines."""
    checkpoint_every: Annotated[int, Ge(1)] = 10_000
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Ge(2)] = 2
    """Number of newest checkpoints that are kept, 2 at least."""
    keep_every: Annotated[int, Ge(1)] | None = None
    """Interval in steps; checkpoints at its multiples are kept for good."""
    snapshot_every: Annotated[int, Ge(1)] = 10_000
    """Steps between snapshots of the EMAs of training.ema-sigma-rel; all are kept."""
    sample_every: Annotated[int, Ge(0)] = 10_000
    """Steps between grids of EMA samples; 0: none."""
    sample_count: Annotated[int, Ge(1), Le(10_000)] = 64
    """Samples in a grid, always the same ids; at most 10000."""
    sample_steps: Annotated[int, Ge(1)] = 100
    """Sampling steps of those grids, at most T."""
    prompts: tuple[str, ...] = ()
    """Prompts of those samples, in turn, for a network conditioned on text; default: the captions
    of the first samples of the data."""
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    """Tracker that Accelerate sends the metrics to, besides the run's metrics.jsonl."""

    def problems(self) -> Iterator[UserError]:
        """Report everything wrong with the values themselves."""
        yield from out_of_bounds(self)
        if any("\n" in prompt or not prompt.strip() for prompt in self.prompts):
            yield UserError(
                "`prompts` has one that is empty or longer than a line; give one line for each",
                "prompts",
            )


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    out: Path = Path("runs/run")
    """Directory of the run: configuration, metrics, checkpoints, samples. Run again to resume."""
    data: DataConfig = field(default_factory=DataConfig)
    model: NetworkConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    autoencoding: AutoencodingConfig = field(default_factory=AutoencodingConfig)

    @property
    def clips_x0(self) -> bool:
        """Whether samplers clip estimates of x_0, which they do not of latents."""
        bounded = self.data.autoencoder is None
        return bounded and clips_x0(self.diffusion.prediction, self.sampling.clip_x0)


RECORDED_IN = "recorded_in"
"""Entry of a recorded configuration: see `checkpoints.recorded_config`."""
_CLASS = "class"
"""Entry of a stored `model` that names the class of its configuration."""


def _read_model(values: Any, where: str) -> Any:
    """A network's configuration; one other than the U-Net's has the name of its class."""
    if not isinstance(values, dict) or _CLASS not in values:
        return structure(UNetConfig, values, where)
    values = dict(values)
    return structure(_network_config(values.pop(_CLASS)), values, where)


def _read_location(value: Any, where: str) -> Path | str:
    """A path, or a URL, in which two slashes stay two."""
    is_url = isinstance(value, str) and is_location(value)
    location: Path | str = structure(str if is_url else Path, value, where)
    return location


def _network_config(name: Any) -> type[Any]:
    known = {kind.__name__: kind for kind in (*CONFIGURATIONS, *NETWORKS)}
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"`model` is a {name}, which describes no known network; import the module that adds "
            "it to ddpm_engine.networks.registry.NETWORKS first",
            "model",
        )
    return known[name]


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Convert a configuration to JSON values, with the version of its format."""
    values = plain(_without_passwords(config))
    if type(config.model) is not UNetConfig:
        values["model"] = {_CLASS: type(config.model).__name__, **values["model"]}
    return {"version": len(_MIGRATIONS), **values}


def _without_passwords(config: RunConfig) -> RunConfig:
    """Hide the users and passwords of URLs, which nothing records."""
    data = config.data
    path = redacted(data.path) if isinstance(data.path, str) else data.path
    hidden = replace(data, path=path, mix_with=tuple(map(redacted, data.mix_with)))
    return replace(config, data=hidden)


def from_dict(values: dict[str, Any], origin: str) -> RunConfig:
    """Invert `to_dict`, of this version or an earlier one; report every entry that is wrong.

    Raises:
        UserError: naming `origin` and the entries at fault.
    """
    special = {NetworkConfig: _read_model, Path | str: _read_location}
    try:
        config: RunConfig = structure(RunConfig, _migrated(values, origin), special=special)
        return config
    except Mismatch as mismatch:
        reasons = "\n       ".join(mismatch.problems)
        start = " " if len(mismatch.problems) == 1 else "\n       "
        raise UserError(f"{origin} is not a run configuration:{start}{reasons}") from None


def _migrated(values: dict[str, Any], origin: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(
            f"{origin} is not a run configuration: it is {described(values)}, not a JSON object"
        )
    values = deepcopy(values)
    values.pop(RECORDED_IN, None)
    version, known = values.pop("version", 0), len(_MIGRATIONS)
    if type(version) is not int or not 0 <= version <= known:
        raise UserError(
            f"{origin} is of version {described(version)}; this release reads versions 0 to "
            f"{known}, so use the one that wrote it, or a newer one"
        )
    for migrate in _MIGRATIONS[version:]:
        migrate(_section(values, "training"), _section(values, "log"))
    return values


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.setdefault(name, {})
    return section if isinstance(section, dict) else {}


def _to_version_1(training: dict[str, Any], log: dict[str, Any]) -> None:
    """Rename `training.ema_profiles`."""
    if "ema_profiles" in training:
        training["ema_sigma_rel"] = training.pop("ema_profiles")


def _to_version_2(training: dict[str, Any], log: dict[str, Any]) -> None:
    """Keep the precision that was the default, and drop the overlap of saves, which was bounded."""
    training.setdefault("precision", "no")
    log.pop("checkpoint_overlap", None)


def _to_version_3(training: dict[str, Any], log: dict[str, Any]) -> None:
    """Rename `training.activation_checkpointing`, which was all or nothing."""
    if "activation_checkpointing" in training:
        blocks = training.pop("activation_checkpointing")
        training["recompute"] = {True: "blocks", False: "none"}.get(blocks, blocks)


def _to_version_4(training: dict[str, Any], log: dict[str, Any]) -> None:
    """Rename `training.label_dropout`, which drops further conditions, too."""
    if "label_dropout" in training:
        training["condition_dropout"] = training.pop("label_dropout")


_MIGRATIONS = (_to_version_1, _to_version_2, _to_version_3, _to_version_4)
"""What turns a version into the next; configurations without a version are of version 0."""


def load_config(path: Path) -> RunConfig:
    """Read a `config.json`, or that of a run directory.

    Raises:
        UserError: no such file, not JSON, or not a run configuration.
    """
    path = user_path(path)
    file = path / "config.json" if path.is_dir() else path
    return from_dict(read_values(file), str(file))


def read_values(file: Path) -> Any:
    """Read the JSON values of a configuration, for `from_dict`.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return read_json(file)
    except FileNotFoundError:
        raise UserError(f"there is no configuration at {file}") from None


def dump_config(config: RunConfig) -> str:
    """Convert a configuration to indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def flatten(config: RunConfig) -> dict[str, Any]:
    """Convert a configuration to `{"training.steps": …}`."""
    flat: dict[str, Any] = {}

    def visit(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    visit(asdict(_without_passwords(config)), "")
    return flat
