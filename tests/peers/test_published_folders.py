"""Published pipelines, opened here and by diffusers: the same noise and text, the same pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import published
from tests.captioned import pairs_of_digits

import ddpm_engine
from ddpm_engine.checkpoints.load import config_of
from ddpm_engine.cli import train
from ddpm_engine.data.dataset import Batch
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.samplers.initial_noise import initial_noise
from ddpm_engine.samplers.samples import Samples
from ddpm_engine.training.trainer import Trainer

diffusers: Any = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS, SCALE, SEED = 20, 4.0, 7
PROMPTS = ["a red fox", "two owls at night in a tree"]
NEGATIVE = "blurred"
WITHIN = 1e-4


def noise(count: int) -> torch.Tensor:
    return initial_noise(SEED, torch.arange(count), (4, 8, 8))


def decoded(samples: Samples) -> torch.Tensor:
    """The pictures before they are rounded to 8 bits, `[N, C, H, W]` in [0, 1]."""
    codec: Any = samples.model.codec
    latents = samples.tensor / codec.open().scale + codec.open().shift
    pictures: torch.Tensor = codec.open().autoencoder.decode(latents)
    return (pictures / 255).clamp(0, 1)


@pytest.mark.parametrize("negative", [NEGATIVE, None])
@pytest.mark.parametrize("name", published.SCHEDULERS)
@pytest.mark.parametrize(
    ("unet", "prediction"),
    [(published.STABLE_1, "epsilon"), (published.STABLE_2, "v_prediction")],
    ids=["stable diffusion 1", "stable diffusion 2"],
)
def test_pictures_are_those_of_stable_diffusion(
    unet: dict[str, Any], prediction: str, name: str, negative: str | None, tmp_path: Path
) -> None:
    scheduler = published.scheduler_named(name, prediction)
    theirs = published.stable_diffusion(unet, scheduler, tmp_path)
    asked = {
        "prompt": PROMPTS, "negative_prompt": None if negative is None else 2 * [negative],
        "num_inference_steps": STEPS, "guidance_scale": SCALE,
    }  # fmt: skip
    expected = theirs(**asked, latents=noise(2), output_type="latent").images
    model = ddpm_engine.load(tmp_path, device="cpu")
    ours = model.sample(PROMPTS, seed=SEED, steps=STEPS, guidance=SCALE, negative_prompt=negative)
    scale = max(1.0, expected.abs().max().item())
    assert scale < 100
    assert (ours.tensor - expected).abs().max().item() <= WITHIN * scale
    with torch.no_grad():
        pictures = theirs.vae.decode(expected / theirs.vae.config.scaling_factor).sample
    assert (decoded(ours) - (pictures / 2 + 0.5).clamp(0, 1)).abs().max().item() <= WITHIN


@pytest.mark.parametrize("name", published.SCHEDULERS)
def test_pictures_are_those_of_dit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = published.dit(published.scheduler_named(name), tmp_path)
    # Its latents are its own, and no argument; nor does it scale them as the scheduler asks.
    theirs.scheduler.set_timesteps(STEPS)
    if name == "euler":
        # It steps from what was scaled for the network.
        step, sigmas = theirs.scheduler.step, theirs.scheduler.sigmas

        def unscaled(output: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> Any:
            return step(output, t, x * (1 + sigmas[theirs.scheduler.step_index] ** 2) ** 0.5)

        monkeypatch.setattr(theirs.scheduler, "step", unscaled)
    latents = theirs.scheduler.init_noise_sigma * noise(3)
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: latents
    )
    expected = theirs(
        class_labels=[2, 0, 1], guidance_scale=SCALE, num_inference_steps=STEPS, output_type="np"
    ).images
    model = ddpm_engine.load(tmp_path, device="cpu")
    assert model.classes == published.CLASSES
    ours = model.sample(3, seed=SEED, steps=STEPS, guidance=SCALE, classes=(2, 0, 1))
    images = decoded(ours).permute(0, 2, 3, 1)
    assert (images - torch.from_numpy(expected)).abs().max().item() <= WITHIN
    assert expected.std() > 0.05


def words_in(folder: Path, name: str, **changed: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder of Stable Diffusion 1, and a picture of it."""
    folder = tmp_path_factory.mktemp("stable")
    published.stable_diffusion(published.STABLE_1, published.scheduler_named("ddim"), folder)
    return folder, picture_of(folder)


