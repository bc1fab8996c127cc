"""Hostile use of the core: tokens of other images, plans from bad input.

Frameworks are imported by the cases that use them.
"""

from functools import partial
from importlib import import_module

import numpy as np
from cases import case, cases, refused

import prmim_core
from prmim_core import (
    Grid,
    Plan,
    Schedule,
    TokenCounts,
    block_visible,
    cell_decoded,
    count_tokens,
    counter_noise,
    furthest_decoded,
    furthest_point_sampling,
    interpolate,
    is_member,
    make_plan,
    nearest_known_distance,
    num_offsets,
    offset_index,
    random_decoded,
    random_visible,
    take_tokens,
    tube_visible,
    unpatchify,
)

X = np.arange(8, dtype=np.float32).reshape(2, 4, 1)
GRID = Grid((4, 4))
SCHEDULE = Schedule(GRID, TokenCounts(4, 4, 8))
NOISE = counter_noise(0, 0, np.arange(2), 16)
IS_VISIBLE = np.arange(32).reshape(2, 16) % 4 == 0

LIBRARIES = {"NumPy": "numpy", "array-api-strict": "array_api_strict", "PyTorch": "torch", "JAX": "jax.numpy"}


def put(library, array):
    """Turn a NumPy array into one of the library."""
    return import_module(LIBRARIES[library]).asarray(array)


# --- kind 12: tokens of other images ---------------------------------------------------------------------------------

OUTSIDE = {
    "the next image": [[5], [0]],
    "the previous image": [[0], [-1]],
    "before the batch": [[-1], [0]],
    "after the batch": [[0], [4]],
    "the last image, counted from the end": [[-4], [0]],
    "far away": [[2**40], [0]],
}
OUTSIDE_OF_LIBRARIES = {
    f"take_tokens of {library}: {name}": (library, np.asarray(index))
    for library in LIBRARIES
    for name, index in OUTSIDE.items()
    if library != "JAX" or name != "far away"  # no int32
}


@cases(12, OUTSIDE_OF_LIBRARIES)
def take_tokens_refuses_or_fills(folder, values):
    library, index = values
    x, index_of_library = put(library, X), put(library, index)
    if library != "JAX":
        refused(lambda: take_tokens(x, index_of_library), IndexError, says="index: expected tokens in [0, 4), got")
        return
    taken = np.asarray(take_tokens(x, index_of_library))[..., 0]
    is_inside = (index >= 0) & (index < 4)
    np.testing.assert_array_equal(taken, np.where(is_inside, index + np.asarray([[0], [4]]), np.nan))


@cases(12, {f"take_tokens under torch.{way}": way for way in ("compile", "export", "vmap")})
def take_tokens_of_traced_torch(folder, way):
    import torch

    x, right, wrong = put("PyTorch", X), torch.tensor([[3], [0]]), torch.tensor([[4], [0]])
    if way == "compile":
        take = torch.compile(take_tokens, fullgraph=True, backend="eager")
    elif way == "export":

        class Take(torch.nn.Module):
            def forward(self, x, index):
                return take_tokens(x, index)

        take = torch.export.export(Take(), (x, right)).module()
    else:
        mapped = torch.vmap(take_tokens)
        take = lambda x, index: mapped(x[None], index[None])[0]  # noqa: E731
    assert take(x, right).flatten().tolist() == [3, 4]
    refused(lambda: take(x, wrong), IndexError, RuntimeError, says="out of")


@case(12, "gradients of an index outside, in JAX")
def gradient_of_jax(folder):
    import jax

    index = put("JAX", np.asarray([[5, 1], [0, -1]]))
    gradient = jax.jit(jax.grad(lambda x: take_tokens(x, index).sum()))(put("JAX", X))
    assert np.asarray(gradient).flatten().tolist() == [0, 1, 0, 0, 1, 0, 0, 0]


NARROW = {
    f"{dtype} indices of {library}, 3,000 images": (library, dtype)
    for library in LIBRARIES
    for dtype in ("uint8", "int8", "int16", "uint16")
}


