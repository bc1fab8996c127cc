"""The loss of pixels for trainers of one's own."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from prmim_core import Grid, Schedule, TokenCounts, counter_noise, patchify, take_tokens
from prmim_methods import MAEConfig
from prmim_torch import MAE, PixelLoss, ProgressiveReconstruction, make_plan


def make_loss(grid=(4, 4), patch_size=(4, 4), dim=8, **options):
    return PixelLoss(ProgressiveReconstruction(dim, Grid(grid)), patch_size, **options)


class Host(nn.Module):
    """A trainer with linear layers for encoder and decoder.

    Positions have batch size 1; noise is float.
    """

    def __init__(self, thrown=8):
        super().__init__()
        self.schedule = Schedule(Grid((4, 4)), TokenCounts(4, 12 - thrown, thrown))
        self.encoder, self.head = nn.Linear(48, 8), nn.Linear(8, 48)
        self.mask_token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 16, 8))
        self.pixel_loss = make_loss()

    def forward(self, patches, noise):
        plan = make_plan(self.schedule, noise)
        x = self.encoder(take_tokens(patches, plan.visible))
        x = torch.cat([x, self.mask_token.expand(*plan.decoded.shape, -1)], dim=1)
        return self.pixel_loss(x + take_tokens(self.places, plan.known(1)), plan, patches, self.head).mean()


def host_inputs(batch):
    return torch.randn(batch, 16, 48), torch.rand(batch, 16)


@pytest.mark.parametrize("options", [{}, {"norm_pix": False, "cells": 1}])
def test_it_is_the_loss_of_mae(tiny, make_images, options):
    method = MAE(MAEConfig(**tiny, **options))
    images = torch.from_numpy(make_images(3, 16, 16, 3))
    output = method(images, counter_noise(0, 0, torch.arange(3), 16))
    loss = make_loss(**options)
    loss.reconstruct_norm.load_state_dict(method.reconstruct.state_dict())
    loss.cell_head.load_state_dict(method.cell_head.state_dict())
    patches = method._normalize(patchify(images, (4, 4)))
    features = method._decode(take_tokens(patches, output.plan.visible), output.plan, None)
    errors = loss(features, output.plan, patches, method.decoder.pred)
    torch.testing.assert_close(errors.mean(), output.loss)
    torch.testing.assert_close(errors[:, :4].mean(), output.loss_decoded)
    torch.testing.assert_close(errors[:, 4:].mean(), output.loss_thrown)


def test_without_thrown_tokens_it_is_the_dense_loss():
    host, (patches, noise) = Host(thrown=0), host_inputs(3)
    host.pixel_loss.norm_pix = False
    masked = noise.argsort(1)[:, 4:]
    x = host.mask_token + take_tokens(host.places, masked)
    expected = (host.head(x) - take_tokens(patches, masked)).square().mean()
    torch.testing.assert_close(host(patches, noise), expected)


def test_a_subclass_may_measure_another_error():
    class AbsoluteLoss(PixelLoss):
        def error(self, predicted, target):
            return (predicted - target).abs().mean(-1)

    host, (patches, noise) = Host(), host_inputs(2)
    squared = host(patches, noise)
    host.pixel_loss.__class__ = AbsoluteLoss
    plan = make_plan(host.schedule, noise)
    features = torch.zeros(2, 8, 8)
    predicted, cells = host.pixel_loss.predict(features, plan, host.head)
    errors = host.pixel_loss.errors(predicted, cells, plan, patches)
    assert host(patches, noise) != squared
    assert errors.shape == (2, 12)
    assert errors.max() < 4  # of normalised patches and cells


def test_a_trainer_compiles_as_one_graph_and_is_exported():
    host = Host()
    compiled = torch.compile(host, fullgraph=True, dynamic=True, backend="eager")
    batch = Dim("batch")
    program = export(host, host_inputs(4), dynamic_shapes=({0: batch}, {0: batch})).module()
    for size in (1, 7):
        arguments = host_inputs(size)
        torch.testing.assert_close(compiled(*arguments), host(*arguments))
        torch.testing.assert_close(program(*arguments), host(*arguments))


def test_all_parameters_are_trained():
    host = Host()
    gradients = torch.autograd.grad(host(*host_inputs(2)), list(host.parameters()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": 3}, "cells: expected a divisor of the patch 4 x 4, or null, got 3"),
        ({"cells": 0}, "cells: expected a divisor of the patch 4 x 4, or null, got 0"),
        ({"channels": 0}, "channels: expected at least 1, got 0"),
        ({"patch_size": (4,)}, r"patch_size: expected 2 axes, got \(4,\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_loss(**options)


@pytest.mark.parametrize(
    ("features", "patches", "message"),
    [
        ((2, 8, 8), (2, 16, 12), r"patches: expected shape \(batch, 16, 48\), got \(2, 16, 12\)"),
        ((2, 8, 8), (2, 9, 48), r"patches: expected shape \(batch, 16, 48\), got \(2, 9, 48\)"),
        ((2, 16, 8), (2, 16, 48), r"features: expected shape \(2, 8, dim\), got \(2, 16, 8\)"),
        ((2, 8, 4), (2, 16, 48), r"features: expected 8 channels, got shape \(2, 8, 4\)"),
    ],
)
def test_wrong_shapes(features, patches, message):
    plan = make_plan(Host().schedule, torch.rand(2, 16))
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_loss()(torch.zeros(features), plan, torch.zeros(patches), nn.Linear(8, 48))
