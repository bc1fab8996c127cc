"""Run every benchmark at its short setting."""

from benchmarks import backends, macs, plan, step

for benchmark in (macs, step, plan, backends):
    benchmark.main([])
    print()
