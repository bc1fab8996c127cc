"""Imports go one way, and what is public is documented."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}

# What each package may never import, neither at the top of a file nor inside a function.
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "optax", "orbax", "tensorflow"}
NEVER_ANYWHERE = {"timm", "torchvision", "pickle", "cPickle", "dill", "cloudpickle"}
NEVER = {
    "prmim_core": {
        "prmim_reference",
        "prmim_methods",
        "prmim_torch",
        "prmim_jax",
        "prmim_train",
        *FRAMEWORKS - {"jax"},
    },
    "prmim_reference": {"prmim_core", "prmim_methods", "prmim_torch", "prmim_jax", "prmim_train", *FRAMEWORKS},
    "prmim_methods": {"prmim_reference", "prmim_torch", "prmim_jax", "prmim_train", *FRAMEWORKS},
    "prmim_torch": {"prmim_reference", "prmim_jax", "prmim_train", *FRAMEWORKS - {"torch"}},
    "prmim_jax": {"prmim_reference", "prmim_torch", "prmim_train", "torch"},
    "prmim_train": {"prmim_reference", "prmim_torch", "prmim_jax", *FRAMEWORKS},
}
# These import nothing but the listed modules, the standard library and themselves.
ONLY = {
    "prmim_core": {"numpy", "array_api_compat"},
    "prmim_reference": {"numpy", "safetensors"},
    "prmim_methods": {"numpy", "prmim_core"},
}

FILES = [(name, path) for name, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]
IDS = [f"{name}/{path.relative_to(FOLDERS[name])}" for name, path in FILES]


def imports(source):
    """Return (top-level module, whether inside a function) for each import."""
    found = set()

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.update((alias.name.partition(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(("." if node.level else node.module.partition(".")[0], inside))
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def faults(package, file_name, source):
    """Return the imports of a file that its package may not have."""
    found = []
    for module, inside in imports(source):
        # Two exceptions: JAX has loops of its own, and where its arrays come in it is there; strategies of hypothesis.
        is_jax = module == "jax" and file_name == "_arrays.py" and inside
        is_exception = package == "prmim_core" and (is_jax or (module == "hypothesis" and file_name == "testing.py"))
        allowed = {package, *sys.stdlib_module_names, *ONLY.get(package, {module})} - NEVER_ANYWHERE - NEVER[package]
        if (module not in allowed and not is_exception) or module == ".":
            found.append(module)
    return sorted(found)


def test_every_package_has_rules_and_is_installed():
    assert set(FOLDERS) <= set(NEVER)
    folders = [ROOT, ROOT / "adapters", ROOT / "reference"]
    packages = {path.parent.relative_to(folder) for folder in folders for path in folder.glob("prmim_*/**/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {".".join(package.parts) for package in packages}
    assert set(FOLDERS) == {package.parts[0] for package in packages}


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_imports_go_one_way(package, path):
    assert faults(package, path.name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("package", "file_name", "source", "expected"),
    [
        ("prmim_core", "grid.py", "import numpy as np\nfrom math import prod\nimport array_api_compat.torch", []),
        ("prmim_core", "grid.py", "import scipy.ndimage", ["scipy"]),
        ("prmim_core", "grid.py", "from torch.nn import Module", ["torch"]),
        ("prmim_core", "grid.py", "def f():\n    import jax", ["jax"]),
        ("prmim_core", "_arrays.py", "def f():\n    import jax.numpy", []),
        ("prmim_core", "_arrays.py", "import jax", ["jax"]),
        ("prmim_core", "_arrays.py", "def f():\n    import torch", ["torch"]),
        ("prmim_core", "testing.py", "def f():\n    import hypothesis.strategies", []),
        ("prmim_core", "grid.py", "def f():\n    import hypothesis", ["hypothesis"]),
        ("prmim_methods", "testing.py", "import hypothesis", ["hypothesis"]),
        ("prmim_core", "grid.py", "from . import counts", ["."]),
        ("prmim_core", "grid.py", "class A:\n    def f(self):\n        import pickle", ["pickle"]),
        ("prmim_reference", "mae.py", "from prmim_core.grid import Grid", ["prmim_core"]),
        ("prmim_core", "grid.py", "import prmim_methods.cost", ["prmim_methods"]),
        ("prmim_methods", "cost.py", "from prmim_core import Schedule", []),
        ("prmim_methods", "cost.py", "def f():\n    import torch", ["torch"]),
        ("prmim_methods", "teacher.py", "def f():\n    import huggingface_hub", ["huggingface_hub"]),
        ("prmim_torch", "mae.py", "import torch, prmim_core, prmim_methods", []),
        ("prmim_torch", "mae.py", "import timm.models", ["timm"]),
        ("prmim_torch", "mae.py", "if True:\n    from prmim_train import loop", ["prmim_train"]),
        ("prmim_train", "loop.py", "async def f():\n    import prmim_torch", ["prmim_torch"]),
        ("prmim_train", "loop.py", "import torch", ["torch"]),
        ("prmim_jax", "mae.py", "import jax, flax.nnx, torch", ["torch"]),
    ],
)
def test_the_rules_find_faults(package, file_name, source, expected):
    assert faults(package, file_name, source) == expected


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_no_file_loads_pickles_under_another_name(package, path):
    # torch.load and numpy.load unpickle what they are not told not to.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module = ast.unparse(node.func.value)
        if module == "torch":
            assert options.get("weights_only") == "True", f"line {node.lineno}"
        if module in ("np", "numpy"):
            assert options.get("allow_pickle", "False") == "False", f"line {node.lineno}"


@pytest.mark.parametrize("package", ["prmim_core.testing", "prmim_reference", "prmim_methods"])
def test_importing_loads_no_framework_and_no_network_code(package):
    program = f"import sys, {package}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert package.partition(".")[0] in loaded
    forbidden = FRAMEWORKS | {"scipy", "prmim_torch", "prmim_jax", "prmim_train"}
    forbidden |= {"hypothesis", "huggingface_hub", "requests", "httpx", "urllib3", "socket", "ssl"}
    assert not forbidden & set(loaded)


def test_the_core_depends_on_numpy_and_array_api_compat_alone():
    names = {requirement.partition(">=")[0] for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"numpy", "array-api-compat"}


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_are_typed(package):
    assert (FOLDERS[package] / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


@pytest.mark.parametrize("folder", ["adapters", "reference"])
def test_folders_that_hold_packages_are_none(folder):
    assert not (ROOT / folder / "__init__.py").exists()


# --- the public face of the core -----------------------------------------------------------------------------------


def public_names():
    modules = [importlib.import_module(name) for name in ("prmim_core", "prmim_core.testing")]
    return [(name, getattr(module, name)) for module in modules for name in module.__all__]


def test_all_lists_what_is_imported():
    core = importlib.import_module("prmim_core")
    tree = ast.parse(Path(core.__file__).read_text(encoding="utf-8"))
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert core.__all__ == sorted(imported)


@pytest.mark.parametrize(("name", "thing"), public_names(), ids=[name for name, _ in public_names()])
def test_what_is_public_is_documented(name, thing):
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.splitlines()[0].endswith(".")
    if inspect.isfunction(thing):
        assert "Examples\n--------\n>>> " in doc
        described = doc.partition("Parameters\n----------\n")[2]
        missing = [argument for argument in inspect.signature(thing).parameters if argument not in described]
        assert not missing
    for method_name, method in vars(thing).items() if inspect.isclass(thing) else ():
        if not method_name.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
            assert inspect.getdoc(method), method_name


@pytest.mark.parametrize(("name", "thing"), public_names(), ids=[name for name, _ in public_names()])
def test_what_is_public_lives_in_the_core(name, thing):
    assert thing.__module__.startswith("prmim_core.")
    assert thing.__name__ == name


def private_names(source):
    """Return the private names of jax, flax, optax or orbax that a file uses."""
    tree = ast.parse(source)
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    chains = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    pattern = re.compile(r"(jax|jaxlib|jnp|lax|flax|nnx|optax|orbax|ocp)\.(.*\.)?(_[a-z]\w*|interpreters|xla_bridge)")
    return {name for name in modules + chains if pattern.fullmatch(name)}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "adapters").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_private_names_of_jax(path):
    assert private_names(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import jax\njax._src", {"jax._src"}),
        ("from jax._src import core", {"jax._src"}),
        ("from jax.interpreters import ad", {"jax.interpreters"}),
        ("import jax\njax.core.Tracer, jax.lax.scan, jnp.x_y", set()),
    ],
)
def test_the_rule_finds_private_names(source, expected):
    assert private_names(source) == expected
