"""The model card of an export: what the model is, where it came from, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from ddpm_engine.checkpoints.lazy_codec import LazyCodec
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.data.classes import listed
from ddpm_engine.interop.scheduler import EDM_CLASS, FLOW_CLASSES, scheduler_entries
from ddpm_engine.networks.files.layout import EXPORT_MARK
from ddpm_engine.networks.stored import StoredNetwork
from ddpm_engine.sizes import as_text, height_and_width

MARK = f"{EXPORT_MARK}; exporting again replaces this file. -->"


def model_card(pretrained: LoadedModel, weights: str) -> str:
    """The `README.md` of an export, with the hub's front matter.

    Args:
        pretrained: what was exported.
        weights: which of the run's weights they are, `"ema"` or `"model"`.
    """
    shape, diffusion = pretrained.config.model, pretrained.config.diffusion
    sampling = pretrained.config.sampling
    network = _network(pretrained)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    schedule = f"{diffusion.schedule}, β from {diffusion.beta_start:g} to {diffusion.beta_end:g}"
    if diffusion.betas is not None:
        schedule = "given beta by beta"
    elif diffusion.schedule == "edm":
        schedule = f"edm, σ from {diffusion.sigma_min:g} to {diffusion.sigma_max:g}"
        if diffusion.prediction == "edm":
            schedule += f", σ_data {diffusion.sigma_data:g}"
    elif diffusion.schedule == "flow":
        schedule = f"flow, shift {diffusion.shift:g}"
    elif diffusion.schedule != "linear":
        schedule = diffusion.schedule
    architecture = {
        **network.format.description(shape),
        "pictures": f"{as_text(shape.sample_size)}, {shape.in_channels} channels",
        "parameters": f"{parameters:,}",
    }
    process = {
        "schedule": f"{schedule}, T = {diffusion.timesteps}",
        "the network predicts": diffusion.prediction,
        "variance of ancestral sampling": sampling.variance,
        "spacing of fewer timesteps": sampling.spacing,
        "sampler and steps of the run": f"{sampling.sampler}, "
        + str(sampling.steps or diffusion.timesteps),
    }
    distillation = pretrained.config.distillation
    if distillation.teacher is not None:
        process["distilled"] = (
            f"from `{distillation.teacher.resolve().name}`, to {sampling.steps} steps, by "
            f"{distillation.method} distillation"
        )
        if distillation.guidance_scale is not None:
            process["distilled"] += f"; guidance {distillation.guidance_scale:g} is built in"
    if shape.num_class_embeds is not None:
        process["classes"] = (
            f"{shape.num_class_embeds - 1}, and label {shape.num_class_embeds - 1} for no class"
        )
        if pretrained.classes is not None:
            process["classes"] += f": {listed(pretrained.classes)}"
    return "\n".join(
        [
            "---", "library_name: diffusers", "tags: [ddpm]",
            "---", MARK, "", "# A denoising diffusion model", "",
            _table({**architecture, **process, **_origin(pretrained, weights)}), "",
            *_usage(pretrained),
        ]
    )  # fmt: skip


def _origin(pretrained: LoadedModel, weights: str) -> dict[str, str]:
    checkpoint, training = pretrained.checkpoint, pretrained.config.training
    if checkpoint is None:
        return {"origin": "a model of diffusers", "sha256 of its weights": f"`{pretrained.hash}`"}
    averaged = f"moving average, decay {training.ema_decay}"
    return {
        "optimizer steps": f"{checkpoint.step:,} of {training.batch_size} images",
        "weights": averaged if weights == "ema" else "those of the last step",
        "fingerprint of the data": f"`{checkpoint.state.get('data', 'unknown')}`",
        "seed": str(training.seed),
        "hash of the checkpoint": f"`{checkpoint.hash}`",
    }


def _usage(pretrained: LoadedModel) -> list[str]:
    sampling = pretrained.config.sampling
    all_steps = pretrained.config.diffusion.timesteps
    steps = sampling.steps or all_steps
    labelled = pretrained.network.conditioning.null_class is not None
    distilled = pretrained.config.distillation.teacher is not None
    pipelines = _network(pretrained).format.pipelines_of(pretrained.config.model)
    theirs = [f"    batch_size=4, num_inference_steps={steps}"]
    if sampling.spacing == "trailing":
        theirs = [
            "    # With fewer steps its scheduler leaves noise in the finished pictures, unless",
            "    # timestep_spacing is leading or linspace: trailing does not end at timestep 0.",
            f"    batch_size=4, num_inference_steps={all_steps}",
        ]
    scheduler = scheduler_entries(pretrained.config.diffusion, sampling)["_class_name"]
    if isinstance(pretrained.codec, LazyCodec):
        diffusers = _latent_usage(pretrained, steps)
    elif scheduler == EDM_CLASS:
        diffusers = _loop(pretrained, scheduler, steps)
    elif scheduler in FLOW_CLASSES.values():
        diffusers = _loop(pretrained, scheduler, steps, scaled=False)
    elif distilled and (labelled or not pipelines):
        diffusers = _loop(pretrained, "DDIMScheduler", steps, ", use_clipped_model_output=True")
    elif not pipelines:
        diffusers = _loop(pretrained, "DDPMScheduler", steps)
    elif distilled:
        diffusers = [
            "from diffusers import DDIMPipeline", "",
            'images = DDIMPipeline.from_pretrained("DIR")(',
            "    batch_size=4,",
            f"    num_inference_steps={steps},",
            "    eta=0.0,",
            "    use_clipped_model_output=True,",
            ").images",
        ]  # fmt: skip
    elif not labelled:
        diffusers = [
            "from diffusers import DDPMPipeline", "",
            'images = DDPMPipeline.from_pretrained("DIR")(',
            *theirs, ").images",
        ]  # fmt: skip
    else:
        diffusers = [
            "from diffusers import DDPMScheduler, UNet2DModel", "",
            "# The network wants class labels, which DDPMPipeline does not pass.",
            'unet = UNet2DModel.from_pretrained("DIR", subfolder="unet")',
            'scheduler = DDPMScheduler.from_pretrained("DIR", subfolder="scheduler")',
            "# unet(x, t, class_labels=labels).sample",
        ]  # fmt: skip
    command = f"python launch/sample.py --checkpoint DIR --out samples --steps {steps}"
    ours = ["import ddpm_engine", "", 'images = ddpm_engine.load("DIR").sample(4).images']
    note = []
    if distilled:
        note = [
            "The network has learned these steps and no others: with another number of them, with "
            "`eta`, or without re-deriving the noise from the clipped image "
            "(`use_clipped_model_output`), the samples are worse.", "",
        ]  # fmt: skip
    return [
        "With diffusers:", "", "```python", *diffusers, "```", "", *note,
        "With ddpm-engine:", "", "```", command, "```", "", "```python", *ours, "```", "",
    ]  # fmt: skip


def _latent_usage(pretrained: LoadedModel, steps: int) -> list[str]:
    spec = pretrained.network.conditioning
    asked = '"a prompt"' if spec.text is not None else "class_labels=[0]"
    return [
        "from diffusers import DiffusionPipeline", "",
        "# Where the index names a pipeline that diffusers has; else take the parts.",
        'pipeline = DiffusionPipeline.from_pretrained("DIR")',
        f"images = pipeline({asked}, num_inference_steps={steps}).images",
    ]  # fmt: skip


def _loop(
    pretrained: LoadedModel, scheduler: str, steps: int, options: str = "", scaled: bool = True
) -> list[str]:
    """Sampling loop where no pipeline exists, with `options` for each scheduler step.

    `scaled`: whether the scheduler has factors for the noise and for the network's input.
    """
    shape, form = pretrained.config.model, _network(pretrained).format
    kind, spec = form.class_name(shape), pretrained.network.conditioning
    height, width = height_and_width(shape.sample_size)
    given = {
        ", text, encoder_attention_mask=mask": spec.text,
        ", class_labels=labels": spec.classes,
        ", class_labels=vectors": spec.vector,
    }
    conditions = "".join(name for name, value in given.items() if value is not None)
    seen = "seen" if scaled else "x"
    return [
        "import torch", f"from diffusers import {scheduler}, {kind}", "",
        f'{form.part} = {kind}.from_pretrained("DIR", subfolder="{form.part}")',
        f'scheduler = {scheduler}.from_pretrained("DIR", subfolder="scheduler")',
        f"scheduler.set_timesteps({steps})",
        f"x = torch.randn(4, {shape.in_channels}, {height}, {width})",
        *(["x = x * scheduler.init_noise_sigma"] if scaled else []),
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        *(["        seen = scheduler.scale_model_input(x, t)"] if scaled else []),
        f"        output = {form.part}({seen}, t.expand(4){conditions}).sample",
        f"        x = scheduler.step(output, t, x{options}).prev_sample",
        "# x is around [-1, 1]",
    ]  # fmt: skip


def _network(pretrained: LoadedModel) -> StoredNetwork:
    """Return the network, of which diffusers has one."""
    network = pretrained.network
    assert isinstance(network, StoredNetwork), "checked before anything is written"
    return network


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
