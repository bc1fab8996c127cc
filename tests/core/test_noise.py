import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import prmim_reference as reference
from prmim_core import counter_noise
from prmim_core._arrays import array_namespace
from prmim_core.noise import _noise_rank, _uniform

SAMPLES = np.asarray([0, 1, 7, 60_000, 2**31 - 1])

# A statistic must be this unlikely before a test fails: with fixed seeds a test that passes once passes for ever, and
# one that fails shows a fault in the hash and not bad luck.
UNLIKELY = 1e-6


def expected_noise(seed, step, sample, num_tokens):
    return [reference.noise.counter_noise(seed, step, int(row), num_tokens) for row in sample]


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 12_345), (2**32 - 1, 2**31 - 1)])
def test_counter_noise_matches_the_reference(xp, seed, step):
    noise = xp.run(lambda sample: counter_noise(seed, step, sample, 5), SAMPLES)
    xp.assert_equal(noise, expected_noise(seed, step, SAMPLES, 5), dtype="int32")


def test_counter_noise_never_changes():
    # Runs are reproduced from these integers: a change here is a change of every mask ever drawn.
    noise = counter_noise(2**32 - 1, 2**31 - 1, np.asarray([0, 2**31 - 1]), 3)
    assert noise.tolist() == [[-2121443365, -1001155941, 2093812529], [-333203746, 1605396736, -577103664]]


# Both words of a sample matter: these share their low word, or their high one.
LARGE = np.asarray([5, 2**32 - 1, 2**32, 2**32 + 5, 2**33 + 5, 2**33 + 6, 2**63 - 1])


@pytest.mark.parametrize("xp", ["numpy", "numpy:readonly", "strict", "torch", "jax:x64", "torch:gpu"], indirect=True)
def test_samples_beyond_32_bits_match_the_reference(xp):
    expected = expected_noise(3, 7, LARGE, 5)
    assert np.unique(expected).size == LARGE.size * 5
    xp.assert_equal(xp.run(lambda sample: counter_noise(3, 7, sample, 5), LARGE), expected, dtype="int32")


@pytest.mark.parametrize("xp", ["numpy", "torch", "jax", "strict"], indirect=True)
@pytest.mark.parametrize("sample", [LARGE, LARGE.astype(np.uint64), LARGE.tolist()], ids=["int64", "uint64", "list"])
def test_every_library_makes_noise_of_large_numpy_samples(xp, sample):
    noise = counter_noise(3, 7, sample, 5, xp=xp.module)
    xp.assert_equal(noise, expected_noise(3, 7, LARGE, 5), dtype="int32")


@pytest.mark.parametrize("sample", [np.asarray([2**32 - 1], np.uint32), np.asarray([2**64 - 1], np.uint64)])
def test_unsigned_samples_reach_their_largest_value(sample):
    assert counter_noise(0, 0, sample, 4).tolist() == expected_noise(0, 0, sample, 4)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_step_may_be_an_array(xp, dtype):
    step = np.asarray([2**31 - 1], dtype=dtype)
    noise = xp.run(lambda step, sample: counter_noise(3, step, sample, 5), step, SAMPLES)
    xp.assert_equal(noise, expected_noise(3, 2**31 - 1, SAMPLES, 5), dtype="int32")


def test_step_may_be_an_array_without_axes(xp):
    noise = xp.run(lambda step, sample: counter_noise(3, step, sample, 5), np.asarray(9), SAMPLES)
    xp.assert_equal(noise, expected_noise(3, 9, SAMPLES, 5), dtype="int32")


def test_step_may_be_a_numpy_integer(xp):
    noise = xp.run(lambda sample: counter_noise(3, np.int64(9), sample, 5), SAMPLES)
    xp.assert_equal(noise, expected_noise(3, 9, SAMPLES, 5), dtype="int32")


def test_the_namespace_argument_gives_the_library(xp):
    with xp.context():
        noise = counter_noise(0, 0, xp.from_numpy(SAMPLES), 5, xp=xp.module)
    xp.assert_equal(noise, expected_noise(0, 0, SAMPLES, 5), dtype="int32")


@pytest.mark.parametrize("xp", ["numpy", "torch", "jax", "strict"], indirect=True)
def test_the_namespace_argument_takes_numpy_samples(xp):
    xp.assert_equal(counter_noise(0, 0, SAMPLES, 5, xp=xp.module), expected_noise(0, 0, SAMPLES, 5), dtype="int32")


