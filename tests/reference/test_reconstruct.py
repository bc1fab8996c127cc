import numpy as np
import pytest
from scipy.ndimage import correlate
from scipy.spatial.distance import cdist
from scipy.special import softmax

from prmim_reference import reconstruct
from prmim_reference.counts import TokenCounts, count_tokens
from prmim_reference.grid import positions
from prmim_reference.noise import counter_noise
from prmim_reference.schedule import make_order

GRIDS = [((9,), None), ((4, 5), None), ((4, 5), (3, 1)), ((2, 3, 4), (2, 1, 1))]
DIM = 8


def a_problem(shape, *, throw_ratio=0.5, seed=0):
    num_tokens = int(np.prod(shape))
    counts = count_tokens(num_tokens, 0.75, throw_ratio)
    order = make_order(shape, counts, counter_noise(seed, 0, 0, num_tokens))
    features = np.random.default_rng(seed).normal(size=(num_tokens - counts.thrown, DIM))
    return counts, order, features


def squared_distances(shape, spacing, targets, known):
    points = np.array(positions(shape, spacing))
    return cdist(points[targets], points[known], "sqeuclidean")


def rebuild_stage_by_stage(features, order, sizes, mix, weight=1.0, bias=0.0):
    """The stages around a mixing function (targets, known, features) -> features."""
    for size in sizes:
        if size:
            known, targets = order[: len(features)], order[len(features) : len(features) + size]
            mixed = mix(targets, known, features)
            centred = mixed - mixed.mean(1, keepdims=True)
            new = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) * weight + bias
            features = np.concatenate([features, new])
    return features


def test_offset_columns_by_hand():
    # A grid of 2 x 3 has offsets -1..1 and -2..2: a table of 3 x 5.
    assert reconstruct.offset_column(0, 0, (2, 3)) == 7
    assert reconstruct.offset_column(5, 0, (2, 3)) == 14  # target one row down and two columns right of the source
    assert reconstruct.offset_column(2, 3, (2, 3)) == 4  # one row up, two columns right
    assert reconstruct.offset_column(1, 0, (2, 3)) == 8


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_initial_table_holds_minus_the_squared_distance_at_every_pair(shape, spacing):
    table = reconstruct.initial_table(shape, 3, spacing)
    tokens = list(range(int(np.prod(shape))))
    assert table.shape == (3, np.prod([2 * length - 1 for length in shape]))
    columns = [[reconstruct.offset_column(i, j, shape) for j in tokens] for i in tokens]
    for row in table:
        assert np.array_equal(row[np.array(columns)], -squared_distances(shape, spacing, tokens, tokens))


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_kernel_from_its_initial_table_is_a_softmax_of_distances(shape, spacing, stages):
    counts, order, features = a_problem(shape)
    rng = np.random.default_rng(1)
    parameters = {
        "table": reconstruct.initial_table(shape, 4, spacing),
        "norm.weight": rng.normal(size=DIM),
        "norm.bias": rng.normal(size=DIM),
    }
    found = reconstruct.progressive_reconstruction(
        features, order, counts, shape, stages=stages, reconstruction="kernel", parameters=parameters, spacing=spacing
    )

    def mix(targets, known, features):
        return softmax(-squared_distances(shape, spacing, targets, known), axis=1) @ features

    sizes = [len(part) for part in np.array_split(range(counts.thrown), stages)]
    expected = rebuild_stage_by_stage(features, order, sizes, mix, parameters["norm.weight"], parameters["norm.bias"])
    assert found.shape == (counts.num_tokens, DIM)
    assert np.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(9,), (4, 5), (2, 3, 4)])
