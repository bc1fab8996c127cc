"""Measured claims, each a command; `python -m benchmarks` runs them all."""

import os

# As the program does: threads that spin while they wait would measure who else is using the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
