"""SimMIM: equal to the reference, economical, and clear about wrong options."""

import re

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prmim_core import counter_noise, drop_path_scales, patchify, take_tokens
from prmim_reference import simmim as reference
from prmim_torch import SimMIM

VARIANTS = ["kernel", "interpolate", "conv", "none"]
# Geometry: image, patch, channels.
SHAPES = {
    "square": ((16, 16), (2, 2), 3),
    "rectangular": ((12, 16), (2, 4), 1),
    "signal": ((48,), (3,), 1),
    "volume": ((8, 8, 4), (2, 2, 1), 1),
}
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}
CASES = [
    *({"variant": variant} for variant in VARIANTS),
    {"throwing": "none"},
    {"position": "absolute"},
    {"position": "absolute", "throwing": "none"},
    *({"throw_by": "unit", "variant": variant} for variant in VARIANTS),
    *({"throw_by": "unit", "throwing": throwing} for throwing in ("random", "cell")),
    {"throwing": "random"},
    {"seed": "none", "stages": 3},
    {"mask_ratio": 0.75, "throw_ratio": 0.5, "thrown_weight": 0.25},
    {"mask_unit": 1},
    {"mask_unit": 4, "mask_ratio": 0.5},
]


def make_case(make_images, shape="square", batch=3, **options):
    image_size, patch_size, channels = SHAPES[shape]
    options = {**SIZES, "image_size": image_size, "patch_size": patch_size, "channels": channels, **options}
    method = SimMIM(**options).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():  # away from the symmetries of the first values
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    images = torch.from_numpy(make_images(batch, *image_size, channels))
    return method, images, counter_noise(5, 0, torch.arange(batch), method.grid.num_tokens)


def reference_output(method, images, noise, **options):
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in method.state_dict().items()}
    if options.get("throwing") == "none":
        options["throw_ratio"] = 0.0
    options = {"drop_path": 0.0, **{name: value for name, value in options.items() if name != "position"}}
    return reference.forward(
        weights,
        images.cpu().numpy(),
        noise.cpu().numpy(),
        patch_size=method.patch_size,
        num_heads=method.num_heads,
        **options,
    )


def assert_agrees(output, expected, rtol):
    for name in ("loss", "loss_decoded", "loss_thrown"):
        assert getattr(output, name).item() == pytest.approx(getattr(expected, name), rel=rtol), name
    np.testing.assert_array_equal(output.plan.order.cpu().numpy(), expected.order)
    np.testing.assert_allclose(
        output.predicted.detach().cpu().numpy(), expected.predicted, rtol=100 * rtol, atol=100 * rtol
    )


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"])
def test_loss_is_the_reference_one(make_images, options, dtype, rtol):
    method, images, noise = make_case(make_images, **options)
    output = method.to(dtype)(images, noise)
    assert output.loss.dtype == dtype
    assert_agrees(output, reference_output(method, images, noise, **options), rtol)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_reference_one_for_any_geometry(make_images, shape, variant):
    method, images, noise = make_case(make_images, shape, variant=variant)
    assert_agrees(method.double()(images, noise), reference_output(method, images, noise, variant=variant), 1e-10)


@pytest.mark.parametrize("throwing", ["furthest", "none"])
def test_drop_path_is_the_reference_one_and_of_training_only(make_images, throwing):
    method, images, noise = make_case(make_images, throwing=throwing, drop_path=0.5, batch=8)
    method.double()
    options = {"throwing": throwing}
    assert_agrees(method(images, noise), reference_output(method, images, noise, **options), 1e-10)
    trained = method.train()(images, noise)
    assert_agrees(trained, reference_output(method, images, noise, **options, drop_path=0.5), 1e-10)
    assert (drop_path_scales(noise, 2, 0.5) == 0).any()
    assert torch.equal(trained.loss, method(images, noise).loss)


def test_whole_images_are_encoded_as_in_the_reference(make_images):
    method, images, _ = make_case(make_images, drop_path=0.9)
    method = method.double().train()
    weights = {name: tensor.numpy() for name, tensor in method.state_dict().items()}
    expected = reference.encode(weights, images.numpy(), patch_size=method.patch_size, num_heads=method.num_heads)
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
    for options in ({}, {"throw_by": "unit"}, {"throwing": "none"}):
        method, images, noise = make_case(make_images, **options)
        method.encoder.norm.register_forward_hook(lambda module, arguments, output: lengths.append(output.shape[1]))
        method(images, noise)
    assert lengths == [49, 49, 65]


def test_pixels_of_a_perfect_prediction_are_the_image(make_images):
    method, images, noise = make_case(make_images)
    output = method(images, noise)
    patches = patchify(images, method.patch_size).float() / 255
    mean, std = (torch.tensor(values).repeat(4) for values in (method.mean, method.std))
    output.predicted = (take_tokens(patches, output.plan.masked) - mean) / std
    torch.testing.assert_close(method.rebuilt_pixels(images, output), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [*CASES[:6], {"throw_by": "unit"}], ids=str)
