"""Whole chains of every sampler against diffusers' schedulers, with the same network and noise.

Twice each: against the scheduler's float32 tables, and with its tables in float64, where only the
rounding of the arithmetic is left. `leading` and `linspace` of its multistep solvers, which take
one more step than they visit, are given as lists of timesteps.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_engine.diffusion.flow_schedule import FlowSchedule
from ddpm_engine.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import SAMPLERS, build_table
from ddpm_engine.samplers.step_runner import StepRunner
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Stream, gaussian_noise
from ddpm_kernels.reverse_step.op import reverse_step_reference_

diffusers: Any = pytest.importorskip("diffusers")
scheduling_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")

SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": NoiseSchedule.linear(),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
TYPES: dict[Any, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS: Any = ("leading", "trailing", "linspace")
SHAPE = (3, 4, 3)
IDS = torch.tensor([4, 2**33])
SEED = 6
ROUNDED, EXACT = 1e-3, 1e-5


@cache
def initial() -> Tensor:
    return gaussian_noise(SEED, IDS, SHAPE, 0, Stream.INITIAL_NOISE)


@cache
def noise_of(row: int) -> Tensor:
    return gaussian_noise(SEED, IDS, SHAPE, row, Stream.SAMPLER_NOISE)


class Network:
    """Smooth and contracting, so that rounding does not grow; its x̂_0 may exceed one."""

    def __init__(self, schedule: NoiseSchedule, prediction: Any, variance: bool = False) -> None:
        self.prediction, self.variance = prediction, variance
        self.log_sigma = schedule.log_sigma.clamp(max=20).numpy()

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
        t = timesteps.double().reshape(-1, 1, 1, 1)
        levels = np.interp(t, np.arange(len(self.log_sigma)), self.log_sigma)
        sigma = torch.from_numpy(levels).exp().to(x)
        a = (1 + sigma.square()).rsqrt()
        x_0 = 1.5 * (x * (0.6 - t / 4000).to(x)).tanh()
        output = PARAMETERIZATIONS[self.prediction]().from_x0(x_0, x, a, sigma * a)
        return torch.cat([output, x.sin()], dim=1) if self.variance else output


def ours(table: CoefficientTable, model: Any, clip: bool) -> list[Tensor]:
    """The states after every row, by the loop."""
    runner = StepRunner(model, table, (2, *SHAPE), Conditioning(), torch.device("cpu"), clip=clip)
    scale = table.state_scale.tolist()
    runner.begin(scale[0] * initial(), SEED, IDS, Conditioning())
    states = []
    for index in range(runner.steps):
        runner.step()
        states.append(runner.x / scale[index + 1])
    return states


def ours_exact(table: CoefficientTable, model: Any, clip: bool) -> list[Tensor]:
    """The same in float64."""
    x = initial().double()
    history = x.new_zeros(max(table.history, 1), *x.shape)
    states = []
    for i, t in enumerate(table.timesteps):
        reverse_step_reference_(
            x, model(x, t.expand(2)), torch.nn.functional.pad(table.rows, (0, 1)), torch.tensor(i),
            torch.tensor(SEED), IDS, None, None, None, history, clip,
        )  # fmt: skip
        states.append(x.clone())
    return states


def theirs(peer: Any, model: Any, x: Tensor, **options: Any) -> list[Tensor]:
    """The same by a scheduler whose state is ours."""
    states = []
    for i, t in enumerate(peer.timesteps):
        if "variance_noise" in options:
            options["variance_noise"] = noise_of(i).to(x.dtype)
        x = peer.step(model(x, t.expand(2)), t, x, **options).prev_sample
        states.append(x)
    return states


def in_float64(peer: Any, schedule: NoiseSchedule) -> Any:
    """Replace the scheduler's float32 tables."""
    peer.alphas_cumprod = schedule.alpha_bar
    if hasattr(peer, "final_alpha_cumprod"):
        peer.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(peer, "sigmas"):
        sigmas = schedule.log_sigma.exp()[peer.timesteps]
        peer.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    return peer


