"""Random weights, and a batched transformer to compare with."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import erf, softmax


class RandomWeights(dict):
    """Random normal weights by name; multiplicative ones lie around 1."""

    def __init__(self, seed=0, deviation=0.3):
        super().__init__()
        self.rng, self.deviation = np.random.default_rng(seed), deviation

    def normal(self, *size):
        return self.rng.normal(0, self.deviation, size)

    def linear(self, name, fan_in, fan_out):
        self |= {f"{name}.weight": self.normal(fan_out, fan_in), f"{name}.bias": self.normal(fan_out)}

    def norm(self, name, dim):
        self |= {f"{name}.weight": 1 + self.normal(dim), f"{name}.bias": self.normal(dim)}

    def blocks(self, name, dim, depth, *, layer_scale=False):
        for block in (f"{name}.blocks.{number}" for number in range(depth)):
            self.norm(f"{block}.norm1", dim)
            self.norm(f"{block}.norm2", dim)
            self.linear(f"{block}.attn.qkv", dim, 3 * dim)
            self.linear(f"{block}.attn.proj", dim, dim)
            self.linear(f"{block}.mlp.fc1", dim, 4 * dim)
            self.linear(f"{block}.mlp.fc2", 4 * dim, dim)
            if layer_scale:
                self |= {f"{block}.ls1.gamma": 1 + self.normal(dim), f"{block}.ls2.gamma": 1 + self.normal(dim)}

    def encoder(
        self,
        shape,
        patch_size,
        channels,
        dim,
        depth,
        *,
        heads=1,
        position="absolute",
        layer_scale=False,
        class_tokens=1,
    ):
        """An encoder with patch embedding, mask token, final norm and position table."""
        self.blocks("encoder", dim, depth, layer_scale=layer_scale)
        self.norm("encoder.norm", dim)
        self["encoder.patch_embed.proj.weight"] = self.normal(dim, channels, *patch_size)
        self["encoder.patch_embed.proj.bias"] = self.normal(dim)
        if class_tokens:
            self["encoder.cls_token"] = self.normal(1, class_tokens, dim)
        self["encoder.mask_token"] = self.normal(1, 1, dim)
        if position == "absolute":
            self["encoder.pos_embed"] = self.normal(1, class_tokens + np.prod(shape), dim)
        else:
            rows = np.prod([2 * n - 1 for n in shape]) + 3
            self["encoder.rel_pos_bias.relative_position_bias_table"] = self.normal(rows, heads) * 5

    def reconstruct(self, shape, dim):
        """The weights of all variants of progressive reconstruction."""
        self["reconstruct.table"] = self.normal(4, np.prod([2 * n - 1 for n in shape]))
        self["reconstruct.kernel"] = 1 + self.normal(dim, *(3,) * len(shape))
        self.norm("reconstruct.norm", dim)


def affine(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normed(x, weights, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block_outputs(x, weights, name, heads, bias=0.0, scales=None):
    """Run all blocks on (batch, length, dim); scales are (batch, depth, 2)."""
    batch, length, dim = x.shape
    states = []
    while f"{name}.blocks.{len(states)}.norm1.weight" in weights:
        block = f"{name}.blocks.{len(states)}"
        scale = np.ones((batch, 2)) if scales is None else scales[:, len(states)]
        qkv = affine(normed(x, weights, f"{block}.norm1"), weights, f"{block}.attn.qkv")
        query, key, value = qkv.reshape(batch, length, 3, heads, dim // heads).transpose(2, 0, 3, 1, 4)
        mixed = softmax(query @ key.swapaxes(2, 3) / np.sqrt(dim // heads) + bias, axis=-1) @ value
        mixed = affine(mixed.transpose(0, 2, 1, 3).reshape(batch, length, dim), weights, f"{block}.attn.proj")
        x = x + mixed * weights.get(f"{block}.ls1.gamma", 1) * scale[:, :1, None]
        hidden = affine(normed(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1")
        hidden = affine(hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), weights, f"{block}.mlp.fc2")
        x = x + hidden * weights.get(f"{block}.ls2.gamma", 1) * scale[:, 1:, None]
        states.append(x)
    return states


def relative_bias(shape, table):
    """BEiT's bias (heads, 1 + N, 1 + N), from an index of all coordinate pairs.

    The rows of the class token form the border.
    """
    axes, rows = len(shape), len(table)
    cells = np.indices(shape).reshape(axes, -1)
    offset = cells[:, :, None] - cells[:, None, :] + np.array(shape).reshape(-1, 1, 1) - 1
    index = np.zeros((1 + cells.shape[1],) * 2, int)
    index[1:, 1:] = np.ravel_multi_index(offset, [2 * n - 1 for n in shape])
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return np.moveaxis(table[index], -1, 0)


def raster_patches(images, patch_size, mean, std):
    """Normalised patches (batch, N, patch_dim) of images (batch, axes..., channels)."""
    x = (images / 255 - np.array(mean)) / np.array(std)
    axes = len(patch_size)
    split = [n for length, side in zip(x.shape[1:-1], patch_size, strict=True) for n in (length // side, side)]
    x = x.reshape(len(x), *split, x.shape[-1])
    x = x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(len(x), np.prod(split[::2]), -1)


def raster_cells(images, patch_size, cells, mean, std, cell_norm):
    """Normalized cell means of all patches: (batch, N, cells * channels).

    Images are (batch, axes..., channels).
    """
    x = (images / 255 - np.array(mean)) / np.array(std)
    axes, (batch, *lengths, channels) = len(patch_size), x.shape
    sides = zip(lengths, patch_size, cells, strict=True)
    split = np.array([(length // side, count, side // count) for length, side, count in sides])
    x = x.reshape(batch, *split.flat, channels)  # each axis: patches, cells, pixels
    x = x.transpose(0, *(1 + np.arange(3 * axes).reshape(axes, 3).T.ravel()), 3 * axes + 1)
    x = x.reshape(batch, *split.prod(0), channels)
    place = np.indices(split[:, 0]).reshape(axes, -1)
    reach = {"window": 1, "image": max(lengths), "none": 0}[cell_norm]
    is_near = (np.abs(place[:, :, None] - place[:, None, :]) <= reach).all(axis=0)
    share = is_near / is_near.sum(axis=1, keepdims=True)
    center = np.einsum("tu,bukpc->btc", share, x)[:, :, None] / np.prod(patch_size)
    moment = np.einsum("tu,bukpc->btc", share, x**2)[:, :, None] / np.prod(patch_size)
    values = x.mean(axis=3)
    if cell_norm != "none":
        values = (values - center) / (np.sqrt(moment - center**2) + 1e-3)
    return values.reshape(*values.shape[:2], -1)


def supervised(
    features,
    order,
    counts,
    weights,
    *,
    head,
    power,
    targets,
    cell_targets,
    thrown_target="cells",
    extra_cells="none",
    thrown_weight=1.0,
    extra_cells_weight=1.0,
    eps=0.0,
):
    """Losses and predictions of features (batch, n, dim) in plan order.

    Targets are (batch, N, values).
    """
    place = np.arange(features.shape[1])
    is_visible, is_thrown = place < counts.visible, place >= counts.visible + counts.decoded
    is_decoded = ~is_visible & ~is_thrown
    is_extra = {"none": place < 0, "decoded": is_decoded, "known": ~is_thrown}[extra_cells]
    is_patch = is_decoded | (is_thrown & (thrown_target == "patch"))
    rows = order[:, place, None]
    predicted = affine(features, weights, head)
    predicted_cells = affine(features, weights, "cell_head")
    error = (np.abs(predicted - np.take_along_axis(targets, rows, axis=1)) ** power).mean(axis=2)
    cell_error = (np.abs(predicted_cells - np.take_along_axis(cell_targets, rows, axis=1)) ** power).mean(axis=2)
    own = np.where(is_patch, error, cell_error)
    weight = is_decoded + thrown_weight * is_thrown
    total = (weight * own + extra_cells_weight * is_extra * cell_error).sum()

    def mean(error, which):
        return error[:, which].mean() if which.any() else 0.0

    return SimpleNamespace(
        loss=total / (len(features) * weight.sum() + eps),
        loss_decoded=mean(own, is_decoded),
        loss_thrown=mean(own, is_thrown),
        loss_cells=mean(cell_error, is_extra),
        predicted=predicted[:, is_patch],
        predicted_cells=predicted_cells[:, is_extra | (is_thrown & ~is_patch)],
    )


def low_passed(images, radius):
    """Images without high frequencies, as in PixMIM; unchanged for None.

    Images are (batch, axes..., channels).
    """
    if radius is None:
        return images
    axes = tuple(range(1, images.ndim - 1))
    centred = [index - (n - 1) / 2 for index, n in zip(np.indices(images.shape[1:-1]), images.shape[1:], strict=False)]
    spectrum = np.fft.fftshift(np.fft.fftn(images, axes=axes), axes=axes)
    spectrum *= (np.square(centred).sum(axis=0) <= radius**2)[None, ..., None]
    return np.abs(np.fft.ifftn(np.fft.ifftshift(spectrum, axes=axes), axes=axes))


def encoder_outputs(patches, weights, shape, heads, *, tokens=None, is_masked=None, scales=None):
    """Outputs of all blocks (batch, C + n, dim) for some tokens (batch, n).

    By default, all tokens in raster order. As in SimMIM all patches are embedded, and where ``is_masked`` (batch, N)
    the mask token takes their place.
    """
    batch, dim = len(patches), len(weights["encoder.norm.bias"])
    weight = np.moveaxis(weights["encoder.patch_embed.proj.weight"], 1, -1).reshape(dim, -1)
    x = patches @ weight.T + weights["encoder.patch_embed.proj.bias"]
    if is_masked is not None:
        x = np.where(is_masked[:, :, None], weights["encoder.mask_token"], x)
    cls_token = weights.get("encoder.cls_token", np.zeros((1, 0, dim)))
    num_class = cls_token.shape[1]
    x = np.concatenate([np.broadcast_to(cls_token, (batch, num_class, dim)), x], axis=1)
    x = x + weights.get("encoder.pos_embed", 0)
    table = weights.get("encoder.rel_pos_bias.relative_position_bias_table")
    bias = np.zeros((1, x.shape[1], x.shape[1])) if table is None else relative_bias(shape, table)
    bias = np.broadcast_to(bias, (batch, *bias.shape))
    if tokens is not None:
        rows = np.concatenate([np.tile(np.arange(num_class), (batch, 1)), num_class + tokens], axis=1)
        image = np.arange(batch)[:, None]
        x = x[image, rows]
        bias = np.moveaxis(bias, 1, -1)[image[:, :, None], rows[:, :, None], rows[:, None, :]]
        bias = np.moveaxis(bias, -1, 1)
    return block_outputs(x, weights, "encoder", heads, bias, scales)


CELLS = {
    "image": {},
    "window": {"cell_norm": "window", "cells": 1},
    "none": {"cell_norm": "none", "thrown_weight": 0.3},
    "decoded": {"extra_cells": "decoded", "extra_cells_weight": 0.5},
    "known": {"extra_cells": "known", "extra_cells_weight": 2.0, "thrown_weight": 0.3, "cell_norm": "window"},
    "patch": {"thrown_target": "patch", "extra_cells": "known"},
    "dense": {"throw_ratio": 0.0, "extra_cells": "known", "extra_cells_weight": 0.3},
    "filtered": {"low_pass": 2.0, "extra_cells": "decoded"},
    "plain": {"reconstruction": "none", "extra_cells": "decoded", "extra_cells_weight": 3.0},
}


@pytest.fixture(params=CELLS)
def cell_options(request):
    """Options of which tokens predict cells, and how these are normalised."""
    return dict(CELLS[request.param])


@pytest.fixture
def random_weights():
    return RandomWeights


@pytest.fixture
def oracle():
    """Functions for batches that share no code with the specification."""
    return SimpleNamespace(
        affine=affine,
        normed=normed,
        block_outputs=block_outputs,
        relative_bias=relative_bias,
        raster_patches=raster_patches,
        raster_cells=raster_cells,
        low_passed=low_passed,
        supervised=supervised,
        encoder_outputs=encoder_outputs,
    )
