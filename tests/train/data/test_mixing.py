"""Mixup and CutMix treat images and targets alike, on any number of processes."""

import numpy as np
import pytest

from prmim_train.data.batches import train_batches
from prmim_train.data.mixing import Mixing, soft_targets
from prmim_train.data.sources import open_source

CLASSES = 5


def batch(number=8, size=16, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    return images, np.arange(number)


def make(**options):
    return Mixing(np.arange(100) % CLASSES, CLASSES, seed=3, **options)


def share_of_first(targets, number=0, half=4):
    """Return the shares of a target's own class and its partner's, which differ."""
    return targets[number, number % CLASSES], targets[number, (number + half) % CLASSES]


def test_targets_are_smoothed():
    targets = soft_targets(np.array([2, 0]), 4, smoothing=0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], rtol=1e-6)
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(soft_targets(np.array([1]), 3), [[0, 1, 0]])


def test_nothing_is_mixed_unless_asked_for():
    images, index = batch()
    mixed, targets = make(smoothing=0.1)(0, images, index)
    assert mixed is images
    np.testing.assert_array_equal(targets, soft_targets(index % CLASSES, CLASSES, 0.1))


@pytest.mark.parametrize("step", range(12))
def test_mixup_weighs_images_as_it_weighs_targets(step):
    images, index = batch()
    before = images.copy()
    mixed, targets = make(mixup=0.8)(step, images, index)
    own, partner = share_of_first(targets)
    assert own + partner == pytest.approx(1, abs=1e-6)
    exact = own * images + partner * np.roll(images, -4, axis=0)
    np.testing.assert_array_equal(mixed, np.floor(exact.astype(np.float64) + 0.5).astype(np.uint8))
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(images, before)
    assert (mixed.dtype, targets.dtype) == (np.uint8, np.float32)


