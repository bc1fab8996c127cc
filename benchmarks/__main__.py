"""Run every benchmark at its short setting."""

from benchmarks import macs, plan, step

for benchmark in (macs, step, plan):
    benchmark.main([])
    print()
