"""MAE: equal to the reference, efficient, with clear errors."""

import os
import re
import shutil

import numpy as np
import pytest
import torch

from prmim_core import counter_noise, normalize_patches, patchify, take_tokens
from prmim_methods import MAEConfig
from prmim_reference import mae as reference
from prmim_reference.method import image_patches
from prmim_reference.targets import cell_means, cell_targets, expand_cells
from prmim_torch import MAE

RECONSTRUCTIONS = ["kernel", "interpolate", "conv", "none"]
# Geometry: image, patch, channels.
SHAPES = {
    "square": ((16, 16), (4, 4), 3),
    "rectangular": ((12, 20), (4, 2), 1),
    "multispectral": ((8, 16), (2, 4), 4),
    "signal": ((48,), (4,), 1),
    "volume": ((4, 8, 8), (2, 2, 4), 1),
    "clip": ((4, 8, 8), (2, 4, 4), 3),
    "odd": ((12, 15), (4, 3), 2),
}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}


def make_case(make_images, shape="square", batch=3, **options):
    image_size, patch_size, channels = SHAPES[shape]
    options = {**SIZES, "image_size": image_size, "patch_size": patch_size, "channels": channels, **options}
    method = MAE(MAEConfig(**options))
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():  # break the symmetries of the initial weights
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    images = torch.from_numpy(make_images(batch, *image_size, channels))
    return method, images, counter_noise(5, 0, torch.arange(batch), method.num_tokens)


