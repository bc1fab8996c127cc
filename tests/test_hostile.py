"""The quick part of the hostile cases; ``python tests/hostile`` tries all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = {
    "a run belongs to one process, one data set, one task": range(1, 5),
    "the environment disappears": range(5, 8),
    "hostile data": range(8, 12),
    "the library": range(12, 17),
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_every_case_is_handled(kinds):
    command = [sys.executable, str(Path(__file__).with_name("hostile")), "--quick", "--kinds", *map(str, kinds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
