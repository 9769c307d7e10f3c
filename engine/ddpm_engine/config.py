"""Everything a run can set: a tree of frozen dataclasses, and presets as functions that return it.

The field docstrings are the help texts of `launch/train.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ddpm_engine.data.config import DataConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.super_resolution import MAX_LEVEL
from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.objectives.config import DistillationConfig, ObjectiveConfig
from ddpm_engine.samplers.config import SamplingConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up."""

    learning_rate: float = 2e-4
    """Learning rate at its highest, after the warm-up."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises from zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments, a step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; zero makes it Adam."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = 800_000
    """Optimizer steps in all."""
    batch_size: int = 128
    """Global batch: images of one optimizer step, over all ranks and accumulation."""
    accumulation: int = 1
    """Each rank takes its share of the batch in this many pieces."""
    seed: int = 0
    """Of weights, data order and all noise."""
    ema_decay: float = 0.9999
    """Decay, a step, of the weight average that is sampled from (it warms up from 0.1)."""
    ema_profiles: tuple[float, ...] = ()
    """Lengths of further, power-function averages, in shares of the training so far, as 0.05 0.1;
    snapshots of them are kept, of which checkpoints.py makes the average of any length afterwards.
    """
    label_dropout: float = 0.1
    """Share of labels, 0 to 1, replaced by the null class (class-conditional models)."""
    augmentation_levels: int = 250
    """Noise of the small image: drawn from 0 (none) to this − 1 steps (low-resolution models)."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the network's arithmetic; no: float32."""
    allow_slow_bf16: bool = False
    """Use bf16 even on a CPU that has no fast path for it (a hundred times slower)."""
    compile: bool = False
    """Compile the network block by block with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    max_bad_steps: int = 10
    """Stop after this many non-finite gradients in a row; each is skipped."""
    timeout_seconds: int = 300
    """After the first step, end a run whose ranks wait for one of them for so many seconds."""


@dataclass(frozen=True)
class LogConfig:
    """What a run reports, and how often."""

    every: int = 100
    """Steps between log lines."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints."""
    checkpoint_overlap: int = 1
    """Steps that training may be ahead of a checkpoint being written, before it waits for it."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, two at least."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps are kept for good."""
    snapshot_every: int = 10_000
    """Steps between snapshots of the averages of training.ema-profiles; all are kept."""
    sample_every: int = 10_000
    """Steps between grids of EMA samples; 0: none."""
    sample_count: int = 64
    """Pictures in a grid, always the same ids."""
    sample_steps: int = 100
    """Network evaluations a picture of those grids."""
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    """Where Accelerate sends the metrics, besides the run's metrics.jsonl."""


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    out: Path = Path("runs/run")
    """The run's directory: configuration, metrics, checkpoints, samples. Run again to resume."""
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def problems(self) -> list[str]:
        """Everything wrong with the values themselves, each as a sentence."""
        at_least: list[tuple[str, int | None, int]] = [
            ("model.sample-size", self.model.sample_size, 1),
            ("model.in-channels", self.model.in_channels, 1),
            ("model.layers-per-block", self.model.layers_per_block, 1),
            ("model.norm-num-groups", self.model.norm_num_groups, 1),
            ("model.attention-head-dim", self.model.attention_head_dim, 1),
            ("model.attn-norm-num-groups", self.model.attn_norm_num_groups, 1),
            ("model.num-class-embeds", self.model.num_class_embeds, 1),
            ("model.low-resolution", self.model.low_resolution, 1),
            ("diffusion.timesteps", self.diffusion.timesteps, 1),
            ("training.steps", self.training.steps, 1),
            ("training.batch-size", self.training.batch_size, 1),
            ("training.accumulation", self.training.accumulation, 1),
            ("training.max-bad-steps", self.training.max_bad_steps, 1),
            ("training.augmentation-levels", self.training.augmentation_levels, 1),
            ("training.timeout-seconds", self.training.timeout_seconds, 1),
            ("optimizer.warmup-steps", self.optimizer.warmup_steps, 0),
            ("data.workers", self.data.workers, 0),
            ("data.window-shards", self.data.window_shards, 1),
            ("data.max-bad-samples", self.data.max_bad_samples, 0),
            ("log.every", self.log.every, 1),
            ("log.checkpoint-every", self.log.checkpoint_every, 1),
            ("log.checkpoint-overlap", self.log.checkpoint_overlap, 0),
            ("log.keep-checkpoints", self.log.keep_checkpoints, 2),
            ("log.keep-every", self.log.keep_every, 1),
            ("log.snapshot-every", self.log.snapshot_every, 1),
            ("log.sample-every", self.log.sample_every, 0),
            ("log.sample-count", self.log.sample_count, 1),
            ("log.sample-steps", self.log.sample_steps, 1),
            ("sampling.steps", self.sampling.steps, 1),
        ]
        found = [
            f"--{flag} is {value}; it must be at least {least}"
            for flag, value, least in at_least
            if value is not None and value < least
        ]
        for flag, positive in [
            ("optimizer.learning-rate", self.optimizer.learning_rate),
            ("optimizer.clip-norm", self.optimizer.clip_norm),
            ("model.norm-eps", self.model.norm_eps),
            ("model.mid-block-scale-factor", self.model.mid_block_scale_factor),
        ]:
            if not positive > 0:
                found.append(f"--{flag} is {positive}; it must be positive")
        for flag, rate in [
            ("training.ema-decay", self.training.ema_decay),
            ("training.label-dropout", self.training.label_dropout),
            ("model.dropout", self.model.dropout),
        ]:
            if not 0 <= rate < 1:
                found.append(f"--{flag} is {rate}; it must lie in [0, 1)")
        for flag, value in [
            ("optimizer.eps", self.optimizer.eps),
            ("optimizer.weight-decay", self.optimizer.weight_decay),
        ]:
            if not value >= 0:
                found.append(f"--{flag} is {value}; it must not be negative")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            found.append(f"--optimizer.betas are {self.optimizer.betas}; each must lie in [0, 1)")
        if self.model.downsample_padding not in (0, 1):
            found.append(
                f"--model.downsample-padding is {self.model.downsample_padding}; it must be 0 or 1"
            )
        if self.training.augmentation_levels > MAX_LEVEL + 1:
            found.append(
                f"--training.augmentation-levels is {self.training.augmentation_levels}; it must "
                f"be at most {MAX_LEVEL + 1}, for levels 0 to {MAX_LEVEL}"
            )
        lengths = self.training.ema_profiles
        longest = 12**-0.5  # that of the plain mean of all steps
        distinct = len({f"{length:g}" for length in lengths}) == len(lengths)
        if not distinct or not all(0 < length <= longest for length in lengths):
            found.append(
                f"--training.ema-profiles are {lengths}; give different lengths, each above 0 and "
                f"at most {longest:.4f}, as 0.05 0.1"
            )
        if not 0 <= self.sampling.eta <= 1:
            found.append(f"--sampling.eta is {self.sampling.eta}; it must lie in [0, 1]")
        found += self._data_problems()
        found += self._edm_problems()
        found += self._objective_problems()
        if self.distillation.teacher is not None:
            found += self._distillation_problems()
        if self.diffusion.zero_terminal_snr:
            if self.diffusion.prediction == "eps":
                found.append(
                    "--diffusion.prediction is eps, but --diffusion.zero-terminal-snr leaves only "
                    "noise at the last timestep, which then says nothing of the image; use v or x0"
                )
            if self.diffusion.timesteps < 2:
                found.append(
                    f"--diffusion.timesteps is {self.diffusion.timesteps}; "
                    "--diffusion.zero-terminal-snr needs at least 2"
                )
            if self.sampling.sampler in ("euler", "heun"):
                found.append(
                    f"--sampling.sampler is {self.sampling.sampler}, whose spacing needs a finite "
                    "sigma; with --diffusion.zero-terminal-snr take another"
                )
        for flag, steps in [
            ("sampling.steps", self.sampling.steps),
            ("log.sample-steps", self.log.sample_steps),
        ]:
            if steps is not None and steps > self.diffusion.timesteps:
                found.append(
                    f"--{flag} is {steps}; there are only --diffusion.timesteps "
                    f"{self.diffusion.timesteps} to visit"
                )
        return found

    def _objective_problems(self) -> list[str]:
        objective, channels = self.objective, self.model.in_channels
        found = []
        for flag, positive in [
            ("min-snr-gamma", objective.min_snr_gamma),
            ("p2-k", objective.p2_k),
            ("logit-std", objective.logit_std),
        ]:
            if not positive > 0:
                found.append(f"--objective.{flag} is {positive}; it must be positive")
        for flag, value in [
            ("p2-gamma", objective.p2_gamma),
            ("offset-noise", objective.offset_noise),
        ]:
            if not value >= 0:
                found.append(f"--objective.{flag} is {value}; it must not be negative")
        learned = objective.learned_variance
        outputs = 2 * channels if learned else channels
        if self.model.out_channels != outputs:
            found.append(
                f"--model.out-channels is {self.model.out_channels}; with --model.in-channels "
                f"{channels} and {'' if learned else 'no '}--objective.learned-variance it must be "
                f"{outputs}"
            )
        if self.sampling.variance == "learned_range" and not learned:
            found.append(
                "--sampling.variance is learned_range, but without --objective.learned-variance "
                f"(and --model.out-channels {2 * channels}) the network learns none"
            )
        if learned and objective.weighting == "vlb":
            found.append(
                "--objective.weighting vlb is the bound of a fixed variance; with "
                "--objective.learned-variance, which adds the bound's own term, take another"
            )
        if objective.offset_noise and (learned or objective.weighting == "vlb"):
            given = "--objective.learned-variance" if learned else "--objective.weighting vlb"
            found.append(
                f"--objective.offset-noise is {objective.offset_noise}, but the bound that {given} "
                "asks for is that of independent noise"
            )
        if self.diffusion.zero_terminal_snr and objective.weighting in ("min-snr", "p2"):
            found.append(
                f"--objective.weighting is {objective.weighting}, which gives no weight to the "
                "last timestep with --diffusion.zero-terminal-snr, where sampling begins; take "
                "simple or vlb"
            )
        return found

    def _edm_problems(self) -> list[str]:
        diffusion, objective = self.diffusion, self.objective
        plain = ObjectiveConfig()
        found = []
        if diffusion.schedule == "edm" and not 0 < diffusion.sigma_min < diffusion.sigma_max:
            found.append(
                f"--diffusion.sigma-min is {diffusion.sigma_min} and --diffusion.sigma-max "
                f"{diffusion.sigma_max}; the first must be positive, the second larger"
            )
        if diffusion.schedule == "edm" and diffusion.timesteps < 2:
            found.append(
                f"--diffusion.timesteps is {diffusion.timesteps}; --diffusion.schedule edm needs "
                "at least 2"
            )
        if not diffusion.sigma_data > 0:
            found.append(f"--diffusion.sigma-data is {diffusion.sigma_data}; it must be positive")
        if not objective.p_std > 0:
            found.append(f"--objective.p-std is {objective.p_std}; it must be positive")
        if diffusion.prediction != "edm":
            for name in ("p_mean", "p_std"):
                if getattr(objective, name) != getattr(plain, name):
                    found.append(
                        f"--objective.{name.replace('_', '-')} does nothing unless "
                        "--diffusion.prediction is edm"
                    )
            return found
        if diffusion.schedule != "edm" or diffusion.betas is not None:
            found.append(
                "--diffusion.prediction is edm, whose samplers need noise levels that are even in "
                "log sigma: --diffusion.schedule edm, without betas"
            )
        if diffusion.zero_terminal_snr:
            found.append(
                "--diffusion.prediction is edm, which is told the log of sigma; it cannot be "
                "infinite, as with --diffusion.zero-terminal-snr"
            )
        if self.sampling.variance == "learned_range":
            found.append(
                "--sampling.variance is learned_range, but --diffusion.prediction edm predicts no "
                "variance"
            )
        for name, value in asdict(objective).items():
            if name not in ("p_mean", "p_std") and value != getattr(plain, name):
                found.append(
                    f"--objective.{name.replace('_', '-')} is {value}, but --diffusion.prediction "
                    "edm has its own weighting and noise levels (p-mean, p-std); leave it out"
                )
        return found

    def _distillation_problems(self) -> list[str]:
        plan, sampling = self.distillation, self.sampling
        if plan.method == "moments":
            found = self._moments_problems()
        elif plan.steps < 1 or plan.stages < 1 or plan.start_steps != plan.steps << plan.stages:
            return [
                f"--distillation.start-steps is {plan.start_steps} and --distillation.steps "
                f"{plan.steps}; the first must be 2, 4, 8, … times the second, as 64 and 4"
            ]
        else:
            found = []
            if plan.student is not None:
                found.append(
                    f"--distillation.student is {plan.student}, but students of {plan.method} "
                    "distillation begin as their teacher; leave it out, or choose "
                    "--distillation.method moments"
                )
        if plan.start_steps > self.diffusion.timesteps:
            found.append(
                f"--distillation.start-steps is {plan.start_steps}; there are only "
                f"--diffusion.timesteps {self.diffusion.timesteps} to visit"
            )
        if self.training.steps < plan.stages:
            found.append(
                f"--training.steps is {self.training.steps}; from {plan.start_steps} steps to "
                f"{plan.steps} there are {plan.stages} stages, and each needs one at least"
            )
        if plan.guidance_scale is not None and self.model.num_class_embeds is None:
            found.append(
                f"--distillation.guidance-scale is {plan.guidance_scale}, but the teacher was "
                "trained without classes; leave it out"
            )
        made_for = plan.sampling
        if made_for.sampler == "ddim":
            made_for = replace(made_for, variance=sampling.variance)  # it has no say there
        if sampling != made_for:
            found.append(
                f"--sampling.* are {sampling.sampler}, {sampling.steps} steps, {sampling.spacing}, "
                f"{sampling.variance}, eta {sampling.eta}; a network of this distillation is drawn "
                f"with by {made_for.sampler}, {plan.steps} steps, trailing, {made_for.variance}, "
                "eta 0"
            )
        learned = self.objective.learned_variance
        if self.objective != ObjectiveConfig(learned_variance=learned):
            found.append(
                "--objective.* say what ordinary training minimises; with a teacher, leave them out"
            )
        return found

    def _moments_problems(self) -> list[str]:
        plan, found = self.distillation, []
        if plan.steps < 1 or plan.start_steps != plan.steps:
            found.append(
                f"--distillation.start-steps is {plan.start_steps} and --distillation.steps "
                f"{plan.steps}; moments takes no more of its teacher, so both must be the same"
            )
        if plan.student is None:
            found.append(
                "--distillation.method is moments, which goes on from a student: distil the "
                f"teacher to {plan.steps} steps by progressive distillation first, and name that "
                "run with --distillation.student"
            )
        if self.diffusion.prediction == "edm":
            found.append(
                "--distillation.method is moments and the teacher predicts edm; its samplers have "
                "no ancestral steps, so choose progressive or consistency"
            )
        if self.training.precision == "fp16":
            found.append(
                "--distillation.method is moments and --training.precision fp16, in which the "
                "critic's gradients would vanish; use bf16 or no"
            )
        if self.objective.learned_variance:
            found.append(
                "--distillation.method is moments, whose steps have the posterior's variance, and "
                "the teacher has learnt its own; choose progressive or consistency"
            )
        return found

    def _data_problems(self) -> list[str]:
        found = []
        data = self.data
        if data.mix_with and len(data.weights) != 1 + len(data.mix_with):
            found.append(
                f"--data.weights has {len(data.weights)} entries for {1 + len(data.mix_with)} sets "
                "(--data.path and --data.mix-with); give one for each"
            )
        if data.weights and not data.mix_with:
            found.append("--data.weights is given without --data.mix-with; name the other sets")
        if any(weight < 1 for weight in data.weights):
            found.append(f"--data.weights are {data.weights}; each must be at least 1")
        if not data.cache_gb > 0:
            found.append(f"--data.cache-gb is {data.cache_gb}; it must be positive")
        return found

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, from the step alone: how many were done before; annealed in stages."""
        warm = min(1.0, (step + 1) / max(self.optimizer.warmup_steps, 1))
        annealing = self.distillation.annealing(step, self.training.steps)
        return self.optimizer.learning_rate * warm * annealing

    def validate(self) -> None:
        """Check the values themselves.

        Raises:
            UserError: reports every problem at once.
        """
        if found := self.problems():
            raise UserError("\n       ".join(found))


@cache
def _converter() -> Any:
    # Imported here, so that networks can be built from a configuration with torch alone.
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook_func(
        lambda kind: kind == Path | str, lambda value, _: str(value)
    )
    return converter


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values."""
    values: dict[str, Any] = _converter().unstructure(config)
    return values


def from_dict(values: dict[str, Any], origin: str) -> RunConfig:
    """The inverse of `to_dict`; every unknown or ill-typed entry is reported.

    Raises:
        UserError: naming `origin` and the entries at fault.
    """
    import cattrs

    try:
        config: RunConfig = _converter().structure(values, RunConfig)
        return config
    except cattrs.BaseValidationError as error:
        reasons = "\n       ".join(cattrs.transform_error(error, path="config"))
        raise UserError(f"{origin} is not a run configuration:\n       {reasons}") from None


def load_config(path: Path) -> RunConfig:
    """Read a `config.json`, or that of a run directory.

    Raises:
        UserError: no such file, not JSON, or not a run configuration.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no configuration at {file}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    return from_dict(values, str(file))


def dump_config(config: RunConfig) -> str:
    """The configuration as indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def flatten(config: RunConfig) -> dict[str, Any]:
    """The configuration as `{"training.steps": …}`, named as on the command line."""
    flat: dict[str, Any] = {}

    def visit(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            key = prefix + name.replace("_", "-")
            if isinstance(value, dict):
                visit(value, key + ".")
            else:
                flat[key] = value

    visit(asdict(config), "")
    return flat
