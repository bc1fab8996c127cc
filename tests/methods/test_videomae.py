"""The record of VideoMAE: tubes, dual masking, and the published costs."""

import re

import pytest

from prmim_core import TokenCounts
from prmim_methods import Accounting, VideoMAEConfig

SMALL = {"image_size": (8, 12, 12), "patch_size": (2, 4, 4), "decoder_dim": 48}
OFFICIAL = Accounting(bookkeeping="official")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (160, 624, 784)),
        ({"throw_ratio": 0}, (160, 1408, 0)),
        ({"throwing": "dual"}, (160, 704, 704)),
        ({"throwing": "dual", "throw_ratio": 0.25}, (160, 1056, 352)),
        ({"throwing": "dual", "throw_ratio": 0.75}, (160, 352, 1056)),
        ({"throwing": "dual", "throw_ratio": 0}, (160, 1408, 0)),
        (SMALL, (4, 14, 18)),
        ({**SMALL, "image_size": (6, 16, 16), "mask_unit": 2}, (12, 12, 24)),  # 1 of 4 wide tubes is visible
        ({**SMALL, "mask_ratio": 0.999}, (4, 14, 18)),  # masked tubes are rounded down
        ({"image_size": (224, 224), "patch_size": (16, 16)}, (20, 78, 98)),  # an image has no time
        # 50 tubes at 0.58: 29 are masked, in floating point 28.
        ({"image_size": (4, 20, 40), "patch_size": (1, 4, 4), "mask_ratio": 0.58}, (84, 16, 100)),
        ({"image_size": (4, 20, 40), "patch_size": (1, 4, 4), "mask_ratio": 0.58, "rounding": "float"}, (88, 12, 100)),
    ],
    ids=str,
)
def test_ratios_become_counts(given, expected):
    assert VideoMAEConfig(**given).counts == TokenCounts(*expected)


@pytest.mark.parametrize(
    ("given", "decoder_tokens", "predicted", "total"),
    [
        ({"throw_ratio": 0.0}, 1568, 1408, 35.44),
        ({"throwing": "dual", "reconstruction": "none"}, 944, 784, 25.84),
    ],
    ids=str,
)
def test_published_sequences_and_costs(given, decoder_tokens, predicted, total):
    config = VideoMAEConfig(**given)
    assert (config.encoder_length, config.decoder_length) == (160, decoder_tokens)
    assert config.official_predictions == predicted
    assert round(config.cost(OFFICIAL).macs / 1e9, 2) == total


def test_sampling_leaves_the_weights_as_they_are():
    architecture = VideoMAEConfig().architecture()
    assert VideoMAEConfig(mask_ratio=0.75, throwing="dual", throw_ratio=0.25).architecture() == architecture
    for changes in ({"norm_over": "patch"}, {"norm_pix": False}, {"class_tokens": 1}, {"position": "absolute"}):
        assert VideoMAEConfig(**changes).architecture() != architecture
    assert "norm_over" not in VideoMAEConfig(norm_pix=False).architecture()


def test_reports():
    rows = dict(VideoMAEConfig(throwing="dual").describe())
    assert rows["masked"] == "176 of 1 x 14 x 14 = 196 units of 8 x 1 x 1 tokens, 16 x 16 x 16 pixels"
    assert rows["encoder sequence"] == "160, no class token"
    assert rows["decoder sequence"] == "944 (dense: 1568)"
    assert rows["decoded again"] == "80 visible tokens, without a loss"
    over = "each channel of the patch"
    assert rows["  patches"] == f"704 tokens predict all 2 x 16 x 16 pixels, normalized over {over}"
    assert rows["  cells"] == "704 tokens predict the means of 2 x 2 x 2 cells, normalized over the image"
    rows = dict(VideoMAEConfig(norm_over="patch").describe())
    assert "decoded again" not in rows
    assert rows["  patches"].endswith("normalized over the patch")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {**SMALL, "image_size": (4, 12, 12), "throwing": "dual"},
            "throwing: expected a multiple of 4 time steps for 'dual', got a grid of 2 x 3 x 3",
        ),
        (
            {"image_size": (224, 224), "patch_size": (16, 16), "throwing": "dual"},
            "throwing: expected a multiple of 4 time steps for 'dual', got a grid of 14 x 14",
        ),
        (
            {"throwing": "dual", "decoder": "cross"},
            "throwing: expected a choice other than 'dual' for decoder 'cross', got 'dual'",
        ),
        (
            {"throwing": "dual", "throw_ratio": 0.3},
            "throw_ratio: expected 0.25, 0.5 or 0.75 for throwing 'dual', got 0.3",
        ),
        (
            {"throwing": "weighed"},
            "throwing: expected one of furthest, random, cell, dual, or package.module:function, got 'weighed'",
        ),
        ({"norm_over": "frame"}, "norm_over: expected one of channel, patch, got 'frame'"),
        (
            {"image_size": (8, 8), "patch_size": (1, 1), "mask_ratio": 0.75},
            "norm_over: expected 'patch' for patches of one pixel, got 'channel'",
        ),
        ({"embed_dim": 9, "num_heads": 3}, "embed_dim: expected an even number for position 'raster', got 9"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_wrong_options(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        VideoMAEConfig(**given)
