"""Training runs: loop, engine protocol, directory, log, trackers, processes."""
