"""The batch that a device's memory holds, found by trying; memory that ends is injected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import TINY

from ddpm_engine.cli.options import parse_options
from ddpm_engine.cli.sample import Options
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.generation import batch_size as batch_size_module
from ddpm_engine.generation.batch_size import DEFAULT, batch_size_of, largest_that_fits
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler


class Device:
    """Memory for a few samples: what does not fit raises, as torch does."""

    def __init__(self, holds: int) -> None:
        self.holds, self.tried = holds, list[int]()

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.holds:
            raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("holds", "tried"),
    [(64, [64]), (63, [64, 32]), (5, [64, 32, 16, 8, 4]), (1, [64, 32, 16, 8, 4, 2, 1])],
)
def test_a_batch_is_halved_until_it_fits(holds: int, tried: list[int]) -> None:
    device = Device(holds)
    assert largest_that_fits(device, 64) == tried[-1]
    assert device.tried == tried


def test_a_device_for_no_sample_is_refused() -> None:
    with pytest.raises(UserError, match="`batch_size` is auto, and memory is too small") as raised:
        largest_that_fits(Device(0), 4)
    assert raised.value.field == "batch_size"


@pytest.fixture
def sampler() -> Sampler:
    torch.manual_seed(0)
    network = UNet(TINY).eval().requires_grad_(False)
    model = DiffusionModel(network, NoiseSchedule.linear(1000), "eps")
    return Sampler(model, model.request(sampler="ddim", steps=3))


def test_a_number_is_taken_as_it_is_and_a_cpu_is_not_tried(sampler: Sampler) -> None:
    assert batch_size_of(sampler, 7, range(100)) == 7
    assert batch_size_of(sampler, "auto", range(100)) == DEFAULT


@pytest.mark.parametrize(
    ("count", "holds", "free", "tried"),
    [
        (1000, 300, 500, [512, 256]),  # the estimate is too high
        (1000, 10_000, 10_000, [1000]),  # no more than there are
        (100_000, 10_000, 100_000, [1024]),  # no more than keeps a GPU busy
        (3, 10_000, 10_000, [3]),
        (1000, 20, 1, [1]),  # a size is never raised
    ],
)
def test_a_gpu_is_tried_from_an_estimate_of_its_memory(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, count: int, holds: int, free: int,
    tried: list[int],
) -> None:  # fmt: skip
    device, each = Device(holds), 1 << 20
    monkeypatch.setattr(sampler, "device", torch.device("cuda"))
    monkeypatch.setattr(sampler, "warm_up", lambda ids: device(len(ids)))
    monkeypatch.setattr(batch_size_module, "_memory_of", lambda _, ids: each * len(ids))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * each, 0))
    found = batch_size_of(sampler, "auto", range(count))
    assert device.tried == tried
    assert min(found, count) == tried[-1]


@pytest.mark.parametrize("capture", [False, True])
def test_trying_takes_each_kind_of_step_and_leaves_the_samples_alone(
    monkeypatch: pytest.MonkeyPatch, capture: bool
) -> None:
    network = UNet(TINY).eval().requires_grad_(False)
    sizes: list[int] = []
    network.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    model = DiffusionModel(network, NoiseSchedule.linear(1000), "eps")
    expected = Sampler(model, model.request(steps=3)).sample(range(2))
    monkeypatch.setattr("ddpm_engine.samplers.sampler.captured", lambda work: work)
    sampler = Sampler(model, model.request(steps=3), capture=capture)
    sizes.clear()
    sampler.warm_up(range(2))
    assert sizes == [2] * (2 if capture else 1)  # a graph has memory of its own
    assert torch.equal(sampler.sample(range(2)), expected)


def options(*words: str) -> Any:
    return parse_options(Options, ["--checkpoint", "x", "--out", "y", *words], omit_prefixes=True)


def test_the_option_takes_a_number_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert options().machine.batch_size == "auto"
    assert options("--batch-size", "auto").machine.batch_size == "auto"
    assert options("--batch-size", "12").machine.batch_size == 12
    for wrong in ("0", "many"):
        with pytest.raises(SystemExit):
            options("--batch-size", wrong)
        assert "--batch-size" in capsys.readouterr().err
