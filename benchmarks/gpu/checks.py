# mypy: ignore-errors
"""Each operation on a device: against float64, and under every transformation of torch.

A check is a name and a function that returns comparisons. It takes the operation's path whatever
the device, so under `force_ops` and Triton's interpreter the same checks run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from benchmarks.gpu import inputs
from benchmarks.gpu.capture import captured
from benchmarks.gpu.compare import EPS32, Comparison, compare, equal, in_ulps, largest
from benchmarks.gpu.inputs import LAYOUTS, Arguments, lay_out, moved, per_pixel
from torch import Tensor

from ddpm_kernels import (
    Column,
    Stream,
    denoising_loss,
    gaussian_noise,
    group_norm_silu,
    q_sample,
    reverse_step,
)
from ddpm_kernels.denoising_loss import TARGETS, denoising_loss_reference
from ddpm_kernels.dispatch import runs_triton
from ddpm_kernels.group_norm_silu import group_norm_silu_reference
from ddpm_kernels.philox import random_words
from ddpm_kernels.q_sample import clean_images, q_sample_reference, training_noise
from ddpm_kernels.reverse_step import reverse_step_reference_
from ddpm_kernels.triton_shim import tl, triton

Extent = Literal["full", "quick", "tiny"]
"""How much is run: all, a minute's worth, or what the interpreter can do in seconds."""

Check = tuple[str, Callable[[], list[Comparison]]]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Whole tiles and vectors, primes, and one pixel of one channel.
IMAGES: dict[Extent, tuple[tuple[int, ...], ...]] = {
    "full": ((4, 3, 64, 64), (2, 3, 17, 23), (2, 4, 16, 16), (1, 1, 1, 1)),
    "quick": ((4, 3, 64, 64), (2, 3, 17, 23)),
    "tiny": ((2, 3, 5, 7),),
}
# Shapes and groups: several slabs; groups of six; groups of ten; chunks; a group wider than tiles.
FEATURES: dict[Extent, tuple[tuple[tuple[int, ...], int], ...]] = {
    "full": (
        ((4, 256, 32, 32), 32), ((1, 12, 23, 23), 2), ((1, 80, 5, 7), 8), ((2, 144, 3, 3), 24),
        ((1, 515, 2, 2), 1), ((1, 64, 256, 256), 32), ((1, 1, 1, 1), 1),
    ),
    "quick": (((4, 256, 32, 32), 32), ((1, 12, 23, 23), 2)),
    "tiny": (((2, 64, 8, 8), 8), ((1, 12, 5, 7), 2)),
}  # fmt: skip
SHAPE = (2, 3, 17, 23)
"""Of the images that the transformations are checked on."""


def named(dtype: torch.dtype) -> str:
    """`bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def sized(shape: tuple[int, ...]) -> str:
    """`4×3×64×64`."""
    return "×".join(map(str, shape))


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function by torch.compile in one graph; by inductor on a GPU."""
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def opcheck(operation: Any, arguments: tuple[Any, ...]) -> list[Comparison]:
    """torch's own check of a registration: schema, fake, autograd and ahead-of-time dispatch."""
    torch.library.opcheck(operation, arguments, atol=1e-4, rtol=1e-4)
    return []


def replayed(
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Arguments,
    change: Callable[[Arguments], None],
    device: torch.device,
) -> list[Comparison]:
    """A captured call, replayed after its inputs changed in place, beside an eager one.

    The changed inputs are copied for the eager call before the replay, which may write to them.
    """
    replay = captured(partial(function, **arguments), device)
    change(arguments)
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    outputs = replay()
    return [
        equal(f"output {i}", ours, expected)
        for i, (ours, expected) in enumerate(zip(outputs, function(**copies), strict=True))
    ]


# --- The counter map


