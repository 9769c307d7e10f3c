"""Checkpoints exchanged with diffusers, which writes them and reads ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests import tiny
from torch import Tensor, nn

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.interop.scheduler import read_scheduler, scheduler_entries
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.networks.unet.files import read_config
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.samplers.config import SamplerName, SamplingConfig
from ddpm_kernels import Stream, gaussian_noise

diffusers = pytest.importorskip("diffusers")
from diffusers.pipelines.ddim import pipeline_ddim  # noqa: E402
from diffusers.pipelines.ddpm import pipeline_ddpm  # noqa: E402
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

TINY: dict[str, Any] = {name: getattr(tiny.TINY, name) for name in (
    "sample_size", "block_out_channels", "down_block_types", "up_block_types", "norm_num_groups",
    "layers_per_block",
)}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one_head": {"attention_head_dim": None},
    "cifar10_like": {
        "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False,
        "freq_shift": 1, "norm_eps": 1e-6,
    },
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_with_norm": {
        "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2,
    },
    "swish": {"act_fn": "swish"},
    "classes": {"num_class_embeds": 5},
    "learned_variance": {"out_channels": 6},
}  # fmt: skip


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def theirs(**changes: Any) -> Any:
    peer = diffusers.UNet2DModel(**{**TINY, **changes}).eval()
    randomise(peer)
    return peer


def ours(config: UNetConfig | None = None, **run: Any) -> LoadedModel:
    """A network of ours as if a run had trained it."""
    model = UNet(config or UNetConfig(**TINY)).eval().requires_grad_(False)
    randomise(model)
    whole = RunConfig(model=model.config, **run)
    return LoadedModel.from_config(model, whole, "0" * 64)


def assert_same_bits(actual: nn.Module, expected: nn.Module) -> None:
    first, second = actual.state_dict(), expected.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_same_network(actual: UNet, expected: Any, classes: bool = False) -> None:
    assert_same_bits(actual, expected)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    timesteps, labels = torch.tensor([0, 500, 999]), torch.tensor([0, 3, 4]) if classes else None
    with torch.no_grad():
        output = expected(x, timesteps, class_labels=labels).sample
        difference = (actual(x, timesteps, Conditioning(labels)) - output).abs().max().item()
    assert output.std() > 0.2
    assert difference <= 1e-5


# --- Reading


@pytest.mark.parametrize("name", VARIANTS)
def test_what_diffusers_saved(name: str, tmp_path: Path) -> None:
    peer = theirs(**VARIANTS[name])
    peer.save_pretrained(tmp_path)
    assert_same_network(UNet.from_pretrained(tmp_path), peer, classes=name == "classes")


@pytest.mark.parametrize("how", [{"safe_serialization": False}, {"max_shard_size": "20KB"}])
def test_other_files(how: dict[str, Any], tmp_path: Path) -> None:
    peer = theirs().half()  # which is read exactly
    peer.save_pretrained(tmp_path, **how)
    peer = peer.float()
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert_same_network(UNet.from_pretrained(str(tmp_path)), peer)


@pytest.mark.parametrize("flat", [False, True])
def test_both_layouts(flat: bool, tmp_path: Path) -> None:
    peer = theirs()
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=False)
    if flat:
        peer.save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
    else:
        diffusers.DDPMPipeline(unet=peer, scheduler=scheduler).save_pretrained(tmp_path)
    pretrained = load_model(tmp_path)
    assert_same_network(pretrained.network, peer)
    assert pretrained.config.sampling == SamplingConfig(
        variance="fixed_large", spacing="leading", clip_x0=False
    )
    assert len(pretrained.hash) == 64
    assert pretrained.step is None


def old_style(tensors: dict[str, Tensor], squeezed: bool) -> dict[str, Tensor]:
    """As diffusers 0.0.4 saved them, or as some conversions from convolutions did."""
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        if "attentions" in name and "group_norm" not in name:
            for new, old in former.items():
                name = name.replace(f".{new}.", f".{old}.")
            if squeezed and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    return renamed


@pytest.mark.parametrize("squeezed", [False, True])
def test_former_attention_names(squeezed: bool, tmp_path: Path) -> None:
    peer = theirs()
    peer.save_config(tmp_path)
    tensors = old_style(peer.state_dict(), squeezed)
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    assert_same_network(UNet.from_pretrained(tmp_path), peer)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("DDPMScheduler", "linear"), ("DDPMScheduler", "sigmoid"),
        ("DDIMScheduler", "scaled_linear"), ("DDIMScheduler", "squaredcos_cap_v2"),
    ],
)  # fmt: skip
def test_schedules(kind: str, shape: str, tmp_path: Path) -> None:
    peer = getattr(diffusers, kind)(
        num_train_timesteps=200, beta_schedule=shape, beta_start=1e-3, beta_end=0.05,
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    peer.save_pretrained(tmp_path)
    process = read_scheduler(tmp_path / "scheduler_config.json")
    betas = process.diffusion.build_schedule().betas
    torch.testing.assert_close(betas.float(), peer.betas, rtol=1e-5, atol=1e-7)
    assert process.diffusion.prediction == "v"
    assert process.sampling.spacing == "trailing"
    assert not process.sampling.clip_x0


def test_given_betas(tmp_path: Path) -> None:
    betas = [0.1, 0.25, 0.5]
    diffusers.DDPMScheduler(3, trained_betas=betas).save_pretrained(tmp_path)
    process = read_scheduler(tmp_path / "scheduler_config.json")
    assert process.diffusion.build_schedule().betas.tolist() == betas


# --- Writing


CONFIGS = {
    "plain": UNetConfig(**TINY),
    "one_head": UNetConfig(**TINY, attention_head_dim=4, dropout=0.1),
    "scale_shift": UNetConfig(**TINY, resnet_time_scale_shift="scale_shift", freq_shift=0),
    "padded": UNetConfig(**TINY, downsample_padding=1, mid_block_scale_factor=1.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_loads_in_diffusers_and_again_here(name: str, tmp_path: Path) -> None:
    pretrained = ours(
        CONFIGS[name],
        diffusion=DiffusionConfig(schedule="cosine", prediction="v", timesteps=300),
        sampling=SamplingConfig(variance="fixed_small", spacing="linspace"),
    )
    export_pipeline(pretrained, tmp_path / "first")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "first")
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert_same_network(pretrained.network, pipeline.unet)

    pipeline.save_pretrained(tmp_path / "second")
    back = load_model(tmp_path / "second")
    assert_same_bits(back.network, pretrained.network)
    assert back.config == pretrained.config
    assert torch.equal(back.schedule.betas, pretrained.schedule.betas)


def test_a_schedule_that_diffusers_does_not_have() -> None:
    diffusion = DiffusionConfig(schedule="sigmoid", timesteps=100)
    entries = scheduler_entries(diffusion, SamplingConfig())
    peer = diffusers.DDPMScheduler.from_config(entries)
    assert torch.equal(peer.betas, diffusion.build_schedule().betas.float())


def test_classes(tmp_path: Path) -> None:
    pretrained = ours(UNetConfig(**TINY, num_class_embeds=5))
    export_pipeline(pretrained, tmp_path / "ours")
    peer = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", subfolder="unet")
    assert_same_network(pretrained.network, peer, classes=True)
    assert load_model(tmp_path / "ours").spec.null_class == 4
    assert "label 4 for no class" in (tmp_path / "ours" / "README.md").read_text()


# --- Sampling

EDM = DiffusionConfig(
    schedule="edm", prediction="edm", sigma_min=0.01, sigma_max=40.0, sigma_data=0.7
)
FLOW = DiffusionConfig(schedule="flow", prediction="flow", shift=3.0)


def run_card(folder: Path, initial: Tensor, monkeypatch: pytest.MonkeyPatch, **names: Any) -> Any:
    """Run the Python code of the model card, with this initial noise: its variables."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("DIR", str(folder)).replace("eta=0.0,", 'eta=0.0, output_type="np",')
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape: initial if len(shape) == 4 else None)
        patch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: initial)
        exec(code, names)
    return names


