import numpy as np
import pytest
from scipy import stats

from prmim_reference.drop_path import STREAM, drop_path_scales, drop_rate
from prmim_reference.noise import counter_noise


def test_the_rate_rises_linearly_from_nothing():
    assert [drop_rate(block, 12, 0.1) for block in range(12)] == pytest.approx(np.linspace(0, 0.1, 12))
    assert drop_rate(0, 1, 0.5) == 0


def test_a_rate_of_zero_drops_nothing():
    assert drop_path_scales(4, 0.0, [5, -7, 3]) == [[1.0, 1.0]] * 4


def test_scales_by_hand():
    def mix(x):  # the hash of the noise, in wrapping arithmetic of NumPy
        x = np.uint32(x)
        with np.errstate(over="ignore"):
            x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
            x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    def absorb(state, word):
        with np.errstate(over="ignore"):
            return mix(state ^ mix(np.uint32(word % 2**32) + np.uint32(0x9E3779B9)))

    for noise in ([3, 9, -4], [-(2**31), 2**31 - 1], [17]):
        state = absorb(absorb(absorb(np.uint32(0), STREAM), noise[0]), noise[-1])
        chance = [(int(absorb(state, branch)) // 512 + 0.5) / 2**23 for branch in range(6)]
        expected = [
            [0.0 if chance[2 * block + branch] < rate else float(np.float32(1 / (1 - rate))) for branch in range(2)]
            for block, rate in enumerate((0.0, 0.375, 0.75))
        ]
        assert drop_path_scales(3, 0.75, noise) == expected


def test_only_the_first_and_the_last_noise_count():
    expected = drop_path_scales(9, 0.5, [1, 2, 3, 4])
    assert drop_path_scales(9, 0.5, [1, 7, 8, 9, 4]) == expected
    assert drop_path_scales(9, 0.5, [2, 2, 3, 4]) != expected
    assert drop_path_scales(9, 0.5, [1, 2, 3, 5]) != expected


def test_branches_are_dropped_at_their_rates():
    images = 2000
    scales = np.array([drop_path_scales(3, 0.6, counter_noise(0, 0, image, 2)) for image in range(images)])
    for block, rate in enumerate((0.0, 0.3, 0.6)):
        for branch in range(2):
            dropped = int((scales[:, block, branch] == 0).sum())
            assert stats.binomtest(dropped, images, rate).pvalue > 1e-6
    both = int((scales[:, 2] == 0).all(axis=1).sum())
    assert stats.binomtest(both, images, 0.36).pvalue > 1e-6


@pytest.mark.parametrize(
    ("depth", "rate", "message"), [(0, 0.1, "depth: expected"), (2, 1.0, "rate: expected"), (2, -0.1, "rate: expected")]
)
def test_bad_arguments_are_refused(depth, rate, message):
    with pytest.raises(ValueError, match=message):
        drop_path_scales(depth, rate, [1, 2])