def test_a_traced_step_needs_no_new_trace(get_backend):
    import jax

    traces = []

    @jax.jit
    def noise(step, sample):
        traces.append(step)
        return counter_noise(0, step, sample, 6)

    xp = get_backend("jax")
    for step in (0, 1, 1000):
        xp.assert_equal(noise(step, xp.from_numpy(SAMPLES)), expected_noise(0, step, SAMPLES, 6), dtype="int32")
    assert len(traces) == 1


def test_rows_do_not_depend_on_the_batch(xp):
    whole = xp.run(lambda sample: counter_noise(5, 6, sample, 4), SAMPLES)
    split = xp.run(lambda sample: counter_noise(5, 6, sample, 4), SAMPLES[3:4])
    xp.assert_equal(split, xp.to_numpy(whole)[3:4], dtype="int32")


def test_tokens_do_not_depend_on_their_number():
    longer = counter_noise(5, 6, SAMPLES, 300)
    np.testing.assert_array_equal(counter_noise(5, 6, SAMPLES, 10), longer[:, :10])


def test_an_empty_batch_has_no_noise(xp):
    noise = xp.run(lambda sample: counter_noise(0, 0, sample, 4), np.zeros((0,), dtype=np.int64))
    xp.assert_equal(noise, np.zeros((0, 4), dtype=np.int32), dtype="int32")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, SAMPLES, 4), ValueError, r"seed: expected an integer in \[0, 2\*\*32\), got -1"),
        ((2**32, 0, SAMPLES, 4), ValueError, "seed: .* got 4294967296"),
        ((0.5, 0, SAMPLES, 4), TypeError, "seed: expected an integer, got 0.5"),
        ((True, 0, SAMPLES, 4), TypeError, "seed: expected an integer, got True"),
        ((0, -1, SAMPLES, 4), ValueError, r"step: expected an integer in \[0, 2\*\*31\), got -1"),
        ((0, 2**31, SAMPLES, 4), ValueError, "step: .* got 2147483648"),
        ((0, 1.5, SAMPLES, 4), TypeError, "step: expected an integer.*, got 1.5"),
        ((0, np.arange(2), SAMPLES, 4), ValueError, r"step: expected an integer.* of one element, got shape \(2,\)"),
        ((0, np.asarray([1.5]), SAMPLES, 4), TypeError, "step: expected an integer.*, got float64"),
        ((0, np.asarray([-1]), SAMPLES, 4), ValueError, "step: .* got -1"),
        ((0, np.asarray(2**31), SAMPLES, 4), ValueError, "step: .* got 2147483648"),
        ((0, True, SAMPLES, 4), TypeError, "step: expected an integer.*, got True"),
        ((0, 0, SAMPLES / 2, 4), TypeError, "sample: expected integers, got float64"),
        ((0, 0, SAMPLES - 1, 4), ValueError, "sample: expected integers of at least 0, got -1"),
        ((0, 0, SAMPLES, 4.0), TypeError, "num_tokens: expected an integer, got 4.0"),
        ((0, 0, SAMPLES, 0), ValueError, "num_tokens: expected at least 1, got 0"),
        ((0, 0, SAMPLES[None], 4), ValueError, r"sample: expected shape \(batch,\), got \(1, 5\)"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        counter_noise(*arguments)


# --- statistics ---------------------------------------------------------------------------------------------------

NUM_TOKENS = 196


def draw(num_samples=4000, *, seed=0, step=0, num_tokens=NUM_TOKENS):
    return counter_noise(seed, step, np.arange(num_samples), num_tokens)


@pytest.mark.parametrize("shift", range(0, 32, 8))
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 0), (0, 1), (2**31, 99_999)])
def test_bytes_are_uniform(shift, seed, step):
    buckets = np.bincount((draw(1000, seed=seed, step=step) >> shift & 255).ravel(), minlength=256)
    assert stats.chisquare(buckets).pvalue > UNLIKELY


def test_the_uniformity_test_can_fail():
    buckets = np.bincount((draw(1000) >> 8 & 254).ravel(), minlength=256)
    assert stats.chisquare(buckets).pvalue < UNLIKELY


