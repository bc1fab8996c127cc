"""LocalMIM in JAX; tests/parity compares it with PyTorch and with the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import counter_noise
from prmim_jax import LocalMIM
from prmim_methods import LocalMIMConfig
from prmim_reference.hog import hog

SIZES = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_heads": 2, "scales": (2, 0.5)}
SQUARE = {"image_size": (16, 16), "patch_size": (4, 4)}


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def run(dtype=None, **options):
    """Return the output, and the compared features, of a jitted method."""
    graph, state = nnx.split(LocalMIM(LocalMIMConfig(**SIZES, **SQUARE, **options), dtype=dtype))

    @jax.jit
    def call(state, images, noise):
        method = nnx.merge(graph, state)
        output = method(images, noise)
        return output, method.compared_features(images, output)

    return call(state, jnp.asarray(IMAGES), counter_noise(5, 0, jnp.arange(2), 16))


@pytest.fixture(scope="module")
def result():
    return run()


def test_bfloat16_keeps_targets_and_loss_in_float32(result):
    rough, (_, target) = run(jnp.bfloat16, recompute_blocks=True, scan_blocks=True)
    assert {rough.loss.dtype, rough.loss_thrown.dtype, target.dtype} == {jnp.dtype("float32")}
    assert rough.predicted.dtype == jnp.bfloat16
    assert float(rough.loss) == pytest.approx(float(result[0].loss), rel=0.02)


def test_compared_features_are_predictions_and_histograms(result):
    output, (predicted, target) = result
    for image in range(2):
        is_known = np.isfinite(predicted[image]).all(-1)
        np.testing.assert_array_equal(np.flatnonzero(is_known), np.sort(output.plan.masked[image]))
        np.testing.assert_array_equal(predicted[image][output.plan.masked[image]], output.predicted[image])
        coarse = hog(IMAGES[image].astype(float), (8, 8), 9)
        np.testing.assert_allclose(target[image][:, -27:], coarse.repeat(2, 0).repeat(2, 1).reshape(16, 27), atol=1e-5)
