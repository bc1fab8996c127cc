"""Methods by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import prmim_methods
from prmim_core import counter_noise, random_decoded
from prmim_jax import METHODS, create_method, load_weights, save_weights
from prmim_jax.interop import named_weights
from prmim_methods import create_config


def own(grid, counts, noise, is_visible):
    return random_decoded(counts.decoded, -noise, is_visible)


class Weighted(nnx.Module):
    """A learned mean of the known features."""

    def __init__(self, dim, grid, *, rngs):
        self.score = nnx.Linear(dim, 1, rngs=rngs)

    def __call__(self, features, known, thrown):
        mean = jax.nn.softmax(self.score(features), axis=1).mT @ features
        return jnp.broadcast_to(mean, (*thrown.shape, mean.shape[-1]))


def test_functions_of_ones_own(tiny, tmp_path):
    method = create_method("mae", **tiny, throwing=own, reconstruction=Weighted)
    images, noise = jnp.zeros((2, 16, 16, 3), jnp.uint8), counter_noise(0, 0, jnp.arange(2), 16)

    @nnx.jit
    def gradient(method):
        return nnx.grad(lambda method: ((output := method(images, noise)).loss, output.plan), has_aux=True)(method)

    slopes, plan = gradient(method)
    plan.check()
    np.testing.assert_array_equal(plan.decoded, own(None, plan.schedule.counts, noise, ~plan.mask))
    assert plan.schedule.throwing is own
    assert slopes["reconstruct"]["mix"]["score"]["kernel"][...].shape == (8, 1)
    # The weights are the method's: from its seed, and in its file, which fits no other reconstruction.
    key = "reconstruct.mix.score.kernel"
    weights = named_weights(method)
    other = create_method("mae", **tiny, reconstruction=Weighted, init_seed=1)
    assert (named_weights(other)[key] != weights[key]).any()
    save_weights(method, tmp_path / "own.safetensors")
    load_weights(other, tmp_path / "own.safetensors")
    assert (named_weights(other)[key] == weights[key]).all()
    with pytest.raises(ValueError, match=r"^weights: reconstruction: expected 'kernel', got 'custom'$"):
        load_weights(create_method("mae", **tiny), tmp_path / "own.safetensors")


def test_a_factory_returns_a_mixing_module(tiny):
    with pytest.raises(TypeError, match=r"^reconstruction: expected <lambda> to return a mixing module, got NoneType$"):
        create_method("mae", **tiny, reconstruction=lambda dim, grid, rngs: None)


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
    with pytest.raises(ValueError, match=r"^weights: expected an array with throwing 'weighted', got None$"):
        create_method("mae", **tiny, throwing="weighted")(images, noise)
    with pytest.raises(ValueError, match=r"^weights: expected None without throwing 'weighted', got an array$"):
        create_method("mae", **tiny)(images, noise, jnp.ones((1, 16)))
