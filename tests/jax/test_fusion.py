"""Fusion of encoder layers.

tests/parity compares its numbers with PyTorch and the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_jax import Engine
from prmim_jax.fusion import Fusion
from prmim_methods import TrainingConfig, create_config


def test_a_training_logs_the_weights_of_the_blocks(tiny, make_images):
    config = create_config("mae", **{**tiny, "depth": 2}, fusion="mff")
    engine = Engine(config, TrainingConfig(total_steps=4, warmup_steps=0, learning_rate=0.1, device="cpu"))
    images, sample = make_images(4, *config.image_size, config.channels), np.arange(4)
    measured = []
    for _ in range(2):
        engine.train_step(images, sample)
        metrics = engine.read_metrics()
        measured.append([metrics[name] for name in config.losses[3:]])
    assert measured[0] == pytest.approx([0.5, 0.5])
    assert measured[1] != pytest.approx(measured[0], rel=1e-3)
    assert sum(measured[1]) == pytest.approx(1)


def test_in_bfloat16_the_mean_has_the_precision_of_the_residual_stream():
    fusions = [Fusion(8, (0, 1), dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.bfloat16, None)]
    states = jax.random.normal(jax.random.key(0), (3, 2, 3, 8))
    rounded, exact = (fusion(states) for fusion in fusions)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, rtol=0.05, atol=0.05)
    assert not np.array_equal(rounded, exact)
