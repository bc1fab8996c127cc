"""Methods as pure functions, under ``vmap``, ``grad`` and ``checkpoint``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import Grid, Schedule, TokenCounts, counter_noise
from prmim_jax import ProgressiveReconstruction, create_method, make_plan
from prmim_jax.interop import named_variables

METHODS = {
    "mae": {"name": "mae", "scan_blocks": True},
    "simmim": {"name": "simmim", "drop_path": 0.5, "cell_norm": "window", "extra_cells": "known"},
}


@pytest.fixture(params=METHODS)
def case(request, tiny, tiny_simmim, make_images):
    """Return the weights of a method, its loss as a function of them, and a batch."""
    options = METHODS[request.param]
    method = create_method(**{**(tiny if options["name"] == "mae" else tiny_simmim), **options})
    rng = np.random.default_rng(1)
    for variable in named_variables(method).values():  # break the symmetries of the initial weights
        if isinstance(variable, nnx.Param):
            variable.set_value(variable[...] + 0.1 * rng.normal(size=variable.shape).astype(np.float32))
    graph, parameters, buffers = nnx.split(method, nnx.Param, ...)

    def loss(parameters, images, noise):
        return nnx.merge(graph, parameters, buffers)(images, noise).loss

    images = jnp.asarray(make_images(4, 16, 16, 3))
    return parameters, loss, images, counter_noise(5, 0, jnp.arange(4), 16)


def assert_close(tree, other, scale=1e-5):
    """Compare gradients relative to the largest value of each.

    Those of key biases are 0, with rounding errors.
    """
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() <= scale * np.abs(theirs).max(), jax.tree_util.keystr(path)


def test_gradients_of_single_images_add_up_to_those_of_the_batch(case):
    parameters, loss, images, noise = case
    value, gradient = jax.jit(jax.value_and_grad(loss))(parameters, images, noise)
    of_each = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))
    values, gradients = jax.jit(of_each)(parameters, images[:, None], noise[:, None])
    assert values.shape == (4,)
    assert len(set(values.tolist())) == 4
    assert float(values.mean()) == pytest.approx(float(value), rel=1e-5)
    assert_close(jax.tree.map(lambda each: each.mean(0), gradients), gradient)


def test_several_masks_of_a_batch_at_once(case):
    parameters, loss, images, _ = case
    noises = jnp.stack([counter_noise(seed, 0, jnp.arange(4), 16) for seed in range(3)])
    values = jax.jit(jax.vmap(loss, in_axes=(None, None, 0)))(parameters, images, noises)
    expected = [float(jax.jit(loss)(parameters, images, noise)) for noise in noises]
    assert len(set(expected)) == 3
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_a_forward_pass_that_is_not_kept_gives_the_same_gradients(case):
    parameters, loss, images, noise = case
    kept, remade = (jax.jit(jax.grad(f)) for f in (loss, jax.checkpoint(loss)))
    assert "optimization_barrier" in remade.lower(parameters, images, noise).as_text()
    assert_close(remade(parameters, images, noise), kept(parameters, images, noise))


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_blocks_change_nothing_but_what_is_kept(tiny, tiny_simmim, make_images, name):
    options = {**{"mae": tiny, "simmim": tiny_simmim}[name], **METHODS[name], "depth": 3}
    images, noise = jnp.asarray(make_images(4, 16, 16, 3)), counter_noise(5, 0, jnp.arange(4), 16)
    gradients, kept = [], []
    for recompute_blocks in (False, True):
        method = create_method(**options, recompute_blocks=recompute_blocks)
        graph, parameters, buffers = nnx.split(method, nnx.Param, ...)

        def loss(parameters, graph=graph, buffers=buffers):
            return nnx.merge(graph, parameters, buffers)(images, noise).loss

        gradients.append(jax.jit(jax.value_and_grad(loss))(parameters))
        backward = jax.eval_shape(lambda parameters, loss=loss: jax.vjp(loss, parameters)[1], parameters)
        kept.append(sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(backward)))
    assert float(gradients[1][0]) == pytest.approx(float(gradients[0][0]), rel=1e-6)
    assert_close(gradients[1][1], gradients[0][1])
    assert kept[1] < 0.6 * kept[0]


def value_and_gradients(function, *inputs):
    def total(*inputs):
        return jnp.sin(function(*inputs)).sum()

    return jax.jit(lambda *inputs: (function(*inputs), jax.grad(total, argnums=(0, 1))(*inputs)))(*inputs)


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
def test_reconstruction_alone(reconstruction):
    """Three groups of two images, each group with noise and features of its own."""
    schedule = Schedule(Grid((4, 5)), TokenCounts(5, 5, 10))
    graph, state = nnx.split(ProgressiveReconstruction(8, schedule.grid, reconstruction))
    noise = counter_noise(0, 0, jnp.arange(6), 20).reshape(3, 2, 20)
    features = jax.random.normal(jax.random.key(0), (3, 2, 10, 8))

    def rebuild(state, features, noise):
        return nnx.merge(graph, state)(features, make_plan(schedule, noise))

    def in_groups(state, features):
        return jax.vmap(jax.checkpoint(rebuild), in_axes=(None, 0, 0))(state, features, noise).reshape(6, 20, 8)

    def in_one(state, features):
        return rebuild(state, features.reshape(6, 10, 8), noise.reshape(6, 20))

    rebuilt, gradients = value_and_gradients(in_groups, state, features)
    expected, others = value_and_gradients(in_one, state, features)
    np.testing.assert_allclose(rebuilt, expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients, others)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients))
