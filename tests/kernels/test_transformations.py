"""What torch does to an operation: its own checks, compilers, graph capture, no host in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.comparing import assert_equal
from tests.kernels.conftest import (
    INTERPRETED,
    ON_COMPILERS,
    ON_CUDA,
    ON_KERNELS,
    ON_OPERATIONS,
    Backend,
)
from tests.kernels.inputs import (
    LAYOUTS,
    REVERSE,
    Arguments,
    copied,
    lay_out,
    of_denoising_loss,
    of_group_norm_silu,
    of_modulate,
    of_q_sample,
    of_residual_sum,
    of_reverse_step,
    of_training_draws,
)
from tests.watching import OnTheHost, Watched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_kernels import (
    denoising_loss,
    group_norm_silu,
    modulate,
    q_sample,
    random_integers,
    residual_sum,
    reverse_step,
)
from ddpm_kernels.dispatch import force_ops, skips_dispatcher
from ddpm_kernels.draws import training_draws
from ddpm_kernels.gaussian_noise import gaussian_noise_reference
from ddpm_kernels.philox import Stream
from ddpm_kernels.tiling import as_scalar

Call = Callable[..., tuple[Tensor, ...]]


def noised(function: Callable[..., Tensor], arguments: Arguments) -> tuple[Tensor, ...]:
    """x_t."""
    return (function(**arguments, dtype=torch.bfloat16),)


def drawn(function: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, ...]:
    """All that is drawn, as integers."""
    return tuple(one.long() for one in function(**arguments))


def stepped(function: Callable[..., Tensor], arguments: Arguments) -> tuple[Tensor, ...]:
    """The new state and the new ring, both as copies, so that the call can be repeated."""
    history = arguments["history"]
    history = None if history is None else history.clone()
    new = function(**{**arguments, "history": history})
    return (new,) if history is None else (new, history)


def differentiated(*names: str) -> Callable[[Callable[..., Any], Arguments], tuple[Any, ...]]:
    """The results and their gradients against a cotangent that is not constant."""

    def run(function: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, ...]:
        leaves = {
            k: arguments[k].detach().requires_grad_() for k in names if arguments[k] is not None
        }
        out = function(**{**arguments, **leaves})
        results = out if isinstance(out, tuple) else (out,)
        cotangents = [
            torch.linspace(-1, 1, one.numel(), device=one.device).view(one.shape).to(one)
            for one in results
        ]
        gradients = torch.autograd.grad(results, list(leaves.values()), cotangents)
        return *(one.detach() for one in results), *gradients

    return run


def added(function: Callable[..., Any], arguments: Arguments) -> tuple[Tensor, ...]:
    """The sum, its moments where there are any, and the gradients of both branches."""
    moments = None

    def sum_of(**named: Any) -> Tensor:
        nonlocal moments
        y, moments = function(**named)
        return y

    arguments = {k: v for k, v in arguments.items() if k != "slab_pixels"}
    found = differentiated("h", "x")(sum_of, arguments)
    return found if moments is None else (*found, moments.values)


NORM = ("x", "weight", "bias", "scale", "shift")
MODULATE = ("x", "y", "gate", "scale", "shift", "weight")
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Arguments]] = {
    "training_draws": (training_draws, drawn, of_training_draws()),
    "q_sample": (q_sample, noised, of_q_sample()),
    "q_sample, plain": (q_sample, noised, of_q_sample(stored=torch.float32, flip=False)),
    "q_sample, latents": (q_sample, noised, of_q_sample(latent=True)),
    **{
        f"denoising_loss, {target}": (
            denoising_loss, differentiated("prediction"), of_denoising_loss(target=target)
        )
        for target in ("eps", "x0", "v")
    },
    "denoising_loss, learned": (
        denoising_loss, differentiated("prediction"),
        of_denoising_loss(target="eps", learned=True, optional=False),
    ),
    "denoising_loss, latents": (
        denoising_loss, differentiated("prediction"), of_denoising_loss(latent=True)
    ),
    "denoising_loss, latents, learned": (
        denoising_loss, differentiated("prediction"),
        of_denoising_loss(target="eps", learned=True, latent=True),
    ),
    "denoising_loss, bfloat16": (
        denoising_loss, differentiated("prediction"), of_denoising_loss(predicted=torch.bfloat16)
    ),
    **{
        f"reverse_step, {variant}": (reverse_step, stepped, of_reverse_step(**options))
        for variant, options in REVERSE.items()
    },
    "group_norm_silu": (group_norm_silu, differentiated(*NORM), of_group_norm_silu()),
    "group_norm_silu, plain": (
        group_norm_silu, differentiated(*NORM), of_group_norm_silu(film=False, activation="none")
    ),
    "group_norm_silu, bfloat16": (
        group_norm_silu, differentiated(*NORM),
        of_group_norm_silu((2, 12, 5, 7), 2, torch.bfloat16, affine_dtype=torch.float32),
    ),
    "residual_sum": (residual_sum, added, of_residual_sum()),
    "residual_sum, moments": (
        residual_sum, added, of_residual_sum((2, 6, 33, 32), slab_pixels=256)
    ),
    "modulate": (modulate, differentiated(*MODULATE), of_modulate()),
    "modulate, first": (
        modulate, differentiated(*MODULATE), of_modulate(gated=False, weighted=True, norm="rms")
    ),
    "modulate, bfloat16": (
        modulate, differentiated(*MODULATE),
        of_modulate((2, 9, 40), torch.bfloat16, weighted=True),
    ),
}  # fmt: skip


ONE_OF_EACH = (
    "training_draws", "q_sample", "q_sample, latents", "denoising_loss, v",
    "denoising_loss, latents", "denoising_loss, learned",
    "reverse_step, everything", "group_norm_silu", "group_norm_silu, plain",
    "residual_sum, moments",
    "modulate", "modulate, first",
)  # fmt: skip


def in_layout(arguments: Arguments, layout: str) -> Arguments:
    """The images among the arguments laid out; a state stays channels-last."""
    return {
        k: lay_out(v, layout) if isinstance(v, Tensor) and v.ndim == 4 and k != "history" else v
        for k, v in arguments.items()
    }


@ON_OPERATIONS
@pytest.mark.parametrize("case", ONE_OF_EACH if INTERPRETED else CASES)
def test_opcheck(backend: Backend, case: str) -> None:
    """Schema, fake, autograd and ahead-of-time dispatch, in some layout."""
    function, _, plain = CASES[case]
    given_ = backend.moved(in_layout(plain, LAYOUTS[list(CASES).index(case) % 4]))
    given_ = {
        k: v.requires_grad_()
        if k in ("prediction", "h", *NORM, *MODULATE) and isinstance(v, Tensor)
        and function not in (q_sample, reverse_step, training_draws) else v
        for k, v in copied_with_strides(given_).items()
    }  # fmt: skip
    values: tuple[Any, ...] = tuple(given_.values())
    if function is q_sample:
        values = (*values[:7], torch.bfloat16, int(Stream.TRAINING_NOISE), *values[7:])
    if function is reverse_step:
        values += ("plain" in case,)
    if function is training_draws:
        values = (*values[:5], 2**31, *values[6:])  # the threshold of dropped labels
    name = "reverse_step_" if function is reverse_step else function.__name__
    torch.library.opcheck(getattr(torch.ops.ddpm, name).default, values, atol=1e-4, rtol=1e-4)


def copied_with_strides(arguments: Arguments) -> Arguments:
    """Copies that do not share memory, so that each can be differentiated."""
    return {
        k: v.detach().clone(memory_format=torch.preserve_format) if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }


@ON_OPERATIONS
@pytest.mark.parametrize(
    ("film", "layout"), [(True, "nchw"), *([] if INTERPRETED else [(False, "nhwc")])]
)
def test_opcheck_of_the_gradient_of_group_norm(backend: Backend, film: bool, layout: str) -> None:
    given_ = backend.moved(in_layout(of_group_norm_silu(film=film), layout))
    _, statistics = torch.ops.ddpm.group_norm_silu(*given_.values())
    x, groups, weight, bias, scale, shift, _, activation = given_.values()
    dy = lay_out(torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape), layout)
    torch.library.opcheck(
        torch.ops.ddpm.group_norm_silu_backward.default,
        (dy, x, groups, weight, bias, scale, shift, statistics, activation, film),
    )


@ON_OPERATIONS
@pytest.mark.parametrize("gated", [True, *([] if INTERPRETED else [False])])
def test_opcheck_of_the_gradient_of_modulate(backend: Backend, gated: bool) -> None:
    given_ = backend.moved(of_modulate(gated=gated, weighted=not gated))
    x, y, gate, scale, _, weight, *norm = given_.values()
    dm = torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape)
    torch.library.opcheck(
        torch.ops.ddpm.modulate_backward.default,
        (dm.flip(1) if gated else None, dm, x, y, gate, scale, weight, *norm),
    )


@ON_OPERATIONS
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_the_dispatcher_is_taken_where_something_watches(backend: Backend, case: str) -> None:
    """Under a mode every operation is seen; without one the bits and strides are the same."""
    function, run, plain = CASES[case]
    given_ = backend.moved(in_layout(plain, "nhwc"))
    expected = run(function, copied_with_strides(given_))
    with Watched() as watched:
        found = run(function, given_)
    assert any(name.startswith("ddpm.") for name in watched.names)
    for got, right in zip(found, expected, strict=True):
        assert_equal(got, right)
        assert got.stride() == right.stride()


def test_what_takes_the_dispatcher() -> None:
    plain = torch.ones(2)
    seen: list[bool] = []

    def look(row: Tensor) -> Tensor:
        seen.append(skips_dispatcher(row))
        return row

    torch.func.vmap(look)(torch.ones(3, 2))
    with Watched():
        seen.append(skips_dispatcher(plain))
    seen.append(skips_dispatcher(plain.to("meta")))
    seen.append(skips_dispatcher(FakeTensorMode().from_tensor(plain)))
    assert seen == [False] * 4
    assert skips_dispatcher(plain)
    assert skips_dispatcher(torch.nn.Parameter(plain))


@ON_COMPILERS
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_compiles_as_one_graph(backend: Backend, case: str) -> None:
    torch._dynamo.reset()
    function, run, plain = CASES[case]
    given_ = backend.moved(in_layout(plain, "nhwc"))
    compiler = "inductor" if backend.name == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
    with_grad = run(compiled, given_)
    for got, expected in zip(with_grad, run(function, given_), strict=True):
        assert got.dtype == expected.dtype
        half = got.dtype == torch.bfloat16
        scale = 1e-2 if half else 1e-5
        torch.testing.assert_close(
            got, expected, rtol=10 * scale, atol=scale * float(expected.abs().max())
        )
    assert with_grad[0].stride() == run(function, given_)[0].stride()


@ON_KERNELS
@pytest.mark.parametrize("case", CASES)
def test_64_bit_offsets_make_the_same_result(
    backend: Backend, wide_offsets: Callable[[], None], case: str
) -> None:
    function, run, plain = CASES[case]
    given_ = backend.moved(in_layout(plain, LAYOUTS[list(CASES).index(case) % 4]))
    expected = run(function, copied_with_strides(given_))
    wide_offsets()
    for got, narrow in zip(run(function, given_), expected, strict=True):
        assert_equal(got, narrow)


@ON_CUDA
@pytest.mark.parametrize("case", CASES)
def test_a_captured_graph_sees_what_changed(backend: Backend, case: str) -> None:
    """Inputs change in place between capture and replay, as a sampling loop changes them."""
    function, run, plain = CASES[case]
    given_ = backend.moved(in_layout(plain, "nhwc"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(function, given_)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(function, given_)
    for name, change in (("seed", 12345), ("row", -2), ("timesteps", -2), ("x", 0.125)):
        if name in given_:
            given_[name] += change
    expected = run(function, copied(given_))
    graph.replay()
    for got, right in zip(outputs, expected, strict=True):
        assert_equal(got, right)


def test_nothing_is_taken_from_the_host() -> None:
    """A copy from the host waits and ends a capture; meta tensors stand for those of a GPU."""
    meta = torch.device("meta")
    with force_ops():
        for function, run, plain in CASES.values():
            given_ = {k: v.to(meta) if isinstance(v, Tensor) else v for k, v in plain.items()}
            given_ |= {"seed": 3} if "seed" in given_ else {}
            with OnTheHost() as host:
                run(function, given_)
            assert host.found == [], function
        ids = torch.arange(3, device=meta)
        with OnTheHost() as host:
            seed, step = as_scalar(3, meta), as_scalar(7, meta)
            gaussian_noise_reference(seed, ids, 3, 4, 5, step, Stream.SAMPLER_NOISE)
            random_integers(3, ids, 10, 7, Stream.TRAINING_TIMESTEP)
        assert host.found == []
