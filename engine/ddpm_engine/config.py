"""Everything a run can set: a tree of frozen dataclasses, and presets as functions that return it.

The field docstrings are the help texts of `launch/train.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from ddpm_engine.errors import UserError
from ddpm_engine.low_resolution import MAX_LEVEL
from ddpm_engine.prediction import Prediction
from ddpm_engine.samplers.ddpm import Variance
from ddpm_engine.samplers.registry import Sampler
from ddpm_engine.samplers.spacing import Spacing
from ddpm_engine.schedule import NoiseSchedule


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; names and meaning as in diffusers' `UNet2DModel`."""

    sample_size: int = 32
    """Image side in pixels."""
    in_channels: int = 3
    """Channels of the noisy image."""
    out_channels: int = 3
    """Channels predicted."""
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of each resolution level, highest resolution first."""
    down_block_types: tuple[Literal["DownBlock2D", "AttnDownBlock2D"], ...] = (
        "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D",
    )  # fmt: skip
    """Which levels attend, on the way down."""
    up_block_types: tuple[Literal["UpBlock2D", "AttnUpBlock2D"], ...] = (
        "UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D",
    )  # fmt: skip
    """Which attend, on the way up, lowest first."""
    layers_per_block: int = 2
    """Residual blocks of each level on the way down (one more on the way up)."""
    attention_head_dim: int | None = None
    """Channels of an attention head; None: one head."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    attn_norm_num_groups: int | None = None
    """Those of the middle attention; None: the same, or no norm if scale_shift."""
    norm_eps: float = 1e-6
    """Epsilon of every GroupNorm."""
    dropout: float = 0.0
    """Share of activations dropped inside the residual blocks, 0 to 1."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """The time embedding is added, or is scale and shift of the second norm."""
    downsample_padding: int = 0
    """0: pad right and bottom by one, as the paper's code; 1: pad all sides."""
    mid_block_scale_factor: float = 1.0
    """The middle block's residual sums are divided by this."""
    flip_sin_to_cos: bool = False
    """Time embedding as [cos, sin] instead of the paper's [sin, cos]."""
    freq_shift: int = 1
    """Subtracted from the frequency count in the time embedding's exponent."""
    num_class_embeds: int | None = None
    """Rows of the class embedding, null class included; None: unconditional."""
    low_resolution: int | None = None
    """Side in pixels of the small image that the network enlarges, a divisor of the sample size;
    None: it is shown none."""
    attention: Literal["sdpa", "xformers", "auto"] = "sdpa"
    """Whose kernel: torch's, xformers', or the best available."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process and what the network predicts."""

    schedule: Literal["linear", "cosine", "sigmoid", "edm"] = "linear"
    """Shape of the noise schedule; edm: log sigma rises linearly."""
    timesteps: int = 1000
    """T, the length of the chain, in steps."""
    beta_start: float = 1e-4
    """First beta of the linear schedule."""
    beta_end: float = 0.02
    """Last beta of the linear schedule."""
    betas: tuple[float, ...] | None = None
    """The betas themselves, one for each timestep; None: the shape describes them."""
    sigma_min: float = 0.002
    """First noise level sigma of the edm schedule, where sampling ends."""
    sigma_max: float = 80.0
    """Last noise level of the edm schedule, where sampling begins."""
    sigma_data: float = 0.5
    """Deviation of the images' values, of −1 to 1, that edm prediction is made for."""
    prediction: Prediction = "eps"
    """What the network predicts: the noise, the clean image or the velocity; edm: a mixture of
    image and noise, at any noise level (Karras et al. 2022), with the edm schedule."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that no signal is left at the last timestep (not for eps)."""

    def build_schedule(self) -> NoiseSchedule:
        """The noise schedule that this describes.

        Raises:
            UserError: as `NoiseSchedule`, or `betas` and `timesteps` contradict each other.
        """
        if self.betas is not None:
            if len(self.betas) != self.timesteps:
                raise UserError(
                    f"betas has {len(self.betas)} entries but timesteps is {self.timesteps}; "
                    "give one for each timestep"
                )
            schedule = NoiseSchedule(torch.tensor(self.betas, dtype=torch.float64))
        elif self.schedule == "linear":
            schedule = NoiseSchedule.linear(self.timesteps, self.beta_start, self.beta_end)
        elif self.schedule == "cosine":
            schedule = NoiseSchedule.cosine(self.timesteps)
        elif self.schedule == "edm":
            schedule = NoiseSchedule.edm(
                self.timesteps, self.sigma_min, self.sigma_max, self.sigma_data
            )
        else:
            schedule = NoiseSchedule.sigmoid(self.timesteps)
        return schedule.rescaled_to_zero_terminal_snr() if self.zero_terminal_snr else schedule

    @property
    def clip(self) -> bool:
        """Whether samplers clip estimates of x_0 to [-1, 1]; EDM's do not."""
        return self.prediction != "edm"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises."""

    weighting: Literal["simple", "vlb", "min-snr", "p2"] = "simple"
    """Weight of each timestep's squared error; simple: all alike."""
    min_snr_gamma: float = 5.0
    """min-snr: the signal-to-noise ratio beyond which timesteps weigh no more."""
    p2_gamma: float = 1.0
    """p2: how strongly timesteps of little noise are weighed down."""
    p2_k: float = 1.0
    """p2: the signal-to-noise ratio from which on they are."""
    learned_variance: bool = False
    """Learn the variance of each step too, from the bound: the hybrid objective."""
    timestep_sampling: Literal["uniform", "logit-normal", "importance"] = "uniform"
    """How often each timestep is trained; importance: by how much its loss varies."""
    logit_mean: float = 0.0
    """logit-normal: mean of log(t / (T − t))."""
    logit_std: float = 1.0
    """logit-normal: standard deviation of log(t / (T − t))."""
    offset_noise: float = 0.0
    """Standard deviation of noise added to each channel as a whole; images span −1 to 1."""
    p_mean: float = -1.2
    """edm prediction: mean of the log of the noise levels sigma that are trained."""
    p_std: float = 1.2
    """edm prediction: standard deviation of that log."""