def compare(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    errors = [
        ((x.double() - y.double()).abs().max() / y.abs().max().clamp(min=1)).item()
        for x, y in zip(actual, expected, strict=True)
    ]
    assert max(errors) <= tolerance


# --- DDIM and ancestral sampling


# Under linspace their previous timestep is not the one visited next; likewise under trailing unless
# the steps divide T. ε on the cosine schedule is left out: at a = 5e-5 a float32 ε determines x̂_0
# to three digits.
DDIM_CASES = [
    *itertools.product(["linear"], TYPES, [0.0, 0.4], [True, False], [20], ["leading"]),
    ("linear", "eps", 1.0, True, 5, "trailing"),
    ("squaredcos_cap_v2", "x0", 0.4, True, 20, "trailing"),
    ("squaredcos_cap_v2", "v", 0.0, True, 50, "leading"),
    ("linear", "v", 1.0, False, 1000, "trailing"),
]


@pytest.mark.parametrize(("name", "prediction", "eta", "clip", "steps", "spacing"), DDIM_CASES)
def test_ddim(name: str, prediction: Any, eta: float, clip: bool, steps: int, spacing: Any) -> None:
    schedule = SCHEDULES[name]
    model = Network(schedule, prediction)
    peer = diffusers.DDIMScheduler(
        beta_schedule=name, prediction_type=TYPES[prediction], timestep_spacing=spacing,
        clip_sample=clip, set_alpha_to_one=True,
    )  # fmt: skip
    peer.set_timesteps(steps)
    table = build_table(schedule, "ddim", steps, spacing, prediction, eta=eta)
    assert table.timesteps.tolist() == peer.timesteps.tolist()
    # The ε that they take by default does not go with a clipped x̂_0.
    options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": None}
    chain = ours(table, model, clip)
    compare(chain, theirs(peer, model, initial(), **options), ROUNDED)
    peer = in_float64(peer, schedule)
    expected = theirs(peer, model, initial().double(), **options)
    compare(chain, expected, EXACT)
    compare(ours_exact(table, model, clip), expected, 1e-9)


@pytest.mark.parametrize(
    ("name", "spacing", "steps"),
    [*itertools.product(SCHEDULES, SPACINGS, [20]), ("linear", "trailing", 1000)],
)
def test_ddpm_with_learned_variance(
    monkeypatch: pytest.MonkeyPatch, name: str, spacing: Any, steps: int
) -> None:
    schedule = SCHEDULES[name]
    model = Network(schedule, "v", variance=True)
    peer = diffusers.DDPMScheduler(
        beta_schedule=name, prediction_type="v_prediction", timestep_spacing=spacing,
        variance_type="learned_range",
    )  # fmt: skip
    peer.set_timesteps(steps)
    table = build_table(schedule, "ddpm", steps, spacing, "v", variance="learned_range")
    # Where the last timestep is not 0, the peer would add noise to the result.
    noises = iter([noise_of(i) * (i < steps - 1) for i in range(steps)] * 2)
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *_, dtype, **__: next(noises).to(dtype)
    )
    if int(peer.timesteps[-1]) == 0:  # it then samples none itself
        noises = iter([noise_of(i) for i in range(steps - 1)] * 2)
    chain = ours(table, model, True)
    compare(chain, theirs(peer, model, initial()), ROUNDED)
    peer = in_float64(peer, schedule)
    peer.one = torch.tensor(1.0, dtype=torch.float64)
    compare(chain, theirs(peer, model, initial().double()), EXACT)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++1", "ddpm"])
@pytest.mark.parametrize("steps", [5, 50])
def test_zero_terminal_snr(
    monkeypatch: pytest.MonkeyPatch, prediction: Any, sampler: str, steps: int
) -> None:
    """Higher orders differ: they take σ = 4096 for infinity, and extrapolate from there."""
    schedule = NoiseSchedule.linear().rescaled_to_zero_terminal_snr()
    model = Network(schedule, prediction)
    peers: dict[str, Any] = {
        "ddpm": (diffusers.DDPMScheduler, {"variance_type": "fixed_small", "clip_sample": False}),
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
        "dpm++1": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 1}),
    }
    noises = iter([noise_of(i) * (i < steps - 1) for i in range(steps)])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(noises))
    make, options = peers[sampler]
    peer = make(
        prediction_type=TYPES[prediction], timestep_spacing="trailing",
        rescale_betas_zero_snr=True, **options,
    )  # fmt: skip
    peer.set_timesteps(steps)
    table = build_table(schedule, sampler, steps, "trailing", prediction, variance="fixed_small")
    chain = ours(table, model, False)
    compare(chain, theirs(peer, model, initial()), ROUNDED)


