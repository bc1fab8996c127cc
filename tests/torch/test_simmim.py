"""SimMIM: equal to the reference, and economical."""

import re

import numpy as np
import pytest
import torch

from prmim_core import counter_noise, drop_path_scales, patchify, take_tokens
from prmim_methods import SimMIMConfig
from prmim_reference import simmim as reference
from prmim_reference.method import image_patches
from prmim_reference.targets import cell_means, cell_targets, expand_cells
from prmim_torch import SimMIM

RECONSTRUCTIONS = ["kernel", "interpolate", "conv", "none"]
# Geometry: image, patch, channels.
SHAPES = {
    "square": ((16, 16), (2, 2), 3),
    "rectangular": ((12, 16), (2, 4), 1),
    "signal": ((48,), (3,), 1),
    "volume": ((8, 8, 4), (2, 2, 1), 1),
}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}
CASES = [
    *({"reconstruction": reconstruction} for reconstruction in RECONSTRUCTIONS),
    {"throw_ratio": 0.0},
    {"position": "absolute"},
    {"position": "absolute", "throw_ratio": 0.0},
    *({"throw_by": "unit", "reconstruction": reconstruction} for reconstruction in RECONSTRUCTIONS),
    *({"throw_by": "unit", "throwing": throwing} for throwing in ("random", "cell")),
    {"throwing": "random"},
    {"furthest_from": "none", "stages": 3},
    {"mask_ratio": 0.75, "throw_ratio": 0.5, "thrown_weight": 0.25},
    {"mask_unit": 1},
    {"mask_unit": 4, "mask_ratio": 0.5},
    {"thrown_target": "patch"},
    {"cell_norm": "window", "cells": 1, "extra_cells": "decoded", "throw_by": "unit"},
    {"cell_norm": "none", "extra_cells": "known", "extra_cells_weight": 0.5},
    {"throw_ratio": 0.0, "extra_cells": "known"},
]


