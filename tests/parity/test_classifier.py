"""Classifiers with equal weights say and learn the same on both frameworks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import prmim_jax
import prmim_torch
from prmim_core import counter_noise
from prmim_jax.interop import file_names, named_variables, named_weights
from prmim_jax.trainer import _rate_scales, decay_mask
from prmim_methods import ClassifierConfig, MAEConfig, MaskAlignConfig, SimMIMConfig, TrainingConfig
from prmim_torch.classifier import _with_rates
from prmim_torch.trainer import parameter_groups

CLASSES = 7
OUTSIDE = {  # name: factor of the learning rate, weight decay
    "encoder.patch_embed.proj.weight": (0.125, 0.05),
    "encoder.patch_embed.proj.bias": (0.125, 0.0),
    "encoder.cls_token": (0.125, 0.0),
    "fc_norm.weight": (1.0, 0.0),
    "fc_norm.bias": (1.0, 0.0),
    "head.weight": (1.0, 0.05),
    "head.bias": (1.0, 0.0),
}
IN_BLOCKS = {  # name: weight decay
    "norm1.weight": 0.0,
    "norm1.bias": 0.0,
    "attn.qkv.weight": 0.05,
    "attn.qkv.bias": 0.0,
    "attn.proj.weight": 0.05,
    "attn.proj.bias": 0.0,
    "norm2.weight": 0.0,
    "norm2.bias": 0.0,
    "mlp.fc1.weight": 0.05,
    "mlp.fc1.bias": 0.0,
    "mlp.fc2.weight": 0.05,
    "mlp.fc2.bias": 0.0,
}
ABSOLUTE = {"encoder.pos_embed": (0.125, 0.0)}, {}
RELATIVE = {}, {"attn.relative_position_bias_table": 0.05, "ls1.gamma": 0.0, "ls2.gamma": 0.0}
"""What one kind of encoder has more: outside the blocks, and in each of them."""
SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 24, "depth": 2, "num_heads": 2}
METHODS = {
    "mae": MAEConfig(**SIZES, decoder_dim=12, decoder_depth=1, decoder_heads=3),
    "simmim": SimMIMConfig(**SIZES),
}
FINETUNE = {"drop_path": 0.4, "layer_decay": 0.65, "ema_decay": 0.9}
TUNED = {"learning_rate": 3e-3, "clip_grad": 1.0}
PROBE = {"protocol": "linear", "trust": 0.02, "momentum": 0.9}
ALIGNED = MaskAlignConfig(**SIZES, teacher="owner/model")
CASES = {  # method, options of the classifier, options of the training
    "mae-mean": ("mae", FINETUNE, TUNED),
    "mae-cls": ("mae", {**FINETUNE, "pool": "cls"}, {**TUNED, "accumulate": 2}),
    "simmim-mean": ("simmim", FINETUNE, TUNED),
    "mae-probe": ("mae", {**PROBE, "pool": "cls"}, {"learning_rate": 1.0, "weight_decay": 0.0}),
    "simmim-probe": ("simmim", PROBE, {"learning_rate": 1.0, "accumulate": 2, "weight_decay": 0.1}),
}


def make_engines(case):
    name, options, more = CASES[case]
    training = TrainingConfig(
        seed=3, total_steps=12, warmup_steps=3, precision="float32", device="cpu", betas=(0.9, 0.999), **more
    )
    config = ClassifierConfig(**options)
    return [package.ClassifierEngine(METHODS[name], config, CLASSES, training) for package in (prmim_torch, prmim_jax)]


def equal_weights(here, there, path):
    """Give both the same perturbed weights.

    The initial weights give the encoder hardly any gradient.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in here.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    prmim_torch.save_weights(here.module, path)
    for engine in (here, there):
        engine.load_weights(path)


def draw(step, batch=16):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)
    return images, rng.integers(0, 1000, batch), rng.dirichlet(np.ones(CLASSES), batch).astype(np.float32)


