"""Equal noise and equal weights give equal numbers on both frameworks."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import prmim_jax
import prmim_torch
from prmim_core import counter_noise
from prmim_jax.interop import named_variables
from prmim_jax.trainer import decay_mask
from prmim_reference import mae, simmim
from prmim_torch.trainer import parameter_groups

REFERENCES = {"mae": mae.forward, "simmim": simmim.forward}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}
SQUARE = {"image_size": (16, 16), "patch_size": (4, 4), "channels": 3}
CLIP = {"image_size": (4, 8, 8), "patch_size": (2, 4, 2)}
MAE = {"name": "mae", **SIZES, **DECODER, **SQUARE}
SIMMIM = {"name": "simmim", **SIZES, **SQUARE}
CASES = {
    "mae": MAE,
    "mae-conv": {**MAE, "variant": "conv"},
    "mae-interpolate": {**MAE, "variant": "interpolate", "thrown_weight": 0.25},
    "mae-none": {**MAE, "variant": "none", "norm_pix": False},
    "mae-dense": {**MAE, "throwing": "none"},
    "mae-clip": {**MAE, **CLIP, "throwing": "cell"},
    "simmim": {**SIMMIM, "drop_path": 0.5},
    "simmim-conv": {**SIMMIM, "variant": "conv", "throw_by": "unit"},
    "simmim-interpolate": {**SIMMIM, "variant": "interpolate", "position": "absolute", "thrown_weight": 0.25},
    "simmim-none": {**SIMMIM, "variant": "none", "mask_unit": 1, "mask_ratio": 0.75, "throw_ratio": 0.5},
    "simmim-dense": {**SIMMIM, "throwing": "none", "drop_path": 0.5},
    "simmim-clip": {**SIMMIM, **CLIP, "mask_ratio": 0.5, "throwing": "cell", "seed": "none", "stages": 1},
}


def make_pair(path, options, dtype):
    """Return one method on both frameworks, in training mode, with weights from one file."""
    here = prmim_torch.create_method(**options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in here.parameters():  # away from the symmetries of the first values
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    prmim_torch.save_weights(here, path)
    there = prmim_jax.create_method(**options)
    for variable in named_variables(there).values():
        variable.set_value(variable[...].astype(str(dtype).removeprefix("torch.")))
    prmim_jax.load_weights(there, path)
    return here, there


def losses_and_gradients(method, images, noise):
    graph, parameters, buffers = nnx.split(method, nnx.Param, ...)

    @jax.jit
    def run(parameters):
        def loss(parameters):
            output = nnx.merge(graph, parameters, buffers)(images, noise)
            return output.loss, output

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    (_, output), gradients = run(parameters)
    return output, named_variables(nnx.merge(graph, gradients, buffers))


def split_keys(name, array):
    """Leave out the bias of keys: a softmax does not notice it, so its gradient is rounding error alone."""
    return np.delete(array.reshape(3, -1), 1, axis=0) if name.endswith("qkv.bias") else array


@pytest.mark.parametrize(
    ("case", "dtype", "rtol"),
    [(case, torch.float64, 1e-9) for case in CASES] + [(case, torch.float32, 1e-5) for case in ("mae", "simmim")],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_loss_and_every_gradient(tmp_path, case, dtype, rtol):
    x64 = jax.enable_x64(True) if dtype == torch.float64 else contextlib.nullcontext()
    with x64:
        options = CASES[case]
        here, there = make_pair(tmp_path / "weights.safetensors", options, dtype)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (3, *here.image_size, here.channels), dtype=np.uint8)
        noise = counter_noise(5, 0, np.arange(3), here.grid.num_tokens)

        expected = here(torch.from_numpy(images), torch.from_numpy(noise))
        expected.loss.backward()
        output, gradients = losses_and_gradients(there, jnp.asarray(images), jnp.asarray(noise))

        np.testing.assert_array_equal(output.plan.order, expected.plan.order)
        for name in ("loss", "loss_decoded", "loss_thrown"):
            assert float(getattr(output, name)) == pytest.approx(getattr(expected, name).item(), rel=rtol), name
        for name, parameter in here.named_parameters():
            wanted = split_keys(name, parameter.grad.numpy())
            got = split_keys(name, np.asarray(gradients[name][...]))
            assert got.dtype == wanted.dtype
            assert np.abs(got - wanted).max() <= rtol * np.abs(wanted).max(), name

        specified = specify(options, tmp_path / "weights.safetensors", images, noise)
        assert float(output.loss) == pytest.approx(specified.loss, rel=rtol)


def specify(options, *inputs):
    """Return what the reference says; it takes sizes from the weights."""
    told = {"name", "image_size", "channels", "embed_dim", "depth", "decoder_dim", "decoder_depth", "position"}
    of_recipe = {"drop_path": 0.1} if options["name"] == "simmim" else {}
    kept = {key: value for key, value in options.items() if key not in told}
    return REFERENCES[options["name"]](*inputs, **{**of_recipe, **kept})


@pytest.fixture(scope="module")
def digits():
    images = pytest.importorskip("sklearn.datasets").load_digits().images
    return (images * 15).astype(np.uint8)[..., None]


TRAINED = {
    "mae": {"name": "mae", **DECODER},
    "simmim": {"name": "simmim", "drop_path": 0.3},
}


def make_engines(kind, **changes):
    options = {"image_size": (8, 8), "patch_size": (2, 2), "channels": 1, **SIZES, **TRAINED[kind], **changes}
    training = {"seed": 3, "total_steps": 50, "warmup_steps": 5, "learning_rate": 2e-3, "clip_grad": 1.0}
    training["decay"] = "step" if kind == "simmim" else "cosine"
    return [package.Engine(options, **training, device="cpu") for package in (prmim_torch, prmim_jax)]


@pytest.mark.parametrize("kind", TRAINED)
def test_fifty_steps_agree_and_weights_go_both_ways(digits, tmp_path, kind):
    here, there = make_engines(kind)
    prmim_torch.save_weights(here.method, tmp_path / "start.safetensors")
    there.load_weights(tmp_path / "start.safetensors")
    for step in range(50):
        sample = np.random.default_rng(step).integers(0, len(digits), 32)
        here.train_step(digits[sample], sample)
        there.train_step(digits[sample], sample)
        expected, got = here.read_metrics(), there.read_metrics()
        for name in ("loss", "loss_decoded", "loss_thrown", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-3 if "loss" in name else 1e-2), (step, name)
        assert got["learning_rate"] == expected["learning_rate"]

    for folder, giver, taker in zip("ab", (here, there), make_engines(kind)[::-1], strict=True):
        (tmp_path / folder).mkdir()
        giver.save(tmp_path / folder)
        taker.load_weights(tmp_path / folder / "weights.safetensors")
        images, sample = digits[:16], np.arange(16)
        np.testing.assert_allclose(taker.features(images), giver.features(images), rtol=1e-4, atol=1e-5)
        pictures, expected = taker.reconstruct(images, sample), giver.reconstruct(images, sample)
        np.testing.assert_array_equal(pictures.order, expected.order)
        assert pictures.order.dtype == expected.order.dtype
        np.testing.assert_allclose(pictures.patches, expected.patches, rtol=1e-4, atol=1e-5)
        taker.train_step(images, sample)
        assert taker.read_metrics()["nonfinite_step"] is None


@pytest.mark.parametrize("kind", TRAINED)
def test_costs_and_counts_are_the_same(kind):
    for variant in ("kernel", "none"):
        here, there = make_engines(kind, variant=variant)
        assert there.cost() == here.cost()
        assert there.num_parameters == here.num_parameters
        assert there.predicts == here.predicts
        assert there.method.architecture() == here.method.architecture()
        assert there.method.not_decayed() == here.method.not_decayed()
        decayed = {id(parameter) for parameter in parameter_groups(here.method, 0.05)[0]["params"]}
        assert decay_mask(there.method) == {
            name: id(parameter) in decayed for name, parameter in here.method.named_parameters()
        }
