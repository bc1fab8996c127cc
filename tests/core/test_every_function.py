"""Properties of every public array function, on every library.

Results equal those of NumPy, in library, device and value. A batch gives the same results as its images one by one.
Arguments are not modified. Backends that jit fail at any branch on values.
"""

import inspect
from dataclasses import replace

import numpy as np
import pytest

import prmim_core
from prmim_core import (
    Grid,
    Plan,
    Schedule,
    TokenCounts,
    attention_weights,
    block_visible,
    cell_decoded,
    cell_means,
    counter_noise,
    covering_radius,
    denormalize_patches,
    denormalize_values,
    drop_path_scales,
    expand_cells,
    furthest_decoded,
    furthest_point_sampling,
    hog,
    hog_pyramid,
    image_statistics,
    interpolate,
    is_member,
    low_pass,
    make_plan,
    nearest_known_distance,
    normalize_over_image,
    normalize_patches,
    normalize_values,
    offset_index,
    patch_statistics,
    patchify,
    pool_units,
    random_decoded,
    random_visible,
    reconstruct_stages,
    stage_weights,
    take_tokens,
    tube_visible,
    unattended_visible,
    unit_index,
    unpatchify,
    weighted_decoded,
    weighted_visible,
    window_statistics,
)

GRID = Grid((4, 6), (2, 1))
SCHEDULE = Schedule(GRID, TokenCounts(6, 8, 10))
UNIT_SCHEDULE = Schedule(GRID, TokenCounts(8, 8, 8), unit=(2, 2))
GENERATOR = np.random.default_rng(0)
NOISE = counter_noise(0, 0, np.arange(3), 24)
ORDER = make_plan(SCHEDULE, NOISE).order
IS_KNOWN = NOISE > 0
WEIGHTS = GENERATOR.integers(1, 99, (3, 24)).astype(np.float32)
FEATURES = GENERATOR.normal(size=(3, 14, 4)).astype(np.float32)
IMAGES = GENERATOR.integers(0, 256, (3, 8, 6, 2)).astype(np.uint8)
PATCHES = GENERATOR.normal(size=(3, 24, 4)).astype(np.float32)
SMOOTH = GENERATOR.random((3, 8, 6, 2)).astype(np.float32)
STATISTICS = image_statistics(PATCHES, 2)


def repeat_first(features, known, thrown):
    return features[:, : thrown.shape[1], :]


def rebuilt(order, features):
    return reconstruct_stages(features, Plan(order, SCHEDULE), repeat_first)


# Name and variant: (function of arrays with a batch axis first, its arguments).
FUNCTIONS = {
    "attention_weights": (attention_weights, np.abs(PATCHES)),
    "block_visible": (lambda noise: block_visible(GRID, (2, 2), 2, noise), NOISE),
    "cell_decoded": (lambda *a: cell_decoded(GRID, 5, *a), NOISE, IS_KNOWN),
    "cell_means": (lambda patches: cell_means(patches, (2, 2), (1, 2)), PATCHES),
    "counter_noise": (lambda sample: counter_noise(1, 2, sample, 5), np.arange(3)),
    "covering_radius": (lambda is_known: covering_radius(GRID, is_known), IS_KNOWN),
    "denormalize_patches": (denormalize_patches, PATCHES, PATCHES[::-1]),
    "denormalize_values": (denormalize_values, PATCHES, *STATISTICS),
    "drop_path_scales": (lambda noise: drop_path_scales(4, 0.5, noise), NOISE),
    "expand_cells": (lambda values: expand_cells(values, (4, 2), (2, 1)), PATCHES),
    "furthest_decoded": (lambda *a: furthest_decoded(GRID, 4, *a), NOISE, IS_KNOWN),
    "furthest_decoded none": (lambda *a: furthest_decoded(GRID, 4, *a, furthest_from="none"), NOISE, IS_KNOWN),
    "furthest_point_sampling": (lambda *a: furthest_point_sampling(GRID, 4, *a), NOISE, IS_KNOWN),
    "hog": (lambda images: hog(images, (4, 3), 2), SMOOTH),
    "hog_pyramid": (lambda images: hog_pyramid(images, ((2, 3), (4, 6)), 2)[1], SMOOTH),
    "image_statistics": (lambda patches: image_statistics(patches, 2)[1], PATCHES),
    "interpolate": (lambda order, features: interpolate(features, Plan(order, SCHEDULE)), ORDER, FEATURES),
    "interpolate decoded": (
        lambda order, features: interpolate(features, Plan(order, SCHEDULE), visible_features=False),
        ORDER,
        FEATURES[:, 6:],
    ),
    "is_member": (lambda index: is_member(index, 24), ORDER[:, :7]),
    "low_pass": (lambda images: low_pass(images, 2.0), SMOOTH),
    "make_plan": (lambda noise: make_plan(SCHEDULE, noise).order, NOISE),
    "make_plan none": (lambda noise: make_plan(replace(SCHEDULE, furthest_from="none"), noise).order, NOISE),
    "make_plan random": (lambda noise: make_plan(replace(SCHEDULE, throwing="random"), noise).order, NOISE),
    "make_plan cell": (lambda noise: make_plan(replace(SCHEDULE, throwing="cell"), noise).order, NOISE),
    "make_plan weighted": (
        lambda noise, weights: make_plan(replace(SCHEDULE, throwing="weighted"), noise, weights=weights).order,
        NOISE,
        WEIGHTS,
    ),
    "make_plan decoded": (lambda *a: make_plan(SCHEDULE, *a).order, NOISE, ORDER[:, :6], ORDER[:, 6:14]),
    "make_plan units": (lambda noise: make_plan(UNIT_SCHEDULE, noise).order, NOISE),
    "make_plan weighted units": (
        lambda noise, weights: make_plan(replace(UNIT_SCHEDULE, throwing="weighted"), noise, weights=weights).order,
        NOISE,
        WEIGHTS,
    ),
    "make_plan visible": (lambda *a: make_plan(SCHEDULE, *a).order, NOISE, ORDER[:, :6]),
    "nearest_known_distance": (lambda is_known: nearest_known_distance(GRID, is_known), IS_KNOWN),
    "normalize_over_image": (lambda *a: normalize_over_image(*a, 2), PATCHES[:, 1:], PATCHES),
    "normalize_patches": (normalize_patches, PATCHES),
    "normalize_values": (normalize_values, PATCHES, *STATISTICS),
    "offset_index": (lambda *a: offset_index(GRID, *a), ORDER[:, :5], ORDER[:, 5:]),
    "patch_statistics": (lambda patches: patch_statistics(patches, 2)[1], PATCHES),
    "patchify": (lambda images: patchify(images, (2, 3)), IMAGES),
    "pool_units": (lambda order, x: pool_units(x, Plan(order, SCHEDULE), (2, 3)), ORDER, FEATURES),
    "random_decoded": (lambda *a: random_decoded(5, *a), NOISE, IS_KNOWN),
    "random_visible": (lambda noise: random_visible(6, noise), NOISE),
    "reconstruct_stages": (rebuilt, ORDER, FEATURES),
    "stage_weights": (lambda order: stage_weights(Plan(order, SCHEDULE))[1], ORDER),
    "take_tokens": (take_tokens, PATCHES, ORDER[:, :7]),
    "tube_visible": (lambda noise: tube_visible(GRID, 8, noise), NOISE),
    "unattended_visible": (lambda *a: unattended_visible(GRID, (2, 2), 2, *a), NOISE, WEIGHTS),
    "unit_index": (lambda tokens: unit_index(GRID, (2, 3), tokens), ORDER),
    "unpatchify": (lambda tokens: unpatchify(tokens, (2, 1), GRID), PATCHES),
    "weighted_decoded": (lambda *a: weighted_decoded(5, *a), NOISE, IS_KNOWN, WEIGHTS),
    "weighted_visible": (lambda *a: weighted_visible(6, *a), NOISE, WEIGHTS),
    "window_statistics": (lambda patches: window_statistics(patches, 2, GRID)[1], PATCHES),
}
NOT_OF_ARRAYS = {"count_tokens", "num_offsets", "offset_squared_distances", "patch_grid"}


