import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.special import erf, softmax

from prmim_reference import mae, reconstruct, vit
from prmim_reference.noise import counter_noise

DIM, DECODER_DIM, HEADS, DECODER_HEADS = 12, 24, 3, 4
CASES = {
    "image": {"lengths": (8, 12), "patch_size": (2, 3), "channels": 3},
    "series": {"lengths": (30,), "patch_size": (3,), "channels": 2},
    "volume": {"lengths": (4, 6, 6), "patch_size": (2, 2, 2), "channels": 1},
}


class Problem:
    """Random weights, images and noise of a small method."""

    def __init__(self, *, lengths, patch_size, channels, batch=2, seed=0):
        rng = np.random.default_rng(seed)
        self.patch_size, self.channels = patch_size, channels
        self.shape = tuple(n // side for n, side in zip(lengths, patch_size, strict=True))
        self.num_tokens = int(np.prod(self.shape))
        self.patch_dim = int(np.prod(patch_size)) * channels
        self.images = rng.integers(0, 256, (batch, *lengths, channels), np.uint8)
        self.noise = np.array([counter_noise(seed, 0, sample, self.num_tokens) for sample in range(batch)])
        self.weights = {}
        self.normal = lambda *size: rng.normal(0, 0.3, size)
        self.transformer("encoder", DIM, depth=2)
        self.transformer("decoder", DECODER_DIM, depth=1)
        self.weights |= {
            "encoder.patch_embed.proj.weight": self.normal(DIM, channels, *patch_size),
            "encoder.patch_embed.proj.bias": self.normal(DIM),
            "encoder.cls_token": self.normal(1, 1, DIM),
            "decoder.mask_token": self.normal(1, 1, DECODER_DIM),
            "reconstruct.table": self.normal(4, int(np.prod([2 * n - 1 for n in self.shape]))),
            "reconstruct.kernel": 1 + self.normal(DECODER_DIM, *(3,) * len(self.shape)),
        }
        self.linear("decoder.embed", DIM, DECODER_DIM)
        self.linear("decoder.pred", DECODER_DIM, self.patch_dim)
        self.norm("reconstruct.norm", DECODER_DIM)

    def linear(self, name, fan_in, fan_out):
        self.weights |= {f"{name}.weight": self.normal(fan_out, fan_in), f"{name}.bias": self.normal(fan_out)}

    def norm(self, name, dim):
        self.weights |= {f"{name}.weight": 1 + self.normal(dim), f"{name}.bias": self.normal(dim)}

    def transformer(self, name, dim, depth):
        self.weights[f"{name}.pos_embed"] = self.normal(1, 1 + self.num_tokens, dim)
        for number in range(depth):
            block = f"{name}.blocks.{number}"
            self.norm(f"{block}.norm1", dim)
            self.norm(f"{block}.norm2", dim)
            self.linear(f"{block}.attn.qkv", dim, 3 * dim)
            self.linear(f"{block}.attn.proj", dim, dim)
            self.linear(f"{block}.mlp.fc1", dim, 4 * dim)
            self.linear(f"{block}.mlp.fc2", 4 * dim, dim)
        self.norm(f"{name}.norm", dim)

    def forward(self, **options):
        options = {"patch_size": self.patch_size, "num_heads": HEADS, "decoder_heads": DECODER_HEADS} | options
        return mae.forward(options.pop("weights", self.weights), self.images, self.noise, **options)


@pytest.fixture(params=CASES)
def problem(request):
    return Problem(**CASES[request.param])


@pytest.fixture
def image_problem():
    return Problem(**CASES["image"])


# An independent forward pass in the manner of the original MAE: batches, einsum, the decoder on the whole image in
# raster order, the loss through a boolean mask.


def affine(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normed(x, weights, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def batched_transformer(x, weights, name, depth, heads):
    batch, length, dim = x.shape
    for block in (f"{name}.blocks.{number}" for number in range(depth)):
        qkv = affine(normed(x, weights, f"{block}.norm1"), weights, f"{block}.attn.qkv")
        query, key, value = qkv.reshape(batch, length, 3, heads, dim // heads).transpose(2, 0, 3, 1, 4)
        mixed = softmax(query @ key.swapaxes(2, 3) / np.sqrt(dim // heads), axis=-1) @ value
        x = x + affine(mixed.transpose(0, 2, 1, 3).reshape(batch, length, dim), weights, f"{block}.attn.proj")
        hidden = affine(normed(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1")
        x = x + affine(hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), weights, f"{block}.mlp.fc2")
    return normed(x, weights, f"{name}.norm")


def raster_patches(problem, mean, std):
    axes = len(problem.shape)
    x = (problem.images / 255 - np.array(mean)) / np.array(std)
    split = [n for pair in zip(problem.shape, problem.patch_size, strict=True) for n in pair]
    x = x.reshape(len(x), *split, problem.channels)
    x = x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(len(x), problem.num_tokens, -1)


def raster_features(problem, patches, num_visible, order, num_decoded):
    """Decoder features of the tokens in raster order, attention among visible and decoded ones only; (B, N, dim)."""
    weights = problem.weights
    batch = len(patches)
    weight = np.moveaxis(weights["encoder.patch_embed.proj.weight"], 1, -1).reshape(DIM, -1)
    tokens = patches @ weight.T + weights["encoder.patch_embed.proj.bias"] + weights["encoder.pos_embed"][:, 1:]
    visible = order[:, :num_visible]
    cls = np.broadcast_to(weights["encoder.cls_token"] + weights["encoder.pos_embed"][:, :1], (batch, 1, DIM))
    kept = np.take_along_axis(tokens, visible[:, :, None], axis=1)
    encoded = batched_transformer(np.concatenate([cls, kept], axis=1), weights, "encoder", 2, HEADS)
    embedded = affine(encoded, weights, "decoder.embed")
    full = np.broadcast_to(weights["decoder.mask_token"], (batch, problem.num_tokens, DECODER_DIM)).copy()
    np.put_along_axis(full, visible[:, :, None], embedded[:, 1:], axis=1)
    sequence = np.concatenate([embedded[:, :1], full], axis=1) + weights["decoder.pos_embed"]
    features = np.full((batch, problem.num_tokens, DECODER_DIM), np.nan)
    for image in range(batch):
        seen = np.sort(order[image, : num_visible + num_decoded])
        rows = np.concatenate([[0], 1 + seen])
        out = batched_transformer(sequence[image : image + 1, rows], weights, "decoder", 1, DECODER_HEADS)
        features[image, seen] = out[0, 1:]
    return features


def raster_target(patches, norm_pix):
    if not norm_pix:
        return patches
    return (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("throwing", ["none", "furthest"])
def test_without_throwing_it_is_mae(problem, norm_pix, throwing):
    mean, std = [0.4] * problem.channels, [0.3] * problem.channels
    output = problem.forward(throwing=throwing, throw_ratio=0.0, norm_pix=norm_pix, mean=mean, std=std)
    patches = raster_patches(problem, mean, std)
    num_visible = problem.num_tokens // 4
    order = np.argsort(problem.noise, axis=1, kind="stable")
    features = raster_features(problem, patches, num_visible, order, problem.num_tokens - num_visible)
    is_masked = np.ones((len(order), problem.num_tokens))
    np.put_along_axis(is_masked, order[:, :num_visible], 0, axis=1)
    predicted = affine(features, problem.weights, "decoder.pred")
    error = ((predicted - raster_target(patches, norm_pix)) ** 2).mean(axis=-1)
    assert output.loss == pytest.approx((error * is_masked).sum() / is_masked.sum(), rel=1e-10)
    assert output.loss_decoded == output.loss
    assert output.loss_thrown == 0.0
    masked = output.order[:, num_visible:]
    assert np.allclose(output.predicted, np.take_along_axis(predicted, masked[:, :, None], axis=1), atol=1e-10)


def test_throwing_none_ignores_the_throw_ratio(problem):
    dense = problem.forward(throwing="none", throw_ratio=0.5)
    assert dense.predicted.shape == (2, problem.num_tokens - problem.num_tokens // 4, problem.patch_dim)


@pytest.mark.parametrize("throwing", ["none", "furthest", "random", "weighted", "cell"])
def test_where_nothing_is_thrown_tokens_come_in_order_of_noise(image_problem, throwing):
    output = image_problem.forward(throwing=throwing, throw_ratio=0.0)
    assert np.array_equal(output.order, np.argsort(image_problem.noise, axis=1))


def test_plain_partial_reconstruction_supervises_decoded_tokens_only(problem):
    half = [0.5] * problem.channels
    output = problem.forward(variant="none", throw_ratio=0.5, norm_pix=False, mean=half, std=half)
    num_visible = problem.num_tokens // 4
    num_decoded = problem.num_tokens - num_visible - problem.num_tokens // 2
    patches = raster_patches(problem, half, half)
    features = raster_features(problem, patches, num_visible, output.order, num_decoded)
    decoded = output.order[:, num_visible : num_visible + num_decoded, None]
    predicted = np.take_along_axis(affine(features, problem.weights, "decoder.pred"), decoded, axis=1)
    assert np.allclose(output.predicted, predicted, atol=1e-10)
    error = (predicted - np.take_along_axis(patches, decoded, axis=1)) ** 2
    assert output.loss == pytest.approx(error.mean(), rel=1e-10)
    assert output.loss == output.loss_decoded
    assert output.loss_thrown == 0.0


@pytest.mark.parametrize("variant", ["kernel", "interpolate", "conv"])
@pytest.mark.parametrize("seed", ["visible", "none"])
def test_thrown_tokens_are_rebuilt_from_decoder_features(problem, variant, seed):
    output = problem.forward(variant=variant, seed=seed, stages=3)
    plain = problem.forward(variant="none", seed=seed)
    num_decoded = plain.predicted.shape[1]
    assert np.array_equal(output.order, plain.order)
    assert np.allclose(output.predicted[:, :num_decoded], plain.predicted, atol=1e-12)
    assert output.loss_decoded == pytest.approx(plain.loss, rel=1e-12)

    counts = mae.count_tokens(problem.num_tokens, 0.75, 0.5)
    mean, std = mae.channel_statistics(problem.channels, None, None)
    patches = raster_patches(problem, mean, std)
    features = raster_features(problem, patches, counts.visible, output.order, counts.decoded)
    own = {name[12:]: array for name, array in problem.weights.items() if name.startswith("reconstruct.")}
    thrown_errors = []
    for image, order in enumerate(output.order):
        known = features[image, order[: counts.visible + counts.decoded]]
        rebuilt = reconstruct.progressive_reconstruction(
            known, order.tolist(), counts, problem.shape, stages=3, variant=variant, parameters=own
        )
        predicted = affine(rebuilt[-counts.thrown :], problem.weights, "decoder.pred")
        assert np.allclose(output.predicted[image, num_decoded:], predicted, atol=1e-10)
        target = raster_target(patches[image], True)[order[-counts.thrown :]]
        thrown_errors.append(((predicted - target) ** 2).mean())
    assert output.loss_thrown == pytest.approx(np.mean(thrown_errors), rel=1e-10)
    decoded, thrown = counts.decoded, counts.thrown
    expected = (decoded * output.loss_decoded + thrown * output.loss_thrown) / (decoded + thrown)
    assert output.loss == pytest.approx(expected, rel=1e-12)


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
    output = image_problem.forward(weights=weights)
    # The unbiased variance of a normalised patch of n values is 1, so their mean square is (n - 1) / n.
    expected = (image_problem.patch_dim - 1) / image_problem.patch_dim
    assert output.loss == pytest.approx(expected, rel=1e-4)
    assert not output.predicted.any()


@pytest.mark.parametrize("options", [{}, {"throwing": "cell"}, {"variant": "conv"}])
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
        losses.append(single.loss)
    assert both.loss == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize(
    ("mask_ratio", "throw_ratio", "supervised"), [(0.0, 0.5, 0), (0.75, 0.75, 12), (1.0, 0.5, 16), (1.0, 0.0, 16)]
)
def test_extreme_ratios_are_defined(image_problem, mask_ratio, throw_ratio, supervised):
    output = image_problem.forward(mask_ratio=mask_ratio, throw_ratio=throw_ratio)
    assert output.predicted.shape[1] == supervised
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
    assert all(array.dtype == np.float64 for array in mae.load_weights(tmp_path / "weights.safetensors").values())


def test_visible_tokens_and_draw_weights_may_be_given(image_problem):
    visible = np.array([[3, 1, 8, 12], [0, 5, 10, 15]])
    draw_weights = np.ones((2, 16))
    draw_weights[:, [2, 4, 7, 9]] = 1e12
    output = image_problem.forward(throwing="weighted", visible=visible, draw_weights=draw_weights)
    assert np.array_equal(output.order[:, :4], visible)
    assert set(output.order[0, 4:8]) == set(output.order[1, 4:8]) == {2, 4, 7, 9}


def test_channel_statistics_default_to_imagenet_for_three_channels():
    mean, std = mae.channel_statistics(3, None, None)
    assert mean.tolist() == [0.485, 0.456, 0.406]
    assert std.tolist() == [0.229, 0.224, 0.225]
    assert [array.tolist() for array in mae.channel_statistics(2, None, None)] == [[0.5, 0.5]] * 2
    with pytest.raises(ValueError, match="mean: expected 2 numbers, one per channel, got 1"):
        mae.channel_statistics(2, [0.5], None)


def test_encode_sees_the_whole_image(problem):
    found = mae.encode(problem.weights, problem.images, patch_size=problem.patch_size, num_heads=HEADS)
    mean, std = mae.channel_statistics(problem.channels, None, None)
    weights = problem.weights
    embedded = vit.patch_embedding(raster_patches(problem, mean, std), weights, "encoder.patch_embed.proj")
    cls = np.broadcast_to(weights["encoder.cls_token"], (2, 1, DIM))
    sequence = np.concatenate([cls, embedded], axis=1) + weights["encoder.pos_embed"]
    assert np.allclose(found, batched_transformer(sequence, weights, "encoder", 2, HEADS), atol=1e-11)


def test_an_unknown_variant_is_refused(image_problem):
    with pytest.raises(ValueError, match="variant: expected"):
        image_problem.forward(variant="copy")
