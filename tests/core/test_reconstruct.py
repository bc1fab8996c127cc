import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import prmim_reference as reference
from prmim_core import (
    Grid,
    Plan,
    Schedule,
    TokenCounts,
    counter_noise,
    interpolate,
    make_plan,
    num_offsets,
    offset_index,
    offset_squared_distances,
    reconstruct_stages,
    stage_weights,
    testing,
)
from prmim_core._arrays import array_namespace
from prmim_core.reconstruct import _pair_squared_distances, _standardize

# Many shapes, each a program of JAX; test_every_function.py has every function under the full compiler.
pytestmark = pytest.mark.usefixtures("quick_compiler")

GRIDS = [Grid((9,), (3,)), Grid((4, 6)), Grid((5, 4), (3, 1)), Grid((3, 4, 2), (4, 1, 1))]


def case(grid, counts=None, stages=2, dim=4, dtype=np.float32):
    third = grid.num_tokens // 3
    schedule = Schedule(grid, counts or TokenCounts(third, 2, grid.num_tokens - third - 2), stages=stages)
    order = make_plan(schedule, counter_noise(0, 0, np.arange(2), grid.num_tokens)).order
    features = np.random.default_rng(0).normal(size=(2, schedule.num_known(1), dim)).astype(dtype)
    return schedule, order, features