# --- Multistep solvers


# Of 1000 steps, `leading` and `linspace` visit timesteps twice over there.
MULTISTEP_CASES = [
    *(("eps", True, 20, spacing) for spacing in SPACINGS),
    ("v", False, 5, "leading"),
    ("v", False, 50, "trailing"),
    ("x0", True, 20, "trailing"),
]


SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++1": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 1}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpm++3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpm++2m_sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2}),
    "unipc3": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}),
}


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize(("prediction", "clip", "steps", "spacing"), MULTISTEP_CASES)
def test_multistep(sampler: str, prediction: Any, clip: bool, steps: int, spacing: str) -> None:
    schedule = SCHEDULES["linear"]
    model = Network(schedule, prediction)
    scheduler, options = SOLVERS[sampler]

    def make() -> Any:
        # Their dynamic threshold is plain clipping once it may not exceed one.
        peer = scheduler(
            prediction_type=TYPES[prediction], timestep_spacing=spacing, thresholding=clip,
            sample_max_value=1.0, **options,
        )  # fmt: skip
        peer.set_timesteps(steps)
        return peer

    peer = make()
    visited = peer.timesteps.tolist()
    table = build_table(schedule, sampler, prediction=prediction, timesteps=visited)
    if spacing == "trailing":
        again = build_table(schedule, sampler, steps, "trailing", prediction)
        assert torch.equal(again.rows, table.rows)
    noise: dict[str, Any] = {"variance_noise": None} if sampler.endswith("sde") else {}
    chain = ours(table, model, clip)
    compare(chain, theirs(peer, model, initial(), **noise), ROUNDED)
    exact = in_float64(make(), schedule)
    expected = theirs(exact, model, initial().double(), **noise)
    compare(chain, expected, EXACT)
    if "unipc" in sampler:  # the other scheduler rounds its state to float32
        compare(ours_exact(table, model, clip), expected, 1e-9)


# --- Karras et al.


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize(("prediction", "steps"), [("eps", 5), ("x0", 20), ("v", 50)])
def test_karras(sampler: str, prediction: Any, steps: int) -> None:
    """Their state is x / a; only with linspace do they see the schedule's own ends of σ."""
    schedule = SCHEDULES["linear"]
    model = Network(schedule, prediction)
    make = getattr(diffusers, f"{sampler.title()}DiscreteScheduler")

    def run(exact: bool) -> list[Tensor]:
        peer = make(
            beta_start=1e-4, beta_end=0.02, prediction_type=TYPES[prediction],
            timestep_spacing="linspace", use_karras_sigmas=True,
        )  # fmt: skip
        peer.set_timesteps(steps)
        dtype = torch.float64 if exact else torch.float32
        if exact:
            first, last = (schedule.log_sigma[[-1, 0]] / 7).exp().tolist()
            sigmas = torch.from_numpy(np.append(np.linspace(first, last, steps) ** 7, 0.0))
            if sampler == "heun":
                inner = sigmas[1:-1].repeat_interleave(2)
                sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
            peer.sigmas = sigmas
        assert len(peer.timesteps) == table.evaluations
        scale = (1 + peer.sigmas**2).sqrt()
        x = initial().to(dtype) * scale[0]
        states = []
        for i, t in enumerate(peer.timesteps):
            timestep = table.timesteps[i] if exact else t
            output = model(peer.scale_model_input(x, t), timestep.expand(2))
            x = peer.step(output, t, x).prev_sample
            states.append(x / scale[i + 1])
        return states

    table = build_table(schedule, sampler, steps, prediction=prediction)
    chain = ours(table, model, False)
    compare(chain, run(exact=False), ROUNDED)
    compare(chain, run(exact=True), EXACT)


# --- EDM


