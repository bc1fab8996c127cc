import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prmim_core import Grid, Plan, Schedule, TokenCounts, make_plan
from prmim_core._arrays import argsort, array_namespace, compat_namespace, device_of, on_host, scan, scatter


def test_the_namespace_is_that_of_the_library(xp):
    with xp.context():
        array = xp.from_numpy(np.arange(3))
        namespace = array_namespace(array, array)
        xp.assert_equal(namespace.zeros(3, dtype=namespace.int32, device=device_of(array)), np.zeros(3, dtype=int))
        assert compat_namespace(xp.module).__name__ == namespace.__name__


@pytest.mark.parametrize("xp", ["torch", "jax", "strict"], indirect=True)
def test_libraries_are_not_mixed(xp):
    with pytest.raises(TypeError, match=r"^arrays: expected arrays of one library, got \S+ and \S+$"):
        array_namespace(xp.from_numpy(np.arange(3)), np.arange(3))


@pytest.mark.parametrize("wrong", [[1, 2], "text", None, 3])
def test_what_is_no_array_has_no_namespace(wrong):
    with pytest.raises(TypeError, match=f"^arrays: expected arrays of one library, got {type(wrong).__name__}$"):
        array_namespace(wrong)


class ForeignTensor:
    """As of TensorFlow or tinygrad: it has a shape, and no array API."""

    shape, ndim, dtype = (1, 4), 2, "int32"


@pytest.mark.parametrize("with_others", [False, True])
def test_arrays_outside_of_the_standard_learn_the_way_in(with_others):
    others = [np.zeros((1, 4), dtype=np.int64)] * with_others
    message = (
        r"^arrays: expected arrays of the array API standard .* got \w+\.ForeignTensor: make the plan from NumPy "
        r"noise, and pass plan.order and stage_weights\(plan\) as NumPy arrays \(docs/guides/foreign_frameworks.md\)$"
    )
    with pytest.raises(TypeError, match=message):
        make_plan(Schedule(Grid((4,)), TokenCounts(1, 1, 2)), ForeignTensor(), *others)
    assert (Path(__file__).parents[2] / "docs" / "guides" / "foreign_frameworks.md").is_file()


def test_a_namespace_without_the_types_of_the_standard_does_not_count():
    # MLX hands out such a namespace.
    array = ForeignTensor()
    array.__class__ = type("array", (ForeignTensor,), {"__array_namespace__": lambda self, api_version=None: math})
    with pytest.raises(TypeError, match=r"got \w+\.array: make the plan from NumPy noise"):
        array_namespace(array)


@pytest.mark.parametrize("xp", ["numpy", "numpy:readonly", "strict", "torch"], indirect=True)
def test_values_are_read_on_the_host(xp):
    values = on_host(xp.from_numpy(np.arange(3)))
    assert isinstance(values, np.ndarray)
    assert values.tolist() == [0, 1, 2]


def test_values_are_not_read_where_that_would_wait_or_break_a_trace(get_backend):
    torch = pytest.importorskip("torch")
    seen = []

    def look(tensor):
        seen.append(on_host(tensor))
        return tensor + 1

    torch.vmap(look)(torch.zeros(2, 3))
    torch.compile(look, fullgraph=True, backend="eager")(torch.zeros(3))
    with torch.device("meta"):
        look(torch.zeros(3))
    look(get_backend("jax").from_numpy(np.zeros(3)))
    assert seen == [None] * 4


@pytest.mark.parametrize("xp", ["jax", "jax:jit", "jax:x64"], indirect=True)
@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_jax_drops_what_lies_outside_of_a_row(xp, dtype):
    index = np.asarray([[-1, 1], [5, 0]], dtype=dtype)

    def write(index, values):
        return scatter(array_namespace(index), index, values, 4)

    xp.assert_equal(xp.run(write, index, np.asarray([7, 8])), [[0, 8, 0, 0], [8, 0, 0, 0]])


EXTREMES = np.asarray([[0, -1, 5], [127, -128, 5]])