@pytest.mark.parametrize("step", range(12))
def test_cutmix_pastes_one_box_that_counts_by_its_area(step):
    images, index = batch()
    before = images.copy()
    mixed, targets = make(cutmix=1.0)(step, images, index)
    is_pasted = (mixed != images).any((0, 3))
    rows, columns = np.nonzero(is_pasted)
    if len(rows):
        box = np.s_[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert is_pasted[box[1:]].all()
        np.testing.assert_array_equal(mixed[box], np.roll(images, -4, axis=0)[box])
    own, partner = share_of_first(targets)
    assert partner == pytest.approx(is_pasted.mean(), abs=1e-6)
    assert own == pytest.approx(1 - is_pasted.mean(), abs=1e-6)
    np.testing.assert_array_equal(images, before)


def test_smoothing_goes_through_the_mixing():
    images, index = batch()
    plain, smooth = (make(mixup=0.8, smoothing=s)(1, images, index)[1] for s in (0.0, 0.1))
    np.testing.assert_allclose(smooth, 0.9 * plain + 0.1 / CLASSES, atol=1e-6)


def kinds(mixing, steps):
    """Return for each step whether it was CutMix, and the kept share of an image."""
    images = np.zeros((2, 32, 32, 1), np.uint8)
    images[1] = 255
    found = []
    for step in range(steps):
        mixed, targets = mixing(step, images, np.array([0, 1]))
        found.append((set(np.unique(mixed[0])) <= {0, 255}, targets[0, 0]))
    is_cutmix, kept = zip(*found, strict=True)
    return np.array(is_cutmix), np.array(kept)


def test_one_of_the_two_is_drawn_for_a_step():
    # Of mixup a share of 0 or 1 looks like cutmix, which is rare with alpha 5.
    is_cutmix, _ = kinds(make(mixup=5.0, cutmix=1.0, switch=0.3), 2000)
    assert is_cutmix.mean() == pytest.approx(0.3, abs=0.04)
    assert not kinds(make(mixup=5.0), 100)[0].any()
    assert kinds(make(cutmix=1.0), 100)[0].all()
    assert kinds(make(mixup=5.0, cutmix=1.0, switch=1.0), 100)[0].all()


@pytest.mark.parametrize("alpha", [0.8, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha):
    stats = pytest.importorskip("scipy.stats")
    kept = kinds(make(mixup=alpha), 3000)[1]
    assert kept.mean() == pytest.approx(0.5, abs=0.02)
    assert kept.std() == pytest.approx(stats.beta(alpha, alpha).std(), abs=0.01)


def test_boxes_of_cutmix_lie_anywhere():
    """Uniform share and centre, clipped at the edges; the kept share is counted."""
    kept = kinds(make(cutmix=1.0), 3000)[1]
    rng, expected = np.random.default_rng(1), []
    for _ in range(20_000):
        size = int(32 * np.sqrt(1 - rng.uniform()))
        area = 1
        for centre in rng.integers(32, size=2):
            area *= sum(centre - size // 2 <= place < centre + size // 2 for place in range(32))
        expected.append(1 - area / 1024)
    assert kept.mean() == pytest.approx(np.mean(expected), abs=0.02)
    assert kept.std() == pytest.approx(np.std(expected), abs=0.02)


def test_a_step_is_mixed_in_one_way():
    images, index = batch()
    mixing = make(mixup=0.8, cutmix=1.0)
    first = [mixing(step, images, index) for step in range(6)]
    again = [make(mixup=0.8, cutmix=1.0)(step, images, index) for step in reversed(range(6))][::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    assert len({targets.tobytes() for _, targets in first}) == 6
    other_seed = Mixing(mixing.labels, CLASSES, seed=4, mixup=0.8, cutmix=1.0)(0, images, index)
    assert (other_seed[1] != first[0][1]).any()


def test_mixing_draws_from_a_stream_of_its_own():
    """That of no image: they are seeded with seed, epoch and record."""
    mixing = make(mixup=1.0)
    _, targets = mixing(5, *batch())
    for epoch, record in [(1, 5), (5, 0), (5, 1), (0, 5)]:
        rng = np.random.default_rng((3, epoch, record))
        assert round(rng.beta(1, 1) * 256) / 256 != targets[0, 0]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_processes_mix_as_one_does(processes, options):
    images, index = batch(16)
    mixing = make(**options, smoothing=0.1)
    whole, targets = mixing(2, images, index)
    for rank in range(processes):
        rows = np.s_[rank::processes]
        mixed, part = mixing(2, images[rows], index[rows])
        np.testing.assert_array_equal(mixed, whole[rows])
        np.testing.assert_array_equal(part, targets[rows])


def test_a_batch_of_one_is_mixed_with_itself():
    images, index = batch(1)
    mixed, targets = make(mixup=0.8, cutmix=1.0)(0, images, index)
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(targets, [[1, 0, 0, 0, 0]])


# --- as part of the stream -------------------------------------------------------------------------------------------


def stream(mix, **options):
    digits = open_source("digits", channels=1)
    given = {"batch_size": 16, "image_size": (8, 8), "seed": 5, "total_steps": 6, **options}
    with train_batches(digits, indices=np.arange(40), mix=mix, **given) as batches:
        return list(batches)


def test_the_stream_hands_out_targets():
    digits = open_source("digits", channels=1)
    plain = stream(None)
    assert plain[0].targets is None
    found = stream(Mixing(digits.labels, 10, 0))
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.targets, np.eye(10)[digits.labels[one.index]])


def test_a_resumed_stream_and_several_processes_see_the_same():
    digits = open_source("digits", channels=1)
    mix = Mixing(digits.labels, 10, 0, mixup=0.8, cutmix=1.0, smoothing=0.1)
    whole = stream(mix)
    for one, other in zip(stream(mix, start_step=2), whole[2:], strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.targets, other.targets)
    for rank in (0, 1):
        for one, other in zip(stream(mix, rank=rank, world_size=2), whole, strict=True):
            np.testing.assert_array_equal(one.images, other.images[rank::2])
            np.testing.assert_array_equal(one.targets, other.targets[rank::2])
