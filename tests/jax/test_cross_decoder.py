"""CrossMAE's decoder: all ways of running its blocks agree.

tests/parity compares it with the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prmim_jax.cross_decoder import CrossDecoder


def features_and_gradients(**options):
    """Return features of two decoded tokens, and gradients of the sum of squares."""
    decoder = CrossDecoder((4, 4), 8, 2, 5, dim=8, depth=2, num_heads=2, **options, rngs=nnx.Rngs(0))
    graph, parameters, rest = nnx.split(decoder, nnx.Param, ...)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 8)), jnp.float32)

    def loss(parameters):
        features = nnx.merge(graph, parameters, rest)(states, jnp.asarray([[3, 7], [0, 1]]))
        return jnp.square(features - 1).sum(), features

    (_, features), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    return features, gradients


def test_ways_of_running_the_blocks_agree():
    features, gradients = features_and_gradients()
    found, others = features_and_gradients(scan=True, recompute=True)
    np.testing.assert_allclose(found, features, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4), gradients, others)
    rough, others = features_and_gradients(scan=True, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, features, atol=0.05)
    assert all(np.isfinite(leaf).all() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(others))
