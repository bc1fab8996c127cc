import numpy as np
import pytest
from scipy import stats

from prmim_reference.noise import absorb, by_noise, check_noise, counter_noise, integers, mix, noise_rank, uniform


def wrapping_noise(seed, step, sample, num_tokens):
    """The same hash in NumPy's unsigned arithmetic, one call per row."""

    def mix(x):
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)

    state = np.zeros(num_tokens, np.uint32)
    for word in (seed, step, sample, np.arange(num_tokens)):
        words = np.broadcast_to(np.asarray(word).astype(np.uint32), (num_tokens,))
        state = mix(state ^ mix(words + np.uint32(0x9E3779B9)))
    return state.view(np.int32).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize(("step", "sample"), [(0, 0), (3, 70000), (2**31 - 1, 2**31 - 1)])
def test_agrees_with_wrapping_arithmetic(seed, step, sample):
    assert counter_noise(seed, step, sample, 50) == wrapping_noise(seed, step, sample, 50)


def test_known_values():
    assert counter_noise(0, 0, 0, 3) == [407902920, 1600198682, 1706822771]
    assert counter_noise(0, 0, 1, 3) == [1203627609, 1702173812, 250989885]


def test_mix_loses_nothing():
    words = list(range(2000)) + [2**32 - 1 - i for i in range(2000)]
    mixed = [mix(word) for word in words]
    assert len(set(mixed)) == len(words)
    assert all(0 <= value < 2**32 for value in mixed)


def test_a_row_has_no_ties_and_does_not_depend_on_its_length():
    row = counter_noise(7, 5, 3, 3000)
    assert len(set(row)) == len(row)
    assert row[:10] == counter_noise(7, 5, 3, 10)
    assert all(-(2**31) <= value < 2**31 for value in row)


def test_values_are_uniform_and_neighbours_unrelated():
    rows = np.array([counter_noise(0, step, sample, 64) for step in range(6) for sample in range(20)], float)
    assert stats.kstest(rows.ravel() / 2**32 + 0.5, "uniform").pvalue > 1e-3
    for shifted in (np.roll(rows, 1, axis=0), np.roll(rows, 1, axis=1), np.roll(rows, 20, axis=0)):
        assert abs(np.corrcoef(rows.ravel(), shifted.ravel())[0, 1]) < 0.05


def test_an_index_beyond_a_word_absorbs_two():
    state = 0
    for word in (1, 2, 5, 3, 0):  # seed, step, low and high word of the sample, token
        state = absorb(state, word)
    assert counter_noise(1, 2, 3 * 2**32 + 5, 1)[0] % 2**32 == state
    rows = [counter_noise(0, 0, sample, 50) for sample in (5, 2**32 + 5, 2**33 + 5, 2**64 - 1)]
    assert len({value for row in rows for value in row}) == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", 2**32), ("step", -1), ("step", 2**32), ("sample", -1), ("sample", 2**64)],
)
def test_words_out_of_range_are_refused(name, value):
    arguments = {"seed": 0, "step": 0, "sample": 0, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected an integer"):
        counter_noise(**arguments, num_tokens=1)


def test_uniform_stays_strictly_inside_and_is_exact_in_float32():
    extremes = [0, 511, 512, -1, -512, 2**31 - 1, -(2**31)]
    numbers = [uniform(value) for value in extremes]
    step = 2.0**-23
    assert numbers == [step / 2, step / 2, 1.5 * step, 1 - step / 2, 1 - step / 2, 0.5 - step / 2, 0.5 + step / 2]
    assert numbers == np.float32(numbers).tolist()


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        ([0.5, float("nan")], ValueError, "noise: expected numbers, got NaN"),
        ([1, True], TypeError, "noise: expected integers or real numbers, got True"),
        ([1j], TypeError, "noise: expected integers or real numbers, got 1j"),
    ],
)
def test_noise_is_numbers(noise, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        check_noise(noise)


def test_strategies_that_use_bits_need_integers():
    assert integers(np.arange(3)) == [0, 1, 2]
    with pytest.raises(TypeError, match=r"^noise: expected integers, got 0.5$"):
        integers([1, 0.5])


def test_ranks_and_order_agree_with_stable_sorting():
    noise = np.random.default_rng(0).integers(-5, 5, 40)  # many ties
    order = np.argsort(noise, kind="stable")
    assert by_noise(noise.tolist(), range(40)) == order.tolist()
    assert noise_rank(noise.tolist()) == np.argsort(order, kind="stable").tolist()
    assert by_noise(noise.tolist(), [7, 3, 30]) == [token for token in order if token in (7, 3, 30)]