def test_no_function_is_forgotten():
    public = {name for name in prmim_core.__all__ if inspect.isfunction(getattr(prmim_core, name))}
    assert public == {name.partition(" ")[0] for name in FUNCTIONS} | NOT_OF_ARRAYS


def assert_same(xp, actual, expected):
    if expected.dtype.kind == "f":
        xp.assert_close(actual, expected, rtol=1e-4, atol=1e-5, dtype=expected.dtype.name)
    else:
        xp.assert_equal(actual, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_libraries_agree(xp, name):
    function, *arrays = FUNCTIONS[name]
    assert_same(xp, xp.run(function, *arrays), function(*arrays))


@pytest.mark.parametrize("xp", ["numpy", "torch", "jax:jit"], indirect=True)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_gives_what_its_images_give(xp, name):
    function, *arrays = FUNCTIONS[name]
    whole = xp.to_numpy(xp.run(function, *arrays))
    assert_same(xp, xp.run(function, *(array[1:2] for array in arrays)), whole[1:2])


@pytest.mark.parametrize("xp", ["numpy", "torch", "jax:jit"], indirect=True)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_empty_batch_gives_an_empty_result(xp, name):
    function, *arrays = FUNCTIONS[name]
    whole = function(*arrays)
    assert_same(xp, xp.run(function, *(array[:0] for array in arrays)), whole[:0])


@pytest.mark.parametrize("xp", ["torch"], indirect=True)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_left_as_they_were(xp, name):
    # NumPy's read-only arrays show the same for NumPy; JAX has no way to write.
    function, *arrays = FUNCTIONS[name]
    there = [xp.from_numpy(array) for array in arrays]
    function(*there)
    for array, after in zip(arrays, there, strict=True):
        xp.assert_equal(after, array, dtype=array.dtype.name)


# What a compiled training step of a foreign trainer would call. Loops are unrolled there, so picks are few.
COMPILED = [
    "attention_weights",
    "block_visible",
    "cell_means",
    "counter_noise",
    "drop_path_scales",
    "furthest_point_sampling",
    "interpolate",
    "normalize_over_image",
    "normalize_patches",
    "patchify",
    "random_visible",
    "unattended_visible",
    "window_statistics",
]


@pytest.mark.parametrize("xp", ["torch:compiled"], indirect=True)
@pytest.mark.parametrize("name", COMPILED)
def test_functions_compile_to_one_graph(xp, name):
    function, *arrays = FUNCTIONS[name]
    assert_same(xp, xp.run(function, *arrays), function(*arrays))


@pytest.mark.parametrize("xp", ["torch:compiled"], indirect=True)
def test_a_plan_compiles_to_one_graph(xp):
    schedule = Schedule(GRID, TokenCounts(6, 3, 15))
    order = xp.run(lambda sample: make_plan(schedule, counter_noise(0, 0, sample, 24)).order, np.arange(3))
    xp.assert_equal(order, make_plan(schedule, NOISE).order, dtype="index")
