"""Images of 16 bits and floats: equal results on the device as for 8 bits."""

from contextlib import closing

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import prmim_jax
import prmim_torch
from prmim_core import counter_noise
from prmim_methods import TrainingConfig, create_config

OPTIONS = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 24, "depth": 1, "num_heads": 2}
OPTIONS |= {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}
METHODS = {"mae": {}, "localmim": {"scales": (1,), "layers": (1,), "target": "pixels"}}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
DEEP = {"uint8": (IMAGES, (0, 255)), "float32": (2 * IMAGES.astype(np.float32) - 9, (-9, 501))}
DEEP |= {"uint16": (IMAGES.astype(np.uint16) * 257, (0, 65535))}
TOLERANCE = {"uint8": 0, "float32": 1e-6, "uint16": 1e-6}
PACKAGES = {"torch": prmim_torch, "jax": prmim_jax}


@pytest.mark.parametrize(("backend", "name"), [("torch", "mae"), ("torch", "localmim"), ("jax", "mae")])
def test_losses_do_not_depend_on_the_depth(backend, name):
    array = torch.from_numpy if backend == "torch" else jnp.asarray
    noise = array(counter_noise(0, 0, np.arange(2), 16))

    def loss(images, pixel_range):
        config = create_config(name, **OPTIONS, **METHODS[name], pixel_range=pixel_range)
        with torch.no_grad():
            return float(PACKAGES[backend].METHODS[name](config)(array(images), noise).loss)

    expected = loss(IMAGES, None)
    for dtype, (images, pixel_range) in DEEP.items():
        assert loss(images, pixel_range) == pytest.approx(expected, rel=TOLERANCE[dtype], abs=0), dtype
    clipped = np.where(IMAGES > 200, 250, IMAGES).astype(np.uint8)
    assert loss(clipped, (0, 200)) == pytest.approx(loss(clipped.clip(0, 200), (0, 200)), rel=1e-6)


@pytest.mark.parametrize("backend", PACKAGES)
def test_engines_take_images_as_they_are(backend):
    found = {}
    for dtype, (images, pixel_range) in {"none": (IMAGES, None), "uint16": DEEP["uint16"]}.items():
        config = create_config("mae", **OPTIONS, pixel_range=pixel_range)
        training = TrainingConfig(device="cpu", precision="float32", compile=False)
        with closing(PACKAGES[backend].Engine(config, training)) as engine:
            found[dtype] = engine.features(images)
            with pytest.raises(TypeError, match=r"images: expected .*uint8.*, got .*float64"):
                engine.features(images.astype(np.float64))
    np.testing.assert_allclose(found["uint16"], found["none"], atol=1e-5)
    assert create_config("mae", pixel_range=(0, 9)).architecture()["pixel_range"] == [0, 9]
    assert "pixel_range" not in create_config("mae").architecture()
