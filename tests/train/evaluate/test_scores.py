"""Scores and pictures of classifiers."""

import math

import numpy as np
import pytest

from prmim_train.evaluate.score_pictures import draw_confusion, draw_learning
from prmim_train.evaluate.scores import format_score, score


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (25, 50), (9_750, 10_000), (3, 7)])
def test_the_interval_is_wilsons(correct, total):
    z, share = 1.959963984540054, correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    found = score(np.zeros(total, np.int64), np.repeat([0, 1], [correct, total - correct]), ["a", "b"])
    low, high = found["confidence_interval"]
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert 0 <= low <= share <= high <= 1


def test_scores_are_those_of_a_literal_count():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(4, size=200), rng.integers(5, size=200)
    names = ["ant", "bee", "cat", "dog", "emu"]  # of which there is none
    found = score(truth, predicted, names)
    pairs = list(zip(truth.tolist(), predicted.tolist(), strict=True))
    assert found["correct"] == sum(a == b for a, b in pairs)
    assert found["accuracy"] == found["correct"] / 200
    assert found["test_images"] == 200
    assert list(found["per_class"]) == names[:4]
    for number, name in enumerate(names[:4]):
        own = [a == b for a, b in pairs if a == number]
        assert found["per_class"][name] == {"images": len(own), "accuracy": pytest.approx(np.mean(own))}


def test_scores_in_words():
    found = score(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]), ["a", "b"])
    assert format_score(found) == "75.0 % of 4 test images correct (95 % confidence interval: 30.1 to 95.4 %)"


@pytest.mark.parametrize("classes", [2, 10, 30, 200])
def test_confusion_is_drawn(classes, tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.integers(classes, size=300)
    predicted = np.where(rng.random(300) < 0.8, truth, rng.integers(classes, size=300))
    names = [f"class {number} $_$" for number in range(classes)]
    assert draw_confusion(tmp_path / "confusion.png", truth, predicted, names, "a title")
    assert (tmp_path / "confusion.png").stat().st_size > 5000


def test_the_matrix_drawn_is_a_literal_count(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("prmim_train.evaluate.score_pictures.save_figure", lambda figure, path: figures.append(figure))
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(4, size=200), rng.integers(5, size=200)  # no image of the last class
    draw_confusion(tmp_path / "confusion.png", truth, predicted, ["ant", "bee", "cat", "dog", "emu"], "a title")
    pairs = list(zip(truth.tolist(), predicted.tolist(), strict=True))
    axes = figures[0].axes[0]
    numbers = {(int(text.get_position()[1]), int(text.get_position()[0])): int(text.get_text()) for text in axes.texts}
    assert numbers == {pair: pairs.count(pair) for pair in set(pairs)}
    shares = [[pairs.count((a, b)) / max(1, np.sum(truth == a)) for b in range(5)] for a in range(5)]
    np.testing.assert_allclose(axes.images[0].get_array(), shares)


def test_of_too_many_classes_nothing_is_drawn(tmp_path, monkeypatch):
    def fail(*given):
        raise AssertionError("a matrix of this size would fill the memory")

    monkeypatch.setattr("sklearn.metrics.confusion_matrix", fail)
    names = [str(number) for number in range(30_000)]
    truth = np.arange(30_000)
    assert not draw_confusion(tmp_path / "confusion.png", truth, truth, names, "a title")
    assert list(tmp_path.iterdir()) == []
    assert score(truth, truth, names)["accuracy"] == 1


@pytest.fixture
def drawn(monkeypatch):
    """Return what is plotted, by its label."""
    from matplotlib.axes import Axes

    found = {}
    plot = Axes.plot

    def note(self, x, y, *given, **options):
        found.setdefault(options["label"], []).append((list(x), list(y)))
        return plot(self, x, y, *given, **options)

    monkeypatch.setattr(Axes, "plot", note)
    return found


def test_curves_are_those_of_the_metrics(drawn, tmp_path):
    records = [{"step": s, "epoch": s / 4, "loss": 1 / s, "accuracy": s / 10, "lr": 0.1} for s in range(1, 9)]
    records[2] |= {"loss": None, "accuracy": None}  # no step was finite
    records[3] |= {"test_loss": 0.5, "test_accuracy": 0.4}
    records[7] |= {"test_loss": 0.25, "test_accuracy": 0.75}
    draw_learning(tmp_path / "curves.png", records)
    loss, accuracy = drawn["training images, augmented"]
    assert loss[0] == accuracy[0] == [s / 4 for s in (1, 2, 4, 5, 6, 7, 8)]
    assert accuracy[1] == pytest.approx([10 * s for s in (1, 2, 4, 5, 6, 7, 8)])
    assert drawn["test images"] == [([1, 2], [0.5, 0.25]), ([1, 2], [40, 75])]
    assert (tmp_path / "curves.png").is_file()


def test_curves_of_a_single_line(tmp_path):
    draw_learning(tmp_path / "curves.png", [{"step": 1, "epoch": 1, "loss": 1.0, "accuracy": 0.5}])
    assert (tmp_path / "curves.png").is_file()
