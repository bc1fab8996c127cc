"""Equal noise and equal weights give equal numbers on both frameworks."""

import contextlib
from dataclasses import fields

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
from prmim_methods import METHODS, PixelConfig, TrainingConfig, create_config
from prmim_methods.record import options
from prmim_reference import localmim, mae, simmim, videomae
from prmim_reference.method import attention as reference_attention

REFERENCES = {
    "mae": mae.forward,
    "simmim": simmim.forward,
    "localmim": localmim.forward,
    "videomae": videomae.forward,
}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}
SQUARE = {"image_size": (16, 16), "patch_size": (4, 4), "channels": 3}
CLIP = {"image_size": (4, 8, 8), "patch_size": (2, 4, 2)}
VIDEO = {"image_size": (8, 6, 8), "patch_size": (2, 2, 4), "embed_dim": 12, "depth": 1, "num_heads": 2}
PIXIO = {"image_size": (12, 24), "patch_size": (3, 4), "channels": 2, "mask_unit": 2, "class_tokens": 3}
PIXIO |= {"position": "learned"}
BASES = {
    "mae": {**SIZES, **DECODER, **SQUARE},
    "simmim": {**SIZES, **SQUARE, "drop_path": 0.5},
    "localmim": {**SIZES, **DECODER, **SQUARE, "scales": (2, 0.5), "layers": (1, 2)},
    "videomae": {**DECODER, **VIDEO},
}
WHOLE = ("mae", "simmim", "videomae")
"""Methods of which every choice of every option is compared; LocalMIM shares most of these options."""
CROSS = {"decoder": "cross", "decoder_depth": 2}
HOW = {"model", "recompute_blocks", "scan_blocks", "token_decay"}
"""Options that change no number, or other options than themselves."""


def alternatives(item):
    """Return the values of an option other than its default.

    The other choices, or the other truth value.
    """
    if item.is_flag:
        return [not item.default]
    return [choice for choice in item.rule.choices if choice != item.default]


def own_options(name):
    """Return the options of a method, without those inherited from a base method."""
    bases = [other for other in METHODS.values() if other in METHODS[name].__mro__[1:]]
    inherited = {item.name: item.rule for base in bases for item in options(base)}
    return [item for item in options(METHODS[name]) if inherited.get(item.name) != item.rule]


