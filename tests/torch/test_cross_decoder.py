"""CrossMAE's decoder: equal to the reference, efficient, without self-attention."""

from math import sqrt

import numpy as np
import pytest
import torch

from prmim_core import counter_noise
from prmim_methods import MAEConfig
from prmim_reference import mae as reference
from prmim_torch import MAE
from prmim_torch.cross_decoder import CrossDecoder

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "decoder_dim": 12, "decoder_depth": 3, "decoder_heads": 3}
SQUARE = {"image_size": (16, 16), "patch_size": (4, 4), "channels": 3}
ODD = {"image_size": (12, 15), "patch_size": (4, 3), "channels": 2}
CLIP = {"image_size": (4, 8, 8), "patch_size": (2, 4, 4), "channels": 1}
PLAIN = {"reconstruction": "none", "throwing": "random"}


def make_case(make_images, **options):
    method = MAE(MAEConfig(decoder="cross", **{**SIZES, **SQUARE, **options}))
    generator = torch.Generator().manual_seed(1)
    for parameter in method.parameters():  # break the symmetries of the initial weights
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    images = torch.from_numpy(make_images(3, *method.config.image_size, method.config.channels))
    return method, images, counter_noise(5, 0, torch.arange(3), method.num_tokens)


# tests/parity compares the other reconstructions.
@pytest.mark.parametrize(
    "options",
    [
        {**ODD, "reconstruction": "conv", "extra_cells": "known"},
        {**CLIP, "throw_ratio": 0.0},
        {"mask_ratio": 0.5, "throw_ratio": 0.5},
        {**PLAIN, "extra_cells": "decoded", "norm_pix": False},
    ],
    ids=["conv", "dense", "all thrown", "plain"],
)
def test_loss_is_the_reference_one(make_images, options):
    method, images, noise = make_case(make_images, **options)
    output = method.double()(images, noise)
    expected = reference.forward(
        {name: tensor.numpy() for name, tensor in method.state_dict().items()},
        images.numpy(),
        noise.numpy(),
        num_heads=2,
        decoder_heads=3,
        decoder="cross",
        patch_size=method.config.patch_size,
        **{key: value for key, value in options.items() if key not in SQUARE},
    )
    assert output.loss.item() == pytest.approx(expected.loss, rel=1e-10)
    np.testing.assert_allclose(output.predicted.detach(), expected.predicted.reshape(output.predicted.shape), rtol=1e-8)
    assert method.rebuilt_pixels(images, output).isnan().any() == (options.get("reconstruction") == "none")


@pytest.mark.parametrize("options", [{}, PLAIN, {"throw_ratio": 0.0, "extra_cells": "known"}], ids=str)
def test_gradients_reach_every_trained_parameter(make_images, options):
    method, images, noise = make_case(make_images, **options)
    method(images, noise).loss.backward()
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad != name.startswith("encoder.norm."), name
        assert not parameter.requires_grad or parameter.grad.any(), name


def test_decoded_tokens_do_not_see_each_other_but_every_layer():
    decoder = CrossDecoder((4, 4), 24, 2, 5, dim=12, depth=2, num_heads=3)
    states = [torch.randn(2, 5, 24) for _ in range(3)]
    index = torch.tensor([[3, 7, 12], [0, 1, 2]])
    features = decoder(states, index)
    assert features.shape == (2, 3, 12)
    torch.testing.assert_close(decoder(states, index[:, 1:2]), features[:, 1:2])
    for layer in range(3):
        others = [state + (number == layer) * torch.randn(24) for number, state in enumerate(states)]
        assert not torch.isclose(decoder(others, index), features).all(-1).any()


def test_visible_features_come_first():
    decoder = CrossDecoder((4, 4), 24, 2, 5, dim=12, depth=2, num_heads=3, visible_features=True)
    states = [torch.randn(1, 5, 24) for _ in range(3)]
    features = decoder(states, torch.tensor([[3, 7]]))
    assert features.shape == (1, 6, 12)
    torch.testing.assert_close(decoder(states, torch.tensor([[8]]))[:, :4], features[:, :4])


@pytest.mark.parametrize("visible_features", [False, True])
def test_mixes_start_xavier_uniform(visible_features):
    torch.manual_seed(0)
    decoder = CrossDecoder((2, 2), 8, 39, 5, dim=4, depth=40, num_heads=1, visible_features=visible_features)
    mixes = 40 + visible_features
    assert decoder.mix.shape == (mixes, 40)
    bound = sqrt(6 / (mixes + 40))
    assert 0.99 * bound < decoder.mix.abs().max() <= bound
    assert decoder.mix.std().item() == pytest.approx(bound / sqrt(3), rel=0.03)


def test_recomputed_and_compiled_steps_are_the_same(make_images):
    sizes = {"depth": 1, "decoder_depth": 1}
    method, images, noise = make_case(make_images, **sizes)
    again, _, _ = make_case(make_images, recompute_blocks=True, **sizes)
    found = []
    # This backend generates no code, which would take half a minute.
    for module in (method, again, torch.compile(method, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        loss = module(images, noise).loss
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in module.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("geometry", [ODD, CLIP], ids=["odd", "clip"])
@pytest.mark.parametrize("options", [{}, PLAIN, {"throw_ratio": 0.0, "extra_cells": "known"}], ids=str)
def test_macs_are_those_of_the_formula(counted_macs, options, geometry):
    config = MAEConfig(decoder="cross", **SIZES, **geometry, **options)
    assert counted_macs(MAE(config), batch=2) == config.cost().macs


@pytest.mark.parametrize(("options", "limit"), [({}, 6.55e9), (PLAIN, 6.40e9)], ids=["PR-MIM", "plain"])
def test_macs_of_vit_base(counted_macs, options, limit):
    config = MAEConfig(decoder="cross", decoder_depth=12, **options)
    with torch.device("meta"):
        macs = counted_macs(MAE(config))
    assert macs == config.cost().macs <= limit
