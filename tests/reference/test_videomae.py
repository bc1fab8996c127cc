import numpy as np
import pytest

from prmim_reference import grid, mae, videomae
from prmim_reference.masking import block_visible, tube_visible
from prmim_reference.noise import counter_noise
from prmim_reference.vit import raster_table

SHAPE = (4, 3, 2)
NOISE = [counter_noise(0, 0, sample, 24) for sample in range(40)]
SIZES = {"patch_size": (1, 2, 2), "num_heads": 2, "decoder_heads": 2, "mask_ratio": 0.67}


@pytest.mark.parametrize("noise", NOISE[:8])
def test_tubes_are_units_through_time(noise):
    assert sorted(block_visible(SHAPE, videomae.tube_shape(SHAPE), 2, noise)) == sorted(tube_visible(SHAPE, 8, noise))
    assert videomae.tube_shape((6, 4), mask_unit=2) == (2, 2)
    assert videomae.tube_shape((6, 4, 4), mask_unit=2) == (6, 2, 2)


@pytest.mark.parametrize(("throw_ratio", "kept"), [(0.25, 3), (0.5, 2), (0.75, 1)])
def test_a_cell_keeps_every_place_as_often(throw_ratio, kept):
    for noise in NOISE:
        cells = videomae.kept_cells(SHAPE, throw_ratio, noise)
        places = [token % 6 for token in cells]
        assert [places.count(place) for place in range(6)] == [kept] * 6


def test_the_four_offsets_are_drawn():
    assert len({tuple(videomae.kept_cells(SHAPE, 0.5, noise)) for noise in NOISE}) == 4


def test_other_ratios_are_refused():
    with pytest.raises(ValueError, match=r"throw_ratio: expected 0.25, 0.5 or 0.75 for dual masking, got 0.4"):
        videomae.kept_cells(SHAPE, 0.4, NOISE[0])


@pytest.fixture
def problem(random_weights):
    weights = random_weights(0)
    weights.encoder(SHAPE, (1, 2, 2), 3, 12, depth=1, class_tokens=0)
    weights.blocks("decoder", 12, depth=1)
    weights.norm("decoder.norm", 12)
    weights["decoder.embed.weight"] = weights.normal(12, 12)
    weights.linear("decoder.pred", 12, 12)
    weights["decoder.mask_token"] = weights.normal(1, 1, 12)
    weights["decoder.pos_embed"] = raster_table(24, 12)[None]
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 4, 3), np.uint8)
    return weights, clips, np.array(NOISE[:2])


def test_dual_masking_supervises_the_kept_cells_that_are_hidden(problem):
    output = videomae.forward(*problem, **SIZES, throwing="dual", reconstruction="none")
    for noise, order in zip(NOISE, output.order.tolist(), strict=False):
        hidden = set(videomae.kept_cells(SHAPE, 0.5, noise)) - set(tube_visible(SHAPE, 8, noise))
        assert set(order[8:16]) == hidden
    assert output.predicted.shape == (2, 8, 12)
    plain = videomae.forward(*problem, **SIZES, throwing="cell", throw_ratio=0.34, reconstruction="none")
    assert plain.order.tolist() == output.order.tolist()
    assert plain.loss != output.loss  # the decoder sees four more tokens


def test_without_tubes_and_channels_it_is_mae(problem):
    weights, clips, noise = problem
    options = {**SIZES, "mask_ratio": 0.75, "norm_pix": False, "reconstruction": "none"}
    visible = [tube_visible(SHAPE, 8, row) for row in NOISE[:2]]
    ours = videomae.forward(weights, clips, noise, **{**options, "mask_ratio": 0.67})
    counts = videomae.TokenCounts(8, 4, 12)
    theirs = mae.forward(weights, clips, noise, **options, visible=visible, counts=counts)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)


def test_targets_of_a_channel_have_mean_zero_and_deviation_one():
    clip = np.random.default_rng(0).integers(0, 256, (4, 6, 4, 2)).astype(float)
    targets = videomae.channel_targets(clip, (2, 3, 2), None).reshape(8, 12, 2)
    np.testing.assert_allclose(targets.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(targets.std(axis=1, ddof=1), 1, atol=1e-4)


def test_an_unknown_normalisation_is_refused(problem):
    with pytest.raises(ValueError, match=r"norm_over: expected .channel. or .patch., got 'frame'"):
        videomae.forward(*problem, **SIZES, norm_over="frame")


def test_positions_are_interleaved():
    table = raster_table(grid.num_tokens(SHAPE), 6)
    np.testing.assert_allclose(table[:, 2], np.sin(np.arange(24) * 10000 ** (-1 / 3)))
    np.testing.assert_allclose(table[:, 5], np.cos(np.arange(24) * 10000 ** (-2 / 3)))
    with pytest.raises(ValueError, match="dim: expected an even number, got 3"):
        raster_table(2, 3)
