import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from prmim_reference import drop_path, mae, method, reconstruct
from prmim_reference.noise import counter_noise

DIM, DECODER_DIM, HEADS, DECODER_HEADS = 12, 24, 3, 4
CASES = {
    "image": {"lengths": (8, 12), "patch_size": (2, 3), "channels": 3},
    "series": {"lengths": (30,), "patch_size": (3,), "channels": 2},
    "volume": {"lengths": (4, 6, 6), "patch_size": (2, 2, 2), "channels": 1},
}


class Problem:
    """Random weights, images and noise of a small method."""

    def __init__(self, random_weights, name="image", *, batch=2, seed=0, class_tokens=1):
        case = CASES[name]
        self.patch_size, self.channels, lengths = case["patch_size"], case["channels"], case["lengths"]
        self.shape = tuple(n // side for n, side in zip(lengths, self.patch_size, strict=True))
        self.num_tokens = int(np.prod(self.shape))
        self.patch_dim = int(np.prod(self.patch_size)) * self.channels
        self.images = np.random.default_rng(seed).integers(0, 256, (batch, *lengths, self.channels), np.uint8)
        self.noise = np.array([counter_noise(seed, 0, sample, self.num_tokens) for sample in range(batch)])
        self.weights = random_weights(seed)
        self.class_tokens = class_tokens
        self.weights.encoder(self.shape, self.patch_size, self.channels, DIM, depth=2, class_tokens=class_tokens)
        self.weights.blocks("decoder", DECODER_DIM, depth=1)
        self.weights.norm("decoder.norm", DECODER_DIM)
        self.weights.linear("decoder.embed", DIM, DECODER_DIM)
        self.weights.linear("decoder.pred", DECODER_DIM, self.patch_dim)
        self.weights["decoder.mask_token"] = self.weights.normal(1, 1, DECODER_DIM)
        self.weights["decoder.pos_embed"] = self.weights.normal(1, class_tokens + self.num_tokens, DECODER_DIM)
        self.weights.reconstruct(self.shape, DECODER_DIM)
        self.weights.linear("cell_head", DECODER_DIM, self.channels * math.prod(2 - n % 2 for n in self.patch_size))

    def forward(self, **options):
        options = {"patch_size": self.patch_size, "num_heads": HEADS, "decoder_heads": DECODER_HEADS} | options
        return mae.forward(options.pop("weights", self.weights), self.images, self.noise, **options)


@pytest.fixture(params=CASES)
def problem(request, random_weights):
    return Problem(random_weights, request.param)


@pytest.fixture
def image_problem(random_weights):
    return Problem(random_weights)


# An independent forward pass in the manner of the original MAE: batches, the decoder on the whole image in raster
# order, the loss through a boolean mask.


def raster_features(oracle, problem, patches, num_visible, order, num_decoded, scales=None):
    """Decoder features in raster order (B, N, dim).

    Attention is among visible and decoded tokens only.
    """
    weights, num_class = problem.weights, problem.class_tokens
    visible = order[:, :num_visible]
    states = oracle.encoder_outputs(patches, weights, problem.shape, HEADS, tokens=visible, scales=scales)
    embedded = oracle.affine(oracle.normed(states[-1], weights, "encoder.norm"), weights, "decoder.embed")
    features = np.full((len(patches), problem.num_tokens, DECODER_DIM), np.nan)
    full = np.broadcast_to(weights["decoder.mask_token"], features.shape).copy()
    np.put_along_axis(full, visible[:, :, None], embedded[:, num_class:], axis=1)
    sequence = np.concatenate([embedded[:, :num_class], full], axis=1) + weights["decoder.pos_embed"]
    for image, tokens in enumerate(order):
        seen = np.sort(tokens[: num_visible + num_decoded])
        rows = np.concatenate([np.arange(num_class), num_class + seen])
        states = oracle.block_outputs(sequence[image : image + 1, rows], weights, "decoder", DECODER_HEADS)
        features[image, seen] = oracle.normed(states[-1], weights, "decoder.norm")[0, num_class:]
    return features


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


def raster_target(patches, norm_pix):
    if not norm_pix:
        return patches
    return (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("throwing", ["none", "furthest"])
def test_without_throwing_it_is_mae(problem, oracle, norm_pix, throwing):
    mean, std = [0.4] * problem.channels, [0.3] * problem.channels
    output = problem.forward(throwing=throwing, throw_ratio=0.0, norm_pix=norm_pix, mean=mean, std=std)
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    num_visible = problem.num_tokens // 4
    order = np.argsort(problem.noise, axis=1, kind="stable")
    features = raster_features(oracle, problem, patches, num_visible, order, problem.num_tokens - num_visible)
    is_masked = np.ones((len(order), problem.num_tokens))
    np.put_along_axis(is_masked, order[:, :num_visible], 0, axis=1)
    predicted = oracle.affine(features, problem.weights, "decoder.pred")
    error = ((predicted - raster_target(patches, norm_pix)) ** 2).mean(axis=-1)
    assert output.loss == pytest.approx((error * is_masked).sum() / is_masked.sum(), rel=1e-10)
    assert output.loss_decoded == output.loss
    assert output.loss_thrown == 0.0
    masked = output.order[:, num_visible:]
    assert np.allclose(output.predicted, np.take_along_axis(predicted, masked[:, :, None], axis=1), atol=1e-10)


def test_units_are_masked_together_and_drop_path_scales_the_encoder(image_problem, oracle):
    problem = image_problem
    half = [0.5] * problem.channels
    options = {"reconstruction": "none", "norm_pix": False, "mean": half, "std": half}
    output = problem.forward(mask_unit=2, drop_path=0.5, **options)
    assert output.order.shape == (2, 16)
    rows, columns = np.divmod(np.sort(output.order[:, :4], axis=1), 4)
    assert (rows - rows[:, :1]).tolist() == [[0, 0, 1, 1]] * 2
    assert (columns - columns[:, :1]).tolist() == [[0, 1, 0, 1]] * 2
    assert not (rows[:, 0] % 2).any()
    assert not (columns[:, 0] % 2).any()
    units = problem.noise.reshape(2, 4, 4)[:, ::2, ::2].reshape(2, 4).argmin(axis=1)
    assert units.tolist() == (rows[:, 0] + columns[:, 0] // 2).tolist()
    patches = oracle.raster_patches(problem.images, problem.patch_size, half, half)
    scales = np.array([drop_path.drop_path_scales(2, 0.5, noise.tolist()) for noise in problem.noise])
    features = raster_features(oracle, problem, patches, 4, output.order, 4, scales)
    decoded = output.order[:, 4:8, None]
    predicted = np.take_along_axis(oracle.affine(features, problem.weights, "decoder.pred"), decoded, axis=1)
    assert np.allclose(output.predicted, predicted, atol=1e-10)


@pytest.mark.parametrize("class_tokens", [0, 3])
def test_class_tokens_are_seen_by_encoder_and_decoder_and_predict_nothing(random_weights, oracle, class_tokens):
    problem = Problem(random_weights, class_tokens=class_tokens)
    half = [0.5] * problem.channels
    output = problem.forward(reconstruction="none", norm_pix=False, mean=half, std=half)
    patches = oracle.raster_patches(problem.images, problem.patch_size, half, half)
    features = raster_features(oracle, problem, patches, 4, output.order, 4)
    decoded = output.order[:, 4:8, None]
    predicted = np.take_along_axis(oracle.affine(features, problem.weights, "decoder.pred"), decoded, axis=1)
    assert np.allclose(output.predicted, predicted, atol=1e-10)
    found = mae.encode(problem.weights, problem.images, patch_size=problem.patch_size, num_heads=HEADS)
    assert found.shape == (2, class_tokens + problem.num_tokens, DIM)


def test_throwing_none_ignores_the_throw_ratio(problem):
    dense = problem.forward(throwing="none", throw_ratio=0.5)
    assert dense.predicted.shape == (2, problem.num_tokens - problem.num_tokens // 4, problem.patch_dim)


@pytest.mark.parametrize("throwing", ["none", "furthest", "random", "cell"])
def test_where_nothing_is_thrown_tokens_come_in_order_of_noise(image_problem, throwing):
    output = image_problem.forward(throwing=throwing, throw_ratio=0.0)
    assert np.array_equal(output.order, np.argsort(image_problem.noise, axis=1))


def test_plain_partial_reconstruction_supervises_decoded_tokens_only(problem, oracle):
    half = [0.5] * problem.channels
    output = problem.forward(reconstruction="none", throw_ratio=0.5, norm_pix=False, mean=half, std=half)
    num_visible = problem.num_tokens // 4
    num_decoded = problem.num_tokens - num_visible - problem.num_tokens // 2
    patches = oracle.raster_patches(problem.images, problem.patch_size, half, half)
    features = raster_features(oracle, problem, patches, num_visible, output.order, num_decoded)
    decoded = output.order[:, num_visible : num_visible + num_decoded, None]
    predicted = np.take_along_axis(oracle.affine(features, problem.weights, "decoder.pred"), decoded, axis=1)
    assert np.allclose(output.predicted, predicted, atol=1e-10)
    error = (predicted - np.take_along_axis(patches, decoded, axis=1)) ** 2
    assert output.loss == pytest.approx(error.mean(), rel=1e-10)
    assert output.loss == output.loss_decoded
    assert output.loss_thrown == 0.0


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
@pytest.mark.parametrize("furthest_from", ["visible", "none"])
def test_thrown_tokens_are_rebuilt_from_decoder_features(problem, oracle, reconstruction, furthest_from):
    output = problem.forward(
        reconstruction=reconstruction, furthest_from=furthest_from, stages=3, thrown_target="patch"
    )
    plain = problem.forward(reconstruction="none", furthest_from=furthest_from)
    num_decoded = plain.predicted.shape[1]
    assert np.array_equal(output.order, plain.order)
    assert np.allclose(output.predicted[:, :num_decoded], plain.predicted, atol=1e-12)
    assert output.loss_decoded == pytest.approx(plain.loss, rel=1e-12)

    counts = mae.count_tokens(problem.num_tokens, 0.75, 0.5)
    mean, std = method.channel_statistics(problem.channels, None, None)
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    features = raster_features(oracle, problem, patches, counts.visible, output.order, counts.decoded)
    known = np.take_along_axis(features, output.order[:, : counts.visible + counts.decoded, None], axis=1)
    rebuilt = all_features(problem, known, output.order, counts, stages=3, reconstruction=reconstruction)
    thrown = output.order[:, -counts.thrown :, None]
    predicted = oracle.affine(rebuilt[:, -counts.thrown :], problem.weights, "decoder.pred")
    assert np.allclose(output.predicted[:, num_decoded:], predicted, atol=1e-10)
    error = (predicted - np.take_along_axis(raster_target(patches, True), thrown, axis=1)) ** 2
    assert output.loss_thrown == pytest.approx(error.mean(), rel=1e-10)
    decoded, thrown = counts.decoded, counts.thrown
    expected = (decoded * output.loss_decoded + thrown * output.loss_thrown) / (decoded + thrown)
    assert output.loss == pytest.approx(expected, rel=1e-12)


def test_targets_and_losses_of_cells(problem, oracle, cell_options):
    given = {"throw_ratio": 0.5, "cells": None, "cell_norm": "image", "reconstruction": "kernel", **cell_options}
    cells = tuple(given["cells"] or 2 - side % 2 for side in problem.patch_size)
    problem.weights.linear("cell_head", DECODER_DIM, problem.channels * math.prod(cells))
    mean, std = [0.4] * problem.channels, [0.3] * problem.channels
    output = problem.forward(**given, mean=mean, std=std)

    counts = mae.count_tokens(problem.num_tokens, 0.75, given.pop("throw_ratio"))
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    features = raster_features(oracle, problem, patches, counts.visible, output.order, counts.decoded)
    known = np.take_along_axis(features, output.order[:, : counts.visible + counts.decoded, None], axis=1)
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
        head="decoder.pred",
        power=2,
        targets=raster_target(oracle.raster_patches(filtered, problem.patch_size, mean, std), True),
        cell_targets=oracle.raster_cells(problem.images, problem.patch_size, cells, mean, std, cell_norm),
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
    decoded, thrown = 4, 8  # of 16 tokens, 4 are visible
    weighted = decoded * output.loss_decoded + thrown_weight * thrown * output.loss_thrown
    assert output.loss == pytest.approx(weighted / (decoded + thrown_weight * thrown), rel=1e-12)


def test_a_silent_head_scores_the_variance_of_the_target(image_problem):
    weights = dict(image_problem.weights)
    weights["decoder.pred.weight"] = np.zeros_like(weights["decoder.pred.weight"])
    weights["decoder.pred.bias"] = np.zeros_like(weights["decoder.pred.bias"])
    output = image_problem.forward(weights=weights, thrown_target="patch")
    # The unbiased variance of a normalised patch of n values is 1, so their mean square is (n - 1) / n.
    expected = (image_problem.patch_dim - 1) / image_problem.patch_dim
    assert output.loss == pytest.approx(expected, rel=1e-4)
    assert not output.predicted.any()


@pytest.mark.parametrize(
    "options",
    [{}, {"throwing": "cell", "cell_norm": "window"}, {"reconstruction": "conv", "extra_cells": "known"}],
)
def test_images_of_a_batch_do_not_see_each_other(image_problem, options):
    both = image_problem.forward(**options)
    losses = []
    for image in range(2):
        single = mae.forward(
            image_problem.weights,
            image_problem.images[image : image + 1],
            image_problem.noise[image : image + 1],
            patch_size=image_problem.patch_size,
            num_heads=HEADS,
            decoder_heads=DECODER_HEADS,
            **options,
        )
        assert np.array_equal(single.order[0], both.order[image])
        assert np.allclose(single.predicted[0], both.predicted[image], atol=1e-13)
        assert np.allclose(single.predicted_cells[0], both.predicted_cells[image], atol=1e-13)
        losses.append(single.loss)
    assert both.loss == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize(
    ("mask_ratio", "throw_ratio", "supervised"), [(0.0, 0.5, 0), (0.75, 0.75, 12), (1.0, 0.5, 16), (1.0, 0.0, 16)]
)
def test_extreme_ratios_are_defined(image_problem, mask_ratio, throw_ratio, supervised):
    output = image_problem.forward(mask_ratio=mask_ratio, throw_ratio=throw_ratio)
    assert output.predicted.shape[1] + output.predicted_cells.shape[1] == supervised
    assert np.isfinite(output.loss)
    assert (output.loss == 0.0) == (supervised == 0)
    if throw_ratio == 0.75:
        assert output.loss_decoded == 0.0
        assert output.loss == output.loss_thrown


def test_everything_thrown_leaves_nothing_to_rebuild_from(image_problem):
    with pytest.raises(ValueError, match="features: expected at least one known token"):
        image_problem.forward(mask_ratio=1.0, throw_ratio=1.0)


def test_weights_load_from_a_file(image_problem, tmp_path):
    single = {name: np.ascontiguousarray(array, np.float32) for name, array in image_problem.weights.items()}
    save_file(single, tmp_path / "weights.safetensors")
    from_file = image_problem.forward(weights=tmp_path / "weights.safetensors")
    assert from_file.loss == image_problem.forward(weights=single).loss


def test_visible_tokens_and_draw_weights_may_be_given(image_problem):
    visible = np.array([[3, 1, 8, 12], [0, 5, 10, 15]])
    draw_weights = np.ones((2, 16))
    draw_weights[:, [2, 4, 7, 9]] = 1e12
    output = image_problem.forward(throwing="weighted", visible=visible, draw_weights=draw_weights)
    assert np.array_equal(output.order[:, :4], visible)
    assert set(output.order[0, 4:8]) == set(output.order[1, 4:8]) == {2, 4, 7, 9}


def test_draw_weights_also_draw_the_visible_tokens(image_problem):
    draw_weights = np.ones((2, 16))
    draw_weights[:, [2, 4, 7, 9]] = 1e12
    draw_weights[:, [0, 5, 6, 15]] = 1e-12
    output = image_problem.forward(throwing="weighted", draw_weights=draw_weights)
    for order in output.order.tolist():
        assert (set(order[:4]), set(order[4:8])) == ({0, 5, 6, 15}, {2, 4, 7, 9})
    with pytest.raises(ValueError, match="draw_weights: expected token weights"):
        image_problem.forward(throwing="weighted")


def test_attention_of_the_class_token(problem, oracle):
    found = mae.attention(problem.weights, problem.images, patch_size=problem.patch_size, num_heads=HEADS)
    mean, std = method.channel_statistics(problem.channels, None, None)
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    x = oracle.encoder_outputs(patches, problem.weights, problem.shape, HEADS)[0]
    block = "encoder.blocks.1"
    qkv = oracle.affine(oracle.normed(x, problem.weights, f"{block}.norm1"), problem.weights, f"{block}.attn.qkv")
    query, key, _ = qkv.reshape(*x.shape[:2], 3, HEADS, DIM // HEADS).transpose(2, 0, 3, 1, 4)
    scores = np.exp(query @ key.swapaxes(2, 3) / np.sqrt(DIM // HEADS))
    maps = (scores / scores.sum(-1, keepdims=True))[:, :, 0, 1:]
    maps -= maps.min(-1, keepdims=True)
    assert np.allclose(found, (maps / maps.max(-1, keepdims=True)).mean(1), atol=1e-11)


def test_encode_sees_the_whole_image(problem, oracle):
    found = mae.encode(problem.weights, problem.images, patch_size=problem.patch_size, num_heads=HEADS)
    mean, std = method.channel_statistics(problem.channels, None, None)
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    states = oracle.encoder_outputs(patches, problem.weights, problem.shape, HEADS)
    assert np.allclose(found, oracle.normed(states[-1], problem.weights, "encoder.norm"), atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "copy"}, "reconstruction: expected"),
        ({"thrown_target": "pixels"}, 'thrown_target: expected "cells" or "patch", got \'pixels\''),
        ({"extra_cells": "all"}, 'extra_cells: expected "none", "decoded" or "known", got \'all\''),
        ({"cell_norm": "patch"}, "cell_norm: expected"),
        ({"mask_unit": 3}, "mask_unit: expected a divisor of the grid 4x4, got 3"),
        ({"cells": 3}, r"cells: expected divisors of the patch \(2, 3\), got \(3, 3\)"),
    ],
)
def test_wrong_options_are_refused(image_problem, options, message):
    with pytest.raises(ValueError, match=message):
        image_problem.forward(**options)
