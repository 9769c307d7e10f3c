"""The AdamW step and the gradient norm as operations, and the tables that their launches read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.adamw_inputs import (
    NUMBERS,
    REFERENCE_NUMBERS,
    SIZES,
    STATE,
    mapped,
    of_adamw_step,
)
from tests.kernels.comparing import assert_equal
from tests.kernels.conftest import (
    INTERPRETED,
    ON_COMPILERS,
    ON_CUDA,
    ON_KERNELS,
    ON_OPERATIONS,
    Backend,
)
from tests.kernels.inputs import FLOATS, Arguments
from tests.watching import OnTheHost, Watched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_kernels import adamw_step, gradient_norm
from ddpm_kernels.dispatch import force_ops
from ddpm_kernels.tiles import Tile, trying

tables = importlib.import_module("ddpm_kernels.adamw_step.tables")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_step_tiles")


def given_on(device: torch.device, **options: Any) -> Arguments:
    return mapped(lambda t: t.to(device, copy=True), of_adamw_step(**options))


def stepped(function: Callable[..., None], arguments: Arguments) -> Arguments:
    """What is left of a copy of the arguments."""
    arguments = mapped(Tensor.clone, arguments)
    function(**arguments, **NUMBERS)
    return arguments


# --- Registration


@ON_OPERATIONS
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(backend: Backend, optional: bool) -> None:
    given_ = given_on(backend.device, averages=int(optional))
    given_["shadow"] = given_["shadow"] if optional else None
    operations = torch.ops.ddpm
    torch.library.opcheck(
        operations.adamw_step_.default, (*given_.values(), *REFERENCE_NUMBERS.values())
    )
    torch.library.opcheck(operations.gradient_norm.default, (given_["gradients"],))


@ON_OPERATIONS
def test_the_dispatcher_is_taken_where_something_watches(backend: Backend) -> None:
    given_ = given_on(backend.device)
    expected, norm = stepped(adamw_step, given_), gradient_norm(given_["gradients"])
    with Watched() as watched:
        adamw_step(**given_, **NUMBERS)
        found = gradient_norm(given_["gradients"])
    assert watched.names == ["ddpm.adamw_step_.default", "ddpm.gradient_norm.default"]
    assert_equal(found, norm)
    for name in STATE:
        assert_equal(given_[name], expected[name], name)


@ON_COMPILERS
def test_compiles_as_one_graph(backend: Backend) -> None:
    torch._dynamo.reset()
    compiler = "inductor" if backend.name == "cuda" else "aot_eager"

    def step(**arguments: Any) -> None:
        norm = gradient_norm(arguments["gradients"])
        adamw_step(**{**arguments, "gradient_scale": norm.clamp(min=1)})

    given_ = given_on(backend.device)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=compiler)
    got, expected = stepped(compiled, given_), stepped(step, given_)
    for name in STATE:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_nothing_is_taken_from_the_host() -> None:
    given_ = mapped(lambda t: t.to("meta"), of_adamw_step())
    with force_ops(), OnTheHost() as host:
        norm = gradient_norm(given_["gradients"])
        adamw_step(**{**given_, "gradient_scale": norm}, **NUMBERS)
    assert host.found == []
    assert norm.is_meta


@ON_CUDA
def test_a_captured_graph_sees_what_changed(backend: Backend) -> None:
    """Gradients are made within the capture; eager steps on others come between the replays."""
    given_ = given_on(backend.device)
    sources = mapped(Tensor.clone, given_)["gradients"]
    captured = mapped(Tensor.clone, given_)

    def step(arguments: Arguments) -> Tensor:
        arguments["gradients"] = [source * 2 for source in sources]
        norm = gradient_norm(arguments["gradients"])
        adamw_step(**{**arguments, "gradient_scale": norm}, **NUMBERS)
        return norm

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(mapped(Tensor.clone, given_))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        norm = step(captured)
    for round_ in range(3):
        for source in sources:
            source.mul_(1.5)
        for arguments in (captured, given_):
            arguments["learning_rate"].fill_(1e-3 * (round_ + 1))
        expected = step(given_)
        graph.replay()
        assert_equal(norm, expected)
        for name in STATE:
            assert_equal(captured[name], given_[name], name)


# --- Traffic


@pytest.mark.skipif(not INTERPRETED, reason="counts in Triton's interpreter")
@pytest.mark.parametrize("averages", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_a_weight(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, averages: int
) -> None:
    """Those that the kernels load and store: 38 with one average and gradients in half precision.

    What is beyond them is a program's own: its row of the table, its numbers.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    moved = 0
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        nonlocal moved
        moved += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        nonlocal moved
        moved += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    count, tile = 4096, Tile(1024, 4)
    given_ = of_adamw_step([count], [dtype], averages=averages)
    given_["shadow"] = given_["weights"][:count].bfloat16() if dtype == torch.bfloat16 else None
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    with trying("adamw_step", tile), trying("gradient_norm", tile):
        gradient_norm(given_["gradients"])
        adamw_step(**given_, **NUMBERS)
    gradient, shadow = (2, 2) if dtype == torch.bfloat16 else (4, 0)
    bytes_of_a_weight = 2 * gradient + 3 * 8 + averages * 8 + shadow
    assert bytes_of_a_weight * count <= moved <= (bytes_of_a_weight + 0.2) * count


# --- Tables


