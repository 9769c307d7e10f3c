"""Numbers that cannot be sampled with, in Python: refused by name, or right up to the last one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tests.sampling import bind, sample
from torch import Tensor

from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.figures.toy import toy_points, toy_schedule, train_toy
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.rules import problems
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.finite import NotFiniteError
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler
from ddpm_engine.samplers.samples import sample as sample_model
from ddpm_kernels import Stream, gaussian_noise

SHAPE = (1, 4, 4)
SCHEDULE = NoiseSchedule.linear()
LAST_ID = 2**56 - 1


class Network:
    """Predicts a little of what it sees; three classes."""

    conditioning = ConditioningSpec(classes=3)
    sample_shape = SHAPE

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        return 0.3 * x


MODEL = DiffusionModel(Network(), SCHEDULE, "eps", SamplingConfig("ddim", 4))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
def test_every_seed_of_64_bits_samples(seed: int) -> None:
    images = sample_model(MODEL, 2, seed=seed, progress=False).tensor
    assert images.isfinite().all()
    assert not torch.equal(images, sample_model(MODEL, 2, seed=seed ^ 1, progress=False).tensor)


def test_the_bits_of_a_seed_are_its_noise() -> None:
    ids = torch.tensor([0, LAST_ID])
    signed = gaussian_noise(-1, ids, SHAPE, 0, Stream.INITIAL_NOISE)
    assert torch.equal(gaussian_noise(2**64 - 1, ids, SHAPE, 0, Stream.INITIAL_NOISE), signed)


def test_the_last_id_is_another_sample_than_the_first() -> None:
    images = sample_model(MODEL, [0, LAST_ID], classes=(1,), progress=False).tensor
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    "ids",
    [
        [2**56], [2**63], [-1], [1.5], [True], torch.tensor([0.5]), torch.tensor([2**56]),
        np.array([2.0]), range(2**56 - 1, 2**56 + 1), -3, 2**70,
    ],
)  # fmt: skip
def test_ids_that_are_none(ids: Any) -> None:
    with pytest.raises(UserError, match=r"`ids` (has|is)"):
        sample_model(MODEL, ids, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**64}, "`seed` is 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "`seed` is -9223372036854775809"),
        ({"seed": 1.5}, "`seed` is 1.5; it must be a whole number"),
        ({"threshold": NAN}, "`threshold` is nan"),
        ({"threshold": INF}, "`threshold` is inf"),
        ({"cache_interval": 1.5}, "`cache_interval` is 1.5"),
        ({"repeats": 0}, "`repeats` is 0"),
        ({"augmentation_level": 2**40}, "`augmentation_level` is 1099511627776"),
        ({"eta": NAN}, "`eta` is nan"),
        ({"eta": INF}, "`eta` is inf"),
        ({"steps": 0}, "`steps` is 0"),
        ({"steps": 2.5}, "`steps` is 2.5"),
        ({"steps": 2**70}, "`steps` is"),
        ({"guidance": INF}, r"`guidance\.scale` is inf"),
        ({"guidance": NAN}, r"`guidance\.scale` is nan"),
        ({"guidance": 1e9}, r"`guidance\.scale` is 1000000000.0"),
        ({"classes": ()}, "`classes` is empty"),
        ({"classes": (1.5,)}, "`classes` is 1.5"),
        ({"classes": (7,)}, "`classes` has 7"),
        ({"interpolate": (0, 2**56, 3)}, "`interpolate` has 72057594037927936"),
        ({"interpolate": (0, 1, 2.5)}, "`interpolate` is 2.5"),
        ({"images": torch.zeros(0, *SHAPE)}, "there are no images"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": 1.5}, "`batch_size` is 1.5"),
    ],
)
def test_numbers_that_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_model(MODEL, 2, progress=False, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": 2.0, "rescale": NAN}, r"`guidance\.rescale` is nan"),
        ({"scale": 2.0, "interval": (NAN, 1.0)}, r"`guidance\.interval` is \(nan, 1.0\)"),
        ({"scale": 2.0, "interval": (1.0, NAN)}, r"`guidance\.interval` is \(1.0, nan\)"),
        ({"scale": 2.0, "interval": (INF, INF)}, r"`guidance\.interval` is"),
    ],
)
def test_guidance_that_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Guidance(**values)


def test_guidance_that_guides_no_step() -> None:
    beyond = Guidance(2.0, interval=(1e6, INF))
    with pytest.raises(UserError, match=r"`guidance\.interval` is .*, where none of the steps is"):
        sample_model(MODEL, 2, guidance=beyond, progress=False)
    assert len(sample_model(MODEL, 2, guidance=Guidance(2.0, interval=(1.0, INF)), progress=False))


@pytest.mark.parametrize(
    ("ids", "options", "field"),
    [(2**50, {}, "ids"), (range(2**50), {}, "ids"), (2, {"interpolate": (0, 1, 2**55)}, "")],
)
def test_amounts_that_do_not_fit_into_memory(ids: Any, options: dict[str, Any], field: str) -> None:
    if field:
        with pytest.raises(UserError, match=f"`{field}` asks for at least .* of memory"):
            sample_model(MODEL, ids, progress=False, **options)
    else:  # too many for a list: memory is taken only for those requested
        assert len(sample_model(MODEL, ids, progress=False, **options)) == 2


def test_an_interpolation_has_no_samples_beyond_its_end() -> None:
    with pytest.raises(UserError, match="`ids` has 5, but `interpolate` leads from sample 0 to 4"):
        sample_model(MODEL, [0, 5], interpolate=(3, 4, 5), progress=False)


@pytest.mark.parametrize("value", [NAN, INF])
def test_samples_that_are_not_finite_are_refused_by_their_ids(value: float) -> None:
    def diverges(x: Tensor, *_: object) -> Tensor:
        return torch.where(x[:, :1, :1, :1] > 0, value, 0.1) * x

    ids = range(20)
    options: Any = {"shape": SHAPE, "clip": False, "steps": 3, "sampler": "ddim"}
    sampler, conditions = bind(diverges, SCHEDULE, ids, **options)
    loose = sampler.sample(ids, conditioning=conditions, only_finite=False)
    wrong = [k for k in ids if not loose[k].isfinite().all()]
    assert 0 < len(wrong) < 20
    with pytest.raises(NotFiniteError) as refused:
        sampler.sample(ids, conditioning=conditions)
    named = ", ".join(map(str, wrong[:8]))
    assert f"not finite: samples {named}" in str(refused.value)


# --- Where sampling begins

TOO_CLEAN = {"linear": (1,), "cosine": (1, 2, 3), "sigmoid": (1, 2, 3)}
"""Numbers of steps of which leading spacing begins where the image is strong."""


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m", "unipc"])
@pytest.mark.parametrize("schedule", TOO_CLEAN)
def test_noise_is_never_taken_for_a_nearly_clean_image(schedule: str, sampler: str) -> None:
    model = DiffusionModel(Network(), getattr(NoiseSchedule, schedule)(), "v")
    for spacing, steps in itertools.product(("leading", "trailing", "linspace"), (1, 2, 3, 4, 50)):
        options: Any = {"sampler": sampler, "steps": steps, "spacing": spacing}
        if spacing == "leading" and steps in TOO_CLEAN[schedule]:
            with pytest.raises(UserError, match="take trailing `spacing`"):
                Sampler(model, model.request(**options))
        else:
            Sampler(model, model.request(**options))


def test_low_timesteps_need_an_image_to_begin_with() -> None:
    listed: Any = {"timesteps": (5, 0), "sampler": "ddim", "progress": False}
    with pytest.raises(UserError, match=r"`timesteps` begins at 5, .*or give `images`"):
        sample_model(MODEL, 1, **listed)
    images = torch.zeros(1, *SHAPE)
    assert len(sample_model(MODEL, 1, images=images, strength=1.0, **listed)) == 1
    assert len(sample_model(MODEL, 1, timesteps=(999, 5, 0), progress=False)) == 1


def test_a_schedule_that_never_reaches_noise_begins_where_it_ends() -> None:
    short = NoiseSchedule.linear(40)
    for steps in (20, 40):
        sample(lambda x, *_: 0 * x, short, sample_ids=[0], shape=SHAPE, steps=steps,
               spacing="leading")  # fmt: skip


def test_a_run_that_would_begin_its_samples_without_noise_is_refused() -> None:
    config = RunConfig(
        diffusion=DiffusionConfig(), sampling=SamplingConfig("ddim", 1, spacing="leading")
    )
    (problem,) = problems(config)
    assert "leading `sampling.spacing` of 1 `sampling.steps`" in str(problem)


# --- Options that do nothing


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": "ddim", "variance": "fixed_small"}, "variance"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta"),
        ({"sampler": "heun", "spacing": "leading"}, "spacing"),
        ({"sampler": "ddim", "timesteps": (999, 0), "spacing": "leading"}, "spacing"),
    ],
)
def test_fields_that_do_nothing_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"`{name}` do"):
        MODEL.request(**options)


def test_fields_with_their_defaults_are_not() -> None:
    plain = SamplingConfig()
    MODEL.request(
        sampler="heun", spacing=plain.spacing, eta=plain.eta, variance=plain.variance, steps=5
    )


# --- Training on two-dimensional data


def test_a_toy_of_no_steps_or_no_seed() -> None:
    points, _ = toy_points("moons")
    with pytest.raises(UserError, match="`steps` is 0"):
        train_toy(points, toy_schedule(), 0)
    with pytest.raises(UserError, match="`seed` is 18446744073709551616"):
        train_toy(points, toy_schedule(), 1, seed=2**64)
    train_toy(points, toy_schedule(), 1, seed=2**64 - 1)


def test_requests_check_the_sampling_that_they_are_given() -> None:
    with pytest.raises(UserError, match=r"`eta` is 2\.0"):
        SampleRequest(sampling=SamplingConfig("ddim", eta=2.0))
