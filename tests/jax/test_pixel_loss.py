"""The loss of pixels for trainers of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import Grid, Schedule, TokenCounts, counter_noise, patchify, take_tokens
from prmim_jax import MAE, PixelLoss, ProgressiveReconstruction, make_plan
from prmim_methods import MAEConfig


def make_loss(grid=(4, 4), patch_size=(4, 4), dim=8, **options):
    return PixelLoss(ProgressiveReconstruction(dim, Grid(grid)), patch_size, rngs=nnx.Rngs(0), **options)


def test_it_is_the_loss_of_mae(tiny, make_images):
    method = MAE(MAEConfig(**tiny), rngs=nnx.Rngs(0))
    loss, images = make_loss(), jnp.asarray(make_images(3, 16, 16, 3))
    loss.reconstruct_norm, loss.cell_head = method.reconstruct, method.cell_head
    features = jax.random.normal(jax.random.key(0), (3, 8, 8))

    @nnx.jit
    def both(method, loss):
        plan = make_plan(method.config.schedule, counter_noise(0, 0, jnp.arange(3), 16))
        patches = patchify(images, (4, 4))
        output = method._supervise(method.reconstruct(features, plan), patches, plan, method.decoder.pred)
        return output, loss(features, plan, method._normalize(patches), method.decoder.pred)

    output, errors = both(method, loss)
    np.testing.assert_allclose(errors.mean(), output.loss, rtol=1e-6)
    np.testing.assert_allclose(errors[:, :4].mean(), output.loss_decoded, rtol=1e-6)
    np.testing.assert_allclose(errors[:, 4:].mean(), output.loss_thrown, rtol=1e-6)


def test_a_trainer_has_gradients_of_all_parameters():
    schedule = Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))
    loss, head = make_loss(), nnx.Linear(8, 48, rngs=nnx.Rngs(1))
    places = jax.random.normal(jax.random.key(0), (1, 16, 8))  # of batch 1
    patches, noise = jax.random.normal(jax.random.key(1), (2, 16, 48)), jax.random.uniform(jax.random.key(2), (2, 16))

    @nnx.jit
    def gradients(loss):
        def mean(loss):
            plan = make_plan(schedule, noise)
            return loss(take_tokens(places, plan.known(1)), plan, patches, head).mean()

        return nnx.grad(mean)(loss)

    leaves = jax.tree.leaves(gradients(loss))
    assert len(leaves) == 5
    assert all(jnp.isfinite(leaf).all() and jnp.any(leaf != 0) for leaf in leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": 3}, "cells: expected a divisor of the patch 4 x 4, or null, got 3"),
        ({"channels": 0}, "channels: expected at least 1, got 0"),
        ({"patch_size": (4,)}, r"patch_size: expected 2 axes, got \(4,\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_loss(**options)


def test_patches_of_another_shape():
    loss, schedule = make_loss(), Schedule(Grid((4, 4)), TokenCounts(4, 4, 8))

    def errors(features, noise, patches):
        return loss(features, make_plan(schedule, noise), patches, lambda x: x)

    with pytest.raises(ValueError, match=r"^patches: expected shape \(batch, 16, 48\), got \(1, 16, 12\)"):
        jax.eval_shape(errors, jnp.zeros((1, 8, 8)), jnp.zeros((1, 16)), jnp.zeros((1, 16, 12)))