CASES = {
    **{name: (name, {}) for name in BASES},
    # Every choice of every option, so that a new one is compared as soon as it is declared.
    **{
        f"{name}-{item.name}-{value}": (name, {item.name: value})
        for name in WHOLE
        for item in own_options(name)
        if item.name not in HOW
        for value in alternatives(item)
    },
    # Ratios whose counts depend on the arithmetic: 2 of 15 tokens visible instead of 3, 8 of 25 masked instead of 7.
    "mae-float": ("mae", {"image_size": (12, 20), "mask_ratio": 0.8, "rounding": "float"}),
    "simmim-float": (
        "simmim",
        {"image_size": (20, 20), "mask_unit": 1, "mask_ratio": 0.28, "throw_ratio": 0.16, "rounding": "float"},
    ),
    "mae-weight": ("mae", {"reconstruction": "interpolate", "thrown_weight": 0.25}),
    "mae-dense": ("mae", {"throw_ratio": 0.0}),
    "mae-pixio": ("mae", {**PIXIO, "drop_path": 0.5}),
    "mae-pixio-partial": ("mae", {**PIXIO, "reconstruction": "none", "mask_ratio": 0.5, "throw_ratio": 0.25}),
    "mae-pixio-cross": ("mae", {**PIXIO, "decoder": "cross"}),
    "mae-pixio-dense": ("mae", {**PIXIO, "throw_ratio": 0.0}),
    "mae-no-class-token": ("mae", {**CLIP, "class_tokens": 0, "throw_ratio": 0.0}),
    "mae-plain": ("mae", {"reconstruction": "none", "norm_pix": False}),
    "mae-clip": ("mae", {**CLIP, "throwing": "cell", "cell_norm": "window"}),
    "mae-odd-cells": ("mae", {"image_size": (12, 20), "patch_size": (3, 4), "channels": 2, "extra_cells": "known"}),
    "mae-low-pass": ("mae", {"image_size": (12, 20), "patch_size": (3, 4), "low_pass": 4.0, "thrown_target": "patch"}),
    # Four blocks, of which 0, 1, 2 and 3 are fused; the choice above fuses both of two.
    "mae-fusion": ("mae", {"image_size": (12, 20), "patch_size": (3, 4), "channels": 2, "depth": 4, "fusion": "mff"}),
    "mae-fusion-dense": ("mae", {"throw_ratio": 0.0, "fusion": "mff"}),
    "mae-one-cell": ("mae", {"cells": 1, "thrown_weight": 2.0}),
    "mae-dense-cells": (
        "mae",
        {"throw_ratio": 0.0, "extra_cells": "known", "extra_cells_weight": 0.3, "cell_norm": "window"},
    ),
    "mae-plain-cells": ("mae", {"reconstruction": "none", "extra_cells": "decoded", "extra_cells_weight": 3.0}),
    # One more block than the alternatives of the option `decoder`, and other numbers of tokens and channels.
    "mae-cross-odd": (
        "mae",
        {**CROSS, "image_size": (12, 20), "patch_size": (3, 4), "channels": 2, "reconstruction": "interpolate"},
    ),
    "mae-cross-plain": ("mae", {**CROSS, "reconstruction": "none", "throwing": "random"}),
    "mae-cross-dense-cells": ("mae", {**CROSS, "throw_ratio": 0.0, "extra_cells": "known"}),
    "simmim-units": ("simmim", {"reconstruction": "conv", "throw_by": "unit"}),
    "simmim-weight": ("simmim", {"reconstruction": "interpolate", "position": "absolute", "thrown_weight": 0.25}),
    "simmim-plain": ("simmim", {"reconstruction": "none", "mask_unit": 1, "mask_ratio": 0.75, "throw_ratio": 0.5}),
    "simmim-dense": ("simmim", {"throw_ratio": 0.0}),
    "simmim-clip": (
        "simmim",
        {**CLIP, "mask_ratio": 0.5, "throwing": "cell", "furthest_from": "none", "stages": 1, "drop_path": 0.0}
        | {"cell_norm": "window"},
    ),
    "simmim-cells": (
        "simmim",
        {"cells": 4, "thrown_weight": 0.25, "extra_cells": "decoded", "extra_cells_weight": 2.0, "throw_by": "unit"},
    ),
    "simmim-low-pass": ("simmim", {**CLIP, "mask_ratio": 0.5, "low_pass": 2.0, "drop_path": 0.0}),
    "mae-attention": ("mae", {"image_size": (12, 20), "channels": 2, "throwing": "weighted", "reconstruction": "none"}),
    "mae-attention-dense": ("mae", {"throwing": "weighted", "throw_ratio": 0.0}),
    "simmim-attention": ("simmim", {"throwing": "weighted", "throw_by": "unit", "position": "absolute"}),
    "videomae-dense": ("videomae", {"throw_ratio": 0.0, "throwing": "dual", "low_pass": 2.0}),
    "videomae-still": ("videomae", {"image_size": (12, 20), "patch_size": (3, 4), "channels": 1, "class_tokens": 1}),
    # 28 of 50 tubes are masked instead of 29.
    "videomae-float": (
        "videomae",
        {"image_size": (1, 20, 5), "patch_size": (1, 2, 1), "channels": 2, "mask_ratio": 0.58, "rounding": "float"},
    ),
    "videomae-quarter": (
        "videomae",
        {"image_size": (4, 9, 5), "patch_size": (1, 3, 5), "channels": 2, "mask_ratio": 0.67, "throwing": "dual"}
        | {"throw_ratio": 0.25, "reconstruction": "none", "cells": 1, "extra_cells": "known"},
    ),
    "simmim-dense-cells": ("simmim", {"throw_ratio": 0.0, "extra_cells": "known", "cells": 1}),
    "localmim-dense": ("localmim", {"throw_ratio": 0.0, "channels": 1, "bins": 18}),
    "localmim-scales": (
        "localmim",
        {"image_size": (12, 20), "patch_size": (4, 4), "channels": 2, "scales": (4, 1), "thrown_weight": 0.25},
    ),
    "localmim-coarse": ("localmim", {"scales": (0.5,), "layers": (2,)}),
    "localmim-plain-clip": ("localmim", {**CLIP, "target": "pixels", "reconstruction": "none"}),
}