@cases(12, NARROW)
def narrow_indices(folder, values):
    library, dtype = values
    x = np.arange(3000 * 100, dtype=np.int32).reshape(3000, 100)
    index = np.full((3000, 1), 99, dtype)
    taken = np.asarray(take_tokens(put(library, x), put(library, index)))
    np.testing.assert_array_equal(taken, x[:, 99:])
    assert np.asarray(is_member(put(library, index), 100)).sum() == 3000


NO_INDEX = {
    "float indices": (np.zeros((2, 1)), TypeError),
    "bool indices": (np.zeros((2, 1), bool), TypeError),
    "a list of indices": ([[0], [0]], TypeError),
    "indices of another batch size": (np.zeros((1, 1), int), ValueError),
    "indices without a batch": (np.zeros(2, int), ValueError),
    "complex indices": (np.zeros((2, 1), complex), TypeError),
}


@cases(12, NO_INDEX)
def no_index(folder, values):
    index, error = values
    refused(lambda: take_tokens(X, index), error, says="index")


@cases(12, {"an image without tokens": X[:, :0], "a batch without images": X[:0]})
def nothing_to_take(folder, x):
    assert take_tokens(x, np.zeros((len(x), 0), int)).shape == (len(x), 0, 1)
    if len(x):
        refused(lambda: take_tokens(x, np.zeros((2, 1), int)), IndexError, says="index")


@cases(12, {f"is_member of {library}: {value}": (library, value) for library in LIBRARIES for value in (-1, 4)})
def members_outside(folder, values):
    library, value = values
    index = put(library, np.asarray([[value, 1], [0, 2]]))
    if library == "JAX":
        assert np.asarray(is_member(index, 4)).tolist() == [[False, True, False, False], [True, False, True, False]]
    else:
        refused(lambda: is_member(index, 4), IndexError, says="index: expected tokens in [0, 4)")


@cases(12, {"offsets of token -1": -1, "offsets of token N": 16})
def offsets_outside(folder, value):
    tokens = np.asarray([[0, value]])
    refused(lambda: offset_index(GRID, np.asarray([[1]]), tokens), IndexError, says="known: expected tokens in [0, 16)")


@case(12, "offsets of uint8 tokens")
def narrow_offsets(folder):
    grid, tokens = Grid((14, 14)), np.arange(196)[None]
    expected = offset_index(grid, tokens, tokens[:, ::-1])
    narrow = tokens.astype(np.uint8)
    np.testing.assert_array_equal(offset_index(grid, narrow, narrow[:, ::-1]), expected)


@case(12, "distances between uint8 tokens")
def narrow_distances(folder):
    schedule = Schedule(Grid((14, 14)), count_tokens(196, 0.75, 0.5))
    plan = make_plan(schedule, counter_noise(0, 0, np.arange(2), 196))
    features = np.random.default_rng(0).normal(size=(2, 98, 3))
    narrow = Plan(plan.order.astype(np.uint8), schedule)
    np.testing.assert_array_equal(interpolate(features, narrow), interpolate(features, plan))


# --- kind 14: plans from bad input -----------------------------------------------------------------------------------


def adapters_plan(library, *arguments, **options):
    """Call the plan of the adapter of this library; the core's for others."""
    if library == "PyTorch":
        from prmim_torch import make_plan as adapted
    elif library == "JAX":
        from prmim_jax import make_plan as adapted
    else:
        adapted = prmim_core.make_plan
    return adapted(*arguments, **options)


def wrong(token, value, rows=2):
    """Return distinct visible tokens, but one value."""
    visible = np.tile(np.arange(4), (rows, 1))
    visible[-1, token] = value
    return visible


GIVEN = {"a token twice": wrong(3, 0), "N": wrong(0, 16), "-1": wrong(2, -1), "2**31 - 1": wrong(2, 2**31 - 1)}


