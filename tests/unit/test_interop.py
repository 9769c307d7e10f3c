"""Other libraries' checkpoints without those libraries: refusals, damage, and exports."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import TINY

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig, to_dict
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.interop.scheduler import scheduler_entries
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.config import SamplingConfig

MODEL = replace(TINY, block_out_channels=(4, 8), norm_num_groups=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, whose average is twice its weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = RunConfig(model=MODEL)
    model = UNet(MODEL).state_dict()
    parts = {"model": model, "ema": {name: 2 * tensor for name, tensor in model.items()}}
    state = {"config": to_dict(config), "data": "f" * 64}
    CheckpointStore(folder / "checkpoints").save(1234, parts, state)
    return folder


@pytest.fixture(scope="module")
def original(run: Path) -> Path:
    folder = run.with_name("exported")
    export_pipeline(load_model(run), folder)
    return folder


@pytest.fixture
def exported(original: Path, tmp_path: Path) -> Path:
    """An export to damage."""
    return Path(shutil.copytree(original, tmp_path / "exported"))


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# --- Writing


def test_a_run_and_its_export_are_the_same_model(run: Path, tmp_path: Path) -> None:
    for weights in ("ema", "model"):
        pretrained = load_model(run, weights=weights)
        export_pipeline(pretrained, tmp_path / weights, weights)
        back = load_model(tmp_path / weights)
        assert back.config == replace(pretrained.config, sampling=SamplingConfig())
        for name, tensor in pretrained.network.state_dict().items():
            assert torch.equal(back.network.state_dict()[name], tensor)
    files = (path for path in (tmp_path / "ema").rglob("*") if path.is_file())
    assert {path.relative_to(tmp_path / "ema").as_posix() for path in files} == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
    }


def test_the_card_has_the_facts(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    pretrained = load_model(run)
    parameters = sum(parameter.numel() for parameter in pretrained.network.parameters())
    for fact in (
        "8×8, 3 channels", "| 4, 8 |", f"{parameters:,}", "f" * 64, "1,234", pretrained.hash,
        "linear, β from 0.0001 to 0.02, T = 1000", "moving average, decay 0.9999",
        "DDPMPipeline.from_pretrained", "ddpm_engine.load", "launch/sample.py",
    ):  # fmt: skip
        assert fact in card, fact


def test_a_run_is_known_by_its_checkpoints(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    assert load_model(tmp_path / "run").step == 1234


def test_another_librarys_model_has_one_set_of_weights(run: Path, tmp_path: Path) -> None:
    load_model(run).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"`weights` is model, .* a model of diffusers"):
        load_model(tmp_path / "saved", weights="model")


# --- Refusals


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("act_fn", "gelu"), ("add_attention", False), ("attention_head_dim", "8"),
        ("attn_norm_num_groups", 3), ("block_out_channels", [4, 8.5]),
        ("center_input_sample", True), ("class_embed_type", "timestep"),
        ("down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]),
        ("downsample_type", "resnet"), ("dropout", True), ("mid_block_type", None),
        ("norm_eps", float("inf")), ("norm_num_groups", 3), ("out_channels", 10**30),
        ("resnet_time_scale_shift", "ada_group"), ("sample_size", None), ("sample_size", [8]),
        ("time_embedding_dim", 99), ("time_embedding_type", "fourier"),
        ("upsample_type", "resnet"), ("_class_name", "UNet3DConditionModel"), ("new_entry", 7),
    ],
)  # fmt: skip
def test_unsupported_networks_are_refused(exported: Path, entry: str, value: Any) -> None:
    change(exported / "unet" / "config.json", **{entry: value})
    with pytest.raises(UserError) as refused:
        UNet.from_pretrained(exported)
    named = value[0] if entry == "down_block_types" else value
    assert entry in str(refused.value)
    assert any(text in str(refused.value) for text in (json.dumps(named), repr(named)))
    assert str(exported / "unet" / "config.json") in str(refused.value)


DDPM = RunConfig()
EDM = RunConfig(
    diffusion=DiffusionConfig(schedule="edm", prediction="edm"),
    sampling=SamplingConfig(sampler="heun", clip_x0=False),
)
FLOW = RunConfig(
    diffusion=DiffusionConfig(schedule="flow", prediction="flow", shift=3.0),
    sampling=SamplingConfig(sampler="euler"),
)
OWN = (EDM, FLOW)
"""Of predictions with schedulers of their own."""


@pytest.mark.parametrize(
    ("config", "entry", "value"),
    [
        (DDPM, "_class_name", "LMSDiscreteScheduler"), (DDPM, "beta_schedule", "laplace"),
        (DDPM, "beta_start", -0.1), (DDPM, "clip_sample", "yes"),
        (DDPM, "clip_sample_range", 2.0), (DDPM, "num_train_timesteps", 0),
        (DDPM, "prediction_type", "flow"), (DDPM, "rescale_betas_zero_snr", True),
        (DDPM, "steps_offset", -1), (DDPM, "thresholding", True),
        (DDPM, "timestep_spacing", "karras"), (DDPM, "trained_betas", [0.5, 2.0]),
        (DDPM, "variance_type", "learned"), (DDPM, "new_entry", 7),
        (EDM, "sigma_schedule", "exponential"), (EDM, "rho", 3.0),
        (EDM, "prediction_type", "v_prediction"), (EDM, "final_sigmas_type", "sigma_min"),
        (EDM, "sigma_min", 90.0), (EDM, "sigma_data", 0.0), (EDM, "num_train_timesteps", 1),
        (EDM, "clip_sample", True),
        (FLOW, "shift", 0.0), (FLOW, "use_dynamic_shifting", True), (FLOW, "shift_terminal", 0.1),
        (FLOW, "use_karras_sigmas", True), (FLOW, "invert_sigmas", True),
        (FLOW, "stochastic_sampling", True), (FLOW, "num_train_timesteps", 0),
        (FLOW, "new_entry", 1),
    ],
)  # fmt: skip
def test_unsupported_schedulers_are_refused(
    exported: Path, config: RunConfig, entry: str, value: Any
) -> None:
    file = exported / "scheduler" / "scheduler_config.json"
    if config in OWN:
        file.write_text(json.dumps(scheduler_entries(config.diffusion, config.sampling)))
    assert load_model(exported).config.diffusion == config.diffusion
    change(file, **{entry: value})
    known = {"beta_start": "beta at timestep 0", "trained_betas": "`betas` has 2 entries"}
    if config in OWN:
        known = {"num_train_timesteps": "`timesteps` is [01]"}
    with pytest.raises(UserError, match=known.get(entry, entry)) as refused:
        load_model(exported)
    assert config in OWN or str(file) in str(refused.value)
    UNet.from_pretrained(exported)  # whose network is as it was


def test_entries_that_change_nothing(exported: Path) -> None:
    ignored = ("decay", "optimization_step", "num_train_timesteps", "_note")
    change(exported / "unet" / "config.json", **dict.fromkeys(ignored, 5))
    assert UNet.from_pretrained(exported).config == MODEL


def test_a_latent_model_is_refused(exported: Path) -> None:
    change(exported / "model_index.json", vqvae=["diffusers", "VQModel"], extra=[None, None])
    with pytest.raises(UserError, match="lists vqvae besides"):
        load_model(exported)


def test_classes_without_a_known_null_class(run: Path, tmp_path: Path) -> None:
    model = UNet(replace(MODEL, num_class_embeds=3)).eval()
    config = RunConfig(model=model.config)
    pretrained = LoadedModel.from_config(model, config, "0" * 64)
    export_pipeline(pretrained, tmp_path / "out")
    assert load_model(tmp_path / "out").spec.null_class == 2
    (tmp_path / "out" / "unet" / WEIGHTS).unlink()
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.bin"
    torch.save(model.state_dict(), weights)
    with pytest.raises(UserError, match=r"num_class_embeds is 3.*stands for no class"):
        load_model(tmp_path / "out")
    assert UNet.from_pretrained(tmp_path / "out").config.num_class_embeds == 3


def test_a_learned_variance_without_its_outputs(exported: Path) -> None:
    change(exported / "unet" / "config.json", out_channels=6)
    with pytest.raises(UserError, match="differ"):
        UNet.from_pretrained(exported)
    with pytest.raises(UserError, match=r"out_channels is 6.*must be 3"):
        load_model(exported)


# --- Damage


class Payload:
    """What an attacker would put in a pickle."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_is_not_executed(exported: Path, tmp_path: Path, how: str) -> None:
    proof = tmp_path / "executed"
    (exported / "unet" / WEIGHTS).unlink()
    file = exported / "unet" / "diffusion_pytorch_model.bin"
    content = {**UNet(MODEL).state_dict(), "extra": Payload(proof)}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="would execute code"):
        UNet.from_pretrained(exported)
    assert not proof.exists()
    if how == "torch":  # the test itself: freely unpickled, it does execute
        torch.load(file, weights_only=False)
        assert proof.exists()