def assert_same_images(ours: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() <= 1e-4


def unit_range(samples: Tensor) -> Tensor:
    return (samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("diffusion", "spacing", "variance"),
    [
        (DiffusionConfig(), "leading", "fixed_small"),
        (DiffusionConfig(schedule="cosine"), "leading", "fixed_large"),
        (DiffusionConfig(prediction="v"), "linspace", "fixed_large"),
        (DiffusionConfig(), "trailing", "fixed_small"),
    ],
)
def test_the_pipeline_generates_our_samples(
    diffusion: DiffusionConfig, spacing: Any, variance: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sampling = SamplingConfig(variance=variance, spacing=spacing)
    pretrained = ours(diffusion=diffusion, sampling=sampling)
    export_pipeline(pretrained, tmp_path / "export")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)

    ids, shape = torch.tensor([3, 2**40]), (3, 8, 8)
    initial = gaussian_noise(6, ids, shape, 0, Stream.INITIAL_NOISE)
    # Where the last timestep is not 0, the peer would add noise to the result.
    noises: Iterator[Tensor] = (
        gaussian_noise(6, ids, shape, step, Stream.SAMPLER_NOISE) * (step < 49)
        for step in range(50 if spacing == "trailing" else 49)
    )
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: initial)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(noises))
    expected = pipeline(batch_size=2, num_inference_steps=50, output_type="np").images
    assert next(noises, None) is None  # every step took its noise

    samples = pretrained.sample(ids, seed=6, steps=50, spacing=spacing, variance=variance).tensor
    assert_same_images(unit_range(samples), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("diffusion", "sampler", "labelled"),
    [
        (EDM, "euler", False), (EDM, "euler", True),
        (FLOW, "euler", True), (FLOW, "heun", False), (replace(FLOW, shift=1.0), "euler", False),
    ],
)  # fmt: skip
def test_the_card_of_a_network_without_a_pipeline_generates_our_samples(
    diffusion: DiffusionConfig,
    sampler: SamplerName,
    labelled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = UNetConfig(**TINY, num_class_embeds=5 if labelled else None)
    sampling = SamplingConfig(sampler=sampler, steps=9)
    pretrained = ours(model, diffusion=diffusion, sampling=sampling)
    export_pipeline(pretrained, tmp_path / "export")
    assert not (tmp_path / "export" / "model_index.json").exists()

    # Class k belongs to the ids that leave k when they are divided by four.
    ids, labels = (
        torch.tensor([0, 2**40 + 1, 2, 7]),
        torch.tensor([0, 4, 2, 1]) if labelled else None,
    )
    initial = gaussian_noise(6, ids, (3, 8, 8), 0, Stream.INITIAL_NOISE)
    names = run_card(tmp_path / "export", initial, monkeypatch, labels=labels)

    back = load_model(tmp_path / "export")
    assert back.config.diffusion == diffusion
    assert back.config.sampling == replace(sampling, steps=None)
    assert_same_bits(back.network, pretrained.network)
    classes = None if labels is None else tuple(labels.tolist())
    samples = back.sample(ids, seed=6, sampler=sampler, steps=9, classes=classes).tensor
    assert_same_images(samples, names["x"])


def distilled(
    steps: int,
    model: UNetConfig | None = None,
    method: Literal["progressive", "consistency"] = "progressive",
    **diffusion: Any,
) -> LoadedModel:
    """As if a run had distilled it."""
    return ours(
        model,
        diffusion=DiffusionConfig(**diffusion),
        sampling=SamplingConfig("ddim", steps, "trailing"),
        distillation=DistillationConfig(Path("runs/teacher"), method, steps, guidance_scale=2.0),
    )


@pytest.mark.parametrize(
    ("method", "steps", "diffusion"),
    [
        ("progressive", 1, {"prediction": "v"}),
        ("progressive", 4, {"prediction": "x0", "schedule": "cosine"}),
        ("consistency", 4, {"prediction": "v", "zero_terminal_snr": True}),
    ],
)
def test_the_pipeline_of_a_distilled_network_generates_our_samples(
    method: Literal["progressive", "consistency"], steps: int, diffusion: dict[str, Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Called as in the card; diffusers preserves the entries about the distillation."""
    pretrained = distilled(steps, method=method, **diffusion)
    export_pipeline(pretrained, tmp_path / "export")
    ids = torch.tensor([3, 2**40, 0, 9])
    initial = gaussian_noise(6, ids, (3, 8, 8), 0, Stream.INITIAL_NOISE)
    names = run_card(tmp_path / "export", initial, monkeypatch)

    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "export")
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    pipeline.save_pretrained(tmp_path / "again")
    back = load_model(tmp_path / "again")
    assert_same_bits(back.network, pretrained.network)
    assert back.config.sampling == pretrained.config.sampling
    assert back.config.distillation == replace(
        pretrained.config.distillation, teacher=Path("teacher")
    )
    assert_same_images(
        unit_range(back.sample(ids, seed=6).tensor), torch.from_numpy(names["images"])
    )


def test_an_export_without_the_method(tmp_path: Path) -> None:
    """Earlier versions distilled progressively only."""
    export_pipeline(distilled(4, prediction="v"), tmp_path / "export")
    path = tmp_path / "export" / "scheduler" / "scheduler_config.json"
    entries = json.loads(path.read_text())
    del entries["_distilled"]["method"]
    path.write_text(json.dumps(entries))
    plan = load_model(tmp_path / "export").config.distillation
    assert (plan.method, plan.steps, plan.guidance_scale) == ("progressive", 4, 2.0)
    path.write_text(json.dumps(entries | {"_distilled": [4]}))
    with pytest.raises(UserError, match="it must have teacher, method, steps and guidance_scale"):
        load_model(tmp_path / "export")


def test_the_card_of_a_distilled_network_with_classes_generates_our_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pipeline takes labels, so the card contains the sampling loop."""
    pretrained = distilled(4, UNetConfig(**TINY, num_class_embeds=5), prediction="v")
    export_pipeline(pretrained, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "from `teacher`, to 4 steps, by progressive distillation; guidance 2 is built in" in card
    # Class k belongs to the ids that leave k when they are divided by four.
    ids, labels = torch.tensor([0, 2**40 + 1, 2, 7]), torch.tensor([0, 4, 2, 1])
    initial = gaussian_noise(6, ids, (3, 8, 8), 0, Stream.INITIAL_NOISE)
    names = run_card(tmp_path / "export", initial, monkeypatch, labels=labels)
    samples = pretrained.sample(ids, seed=6, classes=tuple(labels.tolist())).tensor
    assert_same_images(samples, names["x"])


@pytest.mark.parametrize(
    ("pretrained", "reason"),
    [
        (lambda: distilled(3, prediction="v"), "3 does not divide the 1000 of the schedule"),
        (
            lambda: distilled(4, schedule="edm", prediction="edm"),
            "EDMEulerScheduler visits other noise levels",
        ),
        (
            lambda: distilled(4, schedule="flow", prediction="flow"),
            "FlowMatchEulerDiscreteScheduler visits other noise levels",
        ),
        (
            lambda: distilled(4, UNetConfig(**TINY, out_channels=6), prediction="v"),
            "DDIMPipeline does not know networks that predict a variance",
        ),
    ],
)
def test_a_distilled_network_that_diffusers_cannot_sample(
    pretrained: Callable[[], LoadedModel], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{reason}.* or export its teacher, runs/teacher"):
        export_pipeline(pretrained(), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_the_published_cifar10_configuration(tmp_path: Path) -> None:
    """The entries of google/ddpm-cifar10-32, written by an early diffusers."""
    entries = {
        "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
        "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06,
        "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert read_config(tmp_path / "config.json") == replace(UNetConfig(), sample_size=32)