def test_kernel_looks_offsets_up_in_its_table_by_head(shape):
    counts, order, features = a_problem(shape)
    heads = 4
    rng = np.random.default_rng(2)
    offsets = [2 * length - 1 for length in shape]
    table = rng.normal(size=(heads, *offsets))
    parameters = {"table": table.reshape(heads, -1), "norm.weight": np.ones(DIM), "norm.bias": np.zeros(DIM)}
    found = reconstruct.progressive_reconstruction(
        features, order, counts, shape, stages=2, reconstruction="kernel", parameters=parameters
    )
    cells = np.indices(shape).reshape(len(shape), -1)

    def mix(targets, known, features):
        offset = cells[:, targets][:, :, None] - cells[:, known][:, None, :]
        logits = table[(slice(None), *(o + length - 1 for o, length in zip(offset, shape, strict=True)))]
        groups = features.reshape(len(known), heads, DIM // heads)
        return np.einsum("hij,jhc->ihc", softmax(logits, axis=2), groups).reshape(len(targets), DIM)

    sizes = [len(part) for part in np.array_split(range(counts.thrown), 2)]
    assert np.allclose(found, rebuild_stage_by_stage(features, order, sizes, mix), atol=1e-12)


def test_kernel_heads_divide_the_channels():
    with pytest.raises(ValueError, match="table: expected a number of heads that divides the 8 channels, got 3"):
        reconstruct.kernel(1, [0], np.zeros((1, 8)), (2,), np.zeros((3, 3)))


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("stages", [1, 3])
def test_interpolation_weighs_by_inverse_squared_distance(shape, spacing, stages):
    counts, order, features = a_problem(shape)
    found = reconstruct.progressive_reconstruction(
        features, order, counts, shape, stages=stages, reconstruction="interpolate", parameters={}, spacing=spacing
    )

    def mix(targets, known, features):
        return np.array(
            [np.average(features, axis=0, weights=1 / row) for row in squared_distances(shape, spacing, targets, known)]
        )

    sizes = [len(part) for part in np.array_split(range(counts.thrown), stages)]
    assert np.allclose(found, rebuild_stage_by_stage(features, order, sizes, mix), atol=1e-12)


def test_interpolation_weights_by_hand():
    # From token 4, the middle of a 3 x 3 grid: distances 1 (side) and 2 (corner), squared.
    assert reconstruct.interpolation_weights(4, [1, 0], (3, 3)) == pytest.approx([2 / 3, 1 / 3])
    assert reconstruct.interpolation_weights(4, [1, 3], (3, 3), spacing=(2, 1)) == pytest.approx([1 / 5, 4 / 5])
    assert sum(reconstruct.interpolation_weights(4, [0, 2, 7, 8], (3, 3))) == pytest.approx(1)


def convolve_by_correlate(known, features, shape, kernel):
    """Whole maps at a time, zero-padded, as a framework would."""
    size = int(np.prod(shape))
    image = np.zeros((size, features.shape[1]))
    image[known] = features
    is_filled = np.zeros(size)
    is_filled[known] = 1
    image, is_filled = image.reshape(*shape, -1), is_filled.reshape(shape)
    for _ in range(3):
        seen = np.rint(correlate(is_filled, np.ones((3,) * len(shape)), mode="constant"))
        sums = [correlate(image[..., c], kernel[c], mode="constant") for c in range(features.shape[1])]
        value = np.stack(sums, axis=-1) / np.maximum(1, seen)[..., None]
        image = np.where((is_filled > 0)[..., None], image, value)
        is_filled = ((is_filled > 0) | (seen > 0)).astype(float)
        image = image * is_filled[..., None]
    return image.reshape(size, -1)


@pytest.mark.parametrize("shape", [(9,), (4, 5), (2, 3, 4), (1, 12)])
@pytest.mark.parametrize("num_known", [1, 2, 6])
def test_conv_agrees_with_correlation_over_the_map(shape, num_known):
    rng = np.random.default_rng(num_known)
    known = rng.permutation(int(np.prod(shape)))[:num_known].tolist()
    features = rng.normal(size=(num_known, DIM))
    kernel = rng.normal(size=(DIM, *(3,) * len(shape)))
    found = reconstruct.convolve(known, features, shape, kernel)
    assert np.allclose(found, convolve_by_correlate(known, features, shape, kernel), atol=1e-12)


def test_conv_by_hand_on_a_line():
    # Kernel of ones: an unfilled token becomes the mean of what is filled next to it; three rounds reach three tokens.
    found = reconstruct.convolve([0, 2], np.array([[6.0], [2.0]]), (7,), np.ones((1, 3)))
    assert found.ravel().tolist() == [6, 4, 2, 2, 2, 2, 0]
    # A kernel of one weight on the left neighbour carries values to the right alone, but what is seen still counts.
    found = reconstruct.convolve([0, 2], np.array([[6.0], [2.0]]), (7,), np.array([[1.0, 0.0, 0.0]]))
    assert found.ravel().tolist() == [6, 3, 2, 2, 2, 2, 0]


@pytest.mark.parametrize("stages", [1, 3])
def test_conv_starts_every_stage_from_its_known_tokens(stages):
    shape = (4, 6)
    counts, order, features = a_problem(shape)
    rng = np.random.default_rng(3)
    parameters = {
        "kernel": rng.normal(size=(DIM, 3, 3)),
        "norm.weight": rng.normal(size=DIM),
        "norm.bias": rng.normal(size=DIM),
    }
    found = reconstruct.progressive_reconstruction(
        features, order, counts, shape, stages=stages, reconstruction="conv", parameters=parameters
    )

    def mix(targets, known, features):
        return convolve_by_correlate(known, features, shape, parameters["kernel"])[targets]

    sizes = [len(part) for part in np.array_split(range(counts.thrown), stages)]
    expected = rebuild_stage_by_stage(features, order, sizes, mix, parameters["norm.weight"], parameters["norm.bias"])
    assert np.allclose(found, expected, atol=1e-11)


def test_a_token_out_of_reach_becomes_the_bias():
    counts = TokenCounts(1, 0, 6)
    parameters = {"kernel": np.ones((DIM, 3)), "norm.weight": np.full(DIM, 2.0), "norm.bias": np.arange(DIM) * 1.0}
    found = reconstruct.progressive_reconstruction(
        np.ones((1, DIM)), list(range(7)), counts, (7,), stages=1, reconstruction="conv", parameters=parameters
    )
    assert np.array_equal(found[4:], np.tile(np.arange(DIM), (3, 1)))


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
def test_nothing_thrown_changes_nothing(reconstruction):
    counts, order, features = a_problem((4, 5), throw_ratio=0.0)
    found = reconstruct.progressive_reconstruction(
        features, order, counts, (4, 5), stages=2, reconstruction=reconstruction, parameters={}
    )
    assert np.array_equal(found, features)


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
def test_empty_stages_are_skipped(reconstruction):
    counts = TokenCounts(2, 2, 2)
    order = [0, 3, 5, 1, 2, 4]
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, DIM))
    parameters = {
        "interpolate": {},
        "kernel": {"table": rng.normal(size=(2, 3 * 5))},
        "conv": {"kernel": rng.normal(size=(DIM, 3, 3))},
    }[reconstruction]
    arguments = {"reconstruction": reconstruction, "parameters": parameters}
    two = reconstruct.progressive_reconstruction(features, order, counts, (2, 3), stages=2, **arguments)
    five = reconstruct.progressive_reconstruction(features, order, counts, (2, 3), stages=5, **arguments)
    assert np.array_equal(two, five)


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
def test_without_visible_features_it_is_the_plan_of_the_masked_tokens(reconstruction):
    counts, order, features = a_problem((4, 5))
    rng, visible = np.random.default_rng(0), counts.visible
    parameters = {
        "interpolate": {},
        "kernel": {"table": rng.normal(size=(2, 7 * 9))},
        "conv": {"kernel": rng.normal(size=(DIM, 3, 3))},
    }[reconstruction]
    options = {"stages": 2, "reconstruction": reconstruction, "parameters": parameters}
    found = reconstruct.progressive_reconstruction(
        features[visible:], order, counts, (4, 5), visible_features=False, **options
    )
    masked = TokenCounts(0, counts.decoded, counts.thrown)
    expected = reconstruct.progressive_reconstruction(features[visible:], order[visible:], masked, (4, 5), **options)
    assert np.array_equal(found, expected)


def test_bad_arguments_are_refused():
    counts = TokenCounts(0, 0, 4)
    with pytest.raises(ValueError, match="features: expected at least one known token"):
        reconstruct.progressive_reconstruction(
            np.zeros((0, DIM)), [0, 1, 2, 3], counts, (4,), stages=1, reconstruction="interpolate", parameters={}
        )
    with pytest.raises(ValueError, match="reconstruction: expected"):
        reconstruct.progressive_reconstruction(
            np.zeros((1, DIM)), [0, 1], TokenCounts(1, 0, 1), (2,), stages=1, reconstruction="mean", parameters={}
        )
