"""Sampling steps that a graph replays: nothing from the host, nothing frozen, nothing cast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.recorder import Recorder
from tests.sampling import sample
from tests.tiny import TINY, TINY_DIT
from tests.watching import OnTheHost
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_engine.diffusion.guidance import Guidance, dynamic_threshold
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.dit.dit import DiT
from ddpm_engine.networks.half_weights import half_names, in_half
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers import sampler as sampler_module
from ddpm_engine.samplers.inpainting import KnownPixels, levels_of, resampled
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.step_runner import StepRunner
from ddpm_kernels.dispatch import force_ops

SCHEDULE = NoiseSchedule.linear(1000)
SHAPE = (3, 8, 8)
IDS = torch.tensor([5, 0, 2**40, 7])
LABELS = torch.tensor([1, 3, 0, 2])
META = torch.device("meta")
STEPS = 7


def randomised(config: Any) -> Any:
    """Build the network, always the same, without any zero among its weights."""
    torch.manual_seed(0)
    network = build_network(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


@pytest.fixture(scope="module")
def dit() -> DiT:
    network: DiT = randomised(replace(TINY_DIT, num_class_embeds=4))
    return network


@pytest.fixture(scope="module")
def unet() -> UNet:
    config = replace(
        TINY,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    )
    network: UNet = randomised(config)
    return network


@contextmanager
def half_precision_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that is fast in bfloat16."""
    with monkeypatch.context() as patched:
        patched.setattr(sampler_module, "check_precision", lambda *_: None)
        yield


def generate(network: Any, **options: Any) -> Tensor:
    given: dict[str, Any] = {"sample_ids": IDS, "labels": LABELS, "seed": 3, "steps": STEPS}
    return sample(network, SCHEDULE, **{**given, "sampler": "ddpm", **options})


KNOWN = torch.linspace(-1, 1, 4 * 192).reshape(4, *SHAPE)
MASK = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
MASK[..., :3] = True
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "history": {"sampler": "dpm++3m"},
    "guided": {"guidance": Guidance(2.0)},
    "guided in an interval": {"guidance": Guidance(2.0, interval=(2.0, 10.0))},
    "two passes": {"guidance": Guidance(2.0, two_passes=True)},
    "rescaled": {"guidance": Guidance(2.0, rescale=0.7)},
    "threshold": {"guidance": Guidance(2.0), "threshold": 0.9},
    "cached features": {"guidance": Guidance(2.0, interval=(0.5, 50.0)), "cache_interval": 3},
    "inpainting": {"images": KNOWN, "mask": MASK},
    "inpainting, repeated": {"images": KNOWN, "mask": MASK.expand(4, -1, -1, -1), "repeats": 3},
}
CASES = [
    *(("unet", name) for name in REQUESTS),
    *(("dit", name) for name in ("history", "guided", "two passes", "inpainting")),
]


# --- Nothing from the host


def runner_on_meta(network: Any, request: dict[str, Any], capture: Any) -> StepRunner:
    options = dict(request)
    table = build_table(SCHEDULE, options.pop("sampler", "ddpm"), STEPS)
    table, levels = resampled(table, levels_of(SCHEDULE, table), options.pop("repeats", 1))
    known = None
    if options.pop("images", None) is not None:
        known = KnownPixels(levels, (4, *SHAPE), options.pop("mask").shape, META)
    return StepRunner(
        copy.deepcopy(network).to(META), table, (4, *SHAPE), Conditioning(LABELS.to(META)), META,
        alpha_bar=levels.before, known=known, capture=capture, **options,
    )  # fmt: skip


@pytest.mark.parametrize("capture", [None, lambda step: step], ids=["eager", "captured"])
@pytest.mark.parametrize(("family", "request_name"), CASES)
def test_a_step_takes_nothing_from_the_host(
    family: str, request_name: str, capture: Any, request: pytest.FixtureRequest
) -> None:
    """A copy from the host waits and ends a capture; meta tensors stand for those of a GPU."""
    network = request.getfixturevalue(family)
    runner = runner_on_meta(network, REQUESTS[request_name], capture)
    with torch.inference_mode(), force_ops(), OnTheHost() as host:
        for _ in range(runner.steps):
            runner.step()
    assert host.found == []


# --- Nothing frozen