@pytest.mark.parametrize("bit", range(0, 32, 3))
def test_every_bit_is_fair_at_every_token(bit):
    ones = ((draw() >> bit) & 1).sum(axis=0)
    assert stats.binomtest(int(ones.max()), 4000).pvalue > UNLIKELY
    assert stats.binomtest(int(ones.min()), 4000).pvalue > UNLIKELY


def draw_swapped():
    first = [counter_noise(0, i, np.asarray([i + 1]), NUM_TOKENS) for i in range(500)]
    second = [counter_noise(0, i + 1, np.asarray([i]), NUM_TOKENS) for i in range(500)]
    return np.concatenate(first), np.concatenate(second)


NEIGHBOURS = {
    "token": lambda: (draw()[:, :-1], draw()[:, 1:]),
    "row of the grid": lambda: (draw()[:, :-14], draw()[:, 14:]),
    "sample": lambda: (draw()[:-1], draw()[1:]),
    "step": lambda: (draw(), draw(step=1)),
    "seed": lambda: (draw(), draw(seed=1)),
    "distant seed": lambda: (draw(), draw(seed=2**31)),
    "step and sample swapped": draw_swapped,
}


@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbours_are_not_correlated(pair):
    first, second = (noise.ravel() for noise in NEIGHBOURS[pair]())
    assert stats.pearsonr(first.astype(float), second.astype(float)).pvalue > UNLIKELY
    # Bit by bit too: the numbers of differing bits are binomial with mean 16.
    differing = np.bitwise_count((first ^ second).view(np.uint32))
    z_score = (differing.mean() - 16) / np.sqrt(8 / differing.size)
    assert 2 * stats.norm.sf(abs(z_score)) > UNLIKELY


@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 2**31 - 1), sample=st.integers(0, 2**31 - 1))
def test_rows_have_no_ties(seed, step, sample):
    noise = counter_noise(seed, step, np.asarray([sample]), 4096)
    assert np.unique(noise).size == 4096


def test_every_token_is_first_equally_often():
    firsts = np.bincount(draw(20_000).argmin(axis=1), minlength=NUM_TOKENS)
    assert stats.chisquare(firsts).pvalue > UNLIKELY


def test_ranks_are_uniform_at_every_token():
    ranks = _noise_rank(np, draw())
    z_scores = (ranks.mean(axis=0) - (NUM_TOKENS - 1) / 2) / np.sqrt((NUM_TOKENS**2 - 1) / 12 / 4000)
    assert 2 * stats.norm.sf(np.abs(z_scores).max()) * NUM_TOKENS > UNLIKELY
    assert stats.chisquare(np.bincount(ranks[:, 0], minlength=NUM_TOKENS)).pvalue > UNLIKELY


def test_images_get_different_masks_at_every_step():
    first, second = _noise_rank(np, draw()) < 49, _noise_rank(np, draw(step=1)) < 49
    overlap = (first & second).sum(axis=1)  # hypergeometric, mean 49 / 4
    z_score = (overlap.mean() - 49 / 4) / np.sqrt(49 * 0.25 * 0.75 * 147 / 195 / 4000)
    assert 2 * stats.norm.sf(abs(z_score)) > UNLIKELY


# --- ranks --------------------------------------------------------------------------------------------------------

TIED = np.random.default_rng(0).integers(-3, 3, (3, 11))


@pytest.mark.parametrize(
    "noise", [TIED, TIED.astype(np.int32), TIED / np.float32(3)], ids=["int64", "int32", "float32"]
)
def test_noise_rank_matches_the_reference(xp, noise):
    expected = [reference.noise.noise_rank(row) for row in noise.tolist()]
    xp.assert_equal(xp.run(lambda noise: _noise_rank(array_namespace(noise), noise), noise), expected, dtype="int32")


def test_uniform_matches_the_reference(xp):
    noise = np.asarray([[-(2**31), -(2**31) + 511, -1, 0, 511, 512, 2**31 - 1]], dtype=np.int32)
    expected = np.float32([[reference.noise.uniform(value) for value in row] for row in noise.tolist()])
    # Every step is exact in float32, so libraries agree to the last bit.
    xp.assert_equal(xp.run(lambda noise: _uniform(array_namespace(noise), noise), noise), expected, dtype="float32")
    assert 0 < expected.min() < expected.max() < 1


def test_uniform_is_uniform():
    assert stats.kstest(_uniform(np, draw(200)).ravel(), "uniform").pvalue > UNLIKELY