def options_of(case):
    name, changes = CASES[case]
    return name, {**BASES[name], **changes}


def make_pair(path, config, dtype):
    """Return one method in both frameworks, with weights from one file.

    Both are in training mode.
    """
    here = prmim_torch.METHODS[config.name](config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in here.parameters():  # away from the symmetries of the first values
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    prmim_torch.save_weights(here, path)
    there = prmim_jax.METHODS[config.name](config)
    for variable in named_variables(there).values():
        variable.set_value(variable[...].astype(str(dtype).removeprefix("torch.")))
    prmim_jax.load_weights(there, path)
    return here, there


def losses_and_gradients(method, *inputs):
    graph, parameters, buffers = nnx.split(method, nnx.Param, ...)

    @jax.jit
    def run(parameters):
        def loss(parameters):
            output = nnx.merge(graph, parameters, buffers)(*inputs)
            return output.loss, output

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    (_, output), gradients = run(parameters)
    return output, named_weights(nnx.merge(graph, gradients, buffers))


def split_keys(name, array):
    """Leave out the key biases.

    The softmax ignores them, so their gradient is rounding error alone.
    """
    if name.endswith("qkv.bias"):
        return np.delete(array.reshape(3, -1), 1, axis=0)
    return array.reshape(2, -1)[1] if name.endswith(".kv.bias") else array


@pytest.mark.parametrize(
    ("case", "dtype", "rtol"),
    [(case, torch.float64, 1e-9) for case in CASES] + [(case, torch.float32, 1e-5) for case in BASES],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_loss_and_every_gradient(tmp_path, case, dtype, rtol, count_learned):
    x64 = jax.enable_x64(True) if dtype == torch.float64 else contextlib.nullcontext()
    with x64:
        name, given = options_of(case)
        config = create_config(name, **given)
        here, there = make_pair(tmp_path / "weights.safetensors", config, dtype)
        assert count_learned(here, there) == (config.parameters().learned,) * 2
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (3, *config.image_size, config.channels), dtype=np.uint8)
        noise = counter_noise(5, 0, np.arange(3), config.grid.num_tokens)

        inputs = [images, noise]
        if config.needs_weights:
            inputs.append(rng.permutation(noise.size).reshape(noise.shape) ** 2 / np.float64(noise.size))

        expected = here(*map(torch.from_numpy, inputs))
        expected.loss.backward()
        output, gradients = losses_and_gradients(there, *map(jnp.asarray, inputs))

        np.testing.assert_array_equal(output.plan.order, expected.plan.order)
        losses = [field.name for field in fields(expected) if field.name.startswith("loss")]
        for name in losses:
            assert float(getattr(output, name)) == pytest.approx(getattr(expected, name).item(), rel=rtol), name
        for name, parameter in here.named_parameters():
            if not parameter.requires_grad:
                continue
            wanted = split_keys(name, parameter.grad.numpy())
            got = split_keys(name, gradients[name])
            assert got.dtype == wanted.dtype
            assert np.abs(got - wanted).max() <= rtol * np.abs(wanted).max(), name

        specified = specify(config.name, given, tmp_path / "weights.safetensors", *inputs)
        for name in losses:
            assert float(getattr(output, name)) == pytest.approx(getattr(specified, name), rel=rtol), name
        for name, number in num_predicted(config).items():
            predicted, wanted = getattr(output, name), getattr(specified, name)
            assert (
                (predicted is None) == (getattr(expected, name) is None) == (name == "predicted_cells" and not number)
            )
            if predicted is not None:
                assert predicted.shape[1] == number
                np.testing.assert_allclose(predicted, wanted, rtol=100 * rtol, atol=100 * rtol, err_msg=name)


def num_predicted(config):
    """Return the number of tokens of each kind of predictions."""
    if isinstance(config, PixelConfig):
        return {"predicted": len(config.patch_places), "predicted_cells": len(config.cell_places)}
    return {"predicted": config.num_supervised}


def specify(name, given, path, images, noise, weights=None):
    """Return the reference's results, with sizes from the method's weights."""
    told = {"image_size", "channels", "embed_dim", "depth", "decoder_dim", "decoder_depth", "position", "class_tokens"}
    options = {key: value for key, value in given.items() if key not in told}
    if weights is not None:
        options["draw_weights"] = weights
    return REFERENCES[name](path, images, noise, **options)


@pytest.mark.parametrize("case", ["mae", "simmim", "one block"])
def test_attention_to_whole_images(tmp_path, case):
    with jax.enable_x64(True):
        name, given = options_of(case) if case in CASES else ("mae", {**BASES["mae"], "depth": 1})
        config = create_config(name, **given)
        path = tmp_path / "weights.safetensors"
        here, there = make_pair(path, config, torch.float64)
        images = np.random.default_rng(0).integers(0, 256, (2, *config.image_size, config.channels), dtype=np.uint8)
        sizes = {key: given[key] for key in ("patch_size", "num_heads")}
        expected = reference_attention(path, images, **sizes)
        assert expected.min() >= 0
        assert expected.std() > 0.1
        np.testing.assert_allclose(here.attention(torch.from_numpy(images)).detach(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(there.attention(jnp.asarray(images)), expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def digits():
    images = pytest.importorskip("sklearn.datasets").load_digits().images
    return (images * 15).astype(np.uint8)[..., None]


TRAINED = {"mae": {**DECODER, "extra_cells": "decoded"}, "simmim": {"drop_path": 0.3}, "localmim": DECODER}
COUNTED = {**TRAINED, "videomae": DECODER}


def make_engines(kind, **changes):
    sizes = {"image_size": (8, 8), "patch_size": (2, 2), "channels": 1, **SIZES, **COUNTED[kind], **changes}
    decay = "step" if kind == "simmim" else "cosine"
    training = TrainingConfig(
        seed=3,
        total_steps=50,
        warmup_steps=5,
        learning_rate=2e-3,
        clip_grad=1.0,
        decay=decay,
        precision="float32",
        device="cpu",
    )
    return [package.Engine(create_config(kind, **sizes), training) for package in (prmim_torch, prmim_jax)]


@pytest.mark.parametrize("kind", ["mae", "simmim"])
def test_fifty_steps_agree_and_weights_go_both_ways(digits, tmp_path, kind):
    here, there = make_engines(kind)
    prmim_torch.save_weights(here.method, tmp_path / "start.safetensors")
    there.load_weights(tmp_path / "start.safetensors")
    for step in range(50):
        sample = np.random.default_rng(step).integers(0, len(digits), 32)
        here.train_step(digits[sample], sample)
        there.train_step(digits[sample], sample)
        expected, got = here.read_metrics(), there.read_metrics()
        for name in (*here.method.losses, "grad_norm"):
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


def test_steps_driven_by_attention_agree(digits, tmp_path):
    here, there = make_engines("mae", depth=1, throwing="weighted", extra_cells="none")
    prmim_torch.save_weights(here.method, tmp_path / "start.safetensors")
    there.load_weights(tmp_path / "start.safetensors")
    weights = here.attention(digits[:16])
    np.testing.assert_allclose(there.attention(digits[:16]), weights, rtol=1e-4, atol=1e-5)
    assert weights.dtype == np.float32
    for engine in (here, there):
        engine.train_step(digits[:16], np.arange(16), weights)
    assert there.read_metrics()["loss"] == pytest.approx(here.read_metrics()["loss"], rel=1e-4)
    pictures = [engine.reconstruct(digits[:4], np.arange(4)) for engine in (here, there)]
    np.testing.assert_array_equal(pictures[0].order, pictures[1].order)


@pytest.mark.parametrize("reconstruction", ["kernel", "none"])
@pytest.mark.parametrize("kind", COUNTED)
def test_parameters_and_their_decay_are_the_same(kind, reconstruction, assert_same_decay):
    here, there = make_engines(kind, reconstruction=reconstruction)
    assert there.num_parameters == here.num_parameters == here.method.config.parameters().learned
    assert_same_decay(here.method, there.method)
