"""Training with text, vectors and embeddings, on images that are not square."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.captioned import CHANNELS, FEATURES, Means, pairs_of_digits, tiny_encoder
from tests.integration.conftest import Run
from tests.integration.test_resume import assert_same_run
from tests.recorder import AsOnAGpu, Recorded
from tests.tiny import TINY_DIT, TINY_GREY

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.rules import validate
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.training.teacher import student_config
from ddpm_engine.training.trainer import Trainer

STEPS = 8
COUNT = 60
NETWORK = replace(
    TINY_DIT, sample_size=(8, 16), in_channels=1, out_channels=1, text_channels=CHANNELS,
    vector_channels=CHANNELS, num_class_embeds=11,
)  # fmt: skip

UNET = replace(
    TINY_GREY, sample_size=(8, 16), dropout=0.1, num_class_embeds=11,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    encoder_hid_dim=CHANNELS, cross_attention_dim=8, vector_channels=CHANNELS,
)  # fmt: skip
NETWORKS = {"dit": NETWORK, "unet": UNET}


class Places(NamedTuple):
    """An encoder, the same digits with captions alone and with all embeddings."""

    encoder: str
    plain: Path
    packed: Path


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("captioned")
    place = tiny_encoder(folder / "encoder")
    source, size = pairs_of_digits(COUNT), (8, 16)
    write_shards(source, folder / "plain", size=size, per_shard=25)
    write_shards(
        source, folder / "packed", size=size, per_shard=25,
        text_encoder=open_text_encoder(place), image_embedder=Means(),
    )  # fmt: skip
    return Places(place, folder / "plain", folder / "packed")


@pytest.fixture
def config(places: Places, tmp_path: Path) -> RunConfig:
    """A run with labels, text and pooled text, whose captions are encoded in training."""
    return RunConfig(
        out=tmp_path / "run",
        data=DataConfig(
            path=places.plain, workers=0, text_encoder=places.encoder, text_length=8
        ),
        model=NETWORK,
        diffusion=DiffusionConfig(timesteps=20),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainingConfig(steps=STEPS, batch_size=8, ema_decay=0.5, condition_dropout=0.3),
        log=LogConfig(
            every=1, checkpoint_every=4, sample_every=0, sample_steps=2, sample_count=5,
            tracker="none",
        ),
    )  # fmt: skip


def fit(config: RunConfig, *callbacks: Any) -> RunConfig:
    Trainer(config, callbacks).fit()
    return config


def with_data(config: RunConfig, name: str, **changes: Any) -> RunConfig:
    """The run in another directory, with other data."""
    return replace(config, out=config.out.with_name(name), data=replace(config.data, **changes))


def state_of(out: Path) -> dict[str, Any]:
    checkpoint, _ = CheckpointStore(out / "checkpoints").newest()
    assert checkpoint is not None
    return checkpoint.state


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_captions_encoded_in_training_and_when_packing_train_the_same_run(
    family: str, precision: Any, config: RunConfig, places: Places
) -> None:
    training = replace(config.training, precision=precision, allow_slow_bf16=True)
    config = replace(config, model=NETWORKS[family], training=training)
    fit(config, AsOnAGpu())
    packed = with_data(config, "packed", path=places.packed, text_encoder=None)
    for other in (packed, with_data(config, "again")):
        # Recorded once and replayed, as on a GPU.
        recorded = Recorded()
        fit(other, recorded)
        assert recorded.recorder.replays == STEPS
        assert_same_run(config.out, other.out, STEPS)


def test_a_run_that_is_resumed_is_the_run_that_never_stopped(
    config: RunConfig, places: Places, tmp_path: Path
) -> None:
    for name, path, model in (("plain", places.plain, NETWORK), ("packed", places.packed, UNET)):
        data = replace(config.data, path=path)
        whole = fit(replace(config, data=data, model=model, out=tmp_path / f"whole-{name}"))
        parts = replace(whole, out=tmp_path / f"parts-{name}")
        fit(replace(parts, training=replace(parts.training, steps=3)))
        fit(parts)
        assert_same_run(whole.out, parts.out, STEPS)


def test_a_checkpoint_says_what_encodes_text_and_samples_by_it(config: RunConfig) -> None:
    fit(config)
    encoder = open_text_encoder(config.data.text_encoder or "")
    assert state_of(config.out)["text_encoder"] == {
        "place": encoder.place, "fingerprint": encoder.fingerprint, "length": 8,
    }  # fmt: skip
    assert "image_embeddings" not in state_of(config.out)
    model = load_model(config.out)
    one, other = (
        np.asarray(model.sample([prompt], seed=3, steps=2).images[0])
        for prompt in ("one two", "nine")
    )
    assert one.shape == (8, 16)
    assert (one != other).any()


def test_another_encoder_is_refused(config: RunConfig, places: Places, tmp_path: Path) -> None:
    fit(replace(config, training=replace(config.training, steps=2)))
    other = tiny_encoder(tmp_path / "other", seed=1)
    changed = replace(config, data=replace(config.data, text_encoder=other))
    with pytest.raises(UserError, match=r"was trained on text of .*encoder.*other \(fingerprint"):
        fit(changed)
    with pytest.raises(UserError, match=r"`data\.text_encoder` .*other is another than the one"):
        fit(with_data(config, "packed", path=places.packed, text_encoder=other))
    moved = tmp_path / "moved"
    Path(places.encoder).rename(moved)
    try:
        fit(replace(config, data=replace(config.data, text_encoder=str(moved))))
    finally:
        moved.rename(places.encoder)
    assert state_of(config.out)["text_encoder"]["place"] == str(moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": None}, r"set `data\.text_encoder`"),
        ({"text_length": 4}, None),
    ],
)
def test_what_the_data_lacks_is_refused(
    changes: dict[str, Any], message: str | None, config: RunConfig
) -> None:
    changed = with_data(config, "changed", **changes)
    if message is None:
        fit(changed)
        assert state_of(changed.out)["text_encoder"]["length"] == 4
        return
    with pytest.raises(UserError, match=message):
        fit(changed)


def test_an_encoder_of_another_width_is_refused(config: RunConfig) -> None:
    for name, what in (("text_channels", "tokens"), ("vector_channels", "whole captions")):
        wider = replace(config, model=replace(config.model, **{name: CHANNELS + 1}))
        with pytest.raises(UserError, match=f"embeddings of {what} with 16 channels.*takes 17"):
            fit(wider)


def test_super_resolution_takes_text_and_need_not_be_square(config: RunConfig) -> None:
    model = replace(UNET, low_resolution=(4, 8), num_class_embeds=None)
    log = replace(config.log, sample_every=4)
    data = replace(config.data, horizontal_flip=True)
    fit(replace(config, model=model, log=log, data=data))
    assert (config.out / "samples" / "step-00000008.png").exists()
    assert load_model(config.out).spec.low_resolution == (4, 8)


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_a_model_of_text_is_distilled_with_guidance(method: Any, config: RunConfig) -> None:
    fit(config)
    plan = DistillationConfig(
        teacher=config.out, method=method, start_steps=4, steps=2, guidance_scale=2.0
    )
    student = student_config(load_model(config.out).config, plan, config.out.with_name("student"))
    fit(student)
    model = load_model(student.out)
    assert state_of(student.out)["text_encoder"] == state_of(config.out)["text_encoder"]
    assert len(model.sample(["one two", "nine"], seed=3)) == 2


def test_evaluation_and_figures_want_samples_of_prompts(config: RunConfig, run: Run) -> None:
    fit(config)
    for script in ("evaluate", "visualize"):
        out = config.out.with_name(script)
        result = run(f"launch/{script}.py", "--checkpoint", config.out, "--out", out)
        assert result.returncode == 2
        assert "is conditioned on text or" in result.stderr


# --- Previews


@pytest.mark.parametrize("prompts", [(), ("one two", "nine then zero")])
def test_previews_list_their_prompts(
    prompts: tuple[str, ...], config: RunConfig, places: Places
) -> None:
    log = replace(config.log, sample_every=4, prompts=prompts)
    packed = replace(with_data(config, "packed", path=places.packed, text_encoder=None), log=log)
    for run in (replace(config, log=log), packed):
        fit(run)
        assert (run.out / "samples" / "step-00000008.png").exists()
        listed = (run.out / "samples" / "prompts.txt").read_text().splitlines()
        assert len(listed) == 5
        if prompts:
            assert listed == [prompts[k % 2] for k in range(5)]
        else:
            captions = {c for e in pairs_of_digits(COUNT).examples for c in e.captions}
            assert set(listed) <= captions


# --- Image embeddings


def test_a_prior_is_trained_to_generate_embeddings(config: RunConfig, places: Places) -> None:
    prior = replace(
        with_data(config, "prior", path=places.packed, diffuse="embeddings", text_encoder=None),
        model=PriorConfig(
            in_channels=FEATURES, out_channels=FEATURES, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, text_channels=CHANNELS, vector_channels=CHANNELS,
        ),
        sampling=SamplingConfig(clip_x0=False),
        log=replace(config.log, sample_every=4),
    )  # fmt: skip
    fit(prior, AsOnAGpu())
    assert state_of(prior.out)["image_embeddings"] == {
        "name": "means", "fingerprint": "0" * 64, "channels": FEATURES,
    }  # fmt: skip
    whole = replace(prior, out=prior.out.with_name("whole"))
    recorded = Recorded()
    fit(whole, recorded)
    assert_same_run(prior.out, whole.out, STEPS)
    with pytest.raises(UserError, match=r"have 5 channels, but the network takes 6"):
        fit(replace(prior, out=prior.out.with_name("wide"), model=replace(
            prior.model, in_channels=6, out_channels=6)))  # fmt: skip


def test_a_decoder_is_conditioned_on_embeddings(config: RunConfig, places: Places) -> None:
    decoder = replace(
        with_data(
            config, "decoder", path=places.packed, vector="image", text_encoder=None,
            text_length=None,
        ),
        model=replace(NETWORK, text_channels=None, vector_channels=FEATURES),
        log=replace(config.log, sample_every=4),
    )  # fmt: skip
    fit(decoder)
    state = state_of(decoder.out)
    assert state["image_embeddings"]["channels"] == FEATURES
    assert "text_encoder" not in state
    assert (decoder.out / "samples" / "step-00000008.png").exists()
    assert not (decoder.out / "samples" / "prompts.txt").exists()
    with pytest.raises(UserError, match=r"`data\.vector` is image, but .* holds no embeddings"):
        fit(replace(decoder, data=replace(decoder.data, path=places.plain)))


# --- Rules


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"text_channels": None, "vector_channels": None},
         r"`data\.text_encoder` is .*not conditioned on text"),
        ("model", {"text_channels": None, "vector_channels": None}, r"`data\.text_length` is 8"),
        ("log", {"prompts": ("two\nlines",)}, r"`log\.prompts` has one that is empty or longer"),
        ("data", {"diffuse": "embeddings"}, r"`model\.sample_size` is \(8, 16\).*must be 1"),
        ("data", {"diffuse": "embeddings"}, r"`sampling\.clip_x0` is None.*must be False"),
        ("data", {"diffuse": "embeddings", "horizontal_flip": True}, r"cannot be mirrored"),
        ("data", {"diffuse": "embeddings", "vector": "image"}, r"what it is to generate"),
        ("data", {"diffuse": "embeddings", "source": "digits"}, r"`data\.source` is digits"),
    ],
)  # fmt: skip
def test_sections_that_do_not_fit_are_refused(
    section: str, changes: dict[str, Any], message: str, config: RunConfig
) -> None:
    validate(config)
    wrong = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(UserError, match=message):
        validate(wrong)


def test_an_image_vector_needs_a_network_with_one(config: RunConfig) -> None:
    wrong = replace(
        config,
        data=replace(config.data, vector="image"),
        model=replace(NETWORK, vector_channels=None),
    )
    with pytest.raises(UserError, match=r"`data\.vector` is image, but the network is not"):
        validate(wrong)