@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 200]), max_size=5),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=3),
    alignment=st.sampled_from([1, 2, 4, 8]),
    boundary=st.integers(0, 300),
    widest=st.sampled_from([4, 8]),
)
def test_rows_cover_every_element_once(
    sizes: list[int], dtypes: list[torch.dtype], alignment: int, boundary: int, widest: int
) -> None:
    given_ = of_adamw_step(sizes or [0], dtypes, alignment=alignment)
    gradients, offsets = given_["gradients"], given_["offsets"]
    count = given_["weights"].numel()
    shares, addresses = tables.divide(gradients, offsets, count, boundary, 64, widest, CPU)
    assert addresses.tolist() == [gradient.data_ptr() for gradient in gradients]
    seen = []
    for share in shares:
        assert share.alignment <= widest
        for index, start, place, inside in share.rows.tolist():
            assert gradients[index].dtype == share.dtype
            assert place == offsets[index] + start
            assert 0 < inside <= 64
            assert place >= boundary or place + inside <= boundary
            itemsize = share.dtype.itemsize
            assert (addresses[index] + start * itemsize) % min(16, share.alignment * itemsize) == 0
            assert start % share.alignment == place % share.alignment == 0
            seen += [(index, start + i) for i in range(inside)]
    assert sorted(seen) == [(i, e) for i, g in enumerate(gradients) for e in range(g.numel())]


def test_what_is_aligned_is_moved_in_wide_pieces() -> None:
    gradients = [torch.zeros(200, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for offsets, alignment in (([0, 200], 8), ([0, 204], 4), ([0, 202], 2), ([0, 201], 1)):
        shares, _ = tables.divide(gradients, offsets, 405, 0, 64, 8, CPU)
        assert [share.alignment for share in shares] == [8, alignment]
    shares, _ = tables.divide(gradients, None, 0, 0, 64, 4, CPU)
    assert [share.alignment for share in shares] == [4, 4]


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tables that are uploaded."""
    found: list[Tensor] = []
    upload = tables._uploaded

    def counted(table: Tensor, device: torch.device) -> Tensor:
        found.append(table)
        return upload(table, device)

    monkeypatch.setattr(tables, "_uploaded", counted)
    monkeypatch.setattr(tables, "_addresses", tables.cache(tables._Addresses))
    tables._divide.cache_clear()
    return found


@ON_KERNELS
def test_addresses_are_uploaded_when_one_has_changed(
    backend: Backend, uploads: list[Tensor]
) -> None:
    given_ = given_on(backend.device)
    for _ in range(3):
        gradient_norm(given_["gradients"])
        adamw_step(**given_, **NUMBERS)
    # The addresses, and the rows of each of two dtypes for each of two operations.
    assert len(uploads) == 5
    kept = given_["gradients"]
    given_["gradients"] = [*kept[:2], kept[2].clone(), *kept[3:]]
    for _ in range(3):
        gradient_norm(given_["gradients"])
        adamw_step(**given_, **NUMBERS)
    assert len(uploads) == 6
    assert uploads[-1].tolist() == [gradient.data_ptr() for gradient in given_["gradients"]]


class Copies(TorchDispatchMode):
    """Notes the copies that are made, as a graph does, to make them again."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.made.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def test_a_capture_copies_from_memory_that_nothing_writes_again(
    uploads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = ([torch.zeros(n) for n in SIZES] for _ in range(3))

    def addresses_of(gradients: list[Tensor]) -> Tensor:
        return tables.divide(gradients, None, 0, 0, 64, 8, CPU)[1]

    @contextmanager
    def capturing() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(tables, "_capturing", lambda device: True)
            yield

    with pytest.raises(RuntimeError, match="run once on gradients of the same shapes"), capturing():
        addresses_of(first)
    with Copies() as copies:
        eager = addresses_of(first)
        with capturing():
            captured = addresses_of(second)
            assert_equal(addresses_of(second), captured)  # the step, after the norm
        assert eager.tolist() == [gradient.data_ptr() for gradient in first]
        before = len(copies.made)
        # A step outside of the graph neither takes the graph's table for its own ...
        assert addresses_of(second) is not captured
        addresses_of(third)
        with capturing():
            assert addresses_of(third) is not captured
    # ... nor changes what the graph copies when it is replayed.
    target, source = next((t, s) for t, s in copies.made[:before] if t is captured)
    captured.zero_()
    target.copy_(source)
    assert captured.tolist() == [gradient.data_ptr() for gradient in second]


def test_a_capture_may_step_several_sets_of_gradients(
    uploads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [[torch.zeros(n) for n in SIZES] for _ in range(tables.SPARES + 1)]

    def found(gradients: list[Tensor]) -> list[int]:
        addresses: list[int] = tables.divide(gradients, None, 0, 0, 64, 8, CPU)[1].tolist()
        return addresses

    for _ in range(2):  # of two captures, each after a call outside of it
        monkeypatch.setattr(tables, "_capturing", lambda device: False)
        found(sets[0])
        monkeypatch.setattr(tables, "_capturing", lambda device: True)
        for gradients in sets[: tables.SPARES]:
            assert found(gradients) == [gradient.data_ptr() for gradient in gradients]
    fresh = [[torch.zeros(n) for n in SIZES] for _ in range(tables.SPARES)]
    for gradients in fresh:
        found(gradients)
    with pytest.raises(RuntimeError, match="before each capture"):
        found(sets[-1])
