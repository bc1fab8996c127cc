import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from prmim_reference import reconstruct, simmim
from prmim_reference.drop_path import drop_path_scales
from prmim_reference.masking import block_visible
from prmim_reference.noise import counter_noise
from prmim_reference.schedule import make_order

DIM, HEADS, DEPTH = 12, 3, 2
CASES = {
    "image": {"lengths": (8, 18), "patch_size": (2, 3), "channels": 3, "mask_unit": 2},  # 4x6 tokens, 2x3 units
    "series": {"lengths": (36,), "patch_size": (3,), "channels": 2, "mask_unit": 3},  # 12 tokens, 4 units
    "volume": {"lengths": (2, 8, 8), "patch_size": (1, 2, 2), "channels": 1, "mask_unit": 2},  # 2x4x4, 1x2x2 units
}
CUBE = {"lengths": (4, 8, 8), "patch_size": (1, 2, 2), "channels": 1, "mask_unit": 2}  # 4x4x4 tokens, 2x2x2 units
TABLE = "encoder.rel_pos_bias.relative_position_bias_table"


class Problem:
    """Random weights, images and noise of a small method."""

    def __init__(self, random_weights, case=CASES["image"], *, position="relative", layer_scale=True, batch=2, seed=0):
        self.patch_size, self.channels, self.mask_unit = case["patch_size"], case["channels"], case["mask_unit"]
        lengths = case["lengths"]
        self.shape = tuple(n // side for n, side in zip(lengths, self.patch_size, strict=True))
        self.num_tokens = int(np.prod(self.shape))
        self.patch_dim = int(np.prod(self.patch_size)) * self.channels
        self.images = np.random.default_rng(seed).integers(0, 256, (batch, *lengths, self.channels), np.uint8)
        self.noise = np.array([counter_noise(seed, 0, sample, self.num_tokens) for sample in range(batch)])
        self.weights = random_weights(seed)
        self.weights.encoder(
            self.shape,
            self.patch_size,
            self.channels,
            DIM,
            DEPTH,
            heads=HEADS,
            position=position,
            layer_scale=layer_scale,
        )
        self.weights.linear("head", DIM, self.patch_dim)
        self.weights.reconstruct(self.shape, DIM)
        self.weights.linear("cell_head", DIM, self.channels * math.prod(2 - n % 2 for n in self.patch_size))

    @property
    def counts(self):
        """The counts of tokens that are thrown one by one, by default ratios."""
        return simmim.unit_counts(self.shape, (self.mask_unit,) * len(self.shape), 0.6, 0.25, "token")

    def forward(self, **options):
        own = {"patch_size": self.patch_size, "num_heads": HEADS, "mask_unit": self.mask_unit}
        given = {name: options.pop(name, getattr(self, name)) for name in ("weights", "images", "noise")}
        return simmim.forward(*given.values(), **own | options)

    def is_masked(self):
        """Whether tokens (batch, N) are masked; 0.4 of the units are visible.

        The mask of a unit is expanded to its tokens.
        """
        grid = self.noise.reshape(-1, *self.shape)
        first = grid[(slice(None), *(slice(None, None, self.mask_unit) for _ in self.shape))]
        flat = first.reshape(len(grid), -1)
        is_masked = np.ones(flat.shape, bool)
        visible_units = np.argsort(flat, axis=1)[:, : flat.shape[1] * 2 // 5]
        np.put_along_axis(is_masked, visible_units, False, axis=1)
        is_masked = is_masked.reshape(first.shape)
        for axis in range(1, first.ndim):
            is_masked = is_masked.repeat(self.mask_unit, axis=axis)
        return is_masked.reshape(len(grid), -1)


@pytest.fixture(params=CASES)
def problem(request, random_weights):
    return Problem(random_weights, CASES[request.param])


@pytest.fixture
def image_problem(random_weights):
    return Problem(random_weights)


def features_of_seen(oracle, problem, seen, mean, std, scales=None):
    """Encoder features (batch, n, dim) if the encoder sees some tokens only.

    The tokens are (batch, n).
    """
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    states = oracle.encoder_outputs(
        patches, problem.weights, problem.shape, HEADS, tokens=seen, is_masked=problem.is_masked(), scales=scales
    )
    return oracle.normed(states[-1], problem.weights, "encoder.norm")[:, 1:]


def all_features(problem, known, orders, counts, **options):
    """Features (batch, N, dim) in plan order, from those of the known tokens."""
    own = {name[12:]: array for name, array in problem.weights.items() if name.startswith("reconstruct.")}
    options = {"stages": 2, "reconstruction": "kernel"} | options
    return np.array(
        [
            reconstruct.progressive_reconstruction(
                features, order.tolist(), counts, problem.shape, parameters=own, **options
            )
            for features, order in zip(known, orders, strict=True)
        ]
    )


@pytest.mark.parametrize("options", [{"throwing": "none"}, {"throw_ratio": 0.0}], ids=["none", "ratio"])
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("position", ["absolute", "relative"])
def test_without_throwing_it_is_simmim(random_weights, oracle, position, layer_scale, options):
    """SimMIM as released: channels first, 1x1 convolution, pixel shuffle, pixel mask."""
    problem = Problem(random_weights, position=position, layer_scale=layer_scale)
    output = problem.forward(**options)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = (problem.images / 255 - mean) / std
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    is_masked = problem.is_masked()
    states = oracle.encoder_outputs(patches, problem.weights, problem.shape, HEADS, is_masked=is_masked)
    features = oracle.normed(states[-1], problem.weights, "encoder.norm")[:, 1:]

    (rows, columns), (height, width), channels = problem.shape, problem.patch_size, problem.channels
    # The layer's outputs reordered, so that the channel is slowest, as pixel shuffle has it.
    kernel = problem.weights["head.weight"].reshape(height, width, channels, DIM).transpose(2, 0, 1, 3)
    shift = problem.weights["head.bias"].reshape(height, width, channels).transpose(2, 0, 1)
    grid = features.reshape(-1, rows, columns, DIM)
    convolved = np.einsum("chwd,brsd->bcrhsw", kernel, grid) + shift[None, :, None, :, None, :]
    rebuilt = convolved.reshape(-1, channels, rows * height, columns * width)

    mask = is_masked.reshape(-1, rows, columns).repeat(height, axis=1).repeat(width, axis=2)[:, None]
    error = np.abs(np.moveaxis(x, -1, 1) - rebuilt)
    assert output.loss == pytest.approx((error * mask).sum() / (mask.sum() + 1e-5) / channels, rel=1e-12)
    assert output.loss_decoded == pytest.approx(error.mean(axis=1, keepdims=True)[mask].mean(), rel=1e-12)
    assert output.loss_thrown == 0.0
    assert output.predicted.shape == (2, 16, 18)
    assert np.array_equal(np.sort(output.order[:, :8]), [np.flatnonzero(~image) for image in is_masked])


@pytest.mark.parametrize("throw_by", ["token", "unit"])
@pytest.mark.parametrize("position", ["absolute", "relative"])
@pytest.mark.parametrize("name", CASES)
def test_thrown_tokens_never_enter_the_encoder(random_weights, oracle, name, position, throw_by):
    problem = Problem(random_weights, CASES[name], position=position)
    half = [0.5] * problem.channels
    output = problem.forward(reconstruction="none", throw_ratio=0.35, throw_by=throw_by, mean=half, std=half)
    num_visible = int((~problem.is_masked()[0]).sum())
    num_decoded = output.predicted.shape[1]
    assert 0 < num_decoded < problem.num_tokens - num_visible
    seen = output.order[:, : num_visible + num_decoded]
    features = features_of_seen(oracle, problem, seen, half, half)
    predicted = oracle.affine(features[:, num_visible:], problem.weights, "head")
    assert np.allclose(output.predicted, predicted, atol=1e-10)
    patches = oracle.raster_patches(problem.images, problem.patch_size, half, half)
    error = np.abs(predicted - np.take_along_axis(patches, seen[:, num_visible:, None], axis=1))
    pixels = predicted.size / problem.channels
    assert output.loss == pytest.approx(error.sum() / (pixels + 1e-5) / problem.channels, rel=1e-12)
    assert output.loss_decoded == pytest.approx(error.mean(), rel=1e-12)
    assert output.loss_thrown == 0.0


@pytest.mark.parametrize("throw_by", ["token", "unit"])
@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
def test_thrown_tokens_are_rebuilt_from_encoder_features(problem, oracle, reconstruction, throw_by):
    options = {"throw_by": throw_by, "throw_ratio": 0.35, "stages": 3}
    output = problem.forward(reconstruction=reconstruction, thrown_target="patch", **options)
    plain = problem.forward(reconstruction="none", **options)
    unit = (problem.mask_unit,) * len(problem.shape)
    counts = simmim.unit_counts(problem.shape, unit, 0.6, 0.35, throw_by)
    assert counts.thrown > 0
    assert counts.decoded == plain.predicted.shape[1]
    assert np.array_equal(output.order, plain.order)
    assert np.allclose(output.predicted[:, : counts.decoded], plain.predicted, atol=1e-12)
    assert output.loss_decoded == pytest.approx(plain.loss_decoded, rel=1e-12)

    mean = [0.5] * problem.channels if problem.channels != 3 else (0.485, 0.456, 0.406)
    std = [0.5] * problem.channels if problem.channels != 3 else (0.229, 0.224, 0.225)
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    seen = output.order[:, : counts.visible + counts.decoded]
    features = features_of_seen(oracle, problem, seen, mean, std)
    rebuilt = all_features(problem, features, output.order, counts, stages=3, reconstruction=reconstruction)
    predicted = oracle.affine(rebuilt[:, -counts.thrown :], problem.weights, "head")
    assert np.allclose(output.predicted[:, counts.decoded :], predicted, atol=1e-9)
    error = np.abs(predicted - np.take_along_axis(patches, output.order[:, -counts.thrown :, None], axis=1))
    assert output.loss_thrown == pytest.approx(error.mean(), rel=1e-10)


@pytest.mark.parametrize("throw_by", ["token", "unit"])
def test_targets_and_losses_of_cells(problem, oracle, cell_options, throw_by):
    given = {"throw_ratio": 0.35, "cells": None, "cell_norm": "image", "reconstruction": "kernel", **cell_options}
    cells = tuple(given["cells"] or 2 - side % 2 for side in problem.patch_size)
    problem.weights.linear("cell_head", DIM, problem.channels * math.prod(cells))
    mean, std = [0.4] * problem.channels, [0.3] * problem.channels
    output = problem.forward(**given, throw_by=throw_by, mean=mean, std=std)

    unit = (problem.mask_unit,) * len(problem.shape)
    counts = simmim.unit_counts(problem.shape, unit, 0.6, given.pop("throw_ratio"), throw_by)
    seen = output.order[:, : counts.visible + counts.decoded]
    known = features_of_seen(oracle, problem, seen, mean, std)
    if given.pop("reconstruction") != "none":
        known = all_features(problem, known, output.order, counts)
    cell_norm = given.pop("cell_norm")
    filtered = oracle.low_passed(problem.images, given.pop("low_pass", None))
    del given["cells"]
    expected = oracle.supervised(
        known,
        output.order,
        counts,
        problem.weights,
        head="head",
        power=1,
        targets=oracle.raster_patches(filtered, problem.patch_size, mean, std),
        cell_targets=oracle.raster_cells(problem.images, problem.patch_size, cells, mean, std, cell_norm),
        eps=1e-5 / math.prod(problem.patch_size),
        **given,
    )
    for name in ("loss", "loss_decoded", "loss_thrown", "loss_cells"):
        assert getattr(output, name) == pytest.approx(getattr(expected, name), rel=1e-10), name
    assert np.allclose(output.predicted, expected.predicted, atol=1e-9)
    assert output.predicted_cells.size == expected.predicted_cells.size
    assert np.allclose(output.predicted_cells, expected.predicted_cells, atol=1e-9)


@pytest.mark.parametrize("thrown_weight", [0.0, 0.3, 1.0, 2.0])
def test_thrown_weight_enters_sum_and_normaliser(image_problem, thrown_weight):
    output = image_problem.forward(thrown_weight=thrown_weight)
    decoded, thrown = 2 * 10 * 6, 2 * 6 * 6  # pixels of two images: of 24 tokens, 8 are visible and 6 thrown
    weighted = decoded * output.loss_decoded + thrown_weight * thrown * output.loss_thrown
    assert output.loss == pytest.approx(weighted / (decoded + thrown_weight * thrown + 1e-5), rel=1e-12)


def test_thrown_weight_of_zero_leaves_the_loss_of_plain_partial_reconstruction(image_problem):
    ignored, plain = image_problem.forward(thrown_weight=0.0), image_problem.forward(reconstruction="none")
    assert ignored.loss == plain.loss
    assert ignored.loss_thrown > 0.0
    assert plain.loss_thrown == 0.0


@pytest.mark.parametrize("options", [{"thrown_target": "patch"}, {"throwing": "none"}, {"reconstruction": "none"}])
def test_a_silent_head_scores_the_mean_absolute_pixel(image_problem, options):
    weights = dict(image_problem.weights)
    weights |= {"head.weight": np.zeros((18, DIM)), "head.bias": np.zeros(18)}
    images = np.full_like(image_problem.images, 51)
    images[..., 1:] = 255
    # The channels are -0.6, 1 and 1 after normalisation.
    output = image_problem.forward(weights=weights, images=images, mean=[0.5] * 3, std=[0.5] * 3, **options)
    pixels = 2 * output.predicted.shape[1] * 6
    assert output.loss_decoded == pytest.approx(2.6 / 3, rel=1e-13)
    assert output.loss == pytest.approx(2.6 / 3 * pixels / (pixels + 1e-5), rel=1e-13)
    assert not output.predicted.any()


def test_the_target_is_not_normalised_per_patch(image_problem):
    weights = dict(image_problem.weights)
    weights["head.weight"] = np.zeros((18, DIM))
    weights["head.bias"] = np.tile([1.0, 2.0, -3.0], 6)  # channels run fastest, in pixels of 2x3
    images = np.zeros_like(image_problem.images)
    images[:] = [255, 0, 51]
    statistics = {"mean": [0.0] * 3, "std": [1.0, 1.0, 0.1]}
    output = image_problem.forward(weights=weights, images=images, thrown_target="patch", **statistics)
    assert output.loss_decoded == pytest.approx((0 + 2 + 5) / 3, rel=1e-13)
    assert output.loss_thrown == pytest.approx((0 + 2 + 5) / 3, rel=1e-13)


@pytest.mark.parametrize("position", ["absolute", "relative"])
@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv", "none"])
def test_predictions_do_not_depend_on_the_order_of_known_tokens(random_weights, position, reconstruction):
    """Nor does the loss: without throwing that is any order of the masked tokens."""
    problem = Problem(random_weights, position=position)
    patches = np.random.default_rng(0).normal(size=(24, 18))
    rng = np.random.default_rng(1)
    for throw_ratio in (0.0, 0.25):
        counts = simmim.unit_counts((4, 6), (2, 2), 0.6, throw_ratio, "token")
        visible, decoded = counts.visible, counts.decoded
        order = rng.permutation(24).tolist()
        other = [
            *rng.permutation(order[:visible]).tolist(),
            *rng.permutation(order[visible : visible + decoded]).tolist(),
            *order[visible + decoded :],
        ]
        predicted = []
        for each in (order, other):
            rows = simmim.image_features(
                patches,
                each,
                counts,
                (4, 6),
                problem.weights,
                num_heads=HEADS,
                stages=2,
                reconstruction=reconstruction,
                scales=None,
            )
            predicted.append(dict(zip(each, rows, strict=False)))
        assert order != other
        assert predicted[0].keys() == predicted[1].keys()
        assert all(np.allclose(predicted[0][token], predicted[1][token], atol=1e-10) for token in predicted[0])


@pytest.mark.parametrize("throw_by", ["token", "unit"])
@pytest.mark.parametrize("throwing", ["none", "furthest", "random", "cell"])
def test_where_nothing_is_thrown_masked_tokens_come_in_order_of_noise(image_problem, throwing, throw_by):
    output = image_problem.forward(throw_ratio=0.0, throwing=throwing, throw_by=throw_by)
    masked = np.take_along_axis(image_problem.noise, output.order[:, 8:], axis=1)
    assert (np.diff(masked, axis=1) > 0).all()
    assert output.loss == image_problem.forward(throwing="none").loss


@pytest.mark.parametrize("options", [{}, {"throwing": "none"}])
def test_only_differences_in_the_relative_table_matter(image_problem, options):
    before = image_problem.forward(**options)
    shifted = dict(image_problem.weights)
    shifted[TABLE] = shifted[TABLE] + np.array([1.0, -20.0, 300.0])  # a constant for every head
    after = image_problem.forward(weights=shifted, **options)
    assert after.loss == pytest.approx(before.loss, rel=1e-10)
    assert np.allclose(after.predicted, before.predicted, atol=1e-9)


@pytest.mark.parametrize("row", [38, -3, -2, -1], ids=["same-token", "cls-token", "token-cls", "cls-cls"])
def test_every_kind_of_row_of_the_relative_table_matters(image_problem, row):
    changed = dict(image_problem.weights)
    changed[TABLE] = changed[TABLE].copy()
    changed[TABLE][row] += 3  # of 7 x 11 offsets the middle one is number 38
    assert abs(image_problem.forward(weights=changed).loss - image_problem.forward().loss) > 1e-6


def test_layer_scale_of_zero_leaves_mask_tokens_as_they_are(image_problem, oracle):
    weights = dict(image_problem.weights)
    for name in weights:
        if name.endswith("gamma"):
            weights[name] = np.zeros(DIM)
    output = image_problem.forward(weights=weights)
    predicted = oracle.affine(oracle.normed(weights["encoder.mask_token"], weights, "encoder.norm"), weights, "head")
    assert np.allclose(output.predicted[:, :10], predicted, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("position", ["absolute", "relative"])
def test_a_patch_is_seen_by_its_image_if_it_is_visible(random_weights, name, position):
    problem = Problem(random_weights, CASES[name], position=position)
    before = problem.forward(cell_norm="none")
    counts = problem.counts
    kinds = {"visible": 0, "decoded": counts.visible, "thrown": counts.visible + counts.decoded}
    for kind, place in kinds.items():
        token = before.order[0, place]
        corner = np.array(np.unravel_index(token, problem.shape)) * problem.patch_size
        region = tuple(slice(c, c + side) for c, side in zip(corner, problem.patch_size, strict=True))
        images = problem.images.copy()
        images[(0, *region)] ^= 255
        after = problem.forward(images=images, cell_norm="none")
        for given, found in ((before.predicted, after.predicted), (before.predicted_cells, after.predicted_cells)):
            assert np.array_equal(found[1], given[1])
            assert np.array_equal(found[0], given[0]) == (kind != "visible")
        assert (after.loss_decoded == before.loss_decoded) == (kind == "thrown")
        assert (after.loss_thrown == before.loss_thrown) == (kind == "decoded")


@pytest.mark.parametrize("throw_by", ["token", "unit"])
@pytest.mark.parametrize("throwing", ["furthest", "random", "cell"])
def test_units_are_masked_as_a_whole_and_thrown_as_told(throwing, throw_by, random_weights):
    problem = Problem(random_weights, CUBE)
    output = problem.forward(throwing=throwing, throw_by=throw_by, throw_ratio=0.3)

    def units(tokens):
        cells = np.array(np.unravel_index(tokens, problem.shape)) // 2
        return np.sort(np.ravel_multi_index(cells, (2, 2, 2)))

    for order in output.order:
        assert sorted(order) == list(range(64))
        assert (np.unique(units(order[:24]), return_counts=True)[1] == 8).all()  # 3 of 8 units are visible
        thrown = 16 if throw_by == "unit" else 19
        parts = np.unique(units(order[-thrown:]), return_counts=True)[1]
        assert (parts == 8).all() == (throw_by == "unit")


@pytest.mark.parametrize("throw_by", ["token", "unit"])
@pytest.mark.parametrize("furthest_from", ["visible", "none"])
def test_the_order_is_that_of_the_plan(random_weights, furthest_from, throw_by):
    problem = Problem(random_weights, CUBE)
    output = problem.forward(furthest_from=furthest_from, throw_by=throw_by)
    unit = (2, 2, 2)
    counts = simmim.unit_counts(problem.shape, unit, 0.6, 0.25, throw_by)
    for order, noise in zip(output.order.tolist(), problem.noise.tolist(), strict=True):
        visible = block_visible(problem.shape, unit, 3, noise)
        options = {"visible": visible, "unit": unit if throw_by == "unit" else None}
        expected = {
            furthest_from: make_order(problem.shape, counts, noise, furthest_from=furthest_from, **options)
            for furthest_from in ("visible", "none")
        }
        assert order == expected[furthest_from]
        assert expected["visible"] != expected["none"]  # or this noise tests nothing


@pytest.mark.parametrize(
    "options",
    [
        {"cell_norm": "window", "extra_cells": "known"},
        {"throwing": "cell"},
        {"reconstruction": "conv"},
        {"drop_path": 0.5},
    ],
)
def test_images_of_a_batch_do_not_see_each_other(image_problem, options):
    both = image_problem.forward(**options)
    for image in range(2):
        part = {"images": image_problem.images[image : image + 1], "noise": image_problem.noise[image : image + 1]}
        single = image_problem.forward(**part, **options)
        assert np.array_equal(single.order[0], both.order[image])
        assert np.allclose(single.predicted[0], both.predicted[image], atol=1e-13)
        assert np.allclose(single.predicted_cells[0], both.predicted_cells[image], atol=1e-13)


def test_drop_path_scales_the_branches_of_every_image(random_weights, oracle):
    problem = Problem(random_weights, batch=4)
    assert np.array_equal(problem.forward(drop_path=0.0).predicted, problem.forward().predicted)
    output = problem.forward(drop_path=0.6, reconstruction="none")
    scales = np.array([drop_path_scales(DEPTH, 0.6, noise.tolist()) for noise in problem.noise])
    assert scales.shape == (4, DEPTH, 2)
    assert set(np.unique(scales[:, 1].round(6))) == {0.0, 2.5}  # or this noise tests nothing
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    features = features_of_seen(oracle, problem, output.order[:, :18], mean, std, scales)
    assert np.allclose(output.predicted, oracle.affine(features[:, 8:], problem.weights, "head"), atol=1e-10)


@pytest.mark.parametrize(
    ("mask_ratio", "throw_ratio", "supervised"), [(0.0, 0.5, 0), (0.6, 1.0, 16), (1.0, 0.5, 24), (1.0, 0.0, 24)]
)
def test_extreme_ratios_are_defined(image_problem, mask_ratio, throw_ratio, supervised):
    output = image_problem.forward(mask_ratio=mask_ratio, throw_ratio=throw_ratio)
    assert output.predicted.shape[1] + output.predicted_cells.shape[1] == supervised
    assert np.isfinite(output.loss)
    assert (output.loss == 0.0) == (supervised == 0)
    assert (output.loss_decoded == 0.0) == (supervised == 0 or throw_ratio == 1.0)


def test_everything_thrown_leaves_nothing_to_rebuild_from(image_problem):
    with pytest.raises(ValueError, match="features: expected at least one known token"):
        image_problem.forward(mask_ratio=1.0, throw_ratio=1.0)


@pytest.mark.parametrize("position", ["absolute", "relative"])
@pytest.mark.parametrize("name", CASES)
def test_encode_sees_the_whole_image(random_weights, oracle, name, position):
    problem = Problem(random_weights, CASES[name], position=position)
    mean, std = [0.4] * problem.channels, [0.3] * problem.channels
    found = simmim.encode(
        problem.weights, problem.images, patch_size=problem.patch_size, num_heads=HEADS, mean=mean, std=std
    )
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    states = oracle.encoder_outputs(patches, problem.weights, problem.shape, HEADS)
    assert np.allclose(found, oracle.normed(states[-1], problem.weights, "encoder.norm"), atol=1e-10)


def test_weights_load_from_a_file(image_problem, tmp_path):
    single = {name: np.ascontiguousarray(array, np.float32) for name, array in image_problem.weights.items()}
    save_file(single, tmp_path / "weights.safetensors")
    from_file = image_problem.forward(weights=tmp_path / "weights.safetensors")
    assert from_file.loss == image_problem.forward(weights=single).loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "copy"}, "reconstruction: expected"),
        ({"thrown_target": "pixels"}, "thrown_target: expected"),
        ({"extra_cells": "all"}, "extra_cells: expected"),
        ({"throw_by": "row"}, 'throw_by: expected "token" or "unit", got \'row\''),
        ({"mask_unit": 4}, "mask_unit: expected a divisor of the grid 4x6, got 4"),
        ({"mask_unit": 0}, "mask_unit: expected a divisor of the grid 4x6, got 0"),
        ({"throwing": "nearest"}, "throwing: expected"),
        ({"mean": [0.5]}, "mean: expected 3 numbers, one per channel, got 1"),
    ],
)
def test_wrong_options_are_refused(image_problem, options, message):
    with pytest.raises(ValueError, match=message):
        image_problem.forward(**options)


@pytest.mark.parametrize("names", [(), ("encoder.pos_embed", TABLE)], ids=["none", "both"])
def test_weights_hold_one_kind_of_position(image_problem, names):
    weights = {name: array for name, array in image_problem.weights.items() if name != TABLE}
    weights |= {name: np.zeros((1, 25, DIM)) for name in names}
    with pytest.raises(ValueError, match=r"weights: expected either encoder\.pos_embed or encoder\.rel_pos_bias"):
        image_problem.forward(weights=weights)
