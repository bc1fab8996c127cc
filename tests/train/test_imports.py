"""Parts of the trainer import each other one way, and heavy packages on use."""

import ast
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

import prmim_train

ROOT = Path(prmim_train.__file__).parent
LAYERS = ("config", "data", "run", "report", "evaluate", "interop", "pretrain", "cli", "__main__")
"""Each part may import itself and the parts before it."""


def part(path):
    """Part of the trainer that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(source):
    """Parts of the trainer that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {module.split(".")[1] for module in modules if module.startswith("prmim_train.")}
    return found


def test_every_part_has_a_layer():
    assert {part(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    allowed = LAYERS[: LAYERS.index(part(path)) + 1] if part(path) in LAYERS else ()
    assert imported_parts(path.read_text(encoding="utf-8")) <= set(allowed)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy\nfrom prmim_train.run.loop import Job", {"run"}),
        ("def f():\n    from prmim_train import cli", {"cli"}),
        ("if TYPE_CHECKING:\n    import prmim_train.report.pictures, prmim_core", {"report"}),
    ],
)
def test_the_rule_finds_imports(source, expected):
    assert imported_parts(source) == expected


HEAVY = {
    *("torch", "jax", "flax", "optax", "orbax", "transformers", "tensorboard", "wandb", "mlflow"),
    *("sklearn", "scipy", "matplotlib", "grain", "pandas"),
}
"""Packages that take most of a second or more to import."""

LIGHT = {
    "--help": 0,
    "--version": 0,
    "pretrain --help": 0,
    "inspect --help": 0,
    "evaluate --help": 0,
    "picture --help": 0,
    "export --help": 0,
    "push --help": 0,
    "import --help": 0,
    "import": 2,
    "import nowhere out.safetensors": 2,
    "import photos out.safetensors": 2,
    "features --help": 0,
    "inspect": 0,
    "inspect --backend jax --device cuda": 0,
    "inspect --data photos --config photos_vit_tiny": 0,
    "inspect --data photos --config simmim_vit_base": 0,
    "inspect --data photos --config maskalign_vit_base --teacher teacher": 0,
    "inspect --data photos --config maskalign_vit_base --teacher nobody/nothing": 0,
    "inspekt": 2,
    "inspect --depth many": 2,
    "inspect --image_size 31": 2,
    "inspect --config wrong.yaml": 2,
    "inspect --backend tensorflow": 2,
    "pretrain --data nowhere": 2,
    "pretrain --depth 2000": 2,
    "pretrain --init_weights nowhere": 2,
    "pretrain --accumulate 3": 2,
    "pretrain --out run": 2,
    "pretrain --out run --resume": 2,
    "evaluate --run nowhere": 2,
    "evaluate --run run": 1,
    "evaluate --run run --protocol finetune": 1,
    "features --run nowhere --out f.npz": 2,
    "features --run run --out f.csv": 2,
    "picture --run run --kind similarity": 2,
    "picture --run run --kind schedule": 1,
    "export out --run run --to hf": 1,
    "export out --run run --to onnx": 2,
    "push owner/name --run nowhere": 2,
}
"""Commands that answer without a framework, and their exit codes. The folder `run` holds a damaged checkpoint."""

PROGRAM = """
import json, sys
from prmim_train.__main__ import main
found, lines, left = {}, json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))
for line in lines:
    sys.argv = ["prmim", *line.split()]
    code = main()
    found[line] = [code, sorted(left & set(sys.modules))]
    left -= set(sys.modules)
open("found.json", "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Exit code of each command, and the heavy packages that it imports first.

    All commands run in one process.
    """
    folder = tmp_path_factory.mktemp("light")
    for name in ("photos", "teacher", "run/checkpoints/step_00000007"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "photos" / "a.png")
    Image.new("RGB", (16, 16)).save(folder / "photos" / "b.png")
    (folder / "teacher" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", "patch_size": 16}))
    (folder / "wrong.yaml").write_text("epochs: many")
    recipe = resources.files("prmim_train.config").joinpath("recipes", "digits.yaml").read_text(encoding="utf-8")
    (folder / "run" / "config.yaml").write_text(recipe)
    program = [sys.executable, "-c", PROGRAM, json.dumps(list(LIGHT)), json.dumps(sorted(HEAVY))]
    subprocess.run(program, cwd=folder, check=True)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("command", LIGHT)
def test_help_inspect_and_errors_import_nothing_heavy(command, found):
    assert found[command] == [LIGHT[command], []]
