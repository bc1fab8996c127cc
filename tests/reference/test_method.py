import numpy as np
import pytest
from safetensors.numpy import save_file

from prmim_reference import mae, maskalign, method, simmim
from prmim_reference.counts import TokenCounts

SHAPE, DIM, HEADS = (2, 3), 8, 2


def test_channel_statistics_default_to_imagenet_for_three_channels():
    mean, std = method.channel_statistics(3, None, None)
    assert mean.tolist() == [0.485, 0.456, 0.406]
    assert std.tolist() == [0.229, 0.224, 0.225]
    assert [array.tolist() for array in method.channel_statistics(2, None, None)] == [[0.5, 0.5]] * 2
    with pytest.raises(ValueError, match="mean: expected 2 numbers, one per channel, got 1"):
        method.channel_statistics(2, [0.5], None)


def test_weights_are_float64_wherever_they_come_from(tmp_path):
    arrays = {"a": np.array([0.5, 0.25], np.float32), "b": np.array([[1.0]], np.float16)}
    save_file(arrays, tmp_path / "weights.safetensors")
    for found in (method.as_weights(arrays), method.as_weights(str(tmp_path / "weights.safetensors"))):
        assert {name: array.tolist() for name, array in found.items()} == {"a": [0.5, 0.25], "b": [[1.0]]}
        assert all(array.dtype == np.float64 for array in found.values())


def test_pixels_are_normalised_per_channel():
    image = np.array([[[0, 255], [51, 102]]], np.uint8)  # one row of two pixels
    patches = method.image_patches(image, (1, 1), mean=[0.2, 0.4], std=[0.1, 0.2])
    assert np.allclose(patches, [[-2.0, 3.0], [0.0, 0.0]], atol=1e-14)


@pytest.mark.parametrize("position", ["absolute", "relative"])
def test_the_encoder_sees_masked_tokens_as_mask_tokens(random_weights, oracle, position):
    weights = random_weights()
    weights.encoder(SHAPE, (1, 2), 3, DIM, 2, heads=HEADS, position=position)
    patches = np.random.default_rng(0).normal(size=(6, 6))
    is_masked = np.array([[True, False, True, True, False, True]])
    rows = np.array([[4, 1, 0, 5]])
    states = method.encoder_states(patches, [4, 1], SHAPE, weights, HEADS, mask_tokens=[0, 5])
    expected = oracle.encoder_outputs(patches[None], weights, SHAPE, HEADS, tokens=rows, is_masked=is_masked)
    assert np.allclose(states, [state[0] for state in expected], atol=1e-11)
    found = method.encode_tokens(patches, [4, 1], SHAPE, weights, HEADS, mask_tokens=[0, 5])
    assert np.allclose(found, oracle.normed(states[-1], weights, "encoder.norm"), atol=1e-11)


def test_drop_path_is_a_matter_of_training(random_weights):
    weights = random_weights()
    weights.blocks("encoder", DIM, 4)
    assert method.encoder_scales([3, 1, 2], weights, 0.0) is None
    scales = method.encoder_scales([3, 1, 2], weights, 0.5)
    assert scales.shape == (4, 2)
    assert scales[0].tolist() == [1.0, 1.0]


def test_nothing_is_rebuilt_for_the_variant_none(random_weights):
    weights = random_weights()
    weights.reconstruct(SHAPE, DIM)
    features, order, counts = np.ones((4, DIM)), [0, 5, 2, 3, 1, 4], TokenCounts(2, 2, 2)
    assert method.rebuild(features, order, counts, SHAPE, weights, stages=1, reconstruction="none") is features
    rebuilt = method.rebuild(features, order, counts, SHAPE, weights, stages=1, reconstruction="kernel")
    assert rebuilt.shape == (6, DIM)
    # A weighted mean of ones is one, and its norm the bias.
    assert np.allclose(rebuilt[4:], weights["reconstruct.norm.bias"], atol=1e-12)


@pytest.mark.parametrize("module", [mae, simmim, maskalign], ids=lambda module: module.__name__.split(".")[-1])
def test_all_methods_encode_whole_images_alike(module):
    assert module.encode is method.encode
