"""Fusion of encoder layers.

tests/parity compares its numbers with JAX and the reference.
"""

import numpy as np
import pytest
import torch

from prmim_methods import TrainingConfig, create_config
from prmim_torch import Engine, create_method


def test_a_training_logs_the_weights_of_the_blocks(tiny, make_images):
    config = create_config("mae", **tiny, fusion="mff")
    engine = Engine(config, TrainingConfig(total_steps=4, warmup_steps=0, learning_rate=0.1, device="cpu"))
    images, sample = make_images(4, *config.image_size, config.channels), np.arange(4)
    names = config.losses[3:]
    shares = []
    for _ in range(2):
        shares.append(engine.method.fusion.layer_weights.detach().softmax(0).tolist())
        engine.train_step(images, sample)
    measured = engine.read_metrics()
    assert [measured[name] for name in names] == pytest.approx(np.mean(shares, axis=0), rel=1e-6)
    assert shares[0] == pytest.approx([1 / len(names)] * len(names))
    assert shares[1] != pytest.approx(shares[0], rel=1e-3)


def test_downstream_uses_the_plain_encoder(tiny, make_images):
    fused, plain = (create_method("mae", **tiny, fusion=fusion) for fusion in ("mff", "none"))
    images = torch.from_numpy(make_images(2, 16, 16, 3))
    torch.testing.assert_close(fused.features(images), plain.features(images), rtol=0, atol=0)
    own = fused.state_dict().keys() - plain.state_dict().keys()
    assert own == {name for name in fused.state_dict() if name.startswith("fusion.")}


def test_under_autocast_the_mean_has_the_precision_of_the_residual_stream(tiny):
    fusion = create_method("mae", **tiny, fusion="mff").fusion
    states = [torch.randn(2, 3, tiny["embed_dim"]) for _ in range(tiny["depth"] + 1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fusion(states)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, fusion(states), rtol=0.05, atol=0.05)