@pytest.mark.parametrize(
    "rows",
    [
        np.iinfo(np.int32).min + np.asarray([[0, 2**32 - 1, 5], [2**31, 2**31 + 1, 2**31 - 1]]).astype(np.int32),
        *(EXTREMES.astype(dtype) for dtype in (np.int8, np.int16, np.int32)),
        np.asarray([[3, 1, 3, 1, 3]] * 2, dtype=np.int32),  # equal values keep their order
        np.asarray([[200, 3, 255, 0]], dtype=np.uint8),
        np.asarray([[0.5, -1.0, 0.5, -np.inf]], dtype=np.float32),
        np.zeros((0, 3), dtype=np.int32),
        np.zeros((2, 0), dtype=np.int32),
    ],
    ids=lambda rows: f"{rows.dtype}-{rows.shape}",
)
def test_argsort_is_that_of_the_standard_and_stable(xp, rows):
    order = xp.run(lambda rows: argsort(array_namespace(rows), rows), rows)
    xp.assert_equal(order, np.argsort(rows, axis=1, stable=True), dtype="index")


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_argsort_does_not_pack_what_is_too_wide(dtype):
    rows = np.asarray([[np.iinfo(dtype).max, 0, 1, np.iinfo(dtype).max - 1]], dtype=dtype)
    assert argsort(np, rows).tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("index", [[[2, 0], [3, 1]], [[0, 3], [0, 3]], [[], []]])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_values_are_scattered_to_their_places(xp, index, dtype):
    index = np.asarray(index, dtype=dtype)
    values = np.asarray([7, 8], dtype=np.int32)[: index.shape[1]]
    expected = np.zeros((2, 4), dtype=np.int32)
    np.put_along_axis(expected, index.astype(int), np.broadcast_to(values, index.shape), axis=1)

    def write(index, values):
        return scatter(array_namespace(index), index, values, 4)

    xp.assert_equal(xp.run(write, index, values), expected, dtype="int32")


def test_an_index_of_a_narrow_type_reaches_every_row_of_a_batch(library):
    # 200 rows of 100 tokens are more than uint8 can count.
    index = np.full((200, 1), 99, dtype=np.uint8)
    expected = np.arange(100)[None, :] == index

    def write(index, values):
        return scatter(array_namespace(index), index, values, 100)

    library.assert_equal(library.run(write, index, np.ones(1, dtype=bool)), expected)


def fibonacci(first, second):
    def step(state):
        older, newer = state
        return (newer, older + newer), newer[:, 0]

    return scan(array_namespace(first), step, (first, second), 6)


def test_scan_loops_a_fixed_number_of_times(xp):
    first, second = np.asarray([[0], [2]], dtype=np.int32), np.asarray([[1], [1]], dtype=np.int32)
    state, outputs = xp.run(fibonacci, first, second)
    xp.assert_equal(outputs, [[1, 1, 2, 3, 5, 8], [1, 3, 4, 7, 11, 18]], dtype="int32")
    xp.assert_equal(state[0], [[8], [18]], dtype="int32")
    xp.assert_equal(state[1], [[13], [29]], dtype="int32")


def test_scan_traces_its_body_once_under_jax(get_backend):
    xp, calls = get_backend("jax:jit"), []

    def count(state):
        def step(state):
            calls.append(None)
            return state + 1, state[:, 0]

        return scan(array_namespace(state), step, state, 500)

    state, _ = xp.run(count, np.zeros((1, 1), dtype=np.int32))
    xp.assert_equal(state, [[500]], dtype="int32")
    assert len(calls) <= 2  # lax.scan may trace twice, to settle the types


@pytest.mark.parametrize("name", ["order", "schedule"])
def test_plans_are_frozen(name):
    plan = Plan(np.zeros((1, 4), dtype=int), Schedule(Grid((4,)), TokenCounts(1, 1, 2)))
    with pytest.raises(AttributeError):
        setattr(plan, name, None)


def test_numpy_plans_do_not_import_jax():
    # In a process of its own: in this one other tests have imported JAX.
    program = """
import sys
import numpy as np
from prmim_core import Grid, Schedule, counter_noise, count_tokens, interpolate, make_plan
plan = make_plan(Schedule(Grid((4, 6)), count_tokens(24, 0.75, 0.5)), counter_noise(0, 0, np.arange(2), 24))
interpolate(np.ones((2, 12, 3)), plan)
loaded = {"torch", "jax", "scipy", "prmim_torch"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_plans_of_two_backends_live_side_by_side(get_backend):
    schedule = Schedule(Grid((4,)), TokenCounts(1, 1, 2))
    Plan(get_backend("jax").from_numpy(np.arange(4)[None]), schedule)
    # Registered once, the class is a pytree whatever its arrays are of.
    import jax

    leaves = jax.tree_util.tree_leaves(Plan(np.arange(4)[None], schedule))
    assert len(leaves) == 1
    assert isinstance(leaves[0], np.ndarray)
