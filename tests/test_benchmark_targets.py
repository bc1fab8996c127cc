"""The benchmark of targets: what adjacent patches explain."""

import json

import numpy as np
import pytest

from benchmarks import targets
from prmim_core import Grid


def ramps(count, size=24):
    """Return images of linear ramps, which adjacent patches determine."""
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(count, 2, 1, 1))
    place = np.arange(size) / size
    return (slopes[:, 0] * place[:, None] + slopes[:, 1] * place)[..., None]


def test_neighbours_explain_ramps_and_nothing_of_noise():
    explained = targets.explain(ramps(80), (4, 4)).targets
    assert list(explained) == [targets.ITSELF, targets.IMAGE, "2 x 2 cell means", "1 x 1 cell means"]
    assert [number for number, _ in explained.values()] == [16, 16, 4, 1]
    assert all(share > 0.999 for name, (_, share) in explained.items() if name != targets.ITSELF)
    noise = np.random.default_rng(0).normal(size=(80, 24, 24, 1))
    assert all(abs(share) < 0.1 for _, share in targets.explain(noise, (4, 4)).targets.values())


def test_frequencies_below_those_of_the_neighbours_are_explained():
    rng = np.random.default_rng(0)
    rough = 0.1 * rng.normal(size=(400, 24, 24, 1))
    spectra = targets.explain(ramps(400) + rough, (4, 4)).spectra
    assert list(spectra[targets.IMAGE]) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert list(spectra[targets.ITSELF]) == [0.5, 1.0, 1.5, 2.0]  # its mean is always 0
    assert spectra[targets.IMAGE][0.0] > 0.9
    assert abs(spectra[targets.IMAGE][2.0]) < 0.1


def test_neighbours_along_each_axis():
    inner, neighbours = targets.adjacent(Grid((3, 4)))
    assert inner.tolist() == [5, 6]
    assert [sorted(row) for row in neighbours.tolist()] == [[1, 4, 6, 9], [2, 5, 7, 10]]
    inner, neighbours = targets.adjacent(Grid((3, 3, 3)))
    assert (inner.tolist(), sorted(neighbours[0].tolist())) == ([13], [4, 10, 12, 14, 16, 22])


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    words = ["--channels", "1", "--patch_size", "2", "--images", "200", "--json", str(tmp_path)]
    assert targets.main([*words, "--plot", str(tmp_path / "plots" / "targets.png")]) == 0
    assert "explained by adjacent patches" in capsys.readouterr().out
    table = json.loads((tmp_path / "targets.json").read_text())["tables"]["explained by adjacent patches"]
    assert 0.5 < table[targets.ITSELF]["share"] < table[targets.IMAGE]["share"] < 1
    assert (tmp_path / "plots" / "targets.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch_size", "7"], "patch_size: expected sizes that divide the image"),
        (["--patch_size", "8"], "patch_size: expected patches of 2 pixels or more, at least 3 x 3 of them"),
        (["--patch_size", "1"], "patch_size: expected patches of 2 pixels or more, at least 3 x 3 of them"),
        (["--data", "nowhere"], "data: nothing at nowhere"),
    ],
)
def test_wrong_options_are_told_in_one_line(capsys, words, message):
    assert targets.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
