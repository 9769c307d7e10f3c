"""The sampling loop: guidance, thresholds, image to image, inpainting, feature caching."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.sampling import bind, sample
from tests.tiny import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_engine.diffusion.guidance import Guidance, dynamic_threshold, rescale_factor
from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers import sampler as loop_module
from ddpm_engine.samplers.initial_noise import initial_noise, interpolated_noise
from ddpm_engine.samplers.inpainting import levels_of, resampled
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.step_runner import StepRunner
from ddpm_kernels import Stream, gaussian_noise
from ddpm_kernels.dispatch import force_ops

SCHEDULE = NoiseSchedule.linear(1000)
SHAPE = (3, 8, 8)
IDS = torch.tensor([5, 0, 2**40, 7])
LABELS = torch.tensor([1, 3, 0, 2])
STEPS = 6
CPU = torch.device("cpu")


class Conditional(torch.nn.Module):
    """Give a different output for every input, by the same arithmetic in every batch."""

    conditioning = ConditioningSpec(classes=4)
    sample_shape = SHAPE

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        labels = conditioning.labels
        assert labels is not None
        self.batches.append(len(x))
        shift = 0.2 * labels + timesteps / 1000
        return (0.9 * x + 0.1 * x.flip(3)).sin() + 0.1 * shift[:, None, None, None]


def generate(model: Any = None, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "sample_ids": IDS, "labels": LABELS, "seed": 3, "steps": STEPS, "sampler": "ddim",
    }  # fmt: skip
    return sample(Conditional() if model is None else model, SCHEDULE, **{**given, **options})


# --- Guidance


def guided_by_hand(guidance: Guidance, threshold: float | None = None) -> Tensor:
    """DDIM with guidance, written out in float64."""
    table = build_table(SCHEDULE, "ddim", STEPS)
    model = Conditional()
    x = initial_noise(3, IDS, SHAPE).double()
    alpha_bar = SCHEDULE.alpha_bar[table.timesteps]
    following = torch.cat([alpha_bar[1:], torch.ones(1, dtype=torch.float64)])
    for t, now, after in zip(table.timesteps, alpha_bar, following, strict=True):
        c = model(x, t.expand(4), Conditioning(LABELS))
        sigma = ((1 - now) / now).sqrt()
        if guidance.interval[0] < sigma <= guidance.interval[1]:
            u = model(x, t.expand(4), Conditioning(torch.full((4,), 4)))
            m = u + guidance.scale * (c - u)
            ratio = c.flatten(1).std(1, correction=0) / m.flatten(1).std(1, correction=0)
            m = m * (guidance.rescale * ratio + 1 - guidance.rescale)[:, None, None, None]
        else:
            m = c
        x0 = PARAMETERIZATIONS["eps"]().to_x0(m, x, now.sqrt(), (1 - now).sqrt())
        if threshold is None:
            x0 = x0.clamp(-1, 1)
        else:
            bound = torch.quantile(x0.flatten(1).abs(), threshold, dim=1).clamp(min=1)
            bound = bound[:, None, None, None]
            x0 = x0.clamp(-bound, bound) / bound
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    return x


@pytest.mark.parametrize(
    ("guidance", "threshold"),
    [
        (Guidance(2.5, 0.0, (0.3, 2.0), True), None),
        (Guidance(2.5, 0.7, (0.3, 2.0), False), None),
        (Guidance(2.5, 0.7), None),
        (Guidance(4.0), 0.5),
        (Guidance(4.0), 0.9),
    ],
)
def test_guidance_and_dynamic_threshold_are_the_formula(
    guidance: Guidance, threshold: float | None
) -> None:
    actual = generate(guidance=guidance, threshold=threshold).double()
    torch.testing.assert_close(actual, guided_by_hand(guidance, threshold), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("guidance", "batches"),
    [
        (None, [4] * STEPS),
        (Guidance(1.0), [4] * STEPS),
        (Guidance(2.0), [8] * STEPS),
        (Guidance(2.0, two_passes=True), [4] * 2 * STEPS),
        # σ of the six steps is about 157, 34, 9.5, 3.4, 1.5 and 0.6.
        (Guidance(2.0, interval=(2.0, 10.0)), [4, 4, 8, 8, 4, 4]),
    ],
)
def test_evaluations_of_guidance(guidance: Guidance | None, batches: list[int]) -> None:
    model = Conditional()
    generate(model, guidance=guidance)
    assert model.batches == batches


def test_out_of_memory_makes_two_passes() -> None:
    class Small(Conditional):
        def forward(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            if len(x) > 4:
                self.batches.append(len(x))
                raise torch.OutOfMemoryError("too large")
            return super().forward(x, timesteps, conditioning)

    model = Small()
    images = generate(model, guidance=Guidance(2.0))
    assert model.batches == [8] + [4] * 2 * STEPS
    assert torch.equal(images, generate(guidance=Guidance(2.0)))
    with pytest.raises(torch.OutOfMemoryError):
        generate(Small(), guidance=Guidance(2.0, two_passes=False))


def test_rescale_and_threshold_of_one_sample_do_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 5, *SHAPE, generator=generator)
    whole = rescale_factor(c, u, torch.tensor(3.0), 0.7)
    bounds = dynamic_threshold(3 * c, 0.9)
    for b in range(5):
        part = slice(b, b + 1)
        assert torch.equal(rescale_factor(c[part], u[part], torch.tensor(3.0), 0.7), whole[part])
        assert torch.equal(dynamic_threshold(3 * c[part], 0.9), bounds[part])
    assert dynamic_threshold(c * 0.01, 0.9).tolist() == [1.0] * 5


def test_rescaling_is_of_the_mean_whatever_variance_is_predicted() -> None:
    class Learned(Conditional):
        def forward(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            mean = super().forward(x, timesteps, conditioning)
            return torch.cat([mean, 50 * mean.cos()], dim=1)

    guidance = Guidance(2.5, rescale=0.7)
    assert torch.equal(generate(Learned(), guidance=guidance), generate(guidance=guidance))


@pytest.mark.parametrize("sampler", ["dpm++3m", "unipc"])
def test_a_diverged_batch_does_not_affect_the_next(sampler: str) -> None:
    def diverges(x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.labels is not None
        scale = torch.where(conditioning.labels.eq(9), torch.inf, 0.3)
        return scale[:, None, None, None] * x

    labels = torch.tensor([9, 9, 0, 1])
    options: Any = {"sampler": sampler, "shape": SHAPE, "clip": False, "seed": 3, "steps": STEPS}
    sampler_of_all, conditions = bind(diverges, SCHEDULE, IDS, labels=labels, **options)
    first, rest = slice(0, 2), slice(2, 4)
    with pytest.raises(UserError, match=r"not finite: samples 5, 0 of seed 3"):
        sampler_of_all.sample(IDS[first], conditioning=conditions.select(first))
    images = sampler_of_all.sample(IDS[rest], conditioning=conditions.select(rest))
    alone = generate(diverges, sample_ids=IDS[rest], labels=labels[rest], **options)
    assert torch.equal(images, alone)


# --- Image to image


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++3m", "heun"])
def test_image_to_image_takes_the_last_steps_from_a_noised_image(sampler: str) -> None:
    images = torch.linspace(-1, 1, 4 * 192).reshape(4, *SHAPE)
    model = Conditional()
    samples = generate(model, sampler=sampler, images=images, strength=0.5, clip=False)
    table = build_table(SCHEDULE, sampler, STEPS, skip=3)
    assert len(model.batches) == table.evaluations
    assert table.evaluations == (5 if sampler == "heun" else 3)
    # The same by hand, from the state before the first row.
    level = levels_of(SCHEDULE, table).before[0].item()
    state = level**0.5 * images + (1 - level) ** 0.5 * initial_noise(3, IDS, SHAPE)
    conditions = Conditioning(LABELS)
    process = StepRunner(Conditional(), table, (4, *SHAPE), conditions, CPU, clip=False)
    process.begin(state, 3, IDS, conditions)
    for _ in range(process.steps):
        process.step()
    torch.testing.assert_close(samples, process.x, rtol=0, atol=1e-6)


def test_interpolation_joins_two_noises_and_stays_gaussian() -> None:
    shape = (3, 32, 32)
    weights = torch.linspace(0, 1, 5)
    states = interpolated_noise(3, 5, 2**40, weights, shape)
    first, second = initial_noise(3, torch.tensor([5, 2**40]), shape)
    torch.testing.assert_close(states[0], first, rtol=0, atol=1e-6)
    torch.testing.assert_close(states[-1], second, rtol=0, atol=1e-6)
    assert states.flatten(1).std(1).sub(1).abs().max() < 0.05


# --- Inpainting


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m", "heun"])
def test_known_pixels_are_kept_and_the_others_sampled(sampler: str) -> None:
    known = torch.linspace(-1, 1, 4 * 192).reshape(4, *SHAPE)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    images = generate(sampler=sampler, images=known, mask=mask)
    torch.testing.assert_close(images[..., :4], known[..., :4], rtol=0, atol=1e-6)
    assert (images - known)[..., 4:].abs().mean() > 0.1
    part = generate(
        sampler=sampler, images=known[2:3], mask=mask, sample_ids=IDS[2:3], labels=LABELS[2:3],
    )  # fmt: skip
    assert torch.equal(part, images[2:3])


def test_resampling_repeats_every_step_with_fresh_noise() -> None:
    known = torch.zeros(4, *SHAPE)
    nothing = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    model = Conditional()
    images = generate(model, sampler="ddpm", images=known, mask=nothing, repeats=3)
    assert len(model.batches) == 3 * (STEPS - 1) + 1
    table, levels = resampled(
        build_table(SCHEDULE, "ddpm", STEPS),
        levels_of(SCHEDULE, build_table(SCHEDULE, "ddpm", STEPS)),
        3,
    )
    # By hand: no pixel is known, so a repeated step is noised back and taken anew.
    conditions = Conditioning(LABELS)
    process = StepRunner(Conditional(), table, (4, *SHAPE), conditions, CPU)
    process.begin(initial_noise(3, IDS, SHAPE), 3, IDS, conditions)
    noises = []
    for i in range(process.steps):
        process.step()
        if i % 3 != 2 and i < process.steps - 1:
            kept = (levels.before[i + 1] / levels.after[i]).item()
            noise = gaussian_noise(3, IDS, SHAPE, i, Stream.RESAMPLING_NOISE)
            noises.append(noise)
            process.x.copy_(kept**0.5 * process.x + (1 - kept) ** 0.5 * noise)
    torch.testing.assert_close(images, process.x, rtol=0, atol=1e-5)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(noises))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": Guidance(2.0), "labels": None}, "the samples are of no class"),
        ({"threshold": 1.5}, "`threshold` is 1.5"),
        ({"cache_interval": 0}, "`cache_interval` is 0"),
        ({"cache_interval": 2}, "this network caches no features"),
        ({"images": torch.zeros(4, 1, 8, 8)}, r"`images` has shape \(4, 1, 8, 8\); it must be"),
        ({"strength": 0.5}, "`strength` needs `images`"),
        ({"mask": torch.zeros(1, 1, 8, 8).bool()}, "`mask` needs `images`"),
        ({"repeats": 3}, "`repeats` needs `mask`"),
        ({"augmentation_level": 3}, "`augmentation_level` needs `low_resolution`"),
        ({"low_resolution": torch.zeros(4, *SHAPE)}, "this is no super-resolution network"),
        ({"interpolate": (3, 3, 4)}, "give two different ids"),
        ({"interpolate": (3, 4, 4), "sampler": "ddpm"}, "the sampler must add no noise"),
        ({"timesteps": [900, 950], "steps": None}, "timestep 950"),
        ({"images": torch.zeros(4, *SHAPE), "strength": 0.0}, "`strength` is 0.0"),
        ({"images": torch.zeros(4, *SHAPE), "strength": 1.1}, "`strength` is 1.1"),
        (
            {"images": torch.zeros(4, *SHAPE), "mask": torch.zeros(1, 1, 8, 8).bool(),
             "repeats": 2, "sampler": "dpm++2m"},
            "this sampler looks back on earlier steps",
        ),
        ({"images": torch.zeros(4, *SHAPE), "mask": torch.zeros(1, 1, 8, 8)}, "`mask` is"),
        ({"images": torch.zeros(4, *SHAPE), "mask": torch.zeros(8, 8).bool()}, "`mask` is"),
        ({"images": torch.zeros(4, *SHAPE), "mask": torch.zeros(1, 2, 8, 8).bool()}, "`mask` is"),
    ],
)  # fmt: skip
def test_contradictions_are_reported(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(**options)


def test_invalid_guidance() -> None:
    with pytest.raises(UserError, match="trained without classes"):
        generate(lambda x, t, c: x, guidance=Guidance(2.0), shape=SHAPE)
    with pytest.raises(UserError, match=r"`guidance\.rescale` is 1\.5"):
        Guidance(2.0, rescale=1.5)
    with pytest.raises(UserError, match=r"`guidance\.interval` is 3\.0 to 1\.0"):
        Guidance(2.0, interval=(3.0, 1.0))


# --- Steps that can be captured


class Operations(TorchDispatchMode):
    """Counts operations outside of the network that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        if not self.paused and not func.is_view and name != "aten.unflatten.int":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"ddpm.reverse_step_": 1}),
        ({"guidance": Guidance(2.0)}, {"ddpm.reverse_step_": 1, "aten.copy_": 1}),
        ({"guidance": Guidance(2.0, two_passes=True)}, {"ddpm.reverse_step_": 1}),
        ({"super_resolution": True}, {"ddpm.reverse_step_": 1}),
    ],
)
@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [("ddpm", "eps"), ("unipc", "v"), ("heun", "edm"), ("heun", "flow")],
)
def test_a_step_is_the_network_and_at_most_two_operations(
    options: dict[str, Any], expected: dict[str, int], sampler: str, prediction: Any
) -> None:
    table, options = build_table(SCHEDULE, sampler, STEPS, prediction=prediction), dict(options)
    operations = Operations()

    def model(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        operations.paused = True
        output = Conditional()(x, t, conditioning)
        operations.paused = False
        return output

    with torch.inference_mode(), force_ops():
        x = initial_noise(3, IDS, SHAPE)
        conditions = Conditioning(LABELS)
        if options.pop("super_resolution", False):
            conditions = Conditioning(LABELS, x, IDS)
        process = StepRunner(
            model, table, (4, *SHAPE), conditions, CPU,
            alpha_bar=levels_of(SCHEDULE, table).before, keep_x0=False, **options,
        )  # fmt: skip
        null = conditions.null(Conditional.conditioning)
        process.begin(x, 3, IDS, conditions, null if "guidance" in options else None)
        process.step()  # makes the doubled batch
        with operations:
            for _ in range(1, process.steps):
                process.step()
    steps = process.steps - 1
    assert operations.counts == {name: count * steps for name, count in expected.items()}


@pytest.mark.parametrize("options", [{}, {"guidance": Guidance(2.0, interval=(0.5, 10.0))}])
@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_replayed_steps_are_the_same(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sampler: str
) -> None:
    captures = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        captures.append(step)
        return step

    monkeypatch.setattr(loop_module, "captured", capture)
    replayed = generate(sampler=sampler, batch_size=2, capture=True, **options)
    assert torch.equal(replayed, generate(sampler=sampler, batch_size=2, capture=False, **options))
    # Once for each kind of step, though there are two batches.
    assert len(captures) == (2 if options else 1)


# --- Feature caching


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    config = replace(
        TINY,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=5,
    )
    network = UNet(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.requires_grad_(False)


@pytest.mark.parametrize("guidance", [None, Guidance(2.0), Guidance(2.0, two_passes=True)])
def test_deep_levels_run_at_every_nth_step(unet: UNet, guidance: Guidance | None) -> None:
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in (("deep", unet.mid_block), ("shallow", unet.up_blocks[-1]))
    ]
    exact = generate(unet, guidance=guidance, steps=10)
    evaluations = calls["shallow"]
    assert calls["deep"] == evaluations
    calls.clear()
    cached = generate(unet, guidance=guidance, steps=10, cache_interval=3)
    for hook in hooks:
        hook.remove()
    assert calls["shallow"] == evaluations
    assert calls["deep"] == evaluations * 4 // 10
    error = (cached - exact).abs().mean()
    assert 0 < error < 0.2 * exact.std()
    again = generate(unet, guidance=guidance, steps=10, cache_interval=3, batch_size=2)
    torch.testing.assert_close(again, cached, rtol=0, atol=1e-4)


def test_cached_steps_can_be_replayed(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for a CUDA graph: what is read while capturing is what is read when replayed.
    monkeypatch.setattr(loop_module, "captured", lambda step: step)
    eager = generate(unet, steps=12, cache_interval=3, batch_size=2)
    replayed = generate(unet, steps=12, cache_interval=3, batch_size=2, capture=True)
    assert torch.equal(eager, replayed)