def expected_features(schedule, order, features, **options):
    return np.stack(
        [
            reference.reconstruct.progressive_reconstruction(
                of_image.astype(float),
                tokens,
                schedule.counts,
                schedule.grid.shape,
                stages=schedule.stages,
                reconstruction="interpolate",
                parameters={},
                spacing=schedule.grid.spacing,
                **options,
            )
            for of_image, tokens in zip(features, order.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_interpolation_matches_the_reference(library, grid):
    schedule, order, features = case(grid)
    rebuilt = library.run(lambda order, features: interpolate(features, Plan(order, schedule)), order, features)
    library.assert_close(rebuilt, expected_features(schedule, order, features), rtol=1e-4, atol=1e-4, dtype="float32")


@pytest.mark.parametrize(
    ("counts", "stages"),
    [
        (TokenCounts(24, 0, 0), 2),  # nothing to rebuild
        (TokenCounts(0, 1, 23), 1),  # from one token alone
        (TokenCounts(11, 11, 2), 4),  # more stages than tokens
        (TokenCounts(8, 0, 16), 3),
    ],
    ids=str,
)
def test_stages_of_any_size_match_the_reference(library, counts, stages):
    schedule, order, features = case(GRIDS[1], counts, stages)
    rebuilt = library.run(lambda order, features: interpolate(features, Plan(order, schedule)), order, features)
    library.assert_close(rebuilt, expected_features(schedule, order, features), rtol=1e-4, atol=1e-4, dtype="float32")


@pytest.mark.parametrize("grid", GRIDS[1:3], ids=str)
def test_without_visible_features_only_decoded_tokens_are_known(library, grid):
    schedule, order, features = case(grid, TokenCounts(6, 5, grid.num_tokens - 11), stages=3)
    rebuilt = library.run(
        lambda order, features: interpolate(features, Plan(order, schedule), visible_features=False),
        order,
        features[:, 6:],
    )
    expected = expected_features(schedule, order, features[:, 6:], visible_features=False)
    assert rebuilt.shape == (2, grid.num_tokens - 6, 4)
    library.assert_close(rebuilt, expected, rtol=1e-4, atol=1e-4, dtype="float32")
    for wrong in (features, features[:, 5:]):
        with pytest.raises(ValueError, match=r"^features: expected shape \(2, 5, dim\), got "):
            interpolate(wrong, Plan(order, schedule), visible_features=False)


def test_without_visible_features_some_token_is_decoded():
    schedule, order, features = case(GRIDS[1], TokenCounts(8, 0, 16))
    with pytest.raises(ValueError, match=r"^features: expected at least one decoded token to reconstruct others from"):
        interpolate(features[:, :0], Plan(order, schedule), visible_features=False)


@pytest.mark.parametrize("shape", [(2, 7, 1), (2, 1, 4), (1, 7, 4), (2, 7)])
def test_what_a_mix_returns_is_checked(shape):
    schedule, order, features = case(GRIDS[1], TokenCounts(6, 4, 14))
    with pytest.raises(ValueError, match=r"^mix: expected reconstructed features of shape \(2, 7, 4\), got "):
        reconstruct_stages(features, Plan(order, schedule), lambda *_: np.zeros(shape))


def test_doubles_stay_doubles():
    schedule, order, features = case(GRIDS[1], dtype=np.float64)
    assert interpolate(features, Plan(order, schedule)).dtype == np.float64


def test_known_features_are_kept_as_they_are(xp):
    schedule, order, features = case(GRIDS[2])
    rebuilt = xp.run(lambda order, features: interpolate(features, Plan(order, schedule)), order, features)
    np.testing.assert_array_equal(xp.to_numpy(rebuilt)[:, : features.shape[1]], features)


def test_every_stage_sees_all_that_is_known_before_it():
    schedule, order, features = case(GRIDS[1], TokenCounts(6, 4, 14), stages=3)
    calls = []

    def mix(features, known, thrown):
        calls.append((features.copy(), known, thrown))
        return np.full((2, thrown.shape[1], 4), len(calls), dtype=np.float32)

    rebuilt = reconstruct_stages(features, Plan(order, schedule), mix)
    assert rebuilt[0, 10:, 0].tolist() == [1] * 5 + [2] * 5 + [3] * 4
    start = 10
    for size, (seen, known, thrown) in zip((5, 5, 4), calls, strict=True):
        np.testing.assert_array_equal(seen, rebuilt[:, :start])
        np.testing.assert_array_equal(known, order[:, :start])
        np.testing.assert_array_equal(thrown, order[:, start : start + size])
        start += size


def test_the_norm_of_the_stages(xp):
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 8)).astype(np.float32)
    expected = np.stack([reference.vit.layer_norm(rows.astype(float)) for rows in x])
    actual = xp.run(lambda x: _standardize(array_namespace(x), x, 1e-6), x)
    xp.assert_close(actual, expected, rtol=1e-4, atol=1e-5, dtype="float32")


# --- gradients -----------------------------------------------------------------------------------------------------


def gradient_case():
    schedule, order, features = case(GRIDS[1])
    slope = np.random.default_rng(1).normal(size=(2, 24, 4)).astype(np.float32)

    def objective(features, xp):
        return xp.sum(interpolate(features, Plan(order, schedule)) * slope)

    direction = np.random.default_rng(2).normal(size=features.shape)
    step = 1e-4
    numerical = (
        objective(features.astype(float) + step * direction, np)
        - objective(features.astype(float) - step * direction, np)
    ) / (2 * step)
    return schedule, order, features, slope, direction, numerical


def test_gradients_in_jax_match_finite_differences():
    import jax

    schedule, order, features, slope, direction, numerical = gradient_case()

    @jax.jit
    @jax.grad
    def gradient(features, order):
        return jax.numpy.sum(interpolate(features, Plan(order, schedule)) * slope)

    # Weights are computed in float32 whatever the features, so that the two differ in the seventh digit.
    assert (np.asarray(gradient(features, order)) * direction).sum() == pytest.approx(numerical, rel=1e-3)


def test_gradients_in_torch_match_finite_differences():
    import torch

    schedule, order, features, slope, direction, numerical = gradient_case()
    leaf = torch.tensor(features, requires_grad=True)
    (interpolate(leaf, Plan(torch.tensor(order), schedule)) * torch.tensor(slope)).sum().backward()
    assert (leaf.grad.numpy() * direction).sum() == pytest.approx(numerical, rel=1e-3)


def test_interpolation_under_vmap():
    import jax

    schedule, order, features = case(GRIDS[1])
    stacked = np.stack([features, 2 * features + 1])
    plan = Plan(jax.numpy.asarray(order), schedule)
    over_features = jax.jit(jax.vmap(interpolate, in_axes=(0, None)))(stacked, plan)
    np.testing.assert_allclose(over_features[0], interpolate(features, Plan(order, schedule)), rtol=1e-4, atol=1e-5)
    plans = Plan(jax.numpy.stack([plan.order, plan.order[:, ::-1]]), schedule)
    over_both = jax.jit(jax.vmap(interpolate))(stacked, plans)
    expected = interpolate(stacked[1], Plan(order[:, ::-1], schedule))
    np.testing.assert_allclose(over_both[1], expected, rtol=1e-4, atol=1e-5)


# --- offsets -------------------------------------------------------------------------------------------------------


def pairs(grid):
    generator = np.random.default_rng(0)
    return generator.integers(0, grid.num_tokens, (2, 5)), generator.integers(0, grid.num_tokens, (2, 7))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_offsets_and_weights_match_the_reference(library, grid):
    thrown, known = pairs(grid)

    def lookups(thrown, known):
        squared = _pair_squared_distances(array_namespace(thrown), grid, thrown, known)
        return offset_index(grid, thrown, known), squared

    index, squared = library.run(lookups, thrown, known)
    positions = reference.grid.positions(grid.shape, grid.spacing)
    both = list(zip(thrown.tolist(), known.tolist(), strict=True))
    expected = [[[reference.reconstruct.offset_column(i, j, grid.shape) for j in k] for i in t] for t, k in both]
    library.assert_equal(index, expected, dtype="index")
    expected = [
        [[reference.coverage.squared_distance(positions[i], positions[j]) for j in k] for i in t] for t, k in both
    ]
    library.assert_equal(squared, expected, dtype="index")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tables_of_offsets_match_the_reference(grid):
    table = offset_squared_distances(grid)
    assert num_offsets(grid) == table.size
    expected = reference.reconstruct.initial_table(grid.shape, 1, grid.spacing)[0]
    np.testing.assert_array_equal(-table, expected)
    assert table.dtype == np.int64


@given(testing.grids(), st.data())
def test_the_index_finds_the_distance_in_the_table(grid, data):
    tokens = st.lists(st.integers(0, grid.num_tokens - 1), min_size=4, max_size=4)
    thrown, known = (np.asarray([data.draw(tokens)]) for _ in range(2))
    index = offset_index(grid, thrown, known)
    assert index.min() >= 0
    assert index.max() < num_offsets(grid)
    squared = _pair_squared_distances(np, grid, thrown, known)
    np.testing.assert_array_equal(offset_squared_distances(grid)[index], squared)
    # Equal offsets have equal numbers, and opposite ones are mirrored.
    np.testing.assert_array_equal(offset_index(grid, known, thrown), num_offsets(grid) - 1 - np.swapaxes(index, 1, 2))


def test_large_grids_have_offsets_within_int32():
    grid = Grid((16, 64, 64), (4, 1, 1))
    last = grid.num_tokens - 1
    corners = np.asarray([[0, last]], dtype=np.int32)
    index = offset_index(grid, corners, corners)
    middle = num_offsets(grid) // 2
    assert index[0].tolist() == [[middle, 0], [num_offsets(grid) - 1, middle]]


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        (TokenCounts(4, 4, 12), {}),
        (TokenCounts(1, 0, 19), {}),
        (TokenCounts(9, 9, 2), {"visible_features": False}),
    ],
    ids=str,
)
def test_weights_of_stages_match_the_reference(library, counts, options):
    schedule, order, _ = case(GRIDS[2], counts, stages=3)
    weights = library.run(lambda order: stage_weights(Plan(order, schedule), **options), order)
    first = counts.visible if options else 0
    options = options | {"stages": 3, "spacing": schedule.grid.spacing}
    images = [
        reference.reconstruct.stage_weights(tokens, counts, schedule.grid.shape, **options) for tokens in order.tolist()
    ]
    for stage, expected in enumerate(zip(*images, strict=True)):
        assert expected[0].shape == (schedule.stage_sizes[stage], schedule.num_known(stage + 1) - first)
        library.assert_close(weights[stage], np.stack(expected), rtol=1e-5, dtype="float32")
    assert len(weights) == 3


