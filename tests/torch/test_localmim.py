"""LocalMIM: published heads and loss; thrown tokens at every scale."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prmim_core import counter_noise
from prmim_methods import LocalMIMConfig
from prmim_reference import localmim as reference
from prmim_reference.hog import hog
from prmim_torch import LocalMIM
from prmim_torch.localmim import ScaleHead

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_dim": 16, "decoder_heads": 2}
SQUARE = {"image_size": (16, 16), "patch_size": (4, 4)}
CASES = [{}, {"throw_ratio": 0.0}, {"reconstruction": "none"}, {"mask_ratio": 0.5, "throw_ratio": 0.5}]


def make_case(make_images, batch=2, **options):
    method = LocalMIM(LocalMIMConfig(**{**SIZES, **SQUARE, **options}))
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():  # break the symmetries of the initial weights
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    images = torch.from_numpy(make_images(batch, *method.config.image_size, method.config.channels))
    return method, images, counter_noise(5, 0, torch.arange(batch), method.num_tokens)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"])
def test_loss_is_the_reference_one(make_images, options, dtype, rtol):
    method, images, noise = make_case(make_images, **options)
    output, config = method.to(dtype)(images, noise), method.config
    assert output.loss.dtype == dtype
    expected = reference.forward(
        {name: tensor.numpy() for name, tensor in method.state_dict().items()},
        images.numpy(),
        noise.numpy(),
        patch_size=config.patch_size,
        num_heads=2,
        decoder_heads=2,
        scales=config.scales_in_effect,
        layers=config.layers_in_effect,
        **options,
    )
    for name in ("loss", "loss_decoded", "loss_thrown"):
        assert getattr(output, name).item() == pytest.approx(getattr(expected, name), rel=rtol), name
    np.testing.assert_allclose(output.predicted.detach(), expected.predicted, rtol=100 * rtol, atol=100 * rtol)


def test_a_head_computes_transposed_convolutions():
    """Those of the paper, on the whole grid, with kernels as large as the stride."""
    config = LocalMIMConfig(**SIZES, **SQUARE, channels=2, bins=5)
    head = ScaleHead(config, 4)
    for norm in head.norms:
        torch.nn.init.normal_(norm.weight)
    features = torch.randn(3, 16, 16)  # 4 x 4 tokens

    def kernel(layer):  # (4 * outputs, inputs), cells before channels, to (inputs, outputs, 2, 2)
        return layer.weight.view(2, 2, -1, layer.in_features).permute(3, 2, 0, 1)

    x = features.view(3, 4, 4, 16).permute(0, 3, 1, 2)
    x = F.conv_transpose2d(x, kernel(head.up[0]), stride=2)
    x = F.gelu(head.norms[0](x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    x = F.conv_transpose2d(x, kernel(head.up[1]), stride=2)
    x = F.conv2d(x, head.pred.weight[:, :, None, None], head.pred.bias)  # 3, 10, 16, 16
    expected = x.view(3, 10, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(3, 16, -1)
    torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-5)


def test_the_dense_loss_is_the_published_one(make_images):
    """Per scale: mean error of the cells, weighted by the mask at that scale."""
    method, images, noise = make_case(make_images, throw_ratio=0.0)
    output, config = method.double()(images, noise), method.config
    mask = output.plan.mask.double().view(2, 1, 4, 4)
    predicted = torch.zeros(2, 16, output.predicted.shape[-1], dtype=torch.float64)
    places = output.plan.masked[:, :, None].expand_as(output.predicted)
    predicted = predicted.scatter(1, places, output.predicted.detach())
    expected, start = 0.0, 0
    for scale, cell in zip(config.scales_in_effect, config.cell_sizes, strict=True):
        side = max(int(scale), 1)
        values = predicted[:, :, start : start + side**2 * 27].view(2, 4, 4, side, side, 27)
        start += side**2 * 27
        cells = values.permute(0, 1, 3, 2, 4, 5).reshape(2, 4 * side, 4 * side, 27)
        if scale < 1:
            weight = F.avg_pool2d(mask, 2)[:, 0]
            # Of the masked tokens of a block, all predict the same; the others have 0 here.
            cells = F.avg_pool2d(cells.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) / weight.clamp(min=0.1)[..., None]
        else:
            weight = mask.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, 0]
        wanted = torch.from_numpy(np.stack([hog(image.numpy().astype(float), cell, 9) for image in images]))
        errors = (cells - wanted).square().mean(-1)
        expected += (errors * weight).sum() / weight.sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)


def change_token(images, token):
    """Return the images with all pixels of one token of image 0 inverted."""
    changed = images.clone()
    row, column = divmod(int(token), 4)
    changed[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
    return changed


@pytest.mark.parametrize("kind", ["decoded", "thrown"])
def test_a_masked_patch_is_seen_by_nothing_but_targets(make_images, kind):
    method, images, noise = make_case(make_images)
    before = method(images, noise)
    after = method(change_token(images, getattr(before.plan, kind)[0, 1]), noise)
    assert torch.equal(after.predicted, before.predicted)
    assert not torch.equal(getattr(after, f"loss_{kind}"), getattr(before, f"loss_{kind}"))
    after = method(change_token(images, before.plan.visible[0, 1]), noise)
    assert not torch.equal(after.predicted[0], before.predicted[0])
    assert torch.equal(after.predicted[1], before.predicted[1])


@pytest.mark.parametrize("target", ["hog", "pixels"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_reach_every_parameter(make_images, options, target):
    method, images, noise = make_case(make_images, target=target, **options)
    method(images, noise).loss.backward()
    for name, parameter in method.named_parameters():
        # Without decoded tokens, no mask token is used.
        if method.config.counts.decoded == 0 and name.endswith("mask_token"):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_whole_step_compiles_to_one_graph(make_images):
    method, images, noise = make_case(make_images, scales=(2, 0.5), depth=1, bins=2)
    expected = method(images, noise)
    # This backend generates no code, which would take half a minute.
    output = torch.compile(method, fullgraph=True, backend="aot_eager")(images, noise)
    torch.testing.assert_close(output.loss, expected.loss)


def test_bfloat16_autocast_keeps_targets_and_loss_in_float32(make_images, device):
    method, images, noise = make_case(make_images)
    method, images, noise = method.to(device), images.to(device), noise.to(device)
    exact = method(images, noise)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rough = method(images, noise)
    assert {rough.loss.dtype, rough.loss_thrown.dtype} == {torch.float32}
    assert rough.predicted.dtype == torch.bfloat16
    assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"reconstruction": "none"}], ids=str)
def test_compared_features_of_perfect_predictions_are_equal(make_images, options):
    method, images, noise = make_case(make_images, **options)
    output = method(images, noise)
    _, target = method.compared_features(images, output)
    supervised = output.plan.masked[:, : method.config.num_supervised]
    output.predicted = torch.stack([rows[index] for rows, index in zip(target, supervised, strict=True)])
    predicted, target = method.compared_features(images, output)
    for image in range(2):
        is_nan = predicted[image].isnan()
        assert is_nan.any(-1).nonzero().flatten().tolist() == sorted({*range(16)} - {*supervised[image].tolist()})
        assert torch.equal(predicted[image][~is_nan], target[image][~is_nan])


def test_only_supervised_tokens_are_predicted(make_images):
    method, images, noise = make_case(make_images)
    lengths = {}

    def note(name):
        return lambda module, arguments, output: lengths.update({name: output.shape[1]})

    for name in ("encoder.patch_embed", *(f"{part}.{n}" for part in ("decoders", "heads") for n in range(4))):
        method.get_submodule(name).register_forward_hook(note(name))
    method(images, noise)
    assert lengths.pop("encoder.patch_embed") == 4
    assert lengths.pop("heads.3") == 4  # units of 2 x 2 tokens
    assert set(lengths.values()) == {8, 12}
