"""MaskAlign in both frameworks: equal numbers for equal inputs.

Noise, weights and outputs of the teacher are equal.
"""

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
from prmim_jax.interop import named_variables, named_weights
from prmim_methods import MaskAlignConfig, TrainingConfig
from tests import teachers

pytest.importorskip("transformers")

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 24, "depth": 3, "num_heads": 2, "teacher_layers": 2}
LOSSES = ("loss", "loss_visible", "loss_thrown")
CASES = {
    "kernel": {"drop_path": 0.3},
    "conv": {"reconstruction": "conv", "thrown_weight": 0.25},
    "interpolate": {"reconstruction": "interpolate", "masking": "random", "stages": 3},
    "plain": {"reconstruction": "none", "drop_path": 0.0},
    "sum": {"fusion": "sum", "depth": 2, "teacher_layers": 3},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return teachers.write_teacher(tmp_path_factory.mktemp("teacher"))


def make_pair(path, teacher, options, dtype):
    """Return one method in both frameworks, with weights from one file.

    Both are in training mode.
    """
    config = MaskAlignConfig(teacher=teacher, **{**SIZES, **options})
    here = prmim_torch.MaskAlign(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in here.parameters():  # away from the symmetries of the first values
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    prmim_torch.save_weights(here, path)
    there = prmim_jax.MaskAlign(config)
    for variable in named_variables(there).values():
        variable.set_value(variable[...].astype(str(dtype).removeprefix("torch.")))
    prmim_jax.load_weights(there, path)
    return here, there


class SameHere(torch.nn.Module):
    """A teacher that always says the same."""

    def __init__(self, hidden, attention):
        super().__init__()
        self.output = prmim_torch.TeacherOutput(torch.from_numpy(hidden), torch.from_numpy(attention))

    def forward(self, images):
        return self.output


class SameThere(nnx.Module):
    """The same in JAX."""

    def __init__(self, hidden, attention):
        self.hidden, self.attention = (nnx.Variable(jnp.asarray(array)) for array in (hidden, attention))

    def __call__(self, images):
        return prmim_jax.TeacherOutput(self.hidden[...], self.attention[...])


def losses_and_gradients(method, images, noise):
    graph, parameters, others = nnx.split(method, nnx.Param, ...)

    @jax.jit
    def run(parameters):
        def loss(parameters):
            output = nnx.merge(graph, parameters, others)(images, noise)
            return output.loss, output

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    (_, output), gradients = run(parameters)
    return output, named_weights(nnx.merge(graph, gradients, others))


def without_keys(name, array):
    """Leave out the key biases.

    The softmax ignores them, so their gradient is rounding error alone.
    """
    return np.delete(array.reshape(3, -1), 1, axis=0) if name.endswith("qkv.bias") else array


@pytest.mark.parametrize(
    ("case", "dtype", "rtol"),
    [(case, torch.float64, 1e-9) for case in CASES] + [("kernel", torch.float32, 1e-5)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_loss_and_every_gradient(tmp_path, teacher, case, dtype, rtol, count_learned):
    with jax.enable_x64(True) if dtype == torch.float64 else contextlib.nullcontext():
        here, there = make_pair(tmp_path / "weights.safetensors", teacher, CASES[case], dtype)
        assert count_learned(here, there) == (here.config.parameters().learned,) * 2
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        noise = counter_noise(5, 0, np.arange(3), 16)
        says = here.teacher(torch.from_numpy(images))
        says = says.hidden.numpy(), says.attention.numpy()
        here.teacher, there.teacher = SameHere(*says), SameThere(*says)

        expected = here(torch.from_numpy(images), torch.from_numpy(noise))
        expected.loss.backward()
        output, gradients = losses_and_gradients(there, jnp.asarray(images), jnp.asarray(noise))

        np.testing.assert_array_equal(output.plan.order, expected.plan.order)
        for name in LOSSES:
            assert float(getattr(output, name)) == pytest.approx(getattr(expected, name).item(), rel=rtol), name
        for name, parameter in here.named_parameters():
            if not parameter.requires_grad:
                assert not isinstance(named_variables(there)[name], nnx.Param)
                continue
            wanted = without_keys(name, parameter.grad.numpy())
            got = without_keys(name, gradients[name])
            assert got.dtype == wanted.dtype
            assert np.abs(got - wanted).max() <= rtol * np.abs(wanted).max(), name


def test_their_own_teachers_make_them_see_the_same_tokens(tmp_path, teacher):
    """Attention differs in its last digits, so near-ties may differ; here are none."""
    here, there = make_pair(tmp_path / "weights.safetensors", teacher, {}, torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    noise = counter_noise(5, 0, np.arange(16), 16)
    expected = here(torch.from_numpy(images), torch.from_numpy(noise))
    output = jax.jit(lambda method, *inputs: method(*inputs))(there, jnp.asarray(images), jnp.asarray(noise))
    np.testing.assert_array_equal(output.plan.order, expected.plan.order)
    np.testing.assert_allclose(output.predicted, expected.predicted.detach(), rtol=1e-4, atol=1e-4)
    for name in LOSSES:
        assert float(getattr(output, name)) == pytest.approx(getattr(expected, name).item(), rel=1e-5), name


def test_training_goes_the_same_way(tmp_path, teacher):
    engines = []
    for package in (prmim_torch, prmim_jax):
        training = TrainingConfig(
            seed=3, total_steps=20, warmup_steps=2, learning_rate=2e-3, precision="float32", device="cpu"
        )
        engines.append(package.Engine(MaskAlignConfig(teacher=teacher, **SIZES), training))
    here, there = engines
    prmim_torch.save_weights(here.method, tmp_path / "start.safetensors")
    there.load_weights(tmp_path / "start.safetensors")
    assert there.num_parameters == here.num_parameters == here.method.config.parameters().learned
    rng = np.random.default_rng(0)
    for step in range(10):
        images, sample = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), np.arange(8) + 8 * step
        here.train_step(images, sample)
        there.train_step(images, sample)
        expected, got = here.read_metrics(), there.read_metrics()
        for name in LOSSES:
            assert got[name] == pytest.approx(expected[name], rel=1e-3), (step, name)
    pictures, expected = there.compare(images, sample), here.compare(images, sample)
    np.testing.assert_array_equal(pictures.order, expected.order)
    np.testing.assert_allclose(pictures.student, expected.student, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(pictures.teacher, expected.teacher, rtol=1e-4, atol=1e-4)