@given(testing.plans(), st.booleans())
def test_weights_of_stages_and_a_norm_are_the_interpolation(plan, visible_features):
    schedule = plan.schedule
    num_known = schedule.num_known(1) if visible_features else schedule.counts.decoded
    assume(num_known or not schedule.counts.thrown)
    features = np.random.default_rng(0).normal(size=(2, num_known, 3)).astype(np.float32)
    x = features
    for weights in stage_weights(plan, visible_features=visible_features):
        np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-5)
        x = np.concatenate([x, _standardize(np, weights @ x, 1e-6)], axis=1)
    expected = interpolate(features, plan, visible_features=visible_features)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_stages_name_what_is_wrong():
    with pytest.raises(TypeError, match=r"^plan: expected a Plan, got list$"):
        stage_weights([[0, 1]])
    with pytest.raises(ValueError, match=r"^plan: expected at least one visible or decoded token .* got none$"):
        stage_weights(Plan(np.asarray([[0, 1, 2, 3]]), Schedule(Grid((4,)), TokenCounts(0, 0, 4))))


@pytest.mark.parametrize(
    ("counts", "features", "message"),
    [
        (TokenCounts(2, 1, 1), (2, 2, 8), r"features: expected shape \(2, 3, dim\), got \(2, 2, 8\)"),
        (TokenCounts(2, 1, 1), (1, 3, 8), r"features: expected shape \(2, 3, dim\), got \(1, 3, 8\)"),
        (TokenCounts(2, 1, 1), (2, 3), r"features: .* got \(2, 3\)"),
        (TokenCounts(0, 0, 4), (2, 0, 8), "features: expected at least one visible or decoded token .* got none"),
    ],
)
def test_errors_name_the_argument(counts, features, message):
    plan = Plan(np.asarray([[0, 1, 2, 3]] * 2), Schedule(Grid((4,)), counts))
    with pytest.raises(ValueError, match=message):
        interpolate(np.zeros(features), plan)
