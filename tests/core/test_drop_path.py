import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import prmim_reference as reference
from prmim_core import counter_noise, drop_path_scales

NOISE = counter_noise(0, 0, np.arange(5), 9)


@pytest.mark.parametrize(("depth", "rate"), [(1, 0.5), (2, 0.9), (5, 0.3), (12, 0.1), (4, 0.0), (3, 0)])
def test_scales_match_the_reference(xp, depth, rate):
    expected = [reference.drop_path.drop_path_scales(depth, rate, row) for row in NOISE.tolist()]
    scales = xp.run(lambda noise: drop_path_scales(depth, rate, noise), NOISE)
    xp.assert_equal(scales, np.asarray(expected), dtype="float32")


@given(
    noise=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    depth=st.integers(1, 30),
    rate=st.floats(0, 1, exclude_max=True),
)
def test_scales_match_the_reference_everywhere(noise, depth, rate):
    expected = reference.drop_path.drop_path_scales(depth, rate, noise)
    assert drop_path_scales(depth, rate, np.asarray([noise], dtype=np.int32)).tolist() == [expected]


def test_wider_integers_are_the_same_noise():
    expected = drop_path_scales(6, 0.5, NOISE)
    np.testing.assert_array_equal(drop_path_scales(6, 0.5, NOISE.astype(np.int64)), expected)


def test_an_image_keeps_its_draws_in_any_batch():
    whole = drop_path_scales(6, 0.5, NOISE)
    np.testing.assert_array_equal(drop_path_scales(6, 0.5, NOISE[[3, 1]]), whole[[3, 1]])


def test_the_first_block_is_never_dropped():
    noise = counter_noise(0, 0, np.arange(5000), 4)
    scales = drop_path_scales(3, 0.99, noise)
    assert (scales[:, 0] == 1).all()
    assert (scales[:, 1:] == 0).any()


def test_branches_are_dropped_at_their_rates_and_kept_ones_make_up_for_it():
    depth, rate, images = 6, 0.5, 20_000
    scales = drop_path_scales(depth, rate, counter_noise(1, 0, np.arange(images), 4))
    for block in range(depth):
        block_rate = rate * block / (depth - 1)
        for branch in range(2):
            values = scales[:, block, branch]
            dropped = int((values == 0).sum())
            assert stats.binomtest(dropped, images, block_rate).pvalue > 1e-6
            np.testing.assert_allclose(values[values > 0], 1 / (1 - block_rate), rtol=1e-6)
    assert abs(scales.mean() - 1) < 0.01


def test_branches_images_and_steps_are_drawn_apart():
    # The last block at one half: every pair of draws that should not depend on one another agrees half of the time.
    images = 20_000
    now, later = (drop_path_scales(3, 0.5, counter_noise(0, step, np.arange(images), 4))[:, 2] > 0 for step in range(2))
    pairs = [(now[:, 0], now[:, 1]), (now[:, 0], later[:, 0]), (now[1:, 0], now[:-1, 0]), (now[:, 1], later[:, 1])]
    for first, second in pairs:
        equal = int((first == second).sum())
        assert stats.binomtest(equal, first.size, 0.5).pvalue > 1e-6


def test_draws_do_not_follow_the_mask():
    # Token 0 is visible where its noise is low; that must not tell whether a branch is dropped.
    noise = counter_noise(0, 0, np.arange(20_000), 4)
    is_kept = drop_path_scales(2, 0.5, noise)[:, 1, 0] > 0
    for column in (0, -1):
        equal = int((is_kept == (noise[:, column] < 0)).sum())
        assert stats.binomtest(equal, len(noise), 0.5).pvalue > 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2, 0.1, NOISE[0]), ValueError, r"noise: expected shape \(batch, N\), got \(9,\)"),
        ((2, 0.1, NOISE[:, :0]), ValueError, r"noise: expected at least one token, got shape \(5, 0\)"),
        ((2, 0.1, NOISE / 2.0), TypeError, "noise: expected integers, got float64"),
        ((0, 0.1, NOISE), ValueError, "depth: expected at least 1, got 0"),
        ((2.0, 0.1, NOISE), TypeError, "depth: expected an integer, got 2.0"),
        ((True, 0.1, NOISE), TypeError, "depth: expected an integer, got True"),
        ((2, 1, NOISE), ValueError, r"rate: expected a number in \[0, 1\), got 1"),
        ((2, -0.1, NOISE), ValueError, r"rate: .* got -0.1"),
        ((2, float("nan"), NOISE), ValueError, r"rate: .* got nan"),
        ((2, "0.1", NOISE), TypeError, r"rate: expected a number in \[0, 1\), got '0.1'"),
        ((2, False, NOISE), TypeError, r"rate: .* got False"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        drop_path_scales(*arguments)
