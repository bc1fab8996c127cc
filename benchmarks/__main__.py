"""Run every benchmark at its short setting."""

from benchmarks import backends, checkpoint, macs, plan, step

for benchmark in (macs, step, plan, backends, checkpoint):
    benchmark.main([])
    print()