@cases(
    14, {f"visible of {library}: {name}": (library, given) for library in LIBRARIES for name, given in GIVEN.items()}
)
def visible_tokens_that_do_not_fit(folder, values):
    library, visible = values
    make = partial(adapters_plan, library, SCHEDULE, put(library, NOISE), visible=put(library, visible))
    if library == "JAX":  # whose values are not read
        refused(lambda: make().check(), ValueError, says="order: expected a permutation of 0 to 15")
    else:
        refused(make, ValueError, IndexError, says="visible: expected")


@case(14, "visible tokens twice, compiled by PyTorch")
def compiled_visible_tokens(folder):
    import torch

    plan = torch.compile(partial(adapters_plan, "PyTorch", SCHEDULE), fullgraph=True, backend="eager")
    refused(
        lambda: plan(put("PyTorch", NOISE), put("PyTorch", wrong(3, 0))), ValueError, says="visible: expected distinct"
    )


DECODED = {
    "visible ones": np.tile(np.arange(4), (2, 1)),
    "twice": np.tile([4, 5, 6, 6], (2, 1)),
    "16 of 16": np.tile([4, 5, 6, 16], (2, 1)),
}


@cases(14, {f"decoded tokens: {name}": decoded for name, decoded in DECODED.items()})
def decoded_tokens_that_do_not_fit(folder, decoded):
    visible = np.tile(np.arange(4), (2, 1))
    refused(lambda: make_plan(SCHEDULE, NOISE, visible, decoded), ValueError, IndexError, says="decoded: expected")


@case(14, "visible tokens that cut a unit")
def cut_units(folder):
    schedule = Schedule(GRID, TokenCounts(4, 4, 8), unit=(2, 2))
    refused(lambda: make_plan(schedule, NOISE, wrong(0, 0)), ValueError, says="visible: expected whole units (2, 2)")


ORDERS = {
    "a token twice": np.tile([0, *range(15)], (2, 1)),
    "floats": np.tile(np.arange(16.0), (2, 1)),
    "a token too many": np.tile(np.arange(17), (2, 1)),
    "beyond the grid": np.tile(np.arange(1, 17), (2, 1)),
    "one image without a batch": np.arange(16),
}


@cases(
    14, {f"an order of {library}: {name}": (library, order) for library in LIBRARIES for name, order in ORDERS.items()}
)
def checked_orders(folder, values):
    library, order = values
    plan = Plan(put(library, order), SCHEDULE)
    refused(plan.check, ValueError, TypeError, says="order: expected")


NOT_NOISE = {
    "NaN": (np.full((2, 16), np.nan, np.float32), ValueError),
    "one NaN": (np.where(np.eye(2, 16) > 0, np.nan, NOISE).astype(np.float32), ValueError),
    "bool": (NOISE > 0, TypeError),
    "complex": (NOISE.astype(np.complex64), TypeError),
    "too few tokens": (NOISE[:, :9], ValueError),
    "one image without a batch": (NOISE[0], ValueError),
}


@cases(
    14, {f"noise of {library}: {name}": (library, value) for library in LIBRARIES for name, value in NOT_NOISE.items()}
)
def noise_that_does_not_fit(folder, values):
    library, (noise, error) = values
    make = partial(adapters_plan, library, SCHEDULE, put(library, noise))
    if library == "JAX" and error is ValueError and noise.shape == NOISE.shape:
        make().check()  # NaN has no place in the order, but the plan is one
    else:
        refused(make, error, says="noise: expected")


NO_ARRAYS = {"a list": NOISE.tolist(), "None": None, "text": "noise", "a number": 5, "a range": range(16)}


@cases(
    14,
    {f"noise of {library} is {name}": (library, value) for library in LIBRARIES for name, value in NO_ARRAYS.items()},
)
def noise_that_is_no_array(folder, values):
    library, noise = values
    refused(lambda: adapters_plan(library, SCHEDULE, noise), TypeError, says="noise: expected a")


@cases(14, {f"NumPy noise for the adapter of {library}": library for library in ("PyTorch", "JAX")})
def noise_of_numpy(folder, library):
    refused(lambda: adapters_plan(library, SCHEDULE, NOISE), TypeError, says="got ndarray")


