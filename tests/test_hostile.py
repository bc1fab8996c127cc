"""Quick part of the hostile cases; ``python tests/hostile`` runs all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = {"runs": range(1, 8), "data and the library": range(8, 17)}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_every_case_is_handled(kinds):
    command = [sys.executable, str(Path(__file__).with_name("hostile")), "--quick", "--kinds", *map(str, kinds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