def test_gradients_reach_every_parameter(make_images, options):
    method, images, noise = make_case(make_images, **options)
    method(images, noise).loss.backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_bias_of_the_keys_changes_nothing(make_images):
    """The recipe's encoder has biases for queries and values only; ours is the same function."""
    method, images, noise = make_case(make_images)
    method.double()(images, noise).loss.backward()
    dim = method.embed_dim
    for block in method.encoder.blocks:
        gradient = block.attn.qkv.bias.grad
        assert gradient[dim : 2 * dim].abs().max() < 1e-12 < gradient[:dim].abs().max()


@pytest.mark.parametrize("options", [{}, {"throwing": "none"}, {"position": "absolute", "throw_by": "unit"}], ids=str)
def test_bfloat16_autocast_keeps_residual_stream_and_loss_in_float32(make_images, options, device):
    method, images, noise = make_case(make_images, **options)
    method, images, noise = method.to(device), images.to(device), noise.to(device)
    seen = []
    method.encoder.blocks[1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rough = method(images, noise)
    assert seen == [torch.float32]
    assert rough.loss.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(method(images, noise).loss.item(), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"throwing": "none"}, {"throw_by": "unit"}, {"position": "absolute"}], ids=str)
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


def counted_macs(method):
    images = torch.empty(1, *method.image_size, method.channels, dtype=torch.uint8, device="meta")
    noise = torch.empty(1, method.counts.num_tokens, dtype=torch.int32, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        method.to("meta")(images, noise)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_macs_are_those_of_the_formula(make_images, shape, variant):
    image_size, patch_size, channels = SHAPES[shape]
    method = SimMIM(**SIZES, image_size=image_size, patch_size=patch_size, channels=channels, variant=variant)
    assert counted_macs(method) == method.cost().macs


@pytest.mark.parametrize(
    ("options", "saved"),
    [({"throwing": "none"}, 0.0), ({"throw_by": "unit"}, 0.24), ({"throw_ratio": 0.5}, 0.5)],
    ids=str,
)
def test_macs_of_vit_base(options, saved):
    with torch.device("meta"):
        dense, method = SimMIM(throwing="none"), SimMIM(**options)
    macs = counted_macs(method)
    assert macs == method.cost().macs
    assert macs <= (1 - saved) * dense.cost().macs


def test_weights_begin_as_in_the_recipe():
    method = SimMIM(image_size=(32, 32), patch_size=(4, 4), embed_dim=64, depth=3, num_heads=4)
    state = method.state_dict()
    assert state["encoder.patch_embed.proj.weight"].abs().max() <= 0.02
    assert state["encoder.blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.0108, rel=0.03)  # cut at one sigma
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
    state = SimMIM(**tiny_simmim).state_dict()
    assert state["encoder.rel_pos_bias.relative_position_bias_table"].shape == (52, 2)
    assert state["encoder.mask_token"].shape == (1, 1, 16)
    assert state["head.weight"].shape == (48, 16)
    part = r"(patch_embed\.proj|norm|blocks\.\d\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
    part += r"|cls_token|mask_token|blocks\.\d\.ls[12]\.gamma|rel_pos_bias\.relative_position_bias_table"
    assert not [name for name in state if not re.fullmatch(rf"encoder\.({part})|head\..*|reconstruct\..*", name)]
    assert "encoder.pos_embed" in SimMIM(**tiny_simmim, position="absolute").state_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_unit": 3}, ValueError, "mask_unit: expected a divisor of the grid 4x4, got 3"),
        ({"mask_unit": 0}, ValueError, r"mask_unit: expected positive integers, got \(0, 0\)"),
        ({"mask_unit": 2.0}, TypeError, "mask_unit: expected integers, got 2.0"),
        ({"throw_by": "patch"}, ValueError, "throw_by: expected 'token' or 'unit', got 'patch'"),
        ({"position": "both"}, ValueError, "position: expected 'absolute' or 'relative', got 'both'"),
        ({"layer_scale": 0}, ValueError, "layer_scale: expected a number above 0, got 0"),
        ({"drop_path": 1.0}, ValueError, r"drop_path: expected a number in \[0, 1\), got 1.0"),
        ({"drop_path": "0.1"}, TypeError, r"drop_path: expected a number in \[0, 1\), got '0.1'"),
        ({"throw_ratio": 0.8}, ValueError, "throw_ratio: expected at most mask_ratio 0.6, got 0.8"),
        ({"mask_ratio": 0.9}, ValueError, "mask_ratio: expected a ratio that leaves a visible token .*"),
        ({"embed_dim": 18, "num_heads": 3}, ValueError, "embed_dim: expected a multiple of 4 for variant 'kernel', .*"),
        ({"init_seed": "0"}, TypeError, "init_seed: expected an integer, got '0'"),
    ],
    ids=str,
)
def test_wrong_options(tiny_simmim, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        SimMIM(**{**tiny_simmim, **options})