def make_case(make_images, shape="square", batch=3, **options):
    image_size, patch_size, channels = SHAPES[shape]
    options = {**SIZES, "image_size": image_size, "patch_size": patch_size, "channels": channels, **options}
    method = SimMIM(SimMIMConfig(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():  # break the symmetries of the initial weights
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    images = torch.from_numpy(make_images(batch, *image_size, channels))
    return method, images, counter_noise(5, 0, torch.arange(batch), method.num_tokens)


def reference_output(method, images, noise, **options):
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in method.state_dict().items()}
    options = {"drop_path": 0.0, **{name: value for name, value in options.items() if name != "position"}}
    return reference.forward(
        weights,
        images.cpu().numpy(),
        noise.cpu().numpy(),
        patch_size=method.config.patch_size,
        num_heads=method.config.encoder_size.heads,
        **options,
    )


def assert_agrees(output, expected, rtol):
    for name in ("loss", "loss_decoded", "loss_thrown", "loss_cells"):
        assert getattr(output, name).item() == pytest.approx(getattr(expected, name), rel=rtol), name
    np.testing.assert_array_equal(output.plan.order.cpu().numpy(), expected.order)
    for name in ("predicted", "predicted_cells"):
        predicted, wanted = getattr(output, name), getattr(expected, name)
        if wanted.size == 0:
            assert predicted is None or predicted.numel() == 0
        else:
            predicted = predicted.detach().cpu().numpy()
            np.testing.assert_allclose(predicted, wanted, rtol=100 * rtol, atol=100 * rtol, err_msg=name)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"])
def test_loss_is_the_reference_one(make_images, options, dtype, rtol):
    method, images, noise = make_case(make_images, **options)
    output = method.to(dtype)(images, noise)
    assert output.loss.dtype == dtype
    assert_agrees(output, reference_output(method, images, noise, **options), rtol)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_reference_one_for_any_geometry(make_images, shape, reconstruction):
    options = {"reconstruction": reconstruction, "cell_norm": "window", "extra_cells": "known"}
    method, images, noise = make_case(make_images, shape, **options)
    assert_agrees(method.double()(images, noise), reference_output(method, images, noise, **options), 1e-10)


@pytest.mark.parametrize("throw_ratio", [0.25, 0.0])
def test_drop_path_is_the_reference_one_and_of_training_only(make_images, throw_ratio):
    options = {"throw_ratio": throw_ratio}
    method, images, noise = make_case(make_images, **options, drop_path=0.5, batch=8)
    method.double()
    assert_agrees(method(images, noise), reference_output(method, images, noise, **options), 1e-10)
    trained = method.train()(images, noise)
    assert_agrees(trained, reference_output(method, images, noise, **options, drop_path=0.5), 1e-10)
    assert (drop_path_scales(2, 0.5, noise) == 0).any()
    assert torch.equal(trained.loss, method(images, noise).loss)


def test_whole_images_are_encoded_as_in_the_reference(make_images):
    method, images, _ = make_case(make_images, drop_path=0.9)
    method = method.double().train()
    weights = {name: tensor.numpy() for name, tensor in method.state_dict().items()}
    expected = reference.encode(weights, images.numpy(), patch_size=method.config.patch_size, num_heads=2)
    np.testing.assert_allclose(method.encode(images).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_devices_agree(make_images, device):
    method, images, noise = make_case(make_images)
    output = method.to(device)(images.to(device), noise.to(device))
    assert_agrees(output, reference_output(method, images, noise), 1e-4)


def test_whole_units_are_masked_and_thrown(make_images):
    method, images, noise = make_case(make_images, throw_by="unit")
    plan = method(images, noise).plan
    for tokens in (plan.visible, plan.decoded, plan.thrown):
        for image in tokens.tolist():
            units = [(token // 8 // 2, token % 8 // 2) for token in image]
            assert all(units.count(unit) == 4 for unit in units)


def test_the_encoder_never_sees_thrown_tokens(make_images):
    lengths = []
    for options in ({}, {"throw_by": "unit"}, {"throw_ratio": 0.0}):
        method, images, noise = make_case(make_images, **options)
        method.encoder.norm.register_forward_hook(lambda module, arguments, output: lengths.append(output.shape[1]))
        method(images, noise)
    assert lengths == [49, 49, 65]


def test_pixels_of_a_perfect_prediction_are_the_image(make_images):
    method, images, noise = make_case(make_images, thrown_target="patch")
    output = method(images, noise)
    patches = patchify(images, (2, 2)).float() / 255
    mean, std = (torch.tensor(values).repeat(4) for values in (method.config.pixel_mean, method.config.pixel_std))
    output.predicted = (take_tokens(patches, output.plan.masked) - mean) / std
    torch.testing.assert_close(method.rebuilt_pixels(images, output), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell_norm", ["image", "window", "none"])
@pytest.mark.parametrize("shape", ["rectangular", "volume"])
def test_pixels_of_perfect_cells_are_their_means(make_images, shape, cell_norm):
    method, images, noise = make_case(make_images, shape, cell_norm=cell_norm, extra_cells="decoded")
    output, config = method(images, noise), method.config
    places = slice(config.cell_places.start, config.cell_places.stop)
    size, cells, cuts = config.patch_size, config.cell_shape, []
    for image, (pixels, order) in enumerate(zip(images.numpy(), output.plan.order.tolist(), strict=True)):
        patches = image_patches(pixels, size, config.pixel_mean, config.pixel_std)
        wanted = cell_targets(patches, order[places], size, config.grid.shape, cells, cell_norm)
        output.predicted_cells.data[image] = torch.from_numpy(wanted)
        cuts.append(image_patches(pixels, size, [0.0] * config.channels, [1.0] * config.channels))
    drawn = method.rebuilt_pixels(images, output).numpy(force=True)
    for found, own, plan in zip(drawn, cuts, output.plan.order.tolist(), strict=True):
        visible, thrown = plan[: config.counts.visible], plan[-config.counts.thrown :]
        np.testing.assert_allclose(found[visible], own[visible], atol=1e-6)
        means = expand_cells(cell_means(own[thrown], size, cells), size, cells)
        np.testing.assert_allclose(found[thrown], means, atol=1e-5)


@pytest.mark.parametrize("options", [*CASES[:6], {"throw_by": "unit"}, {"extra_cells": "known"}], ids=str)
def test_gradients_reach_every_parameter(make_images, options):
    method, images, noise = make_case(make_images, **options)
    method(images, noise).loss.backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_bias_of_the_keys_changes_nothing(make_images):
    """The official encoder has no key biases; ours computes the same function."""
    method, images, noise = make_case(make_images)
    method.double()(images, noise).loss.backward()
    dim = method.config.encoder_size.dim
    for block in method.encoder.blocks:
        gradient = block.attn.qkv.bias.grad
        assert gradient[dim : 2 * dim].abs().max() < 1e-12 < gradient[:dim].abs().max()


@pytest.mark.parametrize(
    "options",
    [{"cell_norm": "window"}, {"throw_ratio": 0.0}, {"position": "absolute", "throw_by": "unit"}],
    ids=str,
)
def test_bfloat16_autocast_keeps_residual_stream_and_loss_in_float32(make_images, options, device):
    method, images, noise = make_case(make_images, **options)
    method, images, noise = method.to(device), images.to(device), noise.to(device)
    seen = []
    method.encoder.blocks[1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rough = method(images, noise)
    assert seen == [torch.float32]
    assert {rough.loss.dtype, rough.loss_decoded.dtype, rough.loss_thrown.dtype} == {torch.float32}
    assert rough.loss.item() == pytest.approx(method(images, noise).loss.item(), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"throw_ratio": 0.0}, {"throw_by": "unit"}, {"position": "absolute"}], ids=str)
def test_the_whole_step_compiles_to_one_graph(make_images, options):
    method, images, noise = make_case(make_images, drop_path=0.3, **options)
    method.train()
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    expected = method(images, noise)
    expected.loss.backward()
    gradients = [parameter.grad for parameter in method.parameters()]
    method.zero_grad()
    output = compiled(images, noise)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    for parameter, gradient in zip(method.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_macs_are_those_of_the_formula(counted_macs, shape, reconstruction):
    image_size, patch_size, channels = SHAPES[shape]
    geometry = {"image_size": image_size, "patch_size": patch_size, "channels": channels}
    config = SimMIMConfig(**SIZES, **geometry, reconstruction=reconstruction, extra_cells="decoded")
    assert counted_macs(SimMIM(config)) == config.cost().macs


@pytest.mark.parametrize(
    ("options", "saved"),
    [({"throw_ratio": 0.0}, 0.0), ({"throw_by": "unit"}, 0.24), ({"throw_ratio": 0.5}, 0.5)],
    ids=str,
)
def test_macs_of_vit_base(counted_macs, options, saved):
    config = SimMIMConfig(**options)
    with torch.device("meta"):
        macs = counted_macs(SimMIM(config))
    assert macs == config.cost().macs
    assert macs <= (1 - saved) * config.baseline().cost().macs


def test_weights_begin_as_in_the_recipe():
    method = SimMIM(SimMIMConfig(image_size=(32, 32), patch_size=(4, 4), embed_dim=64, depth=3, num_heads=4))
    state = method.state_dict()
    assert state["encoder.patch_embed.proj.weight"].abs().max() <= 0.02
    assert state["encoder.blocks.0.attn.qkv.weight"].std().item() == pytest.approx(
        0.0108, rel=0.03
    )  # truncated at one sigma
    for name in ("attn.proj", "mlp.fc2"):
        first, third = (state[f"encoder.blocks.{number}.{name}.weight"] for number in (0, 2))
        assert first.abs().max() <= 0.02 / 2**0.5
        assert third.abs().max() <= 0.02 / 6**0.5
        assert third.std().item() == pytest.approx(first.std().item() / 3**0.5, rel=0.05)
    assert not state["encoder.blocks.1.attn.qkv.bias"].any()
    assert (state["encoder.blocks.1.ls2.gamma"] == 0.1).all()
    assert not state["encoder.rel_pos_bias.relative_position_bias_table"].any()
    assert 0.9 / 8 < state["head.weight"].abs().max() <= 1 / 8


def test_names_follow_vits(tiny_simmim):
    state = SimMIM(SimMIMConfig(**tiny_simmim)).state_dict()
    assert state["encoder.rel_pos_bias.relative_position_bias_table"].shape == (52, 2)
    assert state["encoder.mask_token"].shape == (1, 1, 16)
    assert state["head.weight"].shape == (48, 16)
    assert state["cell_head.weight"].shape == (12, 16)
    part = r"(patch_embed\.proj|norm|blocks\.\d\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
    part += r"|cls_token|mask_token|blocks\.\d\.ls[12]\.gamma|rel_pos_bias\.relative_position_bias_table"
    assert not [
        name for name in state if not re.fullmatch(rf"encoder\.({part})|(cell_)?head\..*|reconstruct\..*", name)
    ]
    assert "encoder.pos_embed" in SimMIM(SimMIMConfig(**tiny_simmim, position="absolute")).state_dict()