def reference_output(method, images, noise, **options):
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in method.state_dict().items()}
    return reference.forward(
        weights,
        images.cpu().numpy(),
        noise.cpu().numpy(),
        patch_size=method.config.patch_size,
        num_heads=method.config.encoder_size.heads,
        decoder_heads=method.config.decoder_heads,
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


CASES = [
    *({"reconstruction": reconstruction} for reconstruction in RECONSTRUCTIONS),
    {"throw_ratio": 0.0},
    *(
        {"throwing": throwing, "reconstruction": reconstruction}
        for throwing in ("random", "cell")
        for reconstruction in RECONSTRUCTIONS
    ),
    {"furthest_from": "none", "stages": 3},
    {"mask_ratio": 0.6, "throw_ratio": 0.3, "thrown_weight": 0.25},
    {"mask_ratio": 0.5, "throw_ratio": 0.5},
    {"norm_pix": False},
    {"thrown_target": "patch"},
    {"cell_norm": "window", "cells": 1, "extra_cells": "decoded"},
    {"cell_norm": "none", "extra_cells": "known", "extra_cells_weight": 0.5},
    {"throw_ratio": 0.0, "extra_cells": "known"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
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
    output, config = method.double()(images, noise), method.config
    assert output.predicted.shape == (3, len(config.patch_places), config.patch_dim)
    assert output.predicted_cells.shape == (3, len(config.cell_places), config.cell_dim)
    assert_agrees(output, reference_output(method, images, noise, **options), 1e-10)


def test_loss_of_other_pixel_statistics(make_images):
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.7)}
    method, images, noise = make_case(make_images, **statistics)
    assert_agrees(method.double()(images, noise), reference_output(method, images, noise, **statistics), 1e-10)


def test_devices_agree(make_images, device):
    method, images, noise = make_case(make_images)
    output = method.to(device)(images.to(device), noise.to(device))
    assert_agrees(output, reference_output(method, images, noise), 1e-4)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_the_reference_ones(make_images, pool):
    method, images, _ = make_case(make_images)
    method = method.double()
    weights = {name: tensor.numpy() for name, tensor in method.state_dict().items()}
    expected = reference.encode(weights, images.numpy(), patch_size=method.config.patch_size, num_heads=2)
    np.testing.assert_allclose(method.encode(images).detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    pooled = expected[:, 0] if pool == "cls" else expected[:, 1:].mean(1)
    np.testing.assert_allclose(method.features(images, pool).detach().numpy(), pooled, rtol=1e-9, atol=1e-12)


def change_token(images, method, token):
    """Return the images with all pixels of one token of image 0 inverted."""
    config = method.config
    place = torch.zeros(1, config.grid.num_tokens, config.patch_dim, dtype=torch.uint8)
    place[0, token] = 255
    height, width = config.grid.shape
    mask = place.reshape(height, width, *config.patch_size, 3).permute(0, 2, 1, 3, 4).reshape(images[0].shape)
    return torch.cat([images[:1] ^ mask, images[1:]])


@pytest.mark.parametrize("kind", ["decoded", "thrown"])
@pytest.mark.parametrize("options", [{"thrown_target": "patch"}, {"cell_norm": "none"}], ids=str)
def test_a_masked_patch_is_seen_by_nothing_but_its_target(make_images, options, kind):
    method, images, noise = make_case(make_images, **options)
    before = method(images, noise)
    after = method(change_token(images, method, getattr(before.plan, kind)[0, 2]), noise)
    other = {"decoded": "thrown", "thrown": "decoded"}[kind]
    assert torch.equal(after.predicted, before.predicted)
    if method.config.thrown_cells:
        assert torch.equal(after.predicted_cells, before.predicted_cells)
    assert torch.equal(getattr(after, f"loss_{other}"), getattr(before, f"loss_{other}"))
    assert not torch.equal(getattr(after, f"loss_{kind}"), getattr(before, f"loss_{kind}"))


def test_a_thrown_patch_of_plain_partial_reconstruction_is_seen_by_nothing(make_images):
    method, images, noise = make_case(make_images, reconstruction="none")
    before = method(images, noise)
    after = method(change_token(images, method, before.plan.thrown[0, 2]), noise)
    assert torch.equal(after.loss, before.loss)
    assert before.loss_thrown == 0


def test_thrown_tokens_without_weight_are_not_reconstructed(make_images):
    method, images, noise = make_case(make_images, thrown_weight=0)
    assert not [name for name in method.state_dict() if name.startswith("reconstruct")]
    assert_agrees(method.double()(images, noise), reference_output(method, images, noise, reconstruction="none"), 1e-10)


def test_a_visible_patch_is_seen(make_images):
    method, images, noise = make_case(make_images)
    before = method(images, noise)
    after = method(change_token(images, method, before.plan.visible[0, 2]), noise)
    assert not torch.equal(after.predicted[0], before.predicted[0])
    assert torch.equal(after.predicted[1:], before.predicted[1:])


def test_only_visible_patches_are_embedded_and_only_supervised_ones_predicted(make_images):
    method, images, noise = make_case(make_images)
    lengths = {}

    def note(name):
        return lambda module, arguments, output: lengths.update({name: output.shape[1]})

    for name in ("encoder.patch_embed", "encoder", "decoder", "decoder.pred", "cell_head"):
        method.get_submodule(name).register_forward_hook(note(name))
    method(images, noise)
    assert lengths == {"encoder.patch_embed": 4, "encoder": 5, "decoder": 8, "decoder.pred": 4, "cell_head": 8}


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pixels_of_a_perfect_prediction_are_the_image(make_images, norm_pix):
    method, images, noise = make_case(make_images, norm_pix=norm_pix, thrown_target="patch")
    output = method(images, noise)
    patches = patchify(images, (4, 4)).float() / 255
    mean, std = (torch.tensor(values).repeat(16) for values in (method.config.pixel_mean, method.config.pixel_std))
    truth = (take_tokens(patches, output.plan.masked) - mean) / std
    output.predicted = normalize_patches(truth) if norm_pix else truth
    torch.testing.assert_close(method.rebuilt_pixels(images, output), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell_norm", ["image", "window", "none"])
@pytest.mark.parametrize("shape", ["square", "odd", "clip"])
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


def test_pixels_without_prediction_are_nan(make_images):
    method, images, noise = make_case(make_images, reconstruction="none")
    output = method(images, noise)
    is_nan = method.rebuilt_pixels(images, output).isnan()
    for image in range(3):
        assert is_nan[image].all(-1).nonzero().flatten().tolist() == sorted(output.plan.thrown[image].tolist())
        assert is_nan[image].any(-1).sum() == 8


@pytest.mark.parametrize("thrown_target", ["cells", "patch"])
def test_pixels_if_all_masked_tokens_are_thrown(make_images, thrown_target):
    method, images, noise = make_case(make_images, mask_ratio=0.5, throw_ratio=0.5, thrown_target=thrown_target)
    assert method.rebuilt_pixels(images, method(images, noise)).isfinite().all()


@pytest.mark.parametrize(
    "options", [*CASES[:5], {"mask_ratio": 0.5, "throw_ratio": 0.5}, {"extra_cells": "known"}], ids=str
)
def test_gradients_reach_every_parameter(make_images, options):
    method, images, noise = make_case(make_images, **options)
    method(images, noise).loss.backward()
    for name, parameter in method.named_parameters():
        # Without decoded tokens, neither the mask token is used nor the head of patches.
        if method.config.counts.decoded == 0 and name.startswith(("decoder.mask_token", "decoder.pred.")):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("cell_norm", ["image", "window"])
def test_bfloat16_autocast_keeps_targets_and_loss_in_float32(
    make_images, monkeypatch, cell_norm, reconstruction, device
):
    options = {"reconstruction": reconstruction, "cell_norm": cell_norm, "extra_cells": "decoded"}
    method, images, noise = make_case(make_images, **options)
    method, images, noise = method.to(device), images.to(device), noise.to(device)
    exact, targets, error = method(images, noise), [], method._error
    monkeypatch.setattr(method, "_error", lambda rough, target: targets.append(target) or error(rough, target))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rough = method(images, noise)
    assert [target.dtype for target in targets] == [torch.float32] * 2
    assert {rough.loss.dtype, rough.loss_thrown.dtype, rough.loss_cells.dtype} == {torch.float32}
    assert rough.predicted.dtype == rough.predicted_cells.dtype == torch.bfloat16
    for name in ("loss", "loss_decoded", "loss_thrown", "loss_cells"):
        assert getattr(rough, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.02), name


@pytest.mark.parametrize("options", CASES[:5], ids=str)
def test_the_whole_step_compiles_to_one_graph(make_images, options):
    method, images, noise = make_case(make_images, **options)
    # This backend generates no code, which would take half a minute per case.
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


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")  # torch's own, on import
def test_generated_code_gives_the_same_loss(make_images, device):
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    method, images, noise = make_case(make_images, depth=1)
    method, images, noise = method.to(device), images.to(device), noise.to(device)
    with torch.no_grad():  # half of the code to generate
        compiled = torch.compile(method, fullgraph=True, dynamic=False)(images, noise)
        torch.testing.assert_close(compiled.loss, method(images, noise).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_macs_are_those_of_the_formula(counted_macs, reconstruction, shape):
    image_size, patch_size, channels = SHAPES[shape]
    geometry = {"image_size": image_size, "patch_size": patch_size, "channels": channels}
    config = MAEConfig(**SIZES, **geometry, reconstruction=reconstruction, extra_cells="decoded")
    assert counted_macs(MAE(config), batch=2) == config.cost().macs


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"throw_ratio": 0.0}, 9.70e9),
        ({}, 6.95e9),
        ({"reconstruction": "conv"}, 6.95e9),
        ({"thrown_target": "patch"}, 7.00e9),
    ],
    ids=str,
)
def test_macs_of_vit_base(counted_macs, options, limit):
    config = MAEConfig(**options)
    with torch.device("meta"):
        macs = counted_macs(MAE(config))
    assert macs == config.cost().macs
    assert macs <= limit


