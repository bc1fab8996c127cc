"""VideoMAE in JAX: tubes, dual masking and pictures.

tests/parity compares it with PyTorch and the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prmim_core import Grid, counter_noise, patchify, tube_visible
from prmim_jax import VideoMAE
from prmim_methods import VideoMAEConfig

SMALL = {"image_size": (8, 6, 8), "patch_size": (2, 2, 2), "embed_dim": 12, "depth": 1, "num_heads": 2}
SMALL |= {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.75}


@pytest.fixture
def clips(make_images):
    return jnp.asarray(make_images(3, 8, 6, 8, 3))


NOISE = counter_noise(5, 0, jnp.arange(3), 48)


def test_a_clip_is_masked_in_tubes(clips):
    method = VideoMAE(VideoMAEConfig(**SMALL, throwing="dual"))
    output = jax.jit(lambda clips, noise: method(clips, noise))(clips, NOISE)
    assert jnp.isfinite(output.loss)
    expected = tube_visible(Grid((4, 3, 4)), 12, NOISE)
    np.testing.assert_array_equal(jnp.sort(output.plan.visible), jnp.sort(expected))
    assert output.predicted.shape == (3, 18, 24)


@pytest.mark.parametrize("options", [{}, {"norm_over": "patch"}], ids=str)
def test_pixels_of_a_perfect_prediction_are_the_clip(clips, options):
    method = VideoMAE(VideoMAEConfig(**SMALL, thrown_target="patch", **options))

    @jax.jit
    def rebuild(clips):
        output, patches = method(clips, NOISE), patchify(clips, (2, 2, 2))
        output.predicted = method._normalize_target(method._patch_target(patches, output.plan.masked))
        return method.rebuilt_pixels(clips, output), patches / 255

    np.testing.assert_allclose(*rebuild(clips), rtol=1e-4, atol=1e-5)


def test_the_formula_counts_the_products(clips, dot_macs):
    config = VideoMAEConfig(**SMALL, throwing="dual")
    method = VideoMAE(config)
    assert dot_macs(lambda clips: method(clips, NOISE[:1]).loss, clips[:1]) == config.cost().macs


def test_features_are_the_mean_of_all_tokens(clips):
    method = VideoMAE(VideoMAEConfig(**SMALL))
    features, encoded = jax.jit(lambda clips: (method.features(clips), method.encode(clips)))(clips)
    assert encoded.shape == (3, 48, 12)
    np.testing.assert_allclose(features, encoded.mean(1), rtol=1e-5, atol=1e-6)