@triton.jit
def _words_kernel(out, seed, sample_ids, step, blocks, STREAM: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of a sample as `ddpm_kernels.philox.normals4` draws them, before Box–Muller."""
    block = tl.arange(0, TILE)
    sample = tl.program_id(0)
    sample_id = tl.load(sample_ids + sample)
    zero = block.to(tl.uint32) & 0
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed),
        block.to(tl.uint32),
        zero + tl.load(step).to(tl.uint32),
        zero + sample_id.to(tl.uint32),
        zero + (((sample_id >> 32) << 8).to(tl.uint32) | STREAM),
    )
    here = out + (sample * blocks + block) * 4
    tl.store(here, w0.to(tl.int64), block < blocks)
    tl.store(here + 1, w1.to(tl.int64), block < blocks)
    tl.store(here + 2, w2.to(tl.int64), block < blocks)
    tl.store(here + 3, w3.to(tl.int64), block < blocks)


SEEDS = (0, -1, 2**63 - 1, -(2**40) + 3)
IDS = (0, 2**32 - 1, 2**32, 2**56 - 1)


def words(seed: int, step: int, device: torch.device) -> list[Comparison]:
    """The words of torch on the device and of `tl.philox`, beside those of torch on a CPU."""
    blocks = 101
    ids = torch.tensor(IDS)
    expected = random_words(seed, ids, 4 * blocks, step, Stream.SAMPLER_NOISE).to(device)
    ids = ids.to(device)
    by_torch = random_words(seed, ids, 4 * blocks, step, Stream.SAMPLER_NOISE)
    found = [equal("torch", by_torch, expected)]
    if not runs_triton(ids):
        return found
    by_triton = torch.empty_like(expected)
    _words_kernel[(len(ids),)](
        by_triton,
        torch.tensor(seed, device=device),
        ids,
        torch.tensor(step, device=device),
        blocks,
        STREAM=int(Stream.SAMPLER_NOISE),
        TILE=128,
    )
    return [*found, equal("triton", by_triton, expected)]


def normals(seed: int, count: int, device: torch.device) -> list[Comparison]:
    """The kernels' normals beside those of torch on a CPU, which are within half an ulp."""
    ids, batch = torch.tensor(IDS), len(IDS)
    shape = (1, 1, count)
    forward = gaussian_noise(seed, ids, shape, 0, Stream.TRAINING_NOISE).to(device)
    reverse = gaussian_noise(seed, ids, shape, 2, Stream.SAMPLER_NOISE).to(device)
    ids = ids.to(device)
    zeros = torch.zeros(batch, *shape, device=device)
    added = q_sample(
        zeros,
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.zeros(1, device=device),
        torch.ones(1, device=device),
        seed,
        ids,
    )
    table = torch.zeros(3, Column.HISTORY, device=device)
    table[2, Column.NOISE] = 1
    row = torch.tensor(2, device=device)
    stepped = reverse_step(zeros, zeros, table, row, seed, ids)
    return [in_ulps("q_sample", added, forward, 4), in_ulps("reverse_step", stepped, reverse, 4)]


def philox_checks(device: torch.device, extent: Extent) -> Iterator[Check]:
    """Words to the bit, normals to four ulp."""
    for seed in SEEDS:
        for step in (0, 2**32 - 1):
            yield f"words, seed {seed}, step {step}", partial(words, seed, step, device)
        count = {"full": 2**20 + 3, "quick": 2**16 + 3, "tiny": 515}[extent]
        yield f"normals, seed {seed}", partial(normals, seed, count, device)


# --- q_sample


def check_q_sample(arguments: Arguments, layout: str, dtype: torch.dtype) -> list[Comparison]:
    """x_t; the floor is four ulp of the noise in it."""
    exact = q_sample_reference(
        **inputs.in_float64(arguments, "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"),
        dtype=torch.float64,
    )
    own = q_sample_reference(**arguments, dtype=torch.float32)
    noise = training_noise(
        arguments["images"], arguments["seed"], arguments["sample_ids"], torch.float64
    )
    sigma = per_pixel(arguments["sqrt_one_minus_alpha_bar"].double()[arguments["timesteps"]])
    floor = 4 * EPS32 * sigma * noise.abs() + EPS32
    laid_out = {**arguments, "images": lay_out(arguments["images"], layout)}
    return [compare("x_t", q_sample(**laid_out, dtype=dtype), own, exact, floor)]


def check_far_strides(device: torch.device) -> list[Comparison]:
    """Channels that lie 1.6 GB apart, so that offsets pass 32 bits."""
    far = 3 * 2**29
    arguments = moved(inputs.of_q_sample((2, 3, 2, 2), torch.uint8), device)
    storage = torch.empty(2 * far + 128, dtype=torch.uint8, device=device)
    images = storage.as_strided((2, 3, 2, 2), (64, far, 4, 1))
    images.copy_(arguments["images"])
    return [equal("x_t", q_sample(**{**arguments, "images": images}), q_sample(**arguments))]


def change_noise(arguments: Arguments) -> None:
    """Another seed and, where there is one, another timestep or row: in place."""
    arguments["seed"] += 12345
    if "timesteps" in arguments:
        arguments["timesteps"].add_(7).remainder_(inputs.STEPS)
    else:
        arguments["row"].sub_(2)


def q_sample_checks(device: torch.device, extent: Extent) -> Iterator[Check]:
    """Shapes, layouts and pairs of precisions; then the transformations."""
    pairs = (
        (torch.uint8, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float16),
    )
    for shape in IMAGES[extent]:
        for stored, dtype in pairs:
            given = moved(inputs.of_q_sample(shape, stored), device)
            for layout in LAYOUTS:
                name = f"{sized(shape)} {layout}, {named(stored)} to {named(dtype)}"
                yield name, partial(check_q_sample, given, layout, dtype)
    given = moved(inputs.of_q_sample(SHAPE, torch.uint8), device)
    if extent == "full":
        yield "strides past 32 bits", partial(check_far_strides, device)
    yield (
        "opcheck",
        lambda: opcheck(torch.ops.ddpm.q_sample.default, (*given.values(), torch.bfloat16)),
    )
    yield (
        "torch.compile",
        lambda: [equal("x_t", compiled(q_sample, device)(**given), q_sample(**given))],
    )
    yield (
        "graph",
        lambda: replayed(lambda **kw: (q_sample(**kw),), given, change_noise, device),
    )


# --- denoising_loss


def loss_and_gradient(
    function: Callable[..., Tensor], upstream: Tensor, prediction: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """The loss `[B]`, and its gradient in the prediction."""
    leaf = prediction.detach().requires_grad_()
    loss = function(prediction=leaf, **arguments)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return loss.detach(), gradient


def loss_upstream(prediction: Tensor) -> Tensor:
    """What flows back into each loss: enough to make gradients of order one."""
    batch = len(prediction)
    count = inputs.values_of(tuple(prediction.shape[1:]))
    return (torch.arange(batch, device=prediction.device) + 1.0) * count / 2


def check_loss(arguments: Arguments, layout: str, target: str) -> list[Comparison]:
    """Loss and gradient; the floor is four ulp of the noise in the target."""
    tables = ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    wide = inputs.in_float64(arguments, "prediction", *tables)
    upstream, weights = loss_upstream(arguments["prediction"]), arguments["weights"]
    exact, exact_gradient = loss_and_gradient(
        denoising_loss_reference, upstream, **wide, target=target
    )
    own, own_gradient = loss_and_gradient(
        denoising_loss_reference, upstream, **arguments, target=target
    )
    laid_out = {
        **arguments,
        "prediction": lay_out(arguments["prediction"], layout),
        # The images in another layout than the prediction.
        "images": lay_out(arguments["images"], LAYOUTS[LAYOUTS.index(layout) - 1]),
    }
    loss, gradient = loss_and_gradient(denoising_loss, upstream, **laid_out, target=target)

    factor = per_pixel(upstream * weights * 2 / exact_gradient[0].numel()).double()
    error = exact_gradient / factor
    noise = torch.full_like(error, EPS32)
    if target != "x0":
        drawn = training_noise(
            arguments["images"], arguments["seed"], arguments["sample_ids"], torch.float64
        )
        noise += 4 * EPS32 * drawn.abs()
        if target == "v":
            x_0 = clean_images(arguments["images"], arguments["flip"], torch.float64)
            noise += EPS32 * x_0.abs()
    of_noise = weights * (2 * error.abs() * noise).mean((1, 2, 3))
    # The difference is rounded to the prediction's precision once before it is multiplied.
    stored = torch.finfo(gradient.dtype).eps / 2 * exact_gradient.abs()
    return [
        compare("loss", loss, own, exact, of_noise + EPS32 * exact),
        compare("gradient", gradient, own_gradient, exact_gradient, factor * noise + stored),
    ]


def check_learned_variance(arguments: Arguments) -> list[Comparison]:
    """Loss and gradient with the term of the bound; the floor is a few ulp of their size."""
    tables = ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    wide = inputs.in_float64(arguments, "prediction", *tables)
    upstream = loss_upstream(arguments["images"])
    exact, own, ours = (
        loss_and_gradient(function, upstream, **given, target="eps")
        for function, given in (
            (denoising_loss_reference, wide),
            (denoising_loss_reference, arguments),
            (denoising_loss, arguments),
        )
    )
    return [
        compare(name, result, peer, right, 16 * EPS32 * (right.abs() + 1))
        for name, result, peer, right in zip(("loss", "gradient"), ours, own, exact, strict=True)
    ]


def compiled_loss(arguments: Arguments, device: torch.device) -> list[Comparison]:
    """Compiled beside eager; the gradient may be multiplied in another order."""
    upstream = loss_upstream(arguments["prediction"])

    def both(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(function, upstream, **arguments, target="v")

    loss, gradient = both(compiled(denoising_loss, device))
    expected, expected_gradient = both(denoising_loss)
    wide = expected_gradient.double()
    return [
        equal("loss", loss, expected),
        compare("gradient", gradient, expected_gradient, wide, 2 * EPS32 * wide.abs()),
    ]


def denoising_loss_checks(device: torch.device, extent: Extent) -> Iterator[Check]:
    """Shapes, precisions, layouts and targets; then the transformations."""
    layouts = cycle(LAYOUTS)
    for shape in IMAGES[extent]:
        for predicted in FLOATS:
            given = moved(inputs.of_denoising_loss(shape, predicted, torch.uint8), device)
            for target in TARGETS:
                # Two by the turn, so that every target meets every layout.
                for layout in (next(layouts), next(layouts)):
                    name = f"{sized(shape)} {layout}, {named(predicted)}, target {target}"
                    yield name, partial(check_loss, given, layout, target)
        given = moved(inputs.of_learned_variance(shape, torch.uint8), device)
        yield f"{sized(shape)}, learned variance", partial(check_learned_variance, given)
    given = moved(inputs.of_denoising_loss(SHAPE, torch.float32, torch.uint8), device)
    upstream = loss_upstream(given["prediction"])
    leaf = {**given, "prediction": given["prediction"].clone().requires_grad_()}
    yield (
        "opcheck",
        lambda: opcheck(torch.ops.ddpm.denoising_loss.default, (*leaf.values(), "v")),
    )
    yield "torch.compile", partial(compiled_loss, given, device)
    captured_call = partial(loss_and_gradient, denoising_loss, upstream, target="v")
    yield "graph", partial(replayed, captured_call, given, change_noise, device)


# --- reverse_step

REVERSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guided": True},
    "rescaled": {"guided": True, "rescale": True},
    "threshold": {"threshold": True},
    "history": {"slots": 2},
    "learned range": {"learned": True},
    "everything": {
        "slots": 3, "guided": True, "rescale": True, "threshold": True, "learned": True,
    },
}  # fmt: skip


def by_reference(arguments: Arguments, dtype: torch.dtype, clip: bool) -> Arguments:
    """The reference in a precision on copies; returns them, with x and history advanced."""
    own = {
        k: v.to(dtype, copy=True) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    reverse_step_reference_(**own, clip=clip)
    return own


def check_reverse_step(
    arguments: Arguments, layout: str, clip: bool, in_place: bool
) -> list[Comparison]:
    """The state and the ring; the floor is four ulp of the largest noise, and one of the state."""
    exact, own = (by_reference(arguments, d, clip) for d in (torch.float64, torch.float32))
    silent = {**arguments, "table": arguments["table"].clone()}
    silent["table"][:, Column.NOISE] = 0
    noise = largest(exact["x"] - by_reference(silent, torch.float64, clip)["x"])
    floor = 4 * EPS32 * noise + EPS32 * largest(exact["x"])

    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for name in ("x", "output", "unconditional"):
        if given[name] is not None:
            given[name] = lay_out(given[name], layout)
    new = reverse_step(**given, clip=clip, in_place=in_place)
    found = [compare("x", new, own["x"], exact["x"], floor)]
    if in_place:
        found.append(equal("x in place", given["x"], new))
    else:
        found.append(equal("x untouched", given["x"], arguments["x"]))
    if arguments["history"] is not None:
        slot = int(arguments["row"]) % len(arguments["history"])
        ring, kept = given["history"], torch.arange(len(arguments["history"])) != slot
        reference, truth = own["history"][slot], exact["history"][slot]
        found.append(compare("history", ring[slot], reference, truth, EPS32 * largest(truth)))
        if bool(kept.any()):
            kept = kept.to(ring.device)
            found.append(equal("history kept", ring[kept], arguments["history"][kept]))
    return found


def stepped(
    function: Callable[..., Tensor], arguments: Arguments, **options: Any
) -> tuple[Tensor, ...]:
    """The new state and the new ring, both as copies, so that the call can be repeated."""
    history = arguments["history"].clone()
    new = function(**{**arguments, "history": history}, **options)
    return new, history


def compiled_step(arguments: Arguments, device: torch.device) -> list[Comparison]:
    """Compiled beside eager."""
    by_compiled = stepped(compiled(reverse_step, device), arguments)
    by_eager = stepped(reverse_step, arguments)
    return [
        equal(name, ours, expected)
        for name, ours, expected in zip(("x", "history"), by_compiled, by_eager, strict=True)
    ]


def reverse_step_checks(device: torch.device, extent: Extent) -> Iterator[Check]:
    """Shapes, precisions of the network's output, and every argument; then transformations."""
    layouts, choices = cycle(LAYOUTS), cycle([(True, True), (True, False), (False, True)])
    for shape in IMAGES[extent]:
        for output_dtype in FLOATS:
            for option, values in REVERSE.items():
                given = moved(inputs.of_reverse_step(shape, output_dtype, **values), device)
                layout, (clip, in_place) = next(layouts), next(choices)
                name = f"{sized(shape)} {layout}, {named(output_dtype)}, {option}"
                yield name, partial(check_reverse_step, given, layout, clip, in_place)
            next(choices)  # so that layouts and choices meet in every combination
    everything = REVERSE["everything"]
    given = moved(inputs.of_reverse_step(SHAPE, torch.bfloat16, **everything), device)
    yield (
        "opcheck",
        lambda: opcheck(torch.ops.ddpm.reverse_step_.default, (*given.values(), True)),
    )
    yield "torch.compile", partial(compiled_step, given, device)
    yield (
        "graph",
        lambda: replayed(lambda **kw: stepped(reverse_step, kw), given, change_noise, device),
    )


# --- group_norm_silu

DIFFERENTIABLE = ("x", "weight", "bias", "scale", "shift")


def norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """The plain-torch reference, in the precision of its arguments."""
    return group_norm_silu_reference(x, groups, weight, bias, scale, shift, eps, activation)[0]


def norm_and_gradients(
    function: Callable[..., Tensor], upstream: Tensor, **arguments: Any
) -> tuple[Tensor, ...]:
    """y, and its gradients against what flows back, in the order of DIFFERENTIABLE."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in DIFFERENTIABLE
        if arguments[name] is not None
    }
    y = function(**{**arguments, **leaves})
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
    return y.detach(), *gradients


def norm_upstream(x: Tensor) -> Tensor:
    """Normals rounded to eight bits, so that they are the same in every precision."""
    normals = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return normals.bfloat16().to(x.device)


def norm_names(arguments: Arguments) -> list[str]:
    """What `norm_and_gradients` returns."""
    return ["y", *(f"d {name}" for name in DIFFERENTIABLE if arguments[name] is not None)]


def check_norm(arguments: Arguments, layout: str, activation: str) -> list[Comparison]:
    """y and every gradient; the floor is two ulp of the largest value, or of a typical sum."""
    options: Arguments = {"upstream": norm_upstream(arguments["x"]), "activation": activation}
    exact = norm_and_gradients(
        inputs.textbook_group_norm, **inputs.in_float64(arguments), **options
    )
    own = norm_and_gradients(norm_reference, **arguments, **options)
    given = {**arguments, "x": lay_out(arguments["x"], layout)}
    if given["scale"] is not None:  # as a network makes them: halves of one tensor
        halves = torch.cat([given["scale"], given["shift"]], dim=1).chunk(2, dim=1)
        given["scale"], given["shift"] = halves
    got = norm_and_gradients(group_norm_silu, **given, **options)
    found = []
    for name, ours, torchs, truth in zip(norm_names(arguments), got, own, exact, strict=True):
        terms = exact[0].numel() // truth.numel()
        typical = terms**0.5 if terms > 1 else 0.0
        floor = 2 * torch.finfo(ours.dtype).eps * max(typical, largest(truth))
        found.append(compare(name, ours, torchs, truth, floor))
    return found


def compiled_norm(arguments: Arguments, device: torch.device) -> list[Comparison]:
    """Compiled beside eager; strides of gradients, and so the order of sums, may differ."""
    upstream = norm_upstream(arguments["x"])
    y, *found = norm_and_gradients(compiled(group_norm_silu, device), upstream, **arguments)
    eager_y, *expected = norm_and_gradients(group_norm_silu, upstream, **arguments)
    return [equal("y", y, eager_y)] + [
        compare(name, ours, eager, eager.double(), 8 * EPS32 * largest(eager))
        for name, ours, eager in zip(norm_names(arguments)[1:], found, expected, strict=True)
    ]


def change_norm(arguments: Arguments) -> None:
    """Another x, in place."""
    arguments["x"].mul_(-0.75).add_(0.125)


def group_norm_silu_checks(device: torch.device, extent: Extent) -> Iterator[Check]:
    """Shapes, precisions, layouts, with and without scale and shift; then transformations."""
    layouts, activations = cycle(LAYOUTS), cycle(["silu", "silu", "none", "silu"])
    for shape, groups in FEATURES[extent]:
        for dtype in FLOATS:
            for film in (True, False):
                given = moved(inputs.of_group_norm_silu(shape, groups, dtype, film), device)
                layout, activation = next(layouts), next(activations)
                with_film = "with scale and shift" if film else "alone"
                name = f"{sized(shape)} {layout}, {named(dtype)}, {activation}, {with_film}"
                yield name, partial(check_norm, given, layout, activation)
            next(layouts)
    given = moved(inputs.of_group_norm_silu((2, 12, 5, 7), 2, torch.float32, True), device)
    given["x"] = lay_out(given["x"], "nhwc")
    leaves = {k: v.clone().requires_grad_() if k in DIFFERENTIABLE else v for k, v in given.items()}
    yield (
        "opcheck",
        lambda: opcheck(torch.ops.ddpm.group_norm_silu.default, (*leaves.values(), "silu")),
    )
    yield "opcheck of the gradient", partial(opcheck_norm_backward, given)
    yield "torch.compile", partial(compiled_norm, given, device)
    captured_call = partial(norm_and_gradients, group_norm_silu, norm_upstream(given["x"]))
    yield "graph", partial(replayed, captured_call, given, change_norm, device)


def opcheck_norm_backward(arguments: Arguments) -> list[Comparison]:
    """opcheck of the registered gradient."""
    x, groups, weight, bias, scale, shift, eps = arguments.values()
    _, statistics = torch.ops.ddpm.group_norm_silu(
        x, groups, weight, bias, scale, shift, eps, "silu"
    )
    return opcheck(
        torch.ops.ddpm.group_norm_silu_backward.default,
        (torch.ones_like(x), x, groups, weight, bias, scale, shift, statistics, "silu"),
    )


CHECKS: dict[str, Callable[[torch.device, Extent], Iterator[Check]]] = {
    "philox": philox_checks,
    "q_sample": q_sample_checks,
    "denoising_loss": denoising_loss_checks,
    "reverse_step": reverse_step_checks,
    "group_norm_silu": group_norm_silu_checks,
}