def test_damaged_pickles(exported: Path) -> None:
    (exported / "unet" / WEIGHTS).unlink()
    file = exported / "unet" / "diffusion_pytorch_model.bin"
    for content in (b"", b"\x80", b"not a pickle", b"PK\x03\x04 cut"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged.*download it again"):
            UNet.from_pretrained(exported)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="not a state dict"):
        UNet.from_pretrained(exported)


def test_truncated_weights_and_those_of_another_network(exported: Path) -> None:
    file = exported / "unet" / WEIGHTS
    whole = file.read_bytes()
    for keep in (0, 5, 1000, -1):
        file.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"is damaged .*download or save it again"):
            load_model(exported)
    file.write_bytes(whole)
    change(exported / "unet" / "config.json", layers_per_block=2)
    with pytest.raises(UserError, match=r"tensors differ.*\n.* is missing"):
        load_model(exported)


def test_missing_files_and_damaged_json(exported: Path, original: Path) -> None:
    for missing, expected in [
        (f"unet/{WEIGHTS}", "there are no weights in"),
        ("unet/config.json", "the export to .* was interrupted; run it again"),
        ("scheduler/scheduler_config.json", "is missing; download or save the whole model"),
    ]:
        (exported / missing).unlink()
        with pytest.raises(UserError, match=expected):
            load_model(exported)
        shutil.copy(original / missing, exported / missing)
    load_model(exported)
    for content in ("", "{", "[1]", '"text"'):
        (exported / "unet" / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"unet/config\.json is "):
            UNet.from_pretrained(exported)


def test_shards_come_from_beside_their_index_only(exported: Path) -> None:
    (exported / "unet" / WEIGHTS).rename(exported / WEIGHTS)
    index = exported / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": f"../{WEIGHTS}"}}))
    with pytest.raises(UserError, match="files beside it"):
        UNet.from_pretrained(exported)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"gone\.safetensors is missing"):
        UNet.from_pretrained(exported)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        UNet.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no diffusers model"):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no usable checkpoint.*folder of a diffusers model"):
        load_model(tmp_path)