def test_weights_are_a_function_of_the_seed_and_leave_the_global_one_alone(tiny):
    state = torch.get_rng_state()
    weights = [MAE(MAEConfig(**tiny, init_seed=seed)).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["encoder.cls_token"], weights[2]["encoder.cls_token"])


def test_names_follow_vits(tiny):
    state = MAE(MAEConfig(**tiny)).state_dict()
    assert state["encoder.patch_embed.proj.weight"].shape == (16, 3, 4, 4)
    assert state["encoder.pos_embed"].shape == (1, 17, 16)
    assert state["encoder.blocks.1.attn.qkv.weight"].shape == (48, 16)
    assert state["decoder.pred.bias"].shape == (48,)
    assert state["cell_head.weight"].shape == (12, 8)
    assert state["reconstruct.table"].shape == (4, 49)
    part = r"(patch_embed\.proj|norm|embed|pred|blocks\.\d\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))"
    stack = rf"(encoder|decoder)\.({part}\.(weight|bias)|pos_embed|cls_token|mask_token)"
    pattern = rf"{stack}|cell_head\.(weight|bias)|reconstruct\..*"
    assert not [name for name in state if not re.fullmatch(pattern, name)]
    assert {name for name, _ in MAE(MAEConfig(**tiny)).named_parameters()} == set(state) - {
        "encoder.pos_embed",
        "decoder.pos_embed",
    }