@pytest.fixture
def folder(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def picture_of(folder: Path) -> torch.Tensor:
    model = ddpm_engine.load(folder, device="cpu")
    return decoded(model.sample(PROMPTS[0], seed=SEED, steps=4, guidance=SCALE))


def test_half_precision_in_shards_is_read(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(saved[0], safety_checker=None)
    theirs.to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    for part in ("unet", "vae", "text_encoder"):
        names = [path.name for path in (tmp_path / part).glob("*.safetensors*")]
        assert len(names) > 2
        assert all("fp16" in name for name in names)
    assert (picture_of(tmp_path) - saved[1]).abs().max().item() <= 0.05


def test_former_names_of_the_autoencoder_are_read(
    saved: tuple[Path, torch.Tensor], folder: Path
) -> None:
    """As Stable Diffusion 1.5 was published."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for today, former in names.items():
            if "attentions" in name:
                name = name.replace(f".{today}.", f".{former}.")
        tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    assert picture_of(folder).equal(saved[1])


def test_the_scheduler_of_the_first_published_ones_is_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = {**published.BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}
    scheduler = diffusers.PNDMScheduler(**kind, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    words_in(folder, "scheduler/scheduler_config.json", clip_sample=False)
    model = ddpm_engine.load(folder, device="cpu")
    assert "PNDMScheduler is not among the samplers; dpm++2m stands in" in caplog.text
    betas = model.schedule.betas
    assert torch.allclose(betas, scheduler.betas.double(), rtol=1e-5)
    assert (model.sampling.steps, model.sampling.spacing) == (50, "leading")
    assert (model.sampling.steps_offset, model.sampling.clip_x0) == (1, False)


def test_what_samples_do_not_depend_on_is_left_out_with_a_note(
    saved: tuple[Path, torch.Tensor], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    words_in(folder, "model_index.json", safety_checker=checker)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert picture_of(folder).equal(saved[1])
    assert "its safety_checker is left out" in caplog.text
    assert "pytorch_lora_weights.safetensors is left out" in caplog.text


@pytest.mark.parametrize(
    ("index", "named"),
    [
        (
            {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder_2 .*XL",
        ),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet .*no ControlNet"),
        ({"mystery": ["diffusers", "Mystery"]}, "lists mystery besides"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPipeline"),
    ],
)
def test_what_samples_depend_on_is_refused(folder: Path, index: dict[str, Any], named: str) -> None:
    words_in(folder, "model_index.json", **index)
    with pytest.raises(UserError, match=named):
        ddpm_engine.load(folder, device="cpu")


@pytest.mark.parametrize(
    "missing",
    [
        "vae", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer",
        "text_encoder/model.safetensors", "text_encoder", "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)  # fmt: skip
def test_missing_files_are_named(folder: Path, missing: str) -> None:
    gone = folder / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UserError, match=missing.split("/")[0].replace("_", ".")):
        picture_of(folder)


def test_superfluous_weights_are_named(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "loss.logvar": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"loss\.logvar is not wanted"):
        picture_of(folder)


@pytest.mark.parametrize("name", published.SCHEDULERS)
def test_exports_are_the_same_to_the_bit(
    saved: tuple[Path, torch.Tensor], folder: Path, tmp_path: Path, name: str
) -> None:
    published.scheduler_named(name).save_pretrained(folder / "scheduler")
    model = ddpm_engine.load(folder, device="cpu")
    export_pipeline(model, tmp_path / "export")
    for part in ("unet", "vae", "text_encoder"):
        before, after = (
            load_file(next((root / part).glob("*.safetensors")))
            for root in (folder, tmp_path / "export")
        )
        assert before.keys() == after.keys()
        assert all(tensor.equal(after[key]) for key, tensor in before.items())
    again = ddpm_engine.load(tmp_path / "export", device="cpu")
    assert (again.sampling, again.config.diffusion) == (model.sampling, model.config.diffusion)
    assert picture_of(tmp_path / "export").equal(picture_of(folder))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "export")
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPTS, latents=noise(2), guidance_scale=SCALE, num_inference_steps=STEPS, output_type="np"
    ).images
    ours = decoded(again.sample(PROMPTS, seed=SEED, steps=STEPS, guidance=SCALE))
    assert (ours.permute(0, 2, 3, 1) - torch.from_numpy(expected)).abs().max().item() <= WITHIN


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose network samples pixels, and a run that has started from it."""
    place = tmp_path_factory.mktemp("start")
    unet = {**published.STABLE_1, "in_channels": 1, "out_channels": 1, "sample_size": [8, 16]}
    scheduler = published.scheduler_named("ddim")
    published.stable_diffusion(unet, scheduler, place / "stable")
    words_in(place / "stable", "model_index.json", vae=[None, None])
    write_shards(pairs_of_digits(8), place / "digits", size=(8, 16), per_shard=8)
    options = train.parse(
        f"--init {place / 'stable'} --data.path {place / 'digits'} --data.workers 0 "
        f"--out {place / 'run'} --training.steps 2 --training.batch-size 4 "
        "--training.condition-dropout 0.5 --optimizer.learning-rate 1e-9 "
        "--log.tracker none --log.sample-every 0 --log.checkpoint-every 1".split()
    )
    Trainer(options.run).fit()
    return place / "stable", place / "run"


def test_a_run_starts_from_a_folder(fine_tuned: tuple[Path, Path]) -> None:
    start, run = (ddpm_engine.load(path, device="cpu") for path in fine_tuned)
    assert run.config.diffusion == start.config.diffusion
    assert run.sampling == start.sampling
    weights = run.network.state_dict()
    for name, tensor in start.network.state_dict().items():
        assert (weights[name] - tensor).abs().max() < 1e-6
    asked: Any = {"seed": SEED, "steps": 4, "guidance": SCALE}
    ours, before = run.sample(PROMPTS, **asked), start.sample(PROMPTS, **asked)
    assert (ours.tensor - before.tensor).abs().max() < 1e-4


def test_samples_without_a_text_are_trained_with_the_empty_one(
    fine_tuned: tuple[Path, Path],
) -> None:
    encoder = open_text_encoder(str(fine_tuned[0]))
    null, text = encoder.encode([""]), encoder.encode(16 * ["a fox"])
    inputs = TrainingInputs(0, ConditioningSpec(text=24), condition_dropout=0.5, null_text=null)
    batch = Batch(
        images=torch.zeros(16, 1, 8, 16, dtype=torch.uint8),
        positions=torch.arange(16),
        labels=None,
        text=text.tokens,
        text_mask=text.mask,
    )
    given = inputs.prepare(batch).conditioning.text
    assert given is not None
    dropped = [row.equal(null.tokens[0]) for row in given]
    kept = [row.equal(text.tokens[0]) for row in given]
    assert any(dropped)
    assert any(kept)
    assert all(one != other for one, other in zip(dropped, kept, strict=True))


def test_a_run_goes_on_without_what_it_started_from(
    fine_tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(fine_tuned[1], tmp_path / "run"))
    config = config_of(run)
    other = replace(config, out=tmp_path / "other", model=replace(config.model, norm_eps=1e-6))
    with pytest.raises(UserError, match=r"`training.init` is .*, whose network is"):
        Trainer(other).fit()
    gone = replace(
        config, out=run, training=replace(config.training, steps=3, init=tmp_path / "gone")
    )
    with pytest.raises(UserError, match=r"`training.init` was"):
        Trainer(gone).fit()
    Trainer(replace(gone, training=replace(config.training, steps=3))).fit()


def test_an_exported_transformer_is_a_pipeline(tmp_path: Path) -> None:
    theirs = published.dit(published.scheduler_named("ddim"), tmp_path / "dit")
    model = ddpm_engine.load(tmp_path / "dit", device="cpu")
    export_pipeline(model, tmp_path / "export")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "export")
    for name, tensor in theirs.transformer.state_dict().items():
        assert again.transformer.state_dict()[name].equal(tensor)
    assert ddpm_engine.load(tmp_path / "export", device="cpu").classes == published.CLASSES
