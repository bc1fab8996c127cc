"""Collects the doctests of a file only if its imports are installed."""

import importlib.util

NEEDS = {"prmim_torch/furthest.py": "triton", "prmim_torch/transformers.py": "transformers"}

collect_ignore = [file for file, package in NEEDS.items() if importlib.util.find_spec(package) is None]
