"""LocalMIM against an independent forward pass on whole maps.

It uses transposed convolutions, and masks as weights.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import erf

from prmim_reference import hog, localmim, reconstruct
from prmim_reference.noise import counter_noise

DIM, DECODER_DIM, HEADS, DECODER_HEADS, BINS = 12, 16, 3, 4, 5
SHAPE, PATCH, CHANNELS = (2, 4), (4, 4), 2
SCALES, LAYERS = (4.0, 1.0, 0.5), (1, 1, 2)
COUNTS = SimpleNamespace(visible=2, decoded=2, thrown=4)


@pytest.fixture(params=["hog", "pixels"])
def target(request):
    return request.param


@pytest.fixture
def weights(random_weights, target):
    values = CHANNELS * (BINS if target == "hog" else 1)
    found = random_weights(0)
    found.encoder(SHAPE, PATCH, CHANNELS, DIM, depth=2)
    for number, scale in enumerate(SCALES):
        found.norm(f"norms.{number}", DIM)
        name = f"decoders.{number}"
        found.blocks(name, DECODER_DIM, depth=1)
        found.norm(f"{name}.norm", DECODER_DIM)
        found.linear(f"{name}.embed", DIM, DECODER_DIM)
        found[f"{name}.mask_token"] = found.normal(1, 1, DECODER_DIM)
        found[f"{name}.pos_embed"] = found.normal(1, 9, DECODER_DIM)
        found[f"reconstruct.{number}.table"] = found.normal(4, 21)
        found.norm(f"reconstruct.{number}.norm", DECODER_DIM)
        width = DECODER_DIM
        for layer in range(2 if scale == 4 else 0):
            found.linear(f"heads.{number}.up.{layer}", width, 2 * width)
            width //= 2
        found.norm(f"heads.{number}.norms.0", DECODER_DIM // 2)
        found.linear(f"heads.{number}.pred", width, values)
    return found


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 16, CHANNELS), np.uint8)
NOISE = np.array([counter_noise(0, 0, sample, 8) for sample in range(2)])


def forward(weights, **options):
    given = {"patch_size": PATCH, "num_heads": HEADS, "decoder_heads": DECODER_HEADS, "bins": BINS}
    return localmim.forward(weights, IMAGES, NOISE, scales=SCALES, layers=LAYERS, **given, **options)


def pooled(maps, size):
    """Means of blocks of maps (batch, height, width, values)."""
    batch, height, width, values = maps.shape
    cut = maps.reshape(batch, height // size[0], size[0], width // size[1], size[1], values)
    return cut.mean((2, 4))


def histograms(image, cell, bins):
    """LocalMIM's histograms by scipy: (cells..., channels * bins)."""
    planes = []
    for plane in np.moveaxis(image.astype(float), -1, 0):
        u, v = (-4 * ndimage.correlate(plane, kernel, mode="mirror") for kernel in (SOBEL.T, SOBEL))
        chosen = np.floor(np.arctan2(u, v) / np.pi * bins).astype(int) % bins
        share = np.hypot(u, v)[..., None] * (chosen[..., None] == np.arange(bins))
        mean = pooled(share[None], cell)[0]
        planes.append(mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12))
    return np.concatenate(planes, axis=-1)


SOBEL = np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]]) / 4.0


@pytest.mark.parametrize(("cell", "bins"), [((4, 4), 9), ((2, 8), 4), ((8, 16), 3), ((1, 1), 6)])
def test_histograms_are_those_of_scipy(cell, bins):
    np.testing.assert_allclose(hog.hog(IMAGES[0], cell, bins), histograms(IMAGES[0], cell, bins), atol=1e-12)


def test_gradients_are_reflected_at_the_border():
    ramp = np.arange(5.0)[:, None, None] * np.ones((1, 3, 1))
    # Rows 0 and 4 mirror their neighbours, so they have no gradient.
    assert hog.hog(ramp, (1, 1), 2)[:, 1].tolist() == [[0, 0], [1, 0], [1, 0], [1, 0], [0, 0]]


def map_targets(target, cell):
    if target == "hog":
        return np.array([histograms(image, cell, BINS) for image in IMAGES])
    pixels = (IMAGES / 255 - 0.5) / 0.5
    mean, deviation = pixels.mean((1, 2), keepdims=True), pixels.std((1, 2), keepdims=True)
    return pooled((pixels - mean) / (deviation + 1e-3), cell)


