"""Measured claims, each a command; `python -m benchmarks` runs them all."""

import os

# As the program does: threads that spin while they wait would measure who else is using the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# torch's profiler would tell when it starts and stops, each time, between the rows of tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
