"""Examples for frameworks outside of the array API standard: `make test-foreign`.

Each runs in its own process.

The code is that of the pages: blocks marked by a framework, such as ```` ```python keras ````, after the plain blocks.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "foreign_frameworks.md"

CASES = {  # framework of the blocks and backend of Keras: package, conversions, whether the core refuses its arrays
    ("keras", "tensorflow"): ("tensorflow", "keras.ops.convert_to_tensor, keras.ops.convert_to_numpy", True),
    ("keras", "jax"): ("jax", "keras.ops.convert_to_tensor, keras.ops.convert_to_numpy", False),
    ("keras", "torch"): ("torch", "keras.ops.convert_to_tensor, keras.ops.convert_to_numpy", False),
    ("tensorflow", ""): ("tensorflow", "tf.constant, np.asarray", True),
    ("mlx", ""): ("mlx", "mx.array, np.asarray", True),
    ("tinygrad", ""): ("tinygrad", "Tensor, lambda tensor: tensor.numpy()", True),
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (framework or nothing, code) of every Python block of a page."""
    return re.findall(r"^```python(?: (\w+))?\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_marked_block_belongs_to_a_case():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    marked = {(page, framework) for page in pages for framework, _ in blocks(page) if framework}
    assert marked == {(PAGE, framework) for framework, _ in CASES}


@pytest.mark.parametrize(("framework", "backend"), CASES)
def test_the_page_runs_and_equals_numpy(framework, backend, tmp_path):
    package, conversions, is_foreign = CASES[framework, backend]
    missing = [name for name in (framework, package) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: make test-foreign")
    code = [code for marker, code in blocks(PAGE) if marker in ("", framework)]
    code.append(f"import golden\n\ngolden.compare(take, rebuild, {conversions}, is_foreign={is_foreign})\n")
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(code))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    if backend:
        environment["KERAS_BACKEND"] = backend
    if framework == "tinygrad" and not shutil.which("clang"):
        environment["DEV"] = "PYTHON"  # slow, but needs no compiler
    run = subprocess.run([sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "golden comparisons passed" in run.stdout
