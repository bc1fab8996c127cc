"""Every example runs, is short of nothing that its page shows, and has a page."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = ROOT / "docs" / "examples"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_custom_trainer_learns(backend, load, tmp_path, quick_compiler):
    pytest.importorskip(backend)
    losses = load(f"custom_trainer_{backend}").main(tmp_path, steps=12)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert is_picture(tmp_path / f"custom_trainer_{backend}.png")


def test_the_custom_sampler_is_close_to_furthest_sampling(load, tmp_path):
    found = load("custom_sampler").main(tmp_path, images=64)
    assert found["furthest"].lonely == 0
    assert found["lonely first"].lonely < 0.1 * found["random"].lonely
    assert is_picture(tmp_path / "custom_sampler.png")


def test_the_custom_sampler_has_no_counterexample(load):
    assume = pytest.importorskip("hypothesis").assume
    from prmim_core.testing import check_throwing

    strategy = load("custom_sampler").lonely_first

    def on_images(grid, counts, noise, is_visible):
        assume(grid.axes == 2)
        return strategy(grid, counts, noise, is_visible)

    check_throwing(on_images, max_examples=10)


def test_features_of_a_folder_are_drawn(load, tmp_path, capsys):
    pytest.importorskip("torch")
    example = load("explore_features")
    tiny = {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 8, "epochs": 1, "batch_size": 1024, "pictures": 0}
    example.main(out=tmp_path, number=40, **tiny)
    first = capsys.readouterr().out
    example.main(out=tmp_path, number=40, **tiny)
    assert "Trained " in first
    assert "Trained " not in capsys.readouterr().out
    assert is_picture(tmp_path / "neighbours.png")
    assert is_picture(tmp_path / "patch_features.png")
    assert len(list((tmp_path / "digits").glob("*/*.png"))) == 1797


def test_an_exported_encoder_works_in_transformers(load, tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'prmim[hf]'")
    accuracy = load("export_encoder").main(tmp_path / "out", steps=1, shown=20)
    assert accuracy > 0.5
    difference = re.search(r"largest difference of a feature to prmim's: (\S+)", capsys.readouterr().out)
    assert float(difference[1]) < 1e-5
    assert is_picture(tmp_path / "out" / "exported_features.png")


def test_every_example_has_a_page_that_shows_it():
    pages = [page for page in PAGES.glob("*.md") if page.stem != "index"]
    shown = {name for page in pages for name in re.findall(r"literalinclude} \S+/(\w+)\.py", page.read_text())}
    assert shown == {path.stem for path in EXAMPLES.glob("*.py")}
    toctree = (PAGES / "index.md").read_text().partition("{toctree}")[2]
    assert sorted(re.findall(r"^(\w+)$", toctree, flags=re.MULTILINE)) == sorted(page.stem for page in pages)