def is_location(path: str) -> bool:
    """Whether a string is a URL, or a command for a pipe, rather than a path."""
    return "://" in path or path.startswith("pipe:")


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
class SamplingConfig:
    """How pictures are drawn, during training and by default afterwards."""

    sampler: Sampler = "ddpm"
    """Which coefficient table."""
    steps: int | None = None
    """Steps a picture, each one network evaluation, or two with heun; None: all T."""
    spacing: Spacing = "trailing"
    """Which timesteps are visited when there are fewer than T (not euler and heun)."""
    variance: Variance = "fixed_large"
    """Variance of ancestral sampling (ddpm); learned_range: by the network's other half."""
    eta: float = 0.0
    """Share of fresh noise in ddim: 0 draws none, 1 is ddpm with fixed_small variance."""


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


DistillationMethod = Literal["progressive", "consistency", "moments"]


@dataclass(frozen=True)
class DistillationConfig:
    """Learning to take one step where the teacher takes many.

    A run is divided into stages of equal length. In those of `progressive` distillation the student
    takes half as many steps as before and is the next stage's teacher; in those of `consistency`
    distillation the teacher takes twice as many. `moments` has one stage, and no steps of its
    teacher: it makes a student of another method better.
    """

    teacher: Path | None = None
    """Run, checkpoint or diffusers folder to distil; None: ordinary training."""
    method: DistillationMethod = "progressive"
    """Learn two steps of the last student at a time, to agree with oneself one step later, or to
    draw what the teacher expects."""
    steps: int = 4
    """Steps that the last student draws a picture in: of ddim, or with `moments`, of ddpm."""
    start_steps: int = 64
    """Most steps of ddim that a teacher takes: a power of two times as many; with `moments`, as
    many."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the teacher, which its students then have built in; None: none.
    """
    student: Path | None = None
    """Run that has been distilled to as many steps, to go on from with `moments`."""

    @property
    def sampling(self) -> SamplingConfig:
        """How the last student draws."""
        if self.method == "moments":
            return SamplingConfig("ddpm", self.steps, "trailing", "fixed_small")
        return SamplingConfig("ddim", self.steps, "trailing")

    @property
    def stages(self) -> int:
        """How often the number of steps is halved, or doubled; or 1."""
        if self.method == "moments":
            return 1
        return (self.start_steps // self.steps).bit_length() - 1

    def stage(self, step: int, training_steps: int) -> int:
        """The stage, from 0, that optimizer step `step` of `training_steps` belongs to."""
        return step * self.stages // training_steps

    def student_steps(self, stage: int) -> int:
        """Steps of ddim that a stage's student takes."""
        return self.start_steps >> (stage + 1) if self.method == "progressive" else self.steps

    def teacher_steps(self, stage: int) -> int:
        """Steps of ddim that a stage's teacher takes."""
        return (
            self.start_steps >> stage if self.method == "progressive" else 2 * self.steps << stage
        )

    def annealing(self, step: int, training_steps: int) -> float:
        """Factor of the learning rate: from 1 linearly towards 0, or 1 if nothing is distilled.

        With each new teacher of `progressive` it begins again, as in Salimans & Ho 2022.
        """
        if self.teacher is None:
            return 1.0
        repeats = self.stages if self.method == "progressive" else 1
        return 1 - step * repeats % training_steps / training_steps


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


def digits() -> RunConfig:
    """Scikit-learn's handwritten digits at 16×16: minutes on a laptop."""
    return RunConfig(
        out=Path("runs/digits"),
        data=DataConfig(path=Path("data/digits"), source="digits", workers=1),
        model=UNetConfig(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200),
        training=TrainingConfig(steps=3000, batch_size=64, ema_decay=0.998),
        sampling=SamplingConfig(steps=250, variance="fixed_small"),
        log=LogConfig(every=100, checkpoint_every=500, sample_every=1000, sample_steps=50),
    )


def digits_classes() -> RunConfig:
    """The digits with their classes, and the null class, for classifier-free guidance."""
    base = digits()
    model = replace(base.model, num_class_embeds=11)
    return replace(base, out=Path("runs/digits-classes"), model=model)


def digits_upscale() -> RunConfig:
    """Enlarges digits of 8×8, as scikit-learn has them, to 16×16."""
    base = digits()
    model = replace(base.model, low_resolution=8)
    return replace(base, out=Path("runs/digits-upscale"), model=model)


def photos() -> RunConfig:
    """32×32 squares of scikit-learn's two photographs, in colour: minutes on a laptop."""
    return RunConfig(
        out=Path("runs/photos"),
        data=DataConfig(path=Path("data/photos"), source="photos", horizontal_flip=True, workers=1),
        model=UNetConfig(
            sample_size=32,
            block_out_channels=(16, 32, 64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200),
        training=TrainingConfig(steps=3000, batch_size=32, ema_decay=0.998),
        sampling=SamplingConfig(steps=250, variance="fixed_small"),
        log=LogConfig(every=100, checkpoint_every=500, sample_every=1000, sample_steps=50),
    )


def digits_edm() -> RunConfig:
    """The digits, trained and sampled as EDM does."""
    preset = digits()
    return replace(
        preset,
        out=Path("runs/digits-edm"),
        diffusion=DiffusionConfig(schedule="edm", prediction="edm"),
        sampling=SamplingConfig(sampler="heun", steps=18),
        log=replace(preset.log, sample_steps=18),
    )


def cifar10() -> RunConfig:
    """CIFAR-10 as Ho et al. 2020: 35.7M parameters, 800k steps."""
    return RunConfig(
        out=Path("runs/cifar10"),
        data=DataConfig(path=Path("data/cifar10"), horizontal_flip=True),
        model=UNetConfig(dropout=0.1),
    )


def cifar10_edm() -> RunConfig:
    """CIFAR-10 without classes as Karras et al. 2022: 200 million images in batches of 512.

    Width, depth, attention at 16×16, dropout, learning rate, warm-up, half-life of the average
    (500k images) and sampling are those of their configuration for DDPM++. Different from it:
    images are mirrored and not augmented otherwise, where theirs are transformed geometrically with
    probability 0.12 and the network is told how; residual sums are not divided by sqrt(2); images
    are halved and doubled between residual blocks, not in them; on the way up all blocks of the
    16×16 level attend, not the last alone; initial weights are torch's; gradients are clipped; the
    average's warm-up is this engine's.
    """
    batch = 512
    return RunConfig(
        out=Path("runs/cifar10-edm"),
        data=DataConfig(path=Path("data/cifar10"), horizontal_flip=True),
        model=UNetConfig(
            block_out_channels=(256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=4,
            dropout=0.13,
        ),
        diffusion=DiffusionConfig(schedule="edm", prediction="edm"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10_000_000 // batch),
        training=TrainingConfig(
            steps=200_000_000 // batch, batch_size=batch, ema_decay=0.5 ** (batch / 500_000)
        ),
        sampling=SamplingConfig(sampler="heun", steps=18),
        log=LogConfig(sample_steps=18),
    )


def _paper256(name: str, steps: int) -> RunConfig:
    attending = 4  # the 16×16 level
    return RunConfig(
        out=Path("runs") / name,
        data=DataConfig(path=Path("data") / name, workers=8),
        model=UNetConfig(
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=tuple(
                "AttnDownBlock2D" if level == attending else "DownBlock2D" for level in range(6)
            ),
            up_block_types=tuple(
                "AttnUpBlock2D" if level == attending else "UpBlock2D"
                for level in reversed(range(6))
            ),
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        training=TrainingConfig(steps=steps, batch_size=64),
        sampling=SamplingConfig(variance="fixed_small"),
    )


def celebahq256() -> RunConfig:
    """CelebA-HQ at 256×256 as Ho et al. 2020: 114M parameters, 500k steps."""
    return _paper256("celebahq256", steps=500_000)


def lsun256() -> RunConfig:
    """LSUN Bedroom at 256×256 as Ho et al. 2020: 2.4M steps (Cat: 1.8M, Church: 1.2M)."""
    return _paper256("lsun256", steps=2_400_000)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        digits,
        digits_classes,
        digits_upscale,
        digits_edm,
        photos,
        cifar10,
        cifar10_edm,
        celebahq256,
        lsun256,
    )
}