class Restoring:
    """A capture that records a step and undoes it, as a graph does not take it either."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    @property
    def count(self) -> int:
        return len(self.recorder.recordings)

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        runner: StepRunner = work.func.__self__  # type: ignore[attr-defined]
        kept = [runner.x, runner._row, *([] if runner._history is None else [runner._history])]
        kept += [*runner._features.values()]
        before = [tensor.clone() for tensor in kept]
        replay = self.recorder(work)
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        return torch.inference_mode()(replay)


@pytest.mark.parametrize(("family", "request_name"), CASES)
def test_replayed_operations_take_the_same_steps(
    family: str,
    request_name: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    recording, network = Restoring(), request.getfixturevalue(family)
    monkeypatch.setattr(sampler_module, "captured", recording)
    options = {**REQUESTS[request_name], "batch_size": 2}
    with force_ops():  # as on a GPU: on a CPU, references read numbers
        eager = generate(network, capture=False, **options)
        assert torch.equal(eager, generate(network, capture=True, **options))
    kinds = {"cached features": 3, "guided in an interval": 2, "inpainting, repeated": 2}
    assert recording.count == kinds.get(request_name, 1)


def test_a_batch_that_is_given_up_leaves_the_next_at_its_first_step(unet: UNet) -> None:
    table = build_table(SCHEDULE, "ddpm", STEPS)
    conditions = Conditioning(LABELS)
    runner = StepRunner(
        unet, table, (4, *SHAPE), conditions, torch.device("cpu"), capture=Restoring()
    )
    ends = []
    with torch.inference_mode(), force_ops():
        for given_up in (3, 0):
            for steps in (given_up, STEPS):
                runner.begin(KNOWN, 3, IDS, conditions)
                for _ in range(steps):
                    runner.step()
            ends.append(runner.x.clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("cache_interval", [1, 3])
def test_memory_that_ends_during_a_capture_makes_two_passes(
    unet: UNet, monkeypatch: pytest.MonkeyPatch, cache_interval: int
) -> None:
    recording = Restoring()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        runner = work.func.__self__  # type: ignore[attr-defined]
        together = runner._evaluate_together

        def too_large(*_: Any) -> Any:
            raise torch.OutOfMemoryError("in a graph of its own")

        runner._evaluate_together = too_large
        try:
            return recording(work)
        finally:
            runner._evaluate_together = together

    request: dict[str, Any] = {"cache_interval": cache_interval, "steps": 9, "batch_size": 2}
    monkeypatch.setattr(sampler_module, "captured", capture)
    with force_ops():
        apart = generate(unet, guidance=Guidance(2.0, two_passes=True), capture=False, **request)
        images = generate(unet, guidance=Guidance(2.0), capture=True, **request)
    assert recording.count >= 1
    # The second batch is all in two passes; in the first, features were made anew when it ended.
    rows = slice(2 if cache_interval > 1 else 0, None)
    torch.testing.assert_close(images[rows], apart[rows], rtol=0, atol=1e-4)
    with pytest.raises(torch.OutOfMemoryError), force_ops():
        generate(unet, guidance=Guidance(2.0, two_passes=False), capture=True, **request)


# --- Nothing cast


class WeightCasts(TorchDispatchMode):
    """Counts conversions of a network's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.addresses = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        converts = str(func).startswith(("aten.to.", "aten._to_copy.")) and out is not args[0]
        self.count += converts and args[0].data_ptr() in self.addresses
        return out


def test_half_precision_casts_no_weights_and_changes_no_bit(
    unet: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    options: dict[str, Any] = {"precision": "bf16", "guidance": Guidance(2.0)}
    casts = WeightCasts()
    # On a CPU, convolutions would add their biases, and convert them.
    with force_ops(), half_precision_allowed(monkeypatch):
        halved = generate(unet, **options)
        with monkeypatch.context() as without:
            without.setattr(sampler_module, "in_half", lambda network, _: network)
            casts.addresses = {p.data_ptr() for p in unet.parameters()}
            with casts:
                autocast = generate(unet, **options)
            # What it is about. Those of linear layers applied together are joined before.
            names = [name for name in half_names(unet) if unet.get_parameter(name).dim() == 4]
            assert casts.count >= STEPS * len(names)

        def watched(network: UNet, dtype: torch.dtype) -> UNet:
            copied = in_half(network, dtype)
            casts.addresses = {p.data_ptr() for p in copied.parameters()}
            return copied

        monkeypatch.setattr(sampler_module, "in_half", watched)
        casts.count, casts.addresses = 0, set()
        with casts:
            generate(unet, **options)
    assert casts.count == 0
    assert torch.equal(halved, autocast)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


def test_a_network_in_half_shares_the_rest_and_is_made_once(unet: UNet) -> None:
    halved = in_half(unet, torch.bfloat16)
    names = set(half_names(unet))
    for name, parameter in unet.named_parameters():
        other = halved.get_parameter(name)
        assert (other is parameter) == (name not in names)
        assert other.dtype == (torch.bfloat16 if name in names else torch.float32)
    assert in_half(halved, torch.bfloat16) is halved
    assert in_half(unet, None) is unet
    assert halved.config is not None


# --- Dynamic thresholding


@pytest.mark.parametrize("percentile", [0.1, 0.5, 0.9, 0.995, 1.0])
def test_the_threshold_is_the_quantile_to_the_bit(percentile: float) -> None:
    for count in (1, 2, 192, 193):
        x0 = torch.randn(3, count, 1, 1, generator=torch.Generator().manual_seed(count)) * 5
        x0[1, 0] = float("nan")
        ascending = x0.abs().flatten(1).sort(dim=1).values
        position = percentile * (count - 1)
        below = int(position)
        above = min(below + 1, count - 1)
        expected = torch.lerp(ascending[:, below], ascending[:, above], position - below)
        torch.testing.assert_close(
            dynamic_threshold(x0, percentile), expected.clamp(min=1), rtol=0, atol=0, equal_nan=True
        )
