"""Training needs no package of the extra `evaluate`.

Commands that need one report it before the work starts.
"""

import subprocess
import sys

import numpy as np
import pytest

from prmim_train.cli.commands import main

SCRIPT = """
import sys

for name in ("sklearn", "scipy", "matplotlib"):
    sys.modules[name] = None  # importing it fails

from prmim_train.cli.commands import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def photos(tmp_path):
    """Write 40 images of two classes."""
    path = tmp_path / "photos.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 2)
    return str(path)


def test_training_alone_imports_neither_scikit_learn_nor_matplotlib(tiny_words, photos, tmp_path):
    words = [*tiny_words, "--data", photos, "--batch_size", "20", "--eval_limit", "0", "--pictures", "0"]
    words += ["--backend", "torch", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "pretrain", *words], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


INSTALL = "is not installed; pip install 'prmim[evaluate]'"


@pytest.mark.parametrize(
    ("missing", "options", "line"),
    [
        ("sklearn", [], f"data: scikit-learn {INSTALL}, or --data FOLDER"),
        (
            "sklearn",
            ["--data", "photos", "--batch_size", "20"],
            f"eval_limit: scikit-learn {INSTALL}, or --eval_limit 0",
        ),
        ("matplotlib", [], f"pictures: matplotlib {INSTALL}, or --pictures 0"),
    ],
)
def test_a_training_that_needs_a_missing_package_does_not_start(
    missing, options, line, tiny_words, photos, fake, monkeypatch, capsys, tmp_path
):
    options = [photos if word == "photos" else word for word in options]
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["pretrain", *tiny_words, "--eval_limit", "10", "--pictures", "2", *options]) == 2
    assert capsys.readouterr().err == f"prmim: error: {line}\n"
    assert not fake.made
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--eval_limit", "--pictures"])
def test_a_training_without_them_needs_no_package(option, tiny_words, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, {"--eval_limit": "sklearn", "--pictures": "matplotlib"}[option], None)
    assert main(["pretrain", *tiny_words, "--data", photos, "--batch_size", "20", option, "0"]) == 0


@pytest.mark.parametrize("missing", ["scipy", "sklearn", "matplotlib"])
def test_an_evaluation_needs_all_of_them(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["evaluate", "--run", "runs/any"]) == 2
    name = {"sklearn": "scikit-learn"}.get(missing, missing)
    assert capsys.readouterr().err == f"prmim: error: evaluate: {name} {INSTALL}\n"


def test_pictures_need_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["picture", "--run", "runs/any"]) == 2
    assert capsys.readouterr().err == f"prmim: error: pictures: matplotlib {INSTALL}\n"