@case(14, "noise and visible tokens of two libraries")
def mixed_libraries(folder):
    refused(lambda: make_plan(SCHEDULE, put("PyTorch", NOISE), wrong(0, 0)), TypeError, says="of one library, got")


FLOATS = {
    "uniform": np.random.default_rng(0).random((2, 16), np.float32),
    "with ties": np.random.default_rng(0).integers(0, 3, (2, 16)).astype(np.float32),
    "with infinity": np.where(NOISE > 2**30, np.inf, NOISE).astype(np.float32),
    "with zeros of both signs": np.where(NOISE > 0, 0.0, -0.0).astype(np.float32),
}


@cases(14, {f"float noise {name}": noise for name, noise in FLOATS.items()})
def float_noise(folder, noise):
    from prmim_reference.schedule import make_order

    expected = [make_order((4, 4), SCHEDULE.counts, row) for row in noise.tolist()]
    for library in LIBRARIES:
        order = adapters_plan(library, SCHEDULE, put(library, noise)).order
        np.testing.assert_array_equal(np.asarray(order), expected, err_msg=library)


@cases(14, {f"float noise to throw by {throwing!r}": throwing for throwing in ("cell", "weighted")})
def float_noise_without_bits(folder, throwing):
    schedule = Schedule(GRID, SCHEDULE.counts, throwing=throwing)
    for library in LIBRARIES:
        noise = put(library, FLOATS["uniform"])
        weights = noise if throwing == "weighted" else None
        make = partial(adapters_plan, library, schedule, noise, weights=weights)
        refused(make, TypeError, says="noise: expected int")


NO_GRID = {
    "Schedule": lambda grid: Schedule(grid, SCHEDULE.counts),
    "block_visible": lambda grid: block_visible(grid, (2, 2), 1, NOISE),
    "tube_visible": lambda grid: tube_visible(grid, 4, NOISE),
    "furthest_decoded": lambda grid: furthest_decoded(grid, 1, NOISE, IS_VISIBLE),
    "cell_decoded": lambda grid: cell_decoded(grid, 1, NOISE, IS_VISIBLE),
    "furthest_point_sampling": lambda grid: furthest_point_sampling(grid, 1, NOISE),
    "nearest_known_distance": lambda grid: nearest_known_distance(grid, IS_VISIBLE),
    "num_offsets": lambda grid: num_offsets(grid),
    "unpatchify": lambda grid: unpatchify(np.zeros((1, 16, 4)), (2, 2), grid),
}


@cases(14, {f"{name} of a tuple in place of a Grid": call for name, call in NO_GRID.items()})
def tuples_are_no_grids(folder, call):
    refused(lambda: call((4, 4)), TypeError, says="expected a Grid")


NO_SCHEDULE = {
    "counts of another grid": (ValueError, lambda: Schedule(GRID, TokenCounts(1, 1, 1))),
    "counts that are a tuple": (TypeError, lambda: Schedule(GRID, (4, 4, 8))),
    "stages of 0": (ValueError, lambda: Schedule(GRID, SCHEDULE.counts, stages=0)),
    "stages of 1.5": (TypeError, lambda: Schedule(GRID, SCHEDULE.counts, stages=1.5)),
    "stages of a list": (TypeError, lambda: Schedule(GRID, SCHEDULE.counts, stages=[2] * 1000)),
    "throwing of a long name": (ValueError, lambda: Schedule(GRID, SCHEDULE.counts, throwing="x" * 10_000)),
    "a plan of a tuple": (TypeError, lambda: make_plan((4, 4), NOISE)),
    "counts of a bool": (TypeError, lambda: TokenCounts(True, 1, 1)),
    "counts of an array": (TypeError, lambda: TokenCounts(np.arange(1000), 1, 1)),
    "a float number of tokens": (TypeError, lambda: count_tokens(16.0, 0.5)),
    "a ratio of text": (TypeError, lambda: count_tokens(16, "x" * 10_000)),
    "a number of visible tokens of 2.0": (TypeError, lambda: random_visible(2.0, NOISE)),
    "more decoded tokens than tokens": (ValueError, lambda: random_decoded(17, NOISE, IS_VISIBLE)),
}