def whole_map(features, weights, head, scale, is_available):
    """Predictions (batch, height, width, values) from raster-order features.

    Features are (batch, N, dim).
    """
    maps = np.where(is_available[..., None], features, 0).reshape(2, *SHAPE, DECODER_DIM)
    if scale < 1:
        maps = pooled(maps, (2, 2)) / pooled(is_available.reshape(2, *SHAPE, 1).astype(float), (2, 2))
    for layer in range(2 if scale == 4 else 0):
        if layer:
            maps = normed(maps, weights, f"{head}.norms.0")
            maps = maps * 0.5 * (1 + erf(maps / np.sqrt(2)))
        batch, height, width, _ = maps.shape
        wider = (maps @ weights[f"{head}.up.{layer}.weight"].T + weights[f"{head}.up.{layer}.bias"]).reshape(
            batch, height, width, 2, 2, -1
        )
        maps = wider.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)
    return maps @ weights[f"{head}.pred.weight"].T + weights[f"{head}.pred.bias"]


def normed(x, weights, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


@pytest.mark.parametrize(
    ("options", "thrown_weight", "is_rebuilt"),
    [({"throw_ratio": 0.0}, 0, False), ({"thrown_weight": 0.3}, 0.3, True), ({"reconstruction": "none"}, 0, False)],
    ids=["dense", "prmim", "plain"],
)
def test_the_loss_is_that_of_weighted_maps(oracle, weights, target, options, thrown_weight, is_rebuilt):
    output = forward(weights, target=target, **options)
    order = output.order
    num_known = 8 if "throw_ratio" in options else 4
    patches = oracle.raster_patches(IMAGES, PATCH, [0.5] * CHANNELS, [0.5] * CHANNELS)
    visible, known = order[:, :2], order[:, :num_known]
    states = oracle.encoder_outputs(patches, weights, SHAPE, HEADS, tokens=visible)
    weight = np.zeros((2, 8))
    np.put_along_axis(weight, order[:, 2:num_known], 1.0, axis=1)
    np.put_along_axis(weight, order[:, num_known:], thrown_weight, axis=1)
    is_available = np.zeros((2, 8), bool)
    np.put_along_axis(is_available, order if is_rebuilt else known, True, axis=1)
    expected = 0.0
    for number, (scale, layer) in enumerate(zip(SCALES, LAYERS, strict=True)):
        encoded = normed(states[layer - 1], weights, "encoder.norm" if number == 2 else f"norms.{number}")
        name = f"decoders.{number}"
        embedded = oracle.affine(encoded, weights, f"{name}.embed")
        full = np.broadcast_to(weights[f"{name}.mask_token"], (2, 8, DECODER_DIM)).copy()
        np.put_along_axis(full, visible[:, :, None], embedded[:, 1:], axis=1)
        sequence = np.concatenate([embedded[:, :1], full], axis=1) + weights[f"{name}.pos_embed"]
        rows = np.concatenate([np.zeros((2, 1), int), 1 + known], axis=1)
        sequence = np.take_along_axis(sequence, rows[:, :, None], axis=1)
        features = normed(oracle.block_outputs(sequence, weights, name, DECODER_HEADS)[-1], weights, f"{name}.norm")
        features = features[:, 1:]
        if is_rebuilt:
            own = {key: weights[f"reconstruct.{number}.{key}"] for key in ("table", "norm.weight", "norm.bias")}
            features = np.array(
                [
                    reconstruct.progressive_reconstruction(
                        rows, tokens.tolist(), COUNTS, SHAPE, stages=2, reconstruction="kernel", parameters=own
                    )
                    for rows, tokens in zip(features, order, strict=True)
                ]
            )
        raster = np.zeros((2, 8, DECODER_DIM))
        np.put_along_axis(raster, order[:, : features.shape[1], None], features, axis=1)
        predicted = whole_map(raster, weights, f"heads.{number}", scale, is_available)
        wanted = map_targets(target, tuple(int(side / scale) for side in PATCH))
        error = ((predicted - wanted) ** 2).mean(-1)
        grid = weight.reshape(2, *SHAPE, 1)
        resampled = pooled(grid, (2, 2)) if scale < 1 else grid.repeat(int(scale), 1).repeat(int(scale), 2)
        # A unit without any supervised token has the weight 0.
        expected += np.nansum(error * resampled[..., 0]) / resampled.sum()
    assert output.loss == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("option", [{"target": "sift"}, {"reconstruction": "copy"}])
def test_wrong_options_are_refused(random_weights, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        forward(random_weights(0), **option)