@pytest.mark.parametrize("options", [{"throw_ratio": 0}, {"thrown_weight": 0}, {"reconstruction": "none"}], ids=str)
def test_without_reconstruction_there_are_no_parameters_of_it(tiny, options):
    method = MAE(MAEConfig(**tiny, **options))
    assert not [name for name in method.state_dict() if name.startswith(("reconstruct", "cell_head"))]
    assert method.architecture()["reconstruction"] == "none"


@pytest.mark.parametrize(
    ("images", "noise", "error", "message"),
    [
        (torch.zeros(2, 16, 16, 3), None, TypeError, "images: expected torch.uint8, got torch.float32"),
        (
            torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
            None,
            ValueError,
            r"images: expected shape \(batch, 16, 16, 3\), got \(2, 3, 16, 16\)",
        ),
        (None, torch.zeros(2, 9, dtype=torch.int32), ValueError, r"noise: expected shape \(2, 16\), got \(2, 9\)"),
        (None, torch.zeros(3, 16, dtype=torch.int32), ValueError, r"noise: expected shape \(2, 16\), got \(3, 16\)"),
        (None, torch.zeros(2, 16) > 0, TypeError, "noise: expected integers or real numbers, got torch.bool"),
        (
            torch.zeros(0, 16, 16, 3, dtype=torch.uint8),
            torch.zeros(0, 16, dtype=torch.int32),
            ValueError,
            "images: expected at least one image, got an empty batch",
        ),
    ],
)
def test_wrong_inputs(tiny, images, noise, error, message):
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8) if images is None else images
    noise = torch.zeros(2, 16, dtype=torch.int32) if noise is None else noise
    with pytest.raises(error, match=f"^{message}$"):
        MAE(MAEConfig(**tiny))(images, noise)


def test_outputs_of_another_method_are_refused(tiny, make_images):
    images, noise = torch.from_numpy(make_images(2, 16, 16, 3)), counter_noise(0, 0, torch.arange(2), 16)
    output = MAE(MAEConfig(**tiny, stages=1))(images, noise)
    message = r"^output: expected one of this method, got one with the plan of Schedule\(.*stages=1"
    with pytest.raises(ValueError, match=message):
        MAE(MAEConfig(**tiny)).rebuilt_pixels(images, output)


def test_no_images_have_no_features(tiny):
    assert MAE(MAEConfig(**tiny)).features(torch.zeros(0, 16, 16, 3, dtype=torch.uint8)).shape == (0, 16)


def test_unknown_pool(tiny):
    with pytest.raises(ValueError, match=r"^pool: expected 'mean' or 'cls', got 'max'$"):
        MAE(MAEConfig(**tiny)).features(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), pool="max")