@cases(14, NO_SCHEDULE)
def no_schedule(folder, values):
    error, call = values
    refused(call, error, says="expected")


@cases(14, {f"counts of {integer.__name__}": integer for integer in (np.int64, np.uint8)})
def numpy_integers(folder, integer):
    counts = count_tokens(integer(16), 0.75, 0.5, mask_unit=integer(2))
    assert repr(counts) == repr(count_tokens(16, 0.75, 0.5, mask_unit=2))
    assert repr(Schedule(GRID, counts, stages=integer(2))) == repr(Schedule(GRID, counts, stages=2))


@cases(14, {"9 stages of 8 tokens": (9, 8), "4 stages of 1 token": (4, 1), "4 stages of none": (4, 0)})
def more_stages_than_tokens(folder, values):
    stages, thrown = values
    schedule = Schedule(GRID, TokenCounts(4, 12 - thrown, thrown), stages=stages)
    assert schedule.stage_sizes == (1,) * thrown + (0,) * (stages - thrown)
    few = Schedule(GRID, schedule.counts, stages=max(thrown, 1))
    features = np.random.default_rng(0).normal(size=(2, 16 - thrown, 3)).astype(np.float32)
    expected = interpolate(features, make_plan(few, NOISE))
    for library in ("NumPy", "PyTorch"):
        plan = adapters_plan(library, schedule, put(library, NOISE))
        np.testing.assert_allclose(np.asarray(interpolate(put(library, features), plan)), expected, atol=1e-5)


@cases(14, {f"an empty batch of {library}": library for library in LIBRARIES})
def empty_batches(folder, library):
    plan = adapters_plan(library, SCHEDULE, put(library, NOISE[:0]), visible=put(library, wrong(0, 0)[:0]))
    plan.check()
    assert plan.restore.shape == plan.mask.shape == (0, 16)
    assert interpolate(put(library, np.zeros((0, 8, 3), np.float32)), plan).shape == (0, 16, 3)


SAMPLES = {
    "5 and 2**32 + 5": [5, 2**32 + 5],
    "2**33 and 2**34": [2**33, 2**34],
    "2**31 and 2**63 - 1": [2**31, 2**63 - 1],
}


@cases(14, {f"samples {name}": samples for name, samples in SAMPLES.items()})
def large_samples(folder, samples):
    from prmim_reference.noise import counter_noise as expected_noise

    expected = [expected_noise(1, 2, sample, 9) for sample in samples]
    assert not set(expected[0]) & set(expected[1])
    for library in LIBRARIES:
        noise = counter_noise(1, 2, np.asarray(samples), 9, xp=import_module(LIBRARIES[library]))
        np.testing.assert_array_equal(np.asarray(noise), expected, err_msg=library)


NO_SAMPLES = {
    "negative": (ValueError, lambda: counter_noise(0, 0, np.asarray([-1]), 4)),
    "of floats": (TypeError, lambda: counter_noise(0, 0, np.asarray([1.0]), 4)),
    "of two axes": (ValueError, lambda: counter_noise(0, 0, np.zeros((1, 1), int), 4)),
    "at a negative step": (ValueError, lambda: counter_noise(0, np.asarray([-1]), np.arange(1), 4)),
    "at a step of 2**31": (ValueError, lambda: counter_noise(0, 2**31, np.arange(1), 4)),
    "at a step of True": (TypeError, lambda: counter_noise(0, True, np.arange(1), 4)),
    "of a seed of 2**32": (ValueError, lambda: counter_noise(2**32, 0, np.arange(1), 4)),
    "of 0 tokens": (ValueError, lambda: counter_noise(0, 0, np.arange(1), 0)),
}


@cases(14, {f"samples {name}": value for name, value in NO_SAMPLES.items()})
def samples_that_do_not_fit(folder, values):
    error, call = values
    refused(call, error, says="expected")
