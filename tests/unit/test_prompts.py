"""Sampling by prompt: what a text does to a sample, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.texts import CHANNELS, POOLED, TextNetwork, WordEncoder
from tests.tiny import TINY, TINY_DIT
from torch import Tensor

from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_engine.samplers import sampler as loop_module
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.samplers.samples import sample

SCHEDULE = NoiseSchedule.linear(1000)
PROMPTS = ["forty-two", "the number seventeen", "three"]


def model_of(encoder: Any = None, **network: Any) -> DiffusionModel:
    sampling = SamplingConfig(sampler="ddim", steps=4)
    return DiffusionModel(
        TextNetwork(**network), SCHEDULE, "eps", sampling,
        text_encoder=encoder or WordEncoder(8),
    )  # fmt: skip


def generate(ids: Any, model: DiffusionModel | None = None, **options: Any) -> Tensor:
    return sample(model or model_of(), ids, progress=False, **{"seed": 3, **options}).tensor


def test_a_sample_of_each_prompt() -> None:
    samples = generate(PROMPTS)
    assert samples.shape == (3, 3, 8, 8)
    assert torch.equal(generate("forty-two"), samples[:1])
    assert torch.equal(generate(3, prompts=PROMPTS), samples)
    assert not torch.equal(generate(1, prompts="three"), samples[:1])
    # Prompts begin again after the last.
    again = generate(6, prompts=tuple(PROMPTS))
    assert torch.equal(again[:3], samples)
    assert torch.equal(generate([4], prompts=["", PROMPTS[1], PROMPTS[0]]), again[4:5])


@pytest.mark.parametrize("length", [8, None], ids=["fixed", "longest"])
@pytest.mark.parametrize("guidance", [None, Guidance(3.0, 0.5)], ids=["plain", "guided"])
def test_a_sample_depends_on_seed_id_and_prompt_alone(
    length: int | None, guidance: Guidance | None
) -> None:
    options: dict[str, Any] = {"prompts": PROMPTS, "guidance": guidance}
    if guidance is not None:
        options["negative_prompt"] = "a long and winding text"
    whole = generate(6, model_of(WordEncoder(length)), **options)
    for ids in ([5], [4, 0], [2, 1, 3]):
        part = generate(ids, model_of(WordEncoder(length)), **options)
        torch.testing.assert_close(part, whole[ids], rtol=0, atol=1e-6)
    batches = generate(6, model_of(WordEncoder(length)), batch_size=2, **options)
    torch.testing.assert_close(batches, whole, rtol=0, atol=1e-6)


def test_each_distinct_prompt_of_a_batch_is_encoded_once() -> None:
    encoder = WordEncoder(8)
    generate(9, model_of(encoder), prompts=[*PROMPTS, "three"])
    assert encoder.encoded == PROMPTS


@pytest.mark.parametrize("two_passes", [False, True])
def test_projections_are_computed_once_a_batch(two_passes: bool) -> None:
    model = model_of()
    generate(4, model, prompts=PROMPTS, guidance=Guidance(2.0, two_passes=two_passes))
    assert model.network.precomputed == [4, 4]
    assert model.network.batches == ([4] * 8 if two_passes else [8] * 4)


def test_captured_steps_meet_the_prompts_of_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for a CUDA graph: what is read while capturing is what is read when replayed.
    monkeypatch.setattr(loop_module, "captured", lambda step: step)
    model = model_of()
    request = model.request(prompts=PROMPTS, guidance=2.0, negative_prompt="no", seed=3)
    captured = Sampler(model, request, capture=True).sample(range(6), batch_size=2)
    assert torch.equal(captured, Sampler(model, request).sample(range(6), batch_size=2))


def by_hand(scale: float, text: Conditioning, away: Conditioning, network: TextNetwork) -> Any:
    def evaluate(x: Tensor, noise_level: Tensor, _: Any = None) -> Tensor:
        u, c = network(x, noise_level, away), network(x, noise_level, text)
        return u + scale * (c - u)

    return evaluate


@pytest.mark.parametrize("negative", [None, "an empty room"])
def test_guidance_leads_from_the_negative_prompt_or_the_null_text(negative: str | None) -> None:
    prompt = "forty-two"
    actual = generate(2, prompts=prompt, guidance=2.5, negative_prompt=negative)
    encoded = WordEncoder(8).encode([prompt, negative or ""])
    text = Conditioning(text=encoded.tokens[[0, 0]], text_mask=encoded.mask[[0, 0]])
    away = text.null(model_of().spec)
    if negative is not None:
        away = Conditioning(text=encoded.tokens[[1, 1]], text_mask=encoded.mask[[1, 1]])
    network = by_hand(2.5, text, away, TextNetwork())
    sampling = SamplingConfig(sampler="ddim", steps=4)
    plain = DiffusionModel(network, SCHEDULE, "eps", sampling, sample_shape=(3, 8, 8))
    torch.testing.assert_close(generate(2, plain), actual, rtol=0, atol=1e-5)


def test_dynamic_thresholding_and_intervals_work_with_text() -> None:
    plain = generate(PROMPTS, guidance=Guidance(3.0))
    for options in (
        {"guidance": Guidance(3.0), "threshold": 0.9},
        {"guidance": Guidance(3.0, 0.7)},
        {"guidance": Guidance(3.0, 0.0, (0.3, 5.0))},
    ):
        assert not torch.equal(generate(PROMPTS, **options), plain)


def test_without_a_prompt_the_text_is_null() -> None:
    spec = model_of().spec
    encoded = WordEncoder(8).encode(["anything"])
    null = Conditioning(text=encoded.tokens, text_mask=encoded.mask).null(spec)
    sampler = Sampler(model_of(), model_of().request(seed=3))
    assert torch.equal(generate(1), sampler.sample([0], conditioning=null))


def test_the_vector_is_the_pooled_text() -> None:
    model = model_of(vector=POOLED)
    conditions = Sampler(model, model.request(prompts=PROMPTS)).conditioning([1, 3])
    expected = WordEncoder(8).encode([PROMPTS[1], PROMPTS[0]])
    assert conditions.vector is not None
    assert conditions.text is not None
    assert torch.equal(conditions.vector, expected.pooled)
    assert torch.equal(conditions.text, expected.tokens)
    none = Sampler(model, model.request()).conditioning([1, 3])
    assert none.vector is not None
    assert torch.equal(none.vector, torch.zeros(2, POOLED))
    # A network may take nothing else of the text.
    alone = model_of(text=None, vector=POOLED)
    options: dict[str, Any] = {"guidance": 2.0, "negative_prompt": "b"}
    assert not torch.equal(generate("a", alone, **options), generate("c", alone, **options))


def test_image_embeddings_are_the_vector() -> None:
    network = TextNetwork(text=None, vector=5)
    model = DiffusionModel(network, SCHEDULE, "eps", model_of().sampling, vector="image")
    embeddings = torch.linspace(-1, 1, 10).reshape(2, 5)
    sampler = Sampler(model, model.request(embeddings=embeddings, guidance=2.0))
    conditions = sampler.conditioning([3, 0, 1])
    assert conditions.vector is not None
    assert torch.equal(conditions.vector, embeddings[[1, 0, 1]])
    whole = generate(4, model, embeddings=embeddings, guidance=2.0)
    assert torch.equal(generate([3], model, embeddings=embeddings, guidance=2.0), whole[3:])
    with pytest.raises(UserError, match="`embeddings` has 4 channels; this network was built for"):
        generate(1, model, embeddings=embeddings[:, :4])


def test_the_settings_name_the_prompts() -> None:
    model = model_of()
    request = model.request(prompts=PROMPTS, guidance=2.0, negative_prompt="none")
    settings = Sampler(model, request).settings()
    assert settings["prompts"] == PROMPTS
    assert settings["negative_prompt"] == "none"
    assert "prompts" not in Sampler(model, model.request()).settings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, "`prompts` is empty"),
        ({"prompts": ("a", 3)}, "`prompts` has 3; it must be text"),
        ({"prompts": ("caf\udce9",)}, "not UTF-8"),
        ({"prompts": ("a",), "negative_prompt": "b"}, "`negative_prompt` needs `guidance`"),
        ({"negative_prompt": "b", "guidance": 2.0}, "`negative_prompt` needs `prompts`"),
        ({"guidance": 2.0}, "leads towards a text, but the samples have none; give `prompts`"),
        ({"embeddings": torch.zeros(1, 4)}, "not conditioned on image embeddings"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(1, **options)


def test_prompts_need_a_network_that_takes_text_and_its_encoder() -> None:
    def plain(x: Tensor, *_: Any) -> Tensor:
        return x

    without = DiffusionModel(plain, SCHEDULE, "eps", sample_shape=(1, 4, 4))
    with pytest.raises(UserError, match="this network is not conditioned on text"):
        generate(PROMPTS, without)
    no_encoder = DiffusionModel(TextNetwork(), SCHEDULE, "eps")
    with pytest.raises(UserError, match="name it by `text_encoder`"):
        generate(PROMPTS, no_encoder)
    decoder = DiffusionModel(TextNetwork(text=None, vector=5), SCHEDULE, "eps", vector="image")
    with pytest.raises(UserError, match="image embeddings, which a prior makes of prompts"):
        generate(PROMPTS, decoder)
    with pytest.raises(UserError, match="gives tokens of 6 channels; this network was built for 9"):
        generate(PROMPTS, model_of(text=9))
    with pytest.raises(UserError, match="`ids` has prompts, and `prompts` is given, too"):
        generate(PROMPTS, prompts=PROMPTS)


# --- Networks that attend to text

UNET = replace(
    TINY,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    encoder_hid_dim=CHANNELS,
    cross_attention_dim=8,
    vector_channels=POOLED,
)
NETWORKS = {
    "unet": UNET,
    "dit": replace(TINY_DIT, text_channels=CHANNELS, vector_channels=POOLED),
    "prior": PriorConfig(
        in_channels=5, out_channels=5, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        text_channels=CHANNELS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NETWORKS)
def test_networks_sample_the_same_by_projections_in_any_batch_and_length(family: str) -> None:
    torch.manual_seed(0)
    network = build_network(NETWORKS[family]).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    sampling = SamplingConfig(sampler="ddim", steps=3, clip_x0=family != "prior")

    options: dict[str, Any] = {"prompts": PROMPTS, "negative_prompt": "no", "guidance": 2.0}

    def generate_by(ids: Any, length: int) -> Tensor:
        encoder = WordEncoder(length)
        model = DiffusionModel(network, SCHEDULE, "v", sampling, text_encoder=encoder)
        return generate(ids, model, **options)

    whole = generate_by(6, 8)
    assert whole.isfinite().all()
    torch.testing.assert_close(generate_by([4, 2], 8), whole[[4, 2]], rtol=0, atol=1e-4)
    torch.testing.assert_close(generate_by(6, 24), whole, rtol=0, atol=1e-4)
    assert (generate_by(1, 8)[0] - whole[3]).abs().max() > 1e-3  # the same prompt, other noise

    class Bare(torch.nn.Module):
        """Evaluates the tokens anew at every step."""

        conditioning, sample_shape = network.conditioning, network.sample_shape

        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, *arguments: Any) -> Any:
            return self.inner(*arguments)

    model = DiffusionModel(Bare(), SCHEDULE, "v", sampling, text_encoder=WordEncoder(8))
    torch.testing.assert_close(generate(6, model, **options), whole, rtol=0, atol=1e-4)