def learned(here, there):
    """Return the weights of both by name, without key biases.

    Key biases have no gradient but rounding errors.
    """
    ours = {name: tensor.numpy() for name, tensor in here.module.state_dict().items()}
    theirs = named_weights(there.module)
    assert set(ours) == set(theirs)
    for name in ours:
        pair = (ours[name], theirs[name])
        yield name, *(np.delete(a.reshape(3, -1), 1, axis=0) if name.endswith("qkv.bias") else a for a in pair)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient(tmp_path, case):
    here, there = make_engines(case)
    equal_weights(here, there, tmp_path / "weights.safetensors")
    images, sample, targets = draw(0)
    noise = counter_noise(3, 0, sample, 16)
    logits = here.module(torch.from_numpy(images), torch.from_numpy(noise))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets)).backward()

    graph, parameters, rest = nnx.split(there.module, nnx.Param, ...)

    @jax.jit
    def run(parameters):
        def loss(parameters):
            logits = nnx.merge(graph, parameters, rest, copy=True)(jnp.asarray(images), jnp.asarray(noise))
            return -(targets * jax.nn.log_softmax(logits)).sum(1).mean(), logits

        return jax.grad(loss, has_aux=True)(parameters)

    gradients, got = run(parameters)
    np.testing.assert_allclose(got, logits.detach(), rtol=1e-5, atol=1e-5)
    gradients = named_weights(nnx.merge(graph, gradients, rest))
    for name, parameter in here.module.named_parameters():
        if parameter.requires_grad and not name.endswith("qkv.bias"):
            wanted = parameter.grad.numpy()
            assert np.abs(gradients[name] - wanted).max() <= 1e-4 * np.abs(wanted).max(), name


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_agree_and_weights_go_both_ways(tmp_path, case):
    here, there = make_engines(case)
    equal_weights(here, there, tmp_path / "weights.safetensors")
    for step in range(10):
        for engine in (here, there):
            engine.train_step(*draw(step))
        expected, got = here.read_metrics(), there.read_metrics()
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5 if step == 0 else 1e-4)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        for name in ("accuracy", "learning_rate", "nonfinite_step", "skipped"):
            assert got[name] == pytest.approx(expected[name]), name
    for name, ours, theirs in learned(here, there):
        assert np.abs(ours - theirs).max() <= 1e-4 * max(np.abs(ours).max(), 0.1), name
    images = draw(99)[0]
    np.testing.assert_allclose(there.predict(images), here.predict(images), rtol=1e-3, atol=1e-4)
    for folder, giver, taker in zip("ab", (here, there), make_engines(case)[::-1], strict=True):
        (tmp_path / folder).mkdir()
        giver.save(tmp_path / folder)
        taker.load_weights(tmp_path / folder / "weights.safetensors")
        pair = (giver, taker) if giver is here else (taker, giver)
        for name, ours, theirs in learned(*pair):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_architecture_and_counts_are_the_same(case, assert_same_decay):
    here, there = make_engines(case)
    assert there.num_parameters == here.num_parameters
    assert there.module.architecture() == here.module.architecture()
    assert_same_decay(here.module, there.module)


@pytest.mark.parametrize(
    ("method", "more"), [(METHODS["mae"], ABSOLUTE), (ALIGNED, ABSOLUTE), (METHODS["simmim"], RELATIVE)]
)
def test_parameter_groups_of_fine_tuning_are_the_published_ones(method, more):
    outside, in_blocks = more
    expected = {**OUTSIDE, **outside}
    for block, scale in enumerate((0.25, 0.5)):
        expected |= {
            f"encoder.blocks.{block}.{name}": (scale, decay) for name, decay in (IN_BLOCKS | in_blocks).items()
        }
    config = ClassifierConfig(layer_decay=0.5)

    here = prmim_torch.Classifier(method, config, CLASSES)
    names = {parameter: name for name, parameter in here.named_parameters()}
    groups = _with_rates(here, parameter_groups(here, 0.05))
    assert {
        names[parameter]: (group["rate_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    } == expected

    there = prmim_jax.Classifier(method, config, CLASSES)
    arrays = {name: variable[...] for name, variable in named_variables(there).items()}
    mask, scales = decay_mask(there), _rate_scales(partial(config.rate_scale, depth=2), arrays)
    assert {
        part: (float(scale), 0.05 * mask[name])
        for name, array in arrays.items()
        for part, scale in zip(file_names(name, array.shape), np.ravel(scales[name]), strict=True)
    } == expected
