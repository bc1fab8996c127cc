"""Training runs: loop, engine protocol, run directory, log, trackers and processes."""