@pytest.mark.parametrize("steps", [1, 18])
@pytest.mark.parametrize(("low", "high", "data"), [(0.002, 80.0, 0.5), (0.01, 20.0, 0.8)])
def test_edm_euler(low: float, high: float, data: float, steps: int) -> None:
    """Step by step. Whatever its tables, the peer rounds its state, 80 at first, to float32."""
    schedule = NoiseSchedule.edm(1000, low, high, data)
    table = build_table(schedule, "euler", steps, prediction="edm")
    noise_input = table.noise_input

    def model(x: Tensor, noise: Tensor, conditioning: object = None) -> Tensor:
        return 0.7 * x.sin() - 0.2 * noise.to(x).reshape(-1, 1, 1, 1)

    def run(exact: bool) -> list[Tensor]:
        peer = diffusers.EDMEulerScheduler(low, high, data)
        peer.set_timesteps(steps)
        if exact:
            a, s = (level.clone() for level in noise_levels(schedule, table.timesteps))
            peer.sigmas = s / a
        scale = (1 + peer.sigmas.double() ** 2).sqrt()
        torch.testing.assert_close(peer.timesteps, noise_input.float(), rtol=1e-5, atol=1e-6)
        x = initial() * peer.init_noise_sigma
        states = []
        for i, t in enumerate(peer.timesteps):
            level = noise_input[i] if exact else t
            output = model(peer.scale_model_input(x, t), level.expand(2))
            x = peer.step(output, t, x).prev_sample
            states.append(x / scale[i + 1])
        return states

    chain = ours(table, model, False)
    compare(chain, run(exact=False), ROUNDED)
    compare(chain, run(exact=True), 2 * EXACT)


# --- Flow matching


def flow_network(x: Tensor, level: Tensor, conditioning: object = None) -> Tensor:
    """A velocity that bends with place and level, given as the scheduler's timestep."""
    return (0.8 * x).sin() - (level.to(x) / 700).cos().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.7])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 3, 7, 28])
def test_flow_matching(sampler: str, steps: int, shift: float) -> None:
    """Step by step; their state is z = x / (a + s), which is also the loop's."""
    peer = getattr(diffusers, f"FlowMatch{sampler.title()}DiscreteScheduler")(shift=shift)
    peer.set_timesteps(steps)
    table = build_table(FlowSchedule.build(1000, shift), sampler, steps, prediction="flow")
    torch.testing.assert_close(table.noise_input.float(), peer.timesteps, rtol=1e-5, atol=1e-4)
    states = []
    z = initial()
    for t in peer.timesteps:
        z = peer.step(flow_network(z, t.expand(2)), t, z).prev_sample
        states.append(z)
    runner = StepRunner(
        flow_network, table, (2, *SHAPE), Conditioning(), torch.device("cpu"), clip=False
    )
    runner.begin(initial(), SEED, IDS, Conditioning())
    chain = []
    for _ in range(runner.steps):
        runner.step()
        chain.append(runner.x.clone())
    # From pure noise to the last level, Heun's method multiplies rounding by half their ratio.
    compare(chain, states, EXACT if sampler == "euler" else 1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_on_levels_that_pipelines_list(shift: float) -> None:
    """Pipelines give sigmas of their own, from 1 to 1 / S: trailing spacing."""
    steps = 20
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    table = build_table(
        FlowSchedule.build(1000, shift), "ddim", steps, "trailing", prediction="flow"
    )
    torch.testing.assert_close(table.noise_input.float(), peer.timesteps, rtol=1e-5, atol=1e-4)
    z = initial()
    for t in peer.timesteps:
        z = peer.step(flow_network(z, t.expand(2)), t, z).prev_sample
    compare(ours(table, flow_network, False)[-1:], [z], EXACT)


@pytest.mark.parametrize("sampler", ["dpm++1", "dpm++2m", "unipc"])
def test_flow_matching_by_multistep_solvers(sampler: str) -> None:
    """On their levels, which begin below pure noise."""
    scheduler, options = SOLVERS[sampler]
    peer = scheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, thresholding=False,
        lower_order_final=True, final_sigmas_type="zero", **options,
    )  # fmt: skip
    peer.set_timesteps(10)
    visited = peer.sigmas[:-1].double() * 1000 - 1
    table = SAMPLERS[sampler](FlowSchedule.build(), visited, "flow")
    z = initial()
    for level, t in zip(table.noise_input.float(), peer.timesteps, strict=True):
        z = peer.step(flow_network(z, level.expand(2)), t, z).prev_sample
    compare(ours(table, flow_network, False)[-1:], [z], ROUNDED)
