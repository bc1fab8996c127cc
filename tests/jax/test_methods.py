"""Methods by name."""

import jax.numpy as jnp
import pytest
from flax import nnx

import prmim_methods
from prmim_core import counter_noise
from prmim_jax import METHODS, create_method
from prmim_jax.interop import named_weights
from prmim_methods import create_config


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_a_method_is_built_from_its_record(tiny, tiny_simmim, name):
    options = {**{"mae": tiny, "simmim": tiny_simmim}[name], "throw_ratio": 0.25, "stages": 3, "mask_ratio": None}
    method = create_method(name, **options)
    assert type(method) is METHODS[name]
    assert method.config == create_config(name, **options)
    assert set(METHODS) == set(prmim_methods.METHODS)


def test_named_models():
    method = create_method("mae", model="vit_small", image_size=(32, 32), depth=1)
    assert method.encoder.blocks.norm1.weight.shape == (1, 384)
    assert method.encoder.blocks.attn.num_heads == 6


def test_unknown_names_are_refused(tiny):
    with pytest.raises(ValueError, match=r"^method: expected one of mae, "):
        create_method("mea", **tiny)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_the_other_initial_weights_do_not_depend_on_cells(tiny, tiny_simmim, name):
    sizes = {"mae": tiny, "simmim": tiny_simmim}[name]
    cells, patches = (named_weights(create_method(name, **sizes, thrown_target=t)) for t in ("cells", "patch"))
    assert set(cells) - set(patches) == {"cell_head.weight", "cell_head.bias"}
    for key, weight in patches.items():
        assert (cells[key] == weight).all(), key


def test_initial_weights_come_from_the_seed_or_from_given_rngs(tiny):
    def token(**options):
        return create_method("mae", **tiny, **options).encoder.cls_token[...]

    assert (token() == token(init_seed=0)).all()
    assert (token() != token(init_seed=1)).any()
    assert (token(init_seed=1) == token(rngs=nnx.Rngs(1))).all()


def test_weights_are_given_if_and_only_if_they_are_needed(tiny):
    images, noise = jnp.zeros((1, 16, 16, 3), jnp.uint8), counter_noise(0, 0, jnp.arange(1), 16)
    with pytest.raises(ValueError, match="weights: expected an array with throwing 'weighted' only, got none"):
        create_method("mae", **tiny, throwing="weighted")(images, noise)
    with pytest.raises(ValueError, match="weights: expected an array with throwing 'weighted' only, got an array"):
        create_method("mae", **tiny)(images, noise, jnp.ones((1, 16)))
